"""The two ends of sharing: every task its own kernel, and one kernel for all."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Factors, FactorShapes, Tensor
from dmtrl_keras.kernels.parameterization import Parameterization, register
from dmtrl_keras.kernels.plan import Stage


@register
class Independent(Parameterization):
    """Every task has a kernel of its own: single-task learning (STL).

    The only variable is the stacked kernel `(*window, in, out, T)`. In the terms of
    DMTRL the task matrix is the identity.
    """

    name = "independent"
    is_stacked_kernel = True

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": kernel}

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        kernel = factors["kernel"]
        shape = kernel.shape[:-1]
        # Transposing a matrix is several times faster than moving an axis.
        kernel = ops.transpose(ops.reshape(kernel, (-1, tasks)))
        return ops.reshape(kernel, (tasks, *shape))

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        return ops.eye(tasks)


@register
class Hard(Parameterization):
    """One kernel for all tasks: hard sharing, the shared layers of UD-MTL.

    The only variable has shape `(*window, in, out, 1)`; a stacked kernel is averaged
    over its tasks to start it. The task matrix is one row of ones. The output
    still has one group for each task: where the input is the same for all tasks
    too, an ordinary Keras layer before the tasks split does the same for less.
    """

    name = "hard"
    is_of_all = True

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": np.mean(kernel, axis=-1, keepdims=True)}

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        kernel = ops.squeeze(factors["kernel"], axis=-1)
        return ops.broadcast_to(kernel, (tasks, *kernel.shape))

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        return ops.ones((1, tasks))

    def contractions(self, shapes: FactorShapes) -> Sequence[Sequence[Stage]]:
        *_, inputs, outputs, _ = shapes["kernel"]
        return [
            [
                Stage(
                    "common",
                    inputs,
                    outputs,
                    lambda factors: ops.squeeze(factors["kernel"], axis=-1),
                    spatial=True,
                )
            ]
        ]
