"""Tensor-normal priors over kernels: DRN and MRN as a regularizer.

Long, Wang & Yu, "Learning Multiple Tasks with Deep Relationship Networks" (2015), and
Long, Cao, Wang & Yu, "Learning Multiple Tasks with Multilinear Relationship Networks" (NIPS
2017). The formulas are in `dmtrl_keras.tensor_normal`; here is the state that learns with
a layer.
"""

import math
import numbers
import uuid
import weakref

import keras
import numpy as np
from keras import ops

from dmtrl_keras import tensor_normal
from dmtrl_keras.backend import assert_true, shared_object
from dmtrl_keras.state import state_weight
from dmtrl_keras.validation import check_number, check_positive

_WINDOWS = {
    0: (),
    1: ("length",),
    2: ("height", "width"),
    3: ("depth", "height", "width"),
}


def mode_names(order, task_axis):
    """The names of a kernel's modes, from the axes that Keras gives it.

    Args:
        order: int, the number of axes.
        task_axis: bool, whether the last axis is that of the tasks.

    Returns:
        A tuple of strings, such as `("height", "width", "feature", "class", "task")`: input
        channels are features and output channels classes, as in the papers. Axes without
        a name of their own are `axis_0`, ...

    Example:

    >>> mode_names(3, task_axis=True), mode_names(2, task_axis=False)
    (('feature', 'class', 'task'), ('feature', 'class'))
    """
    tail = ("feature", "class", "task") if task_axis else ("feature", "class")
    window = _WINDOWS.get(order - len(tail))
    if window is None:
        return tuple(f"axis_{axis}" for axis in range(order))
    return (*window, *tail)


@keras.saving.register_keras_serializable("dmtrl_keras")
class ModeCovariance(keras.layers.Layer):
    """The learned covariance of one mode: state of the priors that use it.

    A `TensorNormalRegularizer` makes its own ones. Made by hand and given to several
    regularizers as `task_covariance`, one object lets their layers share the task
    covariance (DRN, remark after Eq. 9). Its maximum-likelihood update then is the mean
    over the kernels of all these layers. Sharing survives in `.keras` files, in the
    configuration of a `MultiTaskModel` and in `factorize`; `keras.models.clone_model`,
    which copies layer by layer, ends it.

    The update (DRN Eq. 5, 13) is `S <- c (M + epsilon I)`, where `M` is the scatter
    of the whitened kernel along the mode.

    Args:
        epsilon: float, not negative.
        relative: bool; `epsilon` is relative to the mean variance `tr(M) / d`, or (Eq. 13
            as printed) absolute.
        average: bool; `M` is the mean over the other dimensions (Eq. 5), or the sum. It
            matters only with an absolute `epsilon` or without a normalised trace.
        trace: `"size"`: c makes the trace d, so that the mean variance is one; a positive
            number: it makes the trace that number (Eq. 13: 1); None: c = 1.
        start: matrix `(d, d)` to start from, symmetric positive definite, taken as it is.
            None: a multiple of the identity.
        key: str, by which copies of one object in a saved model are known to be one. None:
            a new one.
        name: str.
        dtype: dtype of the state.

    Attributes:
        covariance: variable `(d, d)`, or `(n, d, d)`.
        whitener: variable of the same shape, the inverse of its Cholesky factor.
        precision: variable of the same shape, the inverse of the covariance.

    Raises:
        ValueError: on malformed arguments, on a start that is no covariance.

    Example:

    >>> import keras
    >>> from dmtrl_keras import ModeCovariance, TensorNormalRegularizer, layers
    >>> shared = ModeCovariance()
    >>> inputs = keras.Input((8,))
    >>> x = inputs
    >>> for first, name in [(True, "fc7"), (False, "fc8")]:
    ...     prior = TensorNormalRegularizer(task_covariance=shared)
    ...     x = layers.TaskDense(
    ...         4, 3, kernel_regularizer=prior, shared_input=first, name=name
    ...     )(x)
    >>> [tuple(v.shape) for v in shared.variables]
    [(3, 3), (3, 3), (3, 3)]
    """

    def __init__(
        self,
        epsilon=1e-3,
        relative=True,
        average=True,
        trace="size",
        start=None,
        key=None,
        name=None,
        dtype="float32",
    ):
        super().__init__(name=name, dtype=dtype, trainable=False)
        self.key = uuid.uuid4().hex if key is None else key
        check_number("epsilon", epsilon, self._owner())
        number = isinstance(trace, numbers.Real) and not isinstance(trace, bool)
        if not (trace in ("size", None) or (number and 0 < trace < math.inf)):
            raise ValueError(
                f"{self._owner()}: `trace` must be 'size', a positive number or None. "
                f"Received: trace={trace!r}."
            )
        self.epsilon = float(epsilon)
        self.relative = bool(relative)
        self.average = bool(average)
        self.trace = trace
        self.start = None
        if start is not None:
            start = tensor_normal.check_covariance(start, f"{self._owner()}, `start`")
            self.start = start.tolist()
        self._members = _Members()

    def _owner(self):
        return f"{type(self).__name__} {self.name!r}"

    def build(self, input_shape):
        """Make the state.

        Args:
            input_shape: tuple `(d, d)`, or `(n, d, d)` for n covariances.
        """
        size = input_shape[-1]
        start = self.start
        if start is None:
            start = np.eye(size) * (1.0 if self.trace is None else self._trace(size) / size)
        elif len(start) != size:
            raise ValueError(
                f"{self._owner()}: expected a start of shape {(size, size)}. "
                f"Received: {(len(start), len(start))}."
            )
        start = np.broadcast_to(np.asarray(start), input_shape)
        self.covariance = state_weight(self, "covariance", start)
        inverse = np.linalg.inv(np.linalg.cholesky(start))
        self.whitener = state_weight(self, "whitener", inverse)
        # With it a training step needs one product for the penalty and its gradient.
        self.precision = state_weight(self, "precision", np.linalg.inv(start))
        self.built = True

    def _trace(self, size):
        return float(size if self.trace == "size" else self.trace)

    def join(self, member, size):
        """Let one more layer's kernel take part in the update.

        Args:
            member: the layer's state.
            size: int, T.

        Raises:
            ValueError: if the layers have different numbers of tasks.
        """
        if not self.built:
            self.build((size, size))
        if tuple(self.covariance.shape) != (size, size):
            raise ValueError(
                f"{self._owner()} is the covariance of {self.covariance.shape[-1]} tasks, "
                f"but {member.owner} has {size}."
            )
        self._members.add(member)

    def others(self, member):
        """The states of the other layers that share this covariance."""
        return [other for other in self._members.all() if other is not member]

    def estimate(self, scatter, count):
        """The covariance that a scatter matrix gives, its whitener and its precision.

        Args:
            scatter: tensor `(..., d, d)`, the sum over the other dimensions.
            count: int or tensor, the product of the other dimensions.

        Returns:
            Three tensors like `scatter`.
        """
        size = scatter.shape[-1]
        matrix = (scatter + ops.swapaxes(scatter, -1, -2)) / 2
        if self.average:
            matrix = matrix / count
        identity = ops.eye(size, dtype=matrix.dtype)
        ridge = self.epsilon
        if self.relative:
            mean = ops.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / size
            # A kernel of zeros has no scale; it gives the identity.
            ridge = ridge * ops.maximum(mean, keras.config.epsilon() ** 4)
        matrix = matrix + ridge * identity
        if self.trace is not None:
            trace = ops.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
            matrix = matrix * (self._trace(size) / trace)
        whitener = tensor_normal.whitener(matrix)
        precision = ops.matmul(ops.swapaxes(whitener, -1, -2), whitener)
        return matrix, whitener, precision

    def get_config(self):
        config = super().get_config()
        del config["trainable"]
        return {
            **config,
            "epsilon": self.epsilon,
            "relative": self.relative,
            "average": self.average,
            "trace": self.trace,
            "start": self.start,
            "key": self.key,
        }

    @classmethod
    def from_config(cls, config):
        return shared_object(config["key"], lambda: cls(**config))


class _Members:
    """Layers' states, in the order in which they joined, not kept alive."""

    def __init__(self):
        self._references = []

    def add(self, member):
        self._references.append(weakref.ref(member))

    def all(self):
        alive = (reference() for reference in self._references)
        return [member for member in alive if member is not None]


@keras.saving.register_keras_serializable("dmtrl_keras")
class TensorNormalRegularizer(keras.regularizers.Regularizer):
    """Tensor-normal prior over a kernel, with covariances that learn (DRN, MRN).

    The penalty is `strength / 2 (vec(W)^T (S_1 (x) ... (x) S_K)^-1 vec(W) + sum_k (d / d_k)
    ln|S_k|)`, the negative log of the density (DRN Eq. 2, 8) without its constant. DRN
    Eq. 9 and 11 print the log-determinant with a minus, for which the update (Eq. 13) would
    be no stationary point. Between the gradient steps the covariances of the
    given modes follow the kernel by the flip-flop update (Eq. 5, 13; see
    `ModeCovariance`); the others are identities. Prior mean is zero.

    As `kernel_regularizer` of the layers with T kernels (`TaskDense`, `TTConv2D`, ...) it
    applies to the stacked kernel, also where that is composed of factors. For any other
    Keras layer wrap it: `layers.TensorNormalPrior(keras.layers.Dense(10), regularizer)`.
    The covariances move in training only, never in `evaluate` or `predict`. They are
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
        task_covariance: a `ModeCovariance` for the task mode that several layers share,
            with its own `epsilon` and so on; None: each layer has its own.

    Raises:
        ValueError: on malformed arguments; when the layer is built, on modes that its
            kernel does not have.

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
        strength=1e-3,
        modes="task",
        update_every=1,
        epsilon=1e-3,
        relative=True,
        average=True,
        trace="size",
        start=None,
        each=None,
        task_covariance=None,
    ):
        owner = type(self).__name__
        check_number("strength", strength, owner)
        if update_every is not None:
            other = " or None"
            update_every = check_positive("update_every", update_every, owner, other)
        single = isinstance(modes, (str, numbers.Integral))
        modes = (modes,) if single else tuple(modes)
        if not modes or len(set(modes)) < len(modes):
            raise ValueError(
                f"{owner}: `modes` must be one or several distinct names or axes. "
                f"Received: modes={modes!r}."
            )
        unknown = set(start or {}) - set(modes)
        if unknown:
            raise ValueError(
                f"{owner}: `start` must be a dict by modes that are in `modes`={modes!r}. "
                f"Received: {sorted(map(str, unknown))}."
            )
        if task_covariance is not None:
            if not isinstance(task_covariance, ModeCovariance):
                raise ValueError(
                    f"{owner}: `task_covariance` must be a ModeCovariance. "
                    f"Received: {task_covariance!r}."
                )
            if "task" not in modes or "task" in (start or {}) or each is not None:
                raise ValueError(
                    f"{owner}: `task_covariance` needs 'task' among the modes, no start "
                    f"for it and no `each`. Received: modes={modes!r}, start={start!r}, "
                    f"each={each!r}."
                )
        self.strength = float(strength)
        self.modes = modes
        self.update_every = update_every
        self.start = {
            mode: np.asarray(ops.convert_to_numpy(matrix)).tolist()
            for mode, matrix in (start or {}).items()
        }
        self.each = each
        self.task_covariance = task_covariance
        if isinstance(epsilon, dict) and set(epsilon) != set(modes):
            raise ValueError(
                f"{owner}: `epsilon` must be a number, or a dict with each of the modes "
                f"{list(modes)}. Received: epsilon={epsilon!r}."
            )
        self.epsilon = epsilon
        self._options = {
            "relative": relative,
            "average": average,
            "trace": trace,
        }
        for mode in modes:
            self.new_covariance(mode)

    def new_covariance(self, mode, name=None, dtype="float32"):
        """A `ModeCovariance` for one mode, as the arguments say."""
        epsilon = self.epsilon
        return ModeCovariance(
            epsilon[mode] if isinstance(epsilon, dict) else epsilon,
            **self._options,
            start=self.start.get(mode),
            name=name,
            dtype=dtype,
        )

    def __call__(self, x):
        raise ValueError(
            f"{type(self).__name__}: a plain Keras layer can't update the covariances of "
            f"its kernel, here of shape {tuple(x.shape)}. Wrap the layer instead: "
            "dmtrl_keras.layers.TensorNormalPrior(layer, regularizer)."
        )

    def get_config(self):
        shared = self.task_covariance
        return {
            "strength": self.strength,
            "modes": list(self.modes),
            "update_every": self.update_every,
            "epsilon": _as_pairs(self.epsilon),
            **self._options,
            "start": _as_pairs(self.start or None),
            "each": self.each,
            "task_covariance": keras.saving.serialize_keras_object(shared),
        }

    @classmethod
    def from_config(cls, config):
        shared = keras.saving.deserialize_keras_object(config["task_covariance"])
        by_mode = {
            name: dict(map(tuple, config[name]))
            for name in ("epsilon", "start")
            if isinstance(config[name], (list, tuple))
        }
        return cls(**{**config, **by_mode, "task_covariance": shared})


def _as_pairs(by_mode):
    # In a file a dict would turn modes that are axes into strings.
    return (
        [list(pair) for pair in by_mode.items()] if isinstance(by_mode, dict) else by_mode
    )


class TensorNormalState(keras.layers.Layer):
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

    def __init__(self, regularizer, kernel, shape, names, owner, dtype):
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

    def _axis(self, mode, argument):
        order = len(self._kernel_shape)
        number = isinstance(mode, numbers.Integral) and not isinstance(mode, bool)
        if number and -order <= mode < order:
            return int(mode) % order
        if mode in self.names:
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

    def build(self, input_shape=None):
        regularizer, shape = self.regularizer, self._kernel_shape
        rest = [axis for axis in range(len(shape)) if axis != self._each]
        self._sizes = tuple(shape[axis] for axis in rest)
        self.modes, self._shared = {}, None
        for axis in self._learned:
            mode, size = self._given[axis], shape[axis]
            name = self.names[axis]
            if name == "task" and regularizer.task_covariance is not None:
                covariance = regularizer.task_covariance
                covariance.join(self, size)
                count = math.prod(self._sizes) // size
                self._shared = (rest.index(axis), count)
                start = count * ops.convert_to_numpy(covariance.covariance)
                self.scatter = state_weight(self, "scatter", start)
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
        self.built = True

    # --- the prior ----------------------------------------------------------------

    def _arranged(self, kernel):
        """The kernel as samples, `(n, d_1, ..., d_K)`."""
        x = ops.cast(kernel, self.variable_dtype)
        return x[None] if self._each is None else ops.moveaxis(x, self._each, 0)

    def _matrices(self, name):
        """A matrix of every mode, None where there is no covariance."""
        matrices = [None] * len(self._sizes)
        for position, covariance in zip(self._positions, self.modes.values()):
            matrices[position] = ops.convert_to_tensor(getattr(covariance, name))
        return matrices

    def penalty(self, kernel):
        """The negative log prior of a kernel, without its constant, times the strength."""
        x = self._arranged(kernel)
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

    def call(self, training=None):
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

    def _updated_variables(self):
        variables = [] if self._shared is None else [self.scatter]
        for covariance in self.modes.values():
            variables += [covariance.covariance, covariance.whitener, covariance.precision]
        return variables

    def _flip_flop(self, x):
        """One sweep over the modes, each given the newest of the others (DRN Eq. 5)."""
        whiteners, scatters, updated = self._matrices("whitener"), [], []
        size = math.prod(self._sizes)
        for position, covariance in zip(self._positions, self.modes.values()):
            pooled = self._each is None
            scatter = tensor_normal.mode_covariance(x, whiteners, position, pooled)
            count = size // self._sizes[position]
            scatter = scatter * count
            if self._shared is not None and self._shared[0] == position:
                scatters = [scatter]
                for other in covariance.others(self):
                    scatter = scatter + ops.convert_to_tensor(other.scatter)
                    count += other.shared_count
            values = covariance.estimate(scatter, count)
            whiteners[position] = values[1]
            updated += values
        return [*scatters, *updated]

    @property
    def shared_count(self):
        """The product of the other dimensions than that of the tasks, an int."""
        return self._shared[1]

    # --- what was learned -----------------------------------------------------------

    @property
    def covariances(self):
        """The learned covariances, a dict from mode name to a NumPy array.

        Each is `(d, d)`, or `(n, d, d)` with `each`.

        Raises:
            ValueError: if the kernel has values that are not finite.
        """
        kernel = ops.convert_to_numpy(self._kernel())
        if not np.all(np.isfinite(kernel)):
            raise ValueError(
                f"{self.owner}: the kernel has {np.count_nonzero(~np.isfinite(kernel))} "
                "values that are not finite; its covariances mean nothing."
            )
        return {
            name: ops.convert_to_numpy(covariance.covariance)
            for name, covariance in self.modes.items()
        }
