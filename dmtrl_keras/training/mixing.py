"""Which tasks' examples are in which batch of a stream."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from dmtrl_keras.ground.validation import (
    check_bool,
    check_one_of,
    check_positive,
    is_real,
    refusal,
)

# The shares of the tasks: a name, a temperature, or a dict by task.
Shares: TypeAlias = Literal["equal", "size"] | float | Mapping[str, float] | None
Alone: TypeAlias = Literal["in_turn", "random"] | None
_OWNER = "zip_tasks"
# Below this temperature all but the largest data set has a share of nothing.
_COLDEST = 0.01


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How a stream takes from the data of each task.

    Attributes:
        names: tuple of the tasks.
        batch_sizes: dict from task to the examples of it in a batch that has it; with
            shares and without `alone` each has those of the whole batch.
        shares: dict from task to its share, summing to 1; None: every batch has all tasks.
        alone: each batch is of one task, these being in turn or at random; None: not.
        common_input: bool; the tasks' examples are rows of one input.
        missing: float, what marks labels that are missing.
    """

    names: tuple[str, ...]
    batch_sizes: dict[str, int]
    shares: dict[str, float] | None
    alone: Alone
    common_input: bool
    missing: float

    @property
    def marks_labels(self) -> bool:
        """Whether there are rows with the labels of some tasks alone."""
        sizes = set(self.batch_sizes.values())
        return self.common_input or self.alone is not None or len(sizes) > 1

    @property
    def rows(self) -> int:
        """The most rows that the input of a task has in a batch."""
        if self.common_input and self.shares is None:
            return sum(self.batch_sizes.values())
        return max(self.batch_sizes.values())

    def per_batch(self, name: str) -> float:
        """How many examples of a task a batch has, in the mean."""
        share = 1.0 if self.shares is None else self.shares[name]
        return share * self.batch_sizes[name]

    def steps(self, sizes: Mapping[str, int], epoch: Any) -> int:
        """The batches of an epoch.

        Args:
            sizes: dict of the examples of each task, where `epoch` is a name.
            epoch: `"longest"`, `"shortest"`, or a number of batches.
        """
        if not isinstance(epoch, str):
            return int(epoch)
        # One that is never taken is no reason to go on.
        taken = [name for name in self.names if self.per_batch(name)]
        needed = [math.ceil(sizes[n] / self.per_batch(n) - 1e-9) for n in taken]
        if self.alone == "in_turn":
            needed = self._after_turns(
                {name: math.ceil(sizes[name] / self.batch_sizes[name]) for name in taken}
            )
        return min(needed) if epoch == "shortest" else max(needed)

    def _after_turns(self, wanted: Mapping[str, int]) -> list[int]:
        """After how many batches in turn each task has had so many of them."""
        assert self.shares is not None
        longest = max(math.ceil(n / self.shares[task]) for task, n in wanted.items())
        order = self.turns(longest + len(self.names) + 1)
        return [
            int(np.flatnonzero(order == self.names.index(task))[n - 1]) + 1
            for task, n in wanted.items()
        ]

    def turns(self, steps: int) -> np.ndarray:
        """The number of the task of each batch, if they are in turn.

        The j-th turn of a task with share p is at `(j + 1/2) / p`, so that after any number
        of batches every task has had its share of them to within one.
        """
        assert self.shares is not None
        times, tasks = [], []
        for number, name in enumerate(self.names):
            share = self.shares[name]
            count = math.ceil(steps * share) + 1 if share else 0
            times.append((np.arange(count) + 0.5) / (share or 1.0))
            tasks.append(np.full(count, number))
        order = np.argsort(np.concatenate(times), kind="stable")[:steps]
        return np.concatenate(tasks)[order]

    def counts(self, steps: int, rng: np.random.Generator) -> np.ndarray:
        """The examples of each task in each batch, an int array `(steps, tasks)`."""
        sizes = np.array([self.batch_sizes[name] for name in self.names])
        if self.shares is None:
            return np.tile(sizes, (steps, 1))
        shares = [self.shares[name] for name in self.names]
        if self.alone is None:
            return rng.multinomial(sizes[0], shares, size=steps)
        if self.alone == "in_turn":
            chosen = self.turns(steps)
        else:
            chosen = rng.choice(len(sizes), size=steps, p=shares)
        return np.where(np.arange(len(sizes)) == chosen[:, None], sizes, 0)


def checked_mixing(
    names: Sequence[str],
    batch_size: Any,
    mixing: Any,
    alone: Any,
    common_input: Any,
    missing: Any,
    sizes: Mapping[str, int],
) -> Mixing:
    """The settings of a stream, as the user gives them.

    Args:
        names: list of the tasks.
        batch_size: int, or a dict of them by task.
        mixing: see `zip_tasks`; as are `alone`, `common_input` and `missing`.
        alone: None, or a name.
        common_input: bool.
        missing: float.
        sizes: dict of the examples of each task, negative where unknown.

    Raises:
        ValueError: on malformed arguments, or such as don't go together.
    """
    if isinstance(batch_size, Mapping):
        if set(batch_size) != set(names):
            what = f"a positive int, or a dict of them for each of {list(names)}"
            raise refusal("batch_size", dict(batch_size), _OWNER, what)
        batch = {n: check_positive("batch_size", batch_size[n], _OWNER) for n in names}
    else:
        size = check_positive(
            "batch_size", batch_size, _OWNER, " or a dict of them by task"
        )
        batch = dict.fromkeys(names, size)
    common = check_bool("common_input", common_input, _OWNER)
    if alone is not None:
        check_one_of("alone", alone, ("in_turn", "random"), _OWNER, ", or None")
    if not is_real(missing) and not (isinstance(missing, float) and math.isnan(missing)):
        raise refusal("missing", missing, _OWNER, "NaN, or a number that marks labels")
    shares = None
    if mixing is not None or alone is not None:
        shares = _shares("equal" if mixing is None else mixing, list(names), sizes)
    if shares is not None and alone is None:
        if not common:
            raise ValueError(
                f"{_OWNER}: with an input for each task every batch has examples of all of "
                "them. Expected: `batch_size` by task; `alone`, batches of one task alone; "
                f"or common_input=True. Received: mixing={mixing!r}."
            )
        if len(set(batch.values())) > 1:
            raise ValueError(
                f"{_OWNER}: with `mixing` expected one `batch_size`, of whole batches. "
                f"Received: {batch}."
            )
    return Mixing(tuple(names), batch, shares, alone, common, float(missing))


def _shares(mixing: Any, names: list[str], sizes: Mapping[str, int]) -> dict[str, float]:
    what = (
        f'"equal", "size", a temperature (from {_COLDEST}), or a dict of shares, not '
        f"negative and not all 0, for each of {names}"
    )
    if isinstance(mixing, Mapping):
        fine = set(mixing) == set(names) and all(
            is_real(share) and 0 <= share < math.inf for share in mixing.values()
        )
        if not fine or not sum(mixing.values()):
            raise refusal("mixing", dict(mixing), _OWNER, what)
        weights = [float(mixing[name]) for name in names]
    elif isinstance(mixing, str) and mixing == "equal":
        weights = [1.0] * len(names)
    elif (isinstance(mixing, str) and mixing == "size") or (
        is_real(mixing) and _COLDEST <= mixing < math.inf
    ):
        for name in names:
            if sizes[name] < 1:
                raise ValueError(
                    f"{_OWNER}, task {name!r}: with mixing={mixing!r} expected data of a "
                    f"known size. Received: cardinality={sizes[name]}. Or give shares."
                )
        temperature = 1.0 if mixing == "size" else float(mixing)
        largest = max(sizes.values())
        weights = [(sizes[name] / largest) ** (1 / temperature) for name in names]
    else:
        raise refusal("mixing", mixing, _OWNER, what)
    return {name: weight / sum(weights) for name, weight in zip(names, weights)}
