"""The weights of the tasks' losses: numbers, or variables that may move."""

import math
import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any, Self, TypeAlias

import keras
from keras import tree

from dmtrl_keras.ground.types import Tensor

# A number or a scalar `keras.Variable`, or a list of them for a list of losses.
Weight: TypeAlias = Any


@keras.saving.register_keras_serializable("dmtrl_keras")
class LossWeight:
    """A variable as the weight of a loss, so that it can be saved (not for direct use).

    Args:
        value: a scalar `keras.Variable`, or a float to make one of.
        dtype: that of the variable to make.

    Attributes:
        variable: the variable.
    """

    def __init__(self, value: Any, dtype: str | None = None) -> None:
        if not isinstance(value, keras.Variable):
            value = keras.Variable(value, dtype=dtype, trainable=False, name="loss_weight")
        self.variable = value

    def get_config(self) -> dict[str, Any]:
        """The value as it is now, and the dtype."""
        value = float(keras.ops.convert_to_numpy(self.variable))
        return {"value": value, "dtype": self.variable.dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`."""
        return cls(**config)


class MovingWeights(keras.metrics.Metric):
    """The state of all loss weights that are variables (not for direct use).

    It measures nothing. But the state of metrics is what Keras hands through a step on
    every backend beside that of the network, and a network isn't to have other weights
    because of how it is trained.

    Args:
        variables: list of different variables.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        super().__init__(name="moving_weights")
        self.moving = list(variables)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to add."""

    def reset_state(self) -> None:
        """Weights go on through the epochs."""

    def result(self) -> dict[str, Tensor]:
        """Nothing to log."""
        return {}

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """For files of weights."""
        for index, variable in enumerate(self.moving):
            store[str(index)] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store: dict[str, Any]) -> None:
        """Files of a model that was compiled with other weights are left aside."""
        if len(store.keys()) == len(self.moving):
            for index, variable in enumerate(self.moving):
                variable.assign(store[str(index)])


def weights_by_task(
    given: Any, losses: Mapping[str, Any], idle: Set[str], owner: str
) -> dict[str, Weight]:
    """The weight of every task that has a loss.

    Args:
        given: what the user gave as `loss_weights`.
        losses: dict from the tasks with a loss to the loss, or to a list of them.
        idle: tasks whose weight does nothing.
        owner: str, the model to name in the error.

    Returns:
        A dict by task of floats and `LossWeight` objects, of lists where there is a list of
        losses.

    Raises:
        ValueError: if it is no dict of numbers and scalar variables, or has tasks that have
            no loss.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{owner}: `loss_weights` must be a dict by task name. Received: {given!r}."
        )
    without = sorted(set(given) - set(losses) - idle)
    if without:
        raise ValueError(
            f"{owner}: `loss_weights` for tasks without a loss: {without}. "
            f"Received: loss for {sorted(losses)}."
        )

    def checked(task: str, weight: Any) -> Any:
        if isinstance(weight, LossWeight):
            return weight
        if isinstance(weight, keras.Variable) and tuple(weight.shape) == ():
            return LossWeight(weight)
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight)):
            raise ValueError(
                f"{owner}: expected `loss_weights` of finite numbers or scalar "
                f"keras.Variable objects. Received: {task!r}: {weight!r}."
            )
        return float(weight)

    weights = {}
    for task, loss in losses.items():
        weight = given.get(task, 1.0)
        if not isinstance(loss, (list, tuple)):
            weights[task] = checked(task, weight)
            continue
        # One weight for all losses of a task, or one for each.
        several = weight if isinstance(weight, (list, tuple)) else [weight] * len(loss)
        if len(several) != len(loss):
            raise ValueError(
                f"{owner}: expected one of `loss_weights` for all losses of task {task!r}, "
                f"or {len(loss)}. Received: {weight!r}."
            )
        weights[task] = [checked(task, own) for own in several]
    return weights


def moving_weights(weights: Mapping[str, Weight]) -> list[MovingWeights]:
    """The state of those of the weights by task that are variables, if there are any."""
    flat = [w for w in tree.flatten(dict(weights)) if isinstance(w, LossWeight)]
    # JAX hands over no state twice.
    variables = {id(weight.variable): weight.variable for weight in flat}
    return [MovingWeights(list(variables.values()))] if variables else []


def as_given(weight: Weight) -> Weight:
    """A weight as the user gave it: numbers, and variables themselves."""
    return tree.map_structure(
        lambda own: own.variable if isinstance(own, LossWeight) else own, weight
    )
