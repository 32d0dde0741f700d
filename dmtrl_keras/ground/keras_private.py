"""Everything of Keras that the library uses and that is not public, in one place.

Where Keras renames something, this file changes and no other. Versions from 3.13 on.
"""

import collections
import contextlib
import functools
import inspect
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import keras
from keras import tree
from keras.src.backend.common import global_state
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr
from keras.src.quantizers.utils import should_quantize_layer
from keras.src.utils.naming import to_snake_case

_Init = TypeVar("_Init", bound=Callable[..., None])

# --- functional models ------------------------------------------------------------


def as_functional(model: Any) -> keras.Model | None:
    """The functional model behind a functional or built Sequential model, or None."""
    if isinstance(model, keras.Sequential):
        # A Sequential model that knows its input shape runs as a functional one.
        return getattr(model, "_functional", None)
    return model if hasattr(model, "_run_through_graph") else None


def run_through_graph(model: keras.Model, inputs: Any, call: Callable[..., Any]) -> Any:
    """The outputs of a functional model whose every operation is called by a function.

    Args:
        model: a functional model.
        inputs: one value for each input tensor, in the structure of `model.input`.
        call: function `(operation, *args, **kwargs)`.
    """
    run = model._run_through_graph
    arguments: dict[str, Any] = {"call_fn": call}
    # That of Keras, of which ours takes whatever it does.
    *_, original = (
        vars(kind)["_run_through_graph"]
        for kind in type(model).__mro__
        if "_run_through_graph" in vars(kind)
    )
    if "operation_fn" in inspect.signature(original).parameters:
        # Keras before 3.15 has no default for it.
        arguments["operation_fn"] = lambda operation: operation
    return run(inputs, **arguments)


def functional_constructor(init: _Init) -> _Init:
    """The constructor of a functional model's subclass, as Keras wants it.

    Keras 3.13 saves a subclass as a functional model only if its constructor takes
    `*args, **kwargs`, seen without what `functools.wraps` says.
    """

    @functools.wraps(init)
    def constructor(*args: Any, **kwargs: Any) -> None:
        init(*args, **kwargs)

    return cast(_Init, constructor)


def producer_of(tensor: keras.KerasTensor) -> tuple[keras.Operation, list[Any]]:
    """The operation that made a symbolic tensor, and the tensors that it took."""
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def is_named_by_keras(layer: keras.layers.Layer) -> bool:
    """Whether a layer's name is one that Keras gives where the user gives none."""
    own = re.escape(to_snake_case(type(layer).__name__))
    return re.fullmatch(rf"{own}(_\d+)?", layer.name) is not None


def is_called_once(layer: keras.layers.Layer) -> bool:
    """Whether a layer has one call in all models."""
    return len(layer._inbound_nodes) == 1


def rename(layer: keras.layers.Layer, name: str) -> None:
    """Another name for a built layer, in the paths of its variables too."""
    for variable in layer.weights:
        first, *rest = variable._path.split("/")
        if first == layer.name:
            variable._path = "/".join([name, *rest])
    layer.name = name


def flatten_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers in a layer, however deep, without itself."""
    return list(layer._flatten_layers(include_self=False))


def seed_generators(layer: keras.layers.Layer) -> list[keras.random.SeedGenerator]:
    """What a layer, and those within it, draw random numbers with."""
    layers = layer._flatten_layers(include_self=True)
    return [one for own in layers for one in own._seed_generators]


def track_layers(model: keras.Model, layers: Sequence[keras.layers.Layer]) -> None:
    """Make layers part of a functional model that are not in its graph.

    Keras before 3.15 forgets layers that a functional model gets as attributes.
    """
    for layer in layers:
        if not any(known is layer for known in model._layers):
            model._layers.append(layer)


def is_keras_operation(operation: Any) -> bool:
    """Whether an operation is one of `keras.ops`."""
    return type(operation).__module__.startswith("keras.src.ops")


def convnext_layers() -> tuple[type, type]:
    """`(LayerScale, StochasticDepth)` of Keras's ConvNeXt, not public by themselves."""
    from keras.src.applications import convnext

    return convnext.LayerScale, convnext.StochasticDepth


def inception_resnet_layer() -> type:
    """`CustomScaleLayer` of Keras's InceptionResNetV2, not public by itself."""
    from keras.src.applications import inception_resnet_v2

    return inception_resnet_v2.CustomScaleLayer


def is_plain(layer: keras.layers.Layer) -> bool:
    """Whether a layer of Keras computes what its own kernels say, and nothing else.

    Not so with penalties on what it or its parts return, with LoRA, or quantized.
    """
    return not any(
        part.activity_regularizer is not None
        or getattr(part, "lora_enabled", False)
        or getattr(part, "quantization_mode", None) is not None
        for part in (layer, *flatten_layers(layer))
    )


@contextlib.contextmanager
def rebuilding(
    layer: keras.layers.Layer, variables: Sequence[keras.Variable]
) -> Iterator[None]:
    """Within this scope a built layer may make its weights anew.

    Args:
        layer: the layer, whose `build` is to be called within.
        variables: what it no longer has.
    """
    for variable in variables:
        layer._untrack_variable(variable)
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def is_to_be_quantized(layer: keras.layers.Layer, filters: Any) -> bool:
    """Whether the `filters` of `keras.Model.quantize` let a layer through."""
    return bool(should_quantize_layer(layer, filters))


# Where Keras's attention layers have their products with kernels.
ATTENTION_PROJECTIONS = tuple(
    f"_{name}_dense" for name in ("query", "key", "value", "gate", "output")
)


def share_dropout(one: keras.layers.Layer, other: keras.layers.Layer) -> None:
    """Let an attention layer draw random numbers with what another one has."""
    name = "_dropout_layer"
    if hasattr(one, name):
        # Keras refuses new parts of what is built.
        object.__setattr__(other, name, getattr(one, name))


# --- what rides on tensors --------------------------------------------------------

# By this name Keras's masks ride on tensors: false where a time step is padding.
MASK = "_keras_mask"


def attach(tensor: Any, name: str, value: Any) -> None:
    """Let a value ride on a tensor, as Keras's masks do, on every backend."""
    set_tensor_attr(tensor, name, value)


def attached(tensor: Any, name: str) -> Any:
    """What rides on a tensor by that name, or None."""
    return get_tensor_attr(tensor, name)


def logits_of(tensor: Any) -> Any:
    """What the softmax or sigmoid that made a tensor was given, where it is known."""
    return getattr(tensor, "_keras_logits", None)


# --- training ---------------------------------------------------------------------


def initial_epoch(model: keras.Model) -> int:
    """The epoch at which `BackupAndRestore` lets a training go on, 0 without one."""
    return model._initial_epoch or 0


def symbolic_build(model: keras.Model, batch: Any) -> None:
    """Make the variables of a compiled model's losses and metrics from a batch's shapes."""
    model._maybe_symbolic_build(data_batch=batch)


# By this name the outputs of a functional model's clone know what they are a clone of.
_CLONED = "_dmtrl_keras_cloned"


class ModelOfReplicas(keras.Model):
    """A functional model whose first batch need not divide among the replicas.

    Keras 3.15 takes the mean of the replicas' batches to know their shapes, which fails
    where they differ, and where other machines have some of them.

    Its clones know it, see `cloned_model`.

    Attributes:
        called_otherwise: dict from the id of an operation to a function of the operation
            and of how Keras would call it, which returns how to call it.
    """

    called_otherwise: Mapping[int, Callable[..., Any]] = {}

    def _run_through_graph(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("operation_fn")
        if given is not None and self.called_otherwise:
            kwargs["operation_fn"] = lambda operation: self.called_otherwise.get(
                id(operation), lambda _, call: call
            )(operation, given(operation))
        # That of `Functional`, which Keras puts among the bases.
        outputs = super()._run_through_graph(*args, **kwargs)
        for output in tree.flatten(outputs):
            # Those of a clone come from its layers; a mere specification from nowhere.
            if isinstance(output, keras.KerasTensor) and hasattr(output, "_keras_history"):
                attach(output, _CLONED, weakref.ref(self))
        return outputs

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None and self._distribute_strategy is not None:
            for _, _, batches in iterator:
                data_batch = local_part(next(batches), self.distribute_strategy)
                break
            iterator = None
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)


def cloned_model(outputs: Any) -> Any:
    """The model of which outputs are a clone's that is just being made, or None.

    `keras.models.clone_model` makes the clone of a functional model from nothing but its
    new inputs and outputs, so that whatever else it needs must come from the original.

    Args:
        outputs: what the constructor of a `ModelOfReplicas` got.
    """
    found = None
    for output in tree.flatten(outputs):
        symbolic = isinstance(output, keras.KerasTensor)
        reference = attached(output, _CLONED) if symbolic else None
        if reference is not None:
            found = reference()
            # Other models of these outputs are no clones.
            attach(output, _CLONED, None)
    return found


def local_part(values: Any, strategy: Any) -> Any:
    """Of values that a strategy may have distributed, those of the first replica here."""
    return tree.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], values
    )


def has_losses(model: keras.Model) -> bool:
    """Whether a model was compiled with losses."""
    return model._compile_loss is not None


def function_of(wrapper: Any) -> Callable[..., Any] | None:
    """The function that a Keras loss or metric wraps, or None."""
    return getattr(wrapper, "fn", None) or getattr(wrapper, "_fn", None)


def values_of(metric: keras.metrics.Metric, y_true: Any, y_pred: Any) -> Any:
    """The values of which a metric of a function takes the mean; None of other metrics."""
    wrapper = keras.metrics.MeanMetricWrapper
    if not isinstance(metric, wrapper):
        return None
    if type(metric).update_state is not wrapper.update_state:
        # What a subclass does with them is its own.
        return None
    return metric._fn(y_true, y_pred, **metric._fn_kwargs)


def unscaled_loss(value: Any) -> Any:
    """A loss without the factor that Keras gives it for several replicas."""
    from keras.src.losses import loss as loss_module

    return loss_module.unscale_loss_for_distribution(value)


def set_loss_tracker(model: keras.Model, tracker: keras.metrics.Mean) -> None:
    """Give a compiled model another metric for its total loss."""
    from keras.src.utils.tracking import DotNotTrackScope

    # Keras names it among the metrics by itself.
    with DotNotTrackScope():
        model._loss_tracker = tracker


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """The metric of a compiled model's total loss."""
    return model._loss_tracker


def losses_by_output(
    model: keras.Model,
    y: Mapping[str, Any],
    y_pred: Mapping[str, Any],
    sample_weight: Any,
    present: Mapping[str, Any],
    idle: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, Any, Any]]]:
    """The loss of each output, and its weight, before they are added.

    What Keras's own sum of the compiled losses does, step by step: the logs get the
    unweighted values. A loss that `counts_labels` is logged as the
    mean over all labels of an epoch, not over its batches.

    Args:
        model: a compiled model with a dict of outputs.
        y: dict of labels; outputs without have no loss.
        y_pred: dict of predictions.
        sample_weight: None, a tensor, or a dict of them.
        present: dict of boolean scalars; an output for which it is false has the loss 0,
            of no example. Outputs that it lacks have examples.
        idle: outputs whose losses are no part of the sum, and not among what is returned.

    Returns:
        `(losses, weights, counted)`: dicts by output, of scalars, and of numbers; an
        output with several losses has their weighted sum, with weight 1. And of each loss
        that counts its labels the output's name, the weighted value and the count.
    """
    compiled = model._compile_loss
    if not compiled.built:
        labels = {name: y.get(name) for name in y_pred}
        compiled.build(labels, y_pred)
    # With one loss Keras logs the total alone.
    metrics = compiled.metrics or [None] * len(compiled._flat_losses)
    values: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    counted = []
    several = collections.Counter(entry[0][0] for entry in compiled._flat_losses)
    for (path, loss, weight, _), metric in zip(compiled._flat_losses, metrics):
        name = path[0]
        counts = getattr(loss, "counts_labels", False)
        if name not in y:
            if counts:
                counted.append((name, keras.ops.zeros(()), keras.ops.zeros(())))
            continue
        own = sample_weight
        if isinstance(sample_weight, Mapping):
            own = sample_weight.get(name)
        if counts:
            value, size = loss.value_and_count(y[name], y_pred[name], own)
        else:
            value = loss(y[name], y_pred[name], own)
            # Not the static size: unknown in a graph of TensorFlow, where a last batch
            # of one example would count as much as a full one.
            size = keras.ops.shape(y_pred[name])[0]
        value = keras.ops.cast(value, compiled.dtype)
        if name in present:
            value = keras.ops.where(present[name], value, keras.ops.zeros_like(value))
            size = keras.ops.where(present[name], size, keras.ops.zeros_like(size))
        if metric is not None:
            metric.update_state(unscaled_loss(value), sample_weight=size)
        if name in idle:
            if counts:
                counted.append((name, keras.ops.zeros(()), keras.ops.zeros(())))
            continue
        weight = 1.0 if weight is None else weight
        if not isinstance(weight, float):
            weight = keras.ops.cast(weight.variable, compiled.dtype)
        if counts:
            counted.append((name, value * weight, size))
        if several[name] > 1:
            value, weight = value * weight, 1.0
        values[name] = values[name] + value if name in values else value
        weights[name] = weight
    return values, weights, counted


def compiled_metrics(
    model: keras.Model, y: Mapping[str, Any], y_pred: Mapping[str, Any]
) -> Iterator[tuple[str, keras.metrics.Metric, bool]]:
    """The compiled metrics, made now if they aren't yet.

    Args:
        model: a compiled model with a dict of outputs.
        y: dict of labels, of every output with metrics at least.
        y_pred: dict of predictions.

    Yields:
        The output, the metric, and whether sample weights count in it.
    """
    compiled = model._compile_metrics
    if compiled is None:
        return
    if not compiled.built:
        compiled.build({name: y.get(name) for name in y_pred}, y_pred)
    names = compiled._resolved_output_names or list(y_pred)
    kinds = (compiled._flat_metrics, compiled._flat_weighted_metrics)
    for weighted, by_output in enumerate(kinds):
        for name, metrics in zip(names, by_output):
            for metric in metrics.metrics if metrics else ():
                yield name, metric, bool(weighted)


def build_losses(model: keras.Model, y: Mapping[str, Any]) -> None:
    """Make the losses and metrics of a compiled functional model from labels by task."""
    labels = {name: y.get(name) for name in model.output}
    compiled = model._compile_loss
    strategy = getattr(model, "_distribute_strategy", None)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        if compiled is not None and not compiled.built:
            compiled.build(labels, model.output)
        list(compiled_metrics(model, y, model.output))


def sum_of_losses(model: keras.Model) -> float | None:
    """The weighted sum of the losses that are logged by output; None with one loss."""
    compiled = model._compile_loss
    if compiled is None or not compiled.metrics:
        return None
    total = 0.0
    for (_, _, weight, _), metric in zip(compiled._flat_losses, compiled.metrics):
        weight = getattr(weight, "variable", 1.0 if weight is None else weight)
        total += float(metric.result()) * float(keras.ops.convert_to_numpy(weight))
    return total


def logs_as_list(model: keras.Model, logs: Mapping[str, Any]) -> Any:
    """Logs in the order of the metrics, as `evaluate` returns them."""
    return model._flatten_metrics_in_order(logs)


def aggregated_loss(model: keras.Model, loss: Any) -> Any:
    """A penalty as Keras adds it to the losses: of one replica where there are several."""
    return model._aggregate_additional_loss(loss)


# --- optimizers -------------------------------------------------------------------


def update_loss_tracker(model: keras.Model, loss: Any, size: Any) -> None:
    """Log the total loss of a step, as Keras does."""
    model._loss_tracker.update_state(unscaled_loss(loss), sample_weight=size)


def step_methods(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[tuple[str, Callable[[Any], Sequence[Any]]]]:
    """The methods through which all of an optimizer's ways to take a step go.

    Returns:
        Pairs of a method's name and a function from its second argument to the variables.
    """
    yield "update_step", lambda variable: [variable]
    if hasattr(optimizer, "_parallel_update_step"):
        yield "_parallel_update_step", lambda variables: variables


def averages_of(optimizer: keras.optimizers.Optimizer) -> dict[int, Any]:
    """By the ids of variables their moving averages, where an optimizer has such."""
    if not (getattr(optimizer, "use_ema", False) and optimizer.built):
        return {}
    averages = optimizer._model_variables_moving_average
    return {id(v): a for v, a in zip(optimizer._trainable_variables, averages)}


def own_variables(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that an optimizer itself tracks."""
    return optimizer._variables


def variable_index(optimizer: keras.optimizers.Optimizer, variable: Any) -> int:
    """The number of a variable among those of an optimizer."""
    return optimizer._get_variable_index(variable)


# --- serialization ----------------------------------------------------------------


@contextlib.contextmanager
def sharing_scope() -> Iterator[None]:
    """A context in which objects with one key are deserialized to one object.

    `keras.saving.load_model` opens one itself. Keras's own keys don't reach
    objects that are nested in configurations, so that `shared_object` has others.
    """
    from keras.src.saving import serialization_lib

    if in_sharing_scope():
        yield
        return
    with serialization_lib.ObjectSharingScope():
        yield


def in_sharing_scope() -> bool:
    """Whether objects are being made from files or configurations."""
    return global_state.get_global_attribute("shared_objects/id_to_obj_map") is not None


def saving_as_h5() -> bool:
    """Whether a configuration is for a whole model in a legacy HDF5 file."""
    return bool(global_state.get_global_attribute("use_legacy_config", False))


def shared_object(key: str, make: Callable[[], Any]) -> Any:
    """The object with a key in the current sharing scope, made if there is none.

    Args:
        key: str.
        make: function without arguments that returns the object.
    """
    from keras.src.saving import serialization_lib

    found = serialization_lib.get_shared_object(key)
    if found is None:
        found = make()
        serialization_lib.record_object_after_deserialization(found, key)
    return found


# --- PyTorch ----------------------------------------------------------------------


def torch_scope() -> contextlib.AbstractContextManager[Any]:
    """A context in which values are held, where Keras traces on the "meta" device."""
    from keras.src.backend.torch.core import device_scope, get_device

    device = get_device()
    return device_scope("cpu" if device == "meta" else device)
