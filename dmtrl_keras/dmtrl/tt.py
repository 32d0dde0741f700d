"""DMTRL-TT: a tensor train of cores, one for each axis (Eq. 6-8)."""

import math
from collections.abc import Sequence

import numpy as np
from keras import ops

from dmtrl_keras.dmtrl import decomposition
from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.ground.types import Factors, FactorShapes, Tensor
from dmtrl_keras.kernels.parameterization import matrix, register
from dmtrl_keras.kernels.plan import Stage, matmul_flops


@register
class TT(FactorizedParameterization):
    """`W = G1 . G2 ... GN`, neighbouring cores contracted (DMTRL Eq. 6-8).

    Variables: `core_1` `(d_1, K_1)`, `core_n` `(K_{n-1}, d_n, K_n)` and `core_N`
    `(K_{N-1}, T)`, for the axes of the stacked kernel in their order: the window, the
    input channels, the output channels, the tasks. N - 1 ranks. The task matrix
    is the last core.

    Contracting convolves once with the kernel made of the cores up to the input
    channels, the same for all tasks, to `K_{N-2}` channels, from which a pointwise
    product makes each task's output channels.

    Source: Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor
    Factorisation Approach", ICLR 2017.
    """

    name = "tt"

    _rule = decomposition.TT_RANKS

    def _task_axis(self, names: Sequence[str]) -> tuple[str, str, int]:
        return names[-2], names[-1], 0

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        cores = decomposition.tt(kernel, **self._choice())
        return {f"core_{n}": core for n, core in enumerate(cores, start=1)}

    def _widened(self, ranks: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        wider = list(ranks)
        for n in range(len(wider) - 1, 0, -1):
            wider[n - 1] = max(wider[n - 1], math.ceil(wider[n] / shape[n]))
        return tuple(wider)

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        modes = len(factors)
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        if _left_first(shapes):
            kernel = _chain(factors, 1, modes - 1)
            last = factors[f"core_{modes}"]
            kernel = ops.matmul(
                ops.transpose(last), ops.transpose(matrix(kernel, columns=1))
            )
        else:
            left = _chain(factors, 1, modes - 2)
            right = _task_heads(factors)
            kernel = ops.matmul(
                ops.reshape(left, (1, -1, left.shape[-1])),
                right,
            )
        sizes = (shapes[f"core_{n}"][-2] for n in range(1, modes))
        return ops.reshape(kernel, (tasks, *sizes))

    def compose_flops(self, shapes: FactorShapes) -> int:
        modes = len(shapes)
        left, right = _compose_flops(shapes)
        return _chain_flops(shapes, 1, modes - 2) + min(left, right)

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        return factors[f"core_{len(factors)}"]

    def rank(self, shapes: FactorShapes) -> tuple[int, ...]:
        return tuple(shapes[f"core_{n}"][-1] for n in range(1, len(shapes)))

    def contractions(self, shapes: FactorShapes) -> Sequence[Sequence[Stage]]:
        modes = len(shapes)
        heads = f"core_{modes - 1}"
        inputs = shapes[f"core_{modes - 2}"][-2]
        rank, outputs, latent = shapes[heads]
        tasks = shapes[f"core_{modes}"][-1]

        def latent_heads(factors: Factors) -> Tensor:
            kernel = ops.transpose(factors[heads], (0, 2, 1))
            return ops.reshape(kernel, (rank, latent * outputs))

        first = Stage(
            "common",
            inputs,
            rank,
            lambda factors: _chain(factors, 1, modes - 2),
            spatial=True,
            flops=_chain_flops(shapes, 1, modes - 2),
        )
        flops = matmul_flops(rank * outputs, latent, tasks)
        return [
            [first, Stage("stacked", rank, outputs, _task_heads, flops=flops)],
            [
                first,
                Stage("common", rank, latent * outputs, latent_heads),
                Stage("mix", latent, outputs, lambda f: f[f"core_{modes}"]),
            ],
        ]


def _chain(factors: Factors, first: int, last: int) -> Tensor:
    """The contraction of the cores `first` to `last`, all axes kept (Eq. 8)."""
    tensor = factors[f"core_{first}"]
    for n in range(first + 1, last + 1):
        tensor = ops.tensordot(tensor, factors[f"core_{n}"], axes=1)
    return tensor


def _chain_flops(shapes: FactorShapes, first: int, last: int) -> int:
    *sizes, _ = shapes[f"core_{first}"]
    rows, total = math.prod(sizes), 0
    for n in range(first + 1, last + 1):
        inner, size, rank = shapes[f"core_{n}"]
        total += matmul_flops(rows, inner, size * rank)
        rows *= size
    return total


def _task_heads(factors: Factors) -> Tensor:
    """The last two cores contracted, `(T, K_{N-2}, d_{N-1})`."""
    heads, last = (factors[f"core_{len(factors) - back}"] for back in (1, 0))
    rank, size, latent = heads.shape
    kernel = ops.matmul(
        ops.transpose(last), ops.transpose(ops.reshape(heads, (rank * size, latent)))
    )
    return ops.reshape(kernel, (last.shape[-1], rank, size))


def _compose_flops(shapes: FactorShapes) -> tuple[int, int]:
    """Operations after the chain to the input channels: core N-1 first, or N."""
    modes = len(shapes)
    rows = math.prod(shapes[f"core_{n}"][-2] for n in range(1, modes - 1))
    rank, size, latent = shapes[f"core_{modes - 1}"]
    tasks = shapes[f"core_{modes}"][-1]
    left = matmul_flops(rows, rank, size * latent) + matmul_flops(
        rows * size, latent, tasks
    )
    right = matmul_flops(rank * size, latent, tasks) + matmul_flops(
        rows, rank, size * tasks
    )
    return left, right


def _left_first(shapes: FactorShapes) -> bool:
    left, right = _compose_flops(shapes)
    return left < right
