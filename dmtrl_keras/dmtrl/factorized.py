"""What the parameterizations by shared factors have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

import keras
import numpy as np

from dmtrl_keras.dmtrl import decomposition
from dmtrl_keras.dmtrl.decomposition import (
    AS_SAVED,
    Rank,
    RankRule,
    TaskRank,
    Threshold,
)
from dmtrl_keras.ground.types import FactorShapes, Regularizer
from dmtrl_keras.ground.validation import check_one_of, from_keras, refusal
from dmtrl_keras.kernels.parameterization import Parameterization

Implementation: TypeAlias = Literal["auto", "compose", "contract"]

IMPLEMENTATIONS = ("auto", "compose", "contract")


class FactorizedParameterization(Parameterization):
    """A stacked kernel generated from shared factors (DMTRL).

    Args:
        rank: int, a cap for every rank but that of the tasks; or a float in (0, 1), the
            most that the factors may have of the weights of independent kernels: then
            the ranks of input and output channels are the largest, alike, that keep to
            it, and those of the window full (1.0: all ranks are full); or a tuple with an
            int or a fraction of the possible for each rank, from the window to the outputs,
            with that of the tasks or without. Of LAF it is the one rank that there is, the
            number of latent kernels. Without `rank` and `tolerance`: 0.5.
        tolerance: number in (0, 1); the ranks are the smallest whose composition
            is within `tolerance * ||W||_F` of the start kernel `W`.
        implementation: `"compose"` the kernel and apply it, `"contract"`: pull the
            activations through the factors, or `"auto"`: whatever needs fewer
            operations for the shapes at hand.
        threshold: what `tolerance` bounds: `"frobenius"`, the error of the
            composed kernel; `"singular_value"`, the ratio to the largest singular
            value in each SVD, as in the code of the paper's authors.
        task_rank: int or fraction of the tasks, the rank of their axis, which is the number
            of latent kernels. None: full, or the tolerance's. With 1 the kernels of all
            tasks are multiples of each other, of which a layer warns. (A built layer's
            configuration has `"as_saved"`; one without it is of version 0.1, where an int
            or a fraction was for all ranks alike, that of the tasks too.)
        factor_regularizers: dict from the name of a factor to a Keras regularizer of it, or
            None. GO-MTL (Kumar & Daume 2012) is LAF with an L1 norm on `"task_matrix"`, so
            that a task combines few latent kernels, and L2 on `"latent"`.

    Raises:
        ValueError: on a malformed argument.
    """

    def __init__(
        self,
        rank: Rank | None = None,
        tolerance: float | None = None,
        implementation: Implementation = "auto",
        threshold: Threshold = "frobenius",
        task_rank: TaskRank = None,
        factor_regularizers: Mapping[str, Regularizer] | None = None,
    ) -> None:
        owner = type(self).__name__
        decomposition.check_choice(rank, tolerance, threshold, task_rank, owner)
        check_one_of("implementation", implementation, IMPLEMENTATIONS, owner)
        settled = self._is_settled(task_rank)
        if settled and not (rank is None and tolerance is None):
            raise ValueError(
                f"{owner} has no other rank than that of the tasks: give one "
                f"of `rank`, `task_rank` and `tolerance`. Received: rank={rank!r}, "
                f"task_rank={task_rank!r}, tolerance={tolerance!r}."
            )
        self._rank = tuple(rank) if isinstance(rank, (tuple, list)) else rank
        self.tolerance = tolerance
        self.implementation = implementation
        self.threshold = threshold
        self._task_rank = task_rank
        self._penalties = _regularizers(factor_regularizers, owner)

    short_forms = ("rank", "tolerance", "implementation", "threshold", "task_rank")
    # The ranks that there are. None, of a class of a user's: replicated as any tensor.
    _rule: RankRule | None = None

    @classmethod
    def of_trained(
        cls,
        rank: Rank | None = None,
        tolerance: float | None = None,
        task_rank: TaskRank = None,
        **options: Any,
    ) -> Self:
        """With neither rank nor tolerance the error is 10%, as in the paper."""
        if rank is None and tolerance is None and not cls._is_settled(task_rank):
            tolerance = 0.1
        return cls(rank, tolerance, task_rank=task_rank, **options)

    @classmethod
    def _is_settled(cls, task_rank: TaskRank) -> bool:
        """Whether a task rank says all, since there is no other rank."""
        return cls._rule is decomposition.LAF_RANKS and decomposition.is_given(task_rank)

    def replicate(self, kernel: np.ndarray, tasks: int) -> dict[str, np.ndarray]:
        """Factors of T equal kernels, whose tasks can still become different.

        Equal kernels have task rank 1, whatever the tolerance; so that a tolerance is
        applied to the one kernel that they are. The task rank is T, or `task_rank`:
        latent kernels beyond the first start at zero, while their rows of the task
        matrix, cosines of increasing frequency, are orthogonal with norm `sqrt(T)`
        as always. Thus every task starts from `kernel`, and gradients reach them all.
        Ranks are those of T kernels, where an int is a cap at any size.
        """
        if self._rule is None:
            return super().replicate(kernel, tasks)
        if self.tolerance is None:
            shape = (*kernel.shape, tasks)
            ranks = self._rule.ranks(
                shape, self._choice()["rank"], self._task_rank, strict=False
            )
            latents, fixed = ranks[-1], self.with_rank(ranks)
            single = self.with_rank((*ranks[:-1], 1))
            bounds = self._rule.bounds((*kernel.shape, 1))
            if any(rank > bound for rank, bound in zip(ranks[:-1], bounds)):
                # T kernels that differ can have greater ranks than one.
                return fixed.decompose(np.repeat(kernel[..., None], tasks, axis=-1))
            factors = single.decompose(kernel[..., None])
        else:
            task_rank = None if self._task_rank == AS_SAVED else self._task_rank
            latents = self._rule.task_rank((*kernel.shape, tasks), task_rank)
            single = type(self)(None, self.tolerance, self.implementation, self.threshold)
            factors = single.decompose(kernel[..., None])
            found = single.rank({name: f.shape for name, f in factors.items()})
            assert found is not None
            fixed = self.with_rank(self._widened((*found[:-1], latents), kernel.shape))
        latent, matrix, axis = self._task_axis(list(factors))
        start = factors[latent]
        if latents > math.prod(start.shape[:-1]):
            # One kernel alone, say with a single output, needs ranks too small for so
            # many latent kernels to differ. What the wider ranks add is zero at first.
            return fixed.decompose(np.repeat(kernel[..., None], tasks, axis=-1))
        unused = [(0, 0)] * (start.ndim - 1) + [(0, latents - 1)]
        factors[latent] = np.pad(start, unused)
        angles = np.outer(np.arange(latents), np.arange(tasks) + 0.5) * np.pi / tasks
        rows = math.sqrt(2) * np.cos(angles)
        rows[0] = factors[matrix].item()
        factors[matrix] = rows if axis == 0 else rows.T
        return factors

    def _task_axis(self, names: Sequence[str]) -> tuple[str, str, int]:
        """Where the latent kernels are counted.

        Returns:
            `(latent, matrix, axis)`: the names of the factor whose last axis counts them
            and of the task matrix, and the axis of the latter that counts them.
        """
        raise NotImplementedError

    def task_factor(self, names: Sequence[str]) -> tuple[str, int] | None:
        """The task matrix, for the parameterizations of this library."""
        if self._rule is None:
            return None
        _, name, axis = self._task_axis(names)
        return name, 1 - axis

    def _widened(self, ranks: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks for the last of them, the task rank, to be possible.

        Args:
            ranks: tuple of ints.
            shape: tuple, the shape of one task's kernel.
        """
        return ranks

    def concerns(self, shapes: FactorShapes, kernel: tuple[int, ...]) -> list[str]:
        """Tasks that can't differ, and a share of the weights that can't be had."""
        if self._task_rank == AS_SAVED:
            return []
        found, tasks = [], kernel[-1]
        latent, *_ = self._task_axis(list(shapes))
        *others, rank = shapes[latent]
        if tasks > 1 and min(math.prod(others), rank) == 1:
            found.append(
                f"the task rank is 1, so that the kernels of the {tasks} tasks are "
                f"multiples of each other, and stay so. {self._received()} Expected: a "
                "task rank of 2 or more, by `task_rank` or from kernels that differ by "
                "more than the tolerance."
            )
        size, whole = sum(map(math.prod, shapes.values())), math.prod(kernel)
        fraction = self._rank if isinstance(self._rank, float) else 1.0
        if fraction < 1 and size > fraction * whole:
            found.append(
                f"the smallest ranks with which the {tasks} tasks can differ, "
                f"{self.rank(shapes)}, have {size / whole:.2f} of the weights of "
                f"independent kernels. {self._received()} Expected: at least that fraction "
                "here, or a smaller `task_rank`."
            )
        return found

    def _received(self) -> str:
        given = {
            "rank": self._rank,
            "tolerance": self.tolerance,
            "task_rank": self._task_rank,
        }
        parts = (f"{name}={value!r}" for name, value in given.items() if value is not None)
        return f"Received: {', '.join(parts)}."

    def with_rank(self, rank: tuple[int, ...]) -> Self:
        return type(self)(
            rank, None, self.implementation, self.threshold, AS_SAVED, self._penalties
        )

    @property
    def factor_regularizers(self) -> Mapping[str, Callable[..., Any]]:
        return self._penalties or {}

    def get_config(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "tolerance": self.tolerance,
            "implementation": self.implementation,
            "threshold": self.threshold,
            "task_rank": self._task_rank,
            "factor_regularizers": self._penalties
            and {n: keras.regularizers.serialize(r) for n, r in self._penalties.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`, of this version or an earlier one."""
        return cls(**{"task_rank": AS_SAVED, **config})

    def _choice(self) -> dict[str, Any]:
        """The arguments of a decomposition."""
        rank = self._rank
        if (
            rank is None
            and self.tolerance is None
            and not self._is_settled(self._task_rank)
        ):
            rank = 0.5
        return {
            "rank": rank,
            "tolerance": self.tolerance,
            "threshold": self.threshold,
            "task_rank": self._task_rank,
        }


def _regularizers(given: Any, owner: str) -> dict[str, Callable[..., Any]] | None:
    """Keras's regularizers by factor, or None."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(n, str) for n in given):
        what = "a dict from a factor's name to a Keras regularizer, or None"
        raise refusal("factor_regularizers", given, owner, what)
    made = {
        name: from_keras(owner, keras.regularizers.get, identifier=value)
        for name, value in given.items()
    }
    return {name: value for name, value in made.items() if value is not None} or None
