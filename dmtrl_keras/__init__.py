"""Multi-task layers for Keras 3: one network runs T related tasks at once."""

# First: it decides whether TensorFlow starts with its messages.
from dmtrl_keras import _commands  # noqa: F401, I001
from dmtrl_keras import (
    balancing,
    callbacks,
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
from dmtrl_keras.conversion.export import export_tasks
from dmtrl_keras.conversion.growing import add_task, remove_task
from dmtrl_keras.conversion.summary import LayerSummary, task_summary
from dmtrl_keras.dmtrl.factorize import factorize
from dmtrl_keras.dmtrl.strength import (
    chance_of_sharing,
    plot_sharing_strength,
    sharing_strength,
    sharing_strength_of,
)
from dmtrl_keras.ground.plots import plot_eigenvectors, plot_heat_map, plot_hinton
from dmtrl_keras.kernels.factorization import Factorization
from dmtrl_keras.layers import task_layers
from dmtrl_keras.monitoring.gradients import gradient_cosines, task_affinity
from dmtrl_keras.monitoring.groups import task_groups
from dmtrl_keras.monitoring.relations import task_relations
from dmtrl_keras.mrn.network import relationship_network
from dmtrl_keras.mrn.regression import RelatedRegressions, relationship_regression
from dmtrl_keras.mrn.report import (
    mode_correlation,
    mode_covariance,
    task_correlation,
    task_covariance,
)
from dmtrl_keras.mtal.merge import (
    KernelSharing,
    kernel_sharing_ratio,
    merge_similar_kernels,
)
from dmtrl_keras.mtal.similarity import aggregate_similar_kernels
from dmtrl_keras.norms.combination import CombinedRegressions, combined_regression
from dmtrl_keras.norms.regression import NormRegressions, norm_regression
from dmtrl_keras.regularizers import ModeCovariance, TensorNormalRegularizer
from dmtrl_keras.tasks.rewrite_models import factorization_report
from dmtrl_keras.training.data import zip_tasks
from dmtrl_keras.training.model import MultiTaskModel
from dmtrl_keras.training.terms import LossTerm
from dmtrl_keras.trn.model import TaskRelationModel
from dmtrl_keras.trn.relation import Relation, label_similarity
from dmtrl_keras.trn.term import TaskRelations
from dmtrl_keras.version import __version__

__all__ = [
    "CombinedRegressions",
    "Factorization",
    "KernelSharing",
    "LayerSummary",
    "LossTerm",
    "ModeCovariance",
    "MultiTaskModel",
    "NormRegressions",
    "RelatedRegressions",
    "Relation",
    "TaskRelationModel",
    "TaskRelations",
    "TensorNormalRegularizer",
    "__version__",
    "add_task",
    "aggregate_similar_kernels",
    "balancing",
    "callbacks",
    "canonical_correlation",
    "chance_of_sharing",
    "combined_regression",
    "conversion",
    "decomposition",
    "distribution",
    "export_tasks",
    "factorization_report",
    "factorize",
    "gradient_cosines",
    "kernel_sharing_ratio",
    "label_similarity",
    "layers",
    "losses",
    "merge_similar_kernels",
    "metrics",
    "mode_correlation",
    "mode_covariance",
    "multitask",
    "norm_regression",
    "optimizers",
    "parameterizations",
    "plot_eigenvectors",
    "plot_heat_map",
    "plot_hinton",
    "plot_sharing_strength",
    "regularizers",
    "relationship_network",
    "relationship_regression",
    "remove_task",
    "sharing_strength",
    "sharing_strength_of",
    "single_task",
    "task_affinity",
    "task_correlation",
    "task_covariance",
    "task_groups",
    "task_layers",
    "task_relations",
    "task_similarity",
    "task_similarity_matrix",
    "task_summary",
    "tensor_normal",
    "zip_tasks",
]
