"""Recurrent layers of all tasks in one loop over time: the fast way to run their copies."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import layers as kl
from keras import ops

from dmtrl_keras.ground.copying import copy_of
from dmtrl_keras.ground.keras_private import MASK, attach, attached
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.tasks.attention import SMALL


def _product(x: Tensor, kernels: Tensor) -> Tensor:
    """`(T * rows, in)` by each task's own matrix, to `(T * rows, out)`."""
    tasks = kernels.shape[0]
    if math.prod(kernels.shape[1:]) <= SMALL:
        apart = ops.reshape(x, (tasks, -1, x.shape[-1]))
        y = ops.matmul(apart, kernels)
        return ops.reshape(y, (-1, y.shape[-1]))
    parts = zip(ops.split(x, tasks, axis=0), ops.unstack(kernels, axis=0))
    return ops.concatenate([ops.matmul(own, k) for own, k in parts])


def _plus(x: Tensor, biases: Tensor | None) -> Tensor:
    """`(T * rows, out)` plus each task's own bias."""
    if biases is None:
        return x
    apart = ops.reshape(x, (biases.shape[0], -1, x.shape[-1]))
    return ops.reshape(apart + ops.expand_dims(biases, 1), (-1, x.shape[-1]))


class _Cell:
    """What stands for the cell of one task in the loop of all.

    It takes what the kernel and the bias make of the inputs, which does not wait for the
    time before.

    Args:
        cell: the cell of a Keras layer: of `SimpleRNN`, `LSTM` or `GRU`.
    """

    def __init__(self, cell: Any) -> None:
        self._cell = cell
        self.units = cell.units
        self.state_size = cell.state_size
        self.output_size = cell.output_size
        self.compute_dtype = cell.compute_dtype
        self._recurrent: Any = None
        self._bias: Tensor | None = None

    def prepare(self, x: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        """What is computed of the inputs before the loop.

        Args:
            x: tensor `(T * batch, time, in)`.
            values: dict from the id of a variable of the cell to the tensor of all tasks.
        """
        cell = self._cell
        self._recurrent = values[id(cell.recurrent_kernel)]
        bias = None if cell.bias is None else values[id(cell.bias)]
        self._bias = None
        if bias is not None and len(bias.shape) == 3:
            # Of a GRU that resets after the product: one for the inputs, one for the state.
            bias, self._bias = bias[:, 0], bias[:, 1]
        shape = ops.shape(x)
        flat = ops.reshape(x, (-1, x.shape[-1]))
        y = _plus(_product(flat, values[id(cell.kernel)]), bias)
        return ops.reshape(y, (-1, shape[1], y.shape[-1]))

    def get_initial_state(self, batch_size: Any = None) -> Any:
        """As of the cell itself."""
        return self._cell.get_initial_state(batch_size=batch_size)

    def __call__(self, x: Tensor, states: Sequence[Tensor]) -> Any:
        return self.call(x, states)

    def call(self, x: Tensor, states: Sequence[Tensor]) -> Any:
        """One time step of all tasks."""
        kind, cell, before = type(self._cell), self._cell, states[0]
        if kind is kl.SimpleRNNCell:
            y = cell.activation(x + _product(before, self._recurrent))
            return y, [y]
        if kind is kl.LSTMCell:
            gates = ops.split(x + _product(before, self._recurrent), 4, axis=-1)
            enter, forget, _, leave = (cell.recurrent_activation(g) for g in gates)
            carry = forget * states[1] + enter * cell.activation(gates[2])
            y = leave * cell.activation(carry)
            return y, [y, carry]
        update, reset, new = ops.split(x, 3, axis=-1)
        if cell.reset_after:
            inner = _plus(_product(before, self._recurrent), self._bias)
            of_update, of_reset, of_new = ops.split(inner, 3, axis=-1)
        else:
            gates = self._recurrent[..., : -self.units]
            last = self._recurrent[..., -self.units :]
            of_update, of_reset = ops.split(_product(before, gates), 2, axis=-1)
        update = cell.recurrent_activation(update + of_update)
        reset = cell.recurrent_activation(reset + of_reset)
        if cell.reset_after:
            new = cell.activation(new + reset * of_new)
        else:
            new = cell.activation(new + _product(reset * before, last))
        y = update * before + (1 - update) * new
        return y, [y]


class RecurrentOfAll:
    """`SimpleRNN`, `LSTM` and `GRU`, or `Bidirectional` ones, on the examples of all tasks.

    The loop over time is Keras's own, `keras.layers.RNN`, and runs once.

    Args:
        layer: a built layer of one of these classes.
        tasks: int, T.
        build: function that builds a copy of it.
    """

    # What Keras's `Bidirectional` asks of the layers in it.
    _call_has_training_arg = False
    _call_has_mask_arg = True
    states = None

    def __init__(
        self,
        layer: Any,
        tasks: int,
        build: Callable[[keras.layers.Layer], None],
    ) -> None:
        self._both: Any = None
        if isinstance(layer, kl.Bidirectional):
            self._both = copy_of(layer)
            build(self._both)
            self._ways = [
                RecurrentOfAll(way, tasks, build)
                for way in (layer.forward_layer, layer.backward_layer)
            ]
            for name, way in zip(("forward_layer", "backward_layer"), self._ways):
                object.__setattr__(self._both, name, way)
            return
        self._cell = _Cell(layer.cell)
        self._values: Mapping[int, Tensor] = {}
        self._loop = kl.RNN(
            self._cell,
            return_sequences=layer.return_sequences,
            return_state=layer.return_state,
            go_backwards=layer.go_backwards,
            unroll=layer.unroll,
            zero_output_for_mask=getattr(layer, "zero_output_for_mask", False),
            dtype=layer.dtype_policy,
        )

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Whether a layer is one of Keras's own, whose parts are known.

        Dropout, of which every step has the same, and states that stay from batch to batch
        are not. Of large recurrent kernels T loops are faster than one.
        """
        if type(layer) is kl.Bidirectional:
            ways = (layer.forward_layer, layer.backward_layer)
            inner = all(type(way) is not kl.Bidirectional and cls.fits(way) for way in ways)
            return inner and layer.activity_regularizer is None
        if type(layer) not in (kl.SimpleRNN, kl.LSTM, kl.GRU):
            return False
        dropout = layer.cell.dropout or layer.cell.recurrent_dropout
        penalty = layer.activity_regularizer or layer.cell.activity_regularizer
        large = math.prod(layer.cell.recurrent_kernel.shape) > SMALL
        return not (dropout or penalty or layer.stateful or large)

    def _give(self, values: Mapping[int, Tensor]) -> None:
        if self._both is None:
            self._values = values
        else:
            for way in self._ways:
                way._give(values)

    def __call__(
        self,
        values: Any,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> Any:
        """The outputs of all tasks, `(T * batch, ...)`.

        Args:
            values: dict from the id of a variable of the layer to the tensor of all tasks,
                `(T, ...)`. (As a part of `Bidirectional`, which has given them already: the
                inputs.)
            args: arguments of the call, with the examples of all tasks.
            kwargs: likewise.
            **given: those that `Bidirectional` gives.
        """
        if args is None:
            return self._run(values, **given)
        self._give(values)
        if self._both is not None:
            return self._both(*args, **(kwargs or {}))
        return self._run(*args, **(kwargs or {}))

    def _run(
        self,
        sequences: Tensor,
        initial_state: Any = None,
        mask: Any = None,
        training: Any = None,
    ) -> Any:
        if mask is None:
            mask = attached(sequences, MASK)
        x = self._cell.prepare(ops.cast(sequences, self._cell.compute_dtype), self._values)
        if mask is not None:
            attach(x, MASK, mask)
        return self._loop(x, initial_state=initial_state)
