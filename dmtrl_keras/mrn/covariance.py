"""The learned covariance of one mode."""

import uuid
import weakref
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.keras_private import shared_object
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import (
    check_bool,
    check_number,
    is_real,
    name_of,
    refusal,
)
from dmtrl_keras.kernels.state import state_weight
from dmtrl_keras.mrn import tensor_normal

if TYPE_CHECKING:
    from dmtrl_keras.mrn.state import TensorNormalState

# Smaller variances are lost in float32.
_SMALLEST = 1e-36

# How many columns the identity counts for with `epsilon="auto"`, by the size of the mode.
_PRIOR_COLUMNS = 10

Trace: TypeAlias = float | Literal["size"] | None
Epsilon: TypeAlias = float | Literal["auto"]


def check_epsilon(value: Any, owner: str, alternative: str = "") -> Epsilon:
    """A valid `epsilon`.

    Raises:
        ValueError: else.
    """
    if isinstance(value, str) and value == "auto":
        return "auto"
    return check_number("epsilon", value, owner, alternative=f", 'auto'{alternative}")


@keras.saving.register_keras_serializable("dmtrl_keras")
class ModeCovariance(keras.layers.Layer):
    """The learned covariance of one mode: state of the priors that use it.

    A `TensorNormalRegularizer` makes its own ones. Made by hand and given to several
    regularizers as `shared={"task": ...}`, one object lets their layers share the task
    covariance (DRN, remark after Eq. 9), or with another mode that one. Its
    maximum-likelihood update then is the mean over the kernels of all these layers.
    Sharing survives in `.keras` files, in the configuration of a `MultiTaskModel` and in
    `factorize`; `keras.models.clone_model`, which copies layer by layer, ends it.

    The update (DRN Eq. 5, 13) is `S <- c (M + epsilon I)`, where `M` is the scatter
    of the whitened kernel along the mode.

    Args:
        epsilon: float, not negative. Or `"auto"`: `10 d / n`, but at least 1, where n is
            the number of columns that the scatter is of, the product of the kernel's other
            dimensions: as if 10 d more columns had been seen, without any relation. Where
            there are fewer columns than dimensions (256 features of 10 classes and 4 tasks
            are 40 columns), an estimate with less identity says of any kernels that they
            lie in the space that they happen to lie in, and whitened by it those of all
            tasks look unrelated.
        relative: bool; `epsilon` is relative to the mean variance `tr(M) / d`, or (Eq. 13
            as printed) absolute.
        average: bool; `M` is the mean over the other dimensions (Eq. 5), or the sum. It
            matters only with an absolute `epsilon` or without a normalised trace.
        trace: `"size"`: c makes the trace d, so that the mean variance is one; a positive
            number: it makes the trace that number (Eq. 13: 1); None: c = 1.
        start: matrix `(d, d)` to start from, symmetric positive definite, taken as it is.
            None: a multiple of the identity.
        key: str, by which copies of one object in a saved model are known to be one. None:
            a new one.
        name: str.
        dtype: dtype of the state.

    Attributes:
        covariance: variable `(d, d)`, or `(n, d, d)`.
        whitener: variable of the same shape, the inverse of its Cholesky factor.
        precision: variable of the same shape, the inverse of the covariance.

    Raises:
        ValueError: on malformed arguments, on a start that is no covariance.

    Example:

    >>> import keras
    >>> from dmtrl_keras import ModeCovariance, TensorNormalRegularizer, layers
    >>> shared = ModeCovariance()
    >>> inputs = keras.Input((8,))
    >>> x = inputs
    >>> for first, name in [(True, "fc7"), (False, "fc8")]:
    ...     prior = TensorNormalRegularizer(task_covariance=shared)
    ...     x = layers.TaskDense(
    ...         4, 3, kernel_regularizer=prior, shared_input=first, name=name
    ...     )(x)
    >>> [tuple(v.shape) for v in shared.variables]
    [(3, 3), (3, 3), (3, 3)]
    """

    def __init__(
        self,
        epsilon: Epsilon = 1e-3,
        relative: bool = True,
        average: bool = True,
        trace: Trace = "size",
        start: Tensor | None = None,
        key: str | None = None,
        name: str | None = None,
        dtype: DType = "float32",
    ) -> None:
        super().__init__(name=name, dtype=dtype, trainable=False)
        self.key = uuid.uuid4().hex if key is None else key
        owner = name_of(self)
        if key is not None and not isinstance(key, str):
            raise refusal("key", key, owner, "a string, or None")
        self.epsilon = check_epsilon(epsilon, owner)
        self.relative = check_bool("relative", relative, owner)
        if self.epsilon == "auto" and not self.relative:
            what = "a number where it is absolute (`relative=False`)"
            raise refusal("epsilon", epsilon, owner, what)
        self.average = check_bool("average", average, owner)
        number = is_real(trace) and 0 < check_number("trace", trace, owner)
        if not (number or trace is None or (isinstance(trace, str) and trace == "size")):
            raise refusal("trace", trace, owner, "'size', a positive number or None")
        self.trace = trace
        self.start = None
        if start is not None:
            start = tensor_normal.check_covariance(start, f"{owner}, `start`")
            self.start = start.tolist()
        self._members = _Members()

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Make the state.

        Args:
            input_shape: tuple `(d, d)`, or `(n, d, d)` for n covariances.
        """
        size = input_shape[-1]
        start = self.start
        if start is None:
            start = np.eye(size) * (1.0 if self.trace is None else self._trace(size) / size)
        elif len(start) != size:
            raise ValueError(
                f"{name_of(self)}: expected a start of shape {(size, size)}. "
                f"Received: {(len(start), len(start))}."
            )
        start = np.broadcast_to(np.asarray(start), input_shape)
        self.covariance = state_weight(self, "covariance", start)
        inverse = np.linalg.inv(np.linalg.cholesky(start))
        self.whitener = state_weight(self, "whitener", inverse)
        # With it a training step needs one product for the penalty and its gradient.
        self.precision = state_weight(self, "precision", np.linalg.inv(start))
        self.built = True

    def _trace(self, size: int) -> float:
        trace: Any = size if self.trace == "size" else self.trace
        return float(trace)

    def join(self, member: "TensorNormalState", size: int) -> None:
        """Let one more layer's kernel take part in the update.

        Args:
            member: the layer's state.
            size: int, T, or that of another mode.

        Raises:
            ValueError: if the layers' kernels have different sizes along the mode.
        """
        if not self.built:
            self.build((size, size))
        if tuple(self.covariance.shape) != (size, size):
            raise ValueError(
                f"{name_of(self)} is shared by layers: expected kernels of one size along "
                f"its mode, {self.covariance.shape[-1]}. "
                f"Received: {member.owner} with {size}."
            )
        self._members.add(member)

    def others(self, member: "TensorNormalState") -> "list[TensorNormalState]":
        """The states of the other layers that share this covariance."""
        return [other for other in self._members.all() if other is not member]

    def estimate(self, scatter: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The covariance that a scatter matrix gives, its whitener and its precision.

        Args:
            scatter: tensor `(..., d, d)`, the sum over the other dimensions.
            count: int or tensor, the product of the other dimensions.

        Returns:
            Three tensors like `scatter`.
        """
        size = scatter.shape[-1]
        matrix = (scatter + ops.swapaxes(scatter, -1, -2)) / 2
        if self.average:
            matrix = matrix / count
        identity = ops.eye(size, dtype=matrix.dtype)
        epsilon: Any = self.epsilon
        if epsilon == "auto":
            epsilon = max(1.0, _PRIOR_COLUMNS * size / count)
        if self.relative:
            # A kernel of zeros has no scale; it gives the identity.
            mean = ops.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / size
            mean = ops.where(mean > _SMALLEST, mean, ops.ones_like(mean))
            matrix = matrix / mean + epsilon * identity
            if self.trace is None:
                matrix = matrix * mean
        else:
            matrix = matrix + epsilon * identity
        if self.trace is not None:
            trace = ops.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
            matrix = matrix * (self._trace(size) / trace)
        whitener = tensor_normal.whitener(matrix)
        precision = ops.matmul(ops.swapaxes(whitener, -1, -2), whitener)
        return matrix, whitener, precision

    def set(self, matrix: np.ndarray) -> None:
        """Take a covariance as it is, with the trace that the estimates have.

        Args:
            matrix: array like `covariance`, symmetric positive definite.
        """
        matrix = np.asarray(matrix, "float64")
        if self.trace is not None:
            trace = np.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
            matrix = matrix * (self._trace(matrix.shape[-1]) / trace)
        self.covariance.assign(matrix)
        self.whitener.assign(np.linalg.inv(np.linalg.cholesky(matrix)))
        self.precision.assign(np.linalg.inv(matrix))

    @property
    def scale_free(self) -> bool:
        """Whether the estimate is the same for a scatter matrix in other units."""
        return self.relative and self.trace is not None

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["trainable"]
        return {
            **config,
            "epsilon": self.epsilon,
            "relative": self.relative,
            "average": self.average,
            "trace": self.trace,
            "start": self.start,
            "key": self.key,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return shared_object(config["key"], lambda: cls(**config))


class _Members:
    """Layers' states, in the order in which they joined, not kept alive."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[TensorNormalState]] = []

    def add(self, member: "TensorNormalState") -> None:
        self._references.append(weakref.ref(member))

    def all(self) -> "list[TensorNormalState]":
        alive = (reference() for reference in self._references)
        return [member for member in alive if member is not None]
