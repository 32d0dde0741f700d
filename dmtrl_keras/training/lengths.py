"""Test sets of different lengths, one for each task."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.validation import name_of
from dmtrl_keras.training.class_weights import for_all_tasks
from dmtrl_keras.training.data import arrays_of

# Among the labels; no task may have such a name.
PRESENT = "_dmtrl_keras_present"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the data, in which some tasks have examples of their own.

    All pieces of one evaluation have the same structure, so that one trace does for all.

    Attributes:
        sizes: dict from each of these tasks to the number of its examples, which come
            first.
        x: inputs of the network; of the other tasks something that fits.
        y: dict of labels by task, likewise, and by the name `PRESENT` a dict from each task
            with labels to ones or, if it has no examples here, zeros; or None.
        sample_weight: dict of weights by task, likewise, in the structure of `y`, as Keras
            wants it; or None.
    """

    sizes: dict[str, int]
    x: Any
    y: dict[str, Any] | None
    sample_weight: dict[str, Any] | None


def one_set_each(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    labelled: bool = True,
) -> list[Piece] | None:
    """The pieces of data in which every task has its own examples, each exactly once.

    Args:
        model: a `MultiTaskModel`.
        x: what the user gave; as are `y` and `sample_weight`.
        y: dict of labels by task, or None.
        sample_weight: dict of weights by task, or None.
        labelled: bool, whether data sets are to have labels.

    Returns:
        None if the data is what Keras takes: the same examples for all tasks, or an input
        of one length for each. With an input for each task the pieces end where a task's
        data ends, and the batches of the others go on with its first example, whose output
        is not used; without labels there is one piece, since outputs need not be parted.
        With one input for all tasks, there is a piece for each.

    Raises:
        ValueError: if the data of a task have different lengths, if tasks are missing, if
            tasks with inputs of their own see each other's features.
    """
    owner, tasks = name_of(model), model.task_names
    if isinstance(x, Mapping) and y is None and labelled:
        known = set(tasks) & set(x) or not set(x) & {tensor.name for tensor in model.inputs}
        if known and not set(x) <= set(tasks) and any(map(_is_data_set, x.values())):
            unknown = sorted(set(x) - set(tasks))
            raise ValueError(
                f"{owner}: unknown tasks among the data sets: {unknown}. The tasks are "
                f"{list(tasks)}."
            )
    if not isinstance(x, Mapping) or not x or not set(x) <= set(tasks):
        return None
    if y is None and all(_is_data_set(data) for data in x.values()):
        parts = {t: arrays_of(t, data, owner, labelled) for t, data in x.items()}
        x = {task: part[0] for task, part in parts.items()}
        if labelled:
            y = {task: part[1] for task, part in parts.items()}
        weights = {task: part[2] for task, part in parts.items() if len(part) > 2}
        sample_weight = for_all_tasks(y, weights) if weights else None
        split = True
    else:
        split = False
    names = [tensor.name for tensor in model.inputs]
    names = list(model.input) if isinstance(model.input, dict) else names
    each = set(names) == set(tasks) and len(names) > 1
    if not each and set(x) <= set(names):
        return None
    sizes = _sizes(x, y, sample_weight, owner)
    if each and set(x) < set(tasks):
        raise ValueError(
            f"{owner}: expected inputs of every task, {list(tasks)}. "
            f"Received: inputs of {sorted(x)}."
        )
    if each and len(set(sizes.values())) == 1 and not split:
        return None
    if not each:
        return [_piece([task], x[task], y, sample_weight, 0, sizes[task]) for task in x]
    if len(set(sizes.values())) > 1:
        _check_independent(model, x)
    if not labelled:
        longest = max(sizes.values())
        return [
            Piece(sizes, {t: _padded(own, 0, longest) for t, own in x.items()}, None, None)
        ]
    return list(_pieces(x, y, sample_weight, sizes))


def are_data_sets(model: keras.Model, x: Mapping[str, Any], y: Any) -> bool:
    """Whether inputs are a dict of data sets by task, with labels of their own."""
    by_task = bool(x) and set(x) <= set(model.task_names)
    return by_task and y is None and any(_is_data_set(data) for data in x.values())


def check_labels(
    model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None
) -> None:
    """Refuse labels and weights by task of another length than the inputs of all tasks.

    Args:
        model: a `MultiTaskModel`.
        x: inputs that are the same for all tasks, or have one length.
        y: what the user gave.
        sample_weight: what the user gave.

    Raises:
        ValueError: where Keras knows no more than that the lengths differ.
    """
    sizes = {_length(leaf) for leaf in tree.flatten(x)} - {0}
    if len(sizes) != 1:
        return
    for argument, given in (("y", y), ("sample_weight", sample_weight)):
        if not isinstance(given, Mapping):
            continue
        lengths = {task: _length(own) for task, own in given.items() if _length(own)}
        if set(lengths.values()) - sizes:
            raise ValueError(
                f"{name_of(model)}: expected `{argument}` of every task of the length of "
                f"the inputs, {min(sizes)}. Received: lengths {lengths}. Mark the missing "
                "labels, which `MaskedLoss` and `MaskedMetric` leave out; or give `x` by "
                "task too, to `evaluate` as it is, for `fit` by `zip_tasks`."
            )


def different_lengths(model: keras.Model, x: Any) -> dict[str, int] | None:
    """The lengths of inputs by task, if they differ."""
    if not isinstance(x, Mapping) or not x or not set(x) <= set(model.task_names):
        return None
    leaves = {task: tree.flatten(own) for task, own in x.items()}
    if not all(hasattr(leaf, "shape") for own in leaves.values() for leaf in own):
        return None
    sizes = {task: int(own[0].shape[0]) for task, own in leaves.items()}
    return sizes if len(set(sizes.values())) > 1 else None


class TaskValidation(keras.callbacks.Callback):
    """Validation data of different lengths, evaluated at the end of epochs.

    To come before the callbacks that follow `val_loss`.

    Args:
        evaluate: function without arguments that returns the results, a dict.
        frequency: int, or a list of epochs, as `validation_freq` of Keras.
    """

    def __init__(
        self, evaluate: Callable[[], dict[str, Any]], frequency: int | Sequence[int]
    ) -> None:
        super().__init__()
        self._evaluate = evaluate
        self._frequency = frequency

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the results to the logs."""
        if isinstance(self._frequency, int):
            due = (epoch + 1) % self._frequency == 0
        else:
            due = epoch + 1 in self._frequency
        if due and logs is not None:
            logs.update({f"val_{name}": own for name, own in self._evaluate().items()})


def _is_data_set(data: Any) -> bool:
    """Whether it is `(x, y)`, `(x, y, sample_weight)`, or a `tf.data.Dataset`."""
    if isinstance(data, tuple) and len(data) in (2, 3):
        return True
    if isinstance(data, keras.utils.PyDataset):
        return True
    # Named, not imported: TensorFlow may be absent.
    return type(data).__module__.startswith("tensorflow") and hasattr(data, "element_spec")


def _sizes(x: Mapping[str, Any], y: Any, sample_weight: Any, owner: str) -> dict[str, int]:
    """The number of examples of each task."""
    for argument, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"{owner}: with inputs by task, expected `{argument}` by task. "
                f"Received: {argument}={type(value).__name__}."
            )
        without = sorted(set(value or ()) - set(x))
        if without:
            raise ValueError(
                f"{owner}: `{argument}` for tasks without inputs: {without}. "
                f"Received: inputs of {sorted(x)}."
            )
    sizes = {}
    for task, own in x.items():
        of_task = (own, (y or {}).get(task), (sample_weight or {}).get(task))
        leaves = [leaf for leaf in tree.flatten(of_task) if leaf is not None]
        lengths = [_length(leaf) for leaf in leaves]
        if len(set(lengths)) != 1 or lengths[0] < 1:
            received = [type(leaf).__name__ for leaf in leaves]
            raise ValueError(
                f"{owner}: expected arrays of one positive length for task {task!r}. "
                f"Received: {received}, lengths {lengths}."
            )
        sizes[task] = lengths[0]
    return sizes


def _length(leaf: Any) -> int:
    shape = tuple(getattr(leaf, "shape", ()))
    return int(shape[0] or 0) if shape else 0


def _padded(data: Any, start: int, stop: int) -> Any:
    """Rows of arrays, which go on with their first one where they end before."""

    def pad(own: Any) -> Any:
        rows = own[start:stop]
        missing = stop - start - _length(rows)
        if not missing:
            return rows
        first = np.asarray(own[:1])
        rest = np.broadcast_to(first, (missing, *first.shape[1:]))
        return np.concatenate([rows, rest]) if missing < stop - start else rest

    return tree.map_structure(pad, data)


def _piece(
    tasks: Sequence[str], x: Any, y: Any, sample_weight: Any, start: int, stop: int
) -> Piece:
    size = stop - start
    sizes = dict.fromkeys(tasks, size)
    if y is None:
        return Piece(sizes, x, None, None)
    labels, weights = (
        {name: _padded(own, start, stop) for name, own in (given or {}).items()}
        for given in (y, sample_weight)
    )
    present = {name: np.full(size, name in sizes, dtype="float32") for name in labels}
    if weights:
        weights[PRESENT] = present
    return Piece(sizes, x, {**labels, PRESENT: present}, weights or None)


def _pieces(
    x: Mapping[str, Any], y: Any, sample_weight: Any, sizes: Mapping[str, int]
) -> Iterator[Piece]:
    """Of inputs for each task: first those of all, at last those of the longest."""
    start = 0
    for stop in sorted(set(sizes.values())):
        inputs = {task: _padded(own, start, stop) for task, own in x.items()}
        tasks = [task for task in x if sizes[task] >= stop]
        yield _piece(tasks, inputs, y, sample_weight, start, stop)
        start = stop


def _check_independent(model: keras.Model, x: Mapping[str, Any]) -> None:
    """Refuse networks in which a task's output depends on the inputs of others.

    Every two tasks differ in a bit of their numbers. For each bit, the inputs of one half
    of the tasks are others: the outputs of the other half must stay.
    """
    tasks = list(x)
    first = {task: np.asarray(own[:1]) for task, own in x.items()}
    last = {task: np.asarray(own[-1:]) for task, own in x.items()}
    before = model(first, training=False)
    for bit in range((len(tasks) - 1).bit_length()):
        for side in (0, 1):
            moved = [t for number, t in enumerate(tasks) if number >> bit & 1 == side]
            after = model({**first, **{t: last[t] for t in moved}}, training=False)
            for task in set(tasks) - set(moved):
                a, b = (keras.ops.convert_to_numpy(o[task]) for o in (before, after))
                if not np.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True):
                    raise ValueError(
                        f"{name_of(model)}: the output of task {task!r} depends on the "
                        "inputs of other tasks, so that these must belong together, "
                        f"example by example. Received: different examples for {tasks}, "
                        f"of lengths {[len(own) for own in x.values()]}."
                    )
