"""Losses for several tasks: the hinge of T outputs, and losses with missing labels."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.backend import mean_over_replicas
from dmtrl_keras.ground.keras_private import (
    MASK,
    attach,
    attached,
    function_of,
    logits_of,
)
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import (
    check_name,
    check_one_of,
    check_tasks,
    from_keras,
    name_of,
    real_array,
)
from dmtrl_keras.training.missing import (
    CROSSENTROPIES,
    OVERLAPS,
    Masked,
    Parts,
    crossentropy,
    like_labels,
    same_shape,
    weights_for,
)

REDUCTIONS = (
    "sum_over_batch_size",
    "mean",
    "sum",
    "mean_with_sample_weight",
    "none",
    None,
)


def one_vs_rest(labels: ArrayLike, tasks: int) -> np.ndarray:
    """Class labels as +-1 labels of T one-versus-rest tasks.

    Args:
        labels: int array `(n,)` with values from 0 to T - 1.
        tasks: int, T.

    Returns:
        A float32 array `(n, T)`: +1 for the label's own task, else -1.

    Raises:
        ValueError: on labels that are no ints in this range, or of another shape.

    Example:

    >>> one_vs_rest([2, 0], 3).tolist()
    [[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]
    """
    owner = "one_vs_rest"
    tasks = check_tasks(tasks, owner)
    labels = real_array("labels", labels, owner)
    valid = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not valid or (labels.size and not (0 <= labels.min() and labels.max() < tasks)):
        received = f"shape={labels.shape}, dtype={labels.dtype}"
        if labels.size:
            received += f", values from {labels.min()} to {labels.max()}"
        raise ValueError(
            f"{owner}: expected int labels of shape (n,) from 0 to {tasks - 1}. "
            f"Received: {received}."
        )
    return np.where(labels[:, None] == np.arange(tasks), 1, -1).astype("float32")


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskHinge(keras.losses.Loss):
    """The hinge loss of T binary tasks, `max(0, 1 - y_t * f_t)` (DMTRL, section 4.1).

    `y` is +-1 and `f` the output of each task's network. Unlike `keras.losses.Hinge`, the
    loss has one value for each task, so that sample weights may be `(batch, T)`; labels
    are never reinterpreted; and labels of another shape than the outputs are an error.

    Args:
        reduction: as in `keras.losses.Loss`; by default the mean over batch and tasks.
        name: str.
        dtype: as in `keras.losses.Loss`.

    Call arguments:
        y_true: `(batch, T)`, +1 or -1; see `one_vs_rest`. For missing labels wrap the
            loss in `MaskedLoss`.
        y_pred: `(batch, T)`.
        sample_weight: None, `(batch,)`, `(batch, 1)` or `(batch, T)`.

    Raises:
        ValueError: on labels of the wrong shape.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.losses import TaskHinge
    >>> float(TaskHinge()(np.array([[1.0, -1.0]]), np.array([[0.5, 0.5]])))
    1.0
    """

    elementwise = True

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "task_hinge",
        dtype: DType = None,
    ) -> None:
        check_one_of("reduction", reduction, REDUCTIONS, type(self).__name__)
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        mask = attached(y_pred, MASK)
        y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        if sample_weight is not None:
            sample_weight = weights_for(y_pred, sample_weight, name_of(self))
        if mask is not None:
            # Each value is of a task, a mask of Keras of an example. The tensor itself is
            # others' too.
            y_pred = ops.copy(y_pred)
            attach(y_pred, MASK, like_labels(mask, y_pred, name_of(self)))
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        if len(y_pred.shape) != 2 or not same_shape(y_true.shape, y_pred.shape):
            raise ValueError(
                f"{type(self).__name__} {self.name!r}: expected labels and outputs of "
                f"one shape (batch, T). Received: labels {tuple(y_true.shape)}, "
                f"outputs {tuple(y_pred.shape)}."
            )
        return ops.maximum(1 - y_true * y_pred, 0)


@keras.saving.register_keras_serializable("dmtrl_keras")
class MaskedLoss(Masked, keras.losses.Loss):
    """Any Keras loss, with missing labels left out.

    The loss is the mean over the labels that the batch has (its weighted mean, with
    `reduction="mean_with_sample_weight"`), and 0, with zero gradients, in a batch that
    has no label at all. Under `tf.distribute` it is the mean over the global batch. What
    Keras's masks leave out, padding for instance, counts as missing.

    `MultiTaskModel` logs the mean over all labels of an epoch, whatever the batch size.
    (A plain `keras.Model` logs means over batches; a `MaskedMetric` is right there, too.)

    Args:
        loss: a `keras.losses.Loss`, or its name or config. Its own reduction is not used.
        missing: NaN (the default) or a number, for instance -1 for integer labels. NaN
            counts as missing in either case.
        elementwise: whether each entry of the labels' last axis is a label by itself, as
            in a mean squared error of several outputs, or the last axis is one label, as
            in one-hot classes, missing if any entry is. None: by itself for the losses
            of Keras that are means over the last axis, and for losses with one value
            for each entry (`TaskHinge`); one label for all others.
        reduction: `"sum_over_batch_size"`, `"mean"` (the same), `"sum"`,
            `"mean_with_sample_weight"`, or None.
        name: str.
        dtype: as in `keras.losses.Loss`; by default that of `loss`.

    Call arguments:
        y_true: labels as `loss` takes them, with `missing` where there is none. Classes
            without an axis of their own may have any number of axes, `(batch, ...)`
            beside predictions `(batch, ..., classes)`; also for `Dice` and `Tversky`.
        y_pred: predictions. Where the label is missing they may be anything, NaN too.
        sample_weight: None, or weights that broadcast to the values of the loss.

    Raises:
        ValueError: on labels that can't belong to the predictions, are no real numbers, or
            integers of a type that can't have the mark; on fractional classes (on
            TensorFlow `tf.errors.InvalidArgumentError`; not in code that XLA compiles); on
            a bad `missing`; on a loss whose value at one label depends on others (`CTC`,
            `Circle`, a mean over the batch).

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.losses import MaskedLoss
    >>> labels = np.array([[1.0, np.nan], [np.nan, 4.0]])
    >>> float(MaskedLoss("mean_squared_error")(labels, np.zeros((2, 2))))
    8.5
    """

    _wraps = "loss"

    def __init__(
        self,
        loss: str | Mapping[str, Any] | Callable[..., Tensor],
        missing: float | None = math.nan,
        elementwise: bool | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        owner = type(self).__name__
        check_name("name", name, owner)
        check_one_of("reduction", reduction, REDUCTIONS, owner)
        wrapped = from_keras(owner, _as_loss, loss=loss)
        if isinstance(wrapped, (keras.losses.CTC, keras.losses.Circle)):
            raise ValueError(
                f"{type(self).__name__}: expected a loss with a value for each label. "
                f"Received: {name_of(wrapped)}, in which labels depend on each other."
            )
        name = name or f"masked_{wrapped.name}"
        dtype = dtype or wrapped.dtype
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.loss = wrapped
        self._set_missing(missing, elementwise)
        # A mean over the labels present is a sum by weights that the count has divided.
        how = "sum_over_batch_size" if self.counts_labels else reduction
        self._reduced = _Reduced(name=name, reduction=how, dtype=dtype)

    @property
    def counts_labels(self) -> bool:
        """Whether the loss is a mean, over a number of labels that it can tell."""
        return self.reduction not in ("sum", "none", None)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        return self.value_and_count(y_true, y_pred, sample_weight)[0]

    def value_and_count(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the number of labels, or sum of weights, that it is a mean over.

        Args:
            y_true: as in a call.
            y_pred: as in a call.
            sample_weight: as in a call.

        Returns:
            `(value, count)`, scalars. Under `tf.distribute` the count is the mean over the
            replicas, and the value, as of any loss of Keras, one to be summed over them.
        """
        values, present = self._values(y_true, y_pred)
        if self.reduction not in ("none", None) and not values.shape:
            # Keras would scale no scalar for distribution.
            values, present = (ops.reshape(x, (1,)) for x in (values, present))
        weights = ops.cast(present, values.dtype)
        count = ops.sum(weights)
        if sample_weight is not None:
            weights = weights * weights_for(values, sample_weight, name_of(self))
        if self.reduction == "mean_with_sample_weight":
            count = ops.sum(weights)
        count = mean_over_replicas(count)
        if self.counts_labels:
            size = math.prod(ops.shape(values))
            weights = weights * ops.divide_no_nan(ops.cast(size, count.dtype), count)
        return self._reduced(present, values, weights), count

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """One value for each label, with Keras's mask of those present."""
        values, present = self._values(y_true, y_pred)
        attach(values, MASK, present)
        return values

    def _values(self, y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
        """One loss value for each label, 0 where there is none; and which are present."""
        mask = attached(y_pred, MASK)
        logits = logits_of(y_pred)
        if logits is not None and getattr(self.loss, "from_logits", False):
            # As Keras's own losses do, which don't see it through what is done below.
            warnings.warn(
                f"{name_of(self)}: expected outputs without an activation, since the loss "
                "is from_logits=True. Received: those of a softmax or a sigmoid; what it "
                "was given is taken.",
                stacklevel=2,
            )
            y_pred = logits
        y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        parts = self._parts(y_true, y_pred, self.dtype, mask)
        y_true, y_pred, present = parts.y_true, parts.y_pred, parts.present
        each = self._takes_each_label()
        if function_of(self.loss) in OVERLAPS:
            return self._overlap(parts)
        if each and not getattr(self.loss, "elementwise", False):
            y_true, y_pred = y_true[..., None], y_pred[..., None]
        values = self.loss.call(y_true, y_pred)
        # That of `ignore_class`, for instance.
        mask = attached(values, MASK)
        if mask is not None:
            present = ops.logical_and(present, like_labels(mask, present, name_of(self)))
        if not same_shape(values.shape, present.shape):
            raise ValueError(
                f"{name_of(self)}: expected a loss with a value for each label, of shape "
                f"{tuple(present.shape)}. Received: {name_of(self.loss)} with values of "
                f"shape {tuple(values.shape)}."
            )
        return ops.where(present, values, ops.zeros_like(values)), present

    def _overlap(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """A loss of sums over many labels, to which zeros add nothing."""
        y_true, y_pred, present = parts.y_true, parts.y_pred, parts.present
        if parts.sparse:
            shape = tuple(ops.shape(y_pred))
            classes = ops.cast(ops.reshape(y_true, shape[:-1]), "int32")
            y_true = ops.one_hot(classes, shape[-1], dtype=self.dtype)
        if len(present.shape) < len(y_true.shape):
            present = ops.expand_dims(present, -1)
        present = ops.logical_and(present, ops.ones_like(y_true, dtype="bool"))
        y_true = ops.where(present, y_true, ops.zeros_like(y_true))
        values = self.loss.call(y_true, y_pred)
        present = ops.any(present, axis=getattr(self.loss, "axis", None))
        return ops.where(present, values, ops.zeros_like(values)), present

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "reduction": self.reduction}


class _Reduced(keras.losses.Loss):
    """Values of a loss as Keras reduces them, by weights and over replicas."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


def _as_loss(loss: Any) -> keras.losses.Loss:
    if isinstance(loss, str) and loss.lower() in CROSSENTROPIES:
        return _FunctionLoss(crossentropy, name=loss)
    if isinstance(loss, str):
        # By class where there is one: a function has no config of its own.
        camel = "".join(part.capitalize() for part in loss.split("_"))
        loss = getattr(keras.losses, camel, None) or keras.losses.get(loss)
        if isinstance(loss, type):
            loss = loss()
    elif isinstance(loss, dict):
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        return loss
    if callable(loss):
        return _class_of(loss) or _FunctionLoss(loss)
    raise ValueError(
        "`loss` must be a keras.losses.Loss, a loss function, or the name of one. "
        f"Received: {loss!r}."
    )


def _class_of(function: Callable[..., Tensor]) -> keras.losses.Loss | None:
    """The Keras loss class of a Keras loss function, which can be serialized."""
    name = getattr(function, "__name__", "")
    camel = "".join(part.capitalize() for part in name.split("_"))
    kind = getattr(keras.losses, camel, None)
    if isinstance(kind, type) and getattr(keras.losses, name, None) is function:
        return kind()
    return None


@keras.saving.register_keras_serializable("dmtrl_keras")
class _FunctionLoss(keras.losses.Loss):
    """A user's loss function as a loss; the function must be registered to be saved."""

    def __init__(
        self, fn: Callable[..., Tensor], name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name=name or getattr(fn, "__name__", "loss"), **kwargs)
        self.fn = fn

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return self.fn(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        fn = keras.saving.serialize_keras_object(self.fn)
        return {**super().get_config(), "fn": fn}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        config["fn"] = keras.saving.deserialize_keras_object(config["fn"])
        return cls(**config)
