"""Weights of classes, by task, as weights of examples."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_number, is_int, name_of, refusal


def with_class_weight(
    model: keras.Model, x: Any, y: Any, sample_weight: Any, class_weight: Any
) -> tuple[Any, Any, Any]:
    """The data of `fit`, with the weights of the classes among those of the examples.

    Args:
        model: a `MultiTaskModel`.
        x: what the user gave: arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset`, or a
            generator.
        y: as are the labels, and the weights.
        sample_weight: None, weights of all tasks, or a dict of them by task.
        class_weight: dict from task to a dict from class to weight; of a single task also
            the latter.

    Returns:
        `(x, y, sample_weight)`.

    Raises:
        ValueError: on unknown tasks, on what are no classes or weights.
    """
    tables = _tables(model, class_weight)
    if not tables:
        return x, y, sample_weight
    ranks = {task: len(output.shape) for task, output in model.output.items()}

    def weighted(batch: Any) -> Any:
        inputs, labels, *weight = batch
        own = _weights(model, labels, weight[0] if weight else None, tables, ranks)
        return inputs, labels, own

    if y is not None:
        return x, y, _weights(model, y, sample_weight, tables, ranks)
    if hasattr(x, "element_spec"):
        return x.map(lambda *batch: weighted(batch)), None, None
    if isinstance(x, keras.utils.PyDataset):
        return _Weighted(x, weighted), None, None
    if isinstance(x, Iterator):
        # Keras knows generators by their type.
        return (weighted(batch) for batch in x), None, None
    raise ValueError(
        f"{name_of(model)}: expected labels, a tf.data.Dataset, a PyDataset or a generator "
        f"with `class_weight`. Received: {type(x).__name__} without labels."
    )


def for_all_tasks(y: Any, sample_weight: Any) -> Any:
    """Weights of examples for every task that has labels, 1 where none are given.

    Keras wants weights of all tasks or of none.

    Args:
        y: labels, in a dict by task or not.
        sample_weight: None, weights, or a dict of them by task.
    """
    if not isinstance(y, Mapping) or not isinstance(sample_weight, Mapping):
        return sample_weight
    lacking = [task for task in y if sample_weight.get(task) is None]
    if not lacking or not set(sample_weight) <= set(y):
        return sample_weight
    return {**sample_weight, **{task: _ones(y[task]) for task in lacking}}


def apart_for_validation(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `fit` with the last share of the data as `validation_data`.

    As Keras does it, but before classes have weights, which are for training only.
    """
    share, x = given.get("validation_split"), given.get("x")
    if not share or given.get("validation_data") is not None or given.get("y") is None:
        return given
    data = (x, given["y"], given.get("sample_weight"))
    arrays = tree.map_structure(lambda a: None if a is None else np.asarray(a), data)
    count = len(next(a for a in tree.flatten(arrays) if a is not None))
    border = math.floor(count * (1 - share))
    first, last = (
        tree.map_structure(lambda a, part=part: None if a is None else a[part], arrays)
        for part in (slice(border), slice(border, None))
    )
    others = {name: own for name, own in given.items() if name != "validation_split"}
    others |= dict(zip(("x", "y", "sample_weight"), first))
    return {**others, "validation_data": last[: 3 if last[2] is not None else 2]}


class _Weighted(keras.utils.PyDataset):
    """A data set whose batches are changed."""

    def __init__(self, data: keras.utils.PyDataset, change: Any) -> None:
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self._data, self._change = data, change

    @property
    def num_batches(self) -> int | None:
        return self._data.num_batches

    def __getitem__(self, index: int) -> Any:
        return self._change(self._data[index])

    def on_epoch_begin(self) -> None:
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._data.on_epoch_end()


def _tables(model: keras.Model, class_weight: Any) -> dict[str, np.ndarray]:
    """By task the weights of classes 0, 1, ..., 1 where none is given."""
    owner, names = name_of(model), list(model.task_names)
    what = f"a dict from tasks of {names} to dicts from class to weight"
    if not isinstance(class_weight, Mapping):
        raise refusal("class_weight", class_weight, owner, what)
    if len(names) == 1 and not set(class_weight) <= set(names):
        class_weight = {names[0]: class_weight}
    if not set(class_weight) <= set(names):
        raise refusal("class_weight", class_weight, owner, what)
    tables = {}
    for task, weights in class_weight.items():
        place = f"class_weight[{task!r}]"
        if not isinstance(weights, Mapping) or not all(map(is_int, weights)):
            raise refusal(place, weights, owner, "a dict from class, an int, to weight")
        table = np.ones(1 + max(weights, default=0), "float32")
        for label, weight in weights.items():
            table[label] = check_number(f"{place}[{label}]", weight, owner)
        tables[task] = table
    return tables


def _weights(
    model: keras.Model,
    labels: Any,
    weight: Any,
    tables: Mapping[str, np.ndarray],
    ranks: Mapping[str, int],
) -> Any:
    """Weights of examples, a dict by task where labels are one."""
    if not isinstance(labels, Mapping):
        (task,) = tables
        own = _of_classes(labels, tables[task], ranks[task])
        return own if weight is None else own * _like(weight, own)
    if isinstance(weight, Mapping):
        model._check_tasks("sample_weight", dict(weight))
    found = {}
    for task, values in labels.items():
        given = weight.get(task) if isinstance(weight, Mapping) else weight
        if task in tables:
            own = _of_classes(values, tables[task], ranks[task])
            given = own if given is None else own * _like(given, own)
        elif given is None:
            # Keras wants weights of all tasks or of none.
            given = _ones(values)
        found[task] = given
    return found


def _in_graph(labels: Any) -> bool:
    """Whether these are symbolic tensors of a `tf.data` pipeline."""
    return type(labels).__name__ == "SymbolicTensor"


def _ones(labels: Any) -> Any:
    if _in_graph(labels):
        return tensorflow().ones(tensorflow().shape(labels)[:1])
    return np.ones(len(labels), "float32")


def _of_classes(labels: Any, table: np.ndarray, rank: int) -> Any:
    """The weight of each label: classes `(batch, ...)` or `(batch, ..., 1)`, or one-hot.

    Of what is no class of the table, such as a missing label, it is 1.

    Args:
        labels: array or tensor.
        table: array, the weight of each class.
        rank: int, of the task's output, of which labels with one axis less are classes.
    """
    if _in_graph(labels):
        return _of_tensor(labels, table, rank)
    if not isinstance(labels, np.ndarray):
        is_tensor = keras.ops.is_tensor(labels)
        labels = keras.ops.convert_to_numpy(labels) if is_tensor else np.asarray(labels)
    if labels.ndim == rank:
        missing = np.isnan(labels.astype("float64")).any(axis=-1)
        last = labels.argmax(axis=-1) if labels.shape[-1] > 1 else labels[..., 0]
        labels = np.where(missing, -1, last)
    known = (labels >= 0) & (labels < len(table))
    index = np.where(known, labels, 0).astype(int)
    return np.where(known, table[index], 1).astype("float32")


def _of_tensor(labels: Tensor, table: np.ndarray, rank: int) -> Tensor:
    """Likewise, within a `tf.data` pipeline."""
    tf = tensorflow()
    labels = tf.cast(labels, "float32")
    if labels.shape.rank is None:
        raise ValueError(
            "fit: expected labels of a known number of axes with `class_weight`. "
            "Received: a tf.data.Dataset whose labels have any."
        )
    if labels.shape.rank == rank:
        missing = tf.reduce_any(tf.math.is_nan(labels), axis=-1)
        last = tf.where(
            tf.shape(labels)[-1] == 1,
            labels[..., 0],
            tf.cast(tf.argmax(labels, axis=-1), "float32"),
        )
        labels = tf.where(missing, -tf.ones_like(last), last)
    known = (labels >= 0) & (labels < len(table))
    index = tf.cast(tf.where(known, labels, tf.zeros_like(labels)), "int32")
    return tf.where(known, tf.gather(tf.constant(table), index), 1.0)


def _like(weight: Any, own: Any) -> Any:
    """Weights that are given, one for each example, beside others."""
    if isinstance(own, np.ndarray):
        weight = np.asarray(weight, "float32")
        if weight.ndim > own.ndim:
            return weight.reshape(own.shape)
        return weight.reshape(*weight.shape, *[1] * (own.ndim - weight.ndim))
    tf = tensorflow()
    weight = tf.cast(weight, "float32")
    more = own.shape.rank - weight.shape.rank
    if more < 0:
        return tf.reshape(weight, tf.shape(own))
    return tf.reshape(weight, tf.concat([tf.shape(weight), [1] * more], axis=0))
