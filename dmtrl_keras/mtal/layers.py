"""MTAL's layers by name: convolutions whose similar kernels are shared between tasks."""

from collections.abc import Sequence
from typing import Any, Self

import keras

from dmtrl_keras.mtal.similar_kernels import (
    KernelThreshold,
    Mode,
    SimilarKernels,
    TaskWeights,
    as_saved,
)
from dmtrl_keras.mtal.similarity import KernelKind, Pairing
from dmtrl_keras.tasks.conv import TaskConv1D, TaskConv2D, TaskConv3D
from dmtrl_keras.tasks.rewrite import NamedSharing


class SimilarKernelLayer(NamedSharing):
    """Mixin that turns `threshold`, `weights`, ... into the layer's `sharing`.

    Args:
        *args: of the layer below, `filters, kernel_size, tasks`.
        threshold: number in [0, 1], `"related"` (0.4), `"unrelated"` (0.55), or a
            `keras.optimizers.schedules.LearningRateSchedule`.
        weights: 0.5, `"learned"`, or a matrix `(T, T)` of `phi_ij`.
        pairs: `"all"` pairs of kernels, or those of equal `"index"`; None: `"index"` for
            slices, `"all"` for filters.
        related: list of groups of task numbers, those that may share (MTAL_R); None: all.
        update_every: positive int, steps from one choice of the pairs to the next.
        kernels: what is compared: `"slice"`, one input and one output channel, or
            `"filter"`, one output channel.
        mode: `"forward"`: the aggregates are functions of the trained kernels;
            `"overwrite"`: they take their place after each update.
        **kwargs: of the layer below.

    See `dmtrl_keras.parameterizations.SimilarKernels` for what they mean and raise.

    Attributes:
        selection: the state with `mode="forward"`, None for a single task;
            `selection.refresh()` chooses the pairs anew, as training does, after the
            kernels were changed by hand.
    """

    _parameterization = SimilarKernels

    def __init__(
        self,
        *args: Any,
        threshold: KernelThreshold = "related",
        weights: TaskWeights = 0.5,
        pairs: Pairing | None = None,
        related: Sequence[Sequence[int | str]] | None = None,
        update_every: int = 1,
        kernels: KernelKind = "slice",
        mode: Mode = "forward",
        **kwargs: Any,
    ) -> None:
        sharing = SimilarKernels(
            threshold, weights, pairs, related, update_every, kernels, mode
        )
        # The constructor of the layer below, not of `TaskLayer`.
        super().__init__(*args, sharing=sharing, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`."""
        return super().from_config(as_saved(config))


@keras.saving.register_keras_serializable("dmtrl_keras")
class SimilarKernelConv2D(SimilarKernelLayer, TaskConv2D):
    """T 2D convolutions, similar kernels of different tasks aggregated (MTAL).

    Kernels whose cosine is at least the threshold (Eq. 3, 4) are averaged with weights
    (Eq. 5, 6): `w_i := mean over similar w_j of (phi_ij w_i + phi_ji w_j)`. How the points
    that the paper leaves open are read is said in
    `dmtrl_keras.parameterizations.SimilarKernels`. Arguments, shapes and errors are those
    of `TaskConv2D` (`filters`, `kernel_size` and `tasks` first, without `sharing`) and of
    `SimilarKernelLayer`: `threshold`, `weights`, `pairs`, `related`, `update_every`,
    `kernels`, `mode`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import SimilarKernelConv2D
    >>> layer = SimilarKernelConv2D(4, 3, tasks=2, threshold=0.4)
    >>> tuple(layer(np.zeros((2, 8, 8, 6), "float32")).shape)
    (2, 6, 6, 8)
    """


@keras.saving.register_keras_serializable("dmtrl_keras")
class SimilarKernelConv1D(SimilarKernelLayer, TaskConv1D):
    """T 1D convolutions, similar kernels of different tasks aggregated (MTAL).

    `SimilarKernelConv2D` on `(batch, steps, T * in)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import SimilarKernelConv1D
    >>> layer = SimilarKernelConv1D(4, 3, tasks=2, threshold="unrelated")
    >>> tuple(layer(np.zeros((2, 8, 6), "float32")).shape)
    (2, 6, 8)
    """


@keras.saving.register_keras_serializable("dmtrl_keras")
class SimilarKernelConv3D(SimilarKernelLayer, TaskConv3D):
    """T 3D convolutions, similar kernels of different tasks aggregated (MTAL).

    `SimilarKernelConv2D` on `(batch, d1, d2, d3, T * in)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import SimilarKernelConv3D
    >>> layer = SimilarKernelConv3D(4, 2, tasks=2, pairs="index")
    >>> tuple(layer(np.zeros((2, 4, 4, 4, 6), "float32")).shape)
    (2, 3, 3, 3, 8)
    """


SimilarKernelConv = SimilarKernelConv2D
