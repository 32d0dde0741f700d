"""What the parameterizations by shared factors have in common."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from dmtrl_keras.dmtrl import decomposition
from dmtrl_keras.dmtrl.decomposition import Rank, Threshold
from dmtrl_keras.ground.validation import check_one_of
from dmtrl_keras.kernels.parameterization import Parameterization

Implementation: TypeAlias = Literal["auto", "compose", "contract"]

IMPLEMENTATIONS = ("auto", "compose", "contract")


class FactorizedParameterization(Parameterization):
    """A stacked kernel generated from shared factors (DMTRL).

    Args:
        rank: int (a cap for every rank), float in (0, 1] (a fraction of the
            largest possible ranks) or a tuple with one of them for each rank.
            Without `rank` and `tolerance`: 0.5.
        tolerance: number in (0, 1); the ranks are the smallest whose composition
            is within `tolerance * ||W||_F` of the start kernel `W`.
        implementation: `"compose"` the kernel and apply it, `"contract"`: pull the
            activations through the factors, or `"auto"`: whatever needs fewer
            operations for the shapes at hand.
        threshold: what `tolerance` bounds: `"frobenius"`, the error of the
            composed kernel; `"singular_value"`, the ratio to the largest singular
            value in each SVD, as in the code of the paper's authors.

    Raises:
        ValueError: on a malformed argument.
    """

    def __init__(
        self,
        rank: Rank | None = None,
        tolerance: float | None = None,
        implementation: Implementation = "auto",
        threshold: Threshold = "frobenius",
    ) -> None:
        owner = type(self).__name__
        decomposition.check_choice(rank, tolerance, threshold, owner)
        check_one_of("implementation", implementation, IMPLEMENTATIONS, owner)
        if rank is None and tolerance is None:
            rank = 0.5
        self._rank = tuple(rank) if isinstance(rank, (tuple, list)) else rank
        self.tolerance = tolerance
        self.implementation = implementation
        self.threshold = threshold

    short_forms = ("rank", "tolerance", "implementation", "threshold")
    # Largest possible ranks of a stacked kernel, a function of its shape.
    _bounds: Callable[[tuple[int, ...]], tuple[int, ...]]

    @classmethod
    def of_trained(
        cls, rank: Rank | None = None, tolerance: float | None = None, **options: Any
    ) -> Self:
        """With neither rank nor tolerance the error is 10%, as in the paper."""
        if rank is None and tolerance is None:
            tolerance = 0.1
        return cls(rank, tolerance, **options)

    def _task_axis(self, names: Sequence[str]) -> tuple[str, str, int]:
        """Where the latent kernels are counted.

        Returns:
            `(latent, matrix, axis)`: the names of the factor whose last axis counts them
            and of the task matrix, and the axis of the latter that counts them.
        """
        raise NotImplementedError

    def replicate(self, kernel: np.ndarray, tasks: int) -> dict[str, np.ndarray]:
        """Factors of T equal kernels, whose tasks can still become different.

        Equal kernels have task rank 1, whatever the tolerance; so that a tolerance, or
        a rank, is applied to the one kernel that they are (where an int is a cap at
        any size). The task rank is that of `rank`, and T if a tolerance is given:
        latent kernels beyond the first start at zero, while their rows of the task
        matrix, cosines of increasing frequency, are orthogonal with norm `sqrt(T)`
        as always. Thus every task starts from `kernel`, and gradients reach them all.
        """
        # First, so that what is wrong with the ranks is said of those that were given.
        latents = self._latents(kernel, tasks)
        one = self._rank
        if isinstance(one, tuple):
            one = (*one[:-1], 1)
        elif isinstance(one, numbers.Integral):
            one = min(one, max(self._bounds((*kernel.shape, 1))))
        single = type(self)(one, self.tolerance, self.implementation, self.threshold)
        factors = single.decompose(kernel[..., None])
        latent, matrix, axis = self._task_axis(list(factors))
        start = factors[latent]
        if latents > math.prod(start.shape[:-1]):
            # One kernel alone, say with a single output, needs ranks too small for so
            # many latent kernels to differ. What the wider ranks add is zero at first.
            wide = self
            if not isinstance(self._rank, tuple):
                ranks = single.rank({name: f.shape for name, f in factors.items()})
                assert ranks is not None
                wide = self.with_rank(self._widened((*ranks[:-1], latents), kernel.shape))
            return wide.decompose(np.repeat(kernel[..., None], tasks, axis=-1))
        unused = [(0, 0)] * (start.ndim - 1) + [(0, latents - 1)]
        factors[latent] = np.pad(start, unused)
        angles = np.outer(np.arange(latents), np.arange(tasks) + 0.5) * np.pi / tasks
        rows = math.sqrt(2) * np.cos(angles)
        rows[0] = factors[matrix].item()
        factors[matrix] = rows if axis == 0 else rows.T
        return factors

    def _widened(self, ranks: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks for the last of them, the task rank, to be possible.

        Args:
            ranks: tuple of ints.
            shape: tuple, the shape of one task's kernel.
        """
        return ranks

    def _latents(self, kernel: np.ndarray, tasks: int) -> int:
        """The task rank that T equal kernels are to have."""
        bounds = self._bounds((*kernel.shape, tasks))
        if self._rank is None:
            return bounds[-1]
        rank = self._rank
        if isinstance(rank, numbers.Integral):
            rank = min(int(rank), max(bounds))
        return decomposition.resolve_rank(rank, bounds)[-1]

    def with_rank(self, rank: tuple[int, ...]) -> Self:
        return type(self)(rank, None, self.implementation, self.threshold)

    def get_config(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "tolerance": self.tolerance,
            "implementation": self.implementation,
            "threshold": self.threshold,
        }

    def _choice(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "tolerance": self.tolerance,
            "threshold": self.threshold,
        }
