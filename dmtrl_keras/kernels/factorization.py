"""What became of a stacked kernel that was to be replaced by factors."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import keras
import numpy as np

from dmtrl_keras.ground.linalg import scaled
from dmtrl_keras.kernels.parameterization import Parameterization


@dataclasses.dataclass(frozen=True)
class Factorization:
    """What became of one layer's stacked kernel.

    Attributes:
        layer: str, name of the layer.
        method: str, name of the parameterization that the layer has.
        shape: tuple, the stacked kernel's shape.
        rank: tuple of ints, `()` of a layer without factors.
        parameters_before: int, entries of the stacked kernel.
        parameters_after: int, entries of what the layer has instead.
        error: float, `||W - W'||_F / ||W||_F`.
        declined: int, the entries that factors would have had, of a layer that kept its
            kernels since those are fewer (`factorize`). None: the layer has factors.
    """

    layer: str
    method: str
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    error: float
    # Files of earlier versions lack it.
    declined: int | None = None

    def get_config(self) -> dict[str, Any]:
        """The attributes, as a dict that JSON takes."""
        config = dataclasses.asdict(self)
        return {**config, "shape": list(self.shape), "rank": list(self.rank)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`."""
        shape, rank = tuple(config["shape"]), tuple(config["rank"])
        return cls(**{**config, "shape": shape, "rank": rank})


def described(
    sharing: Parameterization, kernel: np.ndarray, factors: Mapping[str, np.ndarray]
) -> tuple[Parameterization, Factorization | None]:
    """A parameterization with the ranks that its factors have, and what they stand for.

    Args:
        sharing: the parameterization that made the factors.
        kernel: float64 array, the stacked kernel that they stand for.
        factors: dict of arrays.

    Returns:
        `(sharing, report)`; without ranks what was given, and None. The report's `layer`
        is empty.
    """
    rank = sharing.rank({name: value.shape for name, value in factors.items()})
    if rank is None:
        return sharing, None
    sharing = sharing.with_rank(rank)
    tensors = {n: keras.ops.convert_to_tensor(v) for n, v in factors.items()}
    composed = keras.ops.convert_to_numpy(sharing.compose(tensors, kernel.shape[-1]))
    kernel, exponent = scaled(kernel)
    composed = np.ldexp(composed.astype("float64"), -exponent)
    norm = np.linalg.norm(kernel)
    error = np.linalg.norm(np.moveaxis(composed, 0, -1) - kernel)
    report = Factorization(
        layer="",
        method=sharing.name,
        shape=tuple(kernel.shape),
        rank=tuple(rank),
        parameters_before=int(kernel.size),
        parameters_after=sum(value.size for value in factors.values()),
        error=float(error / norm) if norm else 0.0,
    )
    return sharing, report
