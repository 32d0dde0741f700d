"""DMTRL's layers by name: LAF, Tucker and TT, dense and convolutional.

Each is a layer of `dense` or `conv` whose kernels are generated from shared factors;
all that differs is the parameterization.
"""

from collections.abc import Mapping
from typing import Any, Self

import keras

from dmtrl_keras.dmtrl.decomposition import AS_SAVED, Rank, TaskRank, Threshold
from dmtrl_keras.dmtrl.factorized import FactorizedParameterization, Implementation
from dmtrl_keras.dmtrl.laf import LAF
from dmtrl_keras.dmtrl.tt import TT
from dmtrl_keras.dmtrl.tucker import Tucker
from dmtrl_keras.ground.types import Regularizer
from dmtrl_keras.tasks.conv import TaskConv1D, TaskConv2D, TaskConv3D
from dmtrl_keras.tasks.dense import TaskDense
from dmtrl_keras.tasks.rewrite import NamedSharing


class FactorizedLayer(NamedSharing):
    """Mixin that turns `rank`, `tolerance`, ... into the layer's `sharing`.

    Args:
        *args: of the layer below, `units, tasks` or `filters, kernel_size, tasks`.
        rank: int (a cap for every rank but that of the tasks), float in (0, 1] (the most
            that the factors may have of the weights of independent kernels), or a tuple
            with an int or a fraction of the possible for each rank, with that of the tasks
            or without. Without `rank` and `tolerance`: 0.5. See
            `dmtrl_keras.parameterizations.FactorizedParameterization`.
        tolerance: number in (0, 1): the smallest ranks whose composition is within
            `tolerance * ||W||_F` of the start kernel `W`. The tasks then start from
            independent draws (`common_draw`), which hardly compress; tolerances
            are for kernels that were trained, see `dmtrl_keras.factorize`.
        implementation: `"compose"` the stacked kernel and apply it, `"contract"`: pull
            the activations through the factors, or `"auto"`: whatever needs fewer
            operations for the shapes at hand.
        threshold: `"frobenius"` (what `tolerance` promises) or `"singular_value"` (the
            per-SVD precision of the authors' code).
        task_rank: the rank of the tasks: int or fraction; None: full, or the tolerance's.
        factor_regularizers: dict from a factor's name to a Keras regularizer, or None.
        **kwargs: of the layer below.

    A start kernel is drawn from the kernel initializer, stacked and decomposed, so that
    the recomposed kernel has the intended variance. Regularizer and constraint are
    those of the stacked kernel. Once the layer is built, its configuration holds
    the ranks as they are.
    """

    _parameterization: type[FactorizedParameterization]

    def __init__(
        self,
        *args: Any,
        rank: Rank | None = None,
        tolerance: float | None = None,
        implementation: Implementation = "auto",
        threshold: Threshold = "frobenius",
        task_rank: TaskRank = None,
        factor_regularizers: Mapping[str, Regularizer] | None = None,
        **kwargs: Any,
    ) -> None:
        sharing = self._parameterization(
            rank, tolerance, implementation, threshold, task_rank, factor_regularizers
        )
        # The constructor of the layer below, not of `TaskLayer`.
        super().__init__(*args, sharing=sharing, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`, of this version or an earlier one."""
        return super().from_config({"task_rank": AS_SAVED, **config})


@keras.saving.register_keras_serializable("dmtrl_keras")
class LAFDense(FactorizedLayer, TaskDense):
    """T dense layers, combinations of latent kernels.

    `W[..., t] = sum_k L[..., k] S[k, t]` (DMTRL Eq. 2), for the stacked kernel
    `(in, units, T)`. One rank; see
    `dmtrl_keras.parameterizations.LAF`. Arguments, shapes and errors are those
    of `TaskDense` (`units` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import LAFDense
    >>> layer = LAFDense(4, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 12), "float32")).shape), layer.rank
    ((2, 12), (2,))
    """

    _parameterization = LAF


@keras.saving.register_keras_serializable("dmtrl_keras")
class LAFConv1D(FactorizedLayer, TaskConv1D):
    """T 1D convolutions, combinations of latent kernels.

    `W[..., t] = sum_k L[..., k] S[k, t]` (DMTRL Eq. 2), for the stacked kernel
    `(length, in, filters, T)`. One rank; see
    `dmtrl_keras.parameterizations.LAF`. Arguments, shapes and errors are those
    of `TaskConv1D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import LAFConv1D
    >>> layer = LAFConv1D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 12), (2,))
    """

    _parameterization = LAF


@keras.saving.register_keras_serializable("dmtrl_keras")
class LAFConv2D(FactorizedLayer, TaskConv2D):
    """T 2D convolutions, combinations of latent kernels.

    `W[..., t] = sum_k L[..., k] S[k, t]` (DMTRL Eq. 2), for the stacked kernel
    `(height, width, in, filters, T)`. One rank; see
    `dmtrl_keras.parameterizations.LAF`. Arguments, shapes and errors are those
    of `TaskConv2D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import LAFConv2D
    >>> layer = LAFConv2D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 4, 12), (2,))
    """

    _parameterization = LAF


@keras.saving.register_keras_serializable("dmtrl_keras")
class LAFConv3D(FactorizedLayer, TaskConv3D):
    """T 3D convolutions, combinations of latent kernels.

    `W[..., t] = sum_k L[..., k] S[k, t]` (DMTRL Eq. 2), for the stacked kernel
    `(k1, k2, k3, in, filters, T)`. One rank; see
    `dmtrl_keras.parameterizations.LAF`. Arguments, shapes and errors are those
    of `TaskConv3D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import LAFConv3D
    >>> layer = LAFConv3D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 5, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 4, 4, 12), (2,))
    """

    _parameterization = LAF


@keras.saving.register_keras_serializable("dmtrl_keras")
class TuckerDense(FactorizedLayer, TaskDense):
    """T dense layers, kernels of a core and one factor per axis.

    `W = C x_1 U1 x_2 U2 ... x_N UN` (DMTRL Eq. 3, 4), for the stacked kernel
    `(in, units, T)`. Three ranks; see
    `dmtrl_keras.parameterizations.Tucker`. Arguments, shapes and errors are those
    of `TaskDense` (`units` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TuckerDense
    >>> layer = TuckerDense(4, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 12), "float32")).shape), layer.rank
    ((2, 12), (2, 2, 3))
    """

    _parameterization = Tucker


@keras.saving.register_keras_serializable("dmtrl_keras")
class TuckerConv1D(FactorizedLayer, TaskConv1D):
    """T 1D convolutions, kernels of a core and one factor per axis.

    `W = C x_1 U1 x_2 U2 ... x_N UN` (DMTRL Eq. 3, 4), for the stacked kernel
    `(length, in, filters, T)`. Four ranks; see
    `dmtrl_keras.parameterizations.Tucker`. Arguments, shapes and errors are those
    of `TaskConv1D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TuckerConv1D
    >>> layer = TuckerConv1D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 12), (2, 2, 2, 3))
    """

    _parameterization = Tucker


@keras.saving.register_keras_serializable("dmtrl_keras")
class TuckerConv2D(FactorizedLayer, TaskConv2D):
    """T 2D convolutions, kernels of a core and one factor per axis.

    `W = C x_1 U1 x_2 U2 ... x_N UN` (DMTRL Eq. 3, 4), for the stacked kernel
    `(height, width, in, filters, T)`. Five ranks; see
    `dmtrl_keras.parameterizations.Tucker`. Arguments, shapes and errors are those
    of `TaskConv2D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TuckerConv2D
    >>> layer = TuckerConv2D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 4, 12), (2, 2, 2, 2, 3))
    """

    _parameterization = Tucker


@keras.saving.register_keras_serializable("dmtrl_keras")
class TuckerConv3D(FactorizedLayer, TaskConv3D):
    """T 3D convolutions, kernels of a core and one factor per axis.

    `W = C x_1 U1 x_2 U2 ... x_N UN` (DMTRL Eq. 3, 4), for the stacked kernel
    `(k1, k2, k3, in, filters, T)`. Six ranks; see
    `dmtrl_keras.parameterizations.Tucker`. Arguments, shapes and errors are those
    of `TaskConv3D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TuckerConv3D
    >>> layer = TuckerConv3D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 5, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 4, 4, 12), (2, 2, 2, 2, 2, 3))
    """

    _parameterization = Tucker


@keras.saving.register_keras_serializable("dmtrl_keras")
class TTDense(FactorizedLayer, TaskDense):
    """T dense layers, kernels of a train of one core per axis.

    `W = G1 . G2 ... GN` (DMTRL Eq. 6-8), for the stacked kernel
    `(in, units, T)`. Two ranks; see
    `dmtrl_keras.parameterizations.TT`. Arguments, shapes and errors are those
    of `TaskDense` (`units` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TTDense
    >>> layer = TTDense(4, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 12), "float32")).shape), layer.rank
    ((2, 12), (2, 3))
    """

    _parameterization = TT


@keras.saving.register_keras_serializable("dmtrl_keras")
class TTConv1D(FactorizedLayer, TaskConv1D):
    """T 1D convolutions, kernels of a train of one core per axis.

    `W = G1 . G2 ... GN` (DMTRL Eq. 6-8), for the stacked kernel
    `(length, in, filters, T)`. Three ranks; see
    `dmtrl_keras.parameterizations.TT`. Arguments, shapes and errors are those
    of `TaskConv1D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TTConv1D
    >>> layer = TTConv1D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 12), (2, 2, 3))
    """

    _parameterization = TT


@keras.saving.register_keras_serializable("dmtrl_keras")
class TTConv2D(FactorizedLayer, TaskConv2D):
    """T 2D convolutions, kernels of a train of one core per axis.

    `W = G1 . G2 ... GN` (DMTRL Eq. 6-8), for the stacked kernel
    `(height, width, in, filters, T)`. Four ranks; see
    `dmtrl_keras.parameterizations.TT`. Arguments, shapes and errors are those
    of `TaskConv2D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TTConv2D
    >>> layer = TTConv2D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 4, 12), (2, 2, 2, 3))
    """

    _parameterization = TT


@keras.saving.register_keras_serializable("dmtrl_keras")
class TTConv3D(FactorizedLayer, TaskConv3D):
    """T 3D convolutions, kernels of a train of one core per axis.

    `W = G1 . G2 ... GN` (DMTRL Eq. 6-8), for the stacked kernel
    `(k1, k2, k3, in, filters, T)`. Five ranks; see
    `dmtrl_keras.parameterizations.TT`. Arguments, shapes and errors are those
    of `TaskConv3D` (`filters`, `kernel_size` and `tasks` first, without `sharing`)
    and of `FactorizedLayer`: `rank`, `task_rank`, `tolerance`, `implementation`,
    `threshold`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TTConv3D
    >>> layer = TTConv3D(4, 2, tasks=3, rank=2)
    >>> tuple(layer(np.zeros((2, 5, 5, 5, 6), "float32")).shape), layer.rank
    ((2, 4, 4, 4, 12), (2, 2, 2, 2, 3))
    """

    _parameterization = TT
