"""What `multitask` and `single_task` do with fusion units."""

from collections.abc import Sequence

import keras

from dmtrl_keras.conversion.rules import Rule, register_rule
from dmtrl_keras.fusion.cross_stitch import CrossStitch
from dmtrl_keras.fusion.nddr import NDDR
from dmtrl_keras.ground.types import Shape


class Fusion(Rule):
    """Layers through which tasks see each other's features."""

    has_weights = True
    sharing = "features"
    of_independent_tasks = False

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        return "it mixes the features of several tasks already"

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        raise ValueError("it mixes the features of the tasks")


register_rule(CrossStitch, NDDR, rule=Fusion())
