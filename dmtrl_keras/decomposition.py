"""Truncated decompositions of a stacked kernel, as functions on NumPy arrays."""

from dmtrl_keras.dmtrl.decomposition import (
    THRESHOLDS,
    check_choice,
    laf,
    laf_bounds,
    laf_ranks,
    resolve_rank,
    truncation_rank,
    tt,
    tt_bounds,
    tt_ranks,
    tucker,
    tucker_bounds,
    tucker_ranks,
)
from dmtrl_keras.ground.linalg import mode_product, unfold

__all__ = [
    "THRESHOLDS",
    "check_choice",
    "laf",
    "laf_bounds",
    "laf_ranks",
    "mode_product",
    "resolve_rank",
    "truncation_rank",
    "tt",
    "tt_bounds",
    "tt_ranks",
    "tucker",
    "tucker_bounds",
    "tucker_ranks",
    "unfold",
]
