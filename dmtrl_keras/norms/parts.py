"""Kernels that are a sum of parts, each with a penalty of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Factors, FactorShapes, Regularizer, Tensor
from dmtrl_keras.ground.validation import from_keras, is_list, refusal
from dmtrl_keras.kernels.parameterization import Parameterization, one_of, register
from dmtrl_keras.norms.regularizers import GroupLasso, TraceNorm


@register
class Parts(Parameterization):
    """Kernels that are a sum of parts: `W = P_1 + P_2 + ...`, each with its own penalty.

    RMTL, robust multi-task learning (Chen, Zhou & Ye, KDD 2011): a part of low rank that
    the tasks share, and a part that is zero but for a few tasks, which share nothing:

    `min_{L, S} loss(L + S) + alpha |L|_* + beta sum_t |S_t|_2`,

    `Parts([TraceNorm(alpha), GroupLasso(beta, "task")])`. With
    `GroupLasso(beta, "feature")` and `GroupLasso(gamma, "entry")` it is near the dirty
    model of Jalali et al. (2010).

    Variables: `part_1`, `part_2`, ..., each of the shape of the stacked kernel. The first
    starts from the kernel, the others from zeros.

    Args:
        regularizers: list of Keras regularizers, one for each part, such as those of
            `dmtrl_keras.regularizers`; None: RMTL's two, with strengths of 1e-3.

    Raises:
        ValueError: on malformed arguments.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskDense
    >>> from dmtrl_keras.parameterizations import Parts
    >>> from dmtrl_keras.regularizers import GroupLasso, TraceNorm
    >>> sharing = Parts([TraceNorm(0.01), GroupLasso(0.01, "task")])
    >>> layer = TaskDense(4, tasks=3, sharing=sharing)
    >>> tuple(layer(np.zeros((2, 12), "float32")).shape), sorted(layer.factors)
    ((2, 12), ['part_1', 'part_2'])
    """

    name = "parts"

    def __init__(self, regularizers: Sequence[Regularizer] | None = None) -> None:
        owner = type(self).__name__
        if regularizers is None:
            regularizers = [TraceNorm(), GroupLasso(groups="task")]
        if not is_list(regularizers) or not regularizers:
            raise refusal("regularizers", regularizers, owner, "a list of regularizers")
        self._penalties: list[Any] = [
            from_keras(owner, keras.regularizers.get, identifier=each)
            for each in regularizers
        ]
        if None in self._penalties:
            what = "a list of regularizers, none of them None"
            raise refusal("regularizers", regularizers, owner, what)

    @property
    def factor_regularizers(self) -> Mapping[str, Callable[..., Any]]:
        return dict(zip(self._names, self._penalties))

    @property
    def _names(self) -> list[str]:
        return [f"part_{number}" for number in range(1, len(self._penalties) + 1)]

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        first, *others = self._names
        return {first: kernel, **{name: np.zeros_like(kernel) for name in others}}

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        kernel = sum(factors[name] for name in self._names)
        shape = kernel.shape[:-1]
        kernel = ops.transpose(ops.reshape(kernel, (-1, tasks)))
        return ops.reshape(kernel, (tasks, *shape))

    def compose_flops(self, shapes: FactorShapes) -> int:
        return (len(shapes) - 1) * int(np.prod(next(iter(shapes.values()))))

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        return ops.eye(tasks)

    def own_entries(
        self, shapes: FactorShapes, tasks: int, task: int
    ) -> dict[str, np.ndarray]:
        return dict.fromkeys(self._names, one_of(tasks, task))

    def get_config(self) -> dict[str, Any]:
        serialized = [keras.regularizers.serialize(each) for each in self._penalties]
        return {"regularizers": serialized}
