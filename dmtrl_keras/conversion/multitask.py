"""From a Keras model to the network of T tasks."""

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import tree

from dmtrl_keras.conversion import rules
from dmtrl_keras.conversion.heads import checked_heads, outputs_by_task
from dmtrl_keras.conversion.survey import Survey, by_pattern, survey
from dmtrl_keras.ground.copying import copy_of, load_weights
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import (
    check_bool,
    check_name,
    check_one_of,
    check_task_names,
    clean_name,
    is_for,
    shown,
    task_names,
)
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.parameterization import Parameterization
from dmtrl_keras.kernels.state import KernelRegularizer
from dmtrl_keras.kernels.task_kernel import draw_stacked_kernel
from dmtrl_keras.tasks.conv import TaskConv
from dmtrl_keras.tasks.conv_transpose import TaskConvTranspose
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.forms import Features
from dmtrl_keras.tasks.graph import (
    Names,
    checked_functional,
    is_trained,
    replaced,
    run,
    values_in,
)
from dmtrl_keras.tasks.rewrite import make_layer, started_layer
from dmtrl_keras.tasks.rewrite_models import factorization_report, print_report, times
from dmtrl_keras.tasks.task_layer import TaskLayer
from dmtrl_keras.training.model import MultiTaskModel


def multitask(
    backbone: keras.Model,
    tasks: int | Sequence[str],
    sharing: str | Parameterization | Mapping[str, Any] = "independent",
    rank: Any = None,
    tolerance: Any = None,
    share_until: str | None = None,
    shared_input: bool = True,
    heads: Any = None,
    prior: KernelRegularizer | Mapping[str, KernelRegularizer] | None = None,
    between: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
    name: str | None = None,
    verbose: bool = True,
    implementation: str | None = None,
    threshold: Any = None,
    task_rank: Any = None,
    start: Literal["common", "apart"] | None = None,
) -> MultiTaskModel:
    """The network of T tasks that has a given Keras model as every task's backbone.

    Each layer with a kernel becomes one layer with T kernels; how these are related is
    said by `sharing`. Batch, group and layer normalization are per task. All
    tasks start from the weights of the backbone, which stays as it is, or each from kernels
    of its own, see `start`.

    Equal kernels have task rank 1, so that a tolerance alone would never let them
    differ: `tolerance` and `rank` therefore say how one kernel is approximated (DMTRL
    Eq. 1-8), while the task rank is T (or `task_rank`), its latent kernels beyond
    the first starting at zero. The first step of training can already take the
    tasks apart.

    Args:
        backbone: a built functional or Sequential Keras model with one output, such as
            `keras.applications.ResNet50(include_top=False, pooling="avg")`.
        tasks: list of T distinct names, or int T for `task_0`, `task_1`, ...
        sharing: what becomes of the kernels: a `Parameterization` such as
            `Tucker(tolerance=0.1)` or `SimilarKernels(0.4)`, or the name of one:
            `"independent"`, `"hard"`, `"laf"`, `"tucker"`, `"tt"`, `"similar"` (MTAL; of
            convolutions only, as in the paper), ...; or a dict of these by layer name,
            name pattern such as `"conv5_*"` or class such as `"Conv2D"`, of which the
            first that fits holds, and layers that none fits are independent.
        rank: short for the argument of factorisations that are given by name: int (a cap
            for all ranks but the tasks'), float in (0, 1] (the most that a layer's factors
            may have of the weights of T kernels), or a tuple with an int or a fraction of
            the possible for each rank; or a dict of these by layer name, pattern or class,
            such as `{"Conv2D": (1.0, 1.0, 0.5, 0.5), "Dense": 0.25}`.
        tolerance: likewise, a number in (0, 1): the error of each kernel relative to its
            Frobenius norm. Without both: 0.1.
        share_until: name of a layer (or nested model) of the backbone. It and everything
            that it depends on is shared by all tasks and computed once: ordinary
            layers, with one input for each task on the batch of all tasks' inputs.
        shared_input: bool. True: one input for all tasks. False: a dict of one input per
            task, by name.
        heads: what comes after the backbone: an int, the classes (a `Dense` layer with
            softmax, for 1 with sigmoid; images of features are averaged first); a
            function of the features that returns the output tensor, or a Keras
            layer; or a dict of these by task name. None: the backbone's output. A head
            without a name of its own is named `<task>_head`.
        prior: a regularizer of the stacked kernels: one with state that learns how the
            tasks are related, `TensorNormalRegularizer` (DRN, MRN), or a norm such as
            `regularizers.TraceNorm`; or a dict of them by layer name or pattern, as for
            `sharing`. Each layer has a state of its own. None: the regularizers of the
            backbone.
        between: layers that let tasks see each other's features: a function of the list of
            task names that returns a layer on grouped features, such as `CrossStitch` or
            `NDDR`, for which every pooling layer is followed by one; or a dict of such
            functions by layer name or pattern, after which layers they go. None: none.
        name: name of the model. None: that of the backbone and `_multitask`.
        verbose: bool, whether to print the report of the factorisations, if there
            are any: ranks, errors and parameters, as from `factorization_report`. Layers
            whose factors are more than T kernels get them, since they were asked for. If
            they are more in all, a `UserWarning` names the layers.
        implementation: deprecated; give a parameterization, such as
            `sharing=Tucker(tolerance=0.1, implementation="compose")`.
        threshold: deprecated; `sharing=SimilarKernels(0.4)`, or
            `sharing=Tucker(tolerance=0.1, threshold="singular_value")`.
        task_rank: as `rank`, the rank of the tasks' axis: int or fraction; None: full. With
            1 the kernels of all tasks stay multiples of each other.
        start: what the kernels of the tasks start from. `"common"`: all from those of the
            backbone. `"apart"`: each from a draw of its own by the backbone's
            initializers, decomposed if they are factorised; all other weights are the
            backbone's. None: `"common"`, but `"apart"` for `"similar"` kernels (MTAL,
            Algorithm 1, line 1), unless the backbone is trained: a bias, a scale or a
            running statistic of it is not constant, as it would be at the start.

    Returns:
        A `MultiTaskModel`, whose outputs are a dict by task name; not compiled. Layers
        keep their names, but for what a SavedModel can't have, such as an underscore
        at the start.

    Raises:
        ValueError: if the backbone has layers that can't be converted (all of them are
            listed, before anything is built); on bad names, heads, ranks or
            patterns that fit no layer.

    References:
        Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
        Approach" (ICLR 2017), sections 3 and 4.

    Example:

    >>> import keras
    >>> from dmtrl_keras import multitask
    >>> backbone = keras.applications.MobileNetV2(
    ...     input_shape=(32, 32, 3), include_top=False, weights=None, pooling="avg"
    ... )
    >>> model = multitask(
    ...     backbone,
    ...     ["age", "gender"],
    ...     sharing="independent",
    ...     share_until="block_12_add",
    ...     heads={"age": 8, "gender": 2},
    ... )
    >>> {name: output.shape for name, output in model.output.items()}
    {'age': (None, 8), 'gender': (None, 2)}
    """
    owner = "multitask"
    names = task_names(tasks, owner)
    check_task_names(names, owner)
    shared_input = check_bool("shared_input", shared_input, owner)
    verbose = check_bool("verbose", verbose, owner)
    check_name("share_until", share_until, owner)
    check_name("name", name, owner)
    backbone = checked_functional(backbone, "multitask")
    surveyed = survey(backbone, share_until)
    options = {"rank": rank, "tolerance": tolerance, "task_rank": task_rank}
    options |= _deprecated(implementation=implementation, threshold=threshold)
    choose = _sharing_of(sharing, surveyed.with_weights, names, options)
    given = {"sharing": sharing, "prior": prior, **options}
    _check_averaging(backbone, heads)
    heads = checked_heads(heads, names)
    prior_of = by_pattern("prior", prior, surveyed.with_weights, _check_prior)
    fusion_of = _fusion_of(between, surveyed)
    _check_layers(surveyed, choose, fusion_of, backbone.name)
    if start is not None:
        check_one_of("start", start, ("common", "apart"), owner)
    if start is None and is_trained(backbone):
        start = "common"
    inputs = _inputs(backbone, names, shared_input)
    builder = _Builder(names, surveyed, choose, prior_of, fusion_of, inputs, start)
    features = builder.enter(backbone, inputs, shared_input)
    outputs = run(backbone, features, builder.visit)
    _check_effects(given, builder, surveyed.with_weights)
    outputs = outputs_by_task(outputs, heads, names, builder.new_name)
    name = name or clean_name(f"{backbone.name}_multitask")
    model = MultiTaskModel(inputs, outputs, name=name)
    if verbose and factorization_report(model):
        print_report(model)
    _warn_of_growth(model)
    return model


def _check_layers(
    surveyed: Survey,
    choose: Callable[[str, bool], Parameterization],
    fusion_of: Callable[[str], Any],
    name: str,
) -> None:
    """Refuse layers that can't be converted and would have to be."""

    def apart(layer: str) -> bool:
        own = layer in surveyed.with_weights and choose(layer, True).name != "hard"
        return own or fusion_of(layer) is not None

    surveyed.check(name, apart)


def _check_averaging(backbone: keras.Model, heads: Any) -> None:
    """Refuse numbers of classes for images of which the channels come first."""
    numbers = [one for one in tree.flatten(heads) if isinstance(one, int)]
    first = any(
        getattr(layer, "data_format", None) == "channels_first"
        for layer in flatten_layers(backbone)
    )
    if numbers and first and len(backbone.output.shape) > 2:
        raise ValueError(
            "multitask: expected `heads` as layers or functions for images of which the "
            "channels come first; with a number of classes they are averaged over what "
            f"comes before the last axis. Received: heads={heads!r}."
        )


def _freeze_like(original: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """Freeze what is frozen within a layer, which its configuration may not say."""
    pairs = zip(flatten_layers(original), flatten_layers(copy))
    for one, other in pairs:
        if other.trainable != one.trainable:
            other.trainable = one.trainable


def _warn_of_growth(model: keras.Model) -> None:
    """Name the layers whose factors are more than T kernels, if they are so in all."""
    report = factorization_report(model)
    grown = [
        f"{entry.layer} ({times(entry.parameters_after, entry)})"
        for entry in report
        if entry.parameters_after > entry.parameters_before
    ]
    after = sum(entry.parameters_after for entry in report)
    before = sum(entry.parameters_before for entry in report)
    if after > before:
        warnings.warn(
            f"multitask: the factors have {after:,} weights, a kernel for each task "
            f"{before:,}. These layers grew, by so many times: {', '.join(grown)}. "
            "Expected: a smaller rank or task rank, a larger tolerance, or no factors "
            "there, as in "
            "`sharing={'small_layer': 'independent', '*': 'tucker'}`.",
            stacklevel=3,
        )


# --- what was asked for -------------------------------------------------------------


def _deprecated(**options: Any) -> dict[str, Any]:
    """Options that belong to a parameterization, with a warning if they are given."""
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        warnings.warn(
            f"multitask: {given} are arguments of parameterizations and will go. Give one "
            "instead, such as sharing=Tucker(tolerance=0.1, implementation='compose') or "
            "sharing=SimilarKernels(0.4), from dmtrl_keras.parameterizations.",
            DeprecationWarning,
            stacklevel=3,
        )
    return options


def _sharing_of(
    sharing: Any,
    layers: Mapping[str, str],
    names: Sequence[str],
    options: Mapping[str, Any],
) -> Callable[[str, bool], Parameterization]:
    """A function from a layer's name, and whether it convolves, to its parameterization."""
    given = {
        option: by_pattern(option, value, layers, lambda value: value)
        for option, value in options.items()
        if value is not None
    }
    used: set[str] = set()

    def resolve(choice: Any) -> Callable[[str], Parameterization]:
        if not isinstance(choice, str):
            own = parameterizations.get(choice, "multitask").with_names(names)
            return lambda layer: own
        kind = type(parameterizations.get(choice, "multitask"))
        mine = [option for option in given if option in kind.short_forms]
        used.update(mine)

        def make(layer: str) -> Parameterization:
            values = {option: given[option](layer) for option in mine}
            values = {name: value for name, value in values.items() if value is not None}
            return kind.of_trained(**values).with_names(names)

        return make

    choose = by_pattern("sharing", sharing, layers, resolve)
    unused = sorted(set(given) - used)
    if unused:
        raise ValueError(
            f"multitask: {unused} are for parameterizations that take them and are given "
            f"by name, such as rank and tolerance for 'tucker'. Received: "
            f"sharing={sharing!r}, {', '.join(f'{n}={options[n]!r}' for n in unused)}."
        )
    independent = parameterizations.get("independent")

    def of_layer(name: str, convolution: bool) -> Parameterization:
        make = choose(name)
        own = independent if make is None else make(name)
        # Layers that are named are meant.
        named = isinstance(sharing, dict)
        return own if convolution or named or not own.convolutions_only else independent

    for layer in layers:
        # What is malformed is an error before anything is built.
        of_layer(layer, True)
    return of_layer


def _fusion_of(between: Any, survey: Survey) -> Callable[[str], Any]:
    """A function from a layer's name to the function that makes what comes after it."""
    if callable(between):
        if not survey.poolings:
            raise ValueError(
                "multitask: `between` goes after the pooling layers, and the backbone has "
                "none. Give a dict by layer name or pattern. Its layers are: "
                f"{list(survey.layers)}."
            )
        between = dict.fromkeys(survey.poolings, between)
    elif between is not None and not isinstance(between, dict):
        raise ValueError(
            "multitask: `between` must be a function of the task names that returns a "
            f"layer, or a dict of them. Received: {between!r}."
        )
    return by_pattern("between", between, survey.layers, _check_fusion)


def _check_fusion(make: Any) -> Callable[..., Any] | None:
    # A layer would be one for all places.
    fine = callable(make) and not isinstance(make, keras.layers.Layer)
    if make is not None and not (fine and _takes_one_argument(make)):
        raise ValueError(
            "multitask: `between` must have functions of the task names that return a "
            "layer, such as `lambda tasks: CrossStitch(tasks)`: they are called with the "
            f"list of them. Received: {make!r}."
        )
    return make


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        # Some functions of C don't say what they take.
        return True
    return True


def _check_prior(prior: Any) -> KernelRegularizer | None:
    if prior is not None and not isinstance(prior, KernelRegularizer):
        raise ValueError(
            "multitask: `prior` must be a regularizer of the tasks' kernels, such as "
            "TensorNormalRegularizer or TraceNorm, or a dict of them by layer name. "
            f"Received: {prior!r}."
        )
    return prior


def _check_effects(
    given: Mapping[str, Any], builder: "_Builder", layers: Mapping[str, str]
) -> None:
    """Refuse what was given for layers, by full name or class, where it did nothing."""
    for argument, value in given.items():
        reached = builder.reached["sharing" if argument == "sharing" else "kernels"]
        if argument not in ("sharing", "prior"):
            reached = builder.taking(argument)
        idle: list[str] = []
        if isinstance(value, Mapping):
            # A pattern may also fit layers that it is not for.
            exact = [key for key in value if not set("*?[") & set(key)]
            idle = [
                key
                for key in exact
                if not any(is_for(key, name, layers.get(name)) for name in reached)
            ]
        elif argument == "prior" and value is not None and not reached:
            idle = ["*"]
        if idle:
            raise ValueError(
                f"multitask: `{argument}` for layers {idle} does nothing: there are no "
                f"kernels of the tasks' own for it. It is for the layers {sorted(reached)}."
            )


# --- building -----------------------------------------------------------------------


def _inputs(backbone: keras.Model, names: Sequence[str], shared_input: bool) -> Any:
    def make(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return keras.Input(x.shape[1:], dtype=x.dtype, name=name)

    if shared_input:
        return tree.map_structure(lambda x: make(x, x.name), backbone.input)
    if isinstance(backbone.input, keras.KerasTensor):
        return {task: make(backbone.input, task) for task in names}
    return {
        task: tree.map_structure(lambda x, t=task: make(x, f"{t}_{x.name}"), backbone.input)
        for task in names
    }


class _Builder:
    """Makes the layers of all tasks, call by call of the backbone."""

    def __init__(
        self,
        names: Sequence[str],
        surveyed: Survey,
        choose: Callable[[str, bool], Parameterization],
        prior_of: Callable[[str], KernelRegularizer | None],
        fusion_of: Callable[[str], Callable[..., Any] | None],
        inputs: Any,
        start: str | None,
    ) -> None:
        self.names = names
        # A name for a layer that no other layer of the network has.
        self.new_name = Names(x.name for x in tree.flatten(inputs)).new
        self.tasks = len(names)
        self._survey = surveyed
        self._choose = choose
        self._prior_of = prior_of
        self._fusion_of = fusion_of
        self._start = start
        self._made: dict[tuple[int, str], Any] = {}
        # Names of layers of which `sharing`, and what is said of kernels, made something.
        self.reached: dict[str, set[str]] = {"sharing": set(), "kernels": set()}

    def taking(self, option: str) -> set[str]:
        """Names of the layers whose parameterization takes an option, such as a rank."""
        return {
            name
            for name in self.reached["kernels"]
            if option in type(self._choose(name, True)).short_forms
        }

    def _features(self, form: Form, tensor: Tensor, source: str) -> Features:
        return Features(self.names, form, tensor, source, self.new_name)

    def enter(self, backbone: keras.Model, inputs: Any, shared_input: bool) -> Any:
        """The features that the inputs of the network are."""
        if shared_input:
            return tree.map_structure(
                lambda x: self._features(Form.SHARED, x, x.name), inputs
            )
        apart = zip(*(tree.flatten(inputs[task]) for task in self.names))
        features = [
            self._features(Form.APART, dict(zip(self.names, parts)), x.name)
            for x, parts in zip(tree.flatten(backbone.input), apart)
        ]
        return tree.pack_sequence_as(backbone.input, features)

    def visit(
        self,
        operation: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        path: tuple[str, ...],
    ) -> Any:
        """What a call of the backbone becomes; takes and returns `Features`."""
        features = self._converted(_Call(operation, args, kwargs, path))
        make = self._fusion_of(operation.name)
        if make is None:
            return features
        if not isinstance(features, Features) or features.form != Form.GROUPED:
            raise ValueError(
                f"multitask: after layer {operation.name!r} tasks have no features of "
                "their own for `between` to mix; they are shared there."
            )
        key = (id(operation), "fusion")
        if key not in self._made:
            layer = make(list(self.names))
            if not isinstance(layer, keras.layers.Layer):
                raise ValueError(
                    "multitask: `between` must have functions of the task names that "
                    f"return a layer. Received: one that, after {operation.name!r}, "
                    f"returns {shown(layer)}."
                )
            layer.name = self.new_name(f"{operation.name}_fusion", path)
            self._made[key] = layer
        return features.through(self._made[key])

    def _converted(self, call: "_Call") -> Any:
        """A call as one for all tasks: shared, with T kernels, grouped, or task by task."""
        operation = call.operation
        shapes = [features.shape for features in call.features]
        rule = rules.fitting(operation, call.args, call.kwargs, shapes)
        if not isinstance(rule, rules.Kernels) and any(f.masked for f in call.features):
            # Of a task's positions, not of its channels.
            rule = rules.unknown(operation)
        plain = (id(operation), "plain") in self._made
        if self._stays_plain(call, rule):
            form = call.features[0].common
            assert form is not None
            return self._plain(call, form)
        if rule.has_weights and plain:
            # A layer that is called again has the weights that it had before.
            return self._plain(call, Form.BATCHED)
        if rule.has_weights and rule.is_copied:
            return self._copies(call)
        if isinstance(rule, rules.Kernels):
            return self._kernels(call, rule)
        layer = self._made.get((id(operation), "tasks"))
        layer = layer or rule.grouped(operation, self.tasks, shapes)
        if layer is None:
            return self._plain(call, Form.BATCHED)
        weights = _is_layer(layer) and rule.grouped_weights(operation, self.tasks)
        return self._run(call, layer, "tasks", Form.GROUPED, weights)

    def _stays_plain(self, call: "_Call", rule: rules.Rule) -> bool:
        """Whether the backbone's own layer serves all tasks in a form that they have."""
        operation = call.operation
        if (id(operation), "tasks") in self._made:
            return False
        forms = {features.common for features in call.features}
        if None in forms or len(forms) != 1:
            return False
        if not rule.has_weights or id(operation) in self._survey.shared:
            return True
        hard = self._choose(operation.name, True).name == "hard"
        if hard:
            self.reached["sharing"].add(operation.name)
        return hard

    def _plain(self, call: "_Call", form: Form) -> Any:
        """The backbone's own layer, in a form in which it can serve all tasks."""
        layer = self._made.get((id(call.operation), "plain"))
        layer = layer or copy_of(call.operation)
        weights = _is_layer(layer) and call.operation.get_weights()
        return self._run(call, layer, "plain", form, weights)

    def _run(self, call: "_Call", layer: Any, kind: str, form: Form, weights: Any) -> Any:
        key = (id(call.operation), kind)
        fresh = key not in self._made
        if fresh:
            layer.name = self.new_name(call.operation.name, call.path)
            self._made[key] = layer
        args, kwargs = replaced(Features, call.args, call.kwargs, lambda f: f.take(form))
        outputs = layer(*args, **kwargs)
        if fresh and weights:
            load_weights(layer, weights)
            if kind == "plain":
                _freeze_like(call.operation, layer)
        return tree.map_structure(lambda x: self._features(form, x, layer.name), outputs)

    def _kernels(self, call: "_Call", rule: rules.Kernels) -> Any:
        """A layer with kernels as layers with T kernels, one after another."""
        operation, features = call.operation, call.features[0]
        key = (id(operation), "tasks")
        fresh = key not in self._made
        if fresh:
            # A layer that is called again may find other features then.
            once = self._survey.calls[id(operation)] == 1
            shared_input = once and features.form == Form.SHARED
            self._made[key] = []
            for part in rule.parts(operation, [features.shape]):
                layer = self._task_layer(part, operation.name, shared_input, call.path)
                self._made[key].append((layer, part.bias))
                shared_input = False
        for layer, bias in self._made[key]:
            features = features.through_kernels(layer)
            if fresh and bias is not None:
                layer.bias.assign(np.repeat(bias[:, None], self.tasks, axis=-1))
        activation = rule.activation(operation)
        if activation is None:
            return features
        return self._plain(_Call(activation, [features], {}, call.path), Form.BATCHED)

    def _copies(self, call: "_Call") -> Any:
        """A layer that no rule knows as T copies of it."""
        operation = call.operation
        key = (id(operation), "tasks")
        fresh = key not in self._made
        if fresh:
            # A layer that is called again may find other features then.
            once = self._survey.calls[id(operation)] == 1
            shared = [once and f.form == Form.SHARED for f in call.features]
            self._made[key] = self._task_copies(call, shared)
        layer = self._made[key]
        inputs = [
            features.take(Form.SHARED if shared else Form.BATCHED)
            for features, shared in zip(call.features, layer.shared_input)
        ]
        outputs = layer(inputs if len(inputs) > 1 else inputs[0])
        return tree.map_structure(
            lambda x: self._features(Form.BATCHED, x, layer.name), outputs
        )

    def _task_copies(self, call: "_Call", shared: list[bool]) -> TaskCopies:
        operation = call.operation
        sharing = self._choose(operation.name, _convolves(operation))
        self.reached["sharing"].add(operation.name)
        if any(len(weight.shape) > 1 for weight in operation.trainable_weights):
            self.reached["kernels"].add(operation.name)
        common = {"common": True, "apart": False, None: None}[self._start]
        return TaskCopies(
            operation,
            list(self.names),
            sharing,
            shared_input=shared,
            kernel_regularizer=self._prior_of(operation.name),
            common_draw=common,
            arguments=call.arguments(),
            name=self.new_name(operation.name, call.path),
        )

    def _task_layer(
        self, part: rules.Part, operation: str, shared_input: bool, path: tuple[str, ...]
    ) -> TaskLayer:
        """The layer with T kernels that starts from one kernel."""
        sharing = self._choose(
            operation, issubclass(part.cls, (TaskConv, TaskConvTranspose))
        )
        for kind in self.reached.values():
            kind.add(operation)
        prior = self._prior_of(operation)
        name = self.new_name(part.config["name"], path)
        config = {**part.config, "name": name}
        config.update(tasks=self.tasks, shared_input=shared_input)
        if prior is not None:
            config[f"{part.cls._kernel_prefix}_regularizer"] = prior
        kernel = part.kernel.astype("float64")
        stacked = np.broadcast_to(kernel[..., None], (*kernel.shape, self.tasks))
        apart = self._start == "apart" or (self._start is None and sharing.starts_apart)
        if apart:
            initializer = part.config.get(f"{part.cls._kernel_prefix}_initializer")
            initializer = keras.initializers.get(initializer)
            stacked = draw_stacked_kernel(initializer, kernel.shape, self.tasks, False)
        try:
            if apart:
                factors = sharing.decompose(stacked.astype("float64"))
            else:
                factors = sharing.replicate(kernel, self.tasks)
        except ValueError as error:
            raise ValueError(
                f"multitask: layer {name!r}, kernel {kernel.shape}: {error}"
            ) from error
        return started_layer(
            lambda own: make_layer(part.cls, config, own), sharing, stacked, factors
        )


@dataclasses.dataclass
class _Call:
    """One call of an operation of the backbone, with `Features` as its tensors."""

    operation: keras.Operation
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    path: tuple[str, ...]

    @property
    def features(self) -> list[Features]:
        """All features among the arguments."""
        return values_in(Features, self.args, self.kwargs)

    def arguments(self) -> dict[str, Any] | None:
        """The arguments as `TaskCopies` takes them; None: features one after another."""
        if not self.kwargs and all(isinstance(one, Features) for one in self.args):
            return None
        numbers = itertools.count()
        args, kwargs = replaced(
            Features, self.args, self.kwargs, lambda f: {"input": next(numbers)}
        )
        return {"args": list(args), "kwargs": dict(kwargs)}


def _convolves(operation: keras.layers.Layer) -> bool:
    """Whether a layer without a rule of its own is a convolution, too."""
    return "Conv" in type(operation).__name__


def _is_layer(operation: Any) -> bool:
    return isinstance(operation, keras.layers.Layer)
