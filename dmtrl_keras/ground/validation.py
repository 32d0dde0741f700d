"""Checks that several layers share; every message says what was received."""

import fnmatch
import inspect
import math
import numbers
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeGuard, TypeVar

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Shape, Tasks, Tensor

_Made = TypeVar("_Made")

# Steps, sizes and classes are int32 in tensors.
_LARGEST_INT = 2**31 - 1
# More than any network holds: what is larger is something else, such as a batch.
_MOST_TASKS = 100_000
_LONGEST = 200


def name_of(thing: Any) -> str:
    """What an error calls a layer, model or other object with a name.

    Example:

    >>> import keras
    >>> name_of(keras.layers.Dense(3, name="fc"))
    "Dense 'fc'"
    """
    return f"{type(thing).__name__} {thing.name!r}"


def shown(value: Any) -> str:
    """A value as errors show it: arrays by their shape, and nothing without end.

    Example:

    >>> import numpy as np
    >>> shown("quick"), shown(np.zeros((3, 4)))
    ("'quick'", 'ndarray of shape (3, 4), float64')
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and shape and dtype is not None:
        return f"{type(value).__name__} of shape {shape}, {dtype}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def refusal(name: str, value: Any, owner: str, expected: str) -> ValueError:
    """The error of an argument that is not what was expected."""
    return ValueError(
        f"{owner}: `{name}` must be {expected}. Received: {name}={shown(value)}."
    )


def check_tasks(tasks: Any, owner: str) -> int:
    """T as an int.

    Args:
        tasks: the argument that the user gave.
        owner: str, the class or layer to name in the error.

    Returns:
        An int, at least 1.

    Raises:
        ValueError: if it is not a positive int, or more than 100,000.
    """
    return check_positive("tasks", tasks, owner, ", the number of tasks", _MOST_TASKS)


def is_int(value: Any, low: int = 0, high: int = _LARGEST_INT) -> bool:
    """Whether a value is an int, no bool, from `low` to `high`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and low <= int(value) <= high


def is_real(value: Any) -> bool:
    """Whether a value is a number, no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_positive(
    name: str, value: Any, owner: str, alternative: str = "", most: int = _LARGEST_INT
) -> int:
    """A positive int.

    Args:
        name: str, the argument's name.
        value: what was given.
        owner: str, the class, layer or function to name in the error.
        alternative: str, what else is allowed, or what the number means.
        most: int, the largest one.

    Returns:
        An int, at least 1.

    Raises:
        ValueError: if it is not a positive int.
    """
    if not is_int(value, 1, most):
        limit = f" (at most {most})" if is_int(value, most) or is_huge(value) else ""
        raise refusal(name, value, owner, f"a positive int{alternative}{limit}")
    return int(value)


def is_huge(value: Any) -> bool:
    """Whether a value is an int beyond all sizes."""
    return isinstance(value, numbers.Integral) and int(value) > _LARGEST_INT


def check_number(
    name: str,
    value: Any,
    owner: str,
    high: float = math.inf,
    low: float = 0.0,
    closed: bool = False,
    alternative: str = "",
) -> float:
    """A number from `low` to below `high`.

    Args:
        name: str, the argument's name.
        value: what was given.
        owner: str, the class, layer or function to name in the error.
        high: number that it must be below.
        low: number that it must be at least.
        closed: bool, whether it may be `high`.
        alternative: str, what else is allowed.

    Returns:
        A float.

    Raises:
        ValueError: if it is not.
    """
    number = math.nan
    if is_real(value):
        # An int may be larger than any float.
        number = math.inf if is_huge(value) and value > 2**1000 else float(value)
    if not (low <= number < high or (closed and number == high < math.inf)):
        span = f"from {low:g} to below {high:g}"
        if closed:
            span = f"in [{low:g}, {high:g}]"
        raise refusal(name, value, owner, f"a number {span}{alternative}")
    return number


def check_bool(name: str, value: Any, owner: str, alternative: str = "") -> bool:
    """True or False, and nothing that only counts as one of them.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(name, value, owner, f"True or False{alternative}")
    return bool(value)


def check_one_of(
    name: str, value: Any, allowed: Collection[Any], owner: str, alternative: str = ""
) -> Any:
    """One of several strings, or of other constants.

    Args:
        name: str, the argument's name.
        value: what was given.
        allowed: the values that are allowed.
        owner: str, the class, layer or function to name in the error.
        alternative: str, what else is allowed.

    Raises:
        ValueError: if it is none of them.
    """
    if not any(type(value) is type(one) and value == one for one in allowed):
        choices = [f'"{one}"' if isinstance(one, str) else f"{one}" for one in allowed]
        choice = " or ".join([", ".join(choices[:-1]), choices[-1]])
        raise refusal(name, value, owner, f"{choice}{alternative}")
    return value


def check_seed(name: str, value: Any, owner: str) -> int | None:
    """None or an int that is not negative, below 2^31.

    Raises:
        ValueError: if it is neither.
    """
    if value is not None and not is_int(value):
        raise refusal(name, value, owner, "an int from 0 to 2147483647, or None")
    return None if value is None else int(value)


def check_path(name: str, value: Any, owner: str) -> None:
    """A path or None; an int would be a file that is open already.

    Raises:
        ValueError: if it is neither.
    """
    fine = isinstance(value, (str, os.PathLike)) and os.fspath(value)
    if value is not None and not fine:
        raise refusal(name, value, owner, "a path, or None")


def check_model(model: Any, owner: str) -> keras.Model:
    """A Keras model.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(model, keras.Model):
        raise refusal("model", model, owner, "a Keras model")
    return model


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, a tuple, or a range."""
    return isinstance(value, (list, tuple, range))


def from_keras(owner: str, make: Callable[..., _Made], **arguments: Any) -> _Made:
    """What Keras makes of arguments that are its own, its errors with the name of ours.

    Args:
        owner: str, the class, layer or function to name in the error.
        make: a class or function of Keras.
        **arguments: its arguments.

    Raises:
        ValueError: if Keras refuses them.
    """
    try:
        return make(**arguments)
    except Exception as error:
        defaults = inspect.signature(make).parameters
        given = [
            f"{name}={shown(value)}"
            for name, value in arguments.items()
            if name != "name" and shown(value) != shown(defaults[name].default)
        ]
        received = ", ".join(given)
        raise ValueError(
            f"{owner}: expected arguments as Keras takes them. Received: {received}. "
            f"Keras says: {error}"
        ) from error


# --- arrays and tensors ---------------------------------------------------------------


def real_array(name: str, values: Any, owner: str) -> np.ndarray:
    """An array of real numbers, of whatever dtype it has; nothing is copied.

    Masked values would be taken for what they hide, and imaginary parts be dropped.

    Args:
        name: str, the argument's name.
        values: what was given: an array, a tensor, nested lists of numbers.
        owner: str, the class, layer or function to name in the error.

    Returns:
        A NumPy array.

    Raises:
        ValueError: on masked values, complex numbers, what is no number.
    """
    masked = _masked(values)
    if masked:
        raise ValueError(
            f"{owner}: `{name}` must have no masked values: leave their examples out. "
            f"Received: {shown(values)}, with {masked} masked ones."
        )
    try:
        tensor = ops.is_tensor(values) or isinstance(values, keras.Variable)
        array = np.asanyarray(ops.convert_to_numpy(values) if tensor else values)
        if array.dtype.kind == "O" and values is not None:
            array = array.astype("float64")
        elif array.dtype.kind == "V":
            # bfloat16, which NumPy has no kind for.
            array = array.astype("float32")
    except Exception as error:
        what = "an array of numbers"
        raise ValueError(f"{refusal(name, values, owner, what)} ({error})") from error
    if array.dtype.kind not in "biuf":
        what = f"real numbers, not {array.dtype}"
        raise refusal(name, values, owner, what)
    return array


def _masked(values: Any) -> int:
    """How many values of an array, or of arrays in a list, are masked."""
    if isinstance(values, np.ma.MaskedArray):
        return int(np.count_nonzero(np.ma.getmaskarray(values)))
    if is_list(values):
        return sum(map(_masked, values))
    return int(values is np.ma.masked)


def finite_array(
    name: str, values: Any, owner: str, axes: Collection[int] | None = None
) -> np.ndarray:
    """A float64 array of finite numbers.

    Args:
        name: str, the argument's name.
        values: what was given: an array, a tensor, nested lists of numbers.
        owner: str, the class, layer or function to name in the error.
        axes: the numbers of axes that it may have; None: any.

    Returns:
        A NumPy array.

    Raises:
        ValueError: on masked values, complex numbers, NaN, infinities, what is no number,
            and on another number of axes.
    """
    array = np.asarray(real_array(name, values, owner), "float64")
    if axes is not None and array.ndim not in axes:
        counts = " or ".join(map(str, axes))
        raise ValueError(
            f"{owner}: `{name}` must have {counts} axes. Received: shape {array.shape}."
        )
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
        raise ValueError(
            f"{owner}: `{name}` must be finite. Received: an array of shape {array.shape} "
            f"with {bad} values that are not finite (NaN or infinite)."
        )
    return array


def real_tensor(name: str, value: Any, owner: str) -> Tensor:
    """A tensor of floats; what is none yet is converted, ints to Keras's default dtype.

    Raises:
        ValueError: on what is no array of real numbers.
    """
    if not ops.is_tensor(value) and not isinstance(value, keras.KerasTensor):
        value = ops.convert_to_tensor(real_array(name, value, owner))
    dtype = keras.backend.standardize_dtype(value.dtype)
    if dtype.startswith(("int", "uint", "bool")):
        return ops.cast(value, keras.config.floatx())
    if not dtype.startswith(("float", "bfloat")):
        raise refusal(name, value, owner, "a tensor of real numbers")
    return value


def check_sizes(name: str, sizes: Any, owner: str, least: int = 1) -> tuple[int, ...]:
    """A tuple of positive ints, `least` of them or more, such as a shape.

    Raises:
        ValueError: if it is none.
    """
    several = is_list(sizes) or (isinstance(sizes, np.ndarray) and sizes.ndim == 1)
    given = tuple(sizes) if several else ()
    if len(given) < least or not all(is_int(size, 1) for size in given):
        raise refusal(name, sizes, owner, f"a tuple of {least} or more positive ints")
    return tuple(map(int, given))


def check_window(name: str, value: Any, axes: int, owner: str) -> None:
    """A positive int, or one for each of some axes.

    Raises:
        ValueError: if it is neither.
    """
    several = is_list(value) and len(value) == axes
    if not all(is_int(size, 1) for size in (value if several else [value])):
        raise refusal(name, value, owner, f"a positive int, or a tuple of {axes} of them")


def check_name(name: str, value: Any, owner: str) -> None:
    """A string that is not empty, or None.

    Raises:
        ValueError: if it is neither.
    """
    if value is not None and not (isinstance(value, str) and value):
        raise refusal(name, value, owner, "a string that is not empty, or None")


# --- tasks, channels, names -----------------------------------------------------------


def task_names(tasks: Tasks, owner: str) -> tuple[str, ...]:
    """Task names from a number of tasks or a sequence of names.

    Args:
        tasks: int T, for `task_0` to `task_{T-1}`, or a list or tuple of
            distinct non-empty strings.
        owner: str, the class or layer to name in the error.

    Returns:
        A tuple of T strings.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(tasks, (list, tuple)):
        valid = all(isinstance(name, str) and name for name in tasks)
        if not tasks or not valid or len(set(tasks)) < len(tasks):
            raise ValueError(
                f"{owner}: task names must be distinct, non-empty strings. "
                f"Received: tasks={list(tasks)!r}."
            )
        return tuple(tasks)
    return tuple(f"task_{t}" for t in range(check_tasks(tasks, owner)))


# What a loaded SavedModel has beside the endpoints of the tasks.
_RESERVED = frozenset(
    {
        "graph_debug_info",
        "non_trainable_variables",
        "serve",
        "signatures",
        "tensorflow_git_version",
        "tensorflow_version",
        "trainable_variables",
        "variables",
    }
)


def check_task_names(names: Sequence[str], owner: str) -> None:
    """Task names that a model can be trained and exported with.

    TensorFlow takes them in the names of the losses' means, and of the outputs and the
    endpoints of a SavedModel; not all texts may be such names.

    Args:
        names: sequence of distinct strings.
        owner: str, the class or function to name in the error.

    Raises:
        ValueError: if some can't be such names.

    Example:

    >>> check_task_names(["5_o_Clock_Shadow", "age"], "multitask")
    >>> try:
    ...     check_task_names(["5_o'Clock_Shadow", "age"], "multitask")
    ... except ValueError as error:
    ...     print(str(error).split("Received: ")[1])
    ["5_o'Clock_Shadow"]. Possible: ['5_o_Clock_Shadow'].
    """
    possible = possible_task_names(names)
    if possible:
        raise ValueError(
            f"{owner}: task names must be of the letters A to Z, digits and `_ . - >`, the "
            "first one a letter, a digit or a dot, since TensorFlow takes no others in a "
            f"SavedModel. Received: {list(possible)}. Possible: {list(possible.values())}."
        )
    check_endpoints(names, owner)


def possible_task_names(names: Sequence[str]) -> dict[str, str]:
    """For names that can't be those of tasks others that can, all different.

    Example:

    >>> possible_task_names(["General Motors", "IBM"])
    {'General Motors': 'General_Motors'}
    """
    found: dict[str, str] = {}
    taken = {name for name in names if clean_name(name) == name}
    for number, name in enumerate(names):
        if name in taken:
            continue
        # Letters without their accents.
        letters = unicodedata.normalize("NFKD", name)
        plain = "".join(c for c in letters if not unicodedata.combining(c))
        new = clean_name(plain) if re.search("[A-Za-z0-9]", plain) else f"task_{number}"
        while new in taken or new in found.values():
            new = f"{new}_{number}"
        found[name] = new
    return found


def no_h5(owner: str) -> ValueError:
    """The error on saving in a legacy HDF5 file."""
    return ValueError(
        f"{owner}: a whole model goes into a `.keras` file, since legacy HDF5 "
        "files (`.h5`) can't hold layers that aren't Keras's own. Of weights alone, "
        "`save_weights` makes a `.weights.h5` file."
    )


def check_endpoints(names: Sequence[str], owner: str) -> None:
    """Task names that the endpoints of a SavedModel can have.

    Args:
        names: sequence of strings.
        owner: str, the class or function to name in the error.

    Raises:
        ValueError: if a SavedModel has something else of that name.
    """
    reserved = sorted(_RESERVED.intersection(names))
    if reserved:
        raise ValueError(
            f"{owner}: no task can have a name that a SavedModel, in which every task is "
            f"an endpoint, has for something else: {sorted(_RESERVED)}. Expected others. "
            f"Received: {reserved}."
        )


def channels_per_task(channels: int | None, tasks: int, owner: str, shape: Shape) -> int:
    """The channels of each task in a grouped axis.

    Args:
        channels: int or None, the size of the channel axis.
        tasks: int, T.
        owner: str, the layer to name in the error.
        shape: the whole input shape, for the error.

    Returns:
        An int.

    Raises:
        ValueError: if the size is unknown or no multiple of T.
    """
    if channels is None:
        raise ValueError(
            f"{owner}: the channel axis of the input must have a known size. "
            f"Received: input shape {tuple(shape)}."
        )
    if channels % tasks:
        raise ValueError(
            f"{owner}: expected a grouped input whose channels divide by "
            f"tasks={tasks}. Received: {channels} channels, input shape "
            f"{tuple(shape)}. If all tasks have the same input, pass "
            "`shared_input=True`."
        )
    return channels // tasks


def channel_axis(data_format: str) -> int:
    """The channel axis of a data format: -1 or 1."""
    return -1 if data_format == "channels_last" else 1


def standardize_data_format(data_format: str | None, owner: str) -> str:
    """`"channels_last"` or `"channels_first"`, Keras's own setting for None.

    Raises:
        ValueError: if it is none of these.
    """
    if data_format is None:
        return keras.config.image_data_format()
    formats = ("channels_last", "channels_first")
    return check_one_of("data_format", data_format, formats, owner, " or None")


def checked_pairs(pairs: Any, owner: str, what: str) -> list[tuple[Any, Any]] | None:
    """Pairs of different things, a list of tuples, or None for all.

    Raises:
        ValueError: on an empty list, on what is no pair of two different names or numbers.
    """
    if pairs is None:
        return None
    # A NumPy scalar is iterable, until it is tried.
    several = isinstance(pairs, Iterable) and getattr(pairs, "ndim", None) != 0
    given = list(pairs) if several else []
    if not given or not all(map(is_pair, given)):
        raise refusal("pairs", pairs, owner, f"a list of pairs of two different {what}")
    return [tuple(pair) for pair in given]


def is_pair(pair: Any) -> bool:
    """Whether it is a pair of two different names or numbers."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return all(isinstance(x, str) or is_int(x) for x in pair) and pair[0] != pair[1]


def is_for(key: str, name: str, kind: str | None) -> bool:
    """Whether a key of a dict by layers is for one of them.

    Args:
        key: str, a layer's name, a pattern, or the name of a Keras class.
        name: str, the layer's.
        kind: str, the name of the class of what the layer is for one task; None: unknown.

    Example:

    >>> [is_for(key, "conv1", "Conv2D") for key in ("conv1", "conv*", "Conv2D", "Dense")]
    [True, True, True, False]
    """
    return key == kind or fnmatch.fnmatchcase(name, key)


def clean_name(name: str) -> str:
    """A name that TensorFlow takes for variables in a SavedModel.

    Example:

    >>> clean_name("_blocks.0.conv"), clean_name("my head")
    ('blocks.0.conv', 'my_head')
    """
    name = re.sub(r"[^A-Za-z0-9_.>-]", "_", name)
    return name.lstrip("_>-") or "layer"
