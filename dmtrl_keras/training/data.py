"""Data sets of several tasks as one stream of batches."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.backend import has_tensorflow, makes_batches, tensorflow
from dmtrl_keras.ground.types import Dataset
from dmtrl_keras.ground.validation import (
    check_bool,
    check_one_of,
    check_positive,
    check_seed,
)
from dmtrl_keras.training.batches import MARK, Source, TaskBatches, as_numpy, checked_arrays
from dmtrl_keras.training.mixing import Alone, Shares, checked_mixing
from dmtrl_keras.training.streams import tf_stream, tf_stream_of_arrays

Kind: TypeAlias = Literal["auto", "tf.data", "PyDataset"]


def zip_tasks(
    datasets: dict[str, Any],
    batch_size: int | Mapping[str, int],
    epoch: int | Literal["longest", "shortest"] = "longest",
    shuffle: bool | int = True,
    seed: int | None = None,
    prefetch: bool = True,
    *,
    mixing: Shares = None,
    alone: Alone = None,
    common_input: bool = False,
    missing: float = math.nan,
    kind: Kind = "auto",
) -> Dataset:
    """One stream of dict batches from one data set per task.

    By default every batch has `batch_size` examples of every task, for a network with an
    input for each. With `common_input` the examples are the rows of one input, and the
    labels of all other tasks are marked as missing in a row; with `mixing` and `alone` not
    every task is in every batch, and those that are not have no labels there. Losses and
    metrics are then `MaskedLoss` and `MaskedMetric`, whose means are over the labels that
    there are. Data sets that are shorter than the epoch are repeated; with `shuffle`, in a
    new order each time. The epoch's length in batches is `len(stream)`.

    Args:
        datasets: dict from task name to `(x, y)` or `(x, y, sample_weight)` arrays with
            one length (data frames and series of pandas too), to a `tf.data.Dataset` of
            such examples, unbatched, or to a `keras.utils.PyDataset` of batches of them.
            Kinds may be mixed, but for the latter two. With a number of batches as `epoch`
            a `tf.data.Dataset` may be endless or of unknown size, such as those of
            generators, `repeat` and `filter`.
        batch_size: positive int, or a dict of them by task. Where each task has an input of
            its own, one with fewer examples than others goes on with rows that it has
            already, without labels.
        epoch: `"longest"`: so many batches that every example of every task appears (with
            tasks drawn at random: in the mean); `"shortest"`: so many as the smallest data
            set gives; or the number of batches as an int.
        shuffle: whether to shuffle each data set before each repetition: wholly, or, where
            it has no known end, among the next 1,000 examples. An int: among so many. Of
            a `PyDataset` its batches are put in another order.
        seed: int or None.
        prefetch: bool, whether to prepare the next batch during a step.
        mixing: the shares p of the tasks, of examples (with `common_input`: for each row
            the task is drawn) or with `alone` of batches. `"equal"`; `"size"`,
            `p_t = n_t / sum_s n_s`; a number, the temperature tau,
            `p_t = n_t^(1 / tau) / sum_s n_s^(1 / tau)`, which is 1 for `"size"` and goes to
            equal shares; or a dict of shares by task, which need not sum to 1. None: every
            batch has all tasks; with `alone`, equal shares.
        alone: None; or batches of one task alone, `"in_turn"`: after any number of batches
            each task has had its share of them to within one; `"random"`: drawn. Where each
            task has an input of its own, the inputs of the others are examples of theirs,
            without labels.
        common_input: bool; all tasks have one input, of one form.
        missing: float, what marks a label that is missing, as in `MaskedLoss`: NaN, for
            which whole numbers become floats, or a number such as -1.
        kind: `"tf.data"`, `"PyDataset"` (a `keras.utils.PyDataset`, which every backend
            trains on without TensorFlow; its `workers` can be set), or `"auto"`: the
            former, if TensorFlow is installed and no data set is a `PyDataset`.

    Returns:
        A data set of `(inputs, labels)` or `(inputs, labels, sample_weights)`,
        each a dict by task name (with `common_input` the inputs as they are). Where only
        some tasks have weights, the others have ones.

    Raises:
        ValueError: on no task, empty data, arrays of different lengths, data that are no
            arrays, a batched `tf.data.Dataset`, one without a known end if `epoch` or
            `mixing` depends on it; on inputs of different forms with `common_input`; on
            labels that can't be marked; on arguments that are malformed or don't go
            together.
        tf.errors.InvalidArgumentError: from the stream, if a data set of unknown size
            turns out to have no example.

    Example:

    >>> import numpy as np
    >>> digits = np.zeros((10, 4)), np.zeros(10)
    >>> letters = np.zeros((25, 4)), np.zeros(25)
    >>> data = {"digits": digits, "letters": letters}
    >>> inputs, labels = next(iter(zip_tasks(data, batch_size=5)))
    >>> sorted(inputs), tuple(labels["letters"].shape)
    (['digits', 'letters'], (5,))
    >>> stream = zip_tasks(data, batch_size=7, mixing="size", common_input=True)
    >>> inputs, labels = next(iter(stream))
    >>> tuple(inputs.shape), int(np.isfinite(labels["digits"]).sum()) < 8, len(stream)
    ((7, 4), True, 5)
    """
    if not isinstance(datasets, dict) or not datasets:
        raise ValueError(
            "zip_tasks: `datasets` must be a dict from task name to data, with at least "
            "one task. "
            f"Received: {type(datasets).__name__}."
        )
    strange = [name for name in datasets if not isinstance(name, str)]
    if strange:
        raise ValueError(f"zip_tasks: task names must be strings. Received: {strange}.")
    if not isinstance(shuffle, bool):
        check_positive("shuffle", shuffle, "zip_tasks", " or a bool")
    seed = check_seed("seed", seed, "zip_tasks")
    prefetch = check_bool("prefetch", prefetch, "zip_tasks")
    check_one_of("kind", kind, ("auto", "tf.data", "PyDataset"), "zip_tasks")
    of_keras = [n for n, d in datasets.items() if isinstance(d, keras.utils.PyDataset)]
    if kind == "auto":
        kind = "PyDataset" if of_keras or not has_tensorflow() else "tf.data"
    elif kind == "tf.data" and of_keras:
        raise ValueError(
            f'zip_tasks: expected no keras.utils.PyDataset with kind="tf.data". '
            f"Received: those of {of_keras}."
        )
    parts: dict[str, Any] = {}
    for name, data in datasets.items():
        if kind == "tf.data":
            parts[name] = _examples(tensorflow(), "zip_tasks", name, data)
        else:
            parts[name] = Source.of(name, data)
    if kind == "tf.data":
        sizes = {name: size for name, (_, size) in parts.items()}
    else:
        sizes = {name: source.size for name, source in parts.items()}
    if isinstance(epoch, str) and epoch in ("longest", "shortest"):
        _check_sizes(sizes, epoch)
    else:
        other = ' or one of "longest" and "shortest"'
        epoch = check_positive("epoch", epoch, "zip_tasks", other)
    mixed = checked_mixing(
        list(datasets), batch_size, mixing, alone, common_input, missing, sizes
    )
    steps = mixed.steps(sizes, epoch)
    arrays = not any(hasattr(data, "element_spec") for data in datasets.values())
    stream: Any
    if kind == "PyDataset":
        stream = TaskBatches(parts, mixed, steps, bool(shuffle), seed)
    elif arrays and mixed.marks_labels and isinstance(shuffle, bool):
        parts = {name: Source.of(name, data) for name, data in datasets.items()}
        batches = TaskBatches(parts, mixed, steps, shuffle, seed)
        stream = tf_stream_of_arrays(batches, prefetch)
    else:
        stream = tf_stream(parts, mixed, steps, shuffle, seed, prefetch)
    if mixed.marks_labels:
        # For `fit`, which knows the losses.
        setattr(stream, MARK, mixed.missing)
    return stream


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
    parts, size = checked_arrays(owner, name, data)
    try:
        return tf.data.Dataset.from_tensor_slices(parts), size
    except (TypeError, ValueError) as error:
        arrays = tree.flatten(parts)
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
        return as_numpy(data if labelled else data[:1])
    if isinstance(data, keras.utils.PyDataset):
        source = Source.of(name, data)
        arrays = source.take(np.arange(source.size))
        return arrays if labelled else arrays[:1]
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
