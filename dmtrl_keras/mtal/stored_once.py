"""Kernels that some tasks have in common, each stored once."""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Factors, FactorShapes, Tensor
from dmtrl_keras.ground.validation import check_positive, real_array, refusal
from dmtrl_keras.kernels.parameterization import Parameterization
from dmtrl_keras.mtal import similarity


@keras.saving.register_keras_serializable("dmtrl_keras")
class StoredOnce(Parameterization):
    """Kernels that some tasks have in common, each stored once.

    `dmtrl_keras.merge_similar_kernels` makes layers of it. The only variable, `kernel`
    `(*window, in, K)`, has the K different kernels; of slices it is `(*window, 1, K)`.

    Args:
        numbers: list of lists of ints, `(out, T)`, of slices `(in * out, T)`: the place of
            each kernel of each task. Or the text that `get_config` makes of many.
        inputs: int, the input channels, if the kernels are slices; None: they are filters.

    Raises:
        ValueError: if they are not numbers from 0 on, each of them used; if their rows are
            no multiple of `inputs`.

    Example:

    >>> from dmtrl_keras.parameterizations import StoredOnce
    >>> StoredOnce([[0, 0], [1, 2]]).count  # Both tasks have the first of two kernels.
    3
    """

    name = "stored_once"

    def __init__(
        self, numbers: Sequence[Sequence[int]] | str, inputs: int | None = None
    ) -> None:
        given = _unpacked(numbers) if isinstance(numbers, str) else numbers
        array = real_array("numbers", given, "StoredOnce")
        whole = array.ndim == 2 and array.size > 0 and array.dtype.kind == "i"
        found = np.unique(array) if whole else array
        if not whole or not np.array_equal(found, np.arange(len(found))):
            what = "lists of ints (out, T), from 0 on and each used"
            raise refusal("numbers", numbers, "StoredOnce", what)
        if inputs is not None:
            check_positive("inputs", inputs, "StoredOnce", ", the input channels, or None")
            if len(array) % inputs:
                what = f"a row for each of {inputs} inputs and each output channel"
                raise refusal("numbers", numbers, "StoredOnce", what)
        self.numbers = array.tolist()
        self.inputs = inputs
        self.count = int(array.max()) + 1

    def _outputs(self) -> tuple[int, ...]:
        """The axes of the stacked kernel that `numbers` count, before that of the tasks."""
        rows = len(self.numbers)
        return (rows,) if self.inputs is None else (self.inputs, rows // self.inputs)

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        numbers = np.asarray(self.numbers)
        expected = (*self._outputs(), numbers.shape[1])
        if kernel.shape[-len(expected) :] != expected:
            axes = "(out, T)" if self.inputs is None else "(in, out, T)"
            raise ValueError(
                f"StoredOnce: expected kernels {axes} = {expected}. "
                f"Received: {kernel.shape[-len(expected) :]}."
            )
        _, first = np.unique(numbers.ravel(), return_index=True)
        shape = kernel.shape[: -len(expected)]
        if self.inputs is not None:
            shape = (*shape, 1)
        return {"kernel": kernel.reshape(*shape, -1)[..., first]}

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        kernel = factors["kernel"]
        rows = similarity.kernel_rows(kernel[..., None])
        rows = ops.take(rows, np.ravel(self.numbers).astype("int32"), axis=0)
        shape = (*kernel.shape[:-1], len(self.numbers), tasks)
        by_task = similarity.kernels_by_task(rows, shape)
        if self.inputs is None:
            return by_task
        return ops.reshape(by_task, (tasks, *kernel.shape[:-2], *self._outputs()))

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        """The share of the kernels that two tasks have in common, `(T, T)`."""
        numbers = np.asarray(self.numbers)
        common = (numbers[:, :, None] == numbers[:, None, :]).mean(axis=0)
        return ops.convert_to_tensor(common, factors["kernel"].dtype)

    def own_entries(
        self, shapes: FactorShapes, tasks: int, task: int
    ) -> dict[str, np.ndarray]:
        numbers = np.asarray(self.numbers)
        own = np.setdiff1d(numbers[:, task], np.delete(numbers, task, axis=1))
        return {"kernel": np.isin(np.arange(self.count), own)}

    def get_config(self) -> dict[str, Any]:
        if self.inputs is None:
            return {"numbers": self.numbers}
        return {"numbers": _packed(self.numbers), "inputs": self.inputs}


def _packed(numbers: Sequence[Sequence[int]]) -> str:
    """Numbers as a short text: there are as many as there are slices."""
    array = np.asarray(numbers, "<i4")
    # Most count on by one, so that their differences repeat.
    differences = np.diff(array.ravel(), prepend=0).astype("<i4")
    data = base64.b64encode(zlib.compress(differences.tobytes(), 9)).decode()
    return f"{array.shape[1]}:{data}"


def _unpacked(text: str) -> np.ndarray:
    tasks, _, data = text.partition(":")
    try:
        differences = np.frombuffer(zlib.decompress(base64.b64decode(data)), "<i4")
        return np.cumsum(differences, dtype="int64").reshape(-1, int(tasks))
    except (ValueError, zlib.error) as error:
        what = "lists of ints, or a text that `get_config` made"
        raise refusal("numbers", text, "StoredOnce", what) from error
