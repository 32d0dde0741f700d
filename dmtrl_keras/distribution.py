"""Training on several GPUs and machines."""

from dmtrl_keras.training.distribution import STRATEGIES, divisible, make_strategy, train

__all__ = ["STRATEGIES", "divisible", "make_strategy", "train"]
