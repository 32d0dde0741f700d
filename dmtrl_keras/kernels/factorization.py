"""What became of a stacked kernel that was replaced by factors."""

import dataclasses
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class Factorization:
    """What became of one layer's stacked kernel.

    Attributes:
        layer: str, name of the layer.
        method: str, name of the parameterization.
        shape: tuple, the stacked kernel's shape.
        rank: tuple of ints.
        parameters_before: int, entries of the stacked kernel.
        parameters_after: int, entries of the factors.
        error: float, `||W - W'||_F / ||W||_F`.
    """

    layer: str
    method: str
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    error: float

    def get_config(self) -> dict[str, Any]:
        """The attributes, as a dict that JSON takes."""
        config = dataclasses.asdict(self)
        return {**config, "shape": list(self.shape), "rank": list(self.rank)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`."""
        shape, rank = tuple(config["shape"]), tuple(config["rank"])
        return cls(**{**config, "shape": shape, "rank": rank})
