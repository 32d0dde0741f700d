"""How the tasks of a network are related, as it was learned: matrices and diagrams."""

from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.ground.validation import check_model, refusal
from dmtrl_keras.mrn.state import TensorNormalState


def mode_covariance(model: keras.Model, mode: str = "task") -> dict[str, np.ndarray]:
    """The learned covariance of one mode of each kernel with a tensor-normal prior.

    `Sigma_k` of DRN Eq. 8 and 13 and of MRN's prior: of the tasks, the classes (how alike
    the kernels of two classes are, for all tasks), or the features.

    Args:
        model: a built model.
        mode: `"task"`, `"class"`, `"feature"`, or whatever the kernel's axes are called.

    Returns:
        A dict from layer name to a NumPy array `(d_k, d_k)`, or `(n, d_k, d_k)` where the
        prior learns one for each of n classes (`each="class"`).

    Raises:
        ValueError: if no layer learns a covariance of this mode, or a kernel is not finite.

    Example:

    >>> from dmtrl_keras import mode_covariance, relationship_network
    >>> network = relationship_network((16,), ["amazon", "webcam"], classes=3, prior="mrn")
    >>> {name: c.shape for name, c in mode_covariance(network, "class").items()}
    {'bottleneck': (256, 256), 'classifier': (3, 3)}
    """
    return _covariances(model, mode, "mode_covariance")


def mode_correlation(model: keras.Model, mode: str = "task") -> dict[str, np.ndarray]:
    """The learned correlations of one mode, `S_ij / sqrt(S_ii S_jj)`, of each layer.

    Args:
        model: a built model.
        mode: as for `mode_covariance`.

    Returns:
        A dict like that of `mode_covariance`, of values in [-1, 1].

    Raises:
        ValueError: as `mode_covariance`.

    Example:

    >>> from dmtrl_keras import mode_correlation, relationship_network
    >>> network = relationship_network((16,), ["amazon", "webcam"], classes=3, prior="mrn")
    >>> mode_correlation(network, "class")["classifier"].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    found = _covariances(model, mode, "mode_correlation")
    return {name: correlation(matrix) for name, matrix in found.items()}


def _covariances(model: keras.Model, mode: str, owner: str) -> dict[str, np.ndarray]:
    if not isinstance(mode, str):
        raise refusal("mode", mode, owner, "a string, such as 'task', 'class', 'feature'")
    found = priors_of(model, owner, mode)
    return {name: prior.covariances[mode] for name, prior in found.items()}


def task_covariance(model: keras.Model) -> dict[str, np.ndarray]:
    """The learned task covariance of each layer with a tensor-normal prior (DRN Eq. 13).

    That of another mode: `mode_covariance`.

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
    return _covariances(model, "task", "task_covariance")


def priors_of(
    model: keras.Model, owner: str, mode: str = "task"
) -> dict[str, TensorNormalState]:
    """The priors that learn a covariance of a mode, by layer name.

    Raises:
        ValueError: if there is none.
    """
    found, seen, modes = {}, set(), set()
    for layer in flatten_layers(check_model(model, owner)):
        # A layer comes before the child that holds its kernel, which has the same prior.
        prior: Any = getattr(layer, "prior", None)
        fresh = isinstance(prior, TensorNormalState) and id(prior) not in seen
        seen.add(id(prior))
        if fresh:
            modes |= set(prior.modes)
        if fresh and mode in prior.modes:
            found[layer.name] = prior
    if not found:
        known = sorted(map(str, modes))
        expected = f"Expected: one of {known}" if known else "See TensorNormalRegularizer"
        raise ValueError(
            f"{owner}: model {model.name!r} has no layer that learns a {mode} covariance. "
            f"{expected}. Received: mode={mode!r}."
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
    found = _covariances(model, "task", "task_correlation")
    return {name: correlation(matrix) for name, matrix in found.items()}


def correlation(matrix: np.ndarray) -> np.ndarray:
    """The correlations of a covariance; 0 where there is no variance."""
    # Products of variances beyond float32 are within float64.
    matrix = np.asarray(matrix, "float64")
    deviation = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    deviation = np.where(deviation == 0, np.inf, deviation)
    return matrix / deviation[..., :, None] / deviation[..., None, :]
