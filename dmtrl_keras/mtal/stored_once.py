"""Kernels that some tasks have in common, each stored once."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Factors, Tensor
from dmtrl_keras.ground.validation import real_array, refusal
from dmtrl_keras.kernels.parameterization import Parameterization
from dmtrl_keras.mtal import similarity


@keras.saving.register_keras_serializable("dmtrl_keras")
class StoredOnce(Parameterization):
    """Kernels that some tasks have in common, each stored once.

    `dmtrl_keras.merge_similar_kernels` makes layers of it. The only variable, `kernel`
    `(*window, in, K)`, has the K different kernels.

    Args:
        numbers: list of lists of ints, `(out, T)`: the place of each kernel of each task.

    Raises:
        ValueError: if they are not numbers from 0 on, each of them used.

    Example:

    >>> from dmtrl_keras.parameterizations import StoredOnce
    >>> StoredOnce([[0, 0], [1, 2]]).count  # Both tasks have the first of two kernels.
    3
    """

    name = "stored_once"

    def __init__(self, numbers: Sequence[Sequence[int]]) -> None:
        array = real_array("numbers", numbers, "StoredOnce")
        whole = array.ndim == 2 and array.size > 0 and array.dtype.kind == "i"
        found = np.unique(array) if whole else array
        if not whole or not np.array_equal(found, np.arange(len(found))):
            what = "lists of ints (out, T), from 0 on and each used"
            raise refusal("numbers", numbers, "StoredOnce", what)
        self.numbers = array.tolist()
        self.count = int(array.max()) + 1

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        numbers = np.asarray(self.numbers)
        if kernel.shape[-2:] != numbers.shape:
            raise ValueError(
                f"StoredOnce: expected kernels (out, T) = {numbers.shape}. "
                f"Received: {kernel.shape[-2:]}."
            )
        _, first = np.unique(numbers.ravel(), return_index=True)
        return {"kernel": kernel.reshape(*kernel.shape[:-2], -1)[..., first]}

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        kernel = factors["kernel"]
        rows = similarity.kernel_rows(kernel[..., None])
        rows = ops.take(rows, np.ravel(self.numbers).astype("int32"), axis=0)
        shape = (*kernel.shape[:-1], len(self.numbers), tasks)
        return similarity.kernels_by_task(rows, shape)

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        """The share of the kernels that two tasks have in common, `(T, T)`."""
        numbers = np.asarray(self.numbers)
        common = (numbers[:, :, None] == numbers[:, None, :]).mean(axis=0)
        return ops.convert_to_tensor(common, factors["kernel"].dtype)

    def get_config(self) -> dict[str, Any]:
        return {"numbers": self.numbers}
