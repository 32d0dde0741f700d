"""Task matrices of independent kernels: what a factorisation makes of no relation at all.

The kernels are tensors `W` of independent standard normal numbers, `(d_1, ..., d_N)`, where
`d_N = T`. Decomposing many of them is dear where they are large; the law of the task
matrix S can be drawn from directly.
"""

import math
from typing import Literal, TypeAlias

import keras
import numpy as np

from dmtrl_keras.dmtrl import decomposition
from dmtrl_keras.dmtrl.laf import LAF
from dmtrl_keras.dmtrl.tt import TT
from dmtrl_keras.dmtrl.tucker import Tucker
from dmtrl_keras.kernels.independent import Hard, Independent
from dmtrl_keras.kernels.parameterization import Parameterization

Scaling: TypeAlias = Literal["layer", "svd"]
SCALINGS = ("layer", "svd")
# From this size on the norms of S's rows are drawn once for all draws: they then hardly
# vary, and the mean over the draws has the same expectation.
_LARGE = 300


def as_svds_leave_it(matrix: np.ndarray, kernel: np.ndarray | None) -> np.ndarray:
    """A layer's task matrix in the scaling `"svd"`; see `sharing_strength`.

    Args:
        matrix: array `(K, T)`.
        kernel: array, the stacked kernel, where the singular values go into S; None, as for
            Tucker: they don't.
    """
    tasks = matrix.shape[1]
    if kernel is None:
        return matrix / math.sqrt(tasks)
    # The latent kernels, from W = L S.
    latent = kernel.reshape(-1, tasks) @ np.linalg.pinv(matrix)
    return matrix * np.linalg.norm(latent, axis=0)[:, None]


def draw_task_matrices(
    sharing: Parameterization,
    shape: tuple[int, ...],
    scaling: Scaling,
    draws: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Task matrices of independent kernels.

    Why S need not be computed from kernels: let Q be orthogonal, `(T, T)`. The kernels
    `W x_N Q` have the law of `W`, and the SVDs before that of the tasks find the same left
    singular vectors for both, since Q only turns the right ones. So S and `S Q^T` have one
    law, whatever the singular values are: the K rows of S, which are orthogonal, have the
    directions of rows of a random orthogonal matrix, independent of their norms, in LAF,
    Tucker and TT, at any ranks. In the scaling `"layer"` the norms are `sqrt(T)`, and
    chance depends on K and T alone; in `"svd"` they are 1 in Tucker, and `_row_norms` in
    LAF and TT.

    Args:
        sharing: a parameterization with its ranks fixed.
        shape: tuple, the stacked kernel's.
        scaling: `"layer"` or `"svd"`; in the latter LAF's and TT's are of any scale.
        draws: int.
        rng: a generator.

    Returns:
        A list of arrays `(K, T)`. Where S does not depend on the kernels, it has one entry.
    """
    tasks, kind = shape[-1], type(sharing)
    if kind in (Independent, Hard):
        # Nothing is drawn: S is assigned.
        return [_decomposed(sharing, np.zeros((1,) * (len(shape) - 1) + (tasks,)))]
    if kind not in (LAF, Tucker, TT):
        return [_decomposed(sharing, rng.normal(size=shape)) for _ in range(draws)]
    ranks = sharing.get_config()["rank"]
    latents, norms = ranks[-1], np.full(ranks[-1], math.sqrt(tasks))
    if scaling == "svd" and kind is Tucker:
        norms = np.ones(latents)
    varying = scaling == "svd" and kind is not Tucker
    matrices: list[np.ndarray] = []
    for _ in range(draws):
        if varying and (not matrices or math.prod(shape[:-1]) <= _LARGE):
            norms = _row_norms(shape, ranks, rng)
        matrices.append(norms[:, None] * _orthonormal(latents, tasks, rng))
    return matrices


def _row_norms(
    shape: tuple[int, ...], ranks: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """The norms of the rows of S in LAF and TT, where they are the last singular values.

    LAF, and TT if the SVDs before the last keep everything, decompose the unfolding of the
    tasks. Else the first SVD of TT that truncates leaves the largest singular values of its
    unfolding, times rows of a random orthogonal matrix that is independent of them; the
    rest of the train is decomposed from there.

    Args:
        shape: tuple, the stacked kernel's.
        ranks: tuple, one rank of LAF or `len(shape) - 1` of TT.
        rng: a generator.
    """
    first, cut = len(ranks) - 1, len(shape) - 1
    if len(ranks) > 1:
        bounds = decomposition.tt_bounds(shape)
        first = next((n for n, k in enumerate(ranks) if k < bounds[n]), first)
        cut = first + 1
    columns = math.prod(shape[cut:])
    values = _singular_values(math.prod(shape[:cut]), columns, rng)[: ranks[first]]
    if cut == len(shape) - 1:
        return values
    rest = values[:, None] * _orthonormal(len(values), columns, rng)
    rest = rest.reshape(len(values) * shape[cut], *shape[cut + 1 :])
    *_, heads, last = decomposition.tt(rest, rank=ranks[first + 1 :])
    # The cores before are orthonormal, and this one has the singular values.
    return math.sqrt(shape[-1]) * np.linalg.norm(heads.reshape(-1, len(last)), axis=0)


def _decomposed(sharing: Parameterization, kernel: np.ndarray) -> np.ndarray:
    """The task matrix of a kernel that is really decomposed."""
    factors = {
        name: keras.ops.convert_to_tensor(factor, "float32")
        for name, factor in sharing.decompose(kernel).items()
    }
    matrix = sharing.task_matrix(factors, kernel.shape[-1])
    return keras.ops.convert_to_numpy(matrix).astype("float64")


def _orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """The first rows of a random orthogonal matrix, up to their signs."""
    return np.linalg.qr(rng.normal(size=(columns, rows)))[0].T


def _singular_values(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Those of a matrix of independent standard normal numbers.

    They are those of the R of its QR decomposition, whose entries are independent: normal
    above the diagonal, chi on it, with as many degrees of freedom as there are rows left
    (Bartlett's decomposition of a Wishart matrix).
    """
    long, short = max(rows, columns), min(rows, columns)
    triangle = np.triu(rng.normal(size=(short, short)), 1)
    np.fill_diagonal(triangle, np.sqrt(rng.chisquare(long - np.arange(short))))
    return np.linalg.svd(triangle, compute_uv=False)
