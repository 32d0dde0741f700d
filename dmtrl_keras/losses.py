"""Losses for several tasks: the hinge of T outputs, and losses with missing labels."""

from dmtrl_keras.training.losses import MaskedLoss, TaskHinge, one_vs_rest

__all__ = ["MaskedLoss", "TaskHinge", "one_vs_rest"]
