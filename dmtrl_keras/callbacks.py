"""Callbacks of `fit` for networks of several tasks."""

from dmtrl_keras.monitoring.monitor import TaskMonitor
from dmtrl_keras.training.improvement import TaskImprovement
from dmtrl_keras.training.stopping import EarlyStoppingByTask

__all__ = ["EarlyStoppingByTask", "TaskImprovement", "TaskMonitor"]
