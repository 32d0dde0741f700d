"""What a network learned of its tasks: a matrix for each layer that says something."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.fusion.cross_stitch import CrossStitch
from dmtrl_keras.fusion.nddr import NDDR
from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_model, task_names
from dmtrl_keras.mrn.report import correlation
from dmtrl_keras.mrn.state import TensorNormalState
from dmtrl_keras.mtal.similar_kernels import SimilarKernels
from dmtrl_keras.mtal.stored_once import StoredOnce
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.stacked import StackedKernel, kernels_in
from dmtrl_keras.tasks.task_layer import TaskLayer
from dmtrl_keras.trn.term import TaskRelations


class Learned(NamedTuple):
    """What one layer, or a relation, learned.

    Attributes:
        title: str, what it is, and of which layer.
        matrix: array `(n, n)`; NaN where nothing was learned.
        names: list of n str, of the rows and of the columns.
        of_tasks: bool, whether it is about tasks, not about classes or features.
        shares: bool, whether the values are from 0 on.
        variances: array `(n,)`, of a covariance whose correlations these are; or None.
    """

    title: str
    matrix: np.ndarray
    names: list[str]
    of_tasks: bool = True
    shares: bool = False
    variances: np.ndarray | None = None


def task_relations(model: keras.Model) -> dict[str, np.ndarray]:
    """Everything that a network has learned of how its tasks are related, as matrices.

    By layer, and of a `TaskRelationModel` by relation:

    - `"learned correlation, <layer>"`: of the task covariance of a prior (DRN, MRN), see
      `task_correlation`;
    - `"cosine of S, <layer>"`: of the columns of the task matrix of a factorised layer,
      after the normalisation of DMTRL's Eq. 9, see `sharing_strength`;
    - `"from which task the kernels of <layer> are"`: the shares of a task's kernels (row)
      that are those of each task (MTAL Eq. 5, 6);
    - `"weights of <layer>"`: alpha of a Cross-Stitch layer (MTAL Eq. 1), the mean over its
      channels; row t makes task t's features. Of NDDR, `"size of the kernels of <layer>,
      as shares"`;
    - `"similarity of <relation>"`: the last canonical correlations (TRN Eq. 13).

    Args:
        model: a built model.

    Returns:
        A dict from title to a float64 array `(T, T)`, in the order of the layers; empty for
        a network that learns nothing of that kind. NaN for pairs that are not compared. The
        tasks are in the order of `model.task_names`, where the layer knows these names, or
        knows none.

    Raises:
        ValueError: if it is no built model.

    Example:

    >>> from dmtrl_keras import relationship_network, task_relations
    >>> network = relationship_network((16,), ["amazon", "webcam"], classes=3)
    >>> list(task_relations(network))
    ['learned correlation, bottleneck', 'learned correlation, classifier']
    """
    check_model(model, "task_relations")
    names = list(getattr(model, "task_names", ()))
    found = {}
    for one in learned_of(model):
        if not one.of_tasks or len(one.names) < 2:
            continue
        # Layers may have the tasks in another order than the outputs.
        known = sorted(one.names) == sorted(names)
        order = [one.names.index(name) for name in (names if known else one.names)]
        found[one.title] = one.matrix[np.ix_(order, order)]
    return found


def learned_of(model: keras.Model) -> list[Learned]:
    """What a network learned of its tasks, and of classes and features.

    Priors say covariances of each mode that they learn (DRN Eq. 8 and 13), Cross-Stitch its
    weights (MTAL Eq. 1), NDDR how large the kernels are through which a task sees others,
    layers of similar kernels what share of a task's kernels comes from which task (MTAL Eq.
    5, 6), factorised ones how alike the columns of S are (DMTRL Eq. 9), TRN's relations the
    similarity of the tasks' features (TRN Eq. 13).

    Args:
        model: a built Keras model.

    Returns:
        A list of `Learned`, in the order of the layers; relations come last, that of the
        outputs as the last one.
    """
    found: list[Learned] = []
    seen: set[int] = set()
    for layer in flatten_layers(model):
        names = names_of(model, layer, getattr(layer, "tasks", 0))
        if isinstance(layer, CrossStitch):
            alpha = _array(layer.alpha)
            title = f"weights of {layer.name}"
            if alpha.ndim == 3:
                alpha, title = alpha.mean(axis=-1), f"{title}, the mean over the channels"
            found.append(Learned(title, alpha, names))
        elif isinstance(layer, NDDR):
            title = f"size of the kernels of {layer.name}, as shares"
            matrix = nddr_shares(_array(layer.kernel), layer.tasks)
            found.append(Learned(title, matrix, names, shares=True))
        elif isinstance(layer, (TaskLayer, TaskCopies)) and layer.tasks > 1:
            for one in kernels_in(layer):
                found += _of_kernel(one, names)
        # A layer comes before the child that holds its kernel, which has the same prior.
        prior = getattr(layer, "prior", None)
        if isinstance(prior, TensorNormalState) and id(prior) not in seen:
            seen.add(id(prior))
            found += _covariances(model, layer, prior)
    for term in getattr(model, "terms", ()):
        if isinstance(term, TaskRelations):
            found += _relations(term, list(model.task_names))
    return found


def _array(tensor: Tensor) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor).astype("float64")


def names_of(model: keras.Model, layer: Any, count: int) -> list[str]:
    """The names of a layer's tasks, from any layer that knows them; else `task_0`, ..."""
    if not count:
        return []
    unnamed = task_names(count, "report")
    for one in (layer, *flatten_layers(model), model):
        names = getattr(one, "task_names", ())
        if len(names) == count and tuple(names) != unnamed:
            return list(names)
    return list(unnamed)


def nddr_shares(kernel: np.ndarray, tasks: int) -> np.ndarray:
    """How much of what a task gets through an NDDR layer is from which task.

    `||W_ts||_F / sum over r of ||W_tr||_F`, where `W_ts` makes features of task t of those
    of task s.

    Args:
        kernel: array `(T * C, T * C)`, of the layer.
        tasks: int T.

    Returns:
        An array `(T, T)`, whose row t sums to 1.
    """
    channels = len(kernel) // tasks
    blocks = kernel.reshape(tasks, channels, tasks, channels)
    sizes = np.sqrt(np.square(blocks).sum(axis=(1, 3))).T
    return sizes / np.maximum(sizes.sum(axis=1, keepdims=True), np.finfo(float).tiny)


def _of_kernel(one: StackedKernel, names: list[str]) -> list[Learned]:
    """Of factors, of similar kernels, and of those in which equal ones are stored once."""
    kinds = (FactorizedParameterization, SimilarKernels, StoredOnce)
    if not isinstance(one.sharing, kinds):
        return []
    matrix = _array(one.stacked.task_matrix())
    if isinstance(one.sharing, FactorizedParameterization):
        title, matrix = f"cosine of S, {one.name}", cosines(matrix)
    elif isinstance(one.sharing, SimilarKernels):
        title, matrix = f"from which task the kernels of {one.name} are", matrix.T
    else:
        title = f"share of the kernels of {one.name} in common"
    return [Learned(title, matrix, names, shares=True)]


def cosines(task_matrix: np.ndarray) -> np.ndarray:
    """Cosines of the columns of S, after absolute values and a softmax (DMTRL Eq. 9)."""
    matrix = np.abs(task_matrix)
    matrix = np.exp(matrix - matrix.max(axis=0))
    unit = matrix / np.linalg.norm(matrix, axis=0)
    return unit.T @ unit


def _covariances(model: keras.Model, layer: Any, prior: TensorNormalState) -> list[Learned]:
    found = []
    for mode, matrix in prior.covariances.items():
        of_tasks = mode == "task"
        title = "learned correlation" + ("" if of_tasks else f" by {mode}")
        matrix = np.asarray(matrix, "float64")
        if matrix.ndim == 3:
            # `each`: of these there may be hundreds.
            title += f", the mean of {len(matrix)} covariances"
            matrix = matrix.mean(axis=0)
        size = len(matrix)
        found.append(
            Learned(
                f"{title}, {layer.name}",
                correlation(matrix),
                names_of(model, layer, size) if of_tasks else list(map(str, range(size))),
                of_tasks,
                variances=np.diag(matrix),
            )
        )
    return found


def _relations(term: TaskRelations, tasks: Sequence[str]) -> list[Learned]:
    """TRN's similarities, of each relation and of the labels."""
    found = []
    similarities = term.similarities()
    for name in sorted(similarities, key=lambda name: name == "output"):
        pairs = similarities[name]
        sides = {side for pair in pairs for side in pair}
        of_tasks, names = sides <= set(tasks), list(tasks)
        if not of_tasks:
            # Relations may be of groups of tasks.
            names = [t for t in tasks if t in sides] + sorted(sides - set(tasks))
        matrix = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(matrix, 1)
        for (one, other), value in pairs.items():
            i, j = names.index(one), names.index(other)
            matrix[i, j] = matrix[j, i] = value
        of = {"output": "the outputs", "label": "the labels"}.get(name, name)
        title = f"similarity of {of}"
        found.append(Learned(title, matrix, names, of_tasks, shares=True))
    return found
