"""Metrics for several tasks, and metrics with missing labels."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.keras_private import (
    MASK,
    attach,
    attached,
    unscaled_loss,
    values_of,
)
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import check_name, from_keras, name_of
from dmtrl_keras.training.missing import (
    ACCURACIES,
    CROSSENTROPIES,
    ELEMENTWISE_METRICS,
    Masked,
    Parts,
    accuracy,
    crossentropy,
    like_labels,
    same_shape,
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

    def _add(
        self,
        errors: Tensor,
        undefined: Tensor,
        mask: Tensor | None,
        sample_weight: Tensor | None,
    ) -> None:
        """Add errors, which are NaN where the outputs were: NaN compares as any number."""
        errors = ops.where(undefined, math.nan, ops.cast(errors, self.dtype))
        weights = ops.ones_like(errors)
        if sample_weight is not None:
            weights = weights * weights_for(errors, sample_weight, name_of(self))
        if mask is not None:
            weights = weights * ops.cast(
                like_labels(mask, errors, name_of(self)), self.dtype
            )
        self.total.assign_add(ops.sum(errors * weights))
        self.count.assign_add(ops.sum(weights))

    def result(self) -> Tensor:
        return ops.divide_no_nan(self.total, self.count)


@keras.saving.register_keras_serializable("dmtrl_keras")
class MeanBinaryError(_MeanError):
    """The mean error rate of T binary tasks (DMTRL, section 4.1, metric 1).

    `mean over samples and tasks of [sign(f_t) != y_t]`; an output of exactly 0 counts as
    negative, and NaN is no output: the result is NaN.

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
        mask = attached(y_pred, MASK)
        y_true, y_pred = self._check(y_true, y_pred, "tasks")
        wrong = ops.not_equal(y_true > 0, y_pred > 0)
        self._add(wrong, ops.isnan(y_pred), mask, sample_weight)


@keras.saving.register_keras_serializable("dmtrl_keras")
class MulticlassError(_MeanError):
    """The error of naming the class by ranking T outputs (DMTRL, section 4.1, metric 2).

    `mean over samples of [argmax_t f_t != class]`; NaN if any output is.

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
        mask = attached(y_pred, MASK)
        y_true, y_pred = self._check(y_true, y_pred, "classes")
        if len(y_true.shape) == 2:
            one_each = y_true.shape[-1] == 1 and y_pred.shape[-1] != 1
            y_true = y_true[:, 0] if one_each else ops.argmax(y_true, axis=-1)
        named = ops.argmax(y_pred, axis=-1)
        wrong = ops.not_equal(ops.cast(y_true, named.dtype), named)
        self._add(wrong, ops.any(ops.isnan(y_pred), axis=-1), mask, sample_weight)


class TotalLoss(keras.metrics.Mean):
    """The total loss of an epoch, in which losses of missing labels count by labels.

    The sum of these losses' means over the labels of the whole epoch, and of the mean over
    the examples of all that the batches' totals have beside them.

    Args:
        losses: int, how many losses count their labels.
        name: str.

    Call arguments:
        values: scalar, the total of a batch.
        sample_weight: number of its examples.

    Example:

    >>> total = TotalLoss(1)
    >>> for value, labels in ((5.0, 1), (2.0, 3)):
    ...     total.set_counted([(value, labels)])
    ...     total.update_state(value + 1, sample_weight=4)
    >>> float(total.result())  # (5 * 1 + 2 * 3) / 4 + 1
    3.75
    """

    def __init__(self, losses: int, name: str = "loss") -> None:
        super().__init__(name=name)

        def add(name: str) -> keras.Variable:
            return self.add_variable((losses,), "zeros", name=name)

        self.sums, self.labels = add("sums"), add("labels")
        # Those of the step whose total is to come: Keras gives the total alone.
        self.step_values, self.step_labels = add("step_values"), add("step_labels")

    def set_counted(self, counted: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Say what of the next total counts by labels.

        Args:
            counted: for each of the losses its weighted value, as it is in the total, and
                its number of labels.
        """
        values = [unscaled_loss(ops.cast(value, self.dtype)) for value, _ in counted]
        labels = [ops.cast(number, self.dtype) for _, number in counted]
        self.step_values.assign(ops.stack(values))
        self.step_labels.assign(ops.stack(labels))

    def update_state(self, values: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a batch."""
        values = ops.cast(values, self.dtype) - ops.sum(self.step_values)
        super().update_state(values, sample_weight=sample_weight)
        self.sums.assign_add(self.step_values * self.step_labels)
        self.labels.assign_add(self.step_labels)
        self._forget(self.step_values, self.step_labels)

    def result(self) -> Tensor:
        """The total of all batches since the last reset."""
        return super().result() + ops.sum(ops.divide_no_nan(self.sums, self.labels))

    def reset_state(self) -> None:
        """Forget all batches."""
        super().reset_state()
        self._forget(self.sums, self.labels, self.step_values, self.step_labels)

    def _forget(self, *variables: keras.Variable) -> None:
        for variable in variables:
            variable.assign(ops.zeros(variable.shape, variable.dtype))


@keras.saving.register_keras_serializable("dmtrl_keras")
class MaskedMetric(Masked, keras.metrics.Metric):
    """Any Keras metric, with missing labels left out.

    What Keras's masks leave out, padding for instance, counts as missing. A prediction
    that is NaN where there is a label makes the result NaN.

    Args:
        metric: a `keras.metrics.Metric`, or its name or config. As in Keras's `compile`,
            `"accuracy"` is the binary, categorical or sparse one by the shapes of labels
            and predictions.
        missing: NaN (the default) or a number, for instance -1 for integer labels. NaN
            counts as missing in either case.
        elementwise: whether each entry of the labels' last axis is a label by itself, or
            the last axis is one label; None: as in `dmtrl_keras.losses.MaskedLoss`.
            Metrics with a value for each column, `AUC(multi_label=True)`, `R2Score`, and
            `F1Score` and `FBetaScore` with a threshold, then have each column's own labels.
        name: str; by default that of the metric.
        dtype: as in `keras.metrics.Metric`.

    Call arguments:
        y_true: labels as `metric` takes them, with `missing` where there is none.
        y_pred: predictions. Where the label is missing they may be anything, NaN too.
        sample_weight: None, or weights of the samples or of the labels.

    Raises:
        ValueError: on labels that can't belong to the predictions, and as
            `dmtrl_keras.losses.MaskedLoss`; on a metric that takes no labels, such as
            `keras.metrics.Mean`.

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
        _check_takes_labels(wrapped, type(self).__name__)
        super().__init__(name=name or wrapped.name, dtype=dtype)
        self.metric = wrapped
        self._set_missing(missing, elementwise)
        self.undefined = self.add_variable((), "zeros", name="undefined")

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Add a batch."""
        mask = attached(y_pred, MASK)
        y_pred = ops.convert_to_tensor(y_pred)
        if keras.backend.is_float_dtype(y_pred.dtype):
            # Not in half precision, nor in another type than the labels.
            y_pred = ops.cast(y_pred, self.dtype)
        parts = self._parts(y_true, y_pred, self.dtype, mask)
        weights = ops.cast(parts.present, self.dtype)
        if sample_weight is not None:
            weights = weights * weights_for(weights, sample_weight, name_of(self))
        elif not keras.backend.is_float_dtype(self.metric.dtype):
            weights = ops.cast(weights, self.metric.dtype)
        undefined = ops.cast(ops.isnan(parts.y_pred), self.dtype)
        self.undefined.assign_add(ops.sum(undefined))
        self._update(parts, weights)

    def _update(self, parts: Parts, weights: Tensor) -> None:
        """Update the wrapped metric, with weights that are 0 where a label is missing."""
        y_true, y_pred = parts.y_true, parts.y_pred
        metric, each = self.metric, self._takes_each_label()
        own = getattr(metric, "elementwise", False)
        if not each or own or isinstance(metric, keras.metrics.IoU):
            pass
        elif isinstance(metric, ELEMENTWISE_METRICS):
            if getattr(metric, "class_id", None) is not None:
                weights = weights[..., metric.class_id]
            if getattr(metric, "num_regressors", 0):
                # It counts what has no weight, too.
                absent = ops.sum(ops.cast(ops.equal(weights, 0), self.dtype))
                metric.num_samples.assign(metric.num_samples - absent)
        elif isinstance(metric, keras.metrics.FBetaScore):
            # It takes a weight for each row: here each row has the label of one column,
            # beside zeros, which are neither labels nor predictions.
            columns = y_true.shape[-1]
            single = ops.eye(columns, dtype=self.dtype)
            y_true, y_pred = (
                ops.reshape(ops.cast(y, self.dtype)[..., None] * single, (-1, columns))
                for y in (y_true, y_pred)
            )
            weights = ops.reshape(weights, (-1,))
        elif isinstance(metric, keras.metrics.MeanMetricWrapper):
            y_true, y_pred = y_true[..., None], y_pred[..., None]
        else:
            # Each label as a sample by itself, so that it has a weight of its own.
            y_true, y_pred = (ops.reshape(y, (-1, 1)) for y in (y_true, y_pred))
            weights = ops.reshape(weights, (-1,))
        values = values_of(metric, y_true, y_pred)
        if values is None:
            y_true, y_pred = (_filled(y, weights) for y in (y_true, y_pred))
            metric.update_state(y_true, y_pred, sample_weight=weights)
            return
        # Where there is no label the value may be none either: a weight of 0 is not enough.
        values = _where_present(values, parts.present)
        keras.metrics.Mean.update_state(metric, values, sample_weight=weights)

    def result(self) -> Any:
        """The wrapped metric's result."""
        undefined = ops.greater(self.undefined, 0)
        return keras.tree.map_structure(
            lambda value: ops.where(undefined, math.nan, value), self.metric.result()
        )

    def reset_state(self) -> None:
        """Reset the wrapped metric."""
        self.metric.reset_state()
        self.undefined.assign(0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dtype": self.dtype}


def _check_takes_labels(metric: keras.metrics.Metric, owner: str) -> None:
    """Refuse metrics of values, such as `Mean` and `Sum`."""
    signature = inspect.signature(metric.update_state)
    try:
        signature.bind(None, None, sample_weight=None)
    except TypeError as error:
        raise ValueError(
            f"{owner}: expected a metric of labels and predictions, with "
            "`update_state(y_true, y_pred, sample_weight=None)`. "
            f"Received: {name_of(metric)} with `update_state{signature}`."
        ) from error


def _where_present(values: Tensor, present: Tensor) -> Tensor:
    """Values of a metric's function, with zeros where a label is missing."""
    shape = tuple(present.shape)
    if not same_shape(tuple(values.shape)[: len(shape)], shape):
        # No value for each label: such as a mean over the batch.
        return values
    mask = attached(values, MASK)
    while len(present.shape) < len(values.shape):
        present = ops.expand_dims(present, -1)
    values = ops.where(present, values, ops.zeros_like(values))
    if mask is not None:
        # That of `ignore_class`, for instance.
        attach(values, MASK, mask)
    return values


def _filled(y: Tensor, weights: Tensor) -> Tensor:
    """Labels or predictions, in which the first that has a weight stands for the others.

    It is as good as zeros, and a metric has a value there.
    """
    rank = len(weights.shape)
    if not rank or not same_shape(tuple(y.shape)[:rank], tuple(weights.shape)):
        return y
    counts = ops.not_equal(weights, 0)
    rest = tuple(y.shape)[rank:]
    flat = ops.reshape(y, (-1, *rest))
    first = ops.take(flat, ops.argmax(ops.reshape(counts, (-1,))), axis=0)
    while len(counts.shape) < len(y.shape):
        counts = ops.expand_dims(counts, -1)
    return ops.where(counts, y, first)


def _as_metric(metric: Any) -> keras.metrics.Metric:
    if isinstance(metric, keras.metrics.Metric):
        return metric
    if isinstance(metric, str) and metric.lower() in ACCURACIES:
        return keras.metrics.MeanMetricWrapper(accuracy, name=metric)
    if isinstance(metric, str) and metric.lower() in CROSSENTROPIES:
        return keras.metrics.MeanMetricWrapper(crossentropy, name=metric)
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
