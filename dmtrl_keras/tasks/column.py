"""What a task that came later has for itself in a layer of factorised kernels."""

from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.types import Constraint, Initializer, Regularizer, Shape, Tensor
from dmtrl_keras.ground.validation import from_keras, is_int, name_of, refusal


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskColumn(CheckedLayer):
    """A new task's column of a layer's task matrix S, and its bias.

    In a factorised layer a task is a column of S, `W_t = sum_k L_k S[k, t]` (DMTRL Eq. 2;
    for Tucker and TT L is composed of the other factors). So a new task takes K numbers,
    and a bias. `dmtrl_keras.add_task` makes these layers; the layer that they are for is
    called once more, `layer(features, own=column(features))`.

    Args:
        latents: int, K; 0: all tasks have the same kernel, so that there is no column.
        outputs: int, channels of the bias; 0: no bias.
        column_initializer: initializer of the column, `(K,)`. Keras's default for vectors.
        bias_initializer: initializer of the bias.
        bias_regularizer: penalty on the bias.
        bias_constraint: projection of the bias.
        **kwargs: `name`, `trainable`, `dtype`.

    Input shape:
        Any tensor; its values are not used.

    Output shape:
        A dict with `"column"`, `(K,)`, and `"bias"`, `(outputs,)`, those that there are.

    Raises:
        ValueError: on sizes that are no whole numbers from 0, or both 0.

    References:
        Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
        Approach" (ICLR 2017), sections 3 and 5.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import LAFDense, TaskColumn
    >>> layer, x = LAFDense(4, tasks=3, rank=2, shared_input=True), np.ones((5, 8))
    >>> tuple(layer(x).shape), tuple(layer(x, own=TaskColumn(2, 4)(x)).shape)
    ((5, 12), (5, 4))
    """

    _expected = "one tensor"

    def __init__(
        self,
        latents: int,
        outputs: int,
        column_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        bias_regularizer: Regularizer = None,
        bias_constraint: Constraint = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        for name, value in (("latents", latents), ("outputs", outputs)):
            if not is_int(value, 0):
                raise refusal(name, value, owner, "a whole number from 0")
        if not latents and not outputs:
            raise ValueError(
                f"{owner}: expected a column, a bias or both. Received: latents=0, "
                "outputs=0."
            )
        super().__init__(**kwargs)
        self.latents = int(latents)
        self.outputs = int(outputs)
        self.column_initializer = from_keras(
            owner, keras.initializers.get, identifier=column_initializer
        )
        self.bias_initializer = from_keras(
            owner, keras.initializers.get, identifier=bias_initializer
        )
        self.bias_regularizer = from_keras(
            owner, keras.regularizers.get, identifier=bias_regularizer
        )
        self.bias_constraint = from_keras(
            owner, keras.constraints.get, identifier=bias_constraint
        )
        self.column: Any = None
        self.bias: Any = None

    def build(self, input_shape: Shape) -> None:
        if self.latents:
            self.column = from_keras(
                name_of(self),
                self.add_weight,
                name="column",
                shape=(self.latents,),
                initializer=self.column_initializer,
            )
        if self.outputs:
            self.bias = from_keras(
                name_of(self),
                self.add_weight,
                name="bias",
                shape=(self.outputs,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.built = True

    def call(self, inputs: Tensor) -> dict[str, Tensor]:
        found = {"column": self.column, "bias": self.bias}
        return {n: ops.convert_to_tensor(v) for n, v in found.items() if v is not None}

    def compute_output_shape(self, input_shape: Shape) -> dict[str, Shape]:
        sizes = {"column": self.latents, "bias": self.outputs}
        return {name: (size,) for name, size in sizes.items() if size}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "latents": self.latents,
            "outputs": self.outputs,
            "column_initializer": keras.initializers.serialize(self.column_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
