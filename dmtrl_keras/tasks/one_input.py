"""Embeddings and products of all tasks at once.

The fast way to run copies of Keras's own layers of one input.
"""

import math
from collections.abc import Mapping
from typing import Any

import keras
from keras import layers as kl
from keras import ops

from dmtrl_keras.ground.keras_private import is_plain
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.tasks.attention import SMALL, Projection


class OneInputOfAll:
    """One Keras layer of one input on the examples of all tasks (not for direct use).

    Args:
        layer: the built layer.
        tasks: int, T.
    """

    def __init__(self, layer: Any, tasks: int) -> None:
        self._layer, self._tasks = layer, tasks

    @classmethod
    def fits(cls, layer: Any, shared: bool) -> bool:
        """Whether a layer is one of Keras's own, and is faster in this way.

        Args:
            layer: a Keras layer.
            shared: bool, whether all tasks have the same input.
        """
        raise NotImplementedError

    def __call__(self, values: Mapping[int, Tensor], x: Tensor, shared: bool) -> Tensor:
        """The outputs of all tasks, `(T * batch, ...)`.

        Args:
            values: dict from the id of a variable of the layer to the tensor of all tasks,
                `(T, ...)`.
            x: the input, `(batch, ...)` if it is shared, else `(T * batch, ...)`.
            shared: bool.
        """
        raise NotImplementedError


class EmbeddingOfAll(OneInputOfAll):
    """`Embedding`: one look-up in the tables of all tasks, one under the other."""

    @classmethod
    def fits(cls, layer: Any, shared: bool) -> bool:
        return type(layer) is kl.Embedding and is_plain(layer)

    def __call__(self, values: Mapping[int, Tensor], x: Tensor, shared: bool) -> Tensor:
        tables = values[id(self._layer.embeddings)]
        _, entries, size = tables.shape
        if keras.backend.standardize_dtype(x.dtype) not in ("int32", "int64"):
            x = ops.cast(x, "int32")
        first = ops.arange(self._tasks, dtype=x.dtype) * entries
        first = ops.reshape(first, (self._tasks, *[1] * len(x.shape)))
        rest = tuple(ops.shape(x))[1:]
        if shared:
            x = ops.expand_dims(x, 0)
        else:
            x = ops.reshape(x, (self._tasks, -1, *rest))
        rows = ops.reshape(x + first, (-1, *rest))
        found = ops.take(ops.reshape(tables, (-1, size)), rows, axis=0)
        return ops.cast(found, self._layer.compute_dtype)


class EinsumDenseOfAll(OneInputOfAll):
    """`EinsumDense`: one batched product of all tasks, where each has its own input."""

    def __init__(self, layer: Any, tasks: int) -> None:
        super().__init__(layer, tasks)
        self._projection = Projection(layer, tasks)

    @classmethod
    def fits(cls, layer: Any, shared: bool) -> bool:
        # Of an input in common, and of large kernels, it is no faster than T products.
        known = type(layer) is kl.EinsumDense and is_plain(layer)
        return known and not shared and math.prod(layer.kernel.shape) <= SMALL

    def __call__(self, values: Mapping[int, Tensor], x: Tensor, shared: bool) -> Tensor:
        self._projection.take(values)
        return self._projection(ops.cast(x, self._layer.compute_dtype))
