"""Similarity of tasks by canonical correlation, on arrays."""

from dmtrl_keras.trn.canonical_correlation import (
    CanonicalCorrelation,
    canonical_correlation,
    task_similarity,
    task_similarity_matrix,
)

__all__ = [
    "CanonicalCorrelation",
    "canonical_correlation",
    "task_similarity",
    "task_similarity_matrix",
]
