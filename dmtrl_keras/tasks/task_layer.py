"""The forward pass that all layers with T kernels share."""

import math
from collections.abc import Mapping
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.keras_private import flatten_layers, saving_as_h5
from dmtrl_keras.ground.types import Factors, Initializer, Shape, Tensor
from dmtrl_keras.ground.validation import (
    channel_axis,
    channels_per_task,
    check_bool,
    check_model,
    check_tasks,
    from_keras,
    is_int,
    name_of,
    no_h5,
)
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.factorization import Factorization
from dmtrl_keras.kernels.parameterization import Parameterization, Sharing, one_of
from dmtrl_keras.kernels.plan import Geometry
from dmtrl_keras.kernels.state import KernelRegularizer, KernelState
from dmtrl_keras.kernels.task_kernel import TaskKernel
from dmtrl_keras.tasks.column import TaskColumn

# Sizes taken for a FLOP count where the input shape leaves them open.
NOMINAL_BATCH = 32
NOMINAL_LENGTH = 32


def positions_of(shape: Shape, data_format: str) -> int:
    """The number of positions of a map, `NOMINAL_LENGTH` along each open axis.

    Args:
        shape: tuple, batch and channels included.
        data_format: `"channels_last"` or `"channels_first"`.
    """
    middle = list(shape[1:])
    middle.pop(0 if data_format == "channels_first" else -1)
    return math.prod(NOMINAL_LENGTH if d is None else d for d in middle)


class TaskLayer(CheckedLayer):
    """Base of the layers that run T kernels at once (not for direct use).

    A subclass names its Keras twin, the layer that one task alone would use, which
    validates the arguments and computes output shapes, so that both mean the same by
    them. The kernels are a child, `stacked`, a `TaskKernel`.

    Args:
        twin: an unbuilt Keras layer made from the user's arguments.
        tasks: int, T.
        shared_input: bool; the input is the same for all tasks, not grouped.
        sharing: name of a parameterization, or an instance.
        common_draw: bool; all tasks start from the same draw. None: True, unless
            the ranks come from a tolerance: equal kernels have task rank 1 at any
            tolerance, so the tasks could never differ; or kernels that are similar are
            shared, which equal ones all would be.
        contractible: bool; factors may be applied one after another, without composing.
        **kwargs: of `keras.layers.Layer`.

    Attributes:
        factorization: the `Factorization` that the layer's factors came from, or None.
    """

    # Names of the twin's kernel arguments; `DepthwiseConv2D` calls them otherwise.
    _kernel_prefix = "kernel"

    def __init__(
        self,
        twin: keras.layers.Layer,
        tasks: int,
        shared_input: bool = False,
        sharing: Sharing = "independent",
        common_draw: bool | None = None,
        contractible: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        owner = type(self).__name__
        self.tasks = check_tasks(tasks, owner)
        self.shared_input = check_bool("shared_input", shared_input, owner)
        if common_draw is not None:
            common_draw = check_bool("common_draw", common_draw, owner, " or None")
        sharing = parameterizations.get(sharing, owner)
        apart = sharing.starts_apart or getattr(sharing, "tolerance", None) is not None
        self._common_draw_argument = common_draw
        self.common_draw = not apart if common_draw is None else common_draw
        prefix = self._kernel_prefix
        self.kernel_initializer = getattr(twin, f"{prefix}_initializer")
        self.kernel_regularizer = getattr(twin, f"{prefix}_regularizer")
        self.kernel_constraint = getattr(twin, f"{prefix}_constraint")
        self.activation = twin.activation
        self.use_bias = twin.use_bias
        self.bias_initializer = twin.bias_initializer
        self.bias_regularizer = twin.bias_regularizer
        self.bias_constraint = twin.bias_constraint
        self.data_format = getattr(twin, "data_format", "channels_last")
        # What one task's outputs are shaped like. A function of the layer: held as an
        # attribute it would be tracked.
        self._output_shape_of_one = lambda shape: twin.compute_output_shape(shape)
        self._twin_arguments = twin.get_config()
        if isinstance(self.kernel_regularizer, KernelRegularizer):
            # One task alone has no relations; a twin needs nothing of this library.
            self._twin_arguments[f"{prefix}_regularizer"] = None
        self._twin_class = type(twin)
        self.input_spec = keras.layers.InputSpec(min_ndim=self._minimum_ndim)
        self.bias: Any = None
        self.factorization: Factorization | None = None
        # Keras saves children by the first name under which it finds them, in the order of
        # the alphabet: after `prior` and `selection`, which files have under the layer.
        self.stacked = TaskKernel(
            sharing,
            self.tasks,
            name_of(self),
            shared_input=self.shared_input,
            contractible=contractible,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            common_draw=self.common_draw,
            saved_by_host=True,
            trainable=self.trainable,
            dtype=self.dtype_policy,
            name="kernel",
        )

    # --- building -------------------------------------------------------------

    def _axis(self) -> int:
        return channel_axis(self.data_format)

    def _channels(self, input_shape: Shape) -> int:
        """Input channels of one task."""
        channels = input_shape[self._axis()]
        tasks = 1 if self.shared_input else self.tasks
        return channels_per_task(channels, tasks, name_of(self), input_shape)

    def _task_shape(self, input_shape: Shape) -> Shape:
        """The input shape that one task's twin would see."""
        shape = list(input_shape)
        shape[self._axis()] = self._channels(input_shape)
        return tuple(shape)

    def _kernel_shape(self, channels: int) -> tuple[int, ...]:
        """The shape of one task's kernel, `(*window, in, out)`."""
        raise NotImplementedError

    def _bias_size(self, channels: int) -> int:
        """The output channels of one task."""
        raise NotImplementedError

    def build(self, input_shape: Shape) -> None:
        output_shape = self.compute_output_shape(input_shape)
        channels = self._input_channels = self._channels(input_shape)
        self.stacked.build(self._kernel_shape(channels))
        if self.use_bias:
            self.bias = from_keras(
                name_of(self),
                self.add_weight,
                name="bias",
                shape=(self._bias_size(channels), self.tasks),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.stacked.plan_for(self._geometry(input_shape, output_shape))
        self.built = True

    def start_from(self, factors: Mapping[str, np.ndarray]) -> None:
        """Start from given factors instead of a decomposed draw; before `build`.

        Args:
            factors: dict of arrays, as the parameterization's `decompose` returns.
        """
        self.stacked.start_from(factors)

    def _geometry(self, input_shape: Shape, output_shape: Shape) -> Geometry:
        return Geometry(
            batch=input_shape[0] or NOMINAL_BATCH,
            positions_in=positions_of(input_shape, self.data_format),
            positions_out=positions_of(output_shape, self.data_format),
        )

    def flops(
        self, input_shape: Shape, batch: int = NOMINAL_BATCH, alone: bool = False
    ) -> int:
        """Operations of one forward pass in the order of work that was chosen.

        Args:
            input_shape: tuple, the shape of the input; sizes that are open count as 32.
            batch: int, the number of examples.
            alone: bool; of a task that is none of the T, see `call`.

        Returns:
            An int: additions and multiplications of the kernels, the composition of
            factors counted once, biases and activations left out.
        """
        self._check_built("flops")
        input_shape = (batch, *input_shape[1:])
        if alone:
            output_shape = self._output_shape_of_one(input_shape)
        else:
            output_shape = self.compute_output_shape(input_shape)
        return self.stacked.flops(self._geometry(input_shape, output_shape), alone)

    # --- LoRA and quantization --------------------------------------------------

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Initializer = "he_uniform",
        b_initializer: Initializer = "zeros",
    ) -> None:
        """Freeze the kernels, and train a difference of low rank for each task.

        As of `keras.layers.Dense`, of T kernels at once and of convolutions, too: each
        task's kernel becomes `W_t + alpha / r A_t B_t` (Hu et al. 2022, section 4.1), the
        parameterization `LoRA(rank, alpha, of=...)` of what it was. Biases are trained on.
        As Keras's model, one that was compiled must be compiled anew.

        Args:
            rank: positive int, r; of smaller kernels the largest that is possible.
            lora_alpha: number; None: r.
            a_initializer: Keras initializer of `A_t`, `(*window, in, r)`.
            b_initializer: of `B_t`, `(r, out)`.

        Raises:
            AttributeError: if the layer isn't built.
            ValueError: on malformed arguments, with a kernel constraint, if it was enabled
                before, of similar kernels.

        Example:

        >>> from dmtrl_keras.layers import TaskDense
        >>> layer = TaskDense(32, tasks=3)
        >>> layer.build((None, 96))
        >>> layer.enable_lora(2)
        >>> [tuple(w.shape) for w in layer.trainable_weights]
        [(32, 2, 3), (2, 32, 3), (32, 3)]
        """
        self._check_built("enable_lora")
        self.stacked.enable_lora(rank, lora_alpha, a_initializer, b_initializer)

    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Store the kernels, or the factors that they are made of, as 8-bit integers.

        Each output of each task has a scale, as of Keras's quantized `Dense`, whose kernel
        is the same; a matrix of factors has one for each column. They take a quarter of
        the memory, and are no longer trained; the differences of `LoRA` are, which stay
        what they are. Activations are not quantized.

        Args:
            mode: `"int8"`.
            type_check: bool; means nothing here.
            config: None, or `keras.quantizers.Int8QuantizationConfig` without a quantizer
                for weights, in the place of `mode`.

        Raises:
            ValueError: on another mode, or if the layer isn't built.

        Example:

        >>> from dmtrl_keras.layers import TaskDense
        >>> layer = TaskDense(32, tasks=3)
        >>> layer.build((None, 96))
        >>> layer.quantize("int8")
        >>> layer.factors["kernel"].dtype, layer.kernel.dtype.name
        ('int8', 'float32')
        """
        self.stacked.quantize(mode, config=config)

    @property
    def quantization(self) -> str | None:
        """`"int8"` of quantized kernels, else None."""
        return self.stacked.quantization

    # --- what the kernels are ---------------------------------------------------

    def _check_built(self, name: str) -> None:
        if not self.built:
            raise AttributeError(
                f"{name_of(self)}: build the layer before accessing `{name}`."
            )

    @property
    def sharing(self) -> Parameterization:
        """The parameterization of the kernels."""
        return self.stacked.sharing

    @property
    def selection(self) -> keras.layers.Layer | None:
        """What the parameterization keeps beside its factors, a layer, or None."""
        return self.stacked.selection

    @property
    def prior(self) -> KernelState | None:
        """What a regularizer learns with the kernel, or None."""
        return self.stacked.prior

    @property
    def kernel(self) -> Tensor:
        """The effective stacked kernel, `(*window, in, out, T)`.

        A variable where the tasks' kernels are independent, else the tensor that the
        factors compose to.
        """
        self._check_built("kernel")
        return self.stacked.value()

    def task_kernel(self, task: int) -> Tensor:
        """The kernel of one task, as the Keras twin would hold it.

        Args:
            task: int in [0, T).

        Returns:
            A tensor `(*window, in, out)`.

        Raises:
            ValueError: if there is no such task.
        """
        self._check_built("task_kernel")
        if not is_int(task, 0, self.tasks - 1):
            raise ValueError(
                f"{name_of(self)}: `task` must be an int from 0 to "
                f"{self.tasks - 1}. Received: task={task!r}."
            )
        return ops.convert_to_tensor(self.kernel)[..., int(task)]

    def weights_alone(self, column: TaskColumn | None) -> list[np.ndarray]:
        """The weights that the Keras twin would have of a task that is none of the T.

        Args:
            column: what the task has for itself; None, if that is nothing.
        """
        self._check_built("weights_alone")
        own, bias = (None, None) if column is None else (column.column, column.bias)
        found = [self.stacked.value_alone(own), bias]
        return [ops.convert_to_numpy(value) for value in found if value is not None]

    def own_weights(self, task: int) -> list[tuple[keras.Variable, np.ndarray]]:
        """What of the variables is one task's alone, as of `TaskKernel`."""
        found = self.stacked.own_weights(task)
        return (
            found if self.bias is None else [*found, (self.bias, one_of(self.tasks, task))]
        )

    def task_twin(self) -> keras.layers.Layer:
        """The ordinary Keras layer that one task alone would use, new and unbuilt."""
        config = {**self._twin_arguments, "name": self.name}
        config["trainable"] = self.trainable
        config["dtype"] = keras.dtype_policies.serialize(self.dtype_policy)
        return self._twin_class.from_config(config)

    @property
    def task_matrix(self) -> Tensor:
        """S of DMTRL, a tensor `(K, T)`; column t has the coefficients of task t."""
        self._check_built("task_matrix")
        return self.stacked.task_matrix()

    @property
    def factors(self) -> dict[str, keras.Variable]:
        """The variables that the kernel is made of, a dict by factor name."""
        self._check_built("factors")
        return self.stacked.factors

    @property
    def rank(self) -> tuple[int, ...] | None:
        """The ranks of the factors, a tuple of ints; None without factors."""
        self._check_built("rank")
        return self.stacked.rank

    @property
    def stacked_kernel_shape(self) -> tuple[int, ...]:
        """The shape of the stacked kernel, `(*window, in, out, T)`."""
        self._check_built("stacked_kernel_shape")
        return self.stacked.shape

    # --- the forward pass -------------------------------------------------------

    # The convolution of the twin, a function of activations and one kernel; None: a dense
    # layer, or a pointwise convolution.
    _convolve: Any = None

    def _apply(self, x: Tensor, factors: Factors, alone: bool) -> Tensor:
        """Channels-last activations through the kernels, to the grouped layout."""
        return self.stacked.apply_factors(x, factors, self._convolve, alone)

    def call(
        self,
        inputs: Tensor,
        training: bool | None = None,
        own: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the T tasks, or one that is none of them.

        Args:
            inputs: tensor, see the class; with `own` the features of that task alone,
                `(batch, ..., in)`.
            training: bool or None.
            own: None; or of a task that came later what it has for itself: `"column"`,
                its column of the task matrix, `(K,)`, and `"bias"`, `(outputs,)`, as
                `TaskColumn` returns them.
        """
        alone = own is not None
        if own is None:
            self.stacked(training=training)
            factors: Factors = self.stacked.tensors(training)
            bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        else:
            factors = self.stacked.sharing.of_column(
                self.stacked.tensors(), own.get("column")
            )
            bias = own.get("bias")
        x = inputs
        first = self.data_format == "channels_first"
        if first:
            axes = len(x.shape)
            x = ops.transpose(x, (0, *range(2, axes), 1))
        x = self._apply(x, factors, alone)
        if bias is not None:
            x = ops.add(x, ops.reshape(ops.transpose(bias), (-1,)))
        if first:
            x = ops.transpose(x, (0, axes - 1, *range(1, axes - 1)))
        if self.activation is not None:
            x = self.activation(x)
        return x

    def compute_output_spec(
        self,
        inputs: Tensor,
        training: bool | None = None,
        own: Mapping[str, Tensor] | None = None,
    ) -> keras.KerasTensor:
        if own is None:
            return super().compute_output_spec(inputs)
        shape = self._output_shape_of_one(inputs.shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = kwargs.get("own") is not None
        inputs: Any = args[0] if args else kwargs.get("inputs")
        if self._is_tensor(inputs):
            if not self.built and alone:
                # Where a network is made anew this call may be the first one.
                shape = list(inputs.shape)
                shape[self._axis()] *= 1 if self.shared_input else self.tasks
                self.build(tuple(shape))
            if self.built:
                self._check_channels(inputs, alone)
        return super().__call__(*args, **kwargs)

    def _check_channels(self, inputs: Any, alone: bool) -> None:
        """Raise unless there are as many channels as when the layer was built."""
        channels = self._input_channels * (1 if alone or self.shared_input else self.tasks)
        found = inputs.shape[self._axis()]
        if found is not None and found != channels:
            of = (
                "one task's"
                if alone or self.shared_input
                else f"those of {self.tasks} tasks"
            )
            raise ValueError(
                f"{name_of(self)}: expected {channels} channels, {of}, as when it was "
                f"built. Received: an input of shape {tuple(inputs.shape)}."
            )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        try:
            shape = self._output_shape_of_one(self._task_shape(input_shape))
        except ValueError as error:
            raise ValueError(f"{name_of(self)}: {error}") from error
        shape = list(shape)
        shape[self._axis()] *= self.tasks
        return tuple(shape)

    # --- variables: the kernel's and the bias, in the order of Keras's own layers -----

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables: factors, bias, then the states."""
        return self._factors_first(super().variables)

    @property
    def weights(self) -> list[keras.Variable]:
        """All weights: factors, bias, then the states."""
        return self._factors_first(super().weights)

    def _factors_first(self, variables: list[keras.Variable]) -> list[keras.Variable]:
        own = {id(variable) for variable in self._own_variables()}
        return [*self._own_variables(), *(v for v in variables if id(v) not in own)]

    def _own_variables(self) -> list[keras.Variable]:
        if not self.stacked.built:
            return []
        bias: list[keras.Variable] = [] if self.bias is None else [self.bias]
        stacked = self.stacked
        return [*stacked.factors.values(), *bias, *stacked.scales.values()]

    def save_own_variables(self, store: Any) -> None:
        for number, variable in enumerate(self._own_variables()):
            store[f"{number}"] = variable

    def load_own_variables(self, store: Any) -> None:
        variables = self._own_variables()
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"{name_of(self)}: expected {len(variables)} variables, "
                f"{[v.name for v in variables]}. Received: a file with "
                f"{len(store.keys())} for this layer."
            )
        for number, variable in enumerate(variables):
            variable.assign(store[f"{number}"])

    # --- serialization ----------------------------------------------------------

    # Arguments of the twin that make no sense for T kernels.
    _dropped = (
        "name",
        "trainable",
        "dtype",
        "lora_rank",
        "lora_alpha",
        "quantization_config",
    )

    def get_config(self) -> dict[str, Any]:
        if saving_as_h5():
            raise no_h5(name_of(self))
        config = super().get_config()
        for name, value in self._twin_arguments.items():
            if name not in self._dropped:
                config[name] = value
        name = f"{self._kernel_prefix}_regularizer"
        config[name] = keras.regularizers.serialize(self.kernel_regularizer)
        config["tasks"] = self.tasks
        config["shared_input"] = self.shared_input
        config["common_draw"] = self._common_draw_argument
        config.update(self._sharing_config())
        if self.quantization is not None:
            config["quantization"] = self.quantization
        if self.factorization is not None:
            config["factorization"] = self.factorization.get_config()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        factorization = config.pop("factorization", None)
        quantization = config.pop("quantization", None)
        layer = super().from_config(config)
        layer.stacked.quantization = quantization
        if factorization is not None:
            layer.factorization = Factorization.from_config(factorization)
        return layer

    def _sharing_config(self) -> dict[str, Any]:
        sharing = self.stacked.fixed_sharing
        return {"sharing": keras.saving.serialize_keras_object(sharing)}


def task_layers(model: keras.Model) -> list[TaskLayer]:
    """The layers of a model that hold T kernels, nested models included, in order.

    Raises:
        ValueError: on what is no Keras model.
    """
    return layers_of(TaskLayer, model, "task_layers")


def layers_of(kinds: Any, model: keras.Model, owner: str) -> list[Any]:
    """The layers of some classes in a model, in order.

    Nested models are entered, and layers that hold such layers.

    Args:
        kinds: a class, or a tuple of them.
        model: a Keras model.
        owner: str, the function to name in the error.

    Raises:
        ValueError: on what is no Keras model.
    """
    found = []
    for layer in check_model(model, owner).layers:
        if isinstance(layer, kinds):
            found.append(layer)
        elif isinstance(layer, keras.Model):
            found += layers_of(kinds, layer, owner)
        else:
            found += [child for child in flatten_layers(layer) if isinstance(child, kinds)]
    return found
