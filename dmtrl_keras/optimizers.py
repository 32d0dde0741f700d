"""Optimizers with other learning rates for some layers, and with proximal steps."""

from dmtrl_keras.training.optimizers import LearningRateMultiplier, ProximalOptimizer

__all__ = ["LearningRateMultiplier", "ProximalOptimizer"]
