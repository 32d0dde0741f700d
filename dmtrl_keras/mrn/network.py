"""Deep Relationship Networks: a shared trunk, and layers of each task with a prior."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from dmtrl_keras.conversion import multitask
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.types import Tasks
from dmtrl_keras.ground.validation import (
    check_bool,
    check_name,
    check_number,
    check_positive,
    check_sizes,
    check_task_names,
    from_keras,
    is_list,
    refusal,
    shown,
    task_names,
)
from dmtrl_keras.mrn.covariance import Epsilon
from dmtrl_keras.mrn.regularizer import Mean, TensorNormalRegularizer
from dmtrl_keras.tasks.dense import TaskDense
from dmtrl_keras.tasks.forms import Features
from dmtrl_keras.tasks.graph import checked_functional
from dmtrl_keras.tasks.layout import TaskBatch, TaskSplit, TaskStack
from dmtrl_keras.training.model import MultiTaskModel

LAYERS = ("trunk", "bottleneck", "classifier")
NEW_LAYERS = LAYERS[1:]
# Tens of thousands of columns say how a few tasks are related; what some dozens say about
# hundreds of features is mostly noise, and hides how the tasks are related.
PRIORS: dict[str, dict[str, Epsilon]] = {
    "drn": {"task": 1e-2},
    "mrn": {"feature": "auto", "class": "auto", "task": 1e-2},
}


def relationship_network(
    backbone: keras.Model | Sequence[int],
    tasks: Tasks,
    classes: int | Mapping[str, int | Sequence[str]],
    bottleneck: int | str | None = 256,
    prior: Literal["drn", "mrn"] | TensorNormalRegularizer | None = "drn",
    layers: Sequence[str] = ("bottleneck", "classifier"),
    binary: bool = False,
    strength: float = 0.3,
    shared_input: bool = False,
    dropout: float = 0.0,
    common_draw: bool | Mapping[str, bool] = True,
    name: str | None = None,
    kernel_initializer: Any = None,
    activation: Any = None,
    trunk_sharing: Any = "independent",
) -> MultiTaskModel:
    """A network of T tasks whose relations are learned (DRN, MRN).

    A trunk gives features, a bottleneck (the paper's fc7') and a classifier (fc8) follow.
    `layers` says which of them each task has for itself; the rest is shared. The
    kernels of the tasks' own bottlenecks and classifiers have the prior. The paper's
    networks and baselines are one argument apart:

    | network | arguments |
    | --- | --- |
    | DRN | the defaults |
    | MRN | `prior="mrn"` |
    | DRN_8 | `layers=("classifier",)` |
    | DRN_bi | `binary=True` |
    | MTCNN, all shared but the classifier | `layers=("classifier",), prior=None` |
    | STL | `layers=("trunk", "bottleneck", "classifier"), prior=None` |
    | MRN's Figure 1, the pretrained last layer is the tasks' own | `bottleneck="fc7"` |
    | regressions | `classes=1, activation="linear"` |

    Where the trunk is frozen, or there is none, it makes no difference whether it is
    shared, and STL is `prior=None`.

    Args:
        backbone: a Keras model that gives a vector of features, such as
            `keras.applications.ResNet50(include_top=False, pooling="avg")`; it is part of
            the network and is trained with it unless its `trainable` is False. Or the
            input shape without the batch, such as `(1280,)`, for features at hand.
        tasks: list of T names, or int T.
        classes: positive int, the classes that every task has, or the units of its output;
            1 is not for softmax. Or a dict from task to such an int or to a list of the
            classes' names. Tasks with equal entries have the same classes: their
            classifiers are one layer with a prior, `classifier_1`, `classifier_2`, ...
            in the order of the tasks; with the others they have features in common,
            not classes: with `prior="mrn"` (or the mode `"feature"`) all classifiers
            share one covariance of features, which many tasks can learn though each has
            few classes.
        bottleneck: positive int, units of a new bottleneck (ReLU); None: no such layer. Or
            the name of the backbone's last layer, a `Dense`: instead of a new layer it
            becomes the tasks' own, each a copy with its weights and activation.
        prior: `"drn"`: the task mode learns its covariance (DRN Eq. 8); `"mrn"`: those of
            features and classes too; a `TensorNormalRegularizer`; or None. By name
            `epsilon` is 0.01 for tasks, and `"auto"` for features and classes (as much
            identity as columns are lacking, see `ModeCovariance`), and the mean is the
            start, so that the covariances see what was learned. A regularizer of
            your own should have `mean="start"` too where there are bottlenecks.
        layers: which layers are the tasks' own: `()`, or the last one, two or three of
            `"trunk"`, `"bottleneck"`, `"classifier"`. The prior is not for the trunk.
        binary: bool. False: softmax over the classes. True: one-versus-rest, a sigmoid for
            each class, and its classifiers' relations learned class by class.
        strength: float, of the prior, where that is given by name.
        shared_input: bool; one input for all tasks, or a dict of one input per task.
        dropout: float, rate before the classifier.
        common_draw: bool, or a dict of them by layer, `"bottleneck"` and `"classifier"`;
            whether the tasks' own layers start from the same draw. Bottlenecks of different
            draws have different units, whose classifiers can't be compared.
        name: str, the name of the model.
        kernel_initializer: a Keras initializer or its name, for both new layers, or a dict
            by layer. None, also in the dict: zeros for classifiers with a prior, Glorot
            uniform for all else. A bottleneck of the backbone needs none.
        activation: a Keras activation or its name, of the outputs, or a dict of them by
            task; `"linear"` for regression. None, also in the dict: softmax, or
            sigmoid if `binary`.
        trunk_sharing: where each task has a trunk of its own, how their kernels are
            related, as `sharing` of `multitask`: `parameterizations.LoRA(4)`, a frozen
            trunk and a difference of low rank for each; `"tt"`; a dict by layer.

    Returns:
        A `MultiTaskModel`, not compiled: from images or features to probabilities, or what
        else the activation gives, `(batch, classes)` by task name. New layers are named
        `bottleneck` and `classifier`, for `optimizers.LearningRateMultiplier`.

    Raises:
        ValueError: on malformed arguments, on a backbone that gives no vector.

    Example:

    >>> import keras
    >>> from dmtrl_keras import relationship_network
    >>> trunk = keras.applications.MobileNetV2(
    ...     input_shape=(32, 32, 3), include_top=False, weights=None, pooling="avg"
    ... )
    >>> model = relationship_network(trunk, ["amazon", "webcam"], classes=10, prior="mrn")
    >>> {task: tuple(output.shape) for task, output in model.output.items()}
    {'amazon': (None, 10), 'webcam': (None, 10)}
    """
    owner = "relationship_network"
    names = list(task_names(tasks, owner))
    check_task_names(names, owner)
    counts, groups = _classes(classes, names)
    if bottleneck is not None and not isinstance(bottleneck, str):
        what = ", the name of a layer, or None"
        bottleneck = check_positive("bottleneck", bottleneck, owner, what)
    check_name("name", name, owner)
    check_number("dropout", dropout, owner, 1)
    check_number("strength", strength, owner)
    for argument, value in (("binary", binary), ("shared_input", shared_input)):
        check_bool(argument, value, owner)
    common = _by_layer("common_draw", common_draw, True)
    for value in common.values():
        check_bool("common_draw", value, owner, ", or a dict of them by layer")
    activations = _activations(activation, names, "sigmoid" if binary else "softmax")
    for task, count in counts.items():
        if count == 1 and activations[task] is keras.activations.softmax:
            raise ValueError(
                f"{owner}: `classes` must be 2 or more, since a softmax over one class is "
                "always 1; or give binary=True or another `activation`. "
                f"Received: classes={classes!r}, binary=False."
            )
    if not is_list(layers):
        raise refusal("layers", layers, owner, f"the last few of {LAYERS}")
    layers = tuple(layers)
    if layers != LAYERS[len(LAYERS) - len(layers) :]:
        raise ValueError(
            f"{owner}: `layers` must be the last few of {LAYERS}, since what comes after a "
            f"task's own layer is its own too. Received: layers={layers!r}."
        )
    if len(groups) > 1 and not layers:
        raise ValueError(
            f"{owner}: tasks with different classes need a classifier of their own. "
            f"Received: classes={classes!r}, layers=()."
        )
    initializers = _by_layer("kernel_initializer", kernel_initializer, None)
    if initializers["classifier"] is None and prior is not None and layers:
        # Zeros say nothing about the tasks, and need not be unlearned. Bottlenecks can't
        # start there, and their units must be the same ones for all tasks: a common draw.
        initializers["classifier"] = "zeros"
    initializers = {
        layer: _initializer("glorot_uniform" if given is None else given)
        for layer, given in initializers.items()
    }
    last = None
    if isinstance(bottleneck, str):
        backbone, last = _without_last(backbone, bottleneck, "bottleneck" in layers)
        bottleneck = None
    own = trunk_sharing if "trunk" in layers else None
    default = isinstance(trunk_sharing, str) and trunk_sharing == "independent"
    if own is None and not default:
        raise ValueError(
            f"{owner}: `trunk_sharing` is for trunks that are the tasks' own, expected "
            f"layers={LAYERS}. "
            f"Received: trunk_sharing={shown(trunk_sharing)}, layers={layers!r}."
        )
    inputs, features = _trunk(backbone, names, own, shared_input)
    common_prior = named_prior(prior, strength, "start", owner)
    apart = len(groups) > 1 and not binary
    priors = {
        "bottleneck": common_prior,
        "classifier": _of_common_features(common_prior) if apart else common_prior,
    }

    def through(
        features: Features,
        name: str,
        units: int,
        activation: Any = None,
        each: str | None = None,
        number: str = "",
        use_bias: bool = True,
    ) -> Features:
        """The features after a dense layer, the tasks' own or one that they share."""
        if name not in layers:
            dense = keras.layers.Dense(
                units, activation, kernel_initializer=initializers[name], name=name
            )
            return features.through(dense)
        return features.through_kernels(
            TaskDense(
                units,
                len(features.names),
                activation,
                use_bias=use_bias,
                shared_input=features.form == Form.SHARED,
                kernel_initializer=initializers[name],
                kernel_regularizer=priors[name]
                if each is None
                else _each(priors[name], each),
                common_draw=common[name],
                name=name + number,
            )
        )

    if bottleneck is not None:
        features = through(features, "bottleneck", bottleneck, "relu")
    elif last is not None:
        features = through(
            features, "bottleneck", last.units, last.activation, use_bias=last.use_bias
        )
    if dropout:
        features = features.through(keras.layers.Dropout(dropout))
    logits: dict[str, keras.KerasTensor] = {}
    for number, group in enumerate(groups, 1):
        suffix = f"_{number}" if len(groups) > 1 else ""
        each = "class" if binary else None
        own = _of_tasks(features, group)
        own = through(own, "classifier", counts[group[0]], None, each, suffix)
        logits |= _by_task(own, f"classes_by_task{suffix}")
    outputs = {
        # Probabilities in full precision, whatever the network computes in.
        task: keras.layers.Activation(
            activations[task], name=f"{task}_probabilities", dtype=keras.config.floatx()
        )(logits[task])
        for task in names
    }
    model = MultiTaskModel(inputs, outputs, name=name or owner)
    if last is not None:
        _take_over(model.get_layer("bottleneck"), last)
    return model


def _classes(given: Any, names: Sequence[str]) -> tuple[dict[str, int], list[list[str]]]:
    """The number of classes by task, and the tasks in groups of the same classes."""
    owner = "relationship_network"
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, check_positive("classes", given, owner)), [[*names]]
    if set(given) != set(names):
        raise refusal("classes", given, owner, f"an int, or a dict by task, of {names}")
    groups: dict[Any, list[str]] = {}
    counts = {}
    for task in names:
        entry: Any = given[task]
        if is_list(entry):
            check_task_names(entry, owner)
            entry = tuple(entry)
            counts[task] = len(entry)
        else:
            what = ", or a list of names, for each task"
            entry = counts[task] = check_positive("classes", entry, owner, what)
        groups.setdefault(entry, []).append(task)
    return counts, list(groups.values())


def _activations(given: Any, names: Sequence[str], default: str) -> dict[str, Any]:
    """The output's activation by task."""
    owner = "relationship_network"
    given = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    if not set(given) <= set(names):
        raise refusal("activation", given, owner, f"one, or a dict by task, of {names}")
    return {
        task: from_keras(
            owner,
            keras.activations.get,
            identifier=default if given.get(task) is None else given[task],
        )
        for task in names
    }


def _of_tasks(features: Features, group: list[str]) -> Features:
    """The features of some of the tasks."""
    if list(features.names) == group:
        return features
    if features.form == Form.SHARED:
        return Features(group, Form.SHARED, features.take(Form.SHARED), "trunk")
    own = _by_task(features, f"features_of_{group[0]}")
    tensors = {task: own[task] for task in group}
    return Features(group, Form.APART, tensors, f"features_of_{group[0]}_group")


def _without_last(backbone: Any, name: str, own: bool) -> tuple[Any, Any]:
    """A backbone without its last layer, and that layer, if it becomes the tasks' own."""
    owner = "relationship_network"
    if not isinstance(backbone, keras.Model):
        what = "a Keras model where `bottleneck` is the name of its last layer"
        raise refusal("backbone", backbone, owner, what)
    checked_functional(backbone, owner)
    last = backbone.layers[-1]
    if last.name != name or type(last) is not keras.layers.Dense:
        raise ValueError(
            f"{owner}: `bottleneck` must be the name of the backbone's last layer, a "
            f"Dense. Received: bottleneck={name!r}; the last layer is {last.name!r}, "
            f"a {type(last).__name__}."
        )
    if not own:
        return backbone, None
    return keras.Model(backbone.inputs, last.input, name=backbone.name), last


def _take_over(layer: TaskDense, last: keras.layers.Dense) -> None:
    """Give each task a copy of a layer's weights, of which its prior knows."""
    for name in ("kernel", "bias")[: 1 + last.use_bias]:
        value = ops.convert_to_numpy(getattr(last, name))
        getattr(layer, name).assign(np.repeat(value[..., None], layer.tasks, axis=-1))
    prior: Any = layer.prior
    if prior is not None and prior.regularizer.mean == "start":
        prior.restart()


def _by_layer(argument: str, given: Any, default: Any) -> dict[str, Any]:
    """What was given for each of the new layers; a dict may leave some out."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(NEW_LAYERS, given)
    if not set(given) <= set(NEW_LAYERS):
        what = f"one for all layers, or a dict by layer, of {NEW_LAYERS}"
        raise refusal(argument, given, "relationship_network", what)
    return {layer: given.get(layer, default) for layer in NEW_LAYERS}


def _initializer(given: Any) -> Any:
    """A Keras initializer."""
    return from_keras("relationship_network", keras.initializers.get, identifier=given)


def _by_task(features: Features, name: str) -> dict[str, keras.KerasTensor]:
    """A dict of each task's tensor."""
    names = list(features.names)
    if features.form == Form.SHARED:
        return dict.fromkeys(names, features.take(Form.SHARED))
    return TaskSplit(names, name=name)(features.take(Form.GROUPED))


def named_prior(
    prior: Any, strength: float, mean: Mean, owner: str
) -> TensorNormalRegularizer | None:
    """The regularizer that is meant by a name, a `TensorNormalRegularizer`, or None."""
    if isinstance(prior, str) and prior in PRIORS:
        epsilon = PRIORS[prior]
        return TensorNormalRegularizer(strength, list(epsilon), epsilon=epsilon, mean=mean)
    if prior is not None and not isinstance(prior, TensorNormalRegularizer):
        raise ValueError(
            f"{owner}: `prior` must be one of {sorted(PRIORS)}, a "
            f"TensorNormalRegularizer or None. Received: prior={prior!r}."
        )
    return prior


def prior_by_name(
    name: str,
    strength: float,
    task_epsilon: float,
    update_every: int | None,
    mean: Mean = "start",
    relative: bool = True,
) -> TensorNormalRegularizer:
    """The regularizer of a name, with another ridge of the tasks' covariance."""
    epsilon = {**PRIORS[name], "task": task_epsilon}
    if not relative:
        # Of an absolute ridge there is no proportion to what columns lack.
        epsilon = {mode: 1.0 if e == "auto" else e for mode, e in epsilon.items()}
    return TensorNormalRegularizer(
        strength,
        list(epsilon),
        update_every,
        epsilon=epsilon,
        relative=relative,
        mean=mean,
    )


def _of_common_features(
    prior: TensorNormalRegularizer | None,
) -> TensorNormalRegularizer | None:
    """A regularizer whose layers share what they learn of the features."""
    if prior is None or "feature" not in prior.modes or "feature" in prior.shared:
        return prior
    start = {mode: value for mode, value in prior.start.items() if mode != "feature"}
    common = prior.new_covariance("feature", "features_of_all_classifiers")
    config = prior.get_config() | {"start": start, "epsilon": prior.epsilon}
    config["task_covariance"] = prior.shared.get("task")
    config["shared"] = {"feature": common}
    return TensorNormalRegularizer(**config)


def _each(
    prior: TensorNormalRegularizer | None, each: str
) -> TensorNormalRegularizer | None:
    """The regularizer of a layer whose kernels along a mode are drawn independently."""
    if prior is None:
        return None
    modes = [mode for mode in prior.modes if mode != each]

    def of_these(values: Any) -> Any:
        given = isinstance(values, dict)
        return {m: values[m] for m in modes if m in values} if given else values

    own = {"epsilon": of_these(prior.epsilon), "start": of_these(prior.start)}
    own |= {"modes": modes, "each": each, "task_covariance": None, "shared": None}
    return TensorNormalRegularizer(**{**prior.get_config(), **own})


def _trunk(
    backbone: Any, names: Sequence[str], own: Any, shared_input: bool
) -> tuple[Any, Features]:
    """The inputs of the network, and the `Features` that the trunk makes of them.

    Args:
        backbone: see `relationship_network`.
        names: list of the tasks.
        own: how the kernels of their own trunks are related; None: there is one trunk.
        shared_input: bool.
    """
    if not isinstance(backbone, keras.Model):
        if not is_list(backbone):
            what = "a Keras model, or the shape of the features without the batch"
            raise refusal("backbone", backbone, "relationship_network", what)
        backbone = check_sizes("backbone", backbone, "relationship_network")
        make, own = keras.layers.Identity(name="trunk"), None
    else:
        checked_functional(backbone, "relationship_network")
        make = backbone
    shape = backbone if isinstance(backbone, tuple) else backbone.input_shape[1:]
    if own is not None:
        model = multitask(backbone, names, own, shared_input=shared_input, verbose=False)
        inputs, features = model.input, TaskStack(names)(model.output)
        form, vectors = Form.GROUPED, model.output[names[0]]
    elif shared_input:
        inputs = keras.Input(shape, name="input")
        features = vectors = make(inputs)
        form = Form.SHARED
    else:
        inputs = {task: keras.Input(shape, name=task) for task in names}
        features = vectors = make(TaskBatch(names, name="tasks_as_batch")(inputs))
        form = Form.BATCHED
    if not isinstance(vectors, keras.KerasTensor) or len(vectors.shape) != 2:
        raise ValueError(
            "relationship_network: expected a backbone with one output (batch, features), "
            "such as one with pooling='avg' and without its top. Received: "
            f"{getattr(vectors, 'shape', vectors)}."
        )
    return inputs, Features(names, form, features, "trunk")
