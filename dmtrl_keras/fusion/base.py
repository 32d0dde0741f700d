"""Layers through which tasks see each other's features: Cross-Stitch and NDDR.

Both are baselines of MTAL (Feng & Chen 2021, section 4.2), and work on the grouped layout
between any two layers.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dmtrl_keras.conversion.rules import Rule, register_rule
from dmtrl_keras.ground.types import DataFormat, Shape, Tasks, Tensor
from dmtrl_keras.ground.validation import check_number, name_of
from dmtrl_keras.tasks.layout import LayoutLayer, on_channels_last


class _Fusion(Rule):
    """What `multitask`, `single_task` and the summary do with these layers."""

    has_weights = True
    sharing = "features"
    of_independent_tasks = False

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        return "it mixes the features of several tasks already"

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        raise ValueError("it mixes the features of the tasks")


class FusionLayer(LayoutLayer):
    """Base of the layers that mix the features of T tasks (not for direct use).

    A subclass has `_mixed(x, training)`, on channels-last activations. To convert models
    that have it, nothing more is to be registered.

    Args:
        tasks: positive int T, or the list of task names.
        own: float in [0, 1]: at the start a task's features are `own` times its own plus
            `(1 - own) / (T - 1)` times those of each other task; 1: its own alone.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `trainable`, `dtype`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_rule(cls, rule=_Fusion())

    def __init__(
        self,
        tasks: Tasks,
        own: float = 0.9,
        data_format: DataFormat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, data_format, **kwargs)
        self.own = check_number("own", own, name_of(self), 1, closed=True)

    def _start(self) -> np.ndarray:
        """The start weights of the tasks, an array `(T, T)`, rows summing to 1."""
        tasks = self.tasks
        if tasks == 1:
            return np.ones((1, 1))
        start = np.full((tasks, tasks), (1 - self.own) / (tasks - 1))
        np.fill_diagonal(start, self.own)
        return start

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return on_channels_last(self, inputs, lambda x: self._mixed(x, training))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        self._channels(input_shape)
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "own": self.own}
