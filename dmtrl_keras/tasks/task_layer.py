"""The forward pass that all layers with T kernels share."""

import math
import numbers

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.backend import eager_scope, full_precision
from dmtrl_keras.ground.validation import channel_axis, channels_per_task, check_tasks
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.plan import Stage, apply_plan, plan_flops
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer
from dmtrl_keras.mrn.state import TensorNormalState, mode_names

# Sizes taken for a FLOP count where the input shape leaves them open.
NOMINAL_BATCH = 32
NOMINAL_LENGTH = 32


def draw_stacked_kernel(initializer, shape, tasks, common, dtype="float32"):
    """T start kernels from an initializer that sees the shape of one.

    Args:
        initializer: a Keras initializer; None: Keras's default, Glorot uniform.
        shape: tuple, the shape of one task's kernel.
        tasks: int, T.
        common: bool; one draw for all tasks, or one for each.
        dtype: str, the dtype to draw in.

    Returns:
        A NumPy array of shape `(*shape, T)`.
    """
    initializer = initializer or keras.initializers.GlorotUniform()
    if common:
        draws = [initializer]
    elif isinstance(getattr(initializer, "seed", None), numbers.Integral):
        # An initializer with a fixed seed always draws the same values.
        seeds = np.random.default_rng(initializer.seed).integers(2**31, size=tasks)
        config = initializer.get_config()
        draws = [
            type(initializer).from_config({**config, "seed": int(seed)}) for seed in seeds
        ]
    else:
        draws = [initializer] * tasks
    kernels = [ops.convert_to_numpy(draw(shape, dtype=dtype)) for draw in draws]
    return np.repeat(np.stack(kernels, axis=-1), tasks // len(kernels), axis=-1)


def positions_of(shape, data_format):
    """The number of positions of a map, `NOMINAL_LENGTH` along each open axis.

    Args:
        shape: tuple, batch and channels included.
        data_format: `"channels_last"` or `"channels_first"`.
    """
    middle = list(shape[1:])
    middle.pop(0 if data_format == "channels_first" else -1)
    return math.prod(NOMINAL_LENGTH if d is None else d for d in middle)


class TaskLayer(keras.layers.Layer):
    """Base of the layers that run T kernels at once (not for direct use).

    A subclass names its Keras twin, the layer that one task alone would use, in
    `_make_twin`. The twin validates the arguments and computes output shapes, so
    that both mean the same by them.

    Args:
        twin: an unbuilt Keras layer made from the user's arguments.
        tasks: int, T.
        shared_input: bool; the input is the same for all tasks, not grouped.
        sharing: name of a parameterization, or an instance.
        common_draw: bool; all tasks start from the same draw. None: True, unless
            the ranks come from a tolerance: equal kernels have task rank 1 at any
            tolerance, so the tasks could never differ.
        **kwargs: of `keras.layers.Layer`.
    """

    # Names of the twin's kernel arguments; `DepthwiseConv2D` calls them otherwise.
    _kernel_prefix = "kernel"
    _minimum_ndim = 2

    def __init__(
        self,
        twin,
        tasks,
        shared_input=False,
        sharing="independent",
        common_draw=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.tasks = check_tasks(tasks, type(self).__name__)
        self.shared_input = bool(shared_input)
        self.sharing = parameterizations.get(sharing)
        tolerant = getattr(self.sharing, "tolerance", None) is not None
        self._common_draw_argument = common_draw
        self.common_draw = not tolerant if common_draw is None else bool(common_draw)
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
        # A method, not an attribute: a layer held as an attribute would be tracked.
        self._twin_arguments = twin.get_config()
        if isinstance(self.kernel_regularizer, TensorNormalRegularizer):
            # One task alone has no relations; a twin needs nothing of this library.
            self._twin_arguments[f"{prefix}_regularizer"] = None
        self._twin_class = type(twin)
        self.input_spec = keras.layers.InputSpec(min_ndim=self._minimum_ndim)
        self.bias = None
        self.prior = None
        self.selection = None
        self._start = None

    def _twin(self):
        return self._twin_class.from_config(self._twin_arguments)

    # --- building -------------------------------------------------------------

    def _axis(self):
        return channel_axis(self.data_format)

    def _channels(self, input_shape):
        """Input channels of one task."""
        channels = input_shape[self._axis()]
        tasks = 1 if self.shared_input else self.tasks
        return channels_per_task(channels, tasks, self._owner(), input_shape)

    def _owner(self):
        return f"{type(self).__name__} {self.name!r}"

    def _task_shape(self, input_shape):
        """The input shape that one task's twin would see."""
        shape = list(input_shape)
        shape[self._axis()] = self._channels(input_shape)
        return tuple(shape)

    def _kernel_shape(self, channels):
        """The shape of one task's kernel, `(*window, in, out)`."""
        raise NotImplementedError

    def _bias_size(self, channels):
        """The output channels of one task."""
        raise NotImplementedError

    def build(self, input_shape):
        output_shape = self.compute_output_shape(input_shape)
        channels = self._channels(input_shape)
        self.input_spec = keras.layers.InputSpec(
            min_ndim=self._minimum_ndim,
            axes={self._axis(): input_shape[self._axis()]},
        )
        shape = self._kernel_shape(channels)
        self._make_factors(shape)
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self._bias_size(channels), self.tasks),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self._plan = self._choose_plan(input_shape, output_shape)
        self.built = True

    def start_from(self, factors):
        """Start from given factors instead of a decomposed draw; before `build`.

        Args:
            factors: dict of arrays, as the parameterization's `decompose` returns.
        """
        self._start = factors

    def _draw_factors(self, shape):
        with eager_scope():
            start = draw_stacked_kernel(
                self.kernel_initializer,
                shape,
                self.tasks,
                self.common_draw,
                dtype=full_precision(self.variable_dtype),
            )
        try:
            return self.sharing.decompose(start)
        except ValueError as error:
            raise ValueError(
                f"{self._owner()}, stacked kernel {(*shape, self.tasks)}: {error}"
            ) from error

    def _make_factors(self, shape):
        values = self._draw_factors(shape) if self._start is None else self._start
        self._start = None
        self._stacked_shape = (*shape, self.tasks)
        direct = self.sharing.is_stacked_kernel
        penalty = regularizer = self._penalty()
        if penalty is not None and not direct:
            # The penalty is of the composed kernel. It hangs on the first factor,
            # so that Keras counts it once, and not while the layer is frozen.
            def regularizer(_):
                return penalty(self.kernel)

        self._factors = {}
        for name, value in values.items():
            self._factors[name] = self.add_weight(
                name=name,
                shape=value.shape,
                initializer=_constant(value),
                regularizer=regularizer,
                constraint=self.kernel_constraint if direct else None,
            )
            regularizer = None
        self._rank = self.sharing.rank(self._factor_shapes())
        self.selection = self.sharing.new_state(
            lambda: dict(self._factors),
            values,
            self.tasks,
            full_precision(self.variable_dtype),
        )
        if self.selection is not None:
            self.selection.build()

    def _penalty(self):
        """The regularizer as a function of the stacked kernel, or None."""
        if not isinstance(self.kernel_regularizer, TensorNormalRegularizer):
            return self.kernel_regularizer
        self.prior = TensorNormalState(
            self.kernel_regularizer,
            kernel=lambda: self.kernel,
            shape=self._stacked_shape,
            names=mode_names(len(self._stacked_shape), task_axis=True),
            owner=self._owner(),
            dtype=full_precision(self.variable_dtype),
        )
        self.prior.build()
        return self.prior.penalty

    def _factor_shapes(self):
        return {name: tuple(v.shape) for name, v in self._factors.items()}

    def _choose_plan(self, input_shape, output_shape):
        """The order of work with the fewest operations, or the one asked for."""
        shapes = self._factor_shapes()
        *_, inputs, outputs, _ = self._stacked_shape
        composition = Stage(
            "stacked",
            inputs,
            outputs,
            self._composed,
            spatial=True,
            flops=self.sharing.compose_flops(shapes),
        )
        plans = []
        if self._can_contract() and not self._constrains_composed:
            plans = self.sharing.contractions(shapes)
        implementation = getattr(self.sharing, "implementation", "auto")
        if implementation == "contract" and not plans:
            raise ValueError(
                f'{self._owner()}: `implementation="contract"` is not possible with '
                "a kernel constraint, with groups, or in a depthwise convolution: "
                'there the kernel must be composed. Use "auto" or "compose".'
            )
        if implementation == "compose":
            plans = []
        if implementation != "contract":
            plans = [*plans, (composition,)]
        return tuple(
            min(plans, key=lambda plan: self._flops(plan, input_shape, output_shape))
        )

    def _flops(self, plan, input_shape, output_shape):
        return plan_flops(
            plan,
            tasks=self.tasks,
            shared_input=self.shared_input,
            batch=input_shape[0] or NOMINAL_BATCH,
            positions_in=positions_of(input_shape, self.data_format),
            positions_out=positions_of(output_shape, self.data_format),
            window=math.prod(self._stacked_shape[:-3]),
        )

    def flops(self, input_shape, batch=NOMINAL_BATCH):
        """Operations of one forward pass in the order of work that was chosen.

        Args:
            input_shape: tuple, the shape of the input; sizes that are open count as 32.
            batch: int, the number of examples.

        Returns:
            An int: additions and multiplications of the kernels, the composition of
            factors counted once, biases and activations left out.
        """
        self._check_built("flops")
        input_shape = (batch, *input_shape[1:])
        output_shape = self.compute_output_shape(input_shape)
        return self._flops(self._plan, input_shape, output_shape)

    def _can_contract(self):
        return True

    @property
    def _constrains_composed(self):
        # A variable is projected after each update; factors can't be, so that their
        # composition is projected wherever it is used.
        return self.kernel_constraint is not None and not self.sharing.is_stacked_kernel

    # --- what the kernels are ---------------------------------------------------

    def _check_built(self, name):
        if not self.built:
            raise AttributeError(
                f"{self._owner()}: build the layer before accessing `{name}`."
            )

    def _tensors(self, training=False):
        tensors = {name: ops.convert_to_tensor(v) for name, v in self._factors.items()}
        if self.selection is None:
            return tensors
        return tensors | self.selection.tensors(training)

    def _composed(self, factors):
        """The kernels `(T, *window, in, out)`, the constraint applied."""
        kernel = self.sharing.compose(factors, self.tasks)
        if not self._constrains_composed:
            return kernel
        kernel = self.kernel_constraint(ops.moveaxis(kernel, 0, -1))
        return ops.moveaxis(kernel, -1, 0)

    @property
    def kernel(self):
        """The effective stacked kernel, `(*window, in, out, T)`.

        A variable where the tasks' kernels are independent, else the tensor that the
        factors compose to.
        """
        self._check_built("kernel")
        if self.sharing.is_stacked_kernel:
            return self._factors["kernel"]
        return ops.moveaxis(self._composed(self._tensors()), 0, -1)

    def task_kernel(self, task):
        """The kernel of one task, as the Keras twin would hold it.

        Args:
            task: int in [0, T).

        Returns:
            A tensor `(*window, in, out)`.

        Raises:
            ValueError: if there is no such task.
        """
        self._check_built("task_kernel")
        if not isinstance(task, numbers.Integral) or not 0 <= task < self.tasks:
            raise ValueError(
                f"{self._owner()}: `task` must be an int from 0 to "
                f"{self.tasks - 1}. Received: task={task!r}."
            )
        return ops.convert_to_tensor(self.kernel)[..., int(task)]

    def task_twin(self):
        """The ordinary Keras layer that one task alone would use, new and unbuilt."""
        config = {**self._twin_arguments, "name": self.name}
        config["trainable"] = self.trainable
        config["dtype"] = keras.dtype_policies.serialize(self.dtype_policy)
        return self._twin_class.from_config(config)

    @property
    def task_matrix(self):
        """S of DMTRL, a tensor `(K, T)`; column t has the coefficients of task t."""
        self._check_built("task_matrix")
        return self.sharing.task_matrix(self._tensors(), self.tasks)

    @property
    def factors(self):
        """The variables that the kernel is made of, a dict by factor name."""
        self._check_built("factors")
        return dict(self._factors)

    @property
    def rank(self):
        """The ranks of the factors, a tuple of ints; None without factors."""
        self._check_built("rank")
        return self._rank

    @property
    def stacked_kernel_shape(self):
        """The shape of the stacked kernel, `(*window, in, out, T)`."""
        self._check_built("stacked_kernel_shape")
        return self._stacked_shape

    # --- the forward pass -------------------------------------------------------

    def _convolve(self, x, kernel):
        raise NotImplementedError

    def _apply(self, x, training):
        """Channels-last activations through the kernels, to the grouped layout."""
        return apply_plan(
            self._plan,
            x,
            self._tensors(training),
            tasks=self.tasks,
            shared_input=self.shared_input,
            convolve=self._convolve,
        )

    def call(self, inputs, training=None):
        if self.selection is not None:
            self.selection(training=training)
        if self.prior is not None:
            self.prior(training=training)
        x = inputs
        first = self.data_format == "channels_first"
        if first:
            axes = len(x.shape)
            x = ops.transpose(x, (0, *range(2, axes), 1))
        x = self._apply(x, training)
        if self.use_bias:
            bias = ops.transpose(ops.convert_to_tensor(self.bias))
            x = ops.add(x, ops.reshape(bias, (-1,)))
        if first:
            x = ops.transpose(x, (0, axes - 1, *range(1, axes - 1)))
        if self.activation is not None:
            x = self.activation(x)
        return x

    def compute_output_shape(self, input_shape):
        try:
            shape = self._twin().compute_output_shape(self._task_shape(input_shape))
        except ValueError as error:
            raise ValueError(f"{self._owner()}: {error}") from error
        shape = list(shape)
        shape[self._axis()] *= self.tasks
        return tuple(shape)

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

    def get_config(self):
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
        return config

    def _built_sharing(self):
        # A saved layer must come back with the same variables, whatever it draws.
        if self.built and self._rank is not None:
            return self.sharing.with_rank(self._rank)
        return self.sharing

    def _sharing_config(self):
        sharing = self._built_sharing()
        return {"sharing": keras.saving.serialize_keras_object(sharing)}


class NamedSharing:
    """Mixin of the layers whose class says how kernels are related (not for direct use).

    Their configuration holds the arguments of the parameterization, not itself.
    """

    _parameterization = None

    def _sharing_config(self):
        return self._built_sharing().get_config()


def _constant(value):
    def initializer(shape, dtype=None):
        return ops.convert_to_tensor(value, dtype=dtype)

    return initializer


def task_layers(model):
    """The layers of a model that hold T kernels, nested models included, in order."""
    found = []
    for layer in model.layers:
        if isinstance(layer, TaskLayer):
            found.append(layer)
        elif isinstance(layer, keras.Model):
            found += task_layers(layer)
        else:
            inner = layer._flatten_layers(include_self=False)
            found += [child for child in inner if isinstance(child, TaskLayer)]
    return found
