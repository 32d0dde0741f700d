"""Which labels are missing, and which losses can leave out single labels."""

import math
import numbers
from typing import Any, Self

import keras
from keras import ops

from dmtrl_keras.ground.keras_private import function_of
from dmtrl_keras.ground.types import Shape, Tensor

# Losses and metrics whose value is a mean over the last axis of one value for each
# label, so that a single missing label can be left out. The others, such as
# categorical crossentropy, see the last axis as one label.
_ELEMENTWISE_FUNCTIONS = {
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.hinge,
    keras.losses.squared_hinge,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.poisson,
    keras.metrics.binary_accuracy,
}
_ELEMENTWISE_METRICS = (
    keras.metrics.AUC,
    keras.metrics.Precision,
    keras.metrics.Recall,
    keras.metrics.TruePositives,
    keras.metrics.TrueNegatives,
    keras.metrics.FalsePositives,
    keras.metrics.FalseNegatives,
    keras.metrics.SensitivityAtSpecificity,
    keras.metrics.SpecificityAtSensitivity,
    keras.metrics.PrecisionAtRecall,
    keras.metrics.RecallAtPrecision,
    keras.metrics.RootMeanSquaredError,
    keras.metrics.BinaryIoU,
)


def is_elementwise(wrapped: Any) -> bool:
    """Whether a Keras loss or metric is known to take each label for itself."""
    function = function_of(wrapped)
    if isinstance(wrapped, _ELEMENTWISE_METRICS) or function in _ELEMENTWISE_FUNCTIONS:
        return True
    return bool(getattr(wrapped, "elementwise", False))


class Masked:
    """Mixin of a loss or metric that wraps another one and leaves missing labels out.

    `_wraps` is the name of the argument and attribute that holds the wrapped one.
    """

    _wraps: str
    name: str
    missing: float
    elementwise: bool | None

    def _set_missing(self, missing: float | None, elementwise: bool | None) -> None:
        # A config has None for NaN, which JSON lacks.
        missing = math.nan if missing is None else missing
        if not isinstance(missing, numbers.Real) or isinstance(missing, bool):
            raise ValueError(
                f"{type(self).__name__}: `missing` must be NaN or a number that marks a "
                f"missing label. Received: missing={missing!r}."
            )
        self.missing = float(missing)
        self.elementwise = elementwise

    def _takes_each_label(self) -> bool:
        if self.elementwise is None:
            return is_elementwise(getattr(self, self._wraps))
        return self.elementwise

    def get_config(self) -> dict[str, Any]:
        """Everything but what is special to losses or metrics."""
        wrapped = getattr(self, self._wraps)
        return {
            self._wraps: keras.saving.serialize_keras_object(wrapped),
            "missing": None if math.isnan(self.missing) else self.missing,
            "elementwise": self.elementwise,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`."""
        config = dict(config)
        if isinstance(config[cls._wraps], dict):
            wrapped = keras.saving.deserialize_keras_object(config[cls._wraps])
            config[cls._wraps] = wrapped
        return cls(**config)


def weights_for(values: Tensor, sample_weight: Tensor) -> Tensor:
    """Sample weights as a tensor of the dtype and number of axes of some values."""
    weights = ops.cast(ops.convert_to_tensor(sample_weight), values.dtype)
    while len(weights.shape) < len(values.shape):
        weights = ops.expand_dims(weights, -1)
    if len(weights.shape) > len(values.shape):
        weights = ops.squeeze(weights, axis=-1)
    return weights


def split_missing(
    y_true: Tensor, missing: float, elementwise: bool
) -> tuple[Tensor, Tensor]:
    """Labels that can be computed with, and which of them are present.

    Args:
        y_true: float tensor `(batch, ...)`.
        missing: float; NaN always counts as missing too.
        elementwise: bool; each label for itself, or the last axis as one label, which
            is missing if any of it is.

    Returns:
        `(labels, present)`: the labels with zeros where they are missing, and a bool
        tensor, without the last axis if that is one label of several entries.
    """
    absent = ops.isnan(y_true)
    if not math.isnan(missing):
        absent = ops.logical_or(absent, ops.equal(y_true, missing))
    labels = ops.where(absent, ops.zeros_like(y_true), y_true)
    if not elementwise and len(y_true.shape) > 1:
        absent = ops.any(absent, axis=-1)
    return labels, ops.logical_not(absent)


def align(y_true: Tensor, y_pred: Tensor, elementwise: bool, owner: str) -> Tensor:
    """Labels `(batch,)` for predictions `(batch, 1)` to one rank, the shapes checked.

    Args:
        y_true: tensor.
        y_pred: tensor.
        elementwise: bool; each label has a prediction of its own.
        owner: str, what to name in the error.

    Returns:
        The labels.

    Raises:
        ValueError: if labels and predictions can't belong together.
    """
    if len(y_true.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
        y_true = ops.expand_dims(y_true, -1)
    matches = same_shape(y_true.shape, y_pred.shape)
    if not elementwise:
        matches = len(y_true.shape) in (len(y_pred.shape), len(y_pred.shape) - 1)
    if not matches:
        raise ValueError(
            f"{owner}: expected labels that match predictions of shape "
            f"{tuple(y_pred.shape)}. Received: labels of shape {tuple(y_true.shape)}."
        )
    return y_true


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two shapes are equal as far as they are known."""
    return len(a) == len(b) and all(
        m == n or None in (m, n) for m, n in zip(tuple(a), tuple(b))
    )
