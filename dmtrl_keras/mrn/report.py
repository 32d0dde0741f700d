"""How the tasks of a network are related, as it was learned: matrices and diagrams."""

from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.ground.validation import check_model
from dmtrl_keras.mrn.state import TensorNormalState


def task_covariance(model: keras.Model) -> dict[str, np.ndarray]:
    """The learned task covariance of each layer with a tensor-normal prior (DRN Eq. 13).

    Args:
        model: a built model.

    Returns:
        A dict from layer name to a NumPy array `(T, T)`, or `(n, T, T)` where the prior
        learns one for each of n classes (`each="class"`).

    Raises:
        ValueError: if no layer learns a task covariance, or a kernel is not finite.

    Example:

    >>> import keras
    >>> from dmtrl_keras import TensorNormalRegularizer, layers, task_covariance
    >>> inputs = keras.Input((8,))
    >>> prior = TensorNormalRegularizer()
    >>> outputs = layers.TaskDense(
    ...     4, tasks=2, shared_input=True, kernel_regularizer=prior, name="fc8"
    ... )(inputs)
    >>> task_covariance(keras.Model(inputs, outputs))["fc8"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    priors = task_priors(model, "task_covariance")
    return {name: prior.covariances["task"] for name, prior in priors.items()}


def task_priors(model: keras.Model, owner: str) -> dict[str, TensorNormalState]:
    """The priors that learn a task covariance, by layer name.

    Raises:
        ValueError: if there is none.
    """
    found, seen = {}, set()
    for layer in flatten_layers(check_model(model, owner)):
        # A layer comes before the child that holds its kernel, which has the same prior.
        prior: Any = getattr(layer, "prior", None)
        fresh = isinstance(prior, TensorNormalState) and id(prior) not in seen
        seen.add(id(prior))
        if fresh and "task" in prior.modes:
            found[layer.name] = prior
    if not found:
        raise ValueError(
            f"{owner}: model {model.name!r} has no layer that learns a task covariance; "
            "see TensorNormalRegularizer."
        )
    return found


def task_correlation(model: keras.Model) -> dict[str, np.ndarray]:
    """The learned task correlations, `S_ij / sqrt(S_ii S_jj)`, of each layer.

    Args:
        model: a built model.

    Returns:
        A dict like that of `task_covariance`, of values in [-1, 1].

    Raises:
        ValueError: as `task_covariance`.

    Example:

    >>> from dmtrl_keras import relationship_network, task_correlation
    >>> network = relationship_network((16,), ["amazon", "webcam"], classes=3)
    >>> sorted(task_correlation(network))
    ['bottleneck', 'classifier']
    """
    return {name: _correlation(matrix) for name, matrix in task_covariance(model).items()}


def _correlation(matrix: np.ndarray) -> np.ndarray:
    # Products of variances beyond float32 are within float64.
    matrix = np.asarray(matrix, "float64")
    deviation = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    return matrix / deviation[..., :, None] / deviation[..., None, :]
