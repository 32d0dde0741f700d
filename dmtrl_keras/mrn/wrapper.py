"""A prior over the kernel of any Keras layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras

from dmtrl_keras.conversion.rules import Rule, register_rule
from dmtrl_keras.ground.backend import full_precision
from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.types import Shape, Tensor
from dmtrl_keras.ground.validation import from_keras, is_list, name_of, refusal
from dmtrl_keras.kernels.state import StatePenalty, mode_names
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer


@keras.saving.register_keras_serializable("dmtrl_keras")
class TensorNormalPrior(CheckedLayer, keras.layers.Wrapper):
    """Any Keras layer, with a tensor-normal prior over its kernel.

    The layers with T kernels take a `TensorNormalRegularizer` as `kernel_regularizer`. An
    ordinary layer could not update the covariances while it trains; this wrapper does it
    for it. The layer may already be built, such as a pretrained one.

    Args:
        layer: a Keras layer.
        regularizer: a `TensorNormalRegularizer`.
        kernel: str, the attribute of the layer that has the variable.
        axes: the names of the variable's axes, a tuple of distinct strings; `"task"` among
            them if one axis is that of the tasks. None: `"height"`, `"width"`,
            ..., `"feature"`, `"class"`, by the number of axes.
        **kwargs: `name`, `trainable`, `dtype`.

    Attributes:
        prior: the learned state; `prior.covariances` is a dict by mode name.

    Input shape:
        That of the layer.

    Output shape:
        That of the layer.

    Raises:
        ValueError: if the layer has no such variable, or a regularizer of its own; on modes
            that the variable does not have.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import TensorNormalRegularizer
    >>> from dmtrl_keras.layers import TensorNormalPrior
    >>> matrix_normal = TensorNormalRegularizer(modes=("feature", "class"))
    >>> layer = TensorNormalPrior(keras.layers.Dense(3), matrix_normal)
    >>> outputs = layer(np.zeros((2, 4), "float32"))
    >>> tuple(outputs.shape), sorted(layer.prior.covariances)
    ((2, 3), ['class', 'feature'])
    """

    # How many the layer takes, it says itself.
    _takes_several = (list, tuple, dict)
    _expected = "a tensor, or a list or a dict of tensors"

    @property
    def _minimum_ndim(self) -> int:
        return 1

    def __init__(
        self,
        layer: keras.layers.Layer,
        regularizer: TensorNormalRegularizer,
        kernel: str = "kernel",
        axes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise refusal("layer", layer, type(self).__name__, "a Keras layer")
        super().__init__(layer, **kwargs)
        if not isinstance(kernel, str):
            raise refusal("kernel", kernel, name_of(self), "the name of an attribute")
        if axes is not None and not (
            is_list(axes)
            and all(isinstance(axis, str) for axis in axes)
            and len(set(axes)) == len(axes)
        ):
            raise refusal("axes", axes, name_of(self), "distinct strings, or None")
        if not isinstance(regularizer, TensorNormalRegularizer):
            what = "a TensorNormalRegularizer"
            raise refusal("regularizer", regularizer, name_of(self), what)
        self.regularizer = regularizer
        self.kernel_name = kernel
        self.axes = None if axes is None else tuple(axes)
        self.prior: Any = None
        self.supports_masking = layer.supports_masking

    @property
    def kernel(self) -> keras.Variable:
        """The variable that the prior is over."""
        return getattr(self.layer, self.kernel_name, None)

    def build(self, input_shape: Any = None) -> None:
        from_keras(name_of(self), super().build, input_shape=input_shape)
        kernel = self.kernel
        if not isinstance(kernel, keras.Variable):
            raise ValueError(
                f"{name_of(self)}: expected a layer with a variable `{self.kernel_name}`. "
                f"Received: {self.layer!r}, where it is {type(kernel).__name__}."
            )
        if kernel.regularizer is not None:
            raise ValueError(
                f"{name_of(self)}: the variable {kernel.path!r} has a regularizer already, "
                f"and can't have two. Received: {kernel.regularizer!r}."
            )
        names = self.axes
        if names is None:
            names = mode_names(len(kernel.shape), task_axis=False)
        if len(set(names)) != len(kernel.shape):
            raise ValueError(
                f"{name_of(self)}: `axes` must name the {len(kernel.shape)} axes of the "
                f"kernel {tuple(kernel.shape)}. Received: axes={names!r}."
            )
        self.prior = self.regularizer.new_state(
            lambda: self.kernel,
            tuple(kernel.shape),
            names,
            name_of(self),
            full_precision(self.layer.variable_dtype),
        )
        self.prior.build()
        kernel.regularizer = StatePenalty(self.prior)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Tensor:
        # Of a frozen kernel nothing is learned.
        learns = self.trainable and self.layer.trainable
        self.prior(training=bool(training) and learns)
        return self.layer(inputs, **kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, mask)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "regularizer": keras.saving.serialize_keras_object(self.regularizer),
            "kernel": self.kernel_name,
            "axes": self.axes,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        config = dict(config)
        for name in ("layer", "regularizer"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


class _Prior(Rule):
    """In a network of one task there is no prior: it is for training."""

    has_weights = True

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        return "it has a prior of its own; give `multitask` the layer and `prior`"

    def alone(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        return layer.layer


register_rule(TensorNormalPrior, rule=_Prior())
