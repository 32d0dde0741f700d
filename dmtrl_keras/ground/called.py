"""What layers are called with."""

from typing import Any

import keras

from dmtrl_keras.ground.validation import is_list, name_of, shown

_NUMBERS = ("bool", "int", "uint", "float", "bfloat", "complex")


class CheckedLayer(keras.layers.Layer):
    """Base of the layers that refuse what they can't be called with.

    Keras hands whatever it gets to `build` and `call`, or their shapes in the same
    structure, where the first thing that is done with it fails.
    """

    # Whether it takes one tensor, and the structures of several that it takes.
    _takes_one = True
    _takes_several: tuple[type, ...] = ()
    _expected = "one tensor (batch, ..., tasks * channels)"
    _dtypes: tuple[str, ...] = _NUMBERS
    _instead = " One tensor for each task: stack them by TaskStack."

    @property
    def _minimum_ndim(self) -> int:
        return 2

    @property
    def _of(self) -> str:
        return "numbers" if self._dtypes == _NUMBERS else "numbers or strings"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without any, Keras says what is missing.
        if args or "inputs" in kwargs:
            self._check_inputs(args[0] if args else kwargs["inputs"])
        return super().__call__(*args, **kwargs)

    def _check_inputs(self, inputs: Any) -> None:
        if isinstance(inputs, self._takes_several):
            values: Any = inputs.values() if isinstance(inputs, dict) else inputs
            fine = len(values) > 0 and all(map(self._is_tensor, values))
        else:
            fine = self._takes_one and self._is_tensor(inputs)
        if not fine:
            several = is_list(inputs) or isinstance(inputs, dict)
            instead = "" if self._takes_several or not several else self._instead
            raise ValueError(
                f"{name_of(self)}: expected {self._expected}, of {self._of}, at "
                f"least {self._minimum_ndim}-dimensional. Received: inputs="
                f"{_described(inputs)}.{instead}"
            )

    def _is_tensor(self, value: Any) -> bool:
        try:
            dtype = keras.backend.standardize_dtype(value.dtype)
            shape = value.shape
        except (AttributeError, TypeError, ValueError):
            return False
        # TensorFlow may not know the axes before a graph runs.
        unknown = getattr(shape, "rank", 0) is None
        enough = unknown or len(shape) >= self._minimum_ndim
        return dtype.startswith(self._dtypes) and enough


def _described(inputs: Any) -> str:
    """The inputs as errors show them: the tensors of a structure by their shapes."""
    if isinstance(inputs, dict):
        items = [f"{key!r}: {shown(value)}" for key, value in inputs.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(inputs, list):
        return f"[{', '.join(map(shown, inputs))}]"
    return shown(inputs)
