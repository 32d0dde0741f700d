"""Streams of several tasks' batches as a `tf.data.Dataset`."""

from collections.abc import Mapping
from typing import Any

from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.types import Dataset, Tensor
from dmtrl_keras.training.batches import (
    TaskBatches,
    check_one_form,
    dtype_of_marked,
    no_mark,
)
from dmtrl_keras.training.mixing import Mixing

# Among so many examples is shuffled what has no known end.
_BUFFER = 1000


def tf_stream(
    parts: Mapping[str, tuple[Dataset, int]],
    mixing: Mixing,
    steps: int,
    shuffle: bool | int,
    seed: int | None,
    prefetch: bool,
) -> Dataset:
    """The stream of `zip_tasks`.

    Args:
        parts: dict of the examples of each task, unbatched, and their number, negative
            where it is unknown.
        mixing: the settings.
        steps: int, the batches of an epoch.
        shuffle: bool or int.
        seed: int or None.
        prefetch: bool.
    """
    tf = tensorflow()
    weighted = any(len(part.element_spec) == 3 for part, _ in parts.values())
    own = {}
    for index, (name, (part, size)) in enumerate(parts.items()):
        if weighted and len(part.element_spec) == 2:
            part = part.map(lambda x, y: (x, y, 1.0))
        if shuffle:
            number = None if seed is None else int(seed) + index
            buffer = size if size > 0 else _BUFFER
            buffer = buffer if shuffle is True else int(shuffle)
            examples = part.shuffle(buffer, seed=number, reshuffle_each_iteration=True)
        else:
            examples = part
        examples = examples.repeat()
        if size == tf.data.UNKNOWN_CARDINALITY:
            examples = _not_empty(tf, name, examples)
        own[name] = examples
    if mixing.common_input:
        stream = _common(tf, own, mixing, steps, seed)
    elif mixing.alone is not None:
        plain = {name: part for name, (part, _) in parts.items()}
        stream = _alone(tf, own, plain, weighted, mixing, steps, seed)
    else:
        stream = _side_by_side(tf, own, mixing)
    stream = stream.take(steps).apply(tf.data.experimental.assert_cardinality(steps))
    return stream.prefetch(tf.data.AUTOTUNE) if prefetch else stream


def tf_stream_of_arrays(batches: TaskBatches, prefetch: bool) -> Dataset:
    """The batches of a stream as a `tf.data.Dataset`.

    A pipeline of TensorFlow's would have an operation for each pair of tasks.

    Args:
        batches: the stream; what iterates over the data set has an epoch of it.
        prefetch: bool.
    """
    tf = tensorflow()

    def spec(array: Any) -> Any:
        rows = array.shape[0] if batches.has_equal_rows else None
        return tf.TensorSpec((rows, *array.shape[1:]), array.dtype)

    stream = tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=tf.nest.map_structure(spec, batches[0]),
    )
    stream = stream.apply(tf.data.experimental.assert_cardinality(len(batches)))
    return stream.prefetch(tf.data.AUTOTUNE) if prefetch else stream


def _side_by_side(tf: Any, own: Mapping[str, Dataset], mixing: Mixing) -> Dataset:
    """Batches of all tasks, each with an input of its own."""
    batches = {}
    for name, part in own.items():
        size = mixing.batch_sizes[name]
        batch = part.batch(size, drop_remainder=True)
        if mixing.marks_labels:
            marks = _Marks(tf, name, part, mixing)
            rows = tf.constant([*range(mixing.rows)]) % size
            first = tf.range(mixing.rows) < size

            def fill(
                x: Any,
                y: Tensor,
                *weights: Tensor,
                marks: Any = marks,
                rows: Tensor = rows,
                first: Tensor = first,
            ) -> tuple[Any, ...]:
                x, y, *weights = tf.nest.map_structure(
                    lambda a: tf.gather(a, rows), (x, y, *weights)
                )
                return x, marks.where(first, y), *weights

            batch = batch.map(fill)
        batches[name] = batch
    return tf.data.Dataset.zip(batches).map(_by_part)


def _by_part(batch: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """From parts by task to dicts by task: inputs, labels, weights."""
    count = len(next(iter(batch.values())))
    return tuple({name: batch[name][n] for name in batch} for n in range(count))


def _common(
    tf: Any, own: Mapping[str, Dataset], mixing: Mixing, steps: int, seed: int | None
) -> Dataset:
    """Batches whose rows are examples of different tasks, for one input."""
    check_one_form(
        {
            name: tf.nest.map_structure(
                lambda spec: (tuple(spec.shape), spec.dtype.name), part.element_spec[0]
            )
            for name, part in own.items()
        }
    )
    marks = {name: _Marks(tf, name, part, mixing) for name, part in own.items()}
    # Drawn for each row, where a batch has several tasks.
    by_row = mixing.shares is not None and mixing.alone is None

    def form(name: str, x: Any, y: Tensor, *weights: Tensor) -> tuple[Any, ...]:
        lead = [] if by_row else [tf.shape(tf.nest.flatten(x)[0])[0]]
        labels = {
            task: mark.cast(y) if task == name else mark.missing(lead)
            for task, mark in marks.items()
        }
        if not weights:
            return x, labels
        ones = tf.ones(lead)
        (weight,) = weights
        return (
            x,
            labels,
            {task: tf.cast(weight, "float32") if task == name else ones for task in marks},
        )

    formed = []
    for name, part in own.items():
        if not by_row:
            part = part.batch(mixing.batch_sizes[name], drop_remainder=True)
        formed.append(part.map(lambda *example, n=name: form(n, *example)))
    if by_row:
        rows = next(iter(mixing.batch_sizes.values()))
        return _drawn(tf, formed, mixing, seed).batch(rows, drop_remainder=True)
    if mixing.alone is not None:
        return _chosen(tf, formed, mixing, steps, seed)

    def joined(*batches: Any) -> Any:
        return tf.nest.map_structure(lambda *own: tf.concat(own, axis=0), *batches)

    return tf.data.Dataset.zip(tuple(formed)).map(joined)


def _alone(
    tf: Any,
    own: Mapping[str, Dataset],
    plain: Mapping[str, Dataset],
    weighted: bool,
    mixing: Mixing,
    steps: int,
    seed: int | None,
) -> Dataset:
    """Batches of one task, each task with an input of its own.

    The rows of the task's batch are chosen first, no rows of the others; then inputs of
    theirs are filled in, which have no labels.
    """
    marks = {name: _Marks(tf, name, part, mixing) for name, part in own.items()}
    specs = {name: part.element_spec for name, part in own.items()}

    def none(spec: Any) -> Tensor:
        return tf.zeros([0, *spec.shape], spec.dtype)

    def form(name: str, *batch: Any) -> tuple[dict[str, Any], ...]:
        rows = tf.shape(tf.nest.flatten(batch[0])[0])[0]
        found = {}
        for task, mark in marks.items():
            if task == name:
                found[task] = (batch[0], mark.cast(batch[1]), *batch[2:])
                continue
            x = tf.nest.map_structure(none, specs[task][0])
            weights = [tf.ones([rows])] if weighted else []
            found[task] = (x, mark.missing([rows]), *weights)
        return _by_part(found)

    formed = []
    for name, part in own.items():
        batches = part.batch(mixing.batch_sizes[name], drop_remainder=True)
        if weighted:
            batches = batches.map(lambda x, y, w: (x, y, tf.cast(w, "float32")))
        formed.append(batches.map(lambda *batch, n=name: form(n, *batch)))
    fillers = {
        name: part.map(lambda x, *_: x).repeat().batch(mixing.rows, drop_remainder=True)
        for name, part in plain.items()
    }

    def filled(batch: tuple[dict[str, Any], ...], filler: dict[str, Any]) -> Any:
        inputs, *others = batch
        rows = tf.shape(tf.nest.flatten(others[0])[0])[0]
        inputs = {
            task: tf.nest.map_structure(
                # One of the two has no rows, or all that are wanted.
                lambda x, other: tf.concat([x, other[: rows - tf.shape(x)[0]]], axis=0),
                inputs[task],
                filler[task],
            )
            for task in inputs
        }
        if len(set(mixing.batch_sizes.values())) == 1:
            inputs, others = tf.nest.map_structure(
                lambda x: tf.ensure_shape(x, [mixing.rows, *x.shape[1:]]), (inputs, others)
            )
        return inputs, *others

    chosen = _chosen(tf, formed, mixing, steps, seed)
    return tf.data.Dataset.zip(chosen, tf.data.Dataset.zip(fillers)).map(filled)


def _drawn(tf: Any, parts: list[Dataset], mixing: Mixing, seed: int | None) -> Dataset:
    """Elements of several data sets at random, by the shares of the tasks."""
    assert mixing.shares is not None
    return tf.data.Dataset.sample_from_datasets(
        parts,
        weights=[mixing.shares[name] for name in mixing.names],
        seed=seed,
        rerandomize_each_iteration=True,
    )


def _chosen(
    tf: Any, parts: list[Dataset], mixing: Mixing, steps: int, seed: int | None
) -> Dataset:
    """Batches of the tasks, in turn or at random."""
    if mixing.alone == "random":
        return _drawn(tf, parts, mixing, seed)
    turns = tf.data.Dataset.from_tensor_slices(mixing.turns(steps).astype("int64"))
    return tf.data.Dataset.choose_from_datasets(parts, turns)


class _Marks:
    """How labels of a task are marked as missing."""

    def __init__(self, tf: Any, name: str, part: Dataset, mixing: Mixing) -> None:
        self._tf = tf
        spec = part.element_spec[1]
        if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
            raise no_mark(name, type(spec).__name__, mixing)
        if not spec.shape.is_fully_defined():
            raise no_mark(name, f"labels of an open shape, {tuple(spec.shape)}", mixing)
        self._shape = [*spec.shape]
        self._dtype = dtype_of_marked(name, spec.dtype.name, mixing)
        self._value = mixing.missing

    def cast(self, labels: Tensor) -> Tensor:
        """Labels in the dtype in which they can be marked."""
        return self._tf.cast(labels, self._dtype)

    def missing(self, lead: list[Tensor]) -> Tensor:
        """Labels that are missing, `(*lead, ...)`."""
        value = self._tf.cast(self._value, self._dtype)
        return self._tf.fill([*lead, *self._shape], value)

    def where(self, present: Tensor, labels: Tensor) -> Tensor:
        """Labels of which those of some rows are missing."""
        rows = self._tf.shape(labels)[0]
        present = self._tf.reshape(present, [-1, *[1] * len(self._shape)])
        return self._tf.where(present, self.cast(labels), self.missing([rows]))


def _not_empty(tf: Any, name: str, repeated: Dataset) -> Dataset:
    """A data set that is repeated without end, or fails if it has no example."""
    spec = repeated.element_spec
    for own in tf.nest.flatten(spec):
        if not isinstance(own, tf.TensorSpec) or own.shape.rank is None:
            # What can't be made of nothing: TensorFlow itself says that the stream ends.
            return repeated

    def fail(number: Any) -> Any:
        message = (
            f"zip_tasks, task {name!r}: expected at least one example. Received: a data "
            "set that ends without one, such as a filter's that lets nothing through."
        )
        with tf.control_dependencies([tf.debugging.Assert(number < 0, [message])]):
            return tf.nest.map_structure(
                lambda own: tf.zeros([size or 0 for size in own.shape], own.dtype), spec
            )

    # What comes after an endless one comes only if there was nothing to repeat.
    return repeated.concatenate(tf.data.Dataset.range(1).map(fail))
