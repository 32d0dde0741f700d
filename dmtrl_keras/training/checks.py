"""Metrics that would give wrong numbers, or fail in a graph, are told of before."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import tree

from dmtrl_keras.ground.keras_private import function_of
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.training.missing import CONFUSION_METRICS, Masked

# How the warning of plain metrics beside a masked loss goes on, a pattern.
UNMASKED = ".*these metrics take missing labels for labels"

# Metrics of Keras that take a label for each output, and fail or are wrong where class
# labels are broadcast to them.
_LABEL_FOR_EACH_OUTPUT = (
    *CONFUSION_METRICS,
    keras.metrics.FBetaScore,
    keras.metrics.IoU,
    keras.metrics.CategoricalAccuracy,
    keras.metrics.CategoricalCrossentropy,
    keras.metrics.TopKCategoricalAccuracy,
)


def warn_of_unmasked(
    losses: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], owner: str
) -> None:
    """Warn where a loss leaves missing labels out and a metric of Keras does not.

    Args:
        losses: dict by task of a loss, or a list of them.
        metrics: dicts by task of a metric, or a list of them.
        owner: str, the model to name in the warning.
    """
    masked = {
        task
        for task, loss in losses.items()
        if any(isinstance(own, Masked) for own in tree.flatten(loss))
    }
    plain = [
        f"{task}: {_name(metric)}"
        for given in metrics
        for task, own in given.items()
        if task in masked
        for metric in tree.flatten(own)
        if _is_of_keras(metric)
    ]
    if plain:
        warnings.warn(
            f"{owner}: these metrics take missing labels for labels, where the loss of "
            f"their task, a MaskedLoss, leaves them out: {plain}. Wrap them as the loss: "
            "MaskedMetric(metric, missing=...).",
            stacklevel=3,
        )


def check_shapes(
    metric: keras.metrics.Metric, task: str, y: Tensor, y_pred: Tensor, owner: str
) -> None:
    """Refuse class labels for a metric that needs a label for each output.

    Args:
        metric: a compiled metric.
        task: str.
        y: the task's labels.
        y_pred: the task's outputs.
        owner: str, the model to name in the error.

    Raises:
        ValueError: where Keras would fail in a graph, or give a number without meaning.
    """
    shape, outputs = tuple(y.shape), tuple(y_pred.shape)
    if len(outputs) < 2 or outputs[-1] in (None, 1) or not _is_of_keras(metric):
        return
    without_axis = len(shape) == len(outputs) - 1
    one_class = len(shape) == len(outputs) and shape[-1] == 1
    one_class = one_class and isinstance(metric, _LABEL_FOR_EACH_OUTPUT)
    if not (without_axis or one_class) or _takes_classes(metric):
        return
    hint = (
        'For class labels beside a softmax there are "accuracy" and the metrics whose '
        'names begin with "sparse"; AUC, precision and recall of two classes take one '
        'output, Dense(1, "sigmoid"), or one-hot labels.'
    )
    if getattr(metric, "sparse_y_pred", False):
        hint = f"Make it with {type(metric).__name__}(..., sparse_y_pred=False)."
    raise ValueError(
        f"{owner}: metric {metric.name!r} of task {task!r}: expected a label for each of "
        f"the {outputs[-1]} outputs. Received: labels of shape {shape}, outputs of shape "
        f"{outputs}. {hint}"
    )


def _takes_classes(metric: keras.metrics.Metric) -> bool:
    function = function_of(metric)
    if function is not None:
        return function.__name__.startswith("sparse")
    # Those of segmentation.
    sparse = getattr(metric, "sparse_y_true", False)
    return sparse and not getattr(metric, "sparse_y_pred", True)


def _is_of_keras(metric: Any) -> bool:
    """Whether a metric, its name or a function is one of Keras."""
    if metric is None or isinstance(metric, str):
        return metric is not None
    thing = metric
    if isinstance(metric, keras.metrics.Metric):
        thing = function_of(metric) or type(metric)
    return str(getattr(thing, "__module__", "")).startswith("keras.")


def _name(metric: Any) -> str:
    if isinstance(metric, str):
        return metric
    found = getattr(metric, "name", None) or getattr(metric, "__name__", metric)
    return str(found)
