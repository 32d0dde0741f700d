"""Frozen kernels, and a small difference for each task that is trained."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
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
# What the names of the factors of frozen kernels that differ begin with.
_PREFIX = "base_"


@register
class LoRA(Parameterization):
    """Frozen kernels plus a difference of low rank for each task.

    `W_t = W_0 + alpha / r A_t B_t` (Hu et al. 2022, section 4.1), `A_t` of shape
    `(*window, in, r)` and `B_t` of `(r, out)`; a kernel counts as the matrix whose columns
    are its output channels. With `together` the differences of all tasks are one tensor
    that is factorised: `W_t = W_0 + D_t`, `D` of LAF, Tucker or TT (DMTRL Eq. 2, 4, 8).

    `W_0` is one kernel of all tasks. With `of`, as `enable_lora` of a layer makes it, each
    task has its own frozen one, related as `of` says: `W_t = W_0t + alpha / r A_t B_t`.

    Of a trained kernel `W_0` is that kernel. The differences start at zero: `A_t` from a
    draw of He's uniform initializer and `B_t` at zero, of factors the tasks' at zero and
    the others from such a draw. Of kernels that differ already `W_0` is their mean, and the
    differences the nearest of rank r.

    Variables: `lora_a`, `(*window, in, r, T)`, and `lora_b`, `(r, out, T)`, or the factors
    of `together`; and `base`, `(*window, in, out)`, or the factors of `of` with `base_`
    before their names, which are not trained.

    Args:
        rank: r, an int, of smaller kernels the largest that is possible; or a float in
            (0, 1], a fraction of that. None: 4, but with `together`.
        alpha: number, by which the product is scaled, `alpha / r`; None: r.
        together: factorisation of the differences of all tasks with ranks of its own, such
            as `Tucker(rank=0.1)` or `"laf"`; None: each task has its own product.
        of: how the frozen kernels of the tasks are related, such as `"independent"` or
            `Tucker(rank=0.3)`; None: they are one. Not with `together`.

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
    short_forms = ("rank",)

    def __init__(
        self,
        rank: int | float | None = None,
        alpha: float | None = None,
        together: Sharing = None,
        of: Sharing = None,
    ) -> None:
        owner = type(self).__name__
        if of is not None:
            of = parameterizations.get(of, owner)
            changing = type(of).new_state is not Parameterization.new_state
            if isinstance(of, LoRA) or changing:
                what = "kernels that can be frozen, neither LoRA nor similar ones, or None"
                raise refusal("of", of, owner, what)
            if together is not None:
                raise ValueError(
                    f"{owner}: differences `together` are of one frozen kernel. "
                    f"Received: together={together!r}, of={of!r}."
                )
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
        self.of = of

    # --- from kernels to factors ------------------------------------------------------

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        base = kernel.mean(axis=-1)
        tasks = kernel.shape[-1]
        difference = kernel - base[..., None]
        if self.of is not None or not difference.any():
            frozen = {_BASE: base} if self.of is None else self.of.decompose(kernel)
            return self.over(frozen, base.shape, tasks)
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
        frozen = {_BASE: kernel} if self.of is None else self.of.replicate(kernel, tasks)
        return self.over(frozen, kernel.shape, tasks)

    def over(
        self,
        frozen: Mapping[str, np.ndarray],
        shape: tuple[int, ...],
        tasks: int,
        a_initializer: Callable[..., Any] | None = None,
        b_initializer: Callable[..., Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """The factors of frozen kernels and of differences that start at zero.

        Args:
            frozen: dict of arrays, `base` or the factors of `of`.
            shape: tuple, the shape of one task's kernel.
            tasks: int, T.
            a_initializer: Keras initializer of `A_t`; None: He's uniform one.
            b_initializer: of `B_t`; None: zeros.
        """
        if self.of is not None:
            frozen = {f"{_PREFIX}{name}": value for name, value in frozen.items()}
        draw = a_initializer or keras.initializers.HeUniform()
        if self.together is not None:
            stacked = np.stack([_array(draw(shape)) for _ in range(tasks)], axis=-1)
            factors = self.together.decompose(stacked)
            found = self.together.task_factor(list(factors))
            assert found is not None
            factors[found[0]] = np.zeros_like(factors[found[0]])
            return {**factors, **frozen}
        other = b_initializer or keras.initializers.Zeros()
        outputs = shape[-1]
        rank = self._of((math.prod(shape[:-1]), outputs))
        starts = [draw((*shape[:-1], rank)) for _ in range(tasks)]
        others = [other((rank, outputs)) for _ in range(tasks)]
        return {
            "lora_a": np.stack([_array(one) for one in starts], axis=-1),
            "lora_b": np.stack([_array(one) for one in others], axis=-1),
            **frozen,
        }

    def is_frozen(self, name: str) -> bool:
        return name == _BASE or name.startswith(_PREFIX)

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
        if self.together is not None:
            return self.together.compose(self._inner(factors), tasks) + factors[_BASE]
        if self.of is None:
            base = factors[_BASE]
        else:
            base = self.of.compose(self._frozen(factors), tasks)
        a, b = factors["lora_a"], factors["lora_b"]
        *window, inputs, rank, _ = a.shape
        a = ops.transpose(ops.reshape(a, (-1, rank, tasks)), (2, 0, 1))
        product = ops.matmul(a, ops.transpose(b, (2, 0, 1)))
        if self.alpha is not None:
            product = product * self._scale(rank)
        return ops.reshape(product, (tasks, *window, inputs, b.shape[1])) + base

    def compose_flops(self, shapes: FactorShapes) -> int:
        if self.together is not None:
            size = math.prod(shapes[_BASE])
            return size + self.together.compose_flops(self._inner(shapes))
        *rest, rank, tasks = shapes["lora_a"]
        size = math.prod(rest) * shapes["lora_b"][1]
        base = 0 if self.of is None else self.of.compose_flops(self._frozen(shapes))
        return base + tasks * size * (2 * rank + 1)

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        if self.together is not None:
            return self.together.task_matrix(self._inner(factors), tasks)
        return ops.eye(tasks)

    @property
    def is_of_all(self) -> bool:  # type: ignore[override]
        """Whether a task that comes later has the frozen kernel of all."""
        return self.of is not None and self.of.is_of_all

    def task_factor(self, names: Sequence[str]) -> tuple[str, int] | None:
        if self.together is not None:
            return self.together.task_factor([n for n in names if not self.is_frozen(n)])
        if self.of is None:
            return None
        own = [n.removeprefix(_PREFIX) for n in names if self.is_frozen(n)]
        found = self.of.task_factor(own)
        return None if found is None else (f"{_PREFIX}{found[0]}", found[1])

    def of_column(self, factors: Factors, column: Tensor) -> Factors:
        """Of frozen kernels that differ, those of a task without a difference."""
        if self.of is None:
            return super().of_column(factors, column)
        frozen = self.of.of_column(self._frozen(factors), column)
        zeros = {n: 0 * v[..., :1] for n, v in self._inner(factors).items()}
        return {**zeros, **{f"{_PREFIX}{n}": value for n, value in frozen.items()}}

    def own_entries(
        self, shapes: FactorShapes, tasks: int, task: int
    ) -> dict[str, np.ndarray]:
        if self.together is not None:
            return self.together.own_entries(self._inner(shapes), tasks, task)
        return dict.fromkeys(("lora_a", "lora_b"), one_of(tasks, task))

    def _inner(self, factors: Any) -> Any:
        return {name: v for name, v in factors.items() if not self.is_frozen(name)}

    @staticmethod
    def _frozen(factors: Any) -> Any:
        """The factors of `of` by their own names."""
        return {
            name.removeprefix(_PREFIX): value
            for name, value in factors.items()
            if name.startswith(_PREFIX)
        }

    # --- ranks ------------------------------------------------------------------------

    def rank(self, shapes: FactorShapes) -> tuple[int, ...] | None:
        if self.together is not None:
            return self.together.rank(self._inner(shapes))
        frozen = None if self.of is None else self.of.rank(self._frozen(shapes))
        return (shapes["lora_b"][0], *(frozen or ()))

    def with_rank(self, rank: tuple[int, ...]) -> Self:
        if self.together is not None:
            return type(self)(together=self.together.with_rank(rank))
        own, *frozen = rank
        of = self.of.with_rank(tuple(frozen)) if frozen and self.of else self.of
        return type(self)(rank=own, alpha=self.alpha, of=of)

    def get_config(self) -> dict[str, Any]:
        ways = {"together": self.together, "of": self.of}
        for name, sharing in ways.items():
            if sharing is not None:
                ways[name] = keras.saving.serialize_keras_object(sharing)
        return {"rank": self._rank, "alpha": self.alpha, **ways}


def _array(tensor: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor).astype("float64")
