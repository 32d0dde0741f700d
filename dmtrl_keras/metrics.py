"""Metrics for several tasks: errors of T outputs, and metrics with missing labels."""

from dmtrl_keras.training.improvement import improvement
from dmtrl_keras.training.metrics import MaskedMetric, MeanBinaryError, MulticlassError

__all__ = ["MaskedMetric", "MeanBinaryError", "MulticlassError", "improvement"]
