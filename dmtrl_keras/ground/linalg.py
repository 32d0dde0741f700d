"""Linear algebra that several rooms need: unfoldings, mode products, whiteners."""

import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.backend import checked
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import (
    from_keras,
    is_int,
    real_array,
    real_tensor,
    refusal,
)


def unfold(tensor: ArrayLike, mode: int) -> np.ndarray:
    """The mode-n unfolding: mode-n fibres as columns, `(d_n, prod of others)`.

    Args:
        tensor: array of any shape.
        mode: int, the axis that becomes the rows.

    Returns:
        A matrix of shape `(tensor.shape[mode], tensor.size / tensor.shape[mode])`.

    Raises:
        ValueError: on what is no array of real numbers, on an axis that it lacks.

    Example:

    >>> import numpy as np
    >>> unfold(np.zeros((2, 3, 4)), 1).shape
    (3, 8)
    """
    tensor = real_array("tensor", tensor, "unfold")
    mode = _mode(mode, tensor, "unfold")
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def _mode(mode: int, tensor: np.ndarray, owner: str) -> int:
    """An axis of a tensor, counted from its start."""
    if not is_int(mode, -tensor.ndim, tensor.ndim - 1) or 0 in tensor.shape:
        what = f"an axis of a tensor that is not empty, here of shape {tensor.shape}"
        raise refusal("mode", mode, owner, what)
    return int(mode) % tensor.ndim


def mode_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n product: every mode-n fibre multiplied by `matrix`.

    Args:
        tensor: array of shape `(..., d_n, ...)`.
        matrix: array of shape `(rows, d_n)`.
        mode: int, the axis.

    Returns:
        An array of shape `(..., rows, ...)`.

    Raises:
        ValueError: on shapes that don't fit, on what is no array of real numbers.

    Example:

    >>> import numpy as np
    >>> mode_product(np.zeros((2, 3, 4)), np.zeros((5, 3)), 1).shape
    (2, 5, 4)
    """
    owner = "mode_product"
    tensor = real_array("tensor", tensor, owner)
    matrix = real_array("matrix", matrix, owner)
    mode = _mode(mode, tensor, owner)
    if matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]:
        what = f"a matrix with {tensor.shape[mode]} columns"
        raise refusal("matrix", matrix, owner, what)
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, mode)), 0, mode)


def scaled(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers brought to about one, so that their squares neither overflow nor vanish.

    Args:
        values: float array of finite numbers.

    Returns:
        `(scaled, exponent)`: `values = scaled * 2**exponent` without any rounding, and the
        largest absolute value of `scaled` is in [0.5, 1), or 0.

    Example:

    >>> import numpy as np
    >>> scaled(np.array([6.0, -1.0]))
    (array([ 0.75 , -0.125]), 3)
    """
    exponent = int(np.frexp(np.max(np.abs(values), initial=0.0))[1])
    return np.ldexp(values, -exponent), exponent


def unscaled(values: np.ndarray, exponent: ArrayLike, owner: str) -> np.ndarray:
    """Numbers brought back to the scale of what they were computed from.

    Args:
        values: float array of finite numbers.
        exponent: int or array of ints, as from `scaled`.
        owner: str, the function to name in the error.

    Raises:
        ValueError: if the result is beyond the range of floats.

    Example:

    >>> import numpy as np
    >>> unscaled(np.array([0.75, -0.125]), 3, "tucker")
    array([ 6., -1.])
    """
    with np.errstate(over="ignore"):
        found = np.ldexp(values, exponent)
    if not np.all(np.isfinite(found)):
        largest = float(np.max(np.abs(values)))
        raise ValueError(
            f"{owner}: expected numbers from which a result follows that floats can hold. "
            f"Received: numbers of such a scale that the result is up to {largest:.3g} "
            f"times 2^{int(np.max(exponent))}; divide them by a power of two first."
        )
    return found


def whitener(covariance: Tensor) -> Tensor:
    """The inverse `L^-1` of the Cholesky factor of a covariance `S = L L^T`.

    Args:
        covariance: tensor `(..., d, d)`, symmetric positive definite.

    Returns:
        A tensor of the same shape, lower triangular.

    Raises:
        ValueError: on what are no square matrices, not finite, or not positive definite.
    """
    covariance = real_tensor("covariance", covariance, "whitener")
    shape = tuple(covariance.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or 0 in shape:
        raise refusal("covariance", covariance, "whitener", "square matrices")
    covariance = checked(
        covariance,
        ops.all(ops.isfinite(covariance)),
        "whitener: `covariance` must be finite. Received: NaN or infinite values.",
    )
    factor = from_keras("whitener", ops.cholesky, x=covariance)
    identity = ops.broadcast_to(ops.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return ops.solve_triangular(factor, identity, lower=True)
