"""The classic multi-task penalties as regularizers of a stacked kernel."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import keras
from keras import ops

from dmtrl_keras.ground.backend import full_precision
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import (
    check_bool,
    check_number,
    check_one_of,
    check_positive,
    is_int,
    is_list,
    refusal,
)
from dmtrl_keras.kernels.state import KernelRegularizer, mode_names
from dmtrl_keras.norms import maths

Form: TypeAlias = Literal["laf", "tucker", "tt"]
FORMS = ("laf", "tucker", "tt")
Groups: TypeAlias = str | int | Sequence[str | int]


class MatrixNorm(KernelRegularizer):
    """A convex penalty on a stacked kernel, the task axis last (not for direct use).

    As `kernel_regularizer` of the layers with T kernels, or `multitask(..., prior=...)`, it
    applies to the stacked kernel `(*window, in, out, T)`, also where that is composed of
    factors. Two ways to minimize it:

    - Any optimizer, by a subgradient. Where the norm is not smooth, kernels get near low
      rank or sparsity, and never reach them.
    - `proximal=True` with `optimizers.ProximalOptimizer`: the penalty has no gradient, and
      after each step the kernel becomes `argmin_Z |Z - W|^2 / 2 + eta penalty(Z)` for the
      step size eta. Ranks and groups then become exactly zero. It needs a kernel that is
      a variable, not composed of factors.

    A subclass defines `terms`, and `proximal_step` where there is a formula for it.

    Args:
        strength: float, not negative. With a loss that is a mean over N examples, 1/N
            times the strength of an objective with a sum.
        proximal: bool.
    """

    # A bound on how much the gradient changes, times the strength; None: it is not smooth.
    curvature: float | None = None

    def __init__(self, strength: float, proximal: bool = False) -> None:
        owner = type(self).__name__
        self.strength = check_number("strength", strength, owner)
        self.proximal = check_bool("proximal", proximal, owner)

    def terms(self, w: Tensor, xp: Any) -> tuple[Tensor, Tensor]:
        """The value of the penalty without its strength, and a subgradient.

        Args:
            w: tensor or array, the stacked kernel.
            xp: what computes, `keras.ops` or `numpy`.
        """
        raise NotImplementedError

    def proximal_step(self, w: Tensor, step: Any, xp: Any = ops) -> Tensor:
        """`argmin_Z |Z - w|^2 / 2 + step strength penalty(Z)`.

        Args:
            w: tensor or array, the stacked kernel.
            step: number or scalar tensor, the size of the step.
            xp: what computes, `keras.ops` or `numpy`.
        """
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        dtype = full_precision(keras.backend.standardize_dtype(x.dtype))
        x = ops.cast(x, dtype)
        value, gradient = self.terms(ops.stop_gradient(x), ops)
        value = ops.stop_gradient(value)
        if not self.proximal:
            # The gradient is known: none of singular vectors, which may not exist.
            gradient = ops.stop_gradient(gradient)
            form = ops.sum(x * gradient)
            value = value + form - ops.stop_gradient(form)
        return self.strength * value

    def get_config(self) -> dict[str, Any]:
        return {"strength": self.strength, "proximal": self.proximal}


def _of_sum(value: Tensor, gradient: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """A sum of sizes, or half the square of it."""
    return (value**2 / 2, value * gradient) if squared else (value, gradient)


@keras.saving.register_keras_serializable("dmtrl_keras")
class TraceNorm(MatrixNorm):
    """Trace norms of the stacked kernel: kernels of all tasks of low rank.

    The penalty is `strength sum_n |W_[n]|_*` over matrices that are made of the stacked
    kernel, with the trace norm |.|_*, the sum of the singular values:

    - `form="laf"`: one matrix, the tasks against all other axes. Of linear tasks
      (`(d, 1, T)`) that is the trace norm of the matrix `(d, T)` of slopes.
    - `form="tucker"`: N matrices, each axis against all others.
    - `form="tt"`: N - 1 matrices, the first n axes against the rest.

    They are Yang & Hospedales' "Last Axis Flattening", "Tucker" and "TT" (2016), all
    with weight one. Axes of size one do not count: they would add the length of the
    whole kernel.

    `squared=True` is `strength / 2 |W|_*^2` of one matrix: MTFL, convex multi-task feature
    learning (Argyriou, Evgeniou & Pontil 2008), which takes the
    least over the features' covariance D with trace one; over the tasks' covariance with
    trace one it is the same, MTRL (Zhang & Yeung 2010).

    Each takes an SVD of each matrix in a training step. The proximal step is a formula for
    one matrix only.

    Args:
        strength: float, not negative.
        form: `"laf"`, `"tucker"` or `"tt"`.
        squared: bool; half of the square, for `"laf"`.
        proximal: bool, for `"laf"`; see `MatrixNorm`.

    Raises:
        ValueError: on malformed arguments.

    Source: Yang & Hospedales, "Trace Norm Regularised Deep Multi-Task Learning",
    arXiv:1606.04038.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.regularizers import TraceNorm
    >>> kernel = np.zeros((3, 1, 2))
    >>> kernel[0, 0] = [3.0, 4.0]
    >>> float(TraceNorm(0.5)(kernel)), float(TraceNorm(0.5, squared=True)(kernel))
    (2.5, 6.25)
    """

    def __init__(
        self,
        strength: float = 1e-3,
        form: Form = "laf",
        squared: bool = False,
        proximal: bool = False,
    ) -> None:
        super().__init__(strength, proximal)
        owner = type(self).__name__
        self.form = check_one_of("form", form, FORMS, owner)
        self.squared = check_bool("squared", squared, owner)
        for name, value in (("squared", squared), ("proximal", proximal)):
            if value and form != "laf":
                what = f"False with form={form!r}, which is a sum over several matrices"
                raise refusal(name, value, owner, what)

    def terms(self, w: Tensor, xp: Any) -> tuple[Tensor, Tensor]:
        shape, x = tuple(w.shape), maths.squeezed(w, xp)
        value, gradient = 0.0, xp.zeros_like(x)
        for axis, alone in maths.unfoldings(shape, self.form):
            one, slope = maths.trace_norm(maths.unfolded(x, axis, alone, xp), xp)
            value = value + one
            gradient = gradient + maths.folded(slope, x.shape, axis, alone, xp)
        return _of_sum(value, xp.reshape(gradient, shape), self.squared)

    def proximal_step(self, w: Tensor, step: Any, xp: Any = ops) -> Tensor:
        shape, x = tuple(w.shape), maths.squeezed(w, xp)
        found = maths.unfoldings(shape, self.form)
        if len(found) > 1 and len(x.shape) > 2:
            raise ValueError(
                f"TraceNorm: a kernel {shape} gives {len(found)} matrices with "
                f"form={self.form!r}; a proximal step needs one. Expected: form='laf'."
            )
        (axis, alone), *_ = found
        # All matrices of a matrix have its singular values.
        step = step * self.strength * len(found)
        matrix = maths.unfolded(x, axis, alone, xp)
        matrix = maths.trace_norm_step(matrix, step, self.squared, xp)
        return xp.reshape(maths.folded(matrix, x.shape, axis, alone, xp), shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "form": self.form, "squared": self.squared}


@keras.saving.register_keras_serializable("dmtrl_keras")
class GroupLasso(MatrixNorm):
    """Groups of a kernel's entries that become zero together: the L2,1 norm.

    The penalty is `strength sum_g |W_g|_2` over groups g of entries:

    - `groups="feature"`: all that an input feature says to any class of any task. Features
      that no task needs become zero: MTFL with D diagonal (Argyriou, Evgeniou & Pontil
      2008), the multi-task lasso (Obozinski, Taskar & Jordan 2010).
    - `groups="task"`: a task's kernel. It is the group-sparse part of RMTL (Chen, Zhou &
      Ye 2011), see `parameterizations.Parts`.
    - several modes: a group for each of their indices. `("feature", "class")`: an entry in
      all tasks; all modes of the kernel, or `"entry"`: the lasso.

    Args:
        strength: float, not negative.
        groups: a mode or several, by name (`mode_names`) or axis, whose indices are the
            groups; or `"entry"`.
        squared: bool; `strength / 2` times the square of the sum, as MTFL has it.
        proximal: bool, see `MatrixNorm`.

    Raises:
        ValueError: on malformed arguments; where it is applied, on modes that the kernel
            does not have.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.regularizers import GroupLasso
    >>> kernel = np.array([[[3.0, 4.0]], [[0.0, 1.0]]])
    >>> [float(GroupLasso(1, groups)(kernel)) for groups in ("feature", "entry")]
    [6.0, 8.0]
    """

    def __init__(
        self,
        strength: float = 1e-3,
        groups: Groups = "feature",
        squared: bool = False,
        proximal: bool = False,
    ) -> None:
        super().__init__(strength, proximal)
        owner = type(self).__name__
        given: Any = groups
        named = list(given) if is_list(given) else [given]
        valid = named and all(isinstance(m, str) or is_int(m, -64, 63) for m in named)
        if not valid or len(set(named)) < len(named):
            raise refusal("groups", given, owner, "one or several distinct names or axes")
        self.groups: list[str | int] = named
        self.squared = check_bool("squared", squared, owner)

    def _axes(self, order: int) -> list[int]:
        if self.groups == ["entry"]:
            return list(range(order))
        names = mode_names(order, task_axis=order > 2)
        axes = []
        for mode in self.groups:
            known = mode in names if isinstance(mode, str) else -order <= mode < order
            if not known:
                raise ValueError(
                    f"GroupLasso: expected `groups` of {list(names)}, 'entry', or axes of "
                    f"a kernel with {order} axes. Received: {mode!r}."
                )
            axes.append(names.index(mode) if isinstance(mode, str) else mode % order)
        return axes

    def terms(self, w: Tensor, xp: Any) -> tuple[Tensor, Tensor]:
        value, gradient = maths.group_norm(w, self._axes(len(w.shape)), xp)
        return _of_sum(value, gradient, self.squared)

    def proximal_step(self, w: Tensor, step: Any, xp: Any = ops) -> Tensor:
        axes, step = self._axes(len(w.shape)), step * self.strength
        return maths.group_norm_step(w, axes, step, self.squared, xp)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups, "squared": self.squared}


class _SmoothNorm(MatrixNorm):
    """A penalty with a gradient, which needs no proximal step."""

    def __init__(self, strength: float) -> None:
        super().__init__(strength)

    def get_config(self) -> dict[str, Any]:
        return {"strength": self.strength}


@keras.saving.register_keras_serializable("dmtrl_keras")
class MeanDeviation(_SmoothNorm):
    """Kernels near their mean (Evgeniou & Pontil 2004).

    The penalty is

    `strength / 2 (sum_t |W_t - mean W|^2 + common T |mean W|^2)`.

    Regularized multi-task learning writes `W_t = W_0 + V_t` with the penalty
    `strength / 2 (sum_t |V_t|^2 + c |W_0|^2)`; with the best W_0 for given kernels
    that is the formula above with `common = c / (T + c)`. With
    `common=0` it is `TensorNormalRegularizer(mean="shared", update_every=None)`, whose
    covariances stay identities, and with `common=1` weight decay of each task by itself.

    Args:
        strength: float, not negative.
        common: float, not negative.

    Raises:
        ValueError: on malformed arguments.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.regularizers import MeanDeviation
    >>> float(MeanDeviation(1.0)(np.array([[[1.0, 3.0]]])))
    1.0
    """

    def __init__(self, strength: float = 1e-3, common: float = 0.0) -> None:
        super().__init__(strength)
        self.common = check_number("common", common, type(self).__name__)

    @property
    def curvature(self) -> float:  # type: ignore[override]
        return self.strength * max(1.0, self.common)

    def terms(self, w: Tensor, xp: Any) -> tuple[Tensor, Tensor]:
        mean = xp.mean(w, axis=-1, keepdims=True)
        gradient = w - mean + self.common * mean
        return xp.sum(w * gradient) / 2, gradient

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "common": self.common}


@keras.saving.register_keras_serializable("dmtrl_keras")
class ClusteredTasks(_SmoothNorm):
    """Tasks in r clusters, which are not known: the convex relaxation of Jacob et al.

    With known clusters the penalty is `strength / 2` times `mean` on the mean of all
    kernels, `between` on the deviations of the clusters' means from it, and `within` on
    those of the kernels from the means of their clusters:

    `mean T |mean W|^2 + between sum_c T_c |mean_c W - mean W|^2
    + within sum_c sum_{t in c} |W_t - mean_c W|^2`.

    Of all assignments that would be a hard problem. The relaxation takes the
    least over all covariances S of the tasks with the eigenvalues and the trace that those
    of r clusters have:

    `mean T |mean W|^2 + min_S tr(V S^-1 V^T)`, V the deviations from the mean, with
    `1 / within <= eigenvalues(S) <= 1 / between` and
    `tr S = (T - r + 1) / within + (r - 1) / between`.

    The best S has the singular vectors of V and a formula for its eigenvalues, so that a
    step takes one SVD of V. The penalty is smooth.

    Args:
        strength: float, not negative.
        clusters: positive int, r. With 1 the deviations have the weight `within`.
        between: positive float, at most `within`.
        within: positive float.
        mean: float, not negative.

    Raises:
        ValueError: on malformed arguments; where it is applied, on fewer tasks than
            clusters.

    Source: Jacob, Bach & Vert, "Clustered Multi-Task Learning: A Convex Formulation", NIPS
    2008.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.regularizers import ClusteredTasks
    >>> kernel = np.array([[[1.0, 1.0, -1.0, -1.0]]])
    >>> penalty = ClusteredTasks(1.0, clusters=2, between=0.1, within=1.0)
    >>> round(float(penalty(kernel)), 4)
    0.2
    """

    def __init__(
        self,
        strength: float = 1e-3,
        clusters: int = 2,
        between: float = 0.1,
        within: float = 1.0,
        mean: float = 0.0,
    ) -> None:
        super().__init__(strength)
        owner = type(self).__name__
        self.clusters = check_positive("clusters", clusters, owner)
        self.within = check_number("within", within, owner)
        self.between = check_number("between", between, owner)
        if not 0 < self.between <= self.within:
            what = f"a positive number, at most `within`={within!r}"
            raise refusal("between", between, owner, what)
        self.mean = check_number("mean", mean, owner)

    @property
    def curvature(self) -> float:  # type: ignore[override]
        return self.strength * max(self.within, self.mean)

    def terms(self, w: Tensor, xp: Any) -> tuple[Tensor, Tensor]:
        tasks = w.shape[-1]
        if self.clusters > tasks:
            raise ValueError(
                f"ClusteredTasks: expected a kernel of {self.clusters} tasks at least, as "
                f"many as clusters. Received: shape {tuple(w.shape)}."
            )
        shape, x = tuple(w.shape), xp.reshape(w, (-1, tasks))
        mean = xp.mean(x, axis=-1, keepdims=True)
        u, s, v = maths.svd(x - mean, xp)
        least, most = 1 / self.within, 1 / self.between
        # What is left for the directions that there are, when all others have the least.
        total = s.shape[0] * least + (self.clusters - 1) * (most - least)
        variances = maths.spread_variances(s, least, most, total, xp)
        gradient = xp.matmul(u * (s / variances), v) + self.mean * mean
        value = xp.sum(s**2 / variances) + self.mean * tasks * xp.sum(mean**2)
        return value / 2, xp.reshape(gradient, shape)

    def get_config(self) -> dict[str, Any]:
        own = {"clusters": self.clusters, "between": self.between, "within": self.within}
        return {**super().get_config(), **own, "mean": self.mean}
