"""The functional model whose outputs are a dict by task name."""

import contextlib
import functools
import inspect
import math
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from dmtrl_keras.balancing import weighting as balancings
from dmtrl_keras.balancing.weighting import Balancing
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
    build_losses,
    cloned_model,
    compiled_metrics,
    flatten_layers,
    functional_constructor,
    has_losses,
    in_sharing_scope,
    is_to_be_quantized,
    logs_as_list,
    loss_tracker,
    losses_by_output,
    saving_as_h5,
    set_loss_tracker,
    sharing_scope,
    sum_of_losses,
    track_layers,
)
from dmtrl_keras.ground.types import PathLike, Tensor
from dmtrl_keras.ground.validation import (
    check_task_names,
    name_of,
    no_h5,
    refusal,
    shown,
)
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.task_layer import TaskLayer
from dmtrl_keras.training.balanced import BalancingState, GradientSteps, vector
from dmtrl_keras.training.batches import MARK, TaskBatches, as_numpy, is_frame
from dmtrl_keras.training.checks import UNMASKED, check_shapes, warn_of_unmasked
from dmtrl_keras.training.class_weights import (
    apart_for_validation,
    for_all_tasks,
    with_class_weight,
)
from dmtrl_keras.training.freezing import Held, Own, hold, own_of_tasks, resting_call
from dmtrl_keras.training.lengths import (
    PRESENT,
    Piece,
    TaskValidation,
    are_data_sets,
    check_labels,
    different_lengths,
    one_set_each,
)
from dmtrl_keras.training.metrics import TotalLoss
from dmtrl_keras.training.missing import Masked
from dmtrl_keras.training.optimizers import check_proximal
from dmtrl_keras.training.terms import LossTerm, Step, checked_terms
from dmtrl_keras.training.weights import (
    MovingWeights,
    Weight,
    as_given,
    moving_weights,
    weights_by_task,
)

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
        ValueError: if the outputs are no dict of single tensors by name, or a name is one
            that TensorFlow takes in no SavedModel.

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

    _tasks_with_loss: frozenset[str] = frozenset()
    _tasks_with_metrics: frozenset[str] = frozenset()
    _loss_weights: "_Untracked | None" = None
    _moving_weights: Sequence[MovingWeights] = ()
    _terms: Sequence[LossTerm] = ()
    _network: "_Untracked | None" = None
    _evaluating: bool = False
    # Whether an evaluation goes on with what it measured.
    _going_on: bool = False
    # Whether `fit` or `evaluate` runs, not a single batch.
    _of_data_set: bool = False
    _losses_given: tuple[tuple[str, Any], ...] = ()
    _frozen: frozenset[str] = frozenset()
    _own: "_Untracked | None" = None
    _balancing: Sequence[BalancingState] = ()
    _balanced_steps: "GradientSteps | None" = None
    # By thread, within a step that balances gradients: the losses, and the rest.
    _parts: "Mapping[int, _Untracked]" = {}

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
        if not in_sharing_scope():
            # Files of earlier versions may have others.
            check_task_names(list(outputs), type(self).__name__)
        original = cloned_model(outputs)
        super().__init__(inputs, outputs, name=name, **kwargs)
        if original is not None and not terms:
            terms = original.new_terms()
        frozen = () if original is None else original.frozen_tasks
        terms = checked_terms(terms, name_of(self))
        if terms:
            self._terms = terms
            track_layers(self, terms)
            features = [term.connect(self) for term in self._terms]
            self._training_graph = _Untracked(
                ModelOfReplicas(self.input, (self.output, features))
            )
        if frozen:
            self.freeze(*frozen)

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

    # --- tasks that rest -------------------------------------------------------------

    @property
    def frozen_tasks(self) -> tuple[str, ...]:
        """The names of the tasks that are not trained."""
        return tuple(task for task in self.task_names if task in self._frozen)

    def freeze(self, *tasks: str) -> None:
        """Let tasks rest while the others are trained.

        In training their losses count no more, and what is theirs alone stays as it is, to
        the bit, whatever the optimizer does (the moments of Adam go on where a gradient is
        zero, and weights decay): layers that no other task uses, such as heads; kernels
        that are a task's own, its column of the task matrix where kernels are generated
        from shared factors (LAF, Tucker, TT), its bias, its channels of layers such as
        batch normalization. Layers of theirs alone run in inference mode. What they share
        with other tasks goes on, so that their outputs may change all the same; so do the
        running statistics of layers of all tasks.

        Losses and metrics of tasks at rest are logged as before, and evaluation has them
        in its total. A model is saved with its frozen tasks. It can be called between two
        epochs, too (by a callback, see `callbacks.EarlyStoppingByTask`): the next step is
        traced anew.

        A task whose loss weight is 0, a number or a `keras.Variable` that has become 0, is
        left alone in the same way, but for the mode of its layers. (Not in a model with
        `terms`, which train it, too.)

        Args:
            *tasks: names of tasks.

        Raises:
            ValueError: on unknown tasks, on none, or if no task were left to be trained.

        Example:

        >>> import keras
        >>> import numpy as np
        >>> from dmtrl_keras import multitask
        >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model = multitask(backbone, ["age", "income"], heads=1, verbose=False)
        >>> model.compile("adam", "mse")
        >>> model.freeze("age")
        >>> before = model.get_layer("age_head").get_weights()
        >>> x, y = np.ones((8, 4)), {"age": np.ones(8), "income": np.zeros(8)}
        >>> _ = model.fit(x, y, verbose=0)
        >>> all(map(np.array_equal, before, model.get_layer("age_head").get_weights()))
        True
        """
        if not tasks:
            what = f"names of {list(self.task_names)}, one at least"
            raise refusal("tasks", [], name_of(self), what)
        self._check_known(tasks)
        self._set_frozen(self._frozen.union(tasks))

    def unfreeze(self, *tasks: str) -> None:
        """Train tasks again.

        Args:
            *tasks: names of tasks; none: all of them.

        Raises:
            ValueError: on unknown tasks.
        """
        self._check_known(tasks)
        self._set_frozen(self._frozen.difference(tasks or self._frozen))

    def _check_known(self, tasks: Sequence[str]) -> None:
        unknown = [task for task in tasks if task not in self.task_names]
        if unknown:
            what = f"names of {list(self.task_names)}, one after another"
            raise refusal("tasks", unknown, name_of(self), what)

    def _set_frozen(self, tasks: frozenset[str]) -> None:
        if tasks == frozenset(self.task_names):
            raise ValueError(
                f"{name_of(self)}: expected at least one task that is trained. "
                f"Received: all of {list(self.task_names)} frozen."
            )
        self._frozen = tasks
        resting = frozenset[int]()
        if tasks:
            resting = resting.union(*(self.own_of(task).layers for task in tasks))
        for graph in (self, self._training_graph.value if self._terms else None):
            if graph is not None:
                graph.called_otherwise = dict.fromkeys(resting, resting_call)
        self._hold_optimizer()
        if getattr(self, "train_function", None) is not None:
            self.make_train_function(force=True)

    def own_of(self, task: str) -> Own:
        """The weights and the layers that are one task's alone (not for direct use)."""
        if self._own is None:
            own = own_of_tasks(self.inference_network())
            object.__setattr__(self, "_own", _Untracked(own))
        assert self._own is not None
        return self._own.value[task]

    def _hold_optimizer(self) -> None:
        """Let the optimizer leave tasks alone, if there may be such."""
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and (self._frozen or any(self._at_rest().values())):
            hold(optimizer, self._held)

    def _at_rest(self) -> dict[str, list[Any]]:
        """By task the loss weights that are 0, or may become so: all of them must be."""
        # Terms of the loss train a task whose own loss has no weight.
        weights = self._loss_weights.value if self._loss_weights and not self._terms else {}
        found = {task: tree.flatten(own) for task, own in weights.items()}
        return {
            task: own if all(hasattr(w, "variable") or w == 0 for w in own) else []
            for task, own in found.items()
        }

    def _held(self) -> list[Held]:
        """What the optimizer is to leave alone."""
        conditions: dict[str, Any] = {}
        for task, own in self._at_rest().items():
            moving = [
                keras.ops.convert_to_tensor(weight.variable)
                for weight in own
                if hasattr(weight, "variable")
            ]
            if moving:
                zeros = [keras.ops.equal(weight, 0) for weight in moving]
                conditions[task] = functools.reduce(keras.ops.logical_and, zeros)
            elif own:
                conditions[task] = True
        conditions |= dict.fromkeys(self._frozen, True)
        return [
            Held(variable, entries, condition)
            for task, condition in conditions.items()
            for variable, entries in self.own_of(task).weights
        ]

    def new_terms(self) -> list[LossTerm]:
        """Terms like those of this model, for another one, as they were at the start."""
        return [type(term).from_config(term.get_config()) for term in self._terms]

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
        new = MultiTaskModel(
            network.input, network.output, terms=self.new_terms(), name=self.name
        )
        for mine, theirs in zip(self._terms, new._terms):
            theirs.set_weights(mine.get_weights())
        return new

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: Any = None,
        loss_weights: Mapping[str, Weight] | None = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        balancing: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configure the model for training; arguments as in `keras.Model.compile`.

        Args:
            optimizer: as in Keras.
            loss: a dict by task name, in which tasks may be left out or None; or one loss
                for all.
            loss_weights: a dict of numbers by task name; tasks left out have 1. A scalar
                `keras.Variable` is followed when a callback assigns to it, and saved with
                the model; it is not trained.
            metrics: a dict by task name; or a list of names or functions for all tasks.
            weighted_metrics: likewise.
            balancing: how the losses, weighted by `loss_weights`, are balanced against each
                other in training: the name of a method such as `"upgrad"`, or a
                `dmtrl_keras.balancing.Balancing`; None: not at all. Those that look at
                gradients need TensorFlow, and weight those of what tasks share; what is a
                task's alone follows its own loss. The mean weights of an epoch are logged
                as `<task>_weight`. Losses in evaluation are not balanced.
            **kwargs: the others, as in Keras.

        Raises:
            ValueError: on unknown tasks, on weights of tasks without a loss, on weights
                that are no numbers, on lists of one entry per task; on what Keras can't do
                with several replicas: `jit_compile=True`, `steps_per_execution` above 1; on
                regularizers with `proximal=True` without a `ProximalOptimizer`; on a
                balancing that is none, or not possible in this network or on this backend.

        Warns:
            UserWarning: on metrics of Keras beside a `MaskedLoss`, which take missing
                labels for labels.
        """
        self._check_replicas(kwargs)
        method = balancings.get(balancing, name_of(self))
        check_proximal(optimizer, self.trainable_variables, name_of(self))
        given, (loss, by_task) = loss, self._given_losses(loss)
        weights = {}
        if loss_weights is not None:
            self._check_tasks("loss_weights", loss_weights)
            # As in Keras, weights of tasks whose loss is None do nothing.
            idle = set(given) - set(by_task) if isinstance(given, dict) else set()
            weights = weights_by_task(loss_weights, by_task, idle, name_of(self))
            # Keras wants both in one structure.
            loss = by_task or loss
        metrics = self._metrics_by_task("metrics", metrics)
        weighted_metrics = self._metrics_by_task("weighted_metrics", weighted_metrics)
        metered = [m for m in (metrics, weighted_metrics) if m]
        warn_of_unmasked(by_task, metered, name_of(self))
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=weights or None,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self._tasks_with_loss = frozenset(by_task)
        self._tasks_with_metrics = frozenset(
            task for given in metered for task, own in given.items() if own
        )
        # Not a dict: Keras would track what is in it.
        self._losses_given = tuple(by_task.items())
        all_weights = {task: weights.get(task, 1.0) for task in by_task}
        object.__setattr__(self, "_loss_weights", _Untracked(all_weights))
        object.__setattr__(self, "_moving_weights", moving_weights(weights))
        self._hold_optimizer()
        self._set_balancing(method)
        losses = tree.flatten([own for _, own in self._losses_given])
        counted = sum(getattr(one, "counts_labels", False) for one in losses)
        if counted:
            set_loss_tracker(self, TotalLoss(counted))

    def _set_balancing(self, method: Balancing | None) -> None:
        """Make the state of a balancing of the tasks with a loss."""
        states: list[BalancingState] = []
        object.__setattr__(self, "_balanced_steps", None)
        if method is not None:
            names = tuple(t for t in self.task_names if t in self._tasks_with_loss)
            if not names:
                raise ValueError(
                    f"{name_of(self)}: there is no loss to be balanced; give `compile` a "
                    f"`loss`. Received: balancing={method!r}."
                )
            method.check(names, name_of(self))
            size = 0
            if method.looks_at_gradients:
                steps = GradientSteps(self, method)
                object.__setattr__(self, "_balanced_steps", steps)
                size = steps.size if method.needs_gradients else 0
            states = [BalancingState(method, names, size)]
        object.__setattr__(self, "_balancing", states)

    @property
    def balancing(self) -> Balancing | None:
        """How the losses are balanced in training, or None."""
        return self._balancing[0].balancing if self._balancing else None

    @property
    def gradient_cosines(self) -> np.ndarray | None:
        """The mean cosines between the tasks' gradients since the epoch began, `(T, T)`.

        In the order of the tasks with a loss; None where no balancing looks at gradients.
        """
        if not self._balancing or not self._balancing[0].balancing.looks_at_gradients:
            return None
        return self._balancing[0].mean_cosines()

    def get_compile_config(self) -> Any:
        """As in Keras, with the balancing."""
        config = super().get_compile_config()
        if config and self.balancing is not None:
            config["balancing"] = keras.saving.serialize_keras_object(self.balancing)
        return config

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; with gradients that are balanced, if `compile` says so."""
        if self._balanced_steps is None:
            return super().train_step(*args, **kwargs)
        return self._balanced_steps(self, *args, **kwargs)

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
        with warnings.catch_warnings():
            # Whoever compiled it was warned.
            warnings.filterwarnings("ignore", message=UNMASKED)
            self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def save(
        self,
        filepath: PathLike,
        overwrite: bool = True,
        zipped: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as a `.keras` file; arguments as in `keras.Model.save`.

        Raises:
            ValueError: on an HDF5 file.
        """
        if os.fspath(filepath).endswith((".h5", ".hdf5")):
            self._refuse_h5()
        super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)

    def _refuse_h5(self) -> None:
        raise no_h5(name_of(self))

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        filters: Any = None,
        **kwargs: Any,
    ) -> None:
        """Freeze the kernels of all tasks, and train a difference of low rank for each.

        Of every layer with T kernels and every layer of which there are copies, see
        `dmtrl_keras.layers.TaskDense.enable_lora`; biases, normalizations and layers that
        all tasks have in common are left as they are. Compile anew afterwards.

        Args:
            rank: positive int, r; of smaller kernels the largest that is possible.
            lora_alpha: number; None: r.
            filters: which layers, as in `quantize`: a regular expression for their names, a
                list of these, or a function of a layer; None: all.
            **kwargs: `a_initializer`, `b_initializer`.

        Raises:
            ValueError: if there is no such layer, or one for which it is not possible; no
                layer is changed then.
        """
        layers = [
            layer
            for layer in self._of_several_tasks(filters)
            if isinstance(layer, TaskLayer) or layer.kernels
        ]
        if not layers:
            what = "a pattern that names a layer with kernels of several tasks"
            raise refusal("filters", filters, name_of(self), what)
        for layer in layers:
            own = [layer.stacked] if isinstance(layer, TaskLayer) else layer.kernels
            for kernel in own:
                kernel.check_lora(rank)
        for layer in layers:
            layer.enable_lora(rank, lora_alpha, **kwargs)
        self._forget_steps()

    def _of_several_tasks(self, filters: Any) -> list[Any]:
        """The layers with T kernels that Keras's `filters` let through."""
        return [
            layer
            for layer in flatten_layers(self)
            if isinstance(layer, (TaskLayer, TaskCopies))
            and is_to_be_quantized(layer, filters)
        ]

    def _forget_steps(self) -> None:
        """Have steps traced anew: layers have other variables."""
        self.train_function = self.test_function = self.predict_function = None
        object.__setattr__(self, "_own", None)

    def quantize(
        self, mode: Any = None, config: Any = None, filters: Any = None, **kwargs: Any
    ) -> None:
        """Quantize the layers; arguments as in `keras.Model.quantize`.

        Layers with T kernels can be quantized to `"int8"`, see
        `dmtrl_keras.layers.TaskDense.quantize`.

        Raises:
            ValueError: on other modes, if there are such layers that `filters` let through.
        """
        for layer in self._of_several_tasks(filters):
            layer.quantize(mode, config=config)
        self._forget_steps()
        given = {"mode": mode, "config": config, "filters": filters}
        # Keras before 3.15 doesn't know all of them.
        kwargs |= {name: value for name, value in given.items() if value is not None}
        super().quantize(**kwargs)

    def get_config(self) -> dict[str, Any]:
        if saving_as_h5():
            self._refuse_h5()
        config = super().get_config()
        if self._frozen:
            config["frozen_tasks"] = self.frozen_tasks
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
        frozen = config.pop("frozen_tasks", ())
        with sharing_scope():
            model = super().from_config(config, custom_objects)
            if not terms:
                if frozen:
                    model.freeze(*frozen)
                return model
            terms = [
                keras.saving.deserialize_keras_object(term, custom_objects)
                for term in terms
            ]
        made = cls(
            model.input,
            model.output,
            terms=terms,
            name=model.name,
            trainable=model.trainable,
        )
        if frozen:
            made.freeze(*frozen)
        return made

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

    def _given_losses(self, loss: Any) -> tuple[Any, dict[str, Any]]:
        """The losses as Keras takes them, and by task that has one."""
        self._check_tasks("loss", loss)
        if loss is None:
            return None, {}
        if not isinstance(loss, dict):
            return loss, dict.fromkeys(self.task_names, loss)
        loss = {task: own for task, own in loss.items() if own is not None and own != []}
        for task, own in loss.items():
            if isinstance(own, (list, tuple)) and None in own:
                raise ValueError(
                    f"{name_of(self)}: `loss` has None in the list of task {task!r}. "
                    f"Received: {own!r}."
                )
        return loss, loss

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

    @property
    def loss_weights(self) -> dict[str, Weight]:
        """By task with a loss the weight that the model was compiled with.

        Numbers, and variables themselves: `model.loss_weights["age"].assign(0.5)`.
        """
        weights = self._loss_weights.value if self._loss_weights else {}
        return {task: as_given(weight) for task, weight in weights.items()}

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """As in Keras, with the state of moving loss weights, and of a balancing."""
        return [*super().metrics, *self._moving_weights, *self._balancing]

    def task_losses(
        self, y: Any, y_pred: Mapping[str, Tensor], sample_weight: Any = None
    ) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
        """The losses by task, before they are added.

        Args:
            y: dict of labels by task; of a single task also its labels.
            y_pred: dict of outputs by task.
            sample_weight: None, a tensor, or a dict of them by task.

        Returns:
            `(losses, weights)`, dicts by task, of scalars and of the loss weights; several
            losses of a task are added, with weight 1. The total is the sum of their
            products, of the penalties and of the terms.

        Raises:
            ValueError: on labels that are no dict by task, of unknown tasks, or missing for
                a task with a loss; if the model has no losses.
        """
        return self._losses_by_task(y, y_pred, sample_weight)[:2]

    def _losses_by_task(
        self,
        y: Any,
        y_pred: Mapping[str, Tensor],
        sample_weight: Any,
        idle: Collection[str] = (),
    ) -> tuple[dict[str, Tensor], dict[str, float], list[tuple[str, Tensor, Tensor]]]:
        """As `task_losses`, and the weighted losses of counted labels with the counts."""
        if not has_losses(self):
            raise ValueError(f"{name_of(self)}: there is no loss; give `compile` a `loss`.")
        y, sample_weight, present = _parted(y, sample_weight)
        y = self._labels(y, sample_weight, self._tasks_with_loss, "a loss")
        return losses_by_output(self, y, y_pred, sample_weight, present, idle)

    def _labels(
        self, y: Any, sample_weight: Any, expected: frozenset[str], what: str
    ) -> dict[str, Any]:
        """The labels that there are by task, checked."""
        for argument, value in (("y", y), ("sample_weight", sample_weight)):
            self._check_tasks(argument, value)
        if not isinstance(y, Mapping) and self.tasks > 1:
            raise ValueError(
                f"{name_of(self)}: expected a dict of labels by task. "
                f"Received: {type(y).__name__}."
            )
        if not isinstance(y, Mapping):
            y = {self.task_names[0]: y}
        y = {task: own for task, own in y.items() if own is not None}
        # Of a whole data set it would be a mistake.
        may = self._may_be_absent if y and not self._of_data_set else set()
        absent = sorted(expected - set(y) - may)
        if absent:
            raise ValueError(
                f"{name_of(self)}: expected labels for every task with {what}, also "
                f"for {absent}. Received: labels for {sorted(y)}. Mark those that are "
                "missing, and leave them out by `MaskedLoss`; from a single batch a task "
                "with such a loss may be absent."
            )
        return y

    @property
    def _may_be_absent(self) -> set[str]:
        """The tasks all of whose losses leave out labels that are missing."""
        return {
            task
            for task, own in self._losses_given
            if all(getattr(one, "counts_labels", False) for one in tree.flatten(own))
        }

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
        # What rides on the outputs, before they are others.
        features = self._features_of(y_pred) if training else None
        if training and y is not None:
            y_pred, features = tree.map_structure(
                lambda x: check_replicas(x, name_of(self)), (y_pred, features)
            )
        for state in self._balancing:
            state.is_training(training)
        found: dict[str, Tensor] = {}
        if has_losses(self) and y is not None:
            idle = self._frozen if training else ()
            losses, weights, counted = self._losses_by_task(y, y_pred, sample_weight, idle)
            found = {task: losses[task] * weights[task] for task in losses}
            factors = self._balanced(found) if training else {}
            found |= {task: found[task] * factors[task] for task in factors}
            if counted:
                loss_tracker(self).set_counted(
                    [
                        (value * factors[task] if task in factors else value, size)
                        for task, value, size in counted
                    ]
                )
        rest = [aggregated_loss(self, loss) for loss in self.losses]
        rest += self._values_of_terms(y, y_pred, sample_weight, features)
        if not found and not rest:
            raise ValueError(f"{name_of(self)}: there is no loss; give `compile` a `loss`.")
        parts = self._parts.get(threading.get_ident())
        if parts is not None:
            parts.value = found, rest
        return functools.reduce(keras.ops.add, [*found.values(), *rest])

    @contextlib.contextmanager
    def parts_of_loss(self) -> Iterator["_Untracked"]:
        """Within it `compute_loss` leaves the losses by task, and the rest of its sum.

        Not for direct use.
        """
        # Replicas are threads, which wait for each other within a step.
        parts, thread = _Untracked(None), threading.get_ident()
        object.__setattr__(self, "_parts", {**self._parts, thread: parts})
        try:
            yield parts
        finally:
            others = {key: v for key, v in self._parts.items() if key != thread}
            object.__setattr__(self, "_parts", others)

    def _balanced(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By task the weight that a balancing by losses alone gives to a loss."""
        if not self._balancing:
            return {}
        (state,) = self._balancing
        if state.balancing.looks_at_gradients:
            if threading.get_ident() not in self._parts:
                raise ValueError(
                    f"{name_of(self)}: {state.balancing!r} balances gradients, which "
                    "`fit`, `train_on_batch` and `train_step` do. Received: a call of "
                    "`compute_loss` in training by itself."
                )
            return {}
        weights = state.weigh(*vector(state.names, losses)).weights
        parts = keras.ops.unstack(weights, len(state.names))
        return {
            task: keras.ops.cast(weight, losses[task].dtype)
            for task, weight in zip(state.names, parts)
            if task in losses
        }

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Mapping[str, Tensor], sample_weight: Any = None
    ) -> dict[str, Tensor]:
        """As in Keras; tasks without metrics need no labels.

        Raises:
            ValueError: on a task that has metrics and no labels; on class labels for a
                metric that needs a label for each output.
        """
        if self._tasks_with_metrics:
            y, sample_weight, present = _parted(y, sample_weight)
            y = self._labels(y, sample_weight, self._tasks_with_metrics, "metrics")
            for task, metric, weighted in compiled_metrics(self, y, y_pred):
                if task not in y:
                    continue
                check_shapes(metric, task, y[task], y_pred[task], name_of(self))
                weight = sample_weight if weighted else None
                if isinstance(weight, Mapping):
                    weight = weight.get(task)
                before = [keras.ops.copy(v) for v in metric.variables if task in present]
                metric.update_state(y[task], y_pred[task], sample_weight=weight)
                # Whatever the metric makes of weights: of an absent task it learns nothing.
                for variable, value in zip(metric.variables, before):
                    variable.assign(keras.ops.where(present[task], variable, value))
        return self.get_metrics_result()

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """As in Keras, with validation data that may differ in length by task.

        Args:
            *args: as in Keras.
            **kwargs: as in Keras. Labels `y` may be a data frame with a column for each
                task. `validation_data` may be data of each task, as in
                `evaluate`. `class_weight` is a dict from task to a dict from class to
                weight, `{"gender": {0: 1.0, 1: 3.0}}`; tasks and classes that are not in
                it have weight 1, and it comes on top of `sample_weight`. Labels are classes
                or one-hot; missing ones stay missing. `sample_weight` may be a dict of some
                tasks' weights; those of the others are 1.

        Raises:
            ValueError: on training data of different lengths, or a dict of data sets:
                `zip_tasks` makes one stream of them; on labels of another length than the
                inputs.
        """
        given = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        self._take_frames_apart(given)
        if "shuffle" not in given and not _is_shuffled_by_keras(given.get("x")):
            # Keras warns that it does not.
            given["shuffle"] = False
        if given.get("class_weight") is not None:
            given = apart_for_validation(given)
            names = ("x", "y", "sample_weight", "class_weight")
            weighted = with_class_weight(self, *(given.get(name) for name in names))
            return self.fit(**{**given, **dict(zip(names, (*weighted, None)))})
        x, y = given.get("x"), given.get("y")
        if given.get("sample_weight") is not None:
            given["sample_weight"] = for_all_tasks(y, given["sample_weight"])
        if isinstance(x, Mapping) and are_data_sets(self, x, y):
            kinds = {task: type(own).__name__ for task, own in x.items()}
            raise ValueError(
                f"{name_of(self)}: expected one stream of all tasks for `fit`, such as "
                "`zip_tasks(data, batch_size)` makes of a data set for each. "
                f"Received: a dict of data sets, {kinds}."
            )
        sizes = different_lengths(self, x)
        if sizes:
            raise ValueError(
                f"{name_of(self)}: expected inputs of one length for `fit`; `zip_tasks` "
                f"makes one stream of several data sets. Received: lengths {sizes}."
            )
        check_labels(self, x, y, given.get("sample_weight"))
        self._check_tasks("sample_weight", given.get("sample_weight"))
        self._check_marks(x)
        self._build_losses(x, y)
        self._build_optimizer()
        data = given.get("validation_data")
        if isinstance(data, tuple) and len(data) in (2, 3):
            data = (data[0], *(self._without_frames("y", own) for own in data[1:]))
            if len(data) == 3:
                data = (*data[:2], for_all_tasks(*data[1:]))
            given["validation_data"] = data
        x, *others = data if isinstance(data, tuple) else (data,)
        pieces = None if data is None else one_set_each(self, x, *others)
        if pieces is None:
            check_labels(self, x, *others)
            with self._through_data_set():
                return super().fit(**given)
        if given.get("validation_steps") is not None:
            raise ValueError(
                f"{name_of(self)}: with a validation set for each task expected "
                f"validation_steps=None. Received: {given['validation_steps']}."
            )
        size = given.get("validation_batch_size") or given.get("batch_size")
        validation = TaskValidation(
            lambda: self._evaluate_pieces(pieces, batch_size=size, verbose=0),
            given.pop("validation_freq", 1),
        )
        given["callbacks"] = [validation, *tree.flatten(given.get("callbacks") or [])]
        del given["validation_data"]
        with self._through_data_set():
            return super().fit(**given)

    def _without_frames(self, argument: str, value: Any) -> Any:
        """Labels or weights without data frames: of a column for each task, by task."""
        if is_frame(value):
            unknown = [c for c in value.columns if c not in self.task_names]
            if unknown:
                what = f"a data frame with a column for each of {list(self.task_names)}"
                columns = list(value.columns)
                raise refusal(f"{argument}.columns", columns, name_of(self), what)
            value = {task: value[task] for task in value.columns}
        return as_numpy(value)

    def _take_frames_apart(self, given: dict[str, Any]) -> None:
        """Labels and weights among arguments without data frames, in place."""
        for name in ("y", "sample_weight"):
            if given.get(name) is not None:
                given[name] = self._without_frames(name, given[name])

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; labels may be a data frame, as in `fit`."""
        method = super().train_on_batch
        return method(**self._of_batch(method, args, kwargs))

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; labels may be a data frame, as in `fit`."""
        method = super().test_on_batch
        return method(**self._of_batch(method, args, kwargs))

    def _of_batch(
        self, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments for one batch, with weights of all tasks or of none."""
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        self._take_frames_apart(given)
        if given.get("sample_weight") is not None:
            given["sample_weight"] = for_all_tasks(given.get("y"), given["sample_weight"])
        return given

    @contextlib.contextmanager
    def _through_data_set(self) -> Iterator[None]:
        """A context in which labels are those of a whole data set."""
        before, self._of_data_set = self._of_data_set, True
        try:
            yield
        finally:
            self._of_data_set = before

    def _check_marks(self, x: Any) -> None:
        """Refuse a stream of `zip_tasks` whose marks the losses take for labels."""
        mark = getattr(x, MARK, None)
        if mark is None:
            return
        for task, own in self._losses_given:
            for loss in tree.flatten(own):
                masked = isinstance(loss, Masked)
                if masked and (math.isnan(mark) or loss.missing == mark):
                    continue
                received = f"missing={loss.missing:g}" if masked else shown(loss)
                raise ValueError(
                    f"{name_of(self)}: in this stream labels that are missing are marked. "
                    f"Expected MaskedLoss(..., missing={mark:g}) for task {task!r}. "
                    f"Received: {received}."
                )

    def _build_losses(self, x: Any, y: Any) -> None:
        """Make what losses and metrics need, where the labels' shapes are known.

        Else Keras makes it while it traces the first step on TensorFlow, which is then
        traced once more.
        """
        spec = getattr(x, "element_spec", None)
        if y is None and isinstance(spec, tuple) and len(spec) > 1:
            y = spec[1]
        expected = self._tasks_with_loss | self._tasks_with_metrics
        if isinstance(y, Mapping) and expected <= set(y) <= set(self.task_names):
            shapes = [getattr(y[task], "shape", None) for task in expected]
            if all(s is not None and getattr(s, "rank", 1) is not None for s in shapes):
                build_losses(self, y)

    def _build_optimizer(self) -> None:
        """Make the optimizer's variables, for the same reason."""
        optimizer, strategy = self.optimizer, getattr(self, "_distribute_strategy", None)
        if optimizer is not None and not optimizer.built and strategy is None:
            optimizer.build(self.trainable_variables)

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in Keras, with data that may differ by task.

        Every task is measured on its own examples, each exactly once; the loss is the sum
        of the tasks' losses with their weights, of the penalties and of the terms.

        Args:
            x: as in Keras; or a dict by task of inputs, of as many examples as the task
                has: for a network with an input for each task, or for one with a common
                input. Or a dict by task of data sets, as `zip_tasks` takes them:
                `(x, y)`, `(x, y, sample_weight)`, or a `tf.data.Dataset`.
            y: as in Keras, a dict of labels by task.
            batch_size: as in Keras, as are `verbose`, `callbacks` and `return_dict`.
            verbose: with data that differ, there is a progress bar for each part of them.
            sample_weight: as in Keras; or a dict by task, of some tasks too: the weights
                of the others are 1.
            steps: as in Keras; None with data that differ.
            callbacks: a list, or None.
            return_dict: bool.
            **kwargs: what Keras itself gives.

        Raises:
            ValueError: on data of a task with different lengths, on labels of another
                length than common inputs, on tasks without data; on
                inputs by task of different lengths for a network whose tasks see each
                other's features.
        """
        if y is not None:
            y = self._without_frames("y", y)
        if sample_weight is not None:
            sample_weight = self._without_frames("sample_weight", sample_weight)
        pieces = None if kwargs else one_set_each(self, x, y, sample_weight)
        if pieces is None:
            check_labels(self, x, y, sample_weight)
            self._check_tasks("sample_weight", sample_weight)
            sample_weight = for_all_tasks(y, sample_weight)
            self._build_losses(x, y)
            with self._through_data_set(), self.through_evaluation():
                return super().evaluate(
                    x=x,
                    y=y,
                    batch_size=batch_size,
                    verbose=verbose,
                    sample_weight=sample_weight,
                    steps=steps,
                    callbacks=callbacks,
                    return_dict=return_dict,
                    **kwargs,
                )
        if steps is not None:
            raise ValueError(
                f"{name_of(self)}: with data for each task expected steps=None. "
                f"Received: steps={steps}."
            )
        with self.through_evaluation():
            logs = self._evaluate_pieces(
                pieces, batch_size=batch_size, verbose=verbose, callbacks=callbacks
            )
        return logs if return_dict else logs_as_list(self, logs)

    @contextlib.contextmanager
    def through_evaluation(self) -> Iterator[None]:
        """A context in which no epoch of training begins (not for direct use)."""
        before, self._evaluating = self._evaluating, True
        try:
            yield
        finally:
            self._evaluating = before

    def _evaluate_pieces(self, pieces: list[Piece], **kwargs: Any) -> dict[str, Any]:
        """What `evaluate` returns as a dict, of one data set for each task."""
        labels: dict[str, Any] = {}
        for piece in pieces:
            labels = {**_parted(piece.y or {}, None)[0], **labels}
        expected = self._tasks_with_loss | self._tasks_with_metrics
        with self._through_data_set():
            self._labels(labels, None, expected, "a loss or metrics")
        build_losses(self, labels)
        # One loss is logged as the total alone: of the pieces that have it, the first.
        pieces = sorted(pieces, key=lambda p: not self._tasks_with_loss & set(p.sizes))
        total, rest = None, 0.0
        try:
            for piece in pieces:
                logs = super().evaluate(
                    x=piece.x,
                    y=piece.y,
                    sample_weight=piece.sample_weight,
                    return_dict=True,
                    **kwargs,
                )
                losses = sum_of_losses(self)
                if not self._going_on and losses is not None:
                    # Penalties and terms.
                    rest = logs["loss"] - losses
                if losses is not None:
                    total = losses + rest
                elif total is None or self._tasks_with_loss & set(piece.sizes):
                    total = logs["loss"]
                self._going_on = True
        finally:
            self._going_on = False
        return {**logs, "loss": total}

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Keras, with inputs that may differ in length by task.

        Args:
            x: as in Keras; or a dict by task, as in `evaluate`, where data sets may be of
                inputs without labels.
            *args: as in Keras.
            **kwargs: as in Keras.

        Returns:
            A dict of arrays by task, each as long as the task's own inputs.
        """
        pieces = one_set_each(self, x, labelled=False)
        if pieces is None:
            return super().predict(x, *args, **kwargs)
        found: dict[str, Any] = {}
        for piece in pieces:
            outputs = super().predict(piece.x, *args, **kwargs)
            for task, size in piece.sizes.items():
                found[task] = outputs[task][:size]
        return {task: found[task] for task in self.task_names if task in found}

    def reset_metrics(self) -> None:
        """As in Keras; not within an evaluation of one data set for each task."""
        if not self._going_on:
            super().reset_metrics()
        if not self._evaluating:
            for state in self._balancing:
                state.next_epoch()

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
        y, sample_weight, _ = _parted(y, sample_weight)
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


def _is_shuffled_by_keras(x: Any) -> bool:
    """Whether `fit` can shuffle these data: arrays, or batches of a known number."""
    if isinstance(x, TaskBatches):
        # It is shuffled, and its tasks may have their turns.
        return False
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches is not None
    return isinstance(x, (Mapping, list, tuple)) or hasattr(x, "shape")


def _parted(y: Any, sample_weight: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """Labels, weights, and by task whether the batch has examples of it.

    The latter are boolean scalars, for the pieces of an evaluation; else an empty dict.
    """
    if not isinstance(y, Mapping) or PRESENT not in y:
        return y, sample_weight, {}
    # A replica may have no example.
    present = {task: keras.ops.any(own > 0) for task, own in y[PRESENT].items()}
    y, sample_weight = (
        None if given is None else {n: own for n, own in given.items() if n != PRESENT}
        for given in (y, sample_weight)
    )
    return y, sample_weight, present


class _Untracked:
    """What is not to be tracked by Keras, such as a model with the layers of another."""

    def __init__(self, value: Any) -> None:
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
