"""Variables that layers derive from their weights, beside what they train."""

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
