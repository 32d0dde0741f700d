"""Priors that learn how tasks, classes and features are related; classic norms."""

from dmtrl_keras.kernels.state import (
    KernelRegularizer,
    KernelState,
    StatefulRegularizer,
    mode_names,
)
from dmtrl_keras.mrn.covariance import ModeCovariance
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer
from dmtrl_keras.mrn.sparse import SparseTaskPrecision
from dmtrl_keras.mrn.state import TensorNormalState
from dmtrl_keras.norms.regularizers import (
    ClusteredTasks,
    GroupLasso,
    MatrixNorm,
    MeanDeviation,
    TraceNorm,
)

__all__ = [
    "ClusteredTasks",
    "GroupLasso",
    "KernelRegularizer",
    "KernelState",
    "MatrixNorm",
    "MeanDeviation",
    "ModeCovariance",
    "SparseTaskPrecision",
    "StatefulRegularizer",
    "TensorNormalRegularizer",
    "TensorNormalState",
    "TraceNorm",
    "mode_names",
]
