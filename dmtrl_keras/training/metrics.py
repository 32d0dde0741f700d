"""Metrics for several tasks, and metrics with missing labels."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import check_name, from_keras, name_of
from dmtrl_keras.training.missing import (
    Masked,
    align,
    same_shape,
    split_missing,
    weights_for,
)


class _MeanError(keras.metrics.Metric):
    def __init__(self, name: str | None = None, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.total = self.add_variable((), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def _check(self, y_true: Tensor, y_pred: Tensor, labels: str) -> tuple[Tensor, Tensor]:
        # Bool labels have no order, and so no greatest entry.
        y_true = ops.cast(ops.convert_to_tensor(y_true), "float32")
        y_pred = ops.convert_to_tensor(y_pred)
        allowed = {"(batch, T)": tuple(y_pred.shape)}
        if labels == "classes":
            allowed["(batch,)"] = tuple(y_pred.shape)[:1]
            allowed["(batch, 1)"] = (*tuple(y_pred.shape)[:1], 1)
        matches = any(same_shape(y_true.shape, shape) for shape in allowed.values())
        if len(y_pred.shape) != 2 or not matches:
            raise ValueError(
                f"{type(self).__name__} {self.name!r}: expected outputs (batch, T) and "
                f"labels {' or '.join(allowed)}. Received: outputs "
                f"{tuple(y_pred.shape)}, labels {tuple(y_true.shape)}."
            )
        return y_true, y_pred

    def _add(self, errors: Tensor, sample_weight: Tensor | None) -> None:
        errors = ops.cast(errors, self.dtype)
        weights = ops.ones_like(errors)
        if sample_weight is not None:
            weights = weights * weights_for(errors, sample_weight)
        self.total.assign_add(ops.sum(errors * weights))
        self.count.assign_add(ops.sum(weights))

    def result(self) -> Tensor:
        return ops.divide_no_nan(self.total, self.count)


@keras.saving.register_keras_serializable("dmtrl_keras")
class MeanBinaryError(_MeanError):
    """The mean error rate of T binary tasks (DMTRL, section 4.1, metric 1).

    `mean over samples and tasks of [sign(f_t) != y_t]`; an output of exactly 0 counts as
    negative.

    Args:
        name: str.
        dtype: as in `keras.metrics.Metric`.

    Call arguments:
        y_true: `(batch, T)`, positive labels greater than 0 (+-1 or 0/1).
        y_pred: `(batch, T)`, outputs whose sign decides.
        sample_weight: None, `(batch,)` or `(batch, T)`.

    Raises:
        ValueError: on labels or outputs of the wrong shape.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.metrics import MeanBinaryError
    >>> metric = MeanBinaryError()
    >>> metric.update_state(np.array([[1, -1]]), np.array([[0.5, 0.5]]))
    >>> float(metric.result())
    0.5
    """

    elementwise = True

    def __init__(self, name: str = "mean_binary_error", dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Add a batch."""
        y_true, y_pred = self._check(y_true, y_pred, "tasks")
        self._add(ops.not_equal(y_true > 0, y_pred > 0), sample_weight)


@keras.saving.register_keras_serializable("dmtrl_keras")
class MulticlassError(_MeanError):
    """The error of naming the class by ranking T outputs (DMTRL, section 4.1, metric 2).

    `mean over samples of [argmax_t f_t != class]`.

    Args:
        name: str.
        dtype: as in `keras.metrics.Metric`.

    Call arguments:
        y_true: `(batch, T)`, whose greatest entry is the class (+-1 or one-hot), or the
            class itself, `(batch,)` or `(batch, 1)`.
        y_pred: `(batch, T)`, one output of each one-versus-rest task.
        sample_weight: None or `(batch,)`.

    Raises:
        ValueError: on labels or outputs of the wrong shape.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.metrics import MulticlassError
    >>> metric = MulticlassError()
    >>> metric.update_state(np.array([2, 0]), np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0]]))
    >>> float(metric.result())
    0.5
    """

    def __init__(self, name: str = "multiclass_error", dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Add a batch."""
        y_true, y_pred = self._check(y_true, y_pred, "classes")
        if len(y_true.shape) == 2:
            one_each = y_true.shape[-1] == 1 and y_pred.shape[-1] != 1
            y_true = y_true[:, 0] if one_each else ops.argmax(y_true, axis=-1)
        named = ops.argmax(y_pred, axis=-1)
        self._add(ops.not_equal(ops.cast(y_true, named.dtype), named), sample_weight)


@keras.saving.register_keras_serializable("dmtrl_keras")
class MaskedMetric(Masked, keras.metrics.Metric):
    """Any Keras metric, with missing labels left out.

    Args:
        metric: a `keras.metrics.Metric`, or its name or config.
        missing: NaN (the default) or a number, for instance -1 for integer labels. NaN
            counts as missing in either case.
        elementwise: whether each entry of the labels' last axis is a label by itself, or
            the last axis is one label; None: as in `dmtrl_keras.losses.MaskedLoss`.
        name: str; by default that of the metric.
        dtype: as in `keras.metrics.Metric`.

    Call arguments:
        y_true: labels as `metric` takes them, with `missing` where there is none.
        y_pred: predictions.
        sample_weight: None, or weights of the samples or of the labels.

    Raises:
        ValueError: on labels that can't belong to the predictions, on a bad `missing`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.metrics import MaskedMetric
    >>> metric = MaskedMetric("mean_absolute_error")
    >>> metric.update_state(np.array([1.0, np.nan, 5.0]), np.zeros(3))
    >>> float(metric.result())
    3.0
    """

    _wraps = "metric"

    def __init__(
        self,
        metric: str | Mapping[str, Any] | Callable[..., Tensor],
        missing: float | None = math.nan,
        elementwise: bool | None = None,
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        check_name("name", name, type(self).__name__)
        wrapped = from_keras(type(self).__name__, _as_metric, metric=metric)
        super().__init__(name=name or wrapped.name, dtype=dtype)
        self.metric = wrapped
        self._set_missing(missing, elementwise)

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Add a batch."""
        y_pred = ops.convert_to_tensor(y_pred)
        y_true = ops.cast(ops.convert_to_tensor(y_true), self.dtype)
        elementwise = self._takes_each_label()
        y_true = align(y_true, y_pred, elementwise, name_of(self))
        shared = same_shape(y_true.shape, y_pred.shape)
        labels, present = split_missing(y_true, self.missing, elementwise or not shared)
        if len(present.shape) > 1 and not shared:
            # Class labels (batch, 1) beside outputs (batch, classes).
            present = ops.squeeze(present, axis=-1)
        weights = ops.cast(present, self.dtype)
        if sample_weight is not None:
            weights = weights * weights_for(weights, sample_weight)
        own = getattr(self.metric, "elementwise", False)
        if elementwise and not own:
            # Each label as a sample by itself, so that it has a weight of its own.
            labels, y_pred = (ops.reshape(y, (-1, 1)) for y in (labels, y_pred))
            weights = ops.reshape(weights, (-1,))
        self.metric.update_state(labels, y_pred, sample_weight=weights)

    def result(self) -> Any:
        """The wrapped metric's result."""
        return self.metric.result()

    def reset_state(self) -> None:
        """Reset the wrapped metric."""
        self.metric.reset_state()

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dtype": self.dtype}


def _as_metric(metric: Any) -> keras.metrics.Metric:
    if isinstance(metric, keras.metrics.Metric):
        return metric
    found = keras.metrics.get(metric)
    if isinstance(found, keras.metrics.Metric):
        return found
    if callable(found):
        # Keras resolves some names to functions; the class has a config and a state.
        camel = "".join(p.capitalize() for p in found.__name__.split("_"))
        kind = getattr(keras.metrics, camel, None)
        if kind is not None:
            return kind()
        return keras.metrics.MeanMetricWrapper(found, name=found.__name__)
    raise ValueError(
        "`metric` must be a keras.metrics.Metric, or the name of one. "
        f"Received: {metric!r}."
    )
