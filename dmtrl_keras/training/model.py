"""The functional model whose outputs are a dict by task name."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.backend import (
    check_replicas,
    replicas_in_sync,
    teach_tf2onnx,
)
from dmtrl_keras.ground.keras_private import (
    ModelOfReplicas,
    aggregated_loss,
    attach,
    attached,
    functional_constructor,
    has_losses,
    losses_by_output,
    sharing_scope,
    track_layers,
)
from dmtrl_keras.ground.types import PathLike, Tensor
from dmtrl_keras.ground.validation import name_of, refusal
from dmtrl_keras.training.terms import LossTerm, Step, checked_terms

# By this name the features of a training step ride on its outputs.
_FEATURES = "_dmtrl_keras_features"


@keras.saving.register_keras_serializable("dmtrl_keras")
class MultiTaskModel(ModelOfReplicas):
    """A functional Keras model with one output for each task, in a dict by task name.

    It trains, saves and exports like any functional model. What is more: everything that
    is given by task is checked for wrong names, some of which Keras takes in silence, and
    lists are refused, since Keras would assign them in the alphabetical order of the
    tasks.

    Args:
        inputs: input tensor, or a list or dict of them.
        outputs: dict from task name to output tensor.
        name: name of the model.
        terms: list of further terms of the loss, such as `TaskRelations`, each of which
            sees features and labels of every step.
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
    _tasks_with_loss: set[str] | None = None
    _terms: Sequence[LossTerm] = ()
    _network: "_Untracked | None" = None
    _losses_given: tuple[tuple[str, Any], ...] = ()

    @functional_constructor
    def __init__(
        self,
        inputs: Any,
        outputs: Mapping[str, Any],
        name: str | None = None,
        *,
        terms: Sequence[LossTerm] = (),
        **kwargs: Any,
    ) -> None:
        single = isinstance(outputs, dict) and all(
            isinstance(key, str) and not tree.is_nested(value)
            for key, value in outputs.items()
        )
        if not single or not outputs:
            raise ValueError(
                f"{type(self).__name__}: `outputs` must be a dict from task name to one "
                f"output tensor. Received: outputs={outputs!r}."
            )
        for argument, value in (("inputs", inputs), ("outputs", outputs)):
            flat = tree.flatten(value)
            if not flat or not all(isinstance(x, keras.KerasTensor) for x in flat):
                what = "symbolic tensors of Keras, such as keras.Input((8,))"
                raise refusal(argument, value, type(self).__name__, what)
        super().__init__(inputs, outputs, name=name, **kwargs)
        terms = checked_terms(terms, name_of(self))
        if terms:
            self._terms = terms
            track_layers(self, terms)
            features = [term.connect(self) for term in self._terms]
            self._training_graph = _Untracked(
                keras.Model(self.input, (self.output, features))
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, a tuple of T strings."""
        return tuple(self.output)

    @property
    def tasks(self) -> int:
        """The number of tasks, T."""
        return len(self.task_names)

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms of the loss beside those of the tasks."""
        return tuple(self._terms)

    def inference_network(self) -> "MultiTaskModel":
        """The network without what only training needs; it has the same layers."""
        if not self._terms:
            return self
        if self._network is None:
            # Not tracked: its layers are this model's own.
            network = MultiTaskModel(self.input, self.output, name=self.name)
            self._network = _Untracked(network)
        return self._network.value

    def like(self, network: keras.Model) -> "MultiTaskModel":
        """Another network of the same tasks, with copies of the terms as they are now.

        Args:
            network: a functional model with the same outputs, such as a copy of this one
                with other layers.
        """
        if not self._terms:
            return network
        terms = [type(term).from_config(term.get_config()) for term in self._terms]
        new = MultiTaskModel(network.input, network.output, terms=terms, name=self.name)
        for mine, theirs in zip(self._terms, new._terms):
            theirs.set_weights(mine.get_weights())
        return new

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: Any = None,
        loss_weights: dict[str, float] | None = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
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
                    f"{name_of(self)}: `loss_weights` must be a dict by task name. "
                    f"Received: {loss_weights!r}."
                )
            if loss is not None and not isinstance(loss, dict):
                loss = dict.fromkeys(self.task_names, loss)
            without = sorted(set(loss_weights) - set(loss or {}))
            if without:
                raise ValueError(
                    f"{name_of(self)}: `loss_weights` for tasks without a loss: {without}. "
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
        self._tasks_with_loss = None
        if isinstance(loss, dict):
            self._tasks_with_loss = {task for task, own in loss.items() if own is not None}
        by_task = loss if isinstance(loss, dict) else dict.fromkeys(self.task_names, loss)
        # Not a dict: Keras would track the losses in it.
        self._losses_given = tuple(by_task.items())

    def _check_replicas(self, arguments: Mapping[str, Any]) -> None:
        """Refuse what fails in Keras 3.15 under `tf.distribute`, with errors of its own."""
        if replicas_in_sync() == 1:
            return
        jit, steps = (arguments.get(n) for n in ("jit_compile", "steps_per_execution"))
        if jit is True or (steps or 1) > 1:
            raise ValueError(
                f"{name_of(self)}: with several replicas expected jit_compile=False and "
                f"steps_per_execution=1. Received: jit_compile={jit}, "
                f"steps_per_execution={steps}."
            )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was; Keras leaves it to classes with a `compile`."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self._terms:
            config["terms"] = [
                keras.saving.serialize_keras_object(term) for term in self._terms
            ]
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Any:
        config = dict(config)
        terms = config.pop("terms", ())
        with sharing_scope():
            model = super().from_config(config, custom_objects)
            if not terms:
                return model
            terms = [
                keras.saving.deserialize_keras_object(term, custom_objects)
                for term in terms
            ]
        return cls(
            model.input,
            model.output,
            terms=terms,
            name=model.name,
            trainable=model.trainable,
        )

    def _check_tasks(self, argument: str, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"{name_of(self)}: `{argument}` must be a dict by task name, since a list "
                f"has no order that is sure to be that of the tasks. Received: {value!r}."
            )
        unknown = set(value) - set(self.task_names) if isinstance(value, dict) else ()
        if unknown:
            raise ValueError(
                f"{name_of(self)}: unknown tasks in `{argument}`: "
                f"{sorted(map(str, unknown))}. The tasks are {list(self.task_names)}."
            )

    def _metrics_by_task(self, argument: str, metrics: Any) -> Any:
        if metrics is None or isinstance(metrics, dict):
            self._check_tasks(argument, metrics)
            return metrics
        entries = metrics if isinstance(metrics, (list, tuple)) else [metrics]
        if any(isinstance(m, (list, tuple, dict)) for m in entries):
            self._check_tasks(argument, metrics)
        if any(isinstance(m, keras.metrics.Metric) for m in entries) and self.tasks > 1:
            raise ValueError(
                f"{name_of(self)}: a metric object in `{argument}` would be one for all "
                f"tasks. Give its name, or a dict by task name. Received: {metrics!r}."
            )
        return {task: list(entries) for task in self.task_names}

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None
    ) -> dict[str, Tensor]:
        """The outputs by task name, as of any functional model.

        Args:
            inputs: tensors in the structure of `model.input`.
            training: bool or None, the mode of the layers. None: inference, unless an outer
                call says otherwise.
            mask: masks of the inputs, or None.
        """
        # Keras 3.15's image layers, such as Resizing, take None for training, and put all
        # layers after them into that mode, in an exported model too.
        if not (training and self._terms):
            return super().call(inputs, training=bool(training), mask=mask)
        graph = self._training_graph.value
        outputs, features = graph(inputs, training=True, mask=mask)
        # They ride on an output, as Keras's masks do: whoever computes the loss of these
        # outputs finds the features that belong to them, in whatever thread.
        attach(next(iter(outputs.values())), _FEATURES, features)
        return outputs

    def task_losses(
        self, y: Any, y_pred: Mapping[str, Tensor], sample_weight: Any = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The losses by task, before they are added.

        Args:
            y: dict of labels by task; of a single task also its labels.
            y_pred: dict of outputs by task.
            sample_weight: None, a tensor, or a dict of them by task.

        Returns:
            `(losses, weights)`, dicts by task, of scalars and of the loss weights. The
            total is the sum of their products, of the penalties and of the terms.

        Raises:
            ValueError: on labels that are no dict by task, of unknown tasks, or missing for
                a task with a loss; if the model has no losses.
        """
        if not has_losses(self):
            raise ValueError(f"{name_of(self)}: there is no loss; give `compile` a `loss`.")
        self._check_labels(y, sample_weight)
        if not isinstance(y, Mapping):
            if self.tasks > 1:
                raise ValueError(
                    f"{name_of(self)}: expected a dict of labels by task. "
                    f"Received: {type(y).__name__}."
                )
            y = {self.task_names[0]: y}
        return losses_by_output(self, y, y_pred, sample_weight)

    def _check_labels(self, y: Any, sample_weight: Any) -> None:
        for argument, value in (("y", y), ("sample_weight", sample_weight)):
            self._check_tasks(argument, value)
        if not isinstance(y, Mapping):
            return
        expected = self._tasks_with_loss
        expected = set(self.task_names) if expected is None else expected
        absent = sorted(expected - set(y))
        if absent:
            raise ValueError(
                f"{name_of(self)}: expected labels for every task with a loss, also "
                f"for {absent}. Received: labels for {sorted(y)}."
            )

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The total loss: of the tasks, weighted, of the penalties, and of the terms.

        Raises:
            ValueError: on labels or weights of unknown tasks, on a list of labels, on a
                task that has a loss and no labels.
            tf.errors.InvalidArgumentError: in training, if a replica has no example.
        """
        self._check_labels(y, sample_weight)
        # What rides on the outputs, before they are others.
        features = self._features_of(y_pred) if training else None
        if training and y is not None:
            y_pred, features = tree.map_structure(
                lambda x: check_replicas(x, name_of(self)), (y_pred, features)
            )
        parts = []
        if has_losses(self) and y is not None:
            losses, weights = self.task_losses(y, y_pred, sample_weight)
            parts += [losses[task] * weights[task] for task in losses]
        parts += [aggregated_loss(self, loss) for loss in self.losses]
        parts += self._values_of_terms(y, y_pred, sample_weight, features)
        if not parts:
            raise ValueError(f"{name_of(self)}: there is no loss; give `compile` a `loss`.")
        return functools.reduce(keras.ops.add, parts)

    def _features_of(self, y_pred: Mapping[str, Tensor]) -> list[Any]:
        """What the terms asked for, of the batch that gave these outputs."""
        if not self._terms:
            return []
        features = attached(next(iter(y_pred.values())), _FEATURES)
        if features is None:
            raise ValueError(
                f"{name_of(self)}: the terms of the loss need the features of the "
                "batch. Call the model with `training=True` before `compute_loss`, "
                "and give it the outputs as they are."
            )
        return features

    def _values_of_terms(
        self, y: Any, y_pred: Any, sample_weight: Any, features: list[Any] | None
    ) -> list[Tensor]:
        """The terms; without features, those of inference."""
        labels = y if isinstance(y, Mapping) else {}
        losses = dict(self._losses_given)
        training = features is not None
        values = []
        for term, own in zip(self._terms, features or [None] * len(self._terms)):
            step = Step(own, labels, y_pred, sample_weight, losses)
            values.append(term(step=step, training=training))
        return values

    def export(
        self, filepath: PathLike, format: str = "tf_saved_model", **kwargs: Any
    ) -> Any:
        """Export for inference, as `keras.Model.export`; outputs keep the task names.

        In an ONNX file inputs and outputs can't have the same name. With one input for
        each task they are therefore named `<task>_input` there.

        Args:
            filepath: where to.
            format: `"tf_saved_model"`, `"litert"`, `"onnx"`, or another of Keras's.
            **kwargs: as in Keras.
        """
        # Keras before 3.15 takes no `pathlib.Path` for some formats.
        filepath = os.fspath(filepath)
        if self._terms:
            return self.inference_network().export(filepath, format=format, **kwargs)
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


class _Untracked:
    """A model that is no part of another, since it has the same layers."""

    def __init__(self, value: keras.Model) -> None:
        self.value = value


def _for_onnx(layer: keras.layers.Layer) -> keras.layers.Layer:
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
