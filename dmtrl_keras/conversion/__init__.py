"""From a Keras model to a network of T tasks, and from that to the model of one task."""

from dmtrl_keras.conversion.multitask import multitask
from dmtrl_keras.conversion.rules import Kernels, Rule, register_rule
from dmtrl_keras.conversion.single_task import single_task

__all__ = ["Kernels", "Rule", "multitask", "register_rule", "single_task"]
