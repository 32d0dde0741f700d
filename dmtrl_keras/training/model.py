"""The functional model whose outputs are a dict by task name."""

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.backend import (
    check_replicas,
    local_part,
    replicas_in_sync,
    teach_tf2onnx,
)
from dmtrl_keras.ground.keras_private import sharing_scope


@keras.saving.register_keras_serializable("dmtrl_keras")
class MultiTaskModel(keras.Model):
    """A functional Keras model with one output for each task, in a dict by task name.

    It trains, saves and exports like any functional model. What is more: everything that
    is given by task is checked for wrong names, some of which Keras takes in silence, and
    lists are refused, since Keras would assign them in the alphabetical order of the
    tasks.

    Args:
        inputs: input tensor, or a list or dict of them.
        outputs: dict from task name to output tensor.
        name: name of the model.
        **kwargs: `trainable`.

    Raises:
        ValueError: if the outputs are no dict of single tensors by name.

    Example:

    >>> import keras
    >>> from dmtrl_keras import MultiTaskModel
    >>> inputs = keras.Input((4,))
    >>> outputs = {name: keras.layers.Dense(1)(inputs) for name in ("age", "income")}
    >>> model = MultiTaskModel(inputs, outputs)
    >>> try:
    ...     model.compile("sgd", loss="mse", loss_weights={"age": 1.0, "wealth": 2.0})
    ... except ValueError as error:
    ...     print(str(error).split(": ", 1)[1])
    unknown tasks in `loss_weights`: ['wealth']. The tasks are ['age', 'income'].
    """

    # None: all of them.
    _tasks_with_loss = None

    def __init__(self, inputs, outputs, name=None, **kwargs):
        single = isinstance(outputs, dict) and all(
            isinstance(key, str) and not tree.is_nested(value)
            for key, value in outputs.items()
        )
        if not single or not outputs:
            raise ValueError(
                f"{type(self).__name__}: `outputs` must be a dict from task name to one "
                f"output tensor. Received: outputs={outputs!r}."
            )
        super().__init__(inputs, outputs, name=name, **kwargs)

    @property
    def task_names(self):
        """The names of the tasks, a tuple of T strings."""
        return tuple(self._outputs_struct)

    @property
    def tasks(self):
        """The number of tasks, T."""
        return len(self.task_names)

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        **kwargs,
    ):
        """Configure the model for training; arguments as in `keras.Model.compile`.

        Args:
            optimizer: as in Keras.
            loss: a dict by task name, in which tasks may be left out; or one loss for all.
            loss_weights: a dict of floats by task name; tasks left out have 1.
            metrics: a dict by task name; or a list of names or functions for all tasks.
            weighted_metrics: likewise.
            **kwargs: the others, as in Keras.

        Raises:
            ValueError: on unknown tasks, on weights of tasks without a loss, on lists of
                one entry per task; on what Keras can't do with several replicas:
                `jit_compile=True`, `steps_per_execution` above 1.
        """
        self._check_replicas(kwargs)
        self._check_tasks("loss", loss)
        self._check_tasks("loss_weights", loss_weights)
        if loss_weights is not None:
            if not isinstance(loss_weights, dict):
                raise ValueError(
                    f"{self._owner()}: `loss_weights` must be a dict by task name. "
                    f"Received: {loss_weights!r}."
                )
            if loss is not None and not isinstance(loss, dict):
                loss = dict.fromkeys(self.task_names, loss)
            without = sorted(set(loss_weights) - set(loss or {}))
            if without:
                raise ValueError(
                    f"{self._owner()}: `loss_weights` for tasks without a loss: {without}. "
                    f"Received: loss for {sorted(loss or {})}."
                )
            loss_weights = {task: loss_weights.get(task, 1.0) for task in loss}
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=self._metrics_by_task("metrics", metrics),
            weighted_metrics=self._metrics_by_task("weighted_metrics", weighted_metrics),
            **kwargs,
        )
        self._tasks_with_loss = set(loss) if isinstance(loss, dict) else None

    def _check_replicas(self, arguments):
        """Refuse what fails in Keras 3.15 under `tf.distribute`, with errors of its own."""
        if replicas_in_sync() == 1:
            return
        jit, steps = (arguments.get(n) for n in ("jit_compile", "steps_per_execution"))
        if jit is True or (steps or 1) > 1:
            raise ValueError(
                f"{self._owner()}: with several replicas expected jit_compile=False and "
                f"steps_per_execution=1. Received: jit_compile={jit}, "
                f"steps_per_execution={steps}."
            )

    def compile_from_config(self, config):
        """Compile as a saved model was; Keras leaves it to classes with a `compile`."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    @classmethod
    def from_config(cls, config, custom_objects=None):
        with sharing_scope():
            return super().from_config(config, custom_objects)

    def _owner(self):
        return f"{type(self).__name__} {self.name!r}"

    def _check_tasks(self, argument, value):
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"{self._owner()}: `{argument}` must be a dict by task name, since a list "
                f"has no order that is sure to be that of the tasks. Received: {value!r}."
            )
        unknown = set(value) - set(self.task_names) if isinstance(value, dict) else ()
        if unknown:
            raise ValueError(
                f"{self._owner()}: unknown tasks in `{argument}`: "
                f"{sorted(map(str, unknown))}. The tasks are {list(self.task_names)}."
            )

    def _metrics_by_task(self, argument, metrics):
        if metrics is None or isinstance(metrics, dict):
            self._check_tasks(argument, metrics)
            return metrics
        entries = metrics if isinstance(metrics, (list, tuple)) else [metrics]
        if any(isinstance(m, (list, tuple, dict)) for m in entries):
            self._check_tasks(argument, metrics)
        if any(isinstance(m, keras.metrics.Metric) for m in entries) and self.tasks > 1:
            raise ValueError(
                f"{self._owner()}: a metric object in `{argument}` would be one for all "
                f"tasks. Give its name, or a dict by task name. Received: {metrics!r}."
            )
        return {task: list(entries) for task in self.task_names}

    def call(self, inputs, training=None, mask=None):
        """The outputs by task name, as of any functional model.

        Args:
            inputs: tensors in the structure of `model.input`.
            training: bool or None, the mode of the layers. None: inference, unless an outer
                call says otherwise.
            mask: masks of the inputs, or None.
        """
        # Keras 3.15's image layers, such as Resizing, take None for training, and put all
        # layers after them into that mode, in an exported model too.
        return super().call(inputs, training=bool(training), mask=mask)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The total loss, as in Keras, after a check of the names in the labels.

        Raises:
            ValueError: on labels or weights of unknown tasks, on a list of labels, on a
                task that has a loss and no labels.
            tf.errors.InvalidArgumentError: in training, if a replica has no example.
        """
        for argument, value in (("y", y), ("sample_weight", sample_weight)):
            self._check_tasks(argument, value)
        if isinstance(y, dict):
            expected = self._tasks_with_loss
            expected = set(self.task_names) if expected is None else expected
            absent = sorted(expected - set(y))
            if absent:
                raise ValueError(
                    f"{self._owner()}: expected labels for every task with a loss, also "
                    f"for {absent}. Received: labels for {sorted(y)}."
                )
        if training and y is not None:
            check_replicas(tree.flatten(y)[0], self._owner())
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras 3.15 takes the mean of the replicas' batches to know their shapes, which
        # fails where they differ, and where other machines have some of them.
        if iterator is not None and self._distribute_strategy is not None:
            for _, _, batches in iterator:
                data_batch = local_part(next(batches), self.distribute_strategy)
                break
            iterator = None
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

    def export(self, filepath, format="tf_saved_model", **kwargs):
        """Export for inference, as `keras.Model.export`; outputs keep the task names.

        In an ONNX file inputs and outputs can't have the same name. With one input for
        each task they are therefore named `<task>_input` there.

        Args:
            filepath: where to.
            format: `"tf_saved_model"`, `"litert"`, `"onnx"`, or another of Keras's.
            **kwargs: as in Keras.
        """
        if format != "onnx":
            return super().export(filepath, format=format, **kwargs)
        if keras.config.backend() == "tensorflow":
            teach_tf2onnx()
        model = keras.models.clone_model(self, clone_function=_for_onnx, recursive=True)
        inputs = self.input
        if isinstance(inputs, dict):
            inputs = tree.map_structure(
                lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=f"{x.name}_input"),
                inputs,
            )
            model = keras.Model(tree.flatten(inputs), model(inputs))
            inputs = tree.flatten(inputs)
        # Keras exports no model that was never called.
        model(inputs)
        return keras.Model.export(model, filepath, format=format, **kwargs)


def _for_onnx(layer):
    """The layer itself, or an equal one that tf2onnx converts.

    The statistics of `Normalization` are no variables of the graph: in an ONNX file they
    would be inputs, which every caller had to give.
    """
    if type(layer) is not keras.layers.Normalization:
        return layer
    mean, deviation = (
        np.atleast_1d(keras.ops.convert_to_numpy(value)).astype("float64")
        for value in (layer.mean, keras.ops.sqrt(layer.variance))
    )
    deviation = np.maximum(deviation, keras.config.epsilon())
    if mean.size != mean.shape[-1]:
        # Statistics of other axes than the last have no such equal.
        return layer
    scale, offset = 1 / deviation, -mean / deviation
    if layer.invert:
        scale, offset = deviation, mean
    return keras.layers.Rescaling(
        scale.ravel().tolist(),
        offset.ravel().tolist(),
        name=layer.name,
        dtype=layer.dtype_policy,
    )
