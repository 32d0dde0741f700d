"""Optimizers around another: learning rates by layer, and proximal steps."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import keras

from dmtrl_keras.ground.keras_private import own_variables, step_methods, variable_index
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import is_real, shown


class _Around(keras.optimizers.Optimizer):
    """Any Keras optimizer, whose steps are changed; all else is that optimizer's.

    Keras has no such hook: the one place that all of an optimizer's ways to take a step go
    through is wrapped, on this one object.

    Args:
        optimizer: a Keras optimizer that was not used yet; it then belongs to this one.
        name: str.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, name: str | None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = optimizer
        for method, variables_of in step_methods(optimizer):
            self._wrap(method, variables_of)

    def _wrap(self, name: str, variables_of: Callable[[Any], Sequence[Any]]) -> None:
        """Replace a method of the optimizer that takes steps."""
        raise NotImplementedError

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Make the state of the wrapped optimizer.

        Args:
            var_list: the trainable variables.
        """
        self.inner_optimizer.build(var_list)
        super().build(var_list)

    @property
    def variables(self) -> list[keras.Variable]:
        return own_variables(self) + self.inner_optimizer.variables

    def apply(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Any = None,
    ) -> None:
        if not self.built:
            self.build(trainable_variables)
        self.inner_optimizer.apply(grads, trainable_variables)

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor],
        trainable_variables: Sequence[Tensor],
    ) -> tuple[Any, list[Tensor]]:
        own = len(own_variables(self))
        trained, inner = self.inner_optimizer.stateless_apply(
            optimizer_variables[own:], grads, trainable_variables
        )
        # Keras's loss scaling passes variables here, where others pass their values.
        unchanged = [keras.ops.convert_to_tensor(v) for v in optimizer_variables[:own]]
        return trained, [*unchanged, *inner]

    @property
    def learning_rate(self) -> Tensor:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> Tensor:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> keras.Variable:
        return self.inner_optimizer.iterations

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)


def _check_unused(optimizer: Any, owner: str) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer) or optimizer.built:
        raise ValueError(
            f"{owner}: `optimizer` must be a Keras optimizer that was not used yet. "
            f"Received: {optimizer!r}."
        )


@keras.saving.register_keras_serializable("dmtrl_keras")
class LearningRateMultiplier(_Around):
    """Any Keras optimizer, with the learning rate of some layers multiplied.

    New layers on a pretrained trunk usually learn faster than the trunk; DRN's learn 10
    times faster. The multiplier is that of the step, not of the gradient, so that it also
    works where the gradient's scale makes no difference, as in Adam. Decoupled weight decay
    goes by the rate without it. Schedules, `optimizer.learning_rate = ...`, gradient
    clipping and accumulation are those of the optimizer that is wrapped.

    Args:
        optimizer: a Keras optimizer that was not used yet; it then belongs to this one.
        multipliers: dict from layer name, or pattern such as `"conv5_*"`, to a factor, not
            negative. The first that fits holds; layers that none fits have 1. Layers of a
            nested model go by their own names.
        name: str.

    Raises:
        ValueError: on malformed arguments; when it is built, on patterns that fit no layer
            with trainable weights.

    Example:

    >>> import keras
    >>> from dmtrl_keras.optimizers import LearningRateMultiplier
    >>> sgd = keras.optimizers.SGD(1e-3, momentum=0.9)
    >>> optimizer = LearningRateMultiplier(sgd, {"bottleneck": 10, "classifier": 10})
    >>> float(optimizer.learning_rate)
    0.0010000000474974513
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        multipliers: dict[str, float],
        name: str | None = None,
    ) -> None:
        owner = type(self).__name__
        _check_unused(optimizer, owner)
        valid = isinstance(multipliers, dict) and all(
            isinstance(pattern, str) and is_real(factor) and 0 <= factor < math.inf
            for pattern, factor in multipliers.items()
        )
        if not valid:
            raise ValueError(
                f"{owner}: `multipliers` must be a dict from layer name or pattern to a "
                f"number that is not negative. Received: {shown(multipliers)}."
            )
        super().__init__(optimizer, name)
        self.multipliers = dict(multipliers)
        self._factors: list[float] = []

    def _wrap(self, name: str, variables_of: Callable[[Any], Sequence[Any]]) -> None:
        inner = self.inner_optimizer
        step = getattr(inner, name)

        def update(gradients: Any, variables: Any, learning_rate: Tensor) -> None:
            groups: dict[float, list[int]] = {}
            for index, variable in enumerate(variables_of(variables)):
                factor = self._factors[variable_index(inner, variable)]
                groups.setdefault(factor, []).append(index)
            for factor, indices in groups.items():
                rate = learning_rate if factor == 1 else learning_rate * factor
                if len(groups) == 1:
                    step(gradients, variables, rate)
                else:
                    own = [variables[i] for i in indices]
                    step([gradients[i] for i in indices], own, rate)

        setattr(inner, name, update)

    def _factor(self, variable: keras.Variable) -> float:
        layers = variable.path.split("/")[:-1]
        for pattern, factor in self.multipliers.items():
            if fnmatch.filter(layers, pattern):
                return float(factor)
        return 1.0

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Make the state of the wrapped optimizer.

        Args:
            var_list: the trainable variables.
        """
        self._factors = [self._factor(variable) for variable in var_list]
        layers = {part for v in var_list for part in v.path.split("/")[:-1]}
        for pattern in self.multipliers:
            if not fnmatch.filter(layers, pattern):
                raise ValueError(
                    f"{type(self).__name__}: each key of `multipliers` must fit a layer "
                    f"with trainable weights. Received: {pattern!r}, which fits none of "
                    f"{sorted(layers)}."
                )
        super().build(var_list)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "optimizer": keras.optimizers.serialize(self.inner_optimizer),
            "multipliers": self.multipliers,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        optimizer = keras.optimizers.deserialize(config["optimizer"], custom_objects)
        return cls(optimizer, config["multipliers"], config["name"])


@keras.saving.register_keras_serializable("dmtrl_keras")
class ProximalOptimizer(_Around):
    """SGD with proximal steps, for penalties that are not smooth.

    After each step of size eta the variables whose regularizer has `proximal=True`, such as
    `regularizers.TraceNorm(0.01, proximal=True)`, become

    `argmin_Z |Z - W|^2 / 2 + eta penalty(Z)`,

    for which there is a formula (the singular values shrink by `eta strength`). So kernels
    become of low rank, or groups of their entries zero, exactly; by a gradient they never
    do. It is done on the device, as part of the step, whatever the backend; constraints
    come after it. Of the regularizers without `proximal` there is a gradient, as always.

    The optimizer must be SGD, with or without momentum: only where the step is a multiple
    of the gradient is the point where it ends the minimum of loss and penalty. With a
    momentum m the multiple is `eta = learning_rate / (1 - m)`, which is the size of the
    proximal step. With Adam, use regularizers without `proximal`.

    Args:
        optimizer: `keras.optimizers.SGD` that was not used yet; it then belongs to this
            one.
        name: str.

    Raises:
        ValueError: on another optimizer; when it is built, if no variable has a regularizer
            with `proximal=True`.

    Example:

    >>> import keras
    >>> from dmtrl_keras.optimizers import ProximalOptimizer
    >>> optimizer = ProximalOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    >>> round(float(optimizer.learning_rate), 3)
    0.1
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, name: str | None = None
    ) -> None:
        owner = type(self).__name__
        _check_unused(optimizer, owner)
        if type(optimizer) is not keras.optimizers.SGD:
            raise ValueError(
                f"{owner}: `optimizer` must be a keras.optimizers.SGD, whose step is a "
                f"multiple of the gradient. Received: {optimizer!r}."
            )
        super().__init__(optimizer, name)
        self._proximal: list[Any] = []

    def _wrap(self, name: str, variables_of: Callable[[Any], Sequence[Any]]) -> None:
        inner: Any = self.inner_optimizer
        take_step = getattr(inner, name)

        def update(gradients: Any, variables: Any, learning_rate: Tensor) -> None:
            take_step(gradients, variables, learning_rate)
            eta = learning_rate / (1 - inner.momentum)
            for variable in variables_of(variables):
                # TensorFlow passes its own variables, of which Keras knows the number.
                regularizer = self._proximal[variable_index(inner, variable)]
                if regularizer is not None:
                    value = keras.ops.convert_to_tensor(variable)
                    step = keras.ops.cast(eta, value.dtype)
                    variable.assign(regularizer.proximal_step(value, step))

        setattr(inner, name, update)

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Make the state of the wrapped optimizer.

        Args:
            var_list: the trainable variables.
        """
        self._proximal = [_proximal_of(variable) for variable in var_list]
        if not any(self._proximal):
            raise ValueError(
                f"{type(self).__name__}: expected a trainable variable with a regularizer "
                f"that has `proximal=True`. Received: {[v.path for v in var_list]}."
            )
        super().build(var_list)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "optimizer": keras.optimizers.serialize(self.inner_optimizer),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        optimizer = keras.optimizers.deserialize(config["optimizer"], custom_objects)
        return cls(optimizer, config["name"])


def _proximal_of(variable: Any) -> Any:
    """The regularizer of a variable that wants proximal steps, or None."""
    regularizer = getattr(variable, "regularizer", None)
    return regularizer if getattr(regularizer, "proximal", False) else None


def check_proximal(optimizer: Any, variables: Sequence[keras.Variable], owner: str) -> None:
    """Refuse regularizers that want proximal steps where none are taken.

    Args:
        optimizer: what was given to `compile`.
        variables: the trainable ones.
        owner: str, the model to name in the error.

    Raises:
        ValueError: if a penalty would do nothing.
    """
    asking = [v.path for v in variables if _proximal_of(v) is not None]
    while asking and not isinstance(optimizer, ProximalOptimizer):
        # Keras's loss scaling is around another optimizer too.
        optimizer = getattr(optimizer, "inner_optimizer", None)
        if optimizer is None:
            raise ValueError(
                f"{owner}: expected optimizers.ProximalOptimizer(SGD(...)), without which "
                f"regularizers with `proximal=True` do nothing. Received: none, for the "
                f"variables {asking}."
            )
