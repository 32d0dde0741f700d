"""What a network has learned of how its tasks are related."""

import keras
import numpy as np

from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.fusion.cross_stitch import CrossStitch
from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.ground.validation import check_model
from dmtrl_keras.mrn.report import correlation
from dmtrl_keras.mrn.state import TensorNormalState
from dmtrl_keras.mtal.layers import SimilarKernelLayer
from dmtrl_keras.mtal.merge import shared_with
from dmtrl_keras.tasks.task_layer import task_layers
from dmtrl_keras.trn.model import TaskRelationModel


def task_relations(model: keras.Model) -> dict[str, np.ndarray]:
    """Everything that a network has learned of how its tasks are related, as matrices.

    By layer, and of a `TaskRelationModel` by relation:

    - `"correlation, <layer>"`: of the task covariance of a prior (DRN, MRN), see
      `task_correlation`;
    - `"cosine of S, <layer>"`: of the columns of the task matrix of a factorised layer
      (DMTRL), after the normalisation of Eq. 9, see `sharing_strength`;
    - `"similar kernels, <layer>"`: the share of a task's kernels (row) that have a similar
      one of another task (column), see `kernel_sharing_ratio` (MTAL);
    - `"weights, <layer>"`: alpha of a Cross-Stitch layer, the mean over its channels; row t
      makes task t's features;
    - `"similarity, <relation>"`: the last canonical correlations (TRN).

    Args:
        model: a built model.

    Returns:
        A dict from title to a float64 array `(T, T)`, in the order of the layers; empty for
        a network that learns nothing of that kind. Layers of a single task are left out.

    Raises:
        ValueError: if it is no built model.

    Example:

    >>> from dmtrl_keras import relationship_network, task_relations
    >>> network = relationship_network((16,), ["amazon", "webcam"], classes=3)
    >>> list(task_relations(network))
    ['correlation, bottleneck', 'correlation, classifier']
    """
    check_model(model, "task_relations")
    found: dict[str, np.ndarray] = {}
    factorized = {id(layer) for layer in task_layers(model)}
    seen: set[int] = set()
    for layer in flatten_layers(model):
        prior = getattr(layer, "prior", None)
        # A layer comes before the child that holds its kernel, which has the same prior.
        fresh = id(prior) not in seen
        seen.add(id(prior))
        if fresh and isinstance(prior, TensorNormalState) and "task" in prior.modes:
            matrix = keras.ops.convert_to_numpy(prior.covariances["task"])
            if matrix.ndim == 2 and len(matrix) > 1:
                found[f"correlation, {layer.name}"] = correlation(matrix)
        if isinstance(layer, CrossStitch):
            alpha = keras.ops.convert_to_numpy(layer.alpha).astype("float64")
            found[f"weights, {layer.name}"] = (
                alpha.mean(axis=-1) if layer.per_channel else alpha
            )
        if id(layer) in factorized and layer.tasks > 1:
            if isinstance(layer.sharing, FactorizedParameterization):
                found[f"cosine of S, {layer.name}"] = _cosines(layer.task_matrix)
            if isinstance(layer, SimilarKernelLayer):
                found[f"similar kernels, {layer.name}"] = shared_with(layer)
    if isinstance(model, TaskRelationModel):
        tasks = list(model.task_names)
        for name, pairs in model.similarities().items():
            matrix = np.eye(len(tasks))
            for (one, other), value in pairs.items():
                if one in tasks and other in tasks:
                    i, j = tasks.index(one), tasks.index(other)
                    matrix[i, j] = matrix[j, i] = value
            found[f"similarity, {name}"] = matrix
    return found


def _cosines(task_matrix: object) -> np.ndarray:
    """Cosines of the columns of S, after absolute values and a softmax (DMTRL Eq. 9)."""
    matrix = np.abs(keras.ops.convert_to_numpy(task_matrix).astype("float64"))
    matrix = np.exp(matrix - matrix.max(axis=0))
    unit = matrix / np.linalg.norm(matrix, axis=0)
    return unit.T @ unit
