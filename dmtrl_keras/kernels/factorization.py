"""What became of a stacked kernel that was to be replaced by factors."""

import dataclasses
from typing import Any, Self


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
