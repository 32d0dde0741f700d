"""T copies of any Keras layer, whose kernels are related as those of other layers are."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from dmtrl_keras.ground.backend import eager_scope
from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.copying import config_of, copy_of
from dmtrl_keras.ground.keras_private import (
    MASK,
    attach,
    attached,
    flatten_layers,
    saving_as_h5,
    seed_generators,
)
from dmtrl_keras.ground.types import Initializer, Tasks, Tensor
from dmtrl_keras.ground.validation import (
    check_bool,
    check_tasks,
    from_keras,
    is_int,
    is_list,
    name_of,
    no_h5,
    refusal,
    shown,
    task_names,
)
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.factorization import Factorization, described
from dmtrl_keras.kernels.parameterization import (
    Parameterization,
    Sharing,
    one_of,
    warn_of_concerns,
)
from dmtrl_keras.kernels.task_kernel import TaskKernel
from dmtrl_keras.tasks.attention import AttentionOfAll
from dmtrl_keras.tasks.layout import TaskBatch, is_shape
from dmtrl_keras.tasks.one_input import (
    EinsumDenseOfAll,
    EmbeddingOfAll,
    OneInputOfAll,
)
from dmtrl_keras.tasks.recurrent import RecurrentOfAll

_INPUT = "input"

# What runs all copies of some layers together.
_AT_ONCE = (AttentionOfAll, RecurrentOfAll)
# Those of layers of one input.
_OF_ONE_INPUT = (EmbeddingOfAll, EinsumDenseOfAll)

# Names of weights that are no kernels, however many axes they have.
_NO_KERNELS = ("bias", "beta", "gamma", "scale", "alpha")


class _Held:
    """A layer that another one holds without making it a part of itself.

    Attributes:
        layer: the Keras layer.
        kernels: its variables that are kernels: trainable, with two axes at least, and
            no biases or scales.
        others: its other weights: biases, scales, running statistics.
        seeds: its state that is no weight: that of random numbers.
        of_all: what runs all its copies together, or None.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.kernels: list[keras.Variable] = []
        self.others: list[keras.Variable] = []
        self.seeds: list[keras.Variable] = []
        self.of_all: AttentionOfAll | RecurrentOfAll | OneInputOfAll | None = None

    def sort(self) -> None:
        """Sort the variables of the layer, which is built."""
        trained = {id(v) for v in self.layer.trainable_variables}
        for variable in self.layer.weights:
            kernel = id(variable) in trained and len(variable.shape) > 1
            kernel = kernel and not variable.name.endswith(_NO_KERNELS)
            (self.kernels if kernel else self.others).append(variable)
        self.seeds = [one.state for one in seed_generators(self.layer)]


def label_of(layer: keras.layers.Layer, variable: keras.Variable) -> str:
    """What a variable is called within its layer, such as `query/kernel`."""
    # It may have been built within the scopes of other layers.
    return f"/{variable.path}".rpartition(f"/{layer.name}/")[2].lstrip("/")


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskCopies(CheckedLayer):
    """T copies of a Keras layer, one for each task: the general way to T kernels.

    Any layer with weights will do: attention, recurrent layers, embeddings, a layer of
    other layers. Of each of its kernels (trainable weights of two axes at least, but for
    biases and scales) there is one stacked kernel of T tasks, `(*kernel shape, T)`, that is
    related as `sharing` says: independent, generated from shared factors (DMTRL Eq. 2, 4,
    8), under a prior, one for all. All other weights are each task's own, `(..., T)`:
    biases, scales, running statistics. Random numbers are drawn for one task after another.
    The copies are run one after another, each by the layer's own `call`; of Keras's
    attention layers all at once, but for the products with kernels, and of its recurrent
    layers (without dropout) in one loop over time. `multitask` makes such
    layers of those that no rule knows.

    Args:
        layer: a Keras layer, which is not changed. Its copies have its configuration; and
            its weights, if it is built, else a start of their own by its initializers.
        tasks: positive int T, or the list of task names.
        sharing: how the kernels are related: the name of a parameterization, or an
            instance; or a list of them, one for each kernel in the order of the layer's
            trainable variables.
        shared_input: bool, whether the input is the same for all tasks; or a list of
            these, one for each input.
        kernel_regularizer: a regularizer of the stacked kernels, such as
            `TensorNormalRegularizer` or `TraceNorm`; None: those that the layer has.
        common_draw: bool; all tasks start from the same kernels: those that the layer has,
            or one draw. None: True, but of kernels that are similar, and of draws whose
            ranks come from a tolerance: equal kernels have task rank 1 at any tolerance, so
            that the tasks could never differ.
        arguments: how the inputs are given to the layer, `{"args": [...], "kwargs": {...}}`
            with `{"input": n}` in the place of input n, as `multitask` writes it. None: one
            after another, as positional arguments.
        **kwargs: `name`, `trainable`; the dtype is that of the layer.

    Input shape:
        A tensor, or a list of them. Each holds the examples of all tasks, `(T * batch,
        ...)`, those of one task after those of another, as `TaskBatch` makes them; or, with
        `shared_input`, `(batch, ...)`.

    Output shape:
        What the layer returns, with the examples of all tasks, `(T * batch, ...)`;
        `TaskGroup` makes the grouped layout of it, `(batch, ..., T * C)`. Masks of the
        inputs reach each copy, and those of the copies the output.

    Raises:
        ValueError: on what is no layer, a layer of several tasks or an impossible rank; if
            the kernels are too small for it; if `sharing` is a list of another length.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskCopies, TaskGroup
    >>> lstm = keras.layers.LSTM(4)
    >>> lstm = TaskCopies(lstm, ["age", "mood"], "tucker", shared_input=True)
    >>> features = lstm(np.ones((2, 5, 3), "float32"))
    >>> tuple(features.shape), tuple(TaskGroup(2)(features).shape)
    ((4, 4), (2, 8))
    >>> lstm.kernel_names
    ['lstm_cell/kernel', 'lstm_cell/recurrent_kernel']
    """

    _takes_several = (list, tuple)
    _expected = "a tensor, or a list of them, with the examples of all tasks"
    _dtypes = (*CheckedLayer._dtypes, "string")
    _minimum_ndim = 1

    def __init__(
        self,
        layer: keras.layers.Layer,
        tasks: Tasks,
        sharing: Sharing | Sequence[Sharing] = "independent",
        shared_input: bool | Sequence[bool] = False,
        kernel_regularizer: Any = None,
        common_draw: bool | None = None,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        self._check_layer(layer, owner)
        own = {"name": f"{layer.name}_copies", "trainable": layer.trainable}
        super().__init__(**{**own, "dtype": layer.dtype_policy, **kwargs})
        self._tasks_argument = list(tasks) if isinstance(tasks, tuple) else tasks
        self.task_names = task_names(tasks, owner)
        self.tasks = check_tasks(len(self.task_names), owner)
        given: Any = sharing
        if is_list(given):
            self._sharing: Any = [parameterizations.get(one, owner) for one in given]
        else:
            self._sharing = parameterizations.get(given, owner)
        if is_list(shared_input):
            shared_input = [check_bool("shared_input", s, owner) for s in shared_input]
        else:
            shared_input = check_bool("shared_input", shared_input, owner)
        self.shared_input = shared_input
        if common_draw is not None:
            common_draw = check_bool("common_draw", common_draw, owner, " or None")
        self._common_draw_argument = common_draw
        self.kernel_regularizer = from_keras(
            owner, keras.regularizers.get, identifier=kernel_regularizer
        )
        if arguments is not None and not _are_arguments(arguments):
            raise refusal(
                "arguments", arguments, owner, "a dict of `args` and `kwargs`, or None"
            )
        self.arguments = arguments
        self.supports_masking = True
        weights = layer.get_weights() if layer.built else None
        self._held = _Held(self._copy(layer))
        self._start: list[np.ndarray] | None = weights
        self._factors: Sequence[Mapping[str, np.ndarray]] | None = None
        self._draws: list[list[np.ndarray]] = []
        # Children, in the order of the layer's kernels.
        self.kernels: list[TaskKernel] = []
        self.factorizations: list[Factorization] = []
        self._has_reports = False
        self._quantization: str | None = None
        self._first: list[Any] | None = None
        self._others: list[keras.Variable] = []

    @staticmethod
    def _check_layer(layer: Any, owner: str) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise refusal("layer", layer, owner, "a Keras layer")
        if getattr(layer, "tasks", None) is not None:
            raise refusal("layer", layer, owner, "a layer of one task")
        for part in (layer, *flatten_layers(layer)):
            if getattr(part, "quantization_mode", None) is not None:
                raise ValueError(
                    f"{owner}: a quantized layer can't have copies; quantize the layers of "
                    f"several tasks instead, model.quantize('int8'). Received: "
                    f"{name_of(part)}, quantized to {part.quantization_mode}."
                )

    @staticmethod
    def _copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = copy_of(layer)
        if not copy.trainable:
            # Whether the copies are trained is said by the layer that has them.
            copy.trainable = True
        return copy

    # --- building -------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.built:
            # Shapes alone, as Keras tells them to `build`, don't say what a layer takes.
            self._first = tree.flatten(args[0] if args else kwargs.get("inputs"))
        return super().__call__(*args, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Make the variables, for inputs of the layer's own dtype if it was not called."""
        inputs, self._first = self._first, None
        if inputs is None:
            inputs = self._of_shapes(input_shape)
        with eager_scope():
            self._make(inputs)

    def _of_shapes(self, input_shape: Any) -> list[keras.KerasTensor]:
        """Inputs of some shapes, of the layer's own dtype."""
        flat = [input_shape] if is_shape(input_shape) else list(input_shape)
        return [keras.KerasTensor(s, dtype=self.compute_dtype) for s in flat]

    def _make(self, inputs: Sequence[Any]) -> None:
        held = self._held.layer
        self._shared = self._shared_of(len(inputs))
        specs = self._specs(inputs)
        self._build_by_call(held, specs)
        if self._start is not None:
            held.set_weights(self._start)
        self._held.sort()
        variables = self._held.kernels
        if is_list(self._sharing) and len(self._sharing) != len(variables):
            names = [label_of(held, v) for v in variables]
            raise ValueError(
                f"{name_of(self)}: expected a `sharing` for each of the kernels {names}. "
                f"Received: {len(self._sharing)} of them."
            )
        for number, variable in enumerate(variables):
            own = self._sharing[number] if is_list(self._sharing) else self._sharing
            label = label_of(held, variable)
            report = None
            factors: Mapping[str, np.ndarray]
            if self._factors is None:
                stacked, factors = self._decomposed(own, number, specs)
                own, report = described(own, stacked, factors)
                warn_of_concerns(own, factors, stacked.shape, f"{name_of(self)}, {label}")
            else:
                factors = self._factors[number]
            regularizer = self.kernel_regularizer
            kernel = TaskKernel(
                own,
                self.tasks,
                f"{name_of(self)}, {label}",
                contractible=False,
                regularizer=variable.regularizer if regularizer is None else regularizer,
                constraint=variable.constraint,
                trainable=self.trainable,
                dtype=self.dtype_policy,
                name=label.replace("/", "_"),
            )
            kernel.quantization = self._quantization
            kernel.scale_axes = _scale_axes(held, label, variable)
            kernel.start_from(factors)
            kernel.build(tuple(variable.shape))
            self.kernels.append(kernel)
            if report is not None and not self._has_reports:
                report = dataclasses.replace(report, layer=f"{self.name}/{label}")
                self.factorizations.append(report)
        for variable in self._held.others:
            self._others.append(self._stacked(variable))
        # They are this layer's from here on, and saved with it.
        self._generators = seed_generators(held)
        for kind in _AT_ONCE:
            if kind.fits(held):
                self._held.of_all = kind(
                    held, self.tasks, lambda layer: self._build_by_call(layer, specs)
                )
        for one in _OF_ONE_INPUT if len(inputs) == 1 else ():
            if one.fits(held, self._shared[0]):
                self._held.of_all = one(held, self.tasks)
        self._start, self._factors, self._draws = None, None, []
        self.built = True

    def _shared_of(self, count: int) -> list[bool]:
        given = self.shared_input
        if isinstance(given, bool):
            return [given] * count
        if len(given) != count:
            raise ValueError(
                f"{name_of(self)}: expected `shared_input` for each of {count} inputs. "
                f"Received: {shown(given)}."
            )
        return list(given)

    def _build_by_call(self, layer: keras.layers.Layer, specs: Sequence[Any]) -> None:
        def call(inputs: Sequence[Any]) -> None:
            args, kwargs = self.given(inputs)
            layer(*args, **kwargs)

        from_keras(name_of(self), call, inputs=specs)
        if not layer.weights:
            raise refusal("layer", layer, name_of(self), "a layer with weights")

    def _decomposed(
        self, sharing: Parameterization, number: int, specs: Sequence[Any]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The stacked kernel that one of the kernels starts from, and its factors."""
        variable = self._held.kernels[number]
        first = ops.convert_to_numpy(variable).astype("float64")
        trained = self._start is not None
        common = self._common_draw_argument
        if common is None:
            apart = sharing.starts_apart
            # Equal kernels have task rank 1 at any tolerance.
            tolerant = getattr(sharing, "tolerance", None) is not None
            common = (trained and not apart) or not (apart or tolerant)
        try:
            if not common:
                draws = [draw[number] for draw in self._drawn(specs)]
                stacked = np.stack(draws, axis=-1).astype("float64")
                return stacked, sharing.decompose(stacked)
            stacked = np.repeat(first[..., None], self.tasks, axis=-1)
            if trained:
                return stacked, sharing.replicate(first, self.tasks)
            return stacked, sharing.decompose(stacked)
        except ValueError as error:
            raise ValueError(
                f"{name_of(self)}, {label_of(self.layer, variable)}, stacked kernel "
                f"{(*first.shape, self.tasks)}: {error}"
            ) from error

    def _drawn(self, specs: Sequence[Any]) -> list[list[np.ndarray]]:
        """New kernels of each task by the layer's initializers."""
        while len(self._draws) < self.tasks:
            other = self._copy(self.layer)
            self._build_by_call(other, specs)
            held = _Held(other)
            held.sort()
            self._draws.append([ops.convert_to_numpy(v) for v in held.kernels])
        return self._draws

    def _stacked(self, variable: keras.Variable) -> keras.Variable:
        """The weights of all tasks in the place of one of the layer."""
        value = np.repeat(ops.convert_to_numpy(variable)[..., None], self.tasks, axis=-1)
        return self.add_weight(
            name=label_of(self._held.layer, variable).replace("/", "_"),
            shape=value.shape,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(value, dtype),
            dtype=variable.dtype,
            trainable=variable.trainable,
            regularizer=variable.regularizer,
            constraint=variable.constraint,
            autocast=variable._autocast,
            aggregation=variable.aggregation,
        )

    def with_sharing(
        self,
        sharing: Sequence[Parameterization],
        factors: Sequence[Mapping[str, np.ndarray]],
        reports: Sequence[Factorization],
    ) -> "TaskCopies":
        """New, unbuilt copies whose kernels are parameterized otherwise.

        Args:
            sharing: a parameterization for each kernel.
            factors: a dict of arrays for each, as from its `decompose`.
            reports: what became of those that have factors.
        """
        ways = keras.saving.serialize_keras_object(list(sharing))
        config = {**self.get_config(), "sharing": ways}
        config.pop("quantization", None)
        copies = type(self).from_config(config)
        copies._factors = list(factors)
        copies.factorizations = list(reports)
        return copies

    def take_from(self, other: "TaskCopies") -> None:
        """Take what `other` has beside its kernels: other weights, and states of priors."""
        for variable, value in zip(self._others, other._others):
            variable.assign(value)
        for kernel, old in zip(self.kernels, other.kernels):
            if kernel.prior is not None and old.prior is not None:
                kernel.prior.set_weights(old.prior.get_weights())

    # --- what the copies are ----------------------------------------------------

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer of which there are copies; its own weights are not used."""
        return self._held.layer

    @property
    def kernel_names(self) -> list[str]:
        """The names of the kernels within the layer, in order."""
        return [label_of(self.layer, v) for v in self._held.kernels]

    @property
    def sharing(self) -> Parameterization | list[Parameterization]:
        """The parameterization of the kernels, or a list with one for each of them."""
        return self._sharing

    def task_twin(self) -> keras.layers.Layer:
        """The layer that one task alone would use, new and unbuilt."""
        config = {**config_of(self.layer), "name": self.name}
        config["trainable"] = self.trainable
        return type(self.layer).from_config(config)

    def task_weights(self, task: int) -> list[np.ndarray]:
        """The weights that the layer of one task has.

        Args:
            task: int in [0, T).

        Returns:
            A list of arrays, as `set_weights` of the twin takes them.

        Raises:
            ValueError: if there is no such task.
        """
        self._check_built("task_weights")
        if not is_int(task, 0, self.tasks - 1):
            raise refusal("task", task, name_of(self), f"an int from 0 to {self.tasks - 1}")
        stacked = [*(kernel.value() for kernel in self.kernels), *self._others]
        found = {
            id(v): ops.convert_to_numpy(value)[..., int(task)]
            for v, value in zip([*self._held.kernels, *self._held.others], stacked)
        }
        return [found[id(v)] for v in self.layer.weights]

    def own_weights(self, task: int) -> list[tuple[keras.Variable, np.ndarray]]:
        """What of the variables is one task's alone, as of `TaskKernel`."""
        found = [own for kernel in self.kernels for own in kernel.own_weights(task)]
        return [*found, *((v, one_of(self.tasks, task)) for v in self._others)]

    def _check_built(self, name: str) -> None:
        if not self.built:
            raise AttributeError(
                f"{name_of(self)}: build the layer before accessing `{name}`."
            )

    # --- the forward pass -------------------------------------------------------

    def _specs(self, inputs: Sequence[Any]) -> list[keras.KerasTensor]:
        """What one task's copy is called with, symbolically."""

        def spec(x: Any, shared: bool) -> keras.KerasTensor:
            batch, *rest = x.shape
            if batch is not None and not shared:
                if batch % self.tasks:
                    raise ValueError(
                        f"{name_of(self)}: expected a batch of the examples of "
                        f"{self.tasks} tasks. Received: an input of shape "
                        f"{tuple(x.shape)}."
                    )
                batch //= self.tasks
            dtype = keras.backend.standardize_dtype(x.dtype)
            if dtype.startswith(("float", "bfloat")):
                dtype = self.compute_dtype
            return keras.KerasTensor((batch, *rest), dtype=dtype)

        return [spec(x, shared) for x, shared in zip(inputs, self._shared)]

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """What the layer is called with.

        Args:
            inputs: list of the tensors.

        Returns:
            `(args, kwargs)` with the tensors in their places.
        """
        if self.arguments is None:
            return inputs, {}

        def place(value: Any) -> Any:
            if isinstance(value, dict):
                if set(value) == {_INPUT}:
                    return inputs[value[_INPUT]]
                return {name: place(one) for name, one in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(place(one) for one in value)
            return value

        return place(self.arguments["args"]), place(self.arguments["kwargs"])

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Run the copies.

        Args:
            inputs: tensor or list of tensors, see the class.
            training: bool or None.
        """
        for kernel in self.kernels:
            kernel(training=training)
        stacked = [
            kernel.composed(kernel.tensors(training), self.tasks) for kernel in self.kernels
        ]
        stacked += [ops.moveaxis(ops.convert_to_tensor(v), -1, 0) for v in self._others]
        if self.layer.trainable != self.trainable:
            # As that of batch normalization, what it does may depend on it.
            self.layer.trainable = self.trainable
        if self._held.of_all is not None:
            return self._at_once(tree.flatten(inputs), stacked)
        values = [ops.unstack(tensor, axis=0) for tensor in stacked]
        parts = [
            _parts(x, self.tasks, shared)
            for x, shared in zip(tree.flatten(inputs), self._shared)
        ]
        run = _Run(self._held)
        outputs = []
        for task in range(self.tasks):
            own_parts = [part[task] for part in parts]
            for part, mask in own_parts:
                # A layer may take the mask off its inputs, which others have too.
                attach(part, MASK, mask)
            args, kwargs = self.given([part for part, _ in own_parts])
            outputs.append(run([own[task] for own in values], args, kwargs))
        for number, new in run.updated().items():
            self._variable(number).assign(ops.stack(new, axis=-1))
        for loss in run.losses:
            self.add_loss(loss)
        return tree.map_structure(_together, *outputs)

    def _at_once(self, inputs: Sequence[Tensor], stacked: Sequence[Tensor]) -> Any:
        """What the copies return, by a layer that runs all of them together."""
        variables = [*self._held.kernels, *self._held.others]
        values = {id(v): tensor for v, tensor in zip(variables, stacked)}
        of_all: Any = self._held.of_all
        if isinstance(of_all, OneInputOfAll):
            return of_all(values, inputs[0], self._shared[0])
        inputs = [
            _together(*[x] * self.tasks) if shared else x
            for x, shared in zip(inputs, self._shared)
        ]
        args, kwargs = self.given(inputs)
        return of_all(values, args, kwargs)

    def _variable(self, number: int) -> keras.Variable:
        """The variable of all tasks in the place of one that a call has changed."""
        if number >= len(self.kernels):
            return self._others[number - len(self.kernels)]
        kernel = self.kernels[number]
        if not kernel.sharing.is_stacked_kernel:
            raise ValueError(
                f"{name_of(self)}: the layer assigns its kernel "
                f"{self.kernel_names[number]!r} when it is called, which can't be done to "
                f"factors. Received: sharing={kernel.sharing.name!r}. Expected: "
                "'independent'."
            )
        return kernel.factors["kernel"]

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:
        if not self.built:
            self._first = tree.flatten(inputs)
            self.build(None)
        args, kwargs = self.given(self._specs(tree.flatten(inputs)))
        outputs = self.layer.compute_output_spec(*args, **kwargs)

        def of_all(spec: Any) -> Any:
            if spec is None:
                return None
            batch, *rest = spec.shape
            batch = None if batch is None else batch * self.tasks
            return keras.KerasTensor((batch, *rest), dtype=spec.dtype)

        return tree.map_structure(of_all, outputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        outputs = self.compute_output_spec(self._of_shapes(input_shape))
        return tree.map_structure(lambda x: x.shape, outputs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """The mask of the output, of all tasks' examples.

        Args:
            inputs: tensor or list of tensors.
            previous_mask: their masks, in the same structure.
        """
        inputs, masks = tree.flatten(inputs), tree.flatten(previous_mask)
        args, _ = self.given(inputs)
        own, _ = self.given(masks)
        if not args or not getattr(self.layer, "supports_masking", False):
            return None
        mask = self.layer.compute_mask(args[0], own[0])
        if mask is None or not self._shared[0]:
            return mask
        batch = TaskBatch(list(self.task_names), name=self.name)
        return tree.map_structure(
            lambda m: None if m is None else batch._mask([m] * self.tasks), mask
        )

    # --- LoRA and quantization --------------------------------------------------

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Initializer = "he_uniform",
        b_initializer: Initializer = "zeros",
    ) -> None:
        """Freeze the kernels, and train a difference of low rank for each task.

        Arguments and errors are those of `TaskDense.enable_lora`.
        """
        self._check_built("enable_lora")
        if not self.kernels:
            raise ValueError(
                f"{name_of(self)}: there are no kernels for LoRA. Received: copies of "
                f"{name_of(self.layer)}."
            )
        for kernel in self.kernels:
            # All of them, or none.
            kernel.check_lora(rank)
        for kernel in self.kernels:
            kernel.enable_lora(rank, lora_alpha, a_initializer, b_initializer)
        self._sharing = [kernel.sharing for kernel in self.kernels]

    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Store the kernels, or their factors, as 8-bit integers.

        Arguments and errors are those of `TaskDense.quantize`.
        """
        for kernel in self.kernels:
            kernel.quantize(mode, config=config)

    @property
    def quantization(self) -> str | None:
        """`"int8"` of quantized kernels, else None."""
        return self.kernels[0].quantization if self.kernels else self._quantization

    # --- serialization ----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        if saving_as_h5():
            raise no_h5(name_of(self))
        config = super().get_config()
        config["layer"] = keras.saving.serialize_keras_object(self.layer)
        taken = config_of(self.layer)
        inner = config["layer"]["config"]
        config["layer"]["config"] = {n: v for n, v in inner.items() if n in taken}
        # It is built when the copies are.
        config["layer"].pop("build_config", None)
        config["tasks"] = self._tasks_argument
        sharing: Any = self._sharing
        if self.built:
            sharing = [kernel.fixed_sharing for kernel in self.kernels]
        config["sharing"] = keras.saving.serialize_keras_object(sharing)
        config["shared_input"] = self.shared_input
        config["kernel_regularizer"] = keras.regularizers.serialize(self.kernel_regularizer)
        config["common_draw"] = self._common_draw_argument
        config["arguments"] = keras.saving.serialize_keras_object(self.arguments)
        if self.quantization is not None:
            config["quantization"] = self.quantization
        config["factorizations"] = [one.get_config() for one in self.factorizations]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        reports = config.pop("factorizations", [])
        quantization = config.pop("quantization", None)
        for name in ("layer", "sharing", "arguments"):
            if isinstance(config[name], (dict, list)):
                config[name] = keras.saving.deserialize_keras_object(config[name])
        copies = super().from_config(config)
        copies.factorizations = [Factorization.from_config(one) for one in reports]
        copies._has_reports = True
        copies._quantization = quantization
        return copies


class _Run:
    """Runs a layer with other values in the place of its variables, again and again.

    Args:
        held: a built Keras layer, whose own variables stay as they are.
    """

    def __init__(self, held: _Held) -> None:
        self._layer, self._seeds = held.layer, held.seeds
        self._variables = [*held.kernels, *held.others]
        self._drawn = [ops.convert_to_tensor(v) for v in self._seeds]
        self._values: list[list[Tensor]] = [[] for _ in self._variables]
        self._changed: set[int] = set()
        self.losses: list[Tensor] = []

    def __call__(
        self, values: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the layer returns for some values of its kernels and other weights."""
        mapping = [*zip(self._variables, values), *zip(self._seeds, self._drawn)]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            before = [scope.get_current_value(v) for v in self._variables]
            outputs = self._layer(*args, **kwargs)
            after = [scope.get_current_value(v) for v in self._variables]
            self._drawn = [scope.get_current_value(v) for v in self._seeds]
        for number, (old, new) in enumerate(zip(before, after)):
            self._values[number].append(new)
            if new is not old:
                self._changed.add(number)
        self.losses += scope.losses
        return outputs

    def updated(self) -> dict[int, list[Tensor]]:
        """The new values of variables that the layer changed, by their numbers."""
        for variable, value in zip(self._seeds, self._drawn):
            variable.assign(value)
        return {number: self._values[number] for number in self._changed}


def _scale_axes(
    layer: keras.layers.Layer, label: str, variable: keras.Variable
) -> tuple[int, ...] | None:
    """Along which axes of a copied kernel a scale is one, as in Keras's own layers."""
    axes = len(variable.shape)
    if isinstance(layer, keras.layers.Embedding):
        # One for each word.
        return tuple(range(1, axes))
    if axes == 3 and "attention_output" not in label:
        # From features to heads.
        return (0,)
    return tuple(range(axes - 1))


def _are_arguments(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"args", "kwargs"}
        and isinstance(value["args"], (list, tuple))
        and isinstance(value["kwargs"], Mapping)
    )


def _parts(x: Tensor, tasks: int, shared: bool) -> list[tuple[Tensor, Any]]:
    """Each task's examples, and the mask that rides on them or None."""
    mask = attached(x, MASK)
    if shared:
        return [(x, mask)] * tasks
    parts = ops.split(x, tasks, axis=0)
    masks = [None] * tasks if mask is None else ops.split(mask, tasks, axis=0)
    return list(zip(parts, masks))


def _together(*outputs: Any) -> Any:
    """The examples of all tasks in one tensor, with their masks."""
    if outputs[0] is None:
        return None
    whole = ops.concatenate(outputs, axis=0)
    masks = [attached(x, MASK) for x in outputs]
    if all(mask is not None for mask in masks):
        attach(whole, MASK, ops.concatenate(masks, axis=0))
    return whole
