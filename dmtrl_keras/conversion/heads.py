"""What comes after the backbone: the outputs of each task."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import tree

from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import (
    is_called_once,
    is_named_by_keras,
    producer_of,
    rename,
)
from dmtrl_keras.ground.validation import is_int, shown
from dmtrl_keras.tasks.forms import Features
from dmtrl_keras.tasks.layout import TaskSplit


def checked_heads(
    heads: Any, names: Sequence[str], owner: str = "multitask"
) -> dict[str, Any]:
    """A dict by task name of None, ints, layers and functions."""
    if isinstance(heads, dict):
        if set(heads) != set(names):
            raise ValueError(
                f"{owner}: `heads` must have one entry for each of the tasks "
                f"{list(names)}. Received: {sorted(map(str, heads))}."
            )
    elif isinstance(heads, keras.layers.Layer) and len(names) > 1:
        raise ValueError(
            f"{owner}: the layer {heads.name!r} as `heads` would be one for all tasks. "
            "Give a function of the features that makes one, or a dict by task name."
        )
    else:
        heads = dict.fromkeys(names, heads)
    for task, head in heads.items():
        if not (head is None or callable(head) or is_int(head, 1)):
            raise ValueError(
                f"{owner}: the head of task {task!r} must be a positive int, a layer or "
                f"a function of the features. Received: {shown(head)}."
            )
    return heads


def outputs_by_task(
    outputs: Any,
    heads: Mapping[str, Any],
    names: Sequence[str],
    new_name: Callable[[str], str],
) -> dict[str, keras.KerasTensor]:
    """A dict of the output tensor of each task."""
    flat = tree.flatten(outputs)
    if len(flat) > 1 and not all(callable(head) for head in heads.values()):
        raise ValueError(
            f"multitask: the backbone has {len(flat)} outputs. Give `heads`, a function "
            "for each task that makes one output tensor of them."
        )
    parts = [_per_task(features, new_name) for features in flat]
    result: dict[str, keras.KerasTensor] = {}
    made: dict[str, keras.layers.Layer | None] = {}
    for task in names:
        features = tree.pack_sequence_as(outputs, [part[task] for part in parts])
        result[task] = output_of(features, heads[task], task, new_name)
        if callable(heads[task]):
            made[task] = last_with_weights(result[task], tree.flatten(features))
    for task, layer in made.items():
        name_head(layer, task, new_name)
    return result


def output_of(
    features: Any,
    head: Any,
    task: str,
    new_name: Callable[[str], str],
    owner: str = "multitask",
) -> keras.KerasTensor:
    """The output tensor that a head makes of a task's features."""
    if isinstance(head, numbers.Integral):
        return _classes(features, int(head), new_name(f"{task}_head"))
    output = features if head is None else head(features)
    if not isinstance(output, keras.KerasTensor):
        raise ValueError(
            f"{owner}: the head of task {task!r} must return one output tensor. "
            f"Received: {output!r}."
        )
    return output


def name_head(
    layer: keras.layers.Layer | None, task: str, new_name: Callable[[str], str]
) -> None:
    """Name the last layer of a head, unless it is nobody's or has a name."""
    # A layer of several tasks is nobody's head.
    if layer is not None and is_named_by_keras(layer) and is_called_once(layer):
        rename(layer, new_name(f"{task}_head"))


def last_with_weights(
    output: keras.KerasTensor, features: list[Any]
) -> keras.layers.Layer | None:
    """The last layer with weights between features and the output of a head, or None."""
    while not any(output is end for end in features):
        operation, parents = producer_of(output)
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            return operation
        if len(parents) != 1:
            break
        (output,) = parents
    return None


def _per_task(
    features: Features, new_name: Callable[[str], str]
) -> dict[str, keras.KerasTensor]:
    names = list(features.names)
    if features.form == Form.SHARED:
        tensor = features.take(Form.SHARED)
        return {
            task: keras.layers.Identity(name=new_name(f"{task}_features"))(tensor)
            for task in names
        }
    return TaskSplit(names, name=new_name("tasks"))(features.take(Form.GROUPED))


def _classes(features: keras.KerasTensor, classes: int, name: str) -> keras.KerasTensor:
    if len(features.shape) > 2:
        axes = len(features.shape) - 2
        pooling = getattr(keras.layers, f"GlobalAveragePooling{axes}D")
        features = pooling(name=f"{name}_pooling")(features)
    activation = "softmax" if classes > 1 else "sigmoid"
    # Probabilities in full precision, whatever the backbone computes in.
    layer = keras.layers.Dense(classes, activation, name=name, dtype=keras.config.floatx())
    return layer(features)
