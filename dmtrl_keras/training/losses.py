"""Losses for several tasks: the hinge of T outputs, and losses with missing labels."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

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
    Masked,
    align,
    same_shape,
    split_missing,
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
        if sample_weight is not None:
            values = ops.convert_to_tensor(y_pred, dtype=self.dtype)
            sample_weight = weights_for(values, sample_weight)
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

    The loss is the mean over what is present (its weighted mean, with
    `reduction="mean_with_sample_weight"`), and 0, with zero gradients, in a batch that
    has no label at all.

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
        dtype: as in `keras.losses.Loss`.

    Call arguments:
        y_true: labels as `loss` takes them, with `missing` where there is none.
        y_pred: predictions.
        sample_weight: None, or weights that broadcast to the values of the loss.

    Raises:
        ValueError: on labels that can't belong to the predictions, on a bad `missing`.

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
        name = name or f"masked_{wrapped.name}"
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.loss = wrapped
        self._set_missing(missing, elementwise)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        y_true = ops.convert_to_tensor(y_true, dtype=self.dtype)
        y_true = align(y_true, y_pred, self._takes_each_label(), name_of(self))
        values, present = self._values(y_true, y_pred)
        weights = ops.cast(present, values.dtype)
        # A value at a missing label may be anything; 0 * inf would be NaN.
        values = ops.where(present, values, ops.zeros_like(values))
        count = ops.sum(weights)
        if sample_weight is not None:
            weights = weights * weights_for(values, sample_weight)
        values = values * weights
        if self.reduction in (None, "none"):
            return values
        total = ops.sum(values)
        if self.reduction == "sum":
            return total
        if self.reduction == "mean_with_sample_weight":
            count = ops.sum(weights)
        return ops.divide_no_nan(total, count)

    def _values(self, y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
        """One loss value for each label, and whether it is present."""
        shared = same_shape(y_true.shape, y_pred.shape)
        elementwise = self._takes_each_label()
        # Sparse class labels have no last axis of their own.
        labels, present = split_missing(y_true, self.missing, elementwise or not shared)
        if not elementwise:
            values = self.loss.call(labels, y_pred)
        elif getattr(self.loss, "elementwise", False):
            values = self.loss.call(labels, y_pred)
        else:
            values = self.loss.call(labels[..., None], y_pred[..., None])
        if len(present.shape) > len(values.shape):
            present = ops.squeeze(present, axis=-1)
        return values, present

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return self._values(y_true, y_pred)[0]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "reduction": self.reduction}


def _as_loss(loss: Any) -> keras.losses.Loss:
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
