"""What becomes of each kind of Keras layer in a network of T tasks, and the way back.

A layer can meet features in several forms: those that all tasks have in common, the
grouped layout, and the batch of the examples of all tasks. On features in common, and
on the batch of all tasks, every Keras layer runs as it is. A rule says how it runs on
the grouped layout, if it can, and which layer one task alone would have.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from keras import tree

from dmtrl_keras.ground.copying import copy_of
from dmtrl_keras.ground.keras_private import (
    convnext_layers,
    inception_resnet_layer,
    is_keras_operation,
)
from dmtrl_keras.ground.types import Shape, Tensor
from dmtrl_keras.ground.validation import refusal
from dmtrl_keras.tasks.conv import TaskConv1D, TaskConv2D, TaskConv3D
from dmtrl_keras.tasks.conv_transpose import (
    TaskConv1DTranspose,
    TaskConv2DTranspose,
    TaskConv3DTranspose,
)
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.dense import TaskDense
from dmtrl_keras.tasks.depthwise import TaskDepthwiseConv1D, TaskDepthwiseConv2D
from dmtrl_keras.tasks.layout import TaskConcatenate, TaskFlatten
from dmtrl_keras.tasks.normalization import (
    TaskLayerNormalization,
    TaskRMSNormalization,
)
from dmtrl_keras.tasks.task_layer import TaskLayer

_RULES: dict[type, "Rule"] = {}

# The depthwise convolutions that there are, by the ordinary ones of the same rank.
_DEPTHWISE: dict[type[TaskLayer], type[TaskLayer]] = {
    TaskConv1D: TaskDepthwiseConv1D,
    TaskConv2D: TaskDepthwiseConv2D,
}

# Keras's normalizations, by those of each task's features.
_NORMALIZATIONS: dict[type, Any] = {
    TaskLayerNormalization: kl.LayerNormalization,
    TaskRMSNormalization: kl.RMSNormalization,
}

# Activations that take every number for itself.
_ELEMENTWISE_ACTIVATIONS = {
    getattr(keras.activations, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh "
        "leaky_relu linear log_sigmoid mish relu relu6 selu sigmoid silu soft_shrink "
        "softplus softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink "
        "threshold"
    ).split()
    if hasattr(keras.activations, name)
}

# Operations of `keras.ops` that do so, by the names of their classes.
_ELEMENTWISE_OPERATIONS = set(
    "Absolute Add Clip Divide Elu Exp Expm1 Gelu HardSigmoid HardSilu LeakyRelu Log Log1p "
    "LogSigmoid Maximum Minimum Multiply Negative Power Reciprocal Relu Relu6 Rsqrt Selu "
    "Sigmoid Sign Silu Softplus Softsign Sqrt Square Subtract Tanh TrueDivide".split()
)


def register_rule(*classes: type, rule: "Rule | None" = None) -> None:
    """Say what `multitask` and `single_task` shall do with a Keras layer class.

    Args:
        *classes: layer classes. A subclass needs a registration of its own, since it may
            compute something else.
        rule: a `Rule`. None: `Rule()`, for layers without weights that treat every
            channel by itself.

    Raises:
        ValueError: on what are no classes of layers, or no rule.

    Example:

    >>> import keras
    >>> from dmtrl_keras.conversion import register_rule
    >>> @keras.saving.register_keras_serializable("example")
    ... class Halve(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return inputs / 2
    >>> register_rule(Halve)
    """
    owner = "register_rule"
    for cls in classes:
        if not isinstance(cls, type) or not issubclass(cls, keras.layers.Layer):
            raise refusal("classes", cls, owner, "classes of Keras layers")
    if not isinstance(rule, (Rule, type(None))):
        raise refusal("rule", rule, owner, "a Rule, or None")
    for cls in classes:
        _RULES[cls] = rule or Rule()


def rule_of(operation: Any) -> "Rule | None":
    """The rule of a layer or operation, or None if there is none."""
    if isinstance(operation, (TaskLayer, TaskCopies)):
        return _TASK_LAYER
    rule = _RULES.get(type(operation))
    if rule is not None or isinstance(operation, kl.Layer):
        return rule
    kind = type(operation)
    known = kind.__name__ in _ELEMENTWISE_OPERATIONS
    return _OPERATION if known and is_keras_operation(operation) else None


def unknown(operation: Any) -> "Rule":
    """What stands for the rule of an operation that has none, or can't follow it.

    It stays as it is; with weights that are trained there are copies of it.
    """
    weights = getattr(operation, "weights", [])
    # What was adapted, such as the frequencies of words, is the same for all tasks. What is
    # quantized was trained.
    quantized = getattr(operation, "quantization_mode", None) is not None
    adapted = operation.trainable and not operation.trainable_variables if weights else True
    trained = weights and (quantized or not adapted)
    return _UNKNOWN if trained else _UNKNOWN_OPERATION


def fitting(
    operation: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    shapes: Sequence[Shape],
) -> "Rule":
    """The rule by which a call is converted.

    Where there is none, or its own does not suit the call, the general way: see `unknown`.

    Args:
        operation: the layer or operation.
        args: arguments of the call; anything stands for the tensors.
        kwargs: likewise.
        shapes: list of the shapes of its inputs.
    """
    rule = rule_of(operation)
    general = unknown(operation)
    if rule is None:
        return general
    constants = (
        value
        for value in tree.flatten((args, kwargs))
        if keras.ops.is_tensor(value) or isinstance(value, (np.ndarray, keras.Variable))
    )
    unfit = (
        # The layout has the channels last.
        getattr(operation, "data_format", None) == "channels_first"
        # A constant is for the channels of one task.
        or any(np.ndim(value) for value in constants)
        # So is a mask, which is for the positions.
        or (kwargs.get("mask") is not None and not isinstance(rule, Kernels))
        or rule.problem(operation, shapes) is not None
    )
    return general if unfit else rule


def alone(operation: Any) -> Any:
    """An operation without what only training needs, see `Rule.alone`."""
    rule = rule_of(operation)
    return operation if rule is None else rule.alone(operation)


def is_elementwise(activation: Any) -> bool:
    """Whether an activation function takes every number for itself."""
    return activation is None or activation in _ELEMENTWISE_ACTIVATIONS


def _edited(
    layer: keras.layers.Layer, cls: type | None = None, **entries: Any
) -> keras.layers.Layer:
    kind: Any = cls or type(layer)
    return kind.from_config({**layer.get_config(), **entries})


class Rule:
    """The rule of layers that treat every channel by itself and have no weights.

    They run on grouped channels as they are. Subclasses are for the others.

    Attributes:
        has_weights: bool, whether every task gets weights of its own.
        is_copied: bool, whether those are in a `TaskCopies`: the general way.
        sharing: str, what `task_summary` calls the layer's way to share where it runs on
            grouped channels.
        of_independent_tasks: bool, whether networks that share nothing have it too.
    """

    has_weights = False
    is_copied = False
    sharing = "independent"
    of_independent_tasks = True

    def alone(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        """The layer without what only training needs, for the network of one task."""
        return layer

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        """Why this layer can't be converted, a string, or None.

        Args:
            layer: the Keras layer.
            shapes: list of the shapes of its inputs.
        """
        return None

    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer | None:
        """The layer on the grouped layout, unbuilt; None if it can't run there.

        Args:
            layer: the Keras layer.
            tasks: int, T.
            shapes: list of the shapes that one task's inputs have.
        """
        return copy_of(layer)

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        """The layer of one task, unbuilt, from the one on the grouped layout.

        Args:
            layer: the layer on the grouped layout.
            tasks: int, T.
            task: int, which.
        """
        return copy_of(layer)

    def grouped_weights(self, layer: keras.layers.Layer, tasks: int) -> list[np.ndarray]:
        """Weights of the layer on the grouped layout, every task's those of `layer`."""
        return layer.get_weights()

    def single_weights(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> list[np.ndarray]:
        """Weights of one task's layer."""
        return layer.get_weights()


class _OnlyIf(Rule):
    """Layers that run on grouped channels under a condition, else on one task's."""

    def __init__(self, condition: Callable[[Any, Sequence[Shape]], bool]) -> None:
        self.condition = condition

    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer | None:
        return copy_of(layer) if self.condition(layer, shapes) else None


class _Flatten(Rule):
    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer:
        return TaskFlatten(tasks, name=layer.name, dtype=layer.dtype_policy)

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        return kl.Flatten(name=layer.name, dtype=layer.dtype_policy)


class _Concatenate(Rule):
    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer:
        if layer.axis in (-1, len(shapes[0]) - 1):
            return TaskConcatenate(tasks, name=layer.name, dtype=layer.dtype_policy)
        return copy_of(layer)

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        if isinstance(layer, TaskConcatenate):
            return kl.Concatenate(name=layer.name, dtype=layer.dtype_policy)
        return copy_of(layer)


class _Reshape(Rule):
    # As squeeze-excite uses it: the channels stay what they are.
    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer | None:
        *rest, last = layer.target_shape
        if last != shapes[0][-1]:
            return None
        return _edited(layer, target_shape=(*rest, last * tasks))

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        *rest, last = layer.target_shape
        if last == -1 or last % tasks:
            raise ValueError(f"target shape {layer.target_shape} mixes the tasks")
        return _edited(layer, target_shape=(*rest, last // tasks))


class _Channels(Rule):
    """Layers whose weights, or settings, hold one entry for each channel.

    Args:
        counts: names of settings that count channels, or groups of them.
        values: dict from a setting that may hold a value for each channel to the
            attribute that has it.
        task_class: class of the layer on the grouped layout, if it is another one.
        fixed: bool; the weights are settings, the same for all tasks.
    """

    def __init__(
        self,
        counts: Sequence[str] = (),
        values: Mapping[str, str] | None = None,
        task_class: type | None = None,
        fixed: bool = False,
    ) -> None:
        self.counts = counts
        self.values = values or {}
        self.task_class = task_class
        self.has_weights = not fixed

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        last = len(shapes[0]) - 1
        axes = getattr(layer, "axis", -1)
        # Without an axis there is one value for all numbers.
        axes = -1 if axes is None else axes
        for axis in axes if isinstance(axes, (list, tuple)) else [axes]:
            if axis not in (-1, last):
                return f"axis={axes}, not the last"
        shared = getattr(layer, "shared_axes", None) or ()
        if last in shared:
            return f"shared_axes={tuple(shared)} include the channels"
        return "rms_scaling=True" if getattr(layer, "rms_scaling", False) else None

    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer:
        entries = {}
        for name in self.counts:
            count = getattr(layer, name)
            entries[name] = count * tasks if count > 0 else count
        for name, attribute in self.values.items():
            value = getattr(layer, attribute)
            if np.ndim(value):
                entries[name] = np.tile(value, tasks).tolist()
        if layer.get_config().get("axis") is not None:
            entries["axis"] = -1
        if self.task_class is not None:
            entries["tasks"] = tasks
        return _edited(layer, self.task_class, **entries)

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        config = layer.get_config()
        config.pop("tasks", None)
        for name in self.counts:
            count = getattr(layer, name)
            config[name] = count // tasks if count > 0 else count
        for name, attribute in self.values.items():
            value = getattr(layer, attribute)
            if np.ndim(value):
                config[name] = _part(np.asarray(value), tasks, task).tolist()
        cls = type(layer)
        return _NORMALIZATIONS.get(cls, cls).from_config(config)

    def grouped_weights(self, layer: keras.layers.Layer, tasks: int) -> list[np.ndarray]:
        weights = layer.get_weights()
        return [np.tile(w, tasks) if np.ndim(w) else w for w in weights]

    def single_weights(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> list[np.ndarray]:
        return [_part(w, tasks, task) for w in layer.get_weights()]


def _part(values: np.ndarray, tasks: int, task: int) -> np.ndarray:
    """One task's part of the last axis; scalars are everyone's."""
    if not np.ndim(values):
        return values
    return np.split(values, tasks, axis=-1)[task]


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer with T kernels that a Keras layer becomes.

    Attributes:
        cls: the class of the layer.
        config: its configuration, without what all such layers have.
        kernel: array, the kernel of every task.
        bias: array, the bias of every task, or None.
    """

    cls: type[TaskLayer]
    config: dict[str, Any]
    kernel: np.ndarray
    bias: np.ndarray | None


class Kernels(Rule):
    """Layers with kernels, each of which becomes a layer with T kernels."""

    has_weights = True

    def __init__(self, task_class: type[TaskLayer]) -> None:
        self.task_class = task_class

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        if getattr(layer, "quantization_mode", None) is not None:
            return f"quantized to {layer.quantization_mode}"
        if isinstance(layer.activation, kl.Layer) and layer.activation.weights:
            return "an activation with weights"
        return None

    def parts(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Part]:
        """The layers with T kernels that do, one after another, what `layer` does."""
        return [self._part(layer, self.task_class, layer.kernel)]

    def activation(self, layer: keras.layers.Layer) -> keras.layers.Layer | None:
        """The activation as a layer of its own if it looks across channels, else None."""
        if is_elementwise(layer.activation):
            return None
        name = f"{layer.name}_activation"
        if isinstance(layer.activation, kl.Layer):
            return _edited(layer.activation, name=name)
        return kl.Activation(layer.activation, name=name, dtype=layer.dtype_policy)

    def _part(
        self,
        layer: keras.layers.Layer,
        cls: type[TaskLayer],
        kernel: Tensor,
        bias: bool = True,
        **entries: Any,
    ) -> Part:
        accepted = {
            *inspect.signature(cls.__init__).parameters,
            "name",
            "trainable",
            "dtype",
        }
        config = {n: value for n, value in layer.get_config().items() if n in accepted}
        if not is_elementwise(layer.activation):
            config["activation"] = None
        config.update(entries)
        values = layer.bias if bias and layer.use_bias else None
        if values is not None:
            values = keras.ops.convert_to_numpy(values)
        kernel = keras.ops.convert_to_numpy(kernel)
        return Part(cls, config, kernel, values)

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        raise ValueError("it mixes the features of the tasks")


class _Convolution(Kernels):
    """Convolutions; with one channel in each group they are depthwise ones."""

    def parts(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Part]:
        channels: Any = shapes[0][-1]
        depthwise = _DEPTHWISE.get(self.task_class)
        # One depthwise convolution runs all groups of all tasks at once.
        possible = (
            layer.groups == channels > 1
            and layer.padding != "causal"
            and len(set(layer.strides)) == 1
        )
        if depthwise is None or not possible:
            return super().parts(layer, shapes)
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        multiplier = layer.filters // channels
        kernel = kernel.reshape(*layer.kernel_size, channels, multiplier)
        config = layer.get_config()
        entries = {
            f"depthwise_{name}": config[f"kernel_{name}"]
            for name in ("initializer", "regularizer", "constraint")
        }
        entries["depth_multiplier"] = multiplier
        return [self._part(layer, depthwise, kernel, **entries)]


class _Transposed(Kernels):
    """Transposed convolutions, whose kernels Keras has with the outputs first."""

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        if layer.kernel_constraint is not None:
            return "a constraint, which counts the axes of Keras's kernel"
        return super().problem(layer, shapes)

    def parts(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Part]:
        kernel = keras.ops.swapaxes(layer.kernel, -1, -2)
        return [self._part(layer, self.task_class, kernel)]


class _Depthwise(Kernels):
    # On a grouped tensor Keras's own depthwise convolution keeps the tasks apart.
    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        return copy_of(layer)

    def single_weights(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> list[np.ndarray]:
        kernel, *bias = layer.get_weights()
        kernel = np.split(kernel, tasks, axis=-2)[task]
        return [kernel, *(_part(b, tasks, task) for b in bias)]


class _Separable(Kernels):
    """A depthwise convolution, and a pointwise one after it."""

    def parts(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Part]:
        config = layer.get_config()
        pointwise = {
            f"kernel_{name}": config[f"pointwise_{name}"]
            for name in ("initializer", "regularizer", "constraint")
        }
        return [
            self._part(
                layer,
                _DEPTHWISE[self.task_class],
                layer.depthwise_kernel,
                bias=False,
                name=f"{layer.name}_depthwise",
                activation=None,
                use_bias=False,
                bias_regularizer=None,
                activity_regularizer=None,
            ),
            self._part(
                layer,
                self.task_class,
                layer.pointwise_kernel,
                kernel_size=1,
                strides=1,
                dilation_rate=1,
                padding="valid",
                **pointwise,
            ),
        ]


class _TaskLayer(Rule):
    """The layers with T kernels themselves, on the way back to one task."""

    has_weights = True

    def problem(self, layer: keras.layers.Layer, shapes: Sequence[Shape]) -> str | None:
        return "it holds the kernels of several tasks already"

    def single(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> keras.layers.Layer:
        return layer.task_twin()

    def single_weights(
        self, layer: keras.layers.Layer, tasks: int, task: int
    ) -> list[np.ndarray]:
        weights = [keras.ops.convert_to_numpy(layer.task_kernel(task))]
        if layer.use_bias:
            weights.append(keras.ops.convert_to_numpy(layer.bias)[:, task])
        return weights


def _same_channels(layer: keras.layers.Layer, shapes: Sequence[Shape]) -> bool:
    return len({(len(shape), shape[-1]) for shape in shapes}) == 1


def _never(layer: keras.layers.Layer, shapes: Sequence[Shape]) -> bool:
    return False


class _Unknown(Rule):
    """What is never on grouped channels, and has no rule of its own."""

    # Such layers with weights are copied.
    is_copied = True

    def __init__(self, has_weights: bool) -> None:
        self.has_weights = has_weights

    def grouped(
        self, layer: keras.layers.Layer, tasks: int, shapes: Sequence[Shape]
    ) -> keras.layers.Layer | None:
        return None


_TASK_LAYER = _TaskLayer()
_UNKNOWN, _UNKNOWN_OPERATION = _Unknown(True), _Unknown(False)
# Operations of `keras.ops` that take every number for itself.
_OPERATION = _OnlyIf(_same_channels)


def _register_keras() -> None:
    numbers = (1, 2, 3)

    def ranks(*names: str) -> list[type]:
        found = [f"{name}{n}D" for name in names for n in numbers]
        return [getattr(kl, name) for name in found if hasattr(kl, name)]

    register_rule(
        *ranks(
            "MaxPooling",
            "AveragePooling",
            "AdaptiveMaxPooling",
            "AdaptiveAveragePooling",
            "GlobalMaxPooling",
            "GlobalAveragePooling",
            "ZeroPadding",
            "Cropping",
            "UpSampling",
            "SpatialDropout",
        ),
        kl.ReLU,
        kl.LeakyReLU,
        kl.ELU,
        kl.Identity,
        kl.ActivityRegularization,
        kl.GaussianDropout,
        kl.GaussianNoise,
        kl.AlphaDropout,
        kl.Resizing,
        kl.CenterCrop,
    )
    # One draw for all channels of a task, as in stochastic depth, is one for each task.
    register_rule(
        kl.Dropout,
        rule=_OnlyIf(lambda layer, _: (layer.noise_shape or (None,))[-1] is None),
    )
    register_rule(
        kl.Activation, rule=_OnlyIf(lambda layer, _: is_elementwise(layer.activation))
    )
    register_rule(
        kl.Permute,
        rule=_OnlyIf(lambda layer, shapes: layer.dims[-1] == len(shapes[0]) - 1),
    )
    register_rule(
        kl.Add,
        kl.Subtract,
        kl.Multiply,
        kl.Average,
        kl.Maximum,
        kl.Minimum,
        # One input plus a multiple of another.
        inception_resnet_layer(),
        rule=_OnlyIf(_same_channels),
    )
    register_rule(
        kl.Softmax,
        kl.UnitNormalization,
        kl.RepeatVector,
        kl.RandomFlip,
        kl.RandomRotation,
        kl.RandomTranslation,
        kl.RandomZoom,
        kl.RandomContrast,
        kl.RandomBrightness,
        kl.RandomCrop,
        rule=_OnlyIf(_never),
    )
    register_rule(kl.Flatten, TaskFlatten, rule=_Flatten())
    register_rule(kl.Concatenate, TaskConcatenate, rule=_Concatenate())
    register_rule(kl.Reshape, rule=_Reshape())
    register_rule(kl.BatchNormalization, kl.PReLU, rule=_Channels())
    register_rule(kl.GroupNormalization, rule=_Channels(counts=("groups",)))
    for ours, theirs in _NORMALIZATIONS.items():
        register_rule(theirs, ours, rule=_Channels(task_class=ours))
    scale = {"scale": "scale", "offset": "offset"}
    register_rule(kl.Rescaling, rule=_Channels(values=scale, fixed=True))
    moments = {"mean": "input_mean", "variance": "input_variance"}
    register_rule(kl.Normalization, rule=_Channels(values=moments, fixed=True))
    register_rule(kl.Dense, rule=Kernels(TaskDense))
    for n, cls in zip(numbers, (TaskConv1D, TaskConv2D, TaskConv3D)):
        register_rule(getattr(kl, f"Conv{n}D"), rule=_Convolution(cls))
    transposed = (TaskConv1DTranspose, TaskConv2DTranspose, TaskConv3DTranspose)
    for n, up in zip(numbers, transposed):
        register_rule(getattr(kl, f"Conv{n}DTranspose"), rule=_Transposed(up))
    for n, kind in zip(numbers, (TaskDepthwiseConv1D, TaskDepthwiseConv2D)):
        register_rule(getattr(kl, f"DepthwiseConv{n}D"), rule=_Depthwise(kind))
    for n, cls in zip(numbers, (TaskConv1D, TaskConv2D)):
        register_rule(getattr(kl, f"SeparableConv{n}D"), rule=_Separable(cls))
    layer_scale, stochastic_depth = convnext_layers()
    register_rule(layer_scale, rule=_Channels(counts=("projection_dim",)))
    register_rule(stochastic_depth, rule=_OnlyIf(_never))


_register_keras()
