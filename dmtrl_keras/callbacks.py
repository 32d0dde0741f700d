"""Callbacks of `fit` for networks of several tasks."""

from dmtrl_keras.monitoring.monitor import TaskMonitor
from dmtrl_keras.training.improvement import TaskImprovement

__all__ = ["TaskImprovement", "TaskMonitor"]
