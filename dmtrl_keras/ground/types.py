"""Names of types for annotations, of what Keras and its backends leave open."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

# Of any backend, symbolic or not, a variable or a NumPy array: they have no common class.
Tensor: TypeAlias = Any

# With the batch; None where a size is open.
Shape: TypeAlias = tuple[int | None, ...]

# A name such as "float32", a `keras.DTypePolicy`, or None.
DType: TypeAlias = Any

DataFormat: TypeAlias = Literal["channels_last", "channels_first"]

# The number of tasks, or their names.
Tasks: TypeAlias = int | Sequence[str]

# What Keras makes a function of: a name, a configuration, or the function itself.
Activation: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Initializer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Regularizer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Constraint: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None

# The factors of a stacked kernel by name, with the state of the parameterization; and the
# factors' shapes.
Factors: TypeAlias = dict[str, Tensor]
FactorShapes: TypeAlias = Mapping[str, tuple[int, ...]]

PathLike: TypeAlias = str | os.PathLike[str]

# A `tf.data.Dataset` and a `tf.distribute.Strategy`: TensorFlow may be absent.
Dataset: TypeAlias = Any
Strategy: TypeAlias = Any
