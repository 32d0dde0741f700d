"""Sparse inverse task covariances, by the graphical lasso on the host."""

import importlib.util
from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_number, check_positive
from dmtrl_keras.mrn.report import priors_of
from dmtrl_keras.mrn.tensor_normal import check_covariance


def graphical_lasso(covariance: Tensor, alpha: float) -> np.ndarray:
    """A covariance whose inverse is sparse, by scikit-learn's graphical lasso.

    `argmin_P tr(S P) - ln|P| + alpha sum_{i != j} |P_ij|`, inverted: a zero of the
    precision P says that two tasks are independent given the others. Zhang & Schneider
    (NIPS 2010, "Learning multiple tasks with a sparse matrix-normal penalty") have it in
    the place of the update of DRN Eq. 13.

    Args:
        covariance: `(d, d)`, the estimate S.
        alpha: float, not negative; of the size of S's entries and smaller.

    Returns:
        A float64 NumPy array `(d, d)`.

    Raises:
        ValueError: on what is no covariance.
        ImportError: without scikit-learn, which is not among the library's requirements.

    Example:

    >>> import numpy as np
    >>> one = np.array([[1.0, 0.8, 0.1], [0.8, 1.0, 0.1], [0.1, 0.1, 1.0]])
    >>> np.linalg.inv(graphical_lasso(one, 0.2)).round(1)[2].tolist()
    [0.0, 0.0, 1.0]
    """
    owner = "graphical_lasso"
    check_number("alpha", alpha, owner)
    matrix = check_covariance(covariance, owner)
    _require()
    from sklearn.covariance import graphical_lasso as of_sklearn

    if len(matrix) == 1:
        return matrix
    # The problem in units in which the mean variance is one.
    scale = np.trace(matrix) / len(matrix)
    found, _ = of_sklearn(matrix / scale, alpha=alpha / scale, max_iter=500)
    return found * scale


def _require() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "graphical_lasso: expected scikit-learn, which is not installed "
            "(pip install scikit-learn)."
        )


class SparseTaskPrecision(keras.callbacks.Callback):
    """Makes the inverse task covariances of a model's priors sparse, while it trains.

    At the end of an epoch every prior with a task mode is updated from its kernel as in DRN
    Eq. 13, and the task covariance put through `graphical_lasso`. That runs on the host:
    the prior itself must not update in between, `update_every=None`.

    Args:
        alpha: float, not negative, of the graphical lasso. The covariances have a mean
            variance of one unless their `trace` says otherwise.
        every: positive int, epochs from one update to the next.

    Raises:
        ValueError: on malformed arguments; when training begins, if no layer learns a task
            covariance, or one updates by itself.
        ImportError: without scikit-learn.

    Example:

    >>> from dmtrl_keras import TensorNormalRegularizer, relationship_network
    >>> from dmtrl_keras.regularizers import SparseTaskPrecision
    >>> prior = TensorNormalRegularizer(0.3, epsilon=0.01, update_every=None, mean="start")
    >>> model = relationship_network((4,), ["a", "b", "c"], 2, 3, prior)
    >>> callback = SparseTaskPrecision(alpha=0.1)  # model.fit(..., callbacks=[callback])
    """

    def __init__(self, alpha: float, every: int = 1) -> None:
        super().__init__()
        owner = type(self).__name__
        self.alpha = check_number("alpha", alpha, owner)
        self.every = check_positive("every", every, owner)

    def on_train_begin(self, logs: Any = None) -> None:
        _require()
        for name, prior in priors_of(self.model, type(self).__name__).items():
            if prior.regularizer.update_every is not None:
                raise ValueError(
                    f"{type(self).__name__}: expected priors with update_every=None, whose "
                    f"covariances nothing else updates. Received: layer {name!r} with "
                    f"update_every={prior.regularizer.update_every}."
                )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (epoch + 1) % self.every:
            return
        priors = priors_of(self.model, type(self).__name__).values()
        for prior in priors:
            prior.update()
        # After all of them, since some may share a covariance.
        for covariance in {id(c): c for c in (p.modes["task"] for p in priors)}.values():
            matrices = keras.ops.convert_to_numpy(covariance.covariance)
            flat = matrices.reshape(-1, *matrices.shape[-2:])
            sparse = [graphical_lasso(matrix, self.alpha) for matrix in flat]
            covariance.set(np.reshape(sparse, matrices.shape))
