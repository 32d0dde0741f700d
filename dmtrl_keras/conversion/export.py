"""Shipping a network of T tasks with an endpoint for each task."""

from typing import Any

import keras
from keras import tree

from dmtrl_keras.conversion import single_task
from dmtrl_keras.ground.types import PathLike
from dmtrl_keras.ground.validation import (
    check_bool,
    check_endpoints,
    check_path,
    refusal,
)
from dmtrl_keras.training.model import MultiTaskModel

_ALL_TASKS = "serve"


def export_tasks(model: MultiTaskModel, filepath: PathLike, verbose: bool = True) -> None:
    """Export a SavedModel with one endpoint for all tasks, and one for each task.

    `serve` takes what the model takes and returns a dict by task name. The endpoint of a
    task takes that task's input alone and runs that task's network alone, as from
    `single_task`; its kernels are composed, so that the file holds them besides the
    factors.

    Args:
        model: a `MultiTaskModel`, such as one from `multitask`.
        filepath: the folder to write.
        verbose: bool, whether to print the endpoints.

    Raises:
        ValueError: if the model is no `MultiTaskModel`, if a SavedModel has something else
            of the name of a task, such as `"serve"`, or a task can't be had alone.

    Example:

    >>> import keras
    >>> import tempfile
    >>> import tensorflow as tf
    >>> from dmtrl_keras import MultiTaskModel, export_tasks, layers
    >>> inputs = keras.Input((8,))
    >>> x = layers.TuckerDense(3, tasks=2, rank=0.5, shared_input=True)(inputs)
    >>> model = MultiTaskModel(inputs, layers.TaskSplit(["age", "gender"])(x))
    >>> folder = tempfile.mkdtemp()
    >>> export_tasks(model, folder, verbose=False)
    >>> loaded = tf.saved_model.load(folder)
    >>> tuple(loaded.age(tf.zeros((5, 8))).shape), sorted(loaded.serve(tf.zeros((5, 8))))
    ((5, 3), ['age', 'gender'])
    """
    if not isinstance(model, MultiTaskModel):
        raise ValueError(
            "export_tasks: expected a MultiTaskModel. "
            f"Received: {type(model).__name__} {getattr(model, 'name', '')!r}."
        )
    if filepath is None:
        raise refusal("filepath", filepath, "export_tasks", "the folder to write")
    check_path("filepath", filepath, "export_tasks")
    verbose = check_bool("verbose", verbose, "export_tasks")
    # Files of earlier versions may have such names.
    check_endpoints(model.task_names, "export_tasks")
    archive = keras.export.ExportArchive()
    archive.track(model)
    _add(archive, _ALL_TASKS, model)
    for task in model.task_names:
        alone = single_task(model, task)
        archive.track(alone)
        _add(archive, task, alone)
    archive.write_out(filepath, verbose=verbose)


def _add(archive: Any, name: str, model: keras.Model) -> None:
    signature = tree.map_structure(
        lambda x: keras.layers.InputSpec(dtype=x.dtype, shape=x.shape, name=x.name),
        model.input,
    )
    archive.add_endpoint(
        name, lambda inputs: model(inputs, training=False), input_signature=[signature]
    )
