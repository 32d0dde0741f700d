"""Truncated decompositions of a stacked kernel, as functions on NumPy arrays."""

from dmtrl_keras.dmtrl.decomposition import (
    THRESHOLDS,
    check_choice,
    laf,
    laf_bounds,
    resolve_rank,
    truncation_rank,
    tt,
    tt_bounds,
    tucker,
    tucker_bounds,
)
from dmtrl_keras.ground.linalg import mode_product, unfold

__all__ = [
    "THRESHOLDS",
    "check_choice",
    "laf",
    "laf_bounds",
    "mode_product",
    "resolve_rank",
    "truncation_rank",
    "tt",
    "tt_bounds",
    "tucker",
    "tucker_bounds",
    "unfold",
]
