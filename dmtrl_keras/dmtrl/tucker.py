"""DMTRL-Tucker: a core tensor and one factor for each mode (Eq. 3-5)."""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from keras import ops

from dmtrl_keras.dmtrl import decomposition
from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.ground.types import Factors, FactorShapes, Tensor
from dmtrl_keras.kernels.parameterization import matrix, register
from dmtrl_keras.kernels.plan import Stage, matmul_flops


@register
class Tucker(FactorizedParameterization):
    """`W = C x_1 U1 x_2 U2 ... x_N UN` (DMTRL Eq. 3, 4).

    Variables: `core`, `(K_1, ..., K_N)`, and `factor_1` to `factor_N`,
    `(d_n, K_n)`, for the axes of the stacked kernel in their order: the window, the
    input channels, the output channels, the tasks. N ranks. The task matrix is
    the transpose of the last factor.

    Contracting takes the input channels through their factor, convolves with the
    small kernels that the core makes, and goes through the factor of the output
    channels; each of these, and the mixing of the tasks, is done on the
    activations or on the kernel, whichever needs fewer operations.

    Source: Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor
    Factorisation Approach", ICLR 2017.
    """

    name = "tucker"

    _rule = decomposition.TUCKER_RANKS

    def _task_axis(self, names: Sequence[str]) -> tuple[str, str, int]:
        return "core", names[-1], 1

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        core, factors = decomposition.tucker(kernel, **self._choice())
        named = {f"factor_{n}": factor for n, factor in enumerate(factors, start=1)}
        return {"core": core, **named}

    def _widened(self, ranks: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        *wider, latents = ranks
        for mode in sorted(range(len(wider)), key=lambda n: shape[n], reverse=True):
            others = math.prod(wider) // wider[mode]
            wanted = math.ceil(latents / others)
            wider[mode] = min(shape[mode], max(wider[mode], wanted))
        return (*wider, latents)

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        modes = len(factors) - 1
        return _mode_products(factors, (modes, *range(1, modes)))

    def compose_flops(self, shapes: FactorShapes) -> int:
        return _mode_products_flops(shapes, range(1, len(shapes)))

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        return ops.transpose(factors[f"factor_{len(factors) - 1}"])

    def rank(self, shapes: FactorShapes) -> tuple[int, ...]:
        return tuple(shapes["core"])

    def contractions(self, shapes: FactorShapes) -> Sequence[Sequence[Stage]]:
        modes = len(shapes) - 1
        applied = (modes - 2, modes - 1, modes)
        return [
            _plan(shapes, frozenset(outside))
            for size in (3, 2, 1)
            for outside in itertools.combinations(applied, size)
        ]


def _plan(shapes: FactorShapes, outside: Collection[int]) -> list[Stage]:
    """One order of work.

    Args:
        shapes: dict of the factors' shapes.
        outside: the modes, of the last three, whose factors are applied to activations; the
            others go into the kernels.
    """
    modes = len(shapes) - 1
    into, out_of, task = modes - 2, modes - 1, modes
    inside = [mode for mode in range(1, modes + 1) if mode not in outside]
    ranks = shapes["core"]

    def size(mode: int) -> int:
        """Of an axis of the kernels: the rank where its factor is applied outside."""
        return ranks[mode - 1] if mode in outside else shapes[f"factor_{mode}"][0]

    window = tuple(size(mode) for mode in range(1, into))
    inputs, outputs, latent = size(into), size(out_of), ranks[-1]
    flops = _mode_products_flops(shapes, inside)

    def task_kernels(factors: Factors) -> Tensor:
        return _mode_products(factors, (modes, *range(1, modes)), inside)

    def latent_kernels(factors: Factors) -> Tensor:
        order = (*range(1, modes - 1), modes, modes - 1)
        kernel = _mode_products(factors, order, inside)
        return ops.reshape(kernel, (*window, inputs, latent * outputs))

    plan = []
    if into in outside:
        rows = shapes[f"factor_{into}"][0]
        plan.append(Stage("common", rows, inputs, lambda f: f[f"factor_{into}"]))
    if task in outside:
        plan += [
            Stage("common", inputs, latent * outputs, latent_kernels, True, flops),
            Stage("mix", latent, outputs, lambda f: ops.transpose(f[f"factor_{task}"])),
        ]
    else:
        plan.append(Stage("stacked", inputs, outputs, task_kernels, True, flops))
    if out_of in outside:
        rows = shapes[f"factor_{out_of}"][0]
        plan.append(
            Stage("common", outputs, rows, lambda f: ops.transpose(f[f"factor_{out_of}"]))
        )
    return plan


def _growth(shapes: FactorShapes, modes: Iterable[int]) -> list[int]:
    """Modes so ordered that the products that grow the tensor least come first."""

    def growth(mode: int) -> float:
        rows, columns = shapes[f"factor_{mode}"]
        return rows / columns

    return sorted(modes, key=growth)


def _mode_products(
    factors: Factors, order: tuple[int, ...], modes: Iterable[int] | None = None
) -> Tensor:
    """The core multiplied by the factors of some modes (1-based), Eq. 4.

    `order` is the order of the result's axes. It is settled on the core, which is
    small; the products then move no axes.
    """
    modes = order if modes is None else modes
    shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
    core, products = factors["core"], _growth(shapes, modes)
    last = len(order)
    if products[:1] == [last] and order == (last, *range(1, last)):
        # A product with the transposed matrix moves the task axis to the front
        # for nothing; a core of full task rank is nearly as large as the kernel.
        tensor = ops.matmul(factors[f"factor_{last}"], ops.transpose(matrix(core, 1)))
        tensor = ops.reshape(tensor, (-1, *core.shape[:-1]))
        products = products[1:]
    else:
        tensor = ops.transpose(core, [mode - 1 for mode in order])
    for mode in products:
        factor, shape = factors[f"factor_{mode}"], list(tensor.shape)
        axis = order.index(mode)
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        if after == 1:
            tensor = ops.matmul(
                ops.reshape(tensor, (before, shape[axis])), ops.transpose(factor)
            )
        elif before == 1:
            tensor = ops.matmul(factor, ops.reshape(tensor, (shape[axis], after)))
        else:
            tensor = ops.matmul(factor, ops.reshape(tensor, (before, shape[axis], after)))
        shape[axis] = factor.shape[0]
        tensor = ops.reshape(tensor, shape)
    return tensor


def _mode_products_flops(shapes: FactorShapes, modes: Iterable[int]) -> int:
    size, total = math.prod(shapes["core"]), 0
    for mode in _growth(shapes, modes):
        rows, columns = shapes[f"factor_{mode}"]
        total += matmul_flops(size, rows)
        size = size // columns * rows
    return total
