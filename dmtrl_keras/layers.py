"""Layers that run T tasks at once on the grouped layout."""

from dmtrl_keras.dmtrl.layers import (
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
from dmtrl_keras.fusion.base import FusionLayer
from dmtrl_keras.fusion.cross_stitch import CrossStitch
from dmtrl_keras.fusion.nddr import NDDR
from dmtrl_keras.mrn.wrapper import TensorNormalPrior
from dmtrl_keras.mtal.layers import (
    SimilarKernelConv,
    SimilarKernelConv1D,
    SimilarKernelConv2D,
    SimilarKernelConv3D,
    SimilarKernelLayer,
)
from dmtrl_keras.tasks.column import TaskColumn
from dmtrl_keras.tasks.conv import TaskConv1D, TaskConv2D, TaskConv3D
from dmtrl_keras.tasks.conv_transpose import (
    TaskConv1DTranspose,
    TaskConv2DTranspose,
    TaskConv3DTranspose,
)
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.dense import TaskDense
from dmtrl_keras.tasks.depthwise import TaskDepthwiseConv1D, TaskDepthwiseConv2D
from dmtrl_keras.tasks.layout import (
    TaskBatch,
    TaskConcatenate,
    TaskFlatten,
    TaskGroup,
    TaskRepeat,
    TaskSplit,
    TaskStack,
)
from dmtrl_keras.tasks.normalization import (
    TaskLayerNormalization,
    TaskRMSNormalization,
)
from dmtrl_keras.tasks.task_layer import TaskLayer, task_layers
from dmtrl_keras.trn.layer import TRL

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
    "TaskColumn",
    "TaskConcatenate",
    "TaskConv1D",
    "TaskConv1DTranspose",
    "TaskConv2D",
    "TaskConv2DTranspose",
    "TaskConv3D",
    "TaskConv3DTranspose",
    "TaskCopies",
    "TaskDense",
    "TaskDepthwiseConv1D",
    "TaskDepthwiseConv2D",
    "TaskFlatten",
    "TaskGroup",
    "TaskLayer",
    "TaskLayerNormalization",
    "TaskRMSNormalization",
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
