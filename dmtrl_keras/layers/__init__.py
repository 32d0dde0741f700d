"""Layers that run T tasks at once on the grouped layout."""

from dmtrl_keras.layers.base import TaskLayer, task_layers
from dmtrl_keras.layers.conv import TaskConv1D, TaskConv2D, TaskConv3D
from dmtrl_keras.layers.dense import TaskDense
from dmtrl_keras.layers.depthwise import TaskDepthwiseConv1D, TaskDepthwiseConv2D
from dmtrl_keras.layers.factorized import (
    FactorizedLayer,
    LAFConv1D,
    LAFConv2D,
    LAFConv3D,
    LAFDense,
    TTConv1D,
    TTConv2D,
    TTConv3D,
    TTDense,
    TuckerConv1D,
    TuckerConv2D,
    TuckerConv3D,
    TuckerDense,
)
from dmtrl_keras.layers.fusion import NDDR, CrossStitch, FusionLayer
from dmtrl_keras.layers.layout import (
    TaskBatch,
    TaskConcatenate,
    TaskFlatten,
    TaskGroup,
    TaskRepeat,
    TaskSplit,
    TaskStack,
)
from dmtrl_keras.layers.normalization import TaskLayerNormalization
from dmtrl_keras.layers.prior import TensorNormalPrior
from dmtrl_keras.layers.relation import TRL
from dmtrl_keras.layers.similar import (
    SimilarKernelConv,
    SimilarKernelConv1D,
    SimilarKernelConv2D,
    SimilarKernelConv3D,
    SimilarKernelLayer,
)

__all__ = [
    "NDDR",
    "TRL",
    "CrossStitch",
    "FactorizedLayer",
    "FusionLayer",
    "LAFConv1D",
    "LAFConv2D",
    "LAFConv3D",
    "LAFDense",
    "SimilarKernelConv",
    "SimilarKernelConv1D",
    "SimilarKernelConv2D",
    "SimilarKernelConv3D",
    "SimilarKernelLayer",
    "TTConv1D",
    "TTConv2D",
    "TTConv3D",
    "TTDense",
    "TaskBatch",
    "TaskConcatenate",
    "TaskConv1D",
    "TaskConv2D",
    "TaskConv3D",
    "TaskDense",
    "TaskDepthwiseConv1D",
    "TaskDepthwiseConv2D",
    "TaskFlatten",
    "TaskGroup",
    "TaskLayer",
    "TaskLayerNormalization",
    "TaskRepeat",
    "TaskSplit",
    "TaskStack",
    "TensorNormalPrior",
    "TuckerConv1D",
    "TuckerConv2D",
    "TuckerConv3D",
    "TuckerDense",
    "task_layers",
]
