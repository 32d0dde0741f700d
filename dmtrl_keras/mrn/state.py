"""The covariances of one kernel, which learn with it."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.backend import assert_true, checked, eager_scope
from dmtrl_keras.ground.types import Shape, Tensor
from dmtrl_keras.ground.validation import is_int, shown
from dmtrl_keras.kernels.state import KernelState, state_weight
from dmtrl_keras.mrn import tensor_normal
from dmtrl_keras.mrn.covariance import ModeCovariance

if TYPE_CHECKING:
    from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer

# A mode of a kernel: its name or its axis.
Mode: TypeAlias = str | int


class TensorNormalState(KernelState):
    """The covariances of one kernel (not for direct use): a child of the kernel's layer.

    The host gives `penalty` to the kernel's variable as its regularizer, and calls the
    state in its own `call`. Being a layer of full precision, it sees the kernel uncast.

    Args:
        regularizer: the `TensorNormalRegularizer`.
        kernel: function without arguments that returns the kernel.
        shape: tuple, the shape of the kernel.
        names: tuple of strings, the names of its modes.
        owner: str, the layer to name in errors.
        dtype: str, dtype of the state.
    """

    def __init__(
        self,
        regularizer: "TensorNormalRegularizer",
        kernel: Callable[[], Tensor],
        shape: tuple[int, ...],
        names: Sequence[str],
        owner: str,
        dtype: str,
    ) -> None:
        super().__init__(name="prior", dtype=dtype, trainable=False)
        self.regularizer = regularizer
        self.owner = owner
        self.names = tuple(names)
        self._kernel = kernel
        self._kernel_shape = tuple(shape)
        each = regularizer.each
        self._each = None if each is None else self._axis(each, "each")
        learned = [self._axis(mode, "modes") for mode in regularizer.modes]
        if len(set(learned)) < len(learned) or self._each in learned:
            raise ValueError(
                f"{owner}: expected distinct modes, none of them `each`. "
                f"Received: modes={regularizer.modes!r}, each={each!r}, which are the axes "
                f"{learned} and {self._each} of the kernel {self._kernel_shape}."
            )
        # In the order of the axes, whatever the order of the names.
        self._learned = sorted(learned)
        self._given = dict(zip(learned, regularizer.modes))
        tasks = self.names.index("task") if "task" in self.names else None
        if regularizer.mean == "shared" and tasks in (None, self._each):
            raise ValueError(
                f"{owner}: mean='shared' is a mean over the tasks, for a kernel with a "
                f"task axis that is not `each`. Received: each={each!r}, and a kernel with "
                f"the axes {list(self.names)}."
            )

    def _axis(self, mode: Any, argument: str) -> int:
        order = len(self._kernel_shape)
        if is_int(mode, -order, order - 1):
            return int(mode) % order
        if isinstance(mode, str) and mode in self.names:
            return self.names.index(mode)
        hint = ""
        if mode == "task":
            hint = (
                " The kernel has no task axis: use a layer with T kernels such as "
                "TaskDense, or name the axes (`TensorNormalPrior(..., axes=...)`)."
            )
        raise ValueError(
            f"{self.owner}: TensorNormalRegularizer expected `{argument}` among "
            f"{list(self.names)}, the modes of the kernel {self._kernel_shape}, or axes. "
            f"Received: {mode!r}.{hint}"
        )

    def build(self, input_shape: Shape | None = None) -> None:
        regularizer, shape = self.regularizer, self._kernel_shape
        rest = [axis for axis in range(len(shape)) if axis != self._each]
        self._sizes = tuple(shape[axis] for axis in rest)
        self.modes: dict[str, ModeCovariance] = {}
        # Of the covariances that are shared: this kernel's part, and its columns.
        self._shared: dict[ModeCovariance, tuple[keras.Variable, float]] = {}
        shared = regularizer.shared
        self._counts = [self._columns(rest, axis) for axis in self._learned]
        for axis, count in zip(self._learned, self._counts):
            mode, size = self._given[axis], shape[axis]
            name = self.names[axis]
            if mode in shared:
                covariance = shared[mode]
                covariance.join(self, size)
                start = count * ops.convert_to_numpy(covariance.covariance)
                label = "scatter" if name == "task" else f"{name}_scatter"
                self._shared[covariance] = state_weight(self, label, start), count
            else:
                covariance = regularizer.new_covariance(mode, name, self.dtype_policy)
                own = (
                    (size, size) if self._each is None else (shape[self._each], size, size)
                )
                try:
                    covariance.build(own)
                except ValueError as error:
                    raise ValueError(f"{self.owner}, mode {name!r}: {error}") from error
            self.modes[name] = covariance
        self._positions = [rest.index(axis) for axis in self._learned]
        self.step = state_weight(self, "step", np.zeros((), "int32"))
        # Where the tasks are, if they share a mean.
        self._tasks: int | None = None
        self._start: keras.Variable | None = None
        mean = regularizer.mean
        if self._shared_mean:
            self._tasks = rest.index(self.names.index("task"))
        elif not (isinstance(mean, str) and mean == "zero"):
            value = self._kernel_now() if isinstance(mean, str) else self._given_mean(mean)
            # Last, so that the state without it is saved in the same order.
            self._start = state_weight(self, "mean", value)
        self.built = True

    def _columns(self, rest: list[int], axis: int) -> float:
        """How many columns a mode's scatter is of; a mean over the tasks takes one."""
        size = self._kernel_shape[axis]
        count = math.prod(self._sizes) // size
        if self._shared_mean and self.names[axis] != "task":
            tasks = self._kernel_shape[self.names.index("task")]
            return count * max(tasks - 1, 1) / tasks
        return count

    @property
    def _shared_mean(self) -> bool:
        mean = self.regularizer.mean
        return isinstance(mean, str) and mean == "shared"

    def _kernel_now(self) -> np.ndarray:
        with eager_scope():
            return ops.convert_to_numpy(self._kernel())

    def _given_mean(self, mean: Any) -> np.ndarray:
        values, shape = np.asarray(mean), self._kernel_shape
        fits = values.ndim == len(shape) and all(
            own in (1, d) for own, d in zip(values.shape, shape)
        )
        if not fits:
            raise ValueError(
                f"{self.owner}: `mean` must have the shape of the kernel, {shape}, or ones "
                f"instead of some of its sizes. Received: {values.shape}."
            )
        with np.errstate(over="ignore"):
            values = np.broadcast_to(values, shape).astype(self.variable_dtype)
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"{self.owner}: `mean` must be finite in {self.variable_dtype}. "
                f"Received: {shown(self.regularizer.mean)}."
            )
        return values

    # --- the prior ----------------------------------------------------------------

    def _arranged(self, kernel: Tensor) -> Tensor:
        """The kernel as samples, `(n, d_1, ..., d_K)`."""
        x = ops.cast(kernel, self.variable_dtype)
        return x[None] if self._each is None else ops.moveaxis(x, self._each, 0)

    def _mean(self, x: Tensor) -> Tensor | None:
        """The mean of a kernel, both arranged; None: zero."""
        if self._start is not None:
            return self._arranged(ops.convert_to_tensor(self._start))
        if self._tasks is None:
            return None
        whitener = self._matrices("whitener")[self._tasks]
        return ops.stop_gradient(tensor_normal.common_mean(x, whitener, self._tasks))

    def _matrices(self, name: str) -> list[Tensor]:
        """A matrix of every mode, None where there is no covariance."""
        matrices = [None] * len(self._sizes)
        for position, covariance in zip(self._positions, self.modes.values()):
            matrices[position] = ops.convert_to_tensor(getattr(covariance, name))
        return matrices

    def penalty(self, kernel: Tensor) -> Tensor:
        """The negative log prior of a kernel, without its constant, times the strength."""
        x = self._arranged(kernel)
        mean = self._mean(x)
        x = x if mean is None else x - mean
        # The gradient of half the quadratic form is `S^-1 W` (DRN Eq. 12): the product that
        # gives the value gives it too, and need not be differentiated.
        precisions = self._matrices("precision")
        gradient = ops.stop_gradient(tensor_normal.mode_products(x, precisions))
        form = ops.sum(x * gradient)
        half = form - ops.stop_gradient(form) / 2
        log_determinant = ops.sum(
            tensor_normal.log_determinant(self._sizes, self._matrices("whitener"))
        )
        return self.regularizer.strength * (half + log_determinant / 2)

    def call(self, training: bool | None = None) -> None:
        every = self.regularizer.update_every
        if not training or every is None:
            return
        step = ops.convert_to_tensor(self.step) + 1
        due = ops.equal(step, every)
        x = ops.stop_gradient(self._arranged(self._kernel()))
        finite = ops.all(ops.isfinite(x))
        # A kernel that is not finite must not spoil what was learned.
        assert_true(
            finite,
            f"{self.owner}: the kernel has values that are not finite (NaN or infinite); "
            "its covariances can't be updated. Is the learning rate too high?",
        )
        variables = self._updated_variables()
        values = ops.cond(
            ops.logical_and(due, finite),
            lambda: self._flip_flop(x),
            lambda: [ops.convert_to_tensor(variable) for variable in variables],
        )
        for variable, value in zip(variables, values):
            variable.assign(value)
        self.step.assign(ops.where(due, ops.zeros_like(step), step))

    def update(self) -> None:
        """Update the covariances from the kernel as it is, outside of a training step.

        Raises:
            ValueError: if the kernel has values that are not finite.
        """
        self._check_finite()
        values = self._flip_flop(self._arranged(self._kernel()))
        for variable, value in zip(self._updated_variables(), values):
            variable.assign(value)

    def _updated_variables(self) -> list[keras.Variable]:
        variables = [scatter for scatter, _ in self._shared.values()]
        for covariance in self.modes.values():
            variables += [covariance.covariance, covariance.whitener, covariance.precision]
        return variables

    def _flip_flop(self, x: Tensor) -> list[Tensor]:
        """One sweep over the modes, each given the newest of the others (DRN Eq. 5)."""
        whiteners = self._matrices("whitener")
        mean = self._mean(x)
        if mean is not None:
            # What is left of equal kernels by rounding says nothing.
            noise = 8 * np.finfo(self.variable_dtype).eps * ops.max(ops.abs(x))
            x = x - mean
            x = ops.where(ops.max(ops.abs(x)) > noise, x, ops.zeros_like(x))
        # The squares of the kernel as it is may overflow, or vanish.
        unit = ops.max(ops.abs(x))
        unit = ops.where(unit > 0, unit, ops.ones_like(unit))
        x = x / unit
        scatters: list[Tensor] = []
        updated: list[Tensor] = []
        size = math.prod(self._sizes)
        for position, count, covariance in zip(
            self._positions, self._counts, self.modes.values()
        ):
            pooled = self._each is None
            scatter = tensor_normal.mode_covariance(x, whiteners, position, pooled)
            scatter = scatter * (size // self._sizes[position])
            if position == self._tasks:
                tasks = self._sizes[position]
                trace = ops.trace(scatter, axis1=-2, axis2=-1)[..., None, None]
                scatter = scatter + trace / (tasks * max(tasks - 1, 1))
            shared = covariance in self._shared
            if shared or not covariance.scale_free:
                scatter = scatter * unit * unit
                scatter = checked(
                    scatter,
                    ops.all(ops.isfinite(scatter)),
                    f"{self.owner}: the kernel is too large for the squares that its "
                    "covariances are made of. Is the learning rate too high?",
                )
            if shared:
                scatters.append(scatter)
                for other in covariance.others(self):
                    theirs, columns = other.part_of(covariance)
                    scatter = scatter + ops.convert_to_tensor(theirs)
                    count += columns
            values = covariance.estimate(scatter, count)
            whiteners[position] = values[1]
            updated += values
        return [*scatters, *updated]

    def part_of(self, covariance: ModeCovariance) -> tuple[keras.Variable, float]:
        """This kernel's part of a shared covariance: the scatter and its columns."""
        return self._shared[covariance]

    # --- what was learned -----------------------------------------------------------

    @property
    def mean(self) -> np.ndarray:
        """The mean M of the prior, a NumPy array of the kernel's shape.

        With `mean="shared"` it is that of the kernel and the covariances as they are.
        """
        if self._start is not None:
            return ops.convert_to_numpy(self._start)
        if self._tasks is None:
            return np.zeros(self._kernel_shape, self.variable_dtype)
        x = self._arranged(self._kernel())
        mean = ops.convert_to_numpy(self._mean(x))
        mean = mean[0] if self._each is None else np.moveaxis(mean, 0, self._each)
        return np.broadcast_to(mean, self._kernel_shape).copy()

    def restart(self) -> None:
        """Take the kernel as it is now for the start, with `mean="start"`.

        Raises:
            ValueError: with another mean.
        """
        if self._start is None or not isinstance(self.regularizer.mean, str):
            raise ValueError(
                f"{self.owner}: restart() is for mean='start'. "
                f"Received: mean={shown(self.regularizer.mean)}."
            )
        self._start.assign(self._kernel())

    @property
    def covariances(self) -> dict[str, np.ndarray]:
        """The learned covariances, a dict from mode name to a NumPy array.

        Each is `(d, d)`, or `(n, d, d)` with `each`.

        Raises:
            ValueError: if the kernel has values that are not finite.
        """
        self._check_finite()
        return {
            name: ops.convert_to_numpy(covariance.covariance)
            for name, covariance in self.modes.items()
        }

    def _check_finite(self) -> None:
        kernel = ops.convert_to_numpy(self._kernel())
        if not np.all(np.isfinite(kernel)):
            raise ValueError(
                f"{self.owner}: the kernel has {np.count_nonzero(~np.isfinite(kernel))} "
                "values that are not finite; its covariances mean nothing."
            )
