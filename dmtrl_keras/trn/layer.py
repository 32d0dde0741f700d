"""The Task Relation Layer: the similarity of tasks, learned online.

Li et al., "Task Relation Networks" (WACV 2019), section 3.3. The formulas come first, as
functions of covariances; the layer is a shell around them. Offline, on arrays:
`dmtrl_keras.canonical_correlation`.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self, TypeAlias

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.backend import all_reduce_sum, assert_true, checked, full_precision
from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.linalg import whitener
from dmtrl_keras.ground.types import DType, Shape, Tensor
from dmtrl_keras.ground.validation import (
    check_number,
    check_one_of,
    checked_pairs,
    is_list,
    name_of,
    refusal,
)

Method: TypeAlias = Literal["cholesky", "svd"]
Estimate: TypeAlias = Literal["mean", "sum"]
Gradient: TypeAlias = Literal["full", "moving"]

# What a configuration of version 0.1 meant, which did not name these settings.
BEFORE: dict[str, Any] = {"estimate": "mean", "gradient": "moving"}

# Lanczos steps after which the largest singular value is exact for all purposes here.
_STEPS = 24
# Up to this many rows or columns one decomposition is faster than the steps: on a CPU a
# step with its gradient takes 9 ms of 26 at 128, and 27 of 37 at 256.
_SMALL = 128
# A smaller variance is none: its inverse would be out of float32's range.
_SMALLEST = 1e-30


def checked_settings(
    momentum: float,
    ridge: float,
    method: Method,
    estimate: Estimate,
    gradient: Gradient,
    owner: str,
) -> dict[str, Any]:
    """The settings of the estimates, by name.

    Raises:
        ValueError: if one is malformed.
    """
    return {
        "momentum": check_number("momentum", momentum, owner, 1),
        "ridge": check_number("ridge", ridge, owner),
        "method": check_one_of("method", method, ("cholesky", "svd"), owner),
        "estimate": check_one_of("estimate", estimate, ("mean", "sum"), owner),
        "gradient": check_one_of("gradient", gradient, ("full", "moving"), owner),
    }


def correlation_along(
    first: Tensor, cross: Tensor, second: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """The correlation of two linear combinations (TRN Eq. 1), from covariances.

    `rho = a^T S_12 b / (sqrt(a^T S_11 a) sqrt(b^T S_22 b))`.

    Args:
        first: tensor `(..., d_1, d_1)`, `S_11`.
        cross: tensor `(..., d_1, d_2)`, `S_12`.
        second: tensor `(..., d_2, d_2)`, `S_22`.
        a: tensor `(..., d_1)`.
        b: tensor `(..., d_2)`.

    Returns:
        A tensor `(...)`.
    """

    def form(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        return ops.sum(ops.multiply(left, _apply(matrix, right)), -1)

    return form(a, cross, b) / ops.sqrt(form(a, first, a) * form(b, second, b))


def canonical_directions(
    first: Tensor, cross: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """The pair of directions with the largest correlation, by Cholesky whitening.

    With `S_tt = L_t L_t^T`, these are `a = L_1^-T u` and `b = L_2^-T v` for the singular
    vectors of the largest singular value of `L_1^-1 S_12 L_2^-T`, which has the singular
    values of Eq. 10. They are found by Golub-Kahan-Lanczos steps, or for small matrices by
    an eigendecomposition.

    Args:
        first: tensor `(..., d_1, d_1)`, positive definite.
        cross: tensor `(..., d_1, d_2)`.
        second: tensor `(..., d_2, d_2)`, positive definite.

    Returns:
        Two tensors, `(..., d_1)` and `(..., d_2)`.
    """
    left, right = whitener(first), whitener(second)
    u, v = _largest_singular_vectors(
        ops.matmul(ops.matmul(left, cross), ops.swapaxes(right, -1, -2))
    )
    return _apply(ops.swapaxes(left, -1, -2), u), _apply(ops.swapaxes(right, -1, -2), v)


def _largest_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`(u, v)` of the largest singular value of each matrix, by Lanczos steps.

    Of small ones by the eigenvectors of `M^T M`, whose largest eigenvalue is accurate.
    """
    rng = np.random.default_rng(0)
    fallbacks = []
    for size in matrix.shape[-2:]:
        start = rng.normal(size=size)
        start = ops.convert_to_tensor(start / np.linalg.norm(start), matrix.dtype)
        fallbacks.append(ops.broadcast_to(start, (*matrix.shape[:-2], size)))
    transposed = ops.swapaxes(matrix, -1, -2)
    if matrix.shape[-1] <= _SMALL:
        _, vectors = ops.eigh(ops.matmul(transposed, matrix))
        return _pair_of(matrix, vectors[..., -1], fallbacks)
    if matrix.shape[-2] <= _SMALL:
        _, vectors = ops.eigh(ops.matmul(matrix, transposed))
        return _pair_of(transposed, vectors[..., -1], fallbacks[::-1])[::-1]
    # In the row space, which as many steps as the rank then exhaust.
    v = _nonzero(_orthonormal(_apply(transposed, fallbacks[0])), fallbacks[1])
    steps = min(_STEPS, *matrix.shape[-2:])

    def step(
        i: Tensor, state: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        v, left, right = state
        column = ops.one_hot(i, steps, dtype=matrix.dtype)
        right = right + v[..., None] * column
        u = _orthonormal(_apply(matrix, v), left)
        left = left + u[..., None] * column
        return _orthonormal(_apply(transposed, u), right), left, right

    # One loop in the graph: traced step by step it was most of a model's compile time.
    bases = [ops.zeros((*x.shape, steps), matrix.dtype) for x in fallbacks]
    _, left, right = ops.fori_loop(0, steps, step, (v, *bases))
    # In the small basis the matrix is bidiagonal, but for rounding.
    small = ops.matmul(ops.swapaxes(left, -1, -2), ops.matmul(matrix, right))
    _, vectors = ops.eigh(ops.matmul(ops.swapaxes(small, -1, -2), small))
    return _pair_of(matrix, _apply(right, vectors[..., -1]), fallbacks)


def _pair_of(
    matrix: Tensor, v: Tensor, fallbacks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`(u, v)` with `u` along `M v`; something else where one is zero."""
    u = _orthonormal(_apply(matrix, v))
    return _nonzero(u, fallbacks[0]), _nonzero(v, fallbacks[1])


def _nonzero(vector: Tensor, fallback: Tensor) -> Tensor:
    """A vector, or another where it is zero: without correlation any direction is best."""
    return ops.where(ops.any(vector != 0, axis=-1, keepdims=True), vector, fallback)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return ops.squeeze(ops.matmul(matrix, vector[..., None]), -1)


def _orthonormal(vector: Tensor, basis: Tensor | None = None) -> Tensor:
    """A unit vector orthogonal to the columns of a basis; zero where nothing is left."""
    norm = ops.norm(vector, axis=-1, keepdims=True)
    if basis is not None:
        for _ in range(2):
            # Once is not enough in floating point.
            inner = _apply(ops.swapaxes(basis, -1, -2), vector)
            vector = vector - _apply(basis, inner)
    left = ops.norm(vector, axis=-1, keepdims=True)
    enough = left > 1e-5 * norm
    return ops.where(enough, vector / ops.where(enough, left, 1.0), 0.0)


def largest_canonical_correlation(
    first: Tensor, cross: Tensor, second: Tensor, method: Method = "cholesky"
) -> Tensor:
    """The largest canonical correlation of covariances, with its gradient (TRN Eq. 10).

    `method="cholesky"`: Eq. 1 at the best directions. These maximise it, so that its
    derivative by them vanishes, and the gradient with the directions held fixed is exact;
    no decomposition is differentiated. `method="svd"` is the paper's own route (Eq. 10,
    15): inverse square roots and the largest singular value, all by SVD and
    differentiated through, which is not stable at repeated singular values.

    Args:
        first: tensor `(..., d_1, d_1)`, positive definite.
        cross: tensor `(..., d_1, d_2)`.
        second: tensor `(..., d_2, d_2)`, positive definite.
        method: `"cholesky"` or `"svd"`.

    Returns:
        A tensor `(...)`.
    """
    if method == "cholesky":
        given = [ops.stop_gradient(x) for x in (first, cross, second)]
        directions = [ops.stop_gradient(x) for x in canonical_directions(*given)]
        return correlation_along(first, cross, second, *directions)
    roots = []
    for matrix in (first, second):
        u, values, _ = ops.svd(matrix, full_matrices=False)
        roots.append(
            ops.matmul(u / ops.sqrt(values)[..., None, :], ops.swapaxes(u, -1, -2))
        )
    whole = ops.matmul(ops.matmul(roots[0], cross), roots[1])
    _, values, _ = ops.svd(whole, full_matrices=False)
    return values[..., 0]


@keras.saving.register_keras_serializable("dmtrl_keras")
class TRL(CheckedLayer):
    """Task Relation Layer: the similarities of tasks' features, learned online.

    In training the covariances of the batch join moving ones (TRN Algorithm 1), and the
    similarities (Eq. 11) are those of the updated covariances:

    - `estimate="mean"`: `S <- S + a (S_batch - S)`, with batch covariances divided by the
      batch size less one, and `a_k = (1 - m) / (1 - m**k)` at step k. These are the means
      of Adam's moments, corrected for their start: `S` is that of the first batch after
      one step, and the scale of the features makes no difference.
    - `estimate="sum"`: Algorithm 1 as it is listed, `S <- m S + (1 - m) S_batch`, from the
      identity, with sums over the batch. What the identity weighs depends on the batch
      size and the scale of the features.

    The gradient flows into the batch's part alone:

    - `gradient="full"`: the derivative of the similarity by the covariances, taken at the
      moving ones, times that of the batch's covariances by the features. A loss weight
      then means the same at any momentum.
    - `gradient="moving"`: the derivative of what the layer returns, in which the batch has
      only its share `a` of the covariances, soon a hundredth with m = 0.99.

    At inference the layer returns the similarities that it has, and changes nothing. Frozen
    (`trainable = False`) it keeps its moving covariances in training, too. Under several
    replicas the batch is the global one.

    With no more examples seen than a set has features the estimate is near one, whatever
    the features: the largest sample correlation is biased upwards. It takes a few steps
    until there are enough.

    All pairs are one batched computation; sets of different dimensions are padded. Features
    that are constant in a batch are similar to nothing, and get no gradient.

    Where some examples lack some sets (`present`), a covariance is that of the examples
    that have both, and joins with a weight (1 - m) in proportion to their number; so does
    its gradient.

    Files and configurations of version 0.1 go on as they were: with `estimate="mean"`,
    `gradient="moving"` and, after a step of training, no correction of the start.

    Args:
        pairs: list of pairs of tasks, as names of an input dict or numbers. None: all pairs
            `(i, j)` with i < j, in order.
        momentum: float in [0, 1), m.
        ridge: float, not negative, added to the variances relative to themselves, as in
            `task_similarity`, so that covariances can be inverted.
        method: `"cholesky"`, or the paper's `"svd"`; see `largest_canonical_correlation`.
        estimate: `"mean"`, or the paper's `"sum"`.
        gradient: `"full"` or `"moving"`.
        **kwargs: `name`, `dtype`.

    Attributes:
        covariance: variable `(D, D)`, the moving joint covariance of all sets side by side,
            D being the sum of their dimensions; the identity at the start.
        seen: variable `(sets, sets)`, how much of the moving weights each two sets' data
            has had, `1 - m**k` after k batches that lack nothing; zeros at the start.
        similarity: variable `(P,)`, the last estimate; zeros at the start.

    Call arguments:
        inputs: a list or a dict by task name of two or more tensors `(batch, ..., d_t)` of
            the same examples; further axes are flattened.
        training: bool.
        present: None, or bool tensors `(batch,)` in the same structure: which examples have
            the set. What the others have in its place is not looked at.

    Output shape:
        `(P,)`, the similarity of each pair, in [0, 1], float32.

    Raises:
        ValueError: on malformed arguments, on unknown tasks, on fewer than two sets, on
            different batch sizes or a batch of one; on values that are not finite or are
            too large for their variances, and on a first batch of one where sizes are not
            known before: in a graph of TensorFlow a `tf.errors.InvalidArgumentError` with
            the same text, none in code that XLA compiles.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TRL
    >>> rng = np.random.default_rng(0)
    >>> pose = rng.normal(size=(64, 3)).astype("float32")
    >>> landmarks = np.concatenate([pose, pose**2], axis=1)
    >>> layer = TRL(momentum=0.5)
    >>> for _ in range(20):
    ...     similarity = layer({"pose": pose, "landmarks": landmarks}, training=True)
    >>> round(float(similarity[0]), 2)
    1.0
    """

    _takes_one = False
    _takes_several = (list, tuple, dict)
    _expected = "the features (batch, ..., d) of each task, in a list or a dict"

    def __init__(
        self,
        pairs: Sequence[tuple[Any, Any]] | None = None,
        momentum: float = 0.99,
        ridge: float = 1e-3,
        method: Method = "cholesky",
        estimate: Estimate = "mean",
        gradient: Gradient = "full",
        **kwargs: Any,
    ) -> None:
        # Labels, say, are not to be rounded to half precision on the way in.
        super().__init__(autocast=False, **kwargs)
        settings = checked_settings(
            momentum, ridge, method, estimate, gradient, name_of(self)
        )
        self.momentum: float = settings["momentum"]
        self.ridge: float = settings["ridge"]
        self.method: Method = settings["method"]
        self.estimate: Estimate = settings["estimate"]
        self.gradient: Gradient = settings["gradient"]
        self.pairs = checked_pairs(pairs, name_of(self), "tasks")

    def _sets(self, inputs: Any, argument: str = "inputs") -> tuple[list[Any], list[Any]]:
        """`(names, values)` of an argument in one order."""
        if isinstance(inputs, dict):
            return list(inputs), list(inputs.values())
        if not is_list(inputs):
            what = "a list or a dict of one tensor for each task"
            raise refusal(argument, inputs, name_of(self), what)
        return list(range(len(inputs))), list(inputs)

    def build(self, input_shape: Any) -> None:
        names, shapes = self._sets(input_shape)
        if len(shapes) < 2 or any(not isinstance(s, (tuple, list)) for s in shapes):
            raise ValueError(
                f"{name_of(self)}: expected the features of two tasks at least, in a list "
                f"or a dict. Received: shape {input_shape}."
            )
        self._sizes = []
        for name, shape in zip(names, shapes):
            if any(d is None for d in shape[1:]) or len(shape) < 2:
                raise ValueError(
                    f"{name_of(self)}: expected features (batch, ..., d) of known sizes. "
                    f"Received: {tuple(shape)} for {name!r}."
                )
            self._sizes.append(int(np.prod(shape[1:])))
        self._check_batch(names, shapes)
        pairs: Iterable[tuple[Any, Any]] | None = self.pairs
        if pairs is None:
            pairs = itertools.combinations(names, 2)
        try:
            numbered = [(names.index(i), names.index(j)) for i, j in pairs]
        except ValueError:
            raise ValueError(
                f"{name_of(self)}: unknown tasks in `pairs`. Received: pairs="
                f"{self.pairs!r}. The tasks are {names}."
            ) from None
        self._first, self._second = (list(side) for side in zip(*numbered))
        width = sum(self._sizes)
        self.covariance = self._add_state("covariance", (width, width), "identity")
        self.similarity = self._add_state("similarity", (len(self._first),))
        # Last: files of version 0.1 lack it.
        self.seen = self._add_state("seen", (len(shapes), len(shapes)))
        self.built = True

    def _add_state(
        self, name: str, shape: tuple[int, ...], initializer: str = "zeros"
    ) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            trainable=False,
            autocast=False,
            # Every replica computes the same, from the statistics of the global batch.
            aggregation="none",
            dtype=full_precision(self.variable_dtype),
        )

    def load_own_variables(self, store: Any) -> None:
        """The state; after a step of training that of version 0.1 is all data's."""
        entries = {key: store[key] for key in store.keys()}
        if len(entries) == 2:
            start = np.eye(self.covariance.shape[0])
            trained = np.any(np.asarray(entries["0"]) != start)
            entries["2"] = np.full(self.seen.shape, float(trained))
        super().load_own_variables(entries)

    def _check_batch(self, names: Sequence[Any], shapes: Sequence[Shape]) -> None:
        batches = {name: shape[0] for name, shape in zip(names, shapes)}
        known = {batch for batch in batches.values() if batch is not None}
        if len(known) > 1 or 1 in known:
            raise ValueError(
                f"{name_of(self)}: expected features of the same examples, two at least. "
                f"Received: batch sizes {batches}."
            )

    def call(
        self, inputs: Any, training: bool | None = None, present: Any = None
    ) -> Tensor:
        if not training:
            return ops.convert_to_tensor(self.similarity)
        names, values = self._sets(inputs)
        self._check_batch(names, [x.shape for x in values])
        if present is not None:
            present = self._present(present, names)
        covariance, seen = self._updated(values, present)
        similarity = self._similarities(covariance)
        if self.trainable:
            self.covariance.assign(ops.stop_gradient(covariance))
            self.seen.assign(seen)
            self.similarity.assign(ops.stop_gradient(similarity))
        return similarity

    def _present(self, present: Any, names: Sequence[Any]) -> list[Tensor]:
        """Which examples have each set, in the order of the sets."""
        given, there = self._sets(present, "present")
        shapes = [getattr(x, "shape", None) for x in there]
        if set(given) != set(names) or any(s is None or len(s) != 1 for s in shapes):
            raise ValueError(
                f"{name_of(self)}: `present` must have tensors (batch,) in the structure "
                f"of the inputs, {list(names)}. Received: {dict(zip(given, shapes))}."
            )
        return [there[given.index(name)] for name in names]

    def _updated(
        self, values: Sequence[Tensor], present: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The moving covariance with that of a batch (Algorithm 1, lines 6 to 13).

        Returns:
            `(covariance, seen)`, what the variables of these names shall be.
        """
        moving = ops.stop_gradient(ops.convert_to_tensor(self.covariance))
        seen = ops.convert_to_tensor(self.seen)
        x, there = self._side_by_side(values, present, moving.dtype)
        x = checked(
            x,
            ops.all(ops.isfinite(x)),
            f"{name_of(self)}: features have values that are not finite (NaN or infinite).",
        )
        size = all_reduce_sum(ops.cast(ops.shape(x)[0], x.dtype))
        assert_true(
            ops.logical_or(size > 1, ops.any(seen > 0)),
            f"{name_of(self)}: expected batches of two examples at least, since one says "
            "nothing about covariances. Received: a first batch of one.",
        )
        batch, count = self._batch_covariance(x, there, size)
        # A batch of one, the last of an epoch, says nothing about covariances.
        share = ops.where(count > 1, count / size, 0.0)
        joins = (1 - self.momentum) * share
        seen = seen + joins * (1 - seen)
        if self.estimate == "mean":
            # What the start weighed is data's, as in Adam.
            joins = ops.divide_no_nan(joins, seen)
        joins, share = self._by_two_features(joins), self._by_two_features(share)
        covariance = (1 - joins) * moving + joins * batch
        if self.gradient == "full":
            # Its value is zero; its derivative by the batch's covariance is not.
            change = share * (batch - ops.stop_gradient(batch))
            covariance = ops.stop_gradient(covariance) + change
        covariance = checked(
            covariance,
            ops.all(ops.isfinite(covariance)),
            f"{name_of(self)}: features are too large for their variances in "
            f"{self.covariance.dtype}. Is the learning rate too high?",
        )
        return covariance, seen

    def _side_by_side(
        self, values: Sequence[Tensor], present: Sequence[Tensor] | None, dtype: DType
    ) -> tuple[Tensor, Tensor | None]:
        """All sets as one matrix `(batch, D)`, and which are there, `(batch, sets)`."""
        flat = [ops.reshape(x, (-1, d)) for x, d in zip(values, self._sizes)]
        x = ops.cast(ops.concatenate(flat, axis=-1), dtype)
        if present is None:
            return x, None
        there = ops.cast(ops.stack(present, axis=-1), dtype)
        # What stands in the place of a missing set is not looked at.
        return ops.where(self._by_feature(there, -1) > 0, x, 0.0), there

    def _by_feature(self, by_set: Tensor, axis: int) -> Tensor:
        """Values of sets along an axis, once for each of their features."""
        owners = np.repeat(range(len(self._sizes)), self._sizes)
        return ops.take(by_set, owners, axis=axis)

    def _by_two_features(self, by_two_sets: Tensor) -> Tensor:
        """Values of pairs of sets, once for each of their pairs of features, `(D, D)`."""
        return self._by_feature(self._by_feature(by_two_sets, 0), 1)

    def _batch_covariance(
        self, x: Tensor, there: Tensor | None, size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The covariance of a batch, `(D, D)`, and how many examples have both of two sets.

        With `estimate="sum"` it is the scatter, of as many examples as the batch has.
        """
        centred = x - all_reduce_sum(ops.sum(x, axis=0)) / size
        if there is None:
            there = ops.ones((ops.shape(x)[0], len(self._sizes)), x.dtype)
        else:
            centred = centred * self._by_feature(there, -1)
        centred = centred * self._varies(x, centred, self._by_feature(there, -1))
        both = all_reduce_sum(ops.matmul(ops.transpose(there), there))
        count = self._by_two_features(both)
        # Sums of one, and of products, over the examples that have both.
        sums = all_reduce_sum(ops.matmul(ops.transpose(centred), there))
        sums = self._by_feature(sums, 1)
        products = all_reduce_sum(ops.matmul(ops.transpose(centred), centred))
        scatter = products - sums * ops.transpose(sums) / ops.maximum(count, 1)
        if self.estimate == "sum":
            return scatter * size / ops.maximum(count, 1), both
        return scatter / ops.maximum(count - 1, 1), both

    def _varies(self, x: Tensor, centred: Tensor, there: Tensor) -> Tensor:
        """1 for the features that vary in a batch, 0 for those that are constant, `(D,)`.

        Constant features are similar to nothing, and no step makes them so: the gradient of
        a correlation has no limit where a variance vanishes, and none is taken there.
        """
        count = ops.maximum(all_reduce_sum(ops.sum(there, axis=0)), 1)
        mean = all_reduce_sum(ops.sum(centred, axis=0)) / count
        squares = (ops.square(centred - mean) * there, ops.square(x))
        variance, size = (all_reduce_sum(ops.sum(s, axis=0)) for s in squares)
        rounding = 16 * np.finfo(self.covariance.dtype).eps
        # What is too large for its variance is no constant; it is an error later.
        varies = ops.logical_or(variance > rounding**2 * size, ops.isinf(variance))
        return ops.stop_gradient(ops.cast(varies, x.dtype))

    def _similarities(self, covariance: Tensor) -> Tensor:
        """Eq. 11 for all pairs, on blocks that are padded to one size."""
        width, borders = max(self._sizes), np.cumsum([0, *self._sizes])
        blocks = []
        for size, start in zip(self._sizes, borders):
            rows = covariance[start : start + size]
            blocks.append(ops.pad(rows, ((0, width - size), (0, 0))))
        rows = ops.stack(blocks)
        own = []
        for t, (size, start) in enumerate(zip(self._sizes, borders)):
            block = rows[t, :size, start : start + size]
            variances = ops.diagonal(block)
            # What rounding makes of singular matrices must not be taken for variance.
            rounding = 4 * size * np.finfo(self.covariance.dtype).eps
            # Constant features have no scale; they are similar to nothing.
            none = ops.cast(variances < _SMALLEST, variances.dtype)
            block = block + ops.diag((self.ridge + rounding) * variances + none)
            pad = ((0, width - size), (0, width - size))
            rest = np.diag(np.arange(width) >= size).astype("float32")
            own.append(ops.pad(block, pad) + ops.cast(rest, block.dtype))
        own = ops.stack(own)
        columns = [
            ops.pad(rows[:, :, start : start + size], ((0, 0), (0, 0), (0, width - size)))
            for size, start in zip(self._sizes, borders)
        ]
        # (task, task, width, width): all cross-covariances.
        cross = ops.stack(columns, axis=1)
        pairs = [i * len(self._sizes) + j for i, j in zip(self._first, self._second)]
        cross = ops.take(ops.reshape(cross, (-1, width, width)), pairs, axis=0)
        found = largest_canonical_correlation(
            ops.take(own, self._first, axis=0),
            cross,
            ops.take(own, self._second, axis=0),
            self.method,
        )
        # Covariances of different examples may be correlated by more than one.
        return ops.minimum(found, 1.0)

    def compute_output_shape(self, input_shape: Any) -> Shape:
        count = len(input_shape)
        pairs = count * (count - 1) // 2 if self.pairs is None else len(self.pairs)
        return (pairs,)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "pairs": self.pairs,
            "momentum": self.momentum,
            "ridge": self.ridge,
            "method": self.method,
            "estimate": self.estimate,
            "gradient": self.gradient,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`, or from that of version 0.1."""
        return super().from_config(BEFORE | config)
