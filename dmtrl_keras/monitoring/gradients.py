"""What the tasks' losses say about common weights: conflicts, and who helps whom."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_number, check_positive, name_of, refusal
from dmtrl_keras.training.model import MultiTaskModel

_TINY = np.finfo("float64").tiny
# How many examples are looked at together, if nothing else is asked for.
BATCH = 128


def gradient_cosines(
    model: MultiTaskModel,
    x: Any,
    y: Mapping[str, Any],
    sample_weight: Any = None,
    batch_size: int = BATCH,
) -> np.ndarray:
    """The cosines between the gradients of the tasks' losses.

    `C_ij = <g_i, g_j> / (|g_i| |g_j|)` (Yu et al., "Gradient Surgery for Multi-Task
    Learning", NeurIPS 2020), where `g_t` is the gradient of task t's loss, the mean
    over the batches by their numbers of examples, with respect to the weights that both
    losses depend on: the entries at which both gradients are not zero. So of stacked
    kernels, whose entries belong to one task each, nothing counts; of factors what tasks
    have in common does. Negative: a step for one task is a step against the other.

    Args:
        model: a compiled `MultiTaskModel`, as it is; nothing of its state changes.
            (Dropout is off, normalizations use their statistics.)
        x: inputs, as for `fit`: arrays, or a dict of them.
        y: dict of labels by task.
        sample_weight: None, or weights as for `fit`.
        batch_size: int, how many examples are looked at together.

    Returns:
        A float64 array `(T, T)` in the order of `model.task_names`; 0 where two losses
        have no weight in common, 1 on the diagonal.

    Raises:
        ValueError: on a model that is no `MultiTaskModel` or has no losses, on data of
            different lengths, on another backend than TensorFlow.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import gradient_cosines, multitask
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    >>> model = multitask(backbone, ["age", "income"], "hard", heads=1, verbose=False)
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 4)), {"age": np.ones((8, 1)), "income": np.zeros((8, 1))}
    >>> gradient_cosines(model, x, y).shape
    (2, 2)
    """
    owner = "gradient_cosines"
    batches = _Batches(owner, model, x, y, sample_weight, batch_size)
    mean = _MeanGradients()
    for part, size in batches:
        _, gradients = _values_and_gradients(model, *part)
        mean.add(gradients, size)
    return mean.cosines()


def task_affinity(
    model: MultiTaskModel,
    x: Any,
    y: Mapping[str, Any],
    sample_weight: Any = None,
    learning_rate: float = 0.01,
    batch_size: int = BATCH,
) -> np.ndarray:
    """How much a step for one task lowers the loss of another (TAG).

    `Z_ij = 1 - L_j(theta - eta grad L_i) / L_j(theta)` (Fifty et al., "Efficiently
    Identifying Task Groupings for Multi-Task Learning", NeurIPS 2021, Eq. 1), the mean
    over batches. Positive: training on task i helps task j. It is small where the step is,
    and means most early in training: the paper takes its mean over the steps; see
    `callbacks.TaskMonitor` for one value an epoch.

    Args:
        model: as for `gradient_cosines`; all weights are as before afterwards.
        x: likewise.
        y: likewise.
        sample_weight: likewise.
        learning_rate: float, eta, of a step of gradient descent.
        batch_size: int.

    Returns:
        A float64 array `(T, T)` in the order of `model.task_names`; row i is the task that
        the step is for, column j the one that it changes. On the diagonal the step is also
        of the weights that the task has for itself.

    Raises:
        ValueError: as `gradient_cosines`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import multitask, task_affinity
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    >>> model = multitask(backbone, ["age", "income"], "hard", heads=1, verbose=False)
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 4)), {"age": np.ones((8, 1)), "income": np.zeros((8, 1))}
    >>> task_affinity(model, x, y).shape
    (2, 2)
    """
    owner = "task_affinity"
    batches = _Batches(owner, model, x, y, sample_weight, batch_size)
    check_number("learning_rate", learning_rate, owner, low=_TINY)
    return _affinity(model, batches, learning_rate, lambda gradients, size: None)


def cosines_and_affinity(
    model: MultiTaskModel, x: Any, y: Any, sample_weight: Any, learning_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """`gradient_cosines` and `task_affinity`, of which the gradients are taken once."""
    mean = _MeanGradients()
    batches = _Batches("task_affinity", model, x, y, sample_weight, BATCH)
    affinity = _affinity(model, batches, learning_rate, mean.add)
    return mean.cosines(), affinity


class _MeanGradients:
    """The gradients of all tasks, their mean over the batches up to a factor."""

    def __init__(self) -> None:
        self._total: list[np.ndarray] = []

    def add(self, gradients: list[list[np.ndarray]], size: int) -> None:
        """Those of a batch, by task with respect to each variable."""
        found = [
            size * np.concatenate([np.ravel(g) for g in own]).astype("float64")
            for own in gradients
        ]
        total = self._total
        self._total = [a + b for a, b in zip(total, found)] if total else found

    def cosines(self) -> np.ndarray:
        """As `gradient_cosines`."""
        cosines = np.eye(len(self._total))
        for i, one in enumerate(self._total):
            for j, other in enumerate(self._total[:i]):
                both = (one != 0) & (other != 0)
                lengths = np.linalg.norm(one[both]) * np.linalg.norm(other[both])
                if lengths > 0:
                    cosines[i, j] = cosines[j, i] = one[both] @ other[both] / lengths
        return cosines


def _affinity(
    model: MultiTaskModel,
    batches: "_Batches",
    learning_rate: float,
    seen: Callable[[list[list[np.ndarray]], int], None],
) -> np.ndarray:
    """As `task_affinity`; `seen` is told the gradients of each batch, and its size."""
    variables = model.trainable_variables
    before = [keras.ops.convert_to_numpy(v) for v in variables]
    rows: list[np.ndarray] = []
    sizes: list[int] = []
    try:
        for part, size in batches:
            losses, gradients = _values_and_gradients(model, *part)
            seen(gradients, size)
            matrix = np.zeros((len(losses), len(losses)))
            for i, own in enumerate(gradients):
                for variable, value, gradient in zip(variables, before, own):
                    variable.assign(value - learning_rate * gradient)
                after = _losses(model, *part)
                matrix[i] = 1 - np.divide(after, losses, where=losses != 0, out=after + 1)
                for variable, value in zip(variables, before):
                    variable.assign(value)
            rows.append(matrix)
            sizes.append(size)
    finally:
        for variable, value in zip(variables, before):
            variable.assign(value)
    return np.average(rows, axis=0, weights=sizes)


class _Batches:
    """Batches of arrays, `((x, y, sample_weight), size)` each, of checked arguments."""

    def __init__(
        self,
        owner: str,
        model: MultiTaskModel,
        x: Any,
        y: Any,
        sample_weight: Any,
        batch_size: int,
    ) -> None:
        if keras.config.backend() != "tensorflow":
            raise ValueError(
                f"{owner}: gradients by task need the TensorFlow backend. "
                f"Received: {keras.config.backend()!r}."
            )
        if not isinstance(model, MultiTaskModel):
            raise refusal("model", model, owner, "a `MultiTaskModel`")
        if not getattr(model, "compiled", False):
            raise ValueError(
                f"{owner}: expected a compiled model, whose losses are differentiated. "
                f"Received: {name_of(model)}, not compiled."
            )
        check_positive("batch_size", batch_size, owner)
        if not isinstance(y, Mapping) or not set(y) <= set(model.task_names):
            what = f"a dict of labels by task, of {list(model.task_names)}"
            raise refusal("y", y, owner, what)
        self._data = tree.map_structure(_array, (x, dict(y), sample_weight))
        lengths = sorted(
            {len(leaf) for leaf in tree.flatten(self._data) if leaf is not None}
        )
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError(
                f"{owner}: expected as many labels as examples, and one at least. "
                f"Received: lengths {lengths}."
            )
        self._count, self._size = lengths[0], batch_size

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for start in range(0, self._count, self._size):
            stop = min(start + self._size, self._count)

            def cut(leaf: Any, start: int = start, stop: int = stop) -> Any:
                return (
                    None if leaf is None else keras.ops.convert_to_tensor(leaf[start:stop])
                )

            yield tree.map_structure(cut, self._data), stop - start


def _array(leaf: Any) -> Any:
    return None if leaf is None else np.asarray(leaf)


def _by_task(model: MultiTaskModel, x: Any, y: Any, weight: Any) -> list[Tensor]:
    """The losses in the order of the tasks."""
    losses, _ = model.task_losses(y, model(x, training=False), weight)
    # A task without a loss has no gradient.
    zero = keras.ops.zeros(())
    return [losses.get(task, zero) for task in model.task_names]


def _losses(model: MultiTaskModel, x: Any, y: Any, weight: Any) -> np.ndarray:
    found = _by_task(model, x, y, weight)
    return np.array([float(loss) for loss in found])


def _values_and_gradients(
    model: MultiTaskModel, x: Any, y: Any, weight: Any
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Losses, and by task the gradients with respect to all trainable variables."""
    variables = [v.value for v in model.trainable_variables]
    zero = tensorflow().UnconnectedGradients.ZERO
    with tensorflow().GradientTape(persistent=True) as tape:
        losses = _by_task(model, x, y, weight)
    gradients = [
        # Those of embeddings are sparse.
        [np.asarray(tensorflow().convert_to_tensor(g)) for g in own]
        for own in (
            tape.gradient(loss, variables, unconnected_gradients=zero) for loss in losses
        )
    ]
    return np.array([float(loss) for loss in losses]), gradients
