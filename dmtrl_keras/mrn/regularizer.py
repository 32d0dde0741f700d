"""Tensor-normal priors over kernels: DRN and MRN as a regularizer.

Long, Wang & Yu, "Learning Multiple Tasks with Deep Relationship Networks" (2015), and
Long, Cao, Wang & Yu, "Learning Multiple Tasks with Multilinear Relationship Networks" (NIPS
2017). The formulas are in `dmtrl_keras.tensor_normal`; here is the state that learns with
a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

import keras

from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import (
    check_bool,
    check_number,
    check_positive,
    finite_array,
    is_int,
    is_list,
    refusal,
)
from dmtrl_keras.kernels.state import StatefulRegularizer
from dmtrl_keras.mrn.covariance import Epsilon, ModeCovariance, Trace, check_epsilon
from dmtrl_keras.mrn.state import Mode, TensorNormalState
from dmtrl_keras.mrn.tensor_normal import check_covariance

# An array is of the kernel's shape, or of one that broadcasts to it.
Mean: TypeAlias = Literal["zero", "start", "shared"] | Tensor
MEANS = ("zero", "start", "shared")


@keras.saving.register_keras_serializable("dmtrl_keras")
class TensorNormalRegularizer(StatefulRegularizer):
    """Tensor-normal prior over a kernel, with covariances that learn (DRN, MRN).

    The penalty is `strength / 2 (vec(W - M)^T (S_1 (x) ... (x) S_K)^-1 vec(W - M) +
    sum_k (d / d_k) ln|S_k|)`, the negative log of the density (DRN Eq. 2, 8) without its
    constant. DRN Eq. 9 and 11 print the log-determinant with a minus, for which the update
    (Eq. 13) would be no stationary point. Between the gradient steps the covariances of the
    given modes follow the deviations `W - M` by the flip-flop update (Eq. 5, 13; see
    `ModeCovariance`); the others are identities.

    The mean M decides what the covariances see:

    - `"zero"` (Eq. 8): the kernel itself. Kernels that start from one draw then have a task
      correlation of 1 from the first update on, whatever the tasks are; kernels of
      draws of their own hardly any.
    - `"start"`: what was learned since the start, of which nothing is known at first. For
      pretrained kernels, and for any draw that is not zero. The start is a copy of the
      kernel as it is when the layer is built. It is state like the covariances: a
      file brings back the one that was saved, copies of the layer get it, each layer has
      its own, and freezing does not change it. `prior.restart()` takes the kernel as
      it is now, if values were assigned.
    - `"shared"`: how the tasks differ from what they have in common. The kernels are `W_t =
      M + V_t` with a free M `(..., 1)` and a prior on the V_t. It is not trained by
      gradient but profiled out: for any W and S_task the most likely M is the generalized
      least squares mean over the tasks (`tensor_normal.common_mean`),

          M = sum_t p_t W_t / sum_t p_t,    p = S_task^-1 1,

      and the gradient of the penalty with it is that with M held fixed, since M is at its
      minimum. So M needs no variable, no learning rate and no time to follow. With
      identity covariances the penalty is `strength / 2 sum_t |W_t - mean W|^2`: regularized
      multi-task learning (Evgeniou & Pontil, 2004) without their penalty on the
      common part. One direction of the tasks' space has no deviations; the update gives
      it the mean variance of the others, `C <- C + tr(C) / (T (T - 1)) 1 1^T`, as when M
      is integrated out. Deviations that are drawn independently then have correlation 0
      (else `-1 / (T - 1)`), and of two tasks nothing is learned.
    - An array: a known mean.

    As `kernel_regularizer` of the layers with T kernels (`TaskDense`, `TTConv2D`, ...) it
    applies to the stacked kernel, also where that is composed of factors. For any other
    Keras layer wrap it: `layers.TensorNormalPrior(keras.layers.Dense(10), regularizer)`.
    The covariances move in training only, never in `evaluate` or `predict`, and not while
    the layer is frozen (`trainable = False`), which has no penalty then either. They are
    non-trainable weights: saved, restored, and the same on all replicas. A layer that is
    called twice in a step also updates twice.

    With unit mean variances the largest precision of one mode is about `1 / epsilon`, and
    those of several modes multiply. Gradient descent needs `learning_rate * strength` times
    their product to be below 2.

    Args:
        strength: float, not negative. With a loss that is a mean over N examples, 1/N is
            the paper's objective.
        modes: the modes that learn a covariance, names or axes: `"task"`, `"class"`
            (outputs), `"feature"` (inputs), and for convolutions `"height"`, `"width"`, ...
            One or several; DRN: `"task"`, MRN: `("feature", "class", "task")`.
        update_every: positive int, training steps from one update to the next. None: the
            covariances stay as they start.
        epsilon: as in `ModeCovariance`, as are `relative`, `average` and `trace`; or a dict
            of them by mode, since a covariance needs the more of it the more entries and
            the fewer columns it is estimated from.
        relative: bool.
        average: bool.
        trace: `"size"`, a positive number, or None. With None the joint optimum of kernel
            and covariances is a kernel of zeros; an absolute `epsilon` bounds it.
        start: dict from mode to the matrix to start from; None: identities.
        each: a mode; the kernel's slices along it are drawn independently, each with its
            own covariances. `each="class"` learns how the tasks are related class by
            class.
        task_covariance: the same as `shared={"task": task_covariance}`.
        mean: `"zero"`, `"start"`, `"shared"`, or an array of the kernel's shape or with
            ones instead of some of its sizes, `(8, 5, 1)` for all tasks. `"start"` and an
            array take the memory of one more kernel.
        shared: dict from mode to a `ModeCovariance` that several layers share, with its
            own `epsilon` and so on. `"task"`: how tasks are related in several layers;
            `"feature"`: classifiers of different classes, on the same features. None: each
            layer has its own covariances.

    Raises:
        ValueError: on malformed arguments; when the layer is built, on modes that its
            kernel does not have, and on a mean that does not fit it.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras import TensorNormalRegularizer
    >>> from dmtrl_keras.layers import TaskDense
    >>> prior = TensorNormalRegularizer(1e-2, modes=("feature", "class", "task"))
    >>> layer = TaskDense(5, tasks=3, shared_input=True, kernel_regularizer=prior)
    >>> outputs = layer(np.zeros((2, 4), "float32"), training=True)
    >>> {mode: matrix.shape for mode, matrix in layer.prior.covariances.items()}
    {'feature': (4, 4), 'class': (5, 5), 'task': (3, 3)}
    """

    def __init__(
        self,
        strength: float = 1e-3,
        modes: Mode | Sequence[Mode] = "task",
        update_every: int | None = 1,
        epsilon: Epsilon | dict[Any, Epsilon] = 1e-3,
        relative: bool = True,
        average: bool = True,
        trace: Trace = "size",
        start: Mapping[Any, Tensor] | None = None,
        each: Mode | None = None,
        task_covariance: ModeCovariance | None = None,
        mean: Mean = "zero",
        shared: Mapping[Any, ModeCovariance] | None = None,
    ) -> None:
        owner = type(self).__name__
        self.strength = check_number("strength", strength, owner)
        if update_every is not None:
            other = " or None"
            update_every = check_positive("update_every", update_every, owner, other)
        given: Any = modes
        modes = tuple(given) if is_list(given) else (given,)
        valid = len(modes) > 0 and all(map(_is_mode, modes))
        if not valid or len(set(modes)) < len(modes):
            what = "one or several distinct names or axes"
            raise refusal("modes", given, owner, what)
        if each is not None and not _is_mode(each):
            raise refusal("each", each, owner, "the name of a mode, an axis, or None")
        start = {} if start is None else start
        if not isinstance(start, Mapping) or not set(start) <= set(modes):
            what = f"a dict by modes that are in `modes`={modes!r}"
            raise refusal("start", start, owner, what)
        shared = {} if shared is None else shared
        if not isinstance(shared, Mapping):
            raise refusal("shared", shared, owner, "a dict from mode to ModeCovariance")
        if task_covariance is not None:
            if "task" in shared:
                what = "no `task_covariance` beside that of 'task'"
                raise refusal("shared", shared, owner, what)
            shared = {**shared, "task": task_covariance}
        for mode, covariance in shared.items():
            if not isinstance(covariance, ModeCovariance):
                raise ValueError(
                    f"{owner}: a shared covariance (`task_covariance`, `shared`) must be a "
                    f"ModeCovariance. Received: {covariance!r} for {mode!r}."
                )
            if mode not in modes or mode in start or each is not None:
                raise ValueError(
                    f"{owner}: a shared covariance (`task_covariance`, `shared`) needs its "
                    "mode among `modes`, no start for it and no `each`. "
                    f"Received: {mode!r}, modes={modes!r}, start={start!r}, each={each!r}."
                )
        if len(set(map(id, shared.values()))) < len(shared):
            what = "another ModeCovariance for each mode"
            raise refusal("shared", dict(shared), owner, what)
        self.modes = modes
        self.update_every = update_every
        self.start = {
            mode: check_covariance(matrix, f"{owner}, mode {mode!r}, `start`").tolist()
            for mode, matrix in start.items()
        }
        self.each = each
        self.shared = dict(shared)
        if isinstance(epsilon, dict) and set(epsilon) != set(modes):
            raise ValueError(
                f"{owner}: `epsilon` must be a number, or a dict with each of the modes "
                f"{list(modes)}. Received: epsilon={epsilon!r}."
            )
        by_mode = epsilon if isinstance(epsilon, dict) else {"": epsilon}
        for value in by_mode.values():
            check_epsilon(value, owner, ", or a dict of them by mode")
        self.epsilon = epsilon
        self.mean = _checked_mean(mean, owner)
        self._options: dict[str, Any] = {
            "relative": check_bool("relative", relative, owner),
            "average": check_bool("average", average, owner),
            "trace": trace,
        }
        for mode in modes:
            self.new_covariance(mode)

    def new_covariance(
        self, mode: Mode, name: str | None = None, dtype: DType = "float32"
    ) -> ModeCovariance:
        """A `ModeCovariance` for one mode, as the arguments say."""
        epsilon = self.epsilon
        return ModeCovariance(
            epsilon[mode] if isinstance(epsilon, dict) else epsilon,
            **self._options,
            start=self.start.get(mode),
            name=name,
            dtype=dtype,
        )

    hint = (
        "Wrap the layer instead: dmtrl_keras.layers.TensorNormalPrior(layer, regularizer)."
    )

    def new_state(
        self,
        kernel: Callable[[], Tensor],
        shape: tuple[int, ...],
        names: tuple[str, ...],
        owner: str,
        dtype: str,
    ) -> TensorNormalState:
        """The covariances of one kernel, see `kernels.state.StatefulRegularizer`."""
        return TensorNormalState(self, kernel, shape, names, owner, dtype)

    def get_config(self) -> dict[str, Any]:
        shared = [
            [mode, keras.saving.serialize_keras_object(covariance)]
            for mode, covariance in self.shared.items()
            if mode != "task"
        ]
        return {
            "strength": self.strength,
            "modes": list(self.modes),
            "update_every": self.update_every,
            "epsilon": _as_pairs(self.epsilon),
            **self._options,
            "start": _as_pairs(self.start or None),
            "each": self.each,
            "task_covariance": keras.saving.serialize_keras_object(self.shared.get("task")),
            "mean": self.mean,
            "shared": shared or None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        task = keras.saving.deserialize_keras_object(config["task_covariance"])
        # Files of earlier versions have none.
        shared = {
            mode: keras.saving.deserialize_keras_object(covariance)
            for mode, covariance in config.get("shared") or ()
        }
        by_mode = {
            name: dict(map(tuple, config[name]))
            for name in ("epsilon", "start")
            if isinstance(config[name], (list, tuple))
        }
        return cls(**{**config, **by_mode, "task_covariance": task, "shared": shared})


def _checked_mean(mean: Any, owner: str) -> Any:
    """The mean by name, or as nested lists."""
    if isinstance(mean, str) and mean in MEANS:
        return mean
    if mean is None or isinstance(mean, str):
        raise refusal("mean", mean, owner, f"one of {MEANS}, or an array")
    values = finite_array("mean", mean, owner)
    if not values.ndim or not values.size:
        raise refusal("mean", mean, owner, f"one of {MEANS}, or an array, not empty")
    return values.tolist()


def _is_mode(mode: Any) -> bool:
    return isinstance(mode, str) or is_int(mode, -(2**31))


def _as_pairs(by_mode: Any) -> Any:
    # In a file a dict would turn modes that are axes into strings.
    return (
        [list(pair) for pair in by_mode.items()] if isinstance(by_mode, dict) else by_mode
    )
