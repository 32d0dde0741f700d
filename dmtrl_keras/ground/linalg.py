"""Linear algebra that several rooms need: unfoldings, mode products, whiteners."""

import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.types import Tensor


def unfold(tensor: ArrayLike, mode: int) -> np.ndarray:
    """The mode-n unfolding: mode-n fibres as columns, `(d_n, prod of others)`.

    Args:
        tensor: array of any shape.
        mode: int, the axis that becomes the rows.

    Returns:
        A matrix of shape `(tensor.shape[mode], tensor.size / tensor.shape[mode])`.

    Example:

    >>> import numpy as np
    >>> unfold(np.zeros((2, 3, 4)), 1).shape
    (3, 8)
    """
    tensor = np.asarray(tensor)
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n product: every mode-n fibre multiplied by `matrix`.

    Args:
        tensor: array of shape `(..., d_n, ...)`.
        matrix: array of shape `(rows, d_n)`.
        mode: int, the axis.

    Returns:
        An array of shape `(..., rows, ...)`.

    Example:

    >>> import numpy as np
    >>> mode_product(np.zeros((2, 3, 4)), np.zeros((5, 3)), 1).shape
    (2, 5, 4)
    """
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, mode)), 0, mode)


def whitener(covariance: Tensor) -> Tensor:
    """The inverse `L^-1` of the Cholesky factor of a covariance `S = L L^T`.

    Args:
        covariance: tensor `(..., d, d)`, symmetric positive definite.

    Returns:
        A tensor of the same shape, lower triangular.
    """
    factor = ops.cholesky(covariance)
    identity = ops.broadcast_to(ops.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return ops.solve_triangular(factor, identity, lower=True)
