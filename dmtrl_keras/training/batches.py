"""Streams of several tasks' batches without TensorFlow: a `keras.utils.PyDataset`."""

import collections
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import tree

from dmtrl_keras.training.missing import has_number
from dmtrl_keras.training.mixing import Mixing

_OWNER = "zip_tasks"
# By this name a stream says what marks labels that are missing.
MARK = "_dmtrl_keras_missing"
# So many batches of a source are kept, for examples that go over the end of one.
_KEPT = 4


def as_numpy(data: Any) -> Any:
    """Data frames and series of pandas as arrays; all else as it is.

    What is missing among them becomes NaN; columns are the last axis.
    """

    def convert(leaf: Any) -> Any:
        if not hasattr(leaf, "to_numpy") or not hasattr(leaf, "iloc"):
            return leaf
        values = leaf.to_numpy()
        if values.dtype == object and not _has_text(values):
            values = leaf.to_numpy(dtype="float64", na_value=np.nan)
        return values

    return tree.map_structure(convert, data)


def is_frame(data: Any) -> bool:
    """Whether data are a data frame, such as one of pandas."""
    return hasattr(data, "columns") and hasattr(data, "iloc")


def _has_text(values: np.ndarray) -> bool:
    return any(isinstance(value, (str, bytes)) for value in values.ravel())


def checked_arrays(owner: str, name: str, data: Any) -> tuple[tuple[Any, ...], int]:
    """One task's data as `(x, y)` or `(x, y, sample_weight)` of arrays, and its size.

    Args:
        owner: str, what to name in errors.
        name: str, the task.
        data: what the user gave.

    Raises:
        ValueError: on what are no arrays of one positive length.
    """
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"{owner}, task {name!r}: expected a tf.data.Dataset, (x, y) or "
            f"(x, y, sample_weight). Received: {type(data).__name__}. "
            "A generator of examples becomes a data set by "
            "`tf.data.Dataset.from_generator(..., output_signature=...)`."
        )
    parts = tuple(data[:2]) if len(data) == 3 and data[2] is None else tuple(data)
    parts = as_numpy(parts)
    arrays = [array for part in parts for array in tree.flatten((part,))]
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
    return parts, int(sizes[0])


class Source:
    """The examples of one task, by number.

    Attributes:
        size: int, how many there are.
        weighted: bool, whether they have weights.
        data: the `keras.utils.PyDataset` that they come from, or None.
    """

    def __init__(
        self,
        size: int,
        weighted: bool,
        take: Callable[[np.ndarray], Any],
        order: Callable[[np.random.Generator], np.ndarray],
        data: keras.utils.PyDataset | None = None,
    ) -> None:
        self.size, self.weighted, self.data = size, weighted, data
        self.take = take
        self.order = order

    @classmethod
    def of(cls, name: str, data: Any) -> Self:
        """From what `zip_tasks` takes for a task.

        Args:
            name: str, the task.
            data: arrays, or a `PyDataset` of batches.

        Raises:
            ValueError: on anything else, on batches of an unknown number, or of other forms
                than `(x, y)` and `(x, y, sample_weight)`.
        """
        if hasattr(data, "element_spec"):
            raise ValueError(
                f"{_OWNER}, task {name!r}: expected arrays, or a keras.utils.PyDataset, "
                'with kind="PyDataset" or beside a PyDataset. '
                f"Received: {type(data).__name__}."
            )
        if isinstance(data, keras.utils.PyDataset):
            return cls._of_batches(name, data)
        parts, size = checked_arrays(_OWNER, name, data)
        parts = tree.map_structure(np.asarray, parts)

        def take(numbers: np.ndarray) -> Any:
            return tree.map_structure(lambda array: array[numbers], parts)

        return cls(size, len(parts) == 3, take, lambda rng: rng.permutation(size))

    @classmethod
    def _of_batches(cls, name: str, data: keras.utils.PyDataset) -> Self:
        try:
            count = data.num_batches
        except (NotImplementedError, TypeError):
            # Of one without a length.
            count = None
        if not count:
            raise ValueError(
                f"{_OWNER}, task {name!r}: expected a PyDataset of a known number of "
                f"batches, not 0. Received: num_batches={count}."
            )
        lock = threading.Lock()
        kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

        def batch(number: int) -> Any:
            with lock:
                if number in kept:
                    return kept[number]
            found = data[number]
            if not isinstance(found, (tuple, list)):
                found = (found,)
            found, _ = checked_arrays(_OWNER, name, found)
            found = tree.map_structure(_array, found)
            with lock:
                kept[number] = found
                if len(kept) > _KEPT:
                    kept.popitem(last=False)
            return found

        whole, last = (_rows(batch(number)) for number in (0, count - 1))
        size = (count - 1) * whole + last

        def take(numbers: np.ndarray) -> Any:
            blocks = numbers // whole
            changes = np.flatnonzero(np.diff(blocks)) + 1
            pieces = []
            for part in np.split(numbers, changes):
                found = batch(int(part[0] // whole)) if len(part) else batch(0)
                rows = part % whole
                pieces.append(tree.map_structure(lambda a, r=rows: a[r], found))
            return tree.map_structure(lambda *own: np.concatenate(own), *pieces)

        def order(rng: np.random.Generator) -> np.ndarray:
            starts = rng.permutation(count) * whole
            return np.concatenate([np.arange(s, min(s + whole, size)) for s in starts])

        return cls(size, len(batch(0)) == 3, take, order, data)


def _array(value: Any) -> np.ndarray:
    tensor = keras.ops.is_tensor(value)
    return keras.ops.convert_to_numpy(value) if tensor else np.asarray(value)


def _rows(batch: Any) -> int:
    return len(tree.flatten(batch)[0])


class _Plan(NamedTuple):
    """Which examples are in which batch of an epoch.

    Attributes:
        counts: int array `(batches, tasks)`, the examples of each task in each batch.
        ends: the same, summed over the batches up to each.
        orders: dict from task to the numbers of its examples, in the order of use.
    """

    counts: np.ndarray
    ends: np.ndarray
    orders: dict[str, np.ndarray]


class TaskBatches(keras.utils.PyDataset):
    """One stream of the batches of several tasks (made by `zip_tasks`).

    Its `workers`, `use_multiprocessing` and `max_queue_size` can be set, as of any
    `keras.utils.PyDataset`.

    Args:
        sources: dict of the `Source` of each task.
        mixing: the `Mixing`.
        steps: int, the batches of an epoch.
        shuffle: bool.
        seed: int or None.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixing: Mixing,
        steps: int,
        shuffle: bool,
        seed: int | None,
    ) -> None:
        super().__init__()
        self._sources = dict(sources)
        self._mixing = mixing
        self._steps = steps
        self._shuffle = shuffle
        self._seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._weighted = any(source.weighted for source in sources.values())
        self._epoch = 0
        # The form of each task's labels, where those that are missing are marked.
        self._labels: dict[str, Any] = {}
        if mixing.marks_labels:
            first = {n: source.take(np.zeros(1, int)) for n, source in sources.items()}
            for name, part in first.items():
                self._labels[name] = _checked_labels(name, part[1], mixing)
        if mixing.common_input:
            check_one_form(
                {
                    name: tree.map_structure(lambda a: (a.shape[1:], str(a.dtype)), part[0])
                    for name, part in first.items()
                }
            )
        self._plan = self._plan_of(0)
        self._iterated = False

    @property
    def num_batches(self) -> int:
        return self._steps

    def __len__(self) -> int:
        return self._steps

    def cardinality(self) -> int:
        """The number of batches, as of a `tf.data.Dataset`."""
        return self._steps

    def on_epoch_begin(self) -> None:
        """Tell the sources."""
        for source in self._sources.values():
            if source.data is not None:
                source.data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Go on with another order."""
        for source in self._sources.values():
            if source.data is not None:
                source.data.on_epoch_end()
        self._epoch += 1
        self._plan = self._plan_of(self._epoch)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch; the next time those of the next."""
        if self._iterated:
            self.on_epoch_end()
        self._iterated = True
        # Whoever is still in an earlier epoch stays there.
        plan = self._plan
        return (self._batch(plan, index) for index in range(self._steps))

    def _plan_of(self, epoch: int) -> _Plan:
        """Which examples are in which batch of an epoch."""
        rng = np.random.default_rng([self._seed, epoch])
        counts = self._mixing.counts(self._steps, rng)
        ends = np.cumsum(counts, axis=0)
        orders = {}
        for number, (name, source) in enumerate(self._sources.items()):
            repetitions = max(1, -(-int(ends[-1, number]) // source.size))
            plain = np.arange(source.size)
            own = [
                source.order(rng) if self._shuffle else plain for _ in range(repetitions)
            ]
            orders[name] = np.concatenate(own)
        return _Plan(counts, ends, orders)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._steps:
            raise IndexError(index)
        return self._batch(self._plan, index)

    def _batch(self, plan: _Plan, index: int) -> Any:
        counts = dict(zip(self._mixing.names, plan.counts[index]))
        ends = dict(zip(self._mixing.names, plan.ends[index]))
        own = {}
        for name, source in self._sources.items():
            order, count = plan.orders[name], int(counts[name])
            numbers = order[ends[name] - count : ends[name]]
            if self._mixing.common_input:
                own[name] = source.take(numbers) if count else None
                continue
            rows = self._rows_of(counts)
            if not count:
                # Inputs of a task without labels: examples of its own, in turn.
                numbers = order[(index * rows + np.arange(rows)) % len(order)]
            elif count < rows:
                numbers = np.resize(numbers, rows)
            own[name] = source.take(numbers)
        return self._of_all(own, counts)

    @property
    def has_equal_rows(self) -> bool:
        """Whether all batches have one number of rows."""
        alone = self._mixing.alone is not None
        return not alone or len(set(self._mixing.batch_sizes.values())) == 1

    def _rows_of(self, counts: Mapping[str, int]) -> int:
        return int(max(counts.values()))

    def _of_all(self, own: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
        """A batch of the parts of the tasks."""
        mixing = self._mixing
        if mixing.common_input:
            present = {name: part for name, part in own.items() if part is not None}
            x = tree.map_structure(
                lambda *parts: np.concatenate(parts), *(p[0] for p in present.values())
            )
            places = np.repeat(np.arange(len(own)), [counts[name] for name in own])
            where = {name: places == number for number, name in enumerate(own)}
        else:
            x = {name: part[0] for name, part in own.items()}
            rows = self._rows_of(counts)
            where = {name: np.arange(rows) < counts[name] for name in own}
        labels, weights = {}, {}
        for name in own:
            here, part = where[name], own[name]
            if mixing.marks_labels:
                shape, dtype = self._labels[name]
                marked = np.full((len(here), *shape), mixing.missing, dtype)
                if part is not None:
                    marked[here] = part[1] if mixing.common_input else part[1][here]
                labels[name] = marked
            else:
                labels[name] = part[1]
            weights[name] = np.ones(len(here), "float32")
            if part is not None and len(part) == 3:
                weights[name] = np.asarray(part[2], "float32")
                if mixing.common_input:
                    spread = np.ones((len(here), *weights[name].shape[1:]), "float32")
                    spread[here] = weights[name]
                    weights[name] = spread
        return (x, labels, weights) if self._weighted else (x, labels)


def _checked_labels(name: str, labels: Any, mixing: Mixing) -> tuple[Any, str]:
    """The shape of a label and the dtype in which it can be marked as missing."""
    if tree.is_nested(labels):
        raise no_mark(name, type(labels).__name__, mixing)
    return labels.shape[1:], dtype_of_marked(name, str(labels.dtype), mixing)


def dtype_of_marked(name: str, dtype: str, mixing: Mixing) -> str:
    """The dtype of labels some of which are marked as missing.

    Args:
        name: str, the task.
        dtype: str, theirs.
        mixing: the settings of the stream.

    Raises:
        ValueError: if such labels can't be marked.
    """
    if dtype.startswith(("float", "bfloat")):
        return dtype
    if not dtype.startswith(("int", "uint", "bool")):
        raise no_mark(name, dtype, mixing)
    if np.isnan(mixing.missing) or dtype == "bool":
        return "float32"
    if not has_number(dtype, mixing.missing):
        raise no_mark(name, dtype, mixing)
    return dtype


def no_mark(name: str, received: str, mixing: Mixing) -> ValueError:
    """The error of labels of which none can be marked as missing."""
    return ValueError(
        f"{_OWNER}, task {name!r}: expected labels of which one can be marked by "
        f"missing={mixing.missing:g}, an array of numbers of a type that has it. "
        f"Received: {received}."
    )


def check_one_form(forms: Mapping[str, Any]) -> None:
    """Refuse inputs of several forms where tasks have one in common.

    Raises:
        ValueError: if they are not equal.
    """
    names: Sequence[str] = list(forms)
    others = [name for name in names if forms[name] != forms[names[0]]]
    if others:
        raise ValueError(
            f"{_OWNER}: with common_input=True expected inputs of one form. "
            f"Received: {names[0]!r}: {forms[names[0]]}, {others[0]!r}: {forms[others[0]]}."
        )
