"""Which labels are missing, and which losses can leave out single labels."""

import dataclasses
import math
import numbers
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.backend import checked
from dmtrl_keras.ground.keras_private import function_of
from dmtrl_keras.ground.types import Shape, Tensor
from dmtrl_keras.ground.validation import name_of

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
# Metrics that count right and wrong answers at thresholds.
CONFUSION_METRICS = (
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
)
# Metrics that take weights of the labels' shape, and one value for each.
ELEMENTWISE_METRICS = (
    *CONFUSION_METRICS,
    keras.metrics.RootMeanSquaredError,
    keras.metrics.R2Score,
)


def is_elementwise(wrapped: Any) -> bool:
    """Whether a Keras loss or metric is known to take each label for itself."""
    if isinstance(wrapped, keras.metrics.IoU):
        return wrapped.sparse_y_true and wrapped.sparse_y_pred
    if isinstance(wrapped, keras.metrics.FBetaScore):
        # Without a threshold the greatest output is the prediction of a whole row.
        return wrapped.threshold is not None
    if isinstance(wrapped, ELEMENTWISE_METRICS):
        # As are the k greatest.
        return getattr(wrapped, "top_k", None) is None
    if function_of(wrapped) in _ELEMENTWISE_FUNCTIONS:
        return True
    return bool(getattr(wrapped, "elementwise", False))


# --- what Keras chooses by shape ------------------------------------------------------


def _is_sparse(y_true: Tensor, y_pred: Tensor) -> bool:
    """Whether labels are classes, and the predictions' last axis has a value for each."""
    rank = len(y_pred.shape)
    one = y_true.shape[-1:] == (1,) and rank and y_pred.shape[-1] != 1
    return len(y_true.shape) == rank - 1 or (len(y_true.shape) == rank and bool(one))


def _choice(y_true: Tensor, y_pred: Tensor) -> str:
    """The kind of labels that Keras chooses `"accuracy"` and `"crossentropy"` by."""
    if y_pred.shape[-1] == 1:
        return "binary"
    return "sparse_categorical" if _is_sparse(y_true, y_pred) else "categorical"


@keras.saving.register_keras_serializable("dmtrl_keras")
def accuracy(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """The accuracy that Keras means by that name for labels and outputs of such shapes."""
    return getattr(keras.metrics, f"{_choice(y_true, y_pred)}_accuracy")(y_true, y_pred)


@keras.saving.register_keras_serializable("dmtrl_keras")
def crossentropy(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """The crossentropy that Keras means by that name for such shapes."""
    return getattr(keras.losses, f"{_choice(y_true, y_pred)}_crossentropy")(y_true, y_pred)


# Names that stand for several functions in Keras's `compile`.
ACCURACIES = ("accuracy", "acc")
CROSSENTROPIES = ("crossentropy", "ce")

# Losses of sums over many labels, not of one value for each.
OVERLAPS = (keras.losses.dice, keras.losses.tversky)

# What takes sparse labels to be numbers of classes; for other functions a missing axis
# may mean anything.
_CLASS_FUNCTIONS = {
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_generalized_cross_entropy,
    keras.metrics.sparse_categorical_accuracy,
    keras.metrics.sparse_top_k_categorical_accuracy,
    accuracy,
    crossentropy,
    *OVERLAPS,
}


def _takes_classes(wrapped: Any) -> bool:
    function = function_of(wrapped)
    return isinstance(wrapped, keras.metrics.IoU) or function in _CLASS_FUNCTIONS


# --- the mixin ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """Labels and predictions that can be computed with, and which of them count.

    Attributes:
        y_true: the labels, zeros where they are missing.
        y_pred: the predictions, zeros where the label is missing, so that nothing that
            comes of them there, NaN for instance, reaches a value or a gradient.
        present: bool tensor with an entry for each label.
        sparse: whether labels are numbers of classes, without an axis of their own.
    """

    y_true: Tensor
    y_pred: Tensor
    present: Tensor
    sparse: bool


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

    def _parts(
        self, y_true: Tensor, y_pred: Tensor, dtype: str, mask: Tensor | None = None
    ) -> Parts:
        """Labels and predictions without what is missing.

        Args:
            y_true: labels as the wrapped loss or metric takes them.
            y_pred: predictions.
            dtype: str, of the labels to compute with.
            mask: None, or Keras's mask of the predictions.

        Raises:
            ValueError: on labels that can't be computed with, or can't belong to the
                predictions; on fractional classes, as `ground.backend.checked`.
        """
        owner, each = name_of(self), self._takes_each_label()
        wrapped = getattr(self, self._wraps)
        y_true = checked_labels(y_true, self.missing, owner)
        fractional = keras.backend.is_float_dtype(y_true.dtype)
        y_true = align(ops.cast(y_true, dtype), y_pred, each, owner)
        sparse = not each and _is_sparse(y_true, y_pred)
        self._check_axis(wrapped, each, len(y_pred.shape))
        y_true, present = split_missing(y_true, self.missing, each or sparse)
        if sparse and len(present.shape) == len(y_pred.shape):
            present = ops.squeeze(present, axis=-1)
        if sparse and fractional and _takes_classes(wrapped):
            y_true = checked(
                y_true,
                ops.all(ops.equal(y_true, ops.floor(y_true))),
                f"{owner}: expected classes, whole numbers. Received: fractional labels.",
            )
        if mask is not None:
            present = ops.logical_and(present, like_labels(mask, present, owner))
        counts = present
        if len(y_pred.shape) > len(present.shape):
            counts = ops.expand_dims(present, -1)
        y_pred = ops.where(counts, y_pred, ops.zeros_like(y_pred))
        return Parts(y_true, y_pred, present, sparse)

    def _check_axis(self, wrapped: Any, each: bool, rank: int) -> None:
        """Refuse classes, or one label's entries, along another axis than the last."""
        axis = -1
        if isinstance(wrapped, keras.metrics.IoU):
            axis = -1 if each else wrapped.axis
        elif function_of(wrapped) not in OVERLAPS:
            axis = getattr(wrapped, "_fn_kwargs", {}).get("axis", -1)
        if isinstance(axis, int) and axis not in (-1, rank - 1):
            raise ValueError(
                f"{name_of(self)}: a label must lie along the last axis. Received: "
                f"{name_of(wrapped)} with axis={axis}."
            )

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


# --- tensors --------------------------------------------------------------------------


def has_number(kind: str, number: float) -> bool:
    """Whether an integer type has a number, which would else become another one."""
    size = np.iinfo(kind)
    return not number % 1 and size.min <= number <= size.max


def checked_labels(y_true: Any, missing: float, owner: str) -> Tensor:
    """Labels as a tensor, if they are real numbers that may have the mark.

    Raises:
        ValueError: on strings and complex numbers; on integers of a type that does not have
            `missing`.
    """
    if not hasattr(y_true, "dtype"):
        y_true = np.asarray(y_true)
    try:
        kind = keras.backend.standardize_dtype(y_true.dtype)
    except ValueError:
        kind = str(y_true.dtype)
    wanted = None
    if not kind.startswith(("float", "bfloat", "int", "uint", "bool")):
        wanted = "real numbers"
    elif kind.startswith(("int", "uint")) and not math.isnan(missing):
        # The mark would have become another number, such as 255 for -1.
        if not has_number(kind, missing):
            wanted = f"a type that has {missing:g}, which marks the missing ones"
    if wanted is not None:
        raise ValueError(f"{owner}: expected labels of {wanted}. Received: dtype={kind}.")
    return ops.convert_to_tensor(y_true)


def weights_for(values: Tensor, sample_weight: Tensor, owner: str) -> Tensor:
    """Sample weights as a tensor of the dtype and number of axes of some values.

    Raises:
        ValueError: if they have more axes, or sizes that don't fit.
    """
    weights = ops.cast(ops.convert_to_tensor(sample_weight), values.dtype)
    given = tuple(weights.shape)
    while len(weights.shape) < len(values.shape):
        weights = ops.expand_dims(weights, -1)
    if len(weights.shape) == len(values.shape) + 1 and given[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    sizes = list(zip(tuple(weights.shape), tuple(values.shape)))
    if len(weights.shape) > len(values.shape) or any(
        None not in (one, size) and one not in (1, size) for one, size in sizes
    ):
        raise ValueError(
            f"{owner}: expected sample weights that broadcast to {tuple(values.shape)}. "
            f"Received: weights of shape {given}."
        )
    return weights


def like_labels(mask: Tensor, present: Tensor, owner: str) -> Tensor:
    """A mask of Keras with as many axes as the labels have."""
    if len(mask.shape) > len(present.shape):
        raise ValueError(
            f"{owner}: expected a mask of the predictions with the axes of their labels, "
            f"{tuple(present.shape)}, or fewer. Received: a mask of shape "
            f"{tuple(mask.shape)}."
        )
    mask = ops.cast(mask, "bool")
    while len(mask.shape) < len(present.shape):
        mask = ops.expand_dims(mask, -1)
    return mask


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
        shared = max(len(y_pred.shape) - 1, 1)
        matches = len(y_true.shape) in (len(y_pred.shape), len(y_pred.shape) - 1)
        matches &= same_shape(y_true.shape[:shared], y_pred.shape[:shared])
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
