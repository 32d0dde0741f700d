"""State that learns beside a kernel: the slot of priors and of choices among kernels."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_bool, check_positive

_WINDOWS = {
    0: (),
    1: ("length",),
    2: ("height", "width"),
    3: ("depth", "height", "width"),
}


def state_weight(layer: keras.layers.Layer, name: str, value: np.ndarray) -> keras.Variable:
    """A variable of a layer that is computed from its weights, not trained.

    State derived from weights is the same on all replicas: nothing to aggregate, which is
    also what may be assigned after an `ops.cond`.

    Args:
        layer: the layer that gets it.
        name: str.
        value: NumPy array, its start; ints and bools keep their dtype, floats get that of
            the layer's variables.

    Returns:
        A `keras.Variable`.
    """
    value = np.asarray(value)
    return layer.add_weight(
        name=name,
        shape=value.shape,
        initializer=lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype),
        trainable=False,
        autocast=False,
        aggregation="none",
        dtype=value.dtype.name if value.dtype.kind in "ib" else layer.variable_dtype,
    )


def mode_names(order: int, task_axis: bool) -> tuple[str, ...]:
    """The names of a kernel's modes, from the axes that Keras gives it.

    Args:
        order: int, the number of axes.
        task_axis: bool, whether the last axis is that of the tasks.

    Returns:
        A tuple of strings, such as `("height", "width", "feature", "class", "task")`: input
        channels are features and output channels classes, as in the papers. Axes without
        a name of their own are `axis_0`, ...

    Raises:
        ValueError: on malformed arguments.

    Example:

    >>> mode_names(3, task_axis=True), mode_names(2, task_axis=False)
    (('feature', 'class', 'task'), ('feature', 'class'))
    """
    check_positive("order", order, "mode_names", most=64)
    check_bool("task_axis", task_axis, "mode_names")
    tail = ("feature", "class", "task") if task_axis else ("feature", "class")
    window = _WINDOWS.get(order - len(tail))
    if window is None:
        return tuple(f"axis_{axis}" for axis in range(order))
    return (*window, *tail)


class KernelState(keras.layers.Layer):
    """What learns beside a kernel and penalizes it (not for direct use).

    A child of the layer that has the kernel, which calls `penalty` for its losses, and the
    state itself in its own `call`. It never has inputs; `call(training)` updates it in
    training. It must be of full precision, so that it sees the kernel uncast.
    """

    def penalty(self, kernel: Tensor) -> Tensor:
        """The penalty on the kernel, a scalar."""
        raise NotImplementedError


class StatePenalty(keras.regularizers.Regularizer):
    """The penalty of a state as the regularizer of a variable, which Keras 3.13 asks for.

    Args:
        state: the state.
    """

    def __init__(self, state: KernelState) -> None:
        self._state = state

    def __call__(self, x: Tensor) -> Tensor:
        return self._state.penalty(x)


class KernelRegularizer(keras.regularizers.Regularizer):
    """A penalty on the stacked kernel of T tasks, which says nothing about one alone.

    Attributes:
        proximal: bool; the penalty has no gradient, and after each step the variable
            becomes what `proximal_step(value, step size)` returns. It takes a
            `ProximalOptimizer`, and a kernel that is a variable.
    """

    proximal = False


class StatefulRegularizer(KernelRegularizer):
    """A penalty on a kernel that depends on state which learns with it.

    It holds settings, never variables: every kernel that it is given to gets a state of its
    own. The layers with T kernels take one as `kernel_regularizer`.
    """

    def new_state(
        self,
        kernel: Callable[[], Tensor],
        shape: tuple[int, ...],
        names: tuple[str, ...],
        owner: str,
        dtype: str,
    ) -> KernelState:
        """The state of one kernel, not built.

        It is built once the kernel has its start values, which it may keep.

        Args:
            kernel: function without arguments that returns the kernel.
            shape: tuple, the shape of the kernel.
            names: tuple of strings, the names of its modes, see `mode_names`.
            owner: str, the layer to name in errors.
            dtype: str, dtype of the state.
        """
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """Refused: without its state there is no penalty."""
        raise ValueError(
            f"{type(self).__name__}: a plain Keras layer can't update the state that "
            f"learns with its kernel, here of shape {tuple(x.shape)}. {self.hint}"
        )

    # What to do instead, for the error.
    hint = "Give it to a layer with T kernels, such as TaskDense."
