"""MTAL: every task its own kernels, similar ones of different tasks aggregated."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.backend import eager_scope, full_precision
from dmtrl_keras.ground.types import Factors, FactorShapes, Shape, Tensor
from dmtrl_keras.ground.validation import (
    check_number,
    check_one_of,
    check_positive,
    from_keras,
    is_int,
    refusal,
    shown,
)
from dmtrl_keras.kernels.independent import Independent
from dmtrl_keras.kernels.parameterization import Parameterization, one_of, register
from dmtrl_keras.kernels.state import state_weight
from dmtrl_keras.mtal import similarity as similar_kernels
from dmtrl_keras.mtal.similarity import KernelKind, Pairing

KernelThreshold: TypeAlias = (
    float
    | Literal["related", "unrelated"]
    | keras.optimizers.schedules.LearningRateSchedule
)
TaskWeights: TypeAlias = float | Literal["learned"] | ArrayLike
Mode: TypeAlias = Literal["forward", "overwrite"]
MODES = ("forward", "overwrite")

# In training a kernel is aggregated with its partners alone if none has more than these,
# or than T - 1. Each one more costs time, whether it is used or not.
_PARTNERS = 4
_OWNER = "SimilarKernels"
# All pairs of this many kernels take 270 MB of cosines.
_MOST_COMPARED = 8192


@register
class SimilarKernels(Parameterization):
    """Kernels of different tasks that are similar are shared (MTAL Eq. 3-6).

    Variables: `kernel`, the stacked kernel `(*window, in, out, T)`; and `logits`, `(T, T)`,
    if the weights are learned. Each kernel of a task is compared with those of the other
    tasks by the cosine (Eq. 3); the pairs at or above the threshold (Eq. 4) are aggregated,
    `phi_ij w_i + phi_ji w_j` with `phi_ij + phi_ji = 1` (Eq. 5), and the mean over all
    aggregates of a kernel takes its place (Eq. 6). A kernel that has none stays as it is.

    What the paper leaves open is read as follows.

    - *What a kernel is.* `kernels="slice"`: one input and one output channel, 9 numbers of
      a 3 x 3 window. `kernels="filter"`: one output channel with all its input channels.
      The shares of Table 6, 8 to 17% in every layer, are the chance that two random slices
      have a cosine of 0.4; that of filters is nil beyond the first layer. In a window of
      one entry, as of 1 x 1 convolutions and dense layers, slices are numbers, and the
      filters are compared.
    - *Which kernels are paired.* The text and Algorithm 1 write pairs of tasks, Figure 7
      draws pairs of kernels. `pairs="index"`: those of equal index, at most T - 1 for each.
      `pairs="all"`: every kernel of task i with every one of task j, so that a bank (Eq. 6)
      has an entry for each similar kernel.
    - *What is updated.* Algorithm 1 writes the aggregate over the kernel (line 13) and then
      goes on by back propagation. `mode="overwrite"` does so: after each update by the
      optimizer the aggregate takes the place of the variable, and in between every task
      has the gradient of its own loss alone. `mode="forward"`: the aggregate is a function
      of the kernels that are trained, so that gradients flow to both kernels of each pair;
      which pairs pass is not differentiated. With weights of one half the two kernels of
      a pair then have equal gradients, and what is between them stays as it was: such a
      pair parts only by what other partners do.
    - *In which order.* All tasks at once, from the kernels as they were; a loop over
      tasks that overwrites them would depend on the order of the tasks.
    - *When.* The pairs are chosen anew in training, at every step (the paper's algorithm)
      or every `update_every`. `evaluate`, `predict`, an exported model and a layer that is
      frozen (`trainable = False`) use the last choice.

    Source: Feng & Chen, "Learning Twofold Heterogeneous Multi-Task by Sharing Similar
    Convolution Kernel Pairs", 2021.

    Args:
        threshold: number in [0, 1]; `"related"` (0.4) or `"unrelated"` (0.55), the paper's
            values for such tasks; or a `keras.optimizers.schedules.LearningRateSchedule`,
            a function of the training step.
        weights: 0.5 for all pairs; `"learned"`, per layer and pair of tasks, from 0.5 on;
            or a matrix `(T, T)` of `phi_ij` in [0, 1] with `phi_ij + phi_ji = 1`.
        pairs: `"all"` or `"index"`; None: `"index"` for slices, `"all"` for filters.
        related: MTAL_R: the groups of tasks that may share, a list of lists of two or more
            tasks, numbers or (in `multitask`) names. None: all tasks.
        update_every: positive int, steps from one choice of the pairs to the next; with
            `mode="overwrite"`, from one aggregation to the next.
        kernels: `"slice"` or `"filter"`.
        mode: `"forward"` or `"overwrite"`.

    Raises:
        ValueError: on a malformed argument, such as a threshold out of [0, 1] or a group of
            a single task; on learned weights with `mode="overwrite"`, which leaves them
            without a gradient; on all pairs of too many slices; on JAX on `update_every`
            above 1 or a schedule with `mode="overwrite"`, since there an optimizer's step
            knows nothing of the steps of layers.

    Example:

    >>> from dmtrl_keras.parameterizations import SimilarKernels
    >>> SimilarKernels("related", related=[[0, 1], [2, 3]]).threshold
    0.4
    """

    name = "similar"
    convolutions_only = True
    starts_apart = True  # Algorithm 1, line 1.
    compares_kernels = True
    short_forms = ("threshold",)

    def __init__(
        self,
        threshold: KernelThreshold = "related",
        weights: TaskWeights = 0.5,
        pairs: Pairing | None = None,
        related: Sequence[Sequence[int | str]] | None = None,
        update_every: int = 1,
        kernels: KernelKind = "slice",
        mode: Mode = "forward",
    ) -> None:
        self.threshold = _check_threshold(threshold)
        self.weights = _check_weights(weights)
        self.kernels = check_one_of("kernels", kernels, similar_kernels.KINDS, _OWNER)
        self.mode = check_one_of("mode", mode, MODES, _OWNER)
        if pairs is not None:
            check_one_of("pairs", pairs, similar_kernels.PAIRINGS, _OWNER)
        self.pairs = pairs or similar_kernels.usual_pairs(kernels)
        self.related = _check_related(related)
        self.update_every = check_positive(
            "update_every", update_every, _OWNER, ", a number of steps"
        )
        if mode == "overwrite":
            if self.weights == "learned":
                raise ValueError(
                    "SimilarKernels: learned weights have no gradient where the aggregates "
                    'overwrite the kernels. Use mode="forward", or weights of 0.5. '
                    f"Received: mode={mode!r}, weights={weights!r}."
                )
            # Between two updates the kernels are what the layer works with.
            self.is_stacked_kernel = self.projects_updates = True

    def with_names(self, names: Sequence[str]) -> Self:
        if self.related is None or not _named(self.related):
            return self
        unknown = sorted({task for group in self.related for task in group} - set(names))
        if unknown:
            raise ValueError(
                f"SimilarKernels: `related` has the unknown tasks {unknown}. "
                f"The tasks are {list(names)}."
            )
        related = [[names.index(task) for task in group] for group in self.related]
        return type(self)(**{**self._arguments(), "related": related})

    def _groups(self, tasks: int) -> np.ndarray:
        """Bool array `(T, T)`: which tasks may share."""
        if self.related is None:
            return similar_kernels.related_tasks(tasks)
        if _named(self.related):
            raise ValueError(
                "SimilarKernels: a layer knows its tasks by number. Give `related` "
                f"numbers from 0 to {tasks - 1}, or use `multitask`. "
                f"Received: related={self.related!r}."
            )
        if max(map(max, self.related)) >= tasks:
            raise ValueError(
                f"SimilarKernels: `related` must have tasks from 0 to {tasks - 1}. "
                f"Received: related={self.related!r}."
            )
        return similar_kernels.related_tasks(tasks, self.related)

    def threshold_at(self, step: Tensor) -> Tensor:
        """The threshold at a training step, a number or scalar tensor."""
        return self.threshold(step) if callable(self.threshold) else self.threshold

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        tasks = kernel.shape[-1]
        factors = {"kernel": kernel}
        if self.weights == "learned":
            factors["logits"] = np.zeros((tasks, tasks))
        elif np.ndim(self.weights) and np.shape(self.weights)[0] != tasks:
            raise ValueError(
                f"SimilarKernels: `weights` must be a matrix for {tasks} tasks. "
                f"Received: shape {np.shape(self.weights)}."
            )
        self._groups(tasks)
        self._check_size(kernel.shape)
        if self.mode == "overwrite":
            # Line 13 of Algorithm 1 comes before the first update.
            with eager_scope():
                start = self.projected(ops.convert_to_tensor(kernel), None)
                factors["kernel"] = ops.convert_to_numpy(start)
        return factors

    def _check_size(self, shape: tuple[int, ...]) -> None:
        """Refuse comparisons that would take gigabytes."""
        *_, outputs, tasks = self._compared(shape)
        if self.pairs == "all" and outputs * tasks > _MOST_COMPARED:
            raise ValueError(
                f'SimilarKernels: pairs="all" would compare each of {outputs * tasks:,} '
                f"kernels ({self.kernels}s of a stacked kernel {tuple(shape)}) with all "
                f'others; at most {_MOST_COMPARED:,} are possible. Use pairs="index", or '
                'kernels="filter".'
            )

    def _compared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stacked kernel's shape in which an output channel is one kernel."""
        return similar_kernels.compared_shape(tuple(shape), self.kernels)

    def new_state(
        self,
        factors: Callable[[], Factors],
        start: Mapping[str, np.ndarray],
        tasks: int,
        dtype: str,
    ) -> "SelectionState | StepCounter | None":
        # A single task has nothing to choose.
        if tasks == 1:
            return None
        if self.mode == "forward":
            return SelectionState(self, factors, start["kernel"], dtype)
        if not callable(self.threshold) and self.update_every == 1:
            return None
        if keras.config.backend() == "jax":
            raise ValueError(
                'SimilarKernels: on JAX mode="overwrite" needs update_every=1 and a fixed '
                "threshold, since an optimizer's step knows nothing of the layers' steps. "
                f"Received: update_every={self.update_every}, threshold={self.threshold!r}."
            )
        return StepCounter()

    def own_entries(
        self, shapes: FactorShapes, tasks: int, task: int
    ) -> dict[str, np.ndarray]:
        """A task's stored kernels, though other tasks use those that are similar."""
        return {"kernel": one_of(tasks, task)}

    def projected(self, kernel: Tensor, state: keras.layers.Layer | None) -> Tensor:
        """What the optimizer's update leaves of the stacked kernel, if it is overwritten.

        Args:
            kernel: tensor `(*window, in, out, T)`.
            state: the `StepCounter`, or None.
        """
        if self.mode == "forward" or kernel.shape[-1] == 1:
            return kernel
        step = 0 if state is None else ops.convert_to_tensor(state.step)

        def aggregated() -> Tensor:
            # As the selections of layers, in full precision.
            dtype = keras.backend.standardize_dtype(kernel.dtype)
            full = ops.cast(kernel, full_precision(dtype))
            factors = {"kernel": full, "step": step}
            factors["selection"] = self.selected(factors)
            mixed = ops.reshape(self._mixed(full, factors), (kernel.shape[-1], -1))
            return ops.cast(ops.reshape(ops.transpose(mixed), kernel.shape), dtype)

        if self.update_every == 1:
            return aggregated()
        return ops.cond(
            ops.equal(step % self.update_every, 0), aggregated, lambda: kernel + 0
        )

    def task_weights(self, factors: Factors) -> Tensor:
        """The weights `phi_ij` of Eq. 5, a tensor `(T, T)` in full precision."""
        kernel = factors["kernel"]
        tasks = kernel.shape[-1]
        dtype = full_precision(keras.backend.standardize_dtype(kernel.dtype))
        if self.weights == "learned":
            logits = ops.cast(factors["logits"], dtype)
            return ops.sigmoid(logits - ops.transpose(logits))
        weights = np.broadcast_to(np.asarray(self.weights, "float64"), (tasks, tasks))
        return ops.convert_to_tensor(weights, dtype)

    def select(self, kernel: Tensor, step: Tensor) -> dict[str, Tensor]:
        """The pairs that pass (Eq. 3, 4) among the kernels of a layer.

        Args:
            kernel: float tensor `(*window, in, out, T)`.
            step: int or int tensor, the training step, for a schedule.

        Returns:
            A dict: `"selection"`, a bool tensor `(groups, size, size)`, True for the pairs;
            and, of all pairs, the same as lists, `"partners"` and `"counts"`.
        """
        selection = self._similar(kernel, step)
        if self.pairs == "index":
            return {"selection": selection}
        capacity = self._capacity(self._compared(kernel.shape))
        partners, counts = similar_kernels.partners_of(selection, capacity)
        return {"selection": selection, "partners": partners, "counts": counts}

    def _similar(self, kernel: Tensor, step: Tensor) -> Tensor:
        """The `"selection"` of `select` alone."""
        *shape, outputs, tasks = self._compared(kernel.shape)
        groups, threshold = self._groups(tasks), self.threshold_at(step)
        if self.pairs == "index":
            compared = ops.reshape(kernel, (math.prod(shape), outputs, tasks))
            selection = similar_kernels.similar_by_task(compared, threshold, groups)
        else:
            compared = ops.reshape(kernel, (*shape, outputs, tasks))
            rows = similar_kernels.kernel_rows(compared)
            compared = similar_kernels.comparable(rows, tasks, self.pairs)
            selection = similar_kernels.similar_pairs(compared, threshold, groups)
        # TensorFlow sends no int8 to other machines.
        return ops.cast(selection, "bool")

    def _capacity(self, shape: tuple[int, ...]) -> int:
        """How many partners of a kernel are listed."""
        return min(self._most(shape), max(_PARTNERS, shape[-1] - 1))

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        kernel = factors["kernel"]
        if tasks > 1 and self.mode == "forward":
            fixed = factors | {"kernel": ops.stop_gradient(kernel)}
            return self._mixed(kernel, factors | {"selection": self.selected(fixed)})
        return Independent().compose({"kernel": kernel}, tasks)

    def _mixed(self, kernel: Tensor, factors: Factors) -> Tensor:
        """The aggregated kernels, `(T, *window, in, out)`, for a choice of pairs."""
        *shape, tasks = kernel.shape
        compared = ops.reshape(kernel, self._compared(kernel.shape))
        if self.pairs == "index":
            mixed = self._by_task(compared, factors)
        else:
            mix = self._by_partners if "partners" in factors else self._by_matrix
            mixed = Independent().compose({"kernel": mix(compared, factors)}, tasks)
        return ops.reshape(mixed, (tasks, *shape))

    def _by_task(self, kernel: Tensor, factors: Factors) -> Tensor:
        """Of equal index: the tasks that meet are few, and no lists are needed."""
        *shape, outputs, tasks = kernel.shape
        return similar_kernels.aggregate_by_task(
            ops.reshape(kernel, (math.prod(shape), outputs, tasks)),
            factors["selection"],
            self.task_weights(factors),
            self.weights == "learned",
        )

    def _by_matrix(self, kernel: Tensor, factors: Factors) -> Tensor:
        rows = similar_kernels.kernel_rows(kernel)
        weights = self.task_weights(factors | {"kernel": kernel})
        return similar_kernels.aggregated(
            rows, tuple(kernel.shape), factors["selection"], weights
        )

    def _by_partners(self, kernel: Tensor, factors: Factors) -> Tensor:
        """The aggregated kernels, by the lists where they are long enough."""
        partners, counts = factors["partners"], factors["counts"]
        *shape, outputs, tasks = kernel.shape
        coefficients = similar_kernels.partner_coefficients(
            partners, counts, self.task_weights(factors), kernel.dtype
        )
        columns = ops.reshape(kernel, (math.prod(shape), outputs * tasks))

        def listed() -> Tensor:
            learned = self.weights == "learned"
            mixed = similar_kernels.aggregate_partners(columns, coefficients, learned)
            return ops.reshape(mixed, kernel.shape)

        if partners.shape[1] >= self._most(kernel.shape):
            return listed()
        return ops.cond(
            ops.max(counts) <= partners.shape[1],
            listed,
            lambda: self._by_matrix(kernel, factors),
        )

    def compared_pairs(self, shape: tuple[int, ...]) -> int:
        """How many pairs of kernels are compared, each once.

        Args:
            shape: tuple, the stacked kernel's, as from `compared_shape`.
        """
        *_, outputs, tasks = shape
        related = int(self._groups(tasks).sum()) // 2
        return related * outputs * (1 if self.pairs == "index" else outputs)

    def _most(self, shape: tuple[int, ...]) -> int:
        """The most partners that a kernel can have."""
        *_, outputs, tasks = shape
        return (tasks - 1) * (1 if self.pairs == "index" else outputs)

    def compose_flops(self, shapes: FactorShapes) -> int:
        shape = self._compared(shapes["kernel"])
        if shape[-1] == 1 or self.mode == "overwrite":
            return 0
        partners = self._capacity(shape)
        return 2 * int(np.prod(shape)) * (partners + 1)

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        """How much of task t's kernels comes from task k's: `(T, T)`, columns sum to 1."""
        if tasks == 1:
            return ops.eye(1)
        weights = self.task_weights(factors)
        others = similar_kernels.coefficients(self.selected(factors), weights)
        groups, size, _ = others.shape
        shape = (groups, size // tasks, tasks, size // tasks, tasks)
        others = ops.mean(ops.sum(ops.reshape(others, shape), axis=3), axis=(0, 1))
        own = 1 - ops.sum(others, axis=1)
        return ops.transpose(others + ops.diag(own))

    def selected(self, factors: Factors) -> Tensor:
        """The pairs of the last choice; those that would be chosen now if none is kept.

        Args:
            factors: dict of tensors, those of a layer and of its state.

        Returns:
            A bool tensor `(groups, size, size)`, as from `select`.
        """
        if "selection" in factors:
            return factors["selection"]
        return self._similar(factors["kernel"], factors.get("step", 0))

    def _arguments(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "weights": self.weights,
            "pairs": self.pairs,
            "related": self.related,
            "update_every": self.update_every,
            "kernels": self.kernels,
            "mode": self.mode,
        }

    def get_config(self) -> dict[str, Any]:
        config = self._arguments()
        if callable(self.threshold):
            config["threshold"] = keras.optimizers.schedules.serialize(self.threshold)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**as_saved(config))


def as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a configuration has; those of before 0.2 are of filters."""
    return {"kernels": "filter", **config}


class StepCounter(keras.layers.Layer):
    """Counts the training steps (not for direct use): a child of the kernels' layer."""

    def __init__(self) -> None:
        super().__init__(name="selection", trainable=False)

    def build(self, input_shape: Shape | None = None) -> None:
        self.step = state_weight(self, "step", np.zeros((), "int32"))
        self.built = True

    def tensors(self, training: bool | None = False) -> dict[str, Tensor]:
        """The step, by name."""
        return {"step": ops.convert_to_tensor(self.step)}

    def call(self, training: bool | None = None) -> None:
        if training:
            self.step.assign(ops.convert_to_tensor(self.step) + 1)


class SelectionState(keras.layers.Layer):
    """Which kernels are similar (not for direct use): a child of the kernels' layer.

    Being a layer of full precision, it sees the kernels uncast.

    Args:
        sharing: the `SimilarKernels`.
        factors: function without arguments that returns the dict of the variables.
        start: array `(*window, in, out, T)`, the kernels at the start.
        dtype: str, dtype to compare in.
    """

    def __init__(
        self,
        sharing: SimilarKernels,
        factors: Callable[[], Factors],
        start: np.ndarray,
        dtype: str,
    ) -> None:
        super().__init__(name="selection", dtype=dtype, trainable=False)
        self._sharing = sharing
        self._factors = factors
        self._start: np.ndarray | None = start

    def build(self, input_shape: Shape | None = None) -> None:
        with eager_scope():
            start = ops.convert_to_tensor(self._start, self.variable_dtype)
            found = {
                name: ops.convert_to_numpy(value)
                for name, value in self._sharing.select(start, 0).items()
            }
        self._start = None
        self._chosen = {
            name: state_weight(self, name, value) for name, value in found.items()
        }
        self.step = state_weight(self, "step", np.zeros((), "int32"))
        self.built = True

    def tensors(self, training: bool | None = False) -> dict[str, Tensor]:
        """The choice, by name, for `SimilarKernels.compose`; in training with the lists."""
        names = self._chosen if training else ["selection"]
        # The values: Keras takes its variables for tensors, but a gradient can't read them.
        return {name: ops.stop_gradient(self._chosen[name]) for name in names}

    def load_own_variables(self, store: Any) -> None:
        """Files of before 0.2 have lists of the partners of equal index, too."""
        own = [*self._chosen, "step"]
        saved = [str(number) for number in range(len(store.keys()))]
        if len(saved) == len(own) + 2:
            store = {str(n): store[old] for n, old in enumerate([saved[0], saved[-1]])}
        super().load_own_variables(store)

    def refresh(self) -> None:
        """Choose the pairs anew from the kernels as they are now."""
        self._assign(self._select(ops.convert_to_tensor(self.step)))

    def _select(self, step: Tensor) -> list[Tensor]:
        kernel = ops.convert_to_tensor(self._factors()["kernel"])
        kernel = ops.cast(ops.stop_gradient(kernel), self.variable_dtype)
        return list(self._sharing.select(kernel, step).values())

    def _assign(self, values: Sequence[Tensor]) -> None:
        for variable, value in zip(self._chosen.values(), values):
            variable.assign(value)

    def call(self, training: bool | None = None) -> None:
        if not training:
            return
        step = ops.convert_to_tensor(self.step)
        every = self._sharing.update_every
        if every == 1:
            values = self._select(step)
        else:
            values = ops.cond(
                ops.equal(step % every, 0),
                lambda: self._select(step),
                lambda: list(self.tensors(training=True).values()),
            )
        self._assign(values)
        self.step.assign(step + 1)


def _check_threshold(threshold: Any) -> Any:
    if isinstance(threshold, dict):
        make = keras.optimizers.schedules.deserialize
        threshold = from_keras(_OWNER, make, config=threshold)
    if isinstance(threshold, keras.optimizers.schedules.LearningRateSchedule):
        return threshold
    if isinstance(threshold, str) and threshold in similar_kernels.THRESHOLDS:
        return similar_kernels.THRESHOLDS[threshold]
    other = f", one of {list(similar_kernels.THRESHOLDS)}, or a schedule"
    return check_number("threshold", threshold, _OWNER, 1, closed=True, alternative=other)


def _check_weights(weights: Any) -> Any:
    if isinstance(weights, str) and weights == "learned":
        return weights
    other = "0.5, 'learned', or "
    matrix = similar_kernels.checked_weights(weights, _OWNER, other)
    if matrix.ndim == 0 and matrix != 0.5:
        raise refusal("weights", weights, _OWNER, other + similar_kernels.WEIGHTS)
    return matrix.tolist()


def _named(groups: Sequence[Sequence[Any]]) -> bool:
    return any(isinstance(task, str) for task in itertools.chain(*groups))


def _check_related(related: Any) -> list[list[Any]] | None:
    if related is None:
        return None
    problem = ValueError(
        "SimilarKernels: `related` must be a list of groups, each of two or more different "
        f"tasks (numbers, or names in `multitask`). Received: related={shown(related)}."
    )
    if isinstance(related, str) or not isinstance(related, (list, tuple)) or not related:
        raise problem
    groups = []
    for group in related:
        if isinstance(group, str) or not isinstance(group, (list, tuple, set)):
            raise problem
        group = list(group)
        names = all(isinstance(task, str) for task in group)
        numbered = all(map(is_int, group))
        if not (names or numbered) or len(set(group)) != len(group) or len(group) < 2:
            raise problem
        groups.append(group if names else list(map(int, group)))
    if len({isinstance(group[0], str) for group in groups}) > 1:
        raise problem
    return groups
