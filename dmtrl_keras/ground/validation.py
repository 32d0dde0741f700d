"""Checks that several layers share; every message says what was received."""

import fnmatch
import math
import numbers
import re
from typing import Any

import keras

from dmtrl_keras.ground.types import Shape, Tasks


def name_of(thing: Any) -> str:
    """What an error calls a layer, model or other object with a name.

    Example:

    >>> import keras
    >>> name_of(keras.layers.Dense(3, name="fc"))
    "Dense 'fc'"
    """
    return f"{type(thing).__name__} {thing.name!r}"


def check_tasks(tasks: Any, owner: str) -> int:
    """T as an int.

    Args:
        tasks: the argument that the user gave.
        owner: str, the class or layer to name in the error.

    Returns:
        An int, at least 1.

    Raises:
        ValueError: if it is not a positive int.
    """
    return check_positive("tasks", tasks, owner, ", the number of tasks")


def check_positive(name: str, value: Any, owner: str, alternative: str = "") -> int:
    """A positive int.

    Args:
        name: str, the argument's name.
        value: what was given.
        owner: str, the class, layer or function to name in the error.
        alternative: str, what else is allowed, or what the number means.

    Returns:
        An int, at least 1.

    Raises:
        ValueError: if it is not a positive int.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{owner}: `{name}` must be a positive int{alternative}. "
            f"Received: {name}={value!r}."
        )
    return int(value)


def check_number(name: str, value: Any, owner: str, high: float = math.inf) -> None:
    """A number from 0 to below `high`.

    Args:
        name: str, the argument's name.
        value: what was given.
        owner: str, the class, layer or function to name in the error.
        high: number that it must be below.

    Raises:
        ValueError: if it is not.
    """
    number = isinstance(value, numbers.Real)
    if not (number and 0 <= value < high):
        raise ValueError(
            f"{owner}: `{name}` must be a number from 0 to below {high}. "
            f"Received: {name}={value!r}."
        )


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
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(
            f'{owner}: `data_format` must be "channels_last" or "channels_first". '
            f"Received: data_format={data_format!r}."
        )
    return data_format


def checked_pairs(pairs: Any, owner: str, what: str) -> list[tuple[Any, Any]] | None:
    """Pairs of different things, a list of tuples, or None for all.

    Raises:
        ValueError: on an empty list, on what is no pair of two different ones.
    """
    if pairs is None:
        return None
    pairs = [tuple(pair) for pair in pairs]
    if not pairs or any(len(p) != 2 or p[0] == p[1] for p in pairs):
        raise ValueError(
            f"{owner}: `pairs` must be pairs of two different {what}. "
            f"Received: pairs={pairs!r}."
        )
    return pairs


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
