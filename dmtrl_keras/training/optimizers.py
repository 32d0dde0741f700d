"""Learning rates by layer."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import keras

from dmtrl_keras.ground.keras_private import own_variables, step_methods, variable_index
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import is_real, shown


@keras.saving.register_keras_serializable("dmtrl_keras")
class LearningRateMultiplier(keras.optimizers.Optimizer):
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
        if not isinstance(optimizer, keras.optimizers.Optimizer) or optimizer.built:
            raise ValueError(
                f"{owner}: `optimizer` must be a Keras optimizer that was not used yet. "
                f"Received: {optimizer!r}."
            )
        valid = isinstance(multipliers, dict) and all(
            isinstance(pattern, str) and is_real(factor) and 0 <= factor < math.inf
            for pattern, factor in multipliers.items()
        )
        if not valid:
            raise ValueError(
                f"{owner}: `multipliers` must be a dict from layer name or pattern to a "
                f"number that is not negative. Received: {shown(multipliers)}."
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = optimizer
        self.multipliers = dict(multipliers)
        self._factors: list[float] = []
        # Keras has no such argument: the one place that all of an optimizer's ways to take
        # a step go through is wrapped, on this one object.
        for name, variables_of in step_methods(optimizer):
            self._wrap(name, variables_of)

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
