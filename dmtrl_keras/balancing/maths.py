"""The weights of T tasks from their losses, or from the Gram matrix of their gradients.

Pure functions on tensors of `keras.ops`, of float32. `gram` is `G = J J^T` of the `(T, P)`
matrix J of the gradients of the tasks' losses: `G_ij = <g_i, g_j>`. The update is `sum_t
w_t g_t`.
"""

from typing import Any

from keras import ops

from dmtrl_keras.ground.types import Tensor

_TINY = 1e-20
# Of the mean squared length of a gradient, added to the diagonal where systems are solved.
RIDGE = 1e-6


def normalized(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """`G T / tr G + ridge I`: without its scale, and a system that can be solved.

    Args:
        gram: tensor `(T, T)`.
        ridge: float.
    """
    tasks = gram.shape[0]
    trace = ops.maximum(ops.trace(gram), _TINY)
    return gram * (tasks / trace) + ridge * ops.eye(tasks, dtype=gram.dtype)


def without_absent(gram: Tensor, present: Tensor) -> Tensor:
    """The Gram matrix in which an absent task stands at right angles to all others.

    Its gradient is zero. With the mean length of the others and no conflicts it says
    nothing about their weights.

    Args:
        gram: tensor `(T, T)`, with rows of zeros for absent tasks.
        present: tensor `(T,)` of 0 and 1.
    """
    mean = ops.trace(gram) / ops.maximum(ops.sum(present), 1)
    return gram + ops.diag((1 - present) * ops.maximum(mean, _TINY))


def cosines(gram: Tensor) -> Tensor:
    """`C_ij = G_ij / sqrt(G_ii G_jj)`; 0 where a gradient is zero."""
    lengths = ops.sqrt(ops.maximum(ops.diagonal(gram), _TINY))
    return gram / (lengths[:, None] * lengths[None, :])


# --- small convex problems ----------------------------------------------------------


def nonnegative_minimum(gram: Tensor, linear: Tensor) -> Tensor:
    """`argmin_v v^T G v / 2 + c^T v` subject to `v >= 0`, for several c at once.

    A ridge of 1e-6 of the mean of the diagonal is added to G.

    Block principal pivoting with Murty's rule (Murty 1974; Kim & Park 2011, section 3.2):
    where all signs are right the solution is exact. All infeasible variables change sides
    at once as long as there become fewer of them, else the last one alone.

    Args:
        gram: tensor `(T, T)`, positive definite.
        linear: tensor `(n, T)`, rows c.

    Returns:
        A tensor `(n, T)`.
    """
    tasks = gram.shape[0]
    eye = ops.eye(tasks, dtype=gram.dtype)
    gram = gram + (RIDGE * ops.trace(gram) / tasks + _TINY) * eye

    def solved(passive: Tensor) -> tuple[Tensor, Tensor]:
        system = passive[:, :, None] * gram[None] * passive[:, None, :]
        system = system + (1 - passive)[:, :, None] * eye[None]
        values = ops.linalg.solve(system, (-linear * passive)[..., None])[..., 0]
        slopes = ops.matmul(values, gram) + linear
        return values, slopes * (1 - passive)

    # Rounding leaves signs open.
    slack = 1e-6 * (1 + ops.max(ops.abs(linear)))

    def infeasible(passive: Tensor) -> Tensor:
        values, slopes = solved(passive)
        return ops.cast(ops.logical_or(values < -slack, slopes < -slack), gram.dtype)

    def body(
        step: Any, passive: Tensor, wrong: Tensor, best: Tensor, chances: Tensor
    ) -> Any:
        count = ops.sum(wrong, axis=-1)
        fewer = count < best
        chances = ops.where(fewer, 3.0 * ops.ones_like(count), chances - 1)
        best = ops.where(fewer, count, best)
        numbers = ops.arange(1, tasks + 1, dtype=gram.dtype)
        last = ops.max(wrong * numbers, axis=-1, keepdims=True)
        only = wrong * ops.cast(ops.equal(numbers, last), gram.dtype)
        change = ops.where((chances >= 0)[:, None], wrong, only)
        passive = ops.abs(passive - change)
        return step + 1, passive, infeasible(passive), best, chances

    def goes_on(step: Any, passive: Tensor, wrong: Tensor, *rest: Any) -> Any:
        return ops.logical_and(step < 20 * tasks, ops.any(wrong > 0))

    passive = ops.cast(linear < 0, gram.dtype)
    best = ops.full(linear.shape[:1], tasks + 1.0, dtype=gram.dtype)
    start = (ops.zeros((), "int32"), passive, infeasible(passive), best, 3 + 0 * best)
    passive = ops.while_loop(goes_on, body, start)[1]
    return ops.maximum(solved(passive)[0], 0)


def minimum_norm(gram: Tensor) -> Tensor:
    """`argmin_w w^T G w` on the simplex (MGDA: Sener & Koltun 2018, Eq. 3).

    The minimum of `v^T G v / 2 - sum v` over `v >= 0`, divided by its sum.
    """
    tasks = gram.shape[0]
    found = nonnegative_minimum(normalized(gram), -ops.ones((1, tasks), dtype=gram.dtype))[
        0
    ]
    return found / ops.maximum(ops.sum(found), _TINY)


def on_simplex(values: Tensor) -> Tensor:
    """The nearest point of the simplex (Duchi et al. 2008, Figure 1)."""
    tasks = values.shape[0]
    falling = -ops.sort(-values)
    numbers = ops.arange(1, tasks + 1, dtype=values.dtype)
    excess = (ops.cumsum(falling) - 1) / numbers
    positive = ops.cast(falling - excess > 0, values.dtype)
    count = ops.maximum(ops.sum(positive), 1)
    return ops.maximum(values - (ops.sum(positive * falling) - 1) / count, 0)


def nash(gram: Tensor, ridge: float = 1e-4, steps: int = 30) -> Tensor:
    """`w > 0` with `G w = 1 / w` (Nash-MTL: Navon et al. 2022, Claim 3.1).

    It is the minimum of `w^T G w / 2 - sum log w`, which is self-concordant, so that damped
    steps of Newton reach it from anywhere.

    Args:
        gram: tensor `(T, T)`.
        ridge: float, added to the squared lengths by this factor: at a Pareto-stationary
            point there is no solution without it.
        steps: int.
    """
    # In units of the gradients' lengths the system is the same, and well scaled.
    lengths, system = _apart(gram, ridge)

    def step(_: Any, w: Tensor) -> Tensor:
        slope = ops.matmul(system, w[:, None])[:, 0] - 1 / w
        hessian = system + ops.diag(1 / ops.square(w))
        move = ops.linalg.solve(hessian, slope[:, None])[:, 0]
        decrement = ops.sqrt(ops.maximum(ops.sum(slope * move), 0))
        full = ops.where(decrement < 0.25, ops.ones_like(decrement), 1 / (1 + decrement))
        return w - full * move

    return ops.fori_loop(0, steps, step, ops.ones_like(lengths)) / lengths


# --- methods that look at gradients -------------------------------------------------


def projected(gram: Tensor, order: Tensor) -> Tensor:
    """PCGrad (Yu et al. 2020, Algorithm 1): each gradient without its conflicts.

    `g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j` for one j after another, where the product is
    negative; the update is their sum.

    Args:
        gram: tensor `(T, T)`.
        order: int tensor `(T, T)`; row i has the tasks j in the order for task i.

    Returns:
        The weights of the gradients in that sum, `(T,)`.
    """
    tasks = gram.shape[0]
    eye = ops.eye(tasks, dtype=gram.dtype)
    lengths = ops.maximum(ops.diagonal(gram), _TINY)

    def step(number: Any, mixed: Tensor) -> Tensor:
        other = ops.one_hot(ops.take(order, number, axis=1), tasks, dtype=gram.dtype)
        products = ops.sum(ops.matmul(mixed, gram) * other, axis=-1)
        itself = ops.sum(other * eye, axis=-1)
        share = ops.minimum(products, 0) / ops.matmul(other, lengths[:, None])[:, 0]
        return mixed - ((1 - itself) * share)[:, None] * other

    return ops.sum(ops.fori_loop(0, tasks, step, eye), axis=0)


def vaccinated(
    gram: Tensor, order: Tensor, targets: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """GradVac (Wang et al. 2021, Eq. 4 and 5): each pair as similar as it was before.

    Where the cosine `phi_ij` of `g_i` (as it is by then) and `g_j` is below its running
    mean `phi*_ij`, `g_i <- g_i + |g_i| (phi* sqrt(1 - phi^2) - phi sqrt(1 - phi*^2)) /
    (|g_j| sqrt(1 - phi*^2)) g_j`.

    Args:
        gram: tensor `(T, T)`.
        order: int tensor `(T, T)`, as for `projected`.
        targets: tensor `(T, T)`, the running means.
        rate: float, beta, how fast they follow.

    Returns:
        `(weights, targets)`.
    """
    tasks = gram.shape[0]
    eye = ops.eye(tasks, dtype=gram.dtype)
    lengths = ops.sqrt(ops.maximum(ops.diagonal(gram), _TINY))

    def step(number: Any, mixed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        other = ops.one_hot(ops.take(order, number, axis=1), tasks, dtype=gram.dtype)
        products = ops.matmul(mixed, gram)
        mine = ops.sqrt(ops.maximum(ops.sum(products * mixed, axis=-1), _TINY))
        theirs = ops.matmul(other, lengths[:, None])[:, 0]
        phi = ops.clip(ops.sum(products * other, axis=-1) / (mine * theirs), -1, 1)
        aim = ops.clip(ops.sum(targets * other, axis=-1), -0.999, 0.999)
        root = ops.sqrt(1 - ops.square(aim))
        share = mine * (aim * ops.sqrt(ops.maximum(1 - ops.square(phi), 0)) - phi * root)
        apart = 1 - ops.sum(other * eye, axis=-1)
        share = ops.where(phi < aim, share / (theirs * root), ops.zeros_like(share))
        mixed = mixed + (apart * share)[:, None] * other
        change = rate * (phi - ops.sum(targets * other, axis=-1))
        return mixed, targets + (apart * change)[:, None] * other

    def body(number: Any, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return step(number, *state)

    mixed, targets = ops.fori_loop(0, tasks, body, (eye, targets))
    return ops.sum(mixed, axis=0), targets


def conflict_averse(gram: Tensor, c: float, steps: int = 20) -> Tensor:
    """CAGrad (Liu et al. 2021, Algorithm 1): near the mean, best for the worst task.

    `d = g_0 + c |g_0| / |g_w| g_w`, `g_0` the mean gradient and `g_w = sum_t w_t g_t` with
    `w = argmin g_w^T g_0 + c |g_0| |g_w|` on the simplex; divided by `1 + c^2`, as in the
    authors' code. With `2 |g_w| = min_s |g_w|^2 / s + s` it is a quadratic program again
    and again, whose sum is held to 1 by an augmented Lagrangian.

    Args:
        gram: tensor `(T, T)`.
        c: float, of [0, 1).
        steps: int.
    """
    tasks = gram.shape[0]
    gram = normalized(gram)
    linear = ops.mean(gram, axis=0)
    radius = c * ops.sqrt(ops.mean(gram))
    firm = 10.0

    def step(_: Any, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        w, length, multiplier = state
        system = radius / length * gram + firm
        w = nonnegative_minimum(system, (linear + multiplier - firm)[None])[0]
        multiplier = multiplier + firm * (ops.sum(w) - 1)
        w = w / ops.maximum(ops.sum(w), _TINY)
        return w, _length(gram, w), multiplier

    start = ops.full((tasks,), 1 / tasks, dtype=gram.dtype)
    state = (start, _length(gram, start), 0 * ops.sum(start))
    w, length, _ = ops.fori_loop(0, steps, step, state)
    return (start + radius / length * w) / (1 + c**2)


def _length(gram: Tensor, w: Tensor) -> Tensor:
    squared = ops.sum(w * ops.matmul(gram, w[:, None])[:, 0])
    return ops.sqrt(ops.maximum(squared, RIDGE**2))


def impartial(gram: Tensor) -> Tensor:
    """IMTL-G (Liu et al. 2021, Eq. 5): equal projections on all gradients' directions.

    The weights, of sum 1, with which `<sum_t w_t g_t, u_i>`, `u_i = g_i / |g_i|`, is the
    same for all i.
    """
    lengths, angles = _apart(gram)
    ones = ops.ones((gram.shape[0], 1), dtype=gram.dtype)
    # `C D w = const`: of lengths D and cosines C.
    weights = ops.linalg.solve(angles, ones)[:, 0] / lengths
    total = ops.sum(weights)
    return weights / ops.where(ops.abs(total) < _TINY, _TINY, total)


def _apart(gram: Tensor, ridge: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The lengths of the gradients, `(T,)`, and their cosines, a ridge added."""
    lengths = ops.sqrt(ops.maximum(ops.diagonal(gram), _TINY))
    return lengths, cosines(gram) + ridge * ops.eye(gram.shape[0], dtype=gram.dtype)


def aligned(gram: Tensor) -> Tensor:
    """Aligned-MTL (Senushkin et al. 2023, Eq. 13 and 14): gradients made orthogonal.

    `w = sqrt(lambda_min) V Lambda^(-1/2) V^T 1` of `G = V Lambda V^T`: of the same lengths,
    those of the smallest principal component; components that are zero are left out.
    """
    tasks = gram.shape[0]
    values, vectors = ops.linalg.eigh(gram)
    largest = ops.max(values)
    kept = values > 1e-6 * tasks * ops.maximum(largest, _TINY)
    smallest = ops.min(ops.where(kept, values, largest))
    roots = ops.sqrt(ops.maximum(smallest, 0) / ops.maximum(values, _TINY))
    roots = ops.where(kept, roots, ops.zeros_like(roots))
    return ops.matmul(vectors, roots * ops.sum(vectors, axis=0))


def unconflicting(gram: Tensor, ridge: float = 1e-4) -> Tensor:
    """UPGrad (Quinton & Rey 2024, Eq. 5): the mean of gradients without conflicts.

    Each gradient is projected onto the dual cone of all, the vectors that have no negative
    product with any; the update is the mean. `g_i` becomes `J^T (e_i + v)` with
    `v = argmin (e_i + v)^T G (e_i + v)` over `v >= 0`.

    Args:
        gram: tensor `(T, T)`.
        ridge: float, added to the squared lengths by this factor.
    """
    # In units of the gradients' lengths short ones are as precise as long ones.
    lengths, angles = _apart(gram, ridge)
    own = ops.diag(lengths / ops.mean(lengths))
    found = nonnegative_minimum(angles, ops.matmul(own, angles))
    return ops.mean(found + own, axis=0) * ops.mean(lengths) / lengths
