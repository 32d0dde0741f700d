"""Deep Relationship Networks: a shared trunk, and layers of each task with a prior."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras

from dmtrl_keras.conversion import multitask
from dmtrl_keras.conversion.graph import checked_functional
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
    task_names,
)
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer
from dmtrl_keras.tasks.dense import TaskDense
from dmtrl_keras.tasks.forms import Features
from dmtrl_keras.tasks.layout import TaskBatch, TaskSplit, TaskStack
from dmtrl_keras.training.model import MultiTaskModel

LAYERS = ("trunk", "bottleneck", "classifier")
NEW_LAYERS = LAYERS[1:]
# Tens of thousands of columns say how a few tasks are related; what they say about hundreds
# of features is mostly noise, so that their covariances are drawn halfway to the identity.
PRIORS = {
    "drn": {"task": 1e-2},
    "mrn": {"feature": 1.0, "class": 1.0, "task": 1e-2},
}


def relationship_network(
    backbone: keras.Model | Sequence[int],
    tasks: Tasks,
    classes: int,
    bottleneck: int | None = 256,
    prior: Literal["drn", "mrn"] | TensorNormalRegularizer | None = "drn",
    layers: Sequence[str] = ("bottleneck", "classifier"),
    binary: bool = False,
    strength: float = 0.3,
    shared_input: bool = False,
    dropout: float = 0.0,
    common_draw: bool | Mapping[str, bool] = True,
    name: str | None = None,
    kernel_initializer: Any = None,
) -> MultiTaskModel:
    """A network of T tasks with the same classes, whose relations are learned (DRN, MRN).

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

    Where the trunk is frozen, or there is none, it makes no difference whether it is
    shared, and STL is `prior=None`.

    Args:
        backbone: a Keras model that gives a vector of features, such as
            `keras.applications.ResNet50(include_top=False, pooling="avg")`; it is part of
            the network and is trained with it unless its `trainable` is False. Or the
            input shape without the batch, such as `(1280,)`, for features at hand.
        tasks: list of T names, or int T.
        classes: positive int, the classes that every task has; 1 with `binary=True` only.
        bottleneck: positive int, units of the bottleneck (ReLU); None: no such layer.
        prior: `"drn"`: the task mode learns its covariance (DRN Eq. 8); `"mrn"`: those of
            features and classes too; a `TensorNormalRegularizer`; or None. By name
            `epsilon` is 0.01 for tasks, and 1 for features and classes, and the mean is
            the start, so that the covariances see what was learned. A regularizer of
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
            uniform for all else.

    Returns:
        A `MultiTaskModel`, not compiled: from images or features to probabilities
        `(batch, classes)` by task name. New layers are named `bottleneck` and
        `classifier`, for `optimizers.LearningRateMultiplier`.

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
    check_positive("classes", classes, owner)
    if bottleneck is not None:
        check_positive("bottleneck", bottleneck, owner, " or None")
    check_name("name", name, owner)
    check_number("dropout", dropout, owner, 1)
    check_number("strength", strength, owner)
    for argument, value in (("binary", binary), ("shared_input", shared_input)):
        check_bool(argument, value, owner)
    common = _by_layer("common_draw", common_draw, True)
    for value in common.values():
        check_bool("common_draw", value, owner, ", or a dict of them by layer")
    if not binary and classes == 1:
        raise ValueError(
            f"{owner}: `classes` must be 2 or more, since a softmax over one class is "
            "always 1; or binary=True. Received: classes=1, binary=False."
        )
    if not is_list(layers):
        raise refusal("layers", layers, owner, f"the last few of {LAYERS}")
    layers = tuple(layers)
    if layers != LAYERS[len(LAYERS) - len(layers) :]:
        raise ValueError(
            f"{owner}: `layers` must be the last few of {LAYERS}, since what comes after a "
            f"task's own layer is its own too. Received: layers={layers!r}."
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
    inputs, features = _trunk(backbone, names, "trunk" in layers, shared_input)

    def through(
        name: str, units: int, activation: str | None, each: str | None = None
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
                len(names),
                activation,
                shared_input=features.form == Form.SHARED,
                kernel_initializer=initializers[name],
                kernel_regularizer=_prior(prior, strength, each),
                common_draw=common[name],
                name=name,
            )
        )

    if bottleneck is not None:
        features = through("bottleneck", bottleneck, "relu")
    if dropout:
        features = features.through(keras.layers.Dropout(dropout))
    features = through("classifier", classes, None, "class" if binary else None)
    activation = "sigmoid" if binary else "softmax"
    outputs = {
        # Probabilities in full precision, whatever the network computes in.
        task: keras.layers.Activation(
            activation, name=f"{task}_probabilities", dtype=keras.config.floatx()
        )(x)
        for task, x in _by_task(features).items()
    }
    return MultiTaskModel(inputs, outputs, name=name or owner)


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


def _by_task(features: Features) -> dict[str, keras.KerasTensor]:
    """A dict of each task's tensor."""
    names = list(features.names)
    if features.form == Form.SHARED:
        return dict.fromkeys(names, features.take(Form.SHARED))
    return TaskSplit(names, name="classes_by_task")(features.take(Form.GROUPED))


def _prior(
    prior: str | TensorNormalRegularizer | None, strength: float, each: str | None
) -> TensorNormalRegularizer | None:
    """The regularizer of one layer, or None."""
    if isinstance(prior, str) and prior in PRIORS:
        epsilon = PRIORS[prior]
        prior = TensorNormalRegularizer(
            strength, list(epsilon), epsilon=epsilon, mean="start"
        )
    elif prior is not None and not isinstance(prior, TensorNormalRegularizer):
        raise ValueError(
            f"relationship_network: `prior` must be one of {sorted(PRIORS)}, a "
            f"TensorNormalRegularizer or None. Received: prior={prior!r}."
        )
    if prior is None or each is None:
        return prior
    modes = [mode for mode in prior.modes if mode != each]

    def of_these(values: Any) -> Any:
        given = isinstance(values, dict)
        return {m: values[m] for m in modes if m in values} if given else values

    own = {"epsilon": of_these(prior.epsilon), "start": of_these(prior.start)}
    own |= {"modes": modes, "each": each, "task_covariance": None}
    return TensorNormalRegularizer(**{**prior.get_config(), **own})


def _trunk(
    backbone: Any, names: Sequence[str], own: bool, shared_input: bool
) -> tuple[Any, Features]:
    """The inputs of the network, and the `Features` that the trunk makes of them."""
    if not isinstance(backbone, keras.Model):
        if not is_list(backbone):
            what = "a Keras model, or the shape of the features without the batch"
            raise refusal("backbone", backbone, "relationship_network", what)
        backbone = check_sizes("backbone", backbone, "relationship_network")
        make, own = keras.layers.Identity(name="trunk"), False
    else:
        checked_functional(backbone, "relationship_network")
        make = backbone
    shape = backbone if isinstance(backbone, tuple) else backbone.input_shape[1:]
    if own:
        model = multitask(backbone, names, shared_input=shared_input, verbose=False)
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
