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
    is_plain,
    share_dropout,
)
from dmtrl_keras.ground.types import Tensor

# Up to so many entries of a kernel one batched product is faster than a loop on a CPU.
SMALL = 16384


class Projection:
    """What stands for the `EinsumDense` of one task in the layer of all.

    Args:
        dense: the `EinsumDense`.
        tasks: int, T.
    """

    def __init__(self, dense: Any, tasks: int) -> None:
        self._tasks = tasks
        self._dense = dense
        self._one = dense.equation
        inputs, rest = dense.equation.split(",")
        kernel, outputs = rest.split("->")
        # A letter that the equation lacks stands for the tasks.
        task = next(c for c in string.ascii_letters if c not in dense.equation)
        self._all = f"{task}{inputs},{task}{kernel}->{task}{outputs}"
        self._kernel: Any = None
        self._bias: Any = None

    def take(self, values: Mapping[int, Tensor]) -> None:
        """Take the kernels and biases for the next call, see `AttentionOfAll`."""
        dense = self._dense
        self._kernel = values[id(dense.kernel)]
        self._bias = None if dense.bias is None else values[id(dense.bias)]

    def __call__(self, x: Tensor) -> Tensor:
        """`(T * batch, ...)`, by each task's own kernel."""
        kernel, bias = self._kernel, self._bias
        if math.prod(kernel.shape[1:]) <= SMALL:
            apart = ops.reshape(x, (self._tasks, -1, *x.shape[1:]))
            y = ops.einsum(self._all, apart, kernel)
        else:
            parts = zip(ops.split(x, self._tasks, axis=0), ops.unstack(kernel, axis=0))
            y = ops.stack([ops.einsum(self._one, own, k) for own, k in parts])
        if bias is not None:
            between = [1] * (len(y.shape) - len(bias.shape))
            y = y + ops.reshape(bias, (self._tasks, *between, *bias.shape[1:]))
        y = ops.reshape(y, (-1, *tuple(ops.shape(y))[2:]))
        activation = self._dense.activation
        return y if activation is None else activation(y)


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
            projection = Projection(dense, tasks)
            setattr(self._layer, name, projection)
            self._projections.append(projection)

    @staticmethod
    def fits(layer: keras.layers.Layer) -> bool:
        """Whether a layer is one of Keras's own, whose parts are known."""
        return type(layer) in (kl.MultiHeadAttention, kl.GroupQueryAttention) and is_plain(
            layer
        )

    def __call__(
        self,
        values: Mapping[int, Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The outputs of all tasks, `(T * batch, ...)`.

        Args:
            values: dict from the id of a variable of the layer to the tensor of all tasks,
                `(T, ...)`.
            args: arguments of the call, with the examples of all tasks.
            kwargs: likewise.
        """
        for projection in self._projections:
            projection.take(values)
        return self._layer(*args, **kwargs)
