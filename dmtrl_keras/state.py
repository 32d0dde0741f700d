"""Variables that layers derive from their weights, beside what they train."""

import keras
import numpy as np
from keras import ops


def state_weight(layer, name, value):
    """A variable of a layer that is computed from its weights, not trained.

    State derived from weights is the same on all replicas: nothing to aggregate, which is
    also what may be assigned after an `ops.cond`.

    Args:
        layer: the layer that gets it.
        name: str.
        value: NumPy array, its start; ints and bools keep their dtype, floats get that of
            the layer's variables.

    Returns:
        A `keras.Variable`.
    """
    value = np.asarray(value)
    return layer.add_weight(
        name=name,
        shape=value.shape,
        initializer=lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype),
        trainable=False,
        autocast=False,
        aggregation="none",
        dtype=value.dtype.name if value.dtype.kind in "ib" else layer.variable_dtype,
    )


class Penalty(keras.regularizers.Regularizer):
    """A function as the regularizer of a variable; Keras 3.13 takes no function there.

    Args:
        function: function of the variable's value that returns the penalty.
    """

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)
