"""Data sets of several tasks as one stream of batches."""

import math
from typing import Any, Literal

from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.types import Dataset
from dmtrl_keras.ground.validation import check_bool, check_positive, check_seed


def zip_tasks(
    datasets: dict[str, Any],
    batch_size: int,
    epoch: int | Literal["longest", "shortest"] = "longest",
    shuffle: bool = True,
    seed: int | None = None,
    prefetch: bool = True,
) -> Dataset:
    """One stream of dict batches from one data set per task.

    Every batch has `batch_size` examples of every task. Data sets that are shorter than
    the epoch are repeated; with `shuffle`, in a new order each time. The epoch's length
    in batches is `stream.cardinality()` (and `len(stream)`).

    Args:
        datasets: dict from task name to `(x, y)` or `(x, y, sample_weight)` arrays with
            one length, or to a `tf.data.Dataset` of such examples, unbatched and of
            known cardinality. Both kinds may be mixed.
        batch_size: positive int.
        epoch: `"longest"`: `ceil(max(n) / batch_size)` batches, in which every example of
            every task appears; `"shortest"`: `ceil(min(n) / batch_size)`; or the number of
            batches as an int.
        shuffle: bool, whether to shuffle each data set wholly before each repetition.
        seed: int or None.
        prefetch: bool, whether to prepare the next batch during a step.

    Returns:
        A `tf.data.Dataset` of `(inputs, labels)` or `(inputs, labels, sample_weights)`,
        each a dict by task name, the batches of one size. Where only some tasks have
        weights, the others have ones.

    Raises:
        ValueError: on no task, empty data, arrays of different lengths, a batched or
            endless data set, or a bad `batch_size` or `epoch`.

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
    check_positive("batch_size", batch_size, "zip_tasks")
    seed = check_seed("seed", seed, "zip_tasks")
    shuffle = check_bool("shuffle", shuffle, "zip_tasks")
    prefetch = check_bool("prefetch", prefetch, "zip_tasks")
    parts, sizes, weighted = {}, {}, {}
    for name, data in datasets.items():
        part, size = _examples(tf, name, data)
        weighted[name] = len(part.element_spec) == 3
        parts[name], sizes[name] = part, size
    if isinstance(epoch, str) and epoch == "longest":
        steps = math.ceil(max(sizes.values()) / batch_size)
    elif isinstance(epoch, str) and epoch == "shortest":
        steps = math.ceil(min(sizes.values()) / batch_size)
    else:
        other = ' or one of "longest" and "shortest"'
        steps = check_positive("epoch", epoch, "zip_tasks", other)
    for index, (name, part) in enumerate(parts.items()):
        if shuffle:
            own = None if seed is None else seed + index
            part = part.shuffle(sizes[name], seed=own, reshuffle_each_iteration=True)
        if any(weighted.values()) and not weighted[name]:
            part = part.map(lambda x, y: (x, y, 1.0))
        parts[name] = part.repeat().batch(batch_size, drop_remainder=True)
    count = 3 if any(weighted.values()) else 2

    def regroup(batch: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        return tuple({name: batch[name][n] for name in batch} for n in range(count))

    stream = tf.data.Dataset.zip(parts).map(regroup).take(steps)
    stream = stream.apply(tf.data.experimental.assert_cardinality(steps))
    return stream.prefetch(tf.data.AUTOTUNE) if prefetch else stream


def _examples(tf: Any, name: str, data: Any) -> tuple[Dataset, int]:
    """One task's data as an unbatched dataset, and its number of examples."""
    if isinstance(data, tf.data.Dataset):
        spec = data.element_spec
        if not isinstance(spec, tuple) or len(spec) not in (2, 3):
            raise ValueError(
                f"zip_tasks, task {name!r}: expected examples (x, y) or "
                f"(x, y, sample_weight). Received: element_spec={spec}."
            )
        size = int(data.cardinality())
        if size < 1:
            raise ValueError(
                f"zip_tasks, task {name!r}: expected a finite data set of known, positive "
                "cardinality (see `tf.data.experimental.assert_cardinality`). "
                f"Received: cardinality={size}."
            )
        return data, size
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"zip_tasks, task {name!r}: expected a tf.data.Dataset, (x, y) or "
            f"(x, y, sample_weight). Received: {type(data).__name__}."
        )
    sizes = [len(array) for array in tf.nest.flatten(tuple(data))]
    if len(set(sizes)) != 1 or sizes[0] == 0:
        raise ValueError(
            f"zip_tasks, task {name!r}: expected arrays of one positive length. "
            f"Received: lengths {sizes}."
        )
    return tf.data.Dataset.from_tensor_slices(tuple(data)), sizes[0]
