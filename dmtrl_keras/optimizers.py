"""Optimizers with other learning rates for some layers."""

from dmtrl_keras.training.optimizers import LearningRateMultiplier

__all__ = ["LearningRateMultiplier"]
