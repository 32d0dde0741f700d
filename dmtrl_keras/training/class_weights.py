"""Weights of classes, by task, as weights of examples."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

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
    names = list(model.task_names)

    def weighted(batch: Any) -> Any:
        inputs, labels, *weight = batch
        own = _weights(names, labels, weight[0] if weight else None, tables)
        return inputs, labels, own

    if y is not None:
        return x, y, _weights(names, y, sample_weight, tables)
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
    names: list[str], labels: Any, weight: Any, tables: Mapping[str, np.ndarray]
) -> Any:
    """Weights of examples, a dict by task where labels are one."""
    if not isinstance(labels, Mapping):
        (table,) = tables.values()
        own = _of_classes(labels, table)
        return own if weight is None else own * _like(weight, own)
    found = {}
    for task, values in labels.items():
        given = weight.get(task) if isinstance(weight, Mapping) else weight
        table = tables.get(task, np.ones(1, "float32"))
        own = _of_classes(values, table)
        found[task] = own if given is None else own * _like(given, own)
    return found


def _of_classes(labels: Any, table: np.ndarray) -> Any:
    """The weight of each label `(n,)`, `(n, 1)`, or one-hot `(n, classes)`.

    Of what is no class of the table, such as a missing label, it is 1.
    """
    if not isinstance(labels, np.ndarray) and hasattr(labels, "dtype"):
        return _of_tensor(labels, table)
    labels = np.asarray(labels)
    if labels.ndim > 1:
        missing = np.isnan(labels.astype("float64")).any(axis=-1)
        last = labels.argmax(axis=-1) if labels.shape[-1] > 1 else labels[..., 0]
        labels = np.where(missing, -1, last)
    known = (labels >= 0) & (labels < len(table))
    return np.where(known, table[np.where(known, labels, 0).astype(int)], 1).astype(
        "float32"
    )


def _of_tensor(labels: Tensor, table: np.ndarray) -> Tensor:
    """Likewise, within a `tf.data` pipeline."""
    tf = tensorflow()
    labels = tf.convert_to_tensor(labels)
    if len(labels.shape) > 1:
        one = labels.shape[-1] == 1
        last = labels[..., 0] if one else tf.argmax(labels, axis=-1)
        last = tf.cast(last, "float32")
        missing = tf.reduce_any(tf.math.is_nan(tf.cast(labels, "float32")), axis=-1)
        labels = tf.where(missing, -tf.ones_like(last), last)
    labels = tf.cast(labels, "float32")
    known = (labels >= 0) & (labels < len(table))
    index = tf.cast(tf.where(known, labels, tf.zeros_like(labels)), "int32")
    return tf.where(known, tf.gather(tf.constant(table), index), 1.0)


def _like(weight: Any, own: Any) -> Any:
    """Weights that are given, in the shape of others."""
    if isinstance(own, np.ndarray):
        return np.asarray(weight, "float32").reshape(own.shape)
    tf = tensorflow()
    return tf.reshape(tf.cast(weight, "float32"), tf.shape(own))
