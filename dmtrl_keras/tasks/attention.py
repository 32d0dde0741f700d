"""Attention of all tasks at once: the fast way to run copies of Keras's own layers."""

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import layers as kl
from keras import ops

from dmtrl_keras.ground.copying import copy_of
from dmtrl_keras.ground.keras_private import (
    ATTENTION_PROJECTIONS,
    flatten_layers,
    share_dropout,
)
from dmtrl_keras.ground.types import Tensor

# Up to so many entries of a kernel one batched product is faster than a loop on a CPU.
SMALL = 16384


class _Projection:
    """What stands for the `EinsumDense` of one task in the layer of all.

    Args:
        dense: the `EinsumDense`.
        tasks: int, T.
    """

    def __init__(self, dense: Any, tasks: int) -> None:
        self._tasks = tasks
        self._activation = dense.activation
        self._one = dense.equation
        inputs, rest = dense.equation.split(",")
        kernel, outputs = rest.split("->")
        # A letter that the equation lacks stands for the tasks.
        task = next(c for c in string.ascii_letters if c not in dense.equation)
        self._all = f"{task}{inputs},{task}{kernel}->{task}{outputs}"
        self.kernel: Sequence[Tensor] = ()
        self.bias: Sequence[Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`(T * batch, ...)`, by each task's own kernel."""
        if math.prod(self.kernel[0].shape) <= SMALL:
            apart = ops.reshape(x, (self._tasks, -1, *x.shape[1:]))
            y = ops.einsum(self._all, apart, ops.stack(self.kernel))
        else:
            parts = ops.split(x, self._tasks, axis=0)
            y = ops.stack(
                [ops.einsum(self._one, own, k) for own, k in zip(parts, self.kernel)]
            )
        if self.bias is not None:
            bias = ops.stack(self.bias)
            between = [1] * (len(y.shape) - len(bias.shape))
            y = y + ops.reshape(bias, (self._tasks, *between, *bias.shape[1:]))
        y = ops.reshape(y, (-1, *y.shape[2:]))
        return y if self._activation is None else self._activation(y)


class AttentionOfAll:
    """A Keras attention layer on the examples of all tasks.

    Only the projections are each task's own; what comes between them, which is the same
    for all, runs once.

    Args:
        layer: a built `MultiHeadAttention` or `GroupQueryAttention`.
        tasks: int, T.
        build: function that builds a copy of it.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        tasks: int,
        build: Callable[[keras.layers.Layer], None],
    ) -> None:
        self._layer = copy_of(layer)
        build(self._layer)
        share_dropout(layer, self._layer)
        self._projections = []
        for name in ATTENTION_PROJECTIONS:
            dense = getattr(layer, name, None)
            if dense is None:
                continue
            projection = _Projection(dense, tasks)
            setattr(self._layer, name, projection)
            self._projections.append((projection, dense))

    @staticmethod
    def fits(layer: keras.layers.Layer) -> bool:
        """Whether a layer is one of Keras's own, whose parts are known.

        Penalties on what the projections return are not.
        """
        known = type(layer) in (kl.MultiHeadAttention, kl.GroupQueryAttention)
        parts = (layer, *flatten_layers(layer))
        return known and all(part.activity_regularizer is None for part in parts)

    def __call__(
        self,
        values: Mapping[int, Sequence[Tensor]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The outputs of all tasks, `(T * batch, ...)`.

        Args:
            values: dict from the id of a variable of the layer to a list of T tensors.
            args: arguments of the call, with the examples of all tasks.
            kwargs: likewise.
        """
        for projection, dense in self._projections:
            projection.kernel = values[id(dense.kernel)]
            projection.bias = None if dense.bias is None else values[id(dense.bias)]
        return self._layer(*args, **kwargs)
