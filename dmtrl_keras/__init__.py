"""Multi-task layers for Keras 3: one network runs T related tasks at once."""

from dmtrl_keras import (
    canonical_correlation,
    conversion,
    decomposition,
    distribution,
    layers,
    losses,
    metrics,
    optimizers,
    parameterizations,
    regularizers,
    tensor_normal,
)
from dmtrl_keras.canonical_correlation import task_similarity, task_similarity_matrix
from dmtrl_keras.conversion import multitask, single_task
from dmtrl_keras.data import zip_tasks
from dmtrl_keras.export import export_tasks
from dmtrl_keras.factorization import (
    Factorization,
    factorization_report,
    factorize,
)
from dmtrl_keras.kernel_sharing import (
    KernelSharing,
    kernel_sharing_ratio,
    merge_similar_kernels,
)
from dmtrl_keras.layers import task_layers
from dmtrl_keras.model import MultiTaskModel
from dmtrl_keras.networks import relationship_network
from dmtrl_keras.regularizers import ModeCovariance, TensorNormalRegularizer
from dmtrl_keras.relations import (
    plot_heat_map,
    plot_hinton,
    task_correlation,
    task_covariance,
)
from dmtrl_keras.sharing import (
    plot_sharing_strength,
    sharing_strength,
    sharing_strength_of,
)
from dmtrl_keras.similar_kernels import aggregate_similar_kernels
from dmtrl_keras.summary import LayerSummary, task_summary
from dmtrl_keras.task_relation import (
    Relation,
    TaskRelationModel,
    label_similarity,
)
from dmtrl_keras.version import __version__

__all__ = [
    "Factorization",
    "KernelSharing",
    "LayerSummary",
    "ModeCovariance",
    "MultiTaskModel",
    "Relation",
    "TaskRelationModel",
    "TensorNormalRegularizer",
    "__version__",
    "aggregate_similar_kernels",
    "canonical_correlation",
    "conversion",
    "decomposition",
    "distribution",
    "export_tasks",
    "factorization_report",
    "factorize",
    "kernel_sharing_ratio",
    "label_similarity",
    "layers",
    "losses",
    "merge_similar_kernels",
    "metrics",
    "multitask",
    "optimizers",
    "parameterizations",
    "plot_heat_map",
    "plot_hinton",
    "plot_sharing_strength",
    "regularizers",
    "relationship_network",
    "sharing_strength",
    "sharing_strength_of",
    "single_task",
    "task_correlation",
    "task_covariance",
    "task_layers",
    "task_similarity",
    "task_similarity_matrix",
    "task_summary",
    "tensor_normal",
    "zip_tasks",
]
