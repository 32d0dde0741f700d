"""DMTRL-LAF: kernels as combinations of latent kernels (Eq. 2)."""

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
class LAF(FactorizedParameterization):
    """Last axis flattening: `W[..., t] = sum_k L[..., k] S[k, t]` (DMTRL Eq. 2).

    Variables: `latent`, the K latent kernels `(*window, in, out, K)`, and
    `task_matrix`, S, `(K, T)`. One rank, K. Tasks share kernels; the input and
    output channels of one task share nothing.

    Contracting convolves with the K latent kernels and mixes their outputs. It
    pays where all tasks have the same input and K < T.

    Source: Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor
    Factorisation Approach", ICLR 2017.
    """

    name = "laf"

    _rule = decomposition.LAF_RANKS

    def _task_axis(self, names: Sequence[str]) -> tuple[str, str, int]:
        return "latent", "task_matrix", 0

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        latent, task_matrix = decomposition.laf(kernel, **self._choice())
        return {"latent": latent, "task_matrix": task_matrix}

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        latent, task_matrix = factors["latent"], factors["task_matrix"]
        kernel = ops.matmul(
            ops.transpose(task_matrix), ops.transpose(matrix(latent, columns=1))
        )
        return ops.reshape(kernel, (tasks, *latent.shape[:-1]))

    def compose_flops(self, shapes: FactorShapes) -> int:
        return matmul_flops(math.prod(shapes["latent"]), shapes["task_matrix"][1])

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        return factors["task_matrix"]

    def rank(self, shapes: FactorShapes) -> tuple[int, ...]:
        return (shapes["task_matrix"][0],)

    def contractions(self, shapes: FactorShapes) -> Sequence[Sequence[Stage]]:
        *window, inputs, outputs, latent = shapes["latent"]

        def latent_kernels(factors: Factors) -> Tensor:
            kernel = factors["latent"]
            axes = len(kernel.shape)
            kernel = ops.transpose(kernel, (*range(axes - 2), axes - 1, axes - 2))
            return ops.reshape(kernel, (*window, inputs, latent * outputs))

        return [
            [
                Stage("common", inputs, latent * outputs, latent_kernels, spatial=True),
                Stage("mix", latent, outputs, lambda factors: factors["task_matrix"]),
            ]
        ]
