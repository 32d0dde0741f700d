"""Data sets of several tasks as one stream of batches."""

import math
from typing import Any, Literal

import numpy as np
from keras import tree

from dmtrl_keras.ground.backend import makes_batches, tensorflow
from dmtrl_keras.ground.types import Dataset
from dmtrl_keras.ground.validation import check_bool, check_positive, check_seed

# Among so many examples is shuffled what has no known end.
_BUFFER = 1000


def zip_tasks(
    datasets: dict[str, Any],
    batch_size: int,
    epoch: int | Literal["longest", "shortest"] = "longest",
    shuffle: bool | int = True,
    seed: int | None = None,
    prefetch: bool = True,
) -> Dataset:
    """One stream of dict batches from one data set per task.

    Every batch has `batch_size` examples of every task. Data sets that are shorter than
    the epoch are repeated; with `shuffle`, in a new order each time. The epoch's length
    in batches is `stream.cardinality()` (and `len(stream)`).

    Args:
        datasets: dict from task name to `(x, y)` or `(x, y, sample_weight)` arrays with
            one length, or to a `tf.data.Dataset` of such examples, unbatched. Both kinds
            may be mixed. With a number of batches as `epoch` data sets may be endless or of
            unknown size, such as those of generators, `repeat` and `filter`.
        batch_size: positive int.
        epoch: `"longest"`: `ceil(max(n) / batch_size)` batches, in which every example of
            every task appears; `"shortest"`: `ceil(min(n) / batch_size)`; or the number of
            batches as an int.
        shuffle: whether to shuffle each data set before each repetition: wholly, or, where
            it has no known end, among the next 1,000 examples. An int: among so many.
        seed: int or None.
        prefetch: bool, whether to prepare the next batch during a step.

    Returns:
        A `tf.data.Dataset` of `(inputs, labels)` or `(inputs, labels, sample_weights)`,
        each a dict by task name, the batches of one size. Where only some tasks have
        weights, the others have ones.

    Raises:
        ValueError: on no task, empty data, arrays of different lengths, data that are no
            arrays, a batched data set, one without a known end if `epoch` depends on it, or
            a bad `batch_size`, `epoch`, `shuffle` or `seed`.
        tf.errors.InvalidArgumentError: from the stream, if a data set of unknown size
            turns out to have no example.

    Example:

    >>> import numpy as np
    >>> stream = zip_tasks(
    ...     {
    ...         "digits": (np.zeros((10, 4)), np.zeros(10)),
    ...         "letters": (np.zeros((25, 4)), np.zeros(25)),
    ...     },
    ...     batch_size=5,
    ... )
    >>> inputs, labels = next(iter(stream))
    >>> len(stream), sorted(inputs), tuple(labels["letters"].shape)
    (5, ['digits', 'letters'], (5,))
    """
    tf = tensorflow()
    if not isinstance(datasets, dict) or not datasets:
        raise ValueError(
            "zip_tasks: `datasets` must be a dict from task name to data, with at least "
            "one task. "
            f"Received: {type(datasets).__name__}."
        )
    strange = [name for name in datasets if not isinstance(name, str)]
    if strange:
        raise ValueError(f"zip_tasks: task names must be strings. Received: {strange}.")
    check_positive("batch_size", batch_size, "zip_tasks")
    if not isinstance(shuffle, bool):
        check_positive("shuffle", shuffle, "zip_tasks", " or a bool")
    seed = check_seed("seed", seed, "zip_tasks")
    prefetch = check_bool("prefetch", prefetch, "zip_tasks")
    parts, sizes, weighted = {}, {}, {}
    for name, data in datasets.items():
        part, size = _examples(tf, "zip_tasks", name, data)
        weighted[name] = len(part.element_spec) == 3
        parts[name], sizes[name] = part, size
    if isinstance(epoch, str) and epoch in ("longest", "shortest"):
        _check_sizes(sizes, epoch)
        last = max if epoch == "longest" else min
        steps = math.ceil(last(sizes.values()) / batch_size)
    else:
        other = ' or one of "longest" and "shortest"'
        steps = check_positive("epoch", epoch, "zip_tasks", other)
    for index, (name, part) in enumerate(parts.items()):
        if shuffle:
            own = None if seed is None else int(seed) + index
            buffer = sizes[name] if sizes[name] > 0 else _BUFFER
            buffer = buffer if shuffle is True else int(shuffle)
            part = part.shuffle(buffer, seed=own, reshuffle_each_iteration=True)
        if any(weighted.values()) and not weighted[name]:
            part = part.map(lambda x, y: (x, y, 1.0))
        part = part.repeat()
        if sizes[name] == tf.data.UNKNOWN_CARDINALITY:
            part = _not_empty(tf, name, part)
        parts[name] = part.batch(batch_size, drop_remainder=True)
    count = 3 if any(weighted.values()) else 2

    def regroup(batch: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        return tuple({name: batch[name][n] for name in batch} for n in range(count))

    stream = tf.data.Dataset.zip(parts).map(regroup).take(steps)
    stream = stream.apply(tf.data.experimental.assert_cardinality(steps))
    return stream.prefetch(tf.data.AUTOTUNE) if prefetch else stream


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


def _check_sizes(sizes: dict[str, int], epoch: str) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"zip_tasks, task {name!r}: with epoch={epoch!r} expected a finite set "
                "of known cardinality (see `tf.data.experimental.assert_cardinality`). "
                f"Received: cardinality={size}. Or give a number of batches as `epoch`."
            )


def _examples(tf: Any, owner: str, name: str, data: Any) -> tuple[Dataset, int]:
    """One task's data as an unbatched dataset, and its cardinality, negative if open."""
    if isinstance(data, tf.data.Dataset):
        spec = data.element_spec
        if not isinstance(spec, tuple) or len(spec) not in (2, 3) or _lacks(tf, spec):
            raise ValueError(
                f"{owner}, task {name!r}: expected examples (x, y) or "
                f"(x, y, sample_weight). Received: element_spec={spec}."
            )
        if _is_batched(tf, data):
            raise ValueError(
                f"{owner}, task {name!r}: expected single examples. Received batches: "
                f"element_spec={spec}. Call `.unbatch()` first; if these are examples of "
                "an open length, give them one shape (`tf.ensure_shape`, padding)."
            )
        size = int(data.cardinality())
        if size == 0:
            raise ValueError(
                f"{owner}, task {name!r}: expected at least one example. "
                "Received: cardinality=0."
            )
        return data, size
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"{owner}, task {name!r}: expected a tf.data.Dataset, (x, y) or "
            f"(x, y, sample_weight). Received: {type(data).__name__}. "
            "A generator of examples becomes a data set by "
            "`tf.data.Dataset.from_generator(..., output_signature=...)`."
        )
    parts = tuple(data[:2]) if len(data) == 3 and data[2] is None else tuple(data)
    arrays = [array for part in parts for array in tf.nest.flatten((part,))]
    strange = [
        f"{type(array).__name__} {array!r:.40}"
        for array in arrays
        if not len(getattr(array, "shape", ()))
    ]
    if strange or any(isinstance(part, list) for part in parts):
        raise ValueError(
            f"{owner}, task {name!r}: expected arrays of examples in (x, y) or (x, y, "
            "sample_weight), or dicts and tuples of arrays; a list of numbers becomes one "
            f"by `numpy.asarray`. Received: {[type(part).__name__ for part in parts]}"
            + (f", in it {strange[0]}." if strange else ".")
        )
    sizes = [array.shape[0] for array in arrays]
    if len(set(sizes)) != 1 or sizes[0] == 0:
        raise ValueError(
            f"{owner}, task {name!r}: expected arrays of one positive length. "
            f"Received: lengths {sizes}."
        )
    try:
        return tf.data.Dataset.from_tensor_slices(parts), sizes[0]
    except (TypeError, ValueError) as error:
        kinds = [f"{type(a).__name__} of {getattr(a, 'dtype', '?')}" for a in arrays]
        raise ValueError(
            f"{owner}, task {name!r}: expected arrays that TensorFlow takes. "
            f"Received: {kinds}."
        ) from error


def arrays_of(name: str, data: Any, owner: str, labelled: bool = True) -> tuple[Any, ...]:
    """One task's data as arrays `(x, y)` or `(x, y, sample_weight)`.

    Args:
        name: str, the task.
        data: what `zip_tasks` takes for a task; a `tf.data.Dataset` may be batched.
        owner: str, what to name in errors.
        labelled: bool; False: the inputs alone are wanted, `(x,)`, and a data set may be
            one of inputs.
    """
    if isinstance(data, tuple) and len(data) in (2, 3):
        return data if labelled else data[:1]
    tf = tensorflow()
    if not labelled:
        if isinstance(data.element_spec, tuple):
            data = data.map(lambda x, *_: x)
        if _is_batched(tf, data):
            data = data.unbatch()
        # In the form of examples, for the checks.
        data = data.map(lambda x: (x, 0.0))
    elif isinstance(data, tf.data.Dataset) and _is_batched(tf, data):
        data = data.unbatch()
    examples, size = _examples(tf, owner, name, data)
    if size == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"{owner}, task {name!r}: expected a finite data set. "
            f"Received: cardinality={size}."
        )
    batches = list(examples.batch(1024).as_numpy_iterator())
    if not batches:
        raise ValueError(
            f"{owner}, task {name!r}: expected at least one example. Received: none."
        )
    arrays = tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
    return tuple(arrays) if labelled else tuple(arrays[:1])


def _lacks(tf: Any, spec: tuple[Any, ...]) -> bool:
    """Whether examples have None for inputs or labels."""
    return any(isinstance(own, tf.NoneTensorSpec) for own in tf.nest.flatten(spec))


def _is_batched(tf: Any, data: Dataset) -> bool:
    """Whether the elements of a data set are batches, as far as it can be known."""
    shapes = [getattr(own, "shape", None) for own in tf.nest.flatten(data.element_spec)]
    if any(shape is None or not shape.rank for shape in shapes):
        return False
    first = {shape[0] for shape in shapes if shape is not None}
    # All of an open size: not to be batched in any case.
    return first == {None} or (len(first) == 1 and makes_batches(data))
