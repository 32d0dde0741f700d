"""Priors over kernels that learn how tasks, classes and features are related."""

from dmtrl_keras.kernels.state import KernelState, StatefulRegularizer, mode_names
from dmtrl_keras.mrn.covariance import ModeCovariance
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer
from dmtrl_keras.mrn.sparse import SparseTaskPrecision
from dmtrl_keras.mrn.state import TensorNormalState

__all__ = [
    "KernelState",
    "ModeCovariance",
    "SparseTaskPrecision",
    "StatefulRegularizer",
    "TensorNormalRegularizer",
    "TensorNormalState",
    "mode_names",
]
