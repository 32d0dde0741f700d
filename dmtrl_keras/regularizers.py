"""Priors over kernels that learn how tasks, classes and features are related."""

from dmtrl_keras.mrn.covariance import ModeCovariance
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer
from dmtrl_keras.mrn.state import TensorNormalState, mode_names

__all__ = ["ModeCovariance", "TensorNormalRegularizer", "TensorNormalState", "mode_names"]
