"""One frozen kernel of all tasks, and a small difference for each that is trained."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Factors, FactorShapes, Tensor
from dmtrl_keras.ground.validation import check_number, is_int, refusal
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.parameterization import (
    Parameterization,
    Sharing,
    one_of,
    register,
)

_BASE = "base"


@register
class LoRA(Parameterization):
    """A frozen kernel of all tasks plus a difference of low rank for each.

    `W_t = W_0 + alpha / r A_t B_t` (Hu et al. 2022, section 4.1), `A_t` of shape
    `(*window, in, r)` and `B_t` of `(r, out)`; a kernel counts as the matrix whose columns
    are its output channels. With `together` the differences of all tasks are one tensor
    that is factorised: `W_t = W_0 + D_t`, `D` of LAF, Tucker or TT (DMTRL Eq. 2, 4, 8).

    Of a trained kernel `W_0` is that kernel. The differences start at zero: `A_t` from a
    draw of He's uniform initializer and `B_t` at zero, of factors the tasks' at zero and
    the others from such a draw. Of kernels that differ already `W_0` is their mean, and the
    differences the nearest of rank r.

    Variables: `lora_a`, `(*window, in, r, T)`, and `lora_b`, `(r, out, T)`, or the factors
    of `together`; and `base`, `(*window, in, out)`, which is not trained.

    Args:
        rank: r, an int, of smaller kernels the largest that is possible; or a float in
            (0, 1], a fraction of that. None: 4, but with `together`.
        alpha: number, by which the product is scaled, `alpha / r`; None: r.
        together: factorisation of the differences of all tasks with ranks of its own, such
            as `Tucker(rank=0.1)` or `"laf"`; None: each task has its own product.

    Raises:
        ValueError: on malformed arguments.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).

    Example:

    >>> import keras
    >>> from dmtrl_keras import multitask
    >>> from dmtrl_keras.parameterizations import LoRA
    >>> trained = keras.Sequential(
    ...     [keras.Input((64,)), keras.layers.Dense(64, "relu", name="fc")]
    ... )
    >>> model = multitask(trained, ["age", "mood"], LoRA(2), verbose=False)
    >>> fc = model.get_layer("fc")
    >>> [tuple(w.shape) for w in fc.trainable_weights], tuple(fc.factors["base"].shape)
    ([(64, 2, 2), (2, 64, 2), (64, 2)], (64, 64))
    """

    name = "lora"
    frozen_factors = (_BASE,)
    short_forms = ("rank",)

    def __init__(
        self,
        rank: int | float | None = None,
        alpha: float | None = None,
        together: Sharing = None,
    ) -> None:
        owner = type(self).__name__
        if together is not None:
            together = parameterizations.get(together, owner)
            if not hasattr(together, "tolerance"):
                raise refusal("together", together, owner, "a factorisation, or None")
            if rank is not None or alpha is not None:
                raise ValueError(
                    f"{owner}: `together` has ranks of its own. "
                    f"Received: rank={rank!r}, alpha={alpha!r}, together={together!r}."
                )
        elif rank is None:
            rank = 4
        whole = is_int(rank, 1)
        fraction = isinstance(rank, numbers.Real) and not isinstance(
            rank, (bool, numbers.Integral)
        )
        fraction = fraction and 0 < float(rank or 0) <= 1
        if rank is not None and not (whole or fraction):
            what = "a positive int, or a float in (0, 1]"
            raise refusal("rank", rank, owner, what)
        if alpha is not None:
            alpha = check_number("alpha", alpha, owner)
        self._rank: Any = rank
        self.alpha = alpha
        self.together = together

    # --- from kernels to factors ------------------------------------------------------

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        base = kernel.mean(axis=-1)
        difference = kernel - base[..., None]
        tasks = kernel.shape[-1]
        if not difference.any():
            return self._start(base, tasks)
        if self.together is not None:
            return {**self.together.decompose(difference), _BASE: base}
        matrices = np.moveaxis(difference.reshape(-1, *kernel.shape[-2:]), -1, 0)
        u, s, v = np.linalg.svd(matrices, full_matrices=False)
        rank = self._of(matrices.shape[1:])
        root = np.sqrt(s[:, :rank] / self._scale(rank))
        a, b = u[..., :rank] * root[:, None], root[..., None] * v[:, :rank]
        a = np.moveaxis(a, 0, -1).reshape(*kernel.shape[:-2], rank, tasks)
        return {"lora_a": a, "lora_b": np.moveaxis(b, 0, -1), _BASE: base}

    def replicate(self, kernel: np.ndarray, tasks: int) -> dict[str, np.ndarray]:
        return self._start(kernel, tasks)

    def _start(self, base: np.ndarray, tasks: int) -> dict[str, np.ndarray]:
        """Factors of T kernels that are equal."""
        draw = keras.initializers.HeUniform()
        if self.together is not None:
            stacked = np.stack([_array(draw(base.shape)) for _ in range(tasks)], axis=-1)
            factors = self.together.decompose(stacked)
            found = self.together.task_factor(list(factors))
            assert found is not None
            factors[found[0]] = np.zeros_like(factors[found[0]])
            return {**factors, _BASE: base}
        outputs = base.shape[-1]
        rank = self._of((math.prod(base.shape[:-1]), outputs))
        shape = (*base.shape[:-1], rank)
        a = np.stack([_array(draw(shape)) for _ in range(tasks)], axis=-1)
        return {"lora_a": a, "lora_b": np.zeros((rank, outputs, tasks)), _BASE: base}

    def _of(self, shape: tuple[int, ...]) -> int:
        """The rank of a matrix's difference."""
        most = min(shape)
        rank: Any = self._rank
        if is_int(rank, 1):
            return min(int(rank), most)
        return max(1, round(rank * most))

    def _scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank

    # --- from factors to kernels ------------------------------------------------------

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        base = factors[_BASE]
        if self.together is not None:
            return self.together.compose(self._inner(factors), tasks) + base
        a, b = factors["lora_a"], factors["lora_b"]
        rank = a.shape[-2]
        a = ops.transpose(ops.reshape(a, (-1, rank, tasks)), (2, 0, 1))
        product = ops.matmul(a, ops.transpose(b, (2, 0, 1)))
        if self.alpha is not None:
            product = product * self._scale(rank)
        return ops.reshape(product, (tasks, *base.shape)) + base

    def compose_flops(self, shapes: FactorShapes) -> int:
        size = math.prod(shapes[_BASE])
        if self.together is not None:
            return size + self.together.compose_flops(self._inner(shapes))
        *_, rank, tasks = shapes["lora_a"]
        return tasks * size * (2 * rank + 1)

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        if self.together is not None:
            return self.together.task_matrix(self._inner(factors), tasks)
        return ops.eye(tasks)

    def task_factor(self, names: Sequence[str]) -> tuple[str, int] | None:
        if self.together is None:
            return None
        return self.together.task_factor([name for name in names if name != _BASE])

    def own_entries(
        self, shapes: FactorShapes, tasks: int, task: int
    ) -> dict[str, np.ndarray]:
        if self.together is not None:
            return self.together.own_entries(self._inner(shapes), tasks, task)
        return dict.fromkeys(("lora_a", "lora_b"), one_of(tasks, task))

    @staticmethod
    def _inner(factors: Any) -> Any:
        return {name: value for name, value in factors.items() if name != _BASE}

    # --- ranks ------------------------------------------------------------------------

    def rank(self, shapes: FactorShapes) -> tuple[int, ...] | None:
        if self.together is not None:
            return self.together.rank(self._inner(shapes))
        return (shapes["lora_b"][0],)

    def with_rank(self, rank: tuple[int, ...]) -> Self:
        if self.together is not None:
            return type(self)(together=self.together.with_rank(rank))
        return type(self)(rank=rank[0], alpha=self.alpha)

    def get_config(self) -> dict[str, Any]:
        together = self.together
        if together is not None:
            together = keras.saving.serialize_keras_object(together)
        return {"rank": self._rank, "alpha": self.alpha, "together": together}


def _array(tensor: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor).astype("float64")
