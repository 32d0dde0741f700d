"""The kernels of T tasks as one child of a layer.

A layer with T kernels is the forward pass; what its kernels are, how they are applied and
what learns beside them is here. A layer may have several such children.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.backend import assert_true, eager_scope, full_precision
from dmtrl_keras.ground.keras_private import flatten_layers, rebuilding
from dmtrl_keras.ground.types import Factors, FactorShapes, Initializer, Tensor
from dmtrl_keras.ground.validation import from_keras, is_int, refusal
from dmtrl_keras.kernels.lora import LoRA
from dmtrl_keras.kernels.parameterization import Parameterization, warn_of_concerns
from dmtrl_keras.kernels.plan import Convolve, Geometry, Stage, apply_plan, plan_flops
from dmtrl_keras.kernels.state import (
    KernelState,
    StatefulRegularizer,
    StatePenalty,
    mode_names,
)


def draw_stacked_kernel(
    initializer: Callable[..., Any] | None,
    shape: tuple[int, ...],
    tasks: int,
    common: bool,
    dtype: str = "float32",
) -> np.ndarray:
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
    given: Any = initializer or keras.initializers.GlorotUniform()
    if common:
        draws = [given]
    elif isinstance(getattr(given, "seed", None), numbers.Integral):
        # An initializer with a fixed seed always draws the same values.
        seeds = np.random.default_rng(given.seed).integers(2**31, size=tasks)
        config = given.get_config()
        draws = [type(given).from_config({**config, "seed": int(seed)}) for seed in seeds]
    else:
        draws = [given] * tasks
    kernels = [ops.convert_to_numpy(draw(shape, dtype=dtype)) for draw in draws]
    return np.repeat(np.stack(kernels, axis=-1), tasks // len(kernels), axis=-1)


class TaskKernel(keras.layers.Layer):
    """The kernels of T tasks (not for direct use): a child of the layer that applies them.

    Its variables are those of the parameterization. Beside them it has what the
    parameterization keeps (`selection`) and what the regularizer learns (`prior`).
    The host builds the child in its own `build` and calls it in its own `call`.

    Args:
        sharing: the `Parameterization`.
        tasks: int, T.
        owner: str, the layer to name in errors.
        shared_input: bool; the input is the same for all tasks, not grouped.
        contractible: bool; factors may be applied one after another, without composing.
        initializer: Keras initializer of one task's kernel.
        regularizer: penalty on the stacked kernel, or a `StatefulRegularizer`.
        constraint: projection of the stacked kernel.
        common_draw: bool; all tasks start from the same draw.
        saved_by_host: bool; the host saves the variables with its own, in one group of a
            file, as the layers with one kernel do.
        **kwargs: of `keras.layers.Layer`.

    Attributes:
        factors: dict of the variables.
        rank: tuple of ints, or None.
        shape: tuple, the shape of the stacked kernel, `(*window, in, out, T)`.
        selection: state of the parameterization, a layer, or None.
        prior: state of the regularizer, a `KernelState`, or None.
    """

    def __init__(
        self,
        sharing: Parameterization,
        tasks: int,
        owner: str,
        shared_input: bool = False,
        contractible: bool = True,
        initializer: Callable[..., Any] | None = None,
        regularizer: Callable[..., Any] | None = None,
        constraint: Callable[..., Any] | None = None,
        common_draw: bool = True,
        saved_by_host: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._saved_by_host = saved_by_host
        self.sharing = sharing
        self.tasks = tasks
        self.owner = owner
        self.shared_input = shared_input
        self.initializer = initializer
        self.regularizer = regularizer
        self.constraint = constraint
        self.common_draw = common_draw
        self.selection = None
        self.prior: KernelState | None = None
        self.quantization: str | None = None
        # Along which axes of the kernels a scale is one; None: all but the last two.
        self.scale_axes: tuple[int, ...] | None = None
        self._fixed: tuple[Parameterization, Parameterization] | None = None
        self._factors: dict[str, keras.Variable] = {}
        self._scales: dict[str, keras.Variable] = {}
        self._kept: dict[str, keras.Variable] = {}
        self._start: Mapping[str, np.ndarray] | None = None
        self._alone: tuple[Stage, ...] | None = None
        self._geometry: Geometry | None = None
        # A variable is projected after each update; factors can't be, so that their
        # composition is projected wherever it is used.
        self._projects_composed = constraint is not None and not sharing.is_stacked_kernel
        self._contractible = contractible and not self._projects_composed

    # --- building -------------------------------------------------------------

    def start_from(self, factors: Mapping[str, np.ndarray]) -> None:
        """Start from given factors instead of a decomposed draw; before `build`.

        Args:
            factors: dict of arrays, as the parameterization's `decompose` returns.
        """
        self._start = factors

    def build(self, kernel_shape: tuple[int, ...]) -> None:
        """Make the variables.

        Args:
            kernel_shape: tuple, the shape of one task's kernel.
        """
        values = self._draw(kernel_shape) if self._start is None else self._start
        self._start = None
        self.shape = (*kernel_shape, self.tasks)
        direct = self.sharing.is_stacked_kernel
        regularizer = self._penalty()
        if regularizer is not None and not direct:
            if getattr(regularizer, "proximal", False):
                raise ValueError(
                    f"{self.owner}: `proximal=True` needs a kernel that is a variable, not "
                    f"one composed of factors. Received: {self.regularizer!r} with "
                    f"sharing={self.sharing.name!r}. Expected: proximal=False, or "
                    "`factor_regularizers` of the parameterization."
                )
            # The penalty is of the composed kernel. It hangs on the first factor,
            # so that Keras counts it once, and not while the layer is frozen.
            regularizer = _OfComposed(regularizer, self)
        own = self.sharing.factor_regularizers
        if not set(own) <= set(values):
            raise ValueError(
                f"{self.owner}: expected regularizers of the factors {list(values)}. "
                f"Received: {sorted(own)}."
            )
        constraint = self.constraint if direct else None
        if self.sharing.projects_updates:
            constraint = _Projection(self)
        kept, self._kept = self._kept, {}
        self._factors, self._scales = {}, {}
        quantized = self._quantized(values)
        for name, value in values.items():
            if name in kept:
                self._factors[name] = kept[name]
                continue
            if name in quantized:
                self._add_quantized(name, value)
                continue
            self._factors[name] = self.add_weight(
                name=name,
                shape=value.shape,
                initializer=_constant(value),
                trainable=not self.sharing.is_frozen(name),
                regularizer=_both(own.get(name), regularizer),
                constraint=constraint,
            )
            regularizer = None
        if self.prior is not None and not self.prior.built:
            # It may keep what the kernel starts from.
            self.prior.build()
        self.rank = self.sharing.rank(self._shapes())
        if self.selection is None:
            dtype = full_precision(self.variable_dtype)
            self.selection = self.sharing.new_state(
                lambda: self._tensors() if self._scales else dict(self._factors),
                values,
                self.tasks,
                dtype,
            )
            if self.selection is not None:
                self.selection.build()
        for state in (self.selection, self.prior):
            # Keras asks those layers alone that have no children.
            for layer in [] if state is None else flatten_layers(state):
                layer.quantize = self.quantize
        self.built = True

    def _draw(self, shape: tuple[int, ...]) -> Mapping[str, np.ndarray]:
        with eager_scope():
            start = from_keras(
                self.owner,
                draw_stacked_kernel,
                initializer=self.initializer,
                shape=shape,
                tasks=self.tasks,
                common=self.common_draw,
                dtype=full_precision(self.variable_dtype),
            )
        try:
            factors = self.sharing.decompose(start)
        except ValueError as error:
            raise ValueError(
                f"{self.owner}, stacked kernel {(*shape, self.tasks)}: {error}"
            ) from error
        warn_of_concerns(self.sharing, factors, (*shape, self.tasks), self.owner)
        return factors

    def _penalty(self) -> Callable[..., Any] | None:
        """The regularizer as a function of the stacked kernel, or None."""
        if not isinstance(self.regularizer, StatefulRegularizer):
            return self.regularizer
        if self.prior is None:
            self.prior = self.regularizer.new_state(
                lambda: self.value(),
                self.shape,
                mode_names(len(self.shape), task_axis=True),
                self.owner,
                full_precision(self.variable_dtype),
            )
        return StatePenalty(self.prior)

    # --- changing what is built ----------------------------------------------

    def _rebuild(self, values: Mapping[str, np.ndarray]) -> None:
        """Make the variables anew, of other factors, or quantized."""
        self._start = values
        quantized = self._quantized(values)
        # An optimizer goes on with what stays as it is.
        kept = {
            name: variable
            for name, variable in self._factors.items()
            if name in values and name not in quantized and name not in self._scales
        }
        old = [v for name, v in self._factors.items() if name not in kept]
        with rebuilding(self, [*old, *self._scales.values()]):
            self._kept = kept
            self.build(self.shape[:-1])
        self._alone = None
        if self._geometry is not None:
            self.plan_for(self._geometry)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: ops.convert_to_numpy(v) for name, v in self._tensors().items()}

    def check_lora(self, rank: Any) -> None:
        """Raise what keeps the kernels from `enable_lora`."""
        if self.constraint is not None:
            raise ValueError(
                f"{self.owner}: LoRA is not possible with a kernel constraint. "
                f"Received: {self.constraint!r}."
            )
        if not is_int(rank, 1):
            raise refusal("rank", rank, self.owner, "a positive int")
        if isinstance(self.sharing, LoRA):
            raise ValueError(
                f"{self.owner}: LoRA is enabled already. "
                f"Received: sharing={self.sharing!r}."
            )
        if self.selection is not None:
            raise ValueError(
                f"{self.owner}: LoRA needs kernels that can be frozen. Received: sharing="
                f"{self.sharing!r}, with which they change as long as they are similar."
            )

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: Initializer = "he_uniform",
        b_initializer: Initializer = "zeros",
    ) -> None:
        """Freeze the kernels, and train a difference of low rank for each.

        Args:
            rank: positive int, r.
            lora_alpha: number, by which the product is scaled, `lora_alpha / r`; None: r.
            a_initializer: Keras initializer of `lora_a`.
            b_initializer: of `lora_b`.

        Raises:
            ValueError: with a constraint, if it was done already, of similar kernels.
        """
        self.check_lora(rank)
        starts = [
            from_keras(self.owner, keras.initializers.get, identifier=one)
            for one in (a_initializer, b_initializer)
        ]
        sharing = from_keras(self.owner, LoRA, rank=rank, alpha=lora_alpha, of=self.sharing)
        frozen = self._arrays()
        self.sharing = sharing
        self._rebuild(sharing.over(frozen, self.shape[:-1], self.tasks, *starts))

    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Store the factors as 8-bit integers, which are no longer trained.

        Each output of each task's kernel has a scale, 127 by its largest absolute value;
        and so has each column of a matrix of factors, and of others each pair of entries of
        the last two axes. Where some factors are frozen
        (LoRA) only these are quantized.

        Args:
            mode: `"int8"`.
            type_check: bool; means nothing here.
            config: None, or `keras.quantizers.Int8QuantizationConfig` without quantizers of
                its own for weights. Activations are not quantized.

        Raises:
            ValueError: on another mode, or a quantizer for weights.
        """
        if mode is None:
            mode = getattr(config, "mode", None)
        if mode != "int8" or getattr(config, "weight_quantizer", None) is not None:
            raise ValueError(
                f"{self.owner}: kernels of several tasks can be quantized to 'int8', with "
                f"one scale for each output. Received: mode={mode!r}, config={config!r}. "
                "Other ways are for networks of single tasks, "
                "single_task(model, task).quantize(...)."
            )
        if self.quantization is not None:
            return
        values = self._arrays()
        self.quantization = mode
        self._rebuild(values)

    def _quantized(self, names: Iterable[str]) -> set[str]:
        """The names of the factors that are quantized."""
        if self.quantization is None:
            return set()
        frozen = {name for name in names if self.sharing.is_frozen(name)}
        return frozen or set(names)

    def _add_quantized(self, name: str, value: np.ndarray) -> None:
        axis = tuple(range(max(1, value.ndim - 2)))
        one = self.shape[:-1]
        if self.scale_axes is not None and value.shape[: len(one)] == one:
            axis = self.scale_axes
        floats = value.astype(full_precision(self.variable_dtype))
        found = keras.quantizers.abs_max_quantize(floats, axis=axis, to_numpy=True)
        integers, scale = (ops.convert_to_numpy(one) for one in found)
        self._factors[name] = self.add_weight(
            name=name,
            shape=integers.shape,
            initializer=_constant(integers),
            dtype="int8",
            autocast=False,
            trainable=False,
        )
        self._scales[name] = self.add_weight(
            name=f"{name}_scale",
            shape=scale.shape,
            initializer=_constant(scale),
            trainable=False,
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(v.shape) for name, v in self._factors.items()}

    # --- the order of work ----------------------------------------------------

    def plan_for(self, geometry: Geometry) -> None:
        """Choose the order of work with the fewest operations, or the one asked for.

        Args:
            geometry: the sizes for which operations are counted.

        Raises:
            ValueError: if factors are to be contracted that must be composed.
        """
        self._geometry = geometry
        self.plan = self._cheapest(self._shapes(), self.tasks, self.shared_input)

    def _cheapest(
        self, shapes: FactorShapes, tasks: int, shared_input: bool
    ) -> tuple[Stage, ...]:
        """The order of work of some tasks with such factors."""
        *_, inputs, outputs, _ = self.shape
        composition = Stage(
            "stacked",
            inputs,
            outputs,
            lambda factors: self.composed(factors, tasks),
            spatial=True,
            flops=self.sharing.compose_flops(shapes),
        )
        plans: Sequence[Sequence[Stage]] = []
        if self._contractible:
            plans = self.sharing.contractions(shapes)
        implementation = getattr(self.sharing, "implementation", "auto")
        if implementation == "contract" and not plans:
            raise ValueError(
                f'{self.owner}: `implementation="contract"` is not possible with '
                "a kernel constraint, with groups, or in a depthwise convolution: "
                'there the kernel must be composed. Use "auto" or "compose".'
            )
        if implementation == "compose":
            plans = []
        if implementation != "contract":
            plans = [*plans, (composition,)]
        geometry: Any = self._geometry

        def flops(plan: Sequence[Stage]) -> int:
            return self._flops(plan, tasks, shared_input, geometry)

        cheapest = min(plans, key=flops)
        return tuple(cheapest)

    def flops(self, geometry: Geometry, alone: bool = False) -> int:
        """Operations of one forward pass in the order of work that was chosen.

        Args:
            geometry: the sizes.
            alone: bool; of a task by a column of its own instead of the T tasks.
        """
        if alone:
            return self._flops(self._plan_alone(), 1, True, geometry)
        return self._flops(self.plan, self.tasks, self.shared_input, geometry)

    def _flops(
        self, plan: Sequence[Stage], tasks: int, shared_input: bool, geometry: Geometry
    ) -> int:
        return plan_flops(
            plan,
            tasks=tasks,
            shared_input=shared_input,
            geometry=geometry,
            window=math.prod(self.shape[:-3]),
        )

    def _plan_alone(self) -> tuple[Stage, ...]:
        """The order of work of one task by a column of its own."""
        if self._alone is None:
            shapes = self._shapes()
            found = self.sharing.task_factor(list(shapes))
            if found is not None:
                name, axis = found
                shape = list(shapes[name])
                shape[axis] = 1
                shapes[name] = tuple(shape)
            self._alone = self._cheapest(shapes, 1, True)
        return self._alone

    # --- what the kernels are ---------------------------------------------------

    @property
    def factors(self) -> dict[str, keras.Variable]:
        """The variables that the kernel is made of, by factor name."""
        return dict(self._factors)

    @property
    def scales(self) -> dict[str, keras.Variable]:
        """The scales of the factors that are quantized, by factor name."""
        return dict(self._scales)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: ops.convert_to_tensor(v) for name, v in self._factors.items()}
        for name, variable in self._scales.items():
            scale = ops.convert_to_tensor(variable)
            tensors[name] = ops.cast(tensors[name], scale.dtype) / scale
        return tensors

    def tensors(self, training: bool | None = False) -> dict[str, Tensor]:
        """The factors and the parameterization's state, as `compose` takes them."""
        tensors = self._tensors()
        if self.selection is None:
            return tensors
        return tensors | self.selection.tensors(training)

    def composed(self, factors: Factors, tasks: int) -> Tensor:
        """The kernels `(tasks, *window, in, out)`, the constraint applied."""
        kernel = self.sharing.compose(factors, tasks)
        if self.constraint is None or not self._projects_composed:
            return kernel
        kernel = self.constraint(ops.moveaxis(kernel, 0, -1))
        return ops.moveaxis(kernel, -1, 0)

    def value(self) -> Tensor:
        """The effective stacked kernel, `(*window, in, out, T)`.

        A variable where the tasks' kernels are independent, else the tensor that the
        factors compose to.
        """
        if self.sharing.is_stacked_kernel:
            return self._tensors()["kernel"] if self._scales else self._factors["kernel"]
        return ops.moveaxis(self.composed(self.tensors(), self.tasks), 0, -1)

    def value_alone(self, column: Tensor | None) -> Tensor:
        """The kernel `(*window, in, out)` of a task by a column of its own."""
        return self.composed(self.sharing.of_column(self.tensors(), column), 1)[0]

    @property
    def latents(self) -> int | None:
        """The entries of a new task's column of S; None: it takes a kernel of its own.

        0 where all tasks have the same kernel.
        """
        if self.sharing.is_of_all:
            return 0
        found = self.sharing.task_factor(list(self._factors))
        if found is None:
            return None
        name, axis = found
        return self._factors[name].shape[1 - axis]

    def task_matrix(self) -> Tensor:
        """S of DMTRL, a tensor `(K, T)`; column t has the coefficients of task t."""
        return self.sharing.task_matrix(self.tensors(), self.tasks)

    def own_weights(self, task: int) -> list[tuple[keras.Variable, np.ndarray]]:
        """What of the variables is one task's alone.

        Args:
            task: int, which.

        Returns:
            A list of `(variable, entries)`, boolean arrays that broadcast to the variable.
        """
        found = self.sharing.own_entries(self._shapes(), self.tasks, task)
        return [(self._factors[name], entries) for name, entries in found.items()]

    # --- the forward pass -------------------------------------------------------

    def call(self, training: bool | None = None) -> None:
        """Let the states learn, in training; once in a step, before `apply`.

        Of frozen kernels they stay as they are, as the statistics of Keras's frozen batch
        normalization do.
        """
        training = bool(training) and self.trainable and self.quantization is None
        if training and self.sharing.compares_kernels and self.tasks > 1:
            # Nothing is similar to NaN: the tasks would part without a word.
            assert_true(
                ops.all(ops.isfinite(ops.convert_to_tensor(self._factors["kernel"]))),
                f"{self.owner}: the kernel has values that are not finite (NaN or "
                "infinite); none can be compared. Is the learning rate too high?",
            )
        for state in (self.selection, self.prior):
            if state is not None:
                state(training=training)

    def apply(self, x: Tensor, training: bool | None, convolve: Convolve | None) -> Tensor:
        """Channels-last activations through the kernels, to the grouped layout.

        Args:
            x: tensor `(batch, ..., C)` with a shared input, else `(batch, ..., T * C)`.
            training: bool or None.
            convolve: function of activations and one kernel; None if the layer is dense.

        Returns:
            A tensor `(batch, ..., T * outputs)`.
        """
        return self.apply_factors(x, self.tensors(training), convolve)

    def apply_factors(
        self, x: Tensor, factors: Factors, convolve: Convolve | None, alone: bool = False
    ) -> Tensor:
        """As `apply`, with given factors, of the T tasks or of one alone.

        Args:
            x: tensor `(batch, ..., C)` with a shared input, or if `alone`, else
                `(batch, ..., T * C)`.
            factors: dict of tensors, as from `tensors`; if `alone`, from the
                parameterization's `of_column`.
            convolve: function of activations and one kernel; None if the layer is dense.
            alone: bool; for one task by a column of its own instead of the T tasks.

        Returns:
            A tensor `(batch, ..., T * outputs)`, or `(batch, ..., outputs)` if `alone`.
        """
        return apply_plan(
            self._plan_alone() if alone else self.plan,
            x,
            factors,
            tasks=1 if alone else self.tasks,
            shared_input=alone or self.shared_input,
            convolve=convolve,
        )

    # --- serialization ----------------------------------------------------------

    @property
    def fixed_sharing(self) -> Parameterization:
        """The parameterization with the ranks that the factors have.

        A saved layer must come back with the same variables, whatever it draws.
        """
        if self.built and self.rank is not None:
            # Kept: Keras's files know objects by their place in memory.
            if self._fixed is None or self._fixed[0] is not self.sharing:
                self._fixed = self.sharing, self.sharing.with_rank(self.rank)
            return self._fixed[1]
        return self.sharing

    def save_own_variables(self, store: Any) -> None:
        """Nothing, where the host saves them with its own."""
        if not self._saved_by_host:
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Nothing, where the host loads them with its own."""
        if not self._saved_by_host:
            super().load_own_variables(store)


class _OfComposed(keras.regularizers.Regularizer):
    """A penalty on the composed kernel, whatever variable it hangs on."""

    def __init__(self, penalty: Callable[..., Any], kernel: TaskKernel) -> None:
        self._penalty = penalty
        self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        return self._penalty(self._kernel.value())


class _FactorPenalty(keras.regularizers.Regularizer):
    """The penalty on a factor, and one on the composed kernel that hangs on it.

    Args:
        own: the factor's regularizer, whose proximal step this has.
        other: the regularizer of the composed kernel.
    """

    def __init__(self, own: Callable[..., Any], other: Callable[..., Any]) -> None:
        self._own = own
        self._other = other
        self.proximal = getattr(own, "proximal", False)

    def __call__(self, x: Tensor) -> Tensor:
        return self._own(x) + self._other(x)

    def proximal_step(self, w: Tensor, step: Any) -> Tensor:
        """The proximal step of the factor's own penalty."""
        own: Any = self._own
        return own.proximal_step(w, step)


def _both(
    own: Callable[..., Any] | None, other: Callable[..., Any] | None
) -> Callable[..., Any] | None:
    if own is None or other is None:
        return other if own is None else own
    return _FactorPenalty(own, other)


class _Projection(keras.constraints.Constraint):
    """What the parameterization makes of the updated kernel, then the constraint."""

    def __init__(self, kernel: TaskKernel) -> None:
        self._kernel = kernel

    def __call__(self, w: Tensor) -> Tensor:
        own = self._kernel
        w = own.sharing.projected(w, own.selection)
        return w if own.constraint is None else own.constraint(w)


def _constant(value: np.ndarray) -> Callable[..., Any]:
    def initializer(shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
        return ops.convert_to_tensor(value, dtype=dtype)

    return initializer
