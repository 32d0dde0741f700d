"""From a Keras model to the network of T tasks."""

import collections
import dataclasses
import fnmatch
import itertools
import numbers

import keras
import numpy as np
from keras import tree

from dmtrl_keras import parameterizations
from dmtrl_keras.conversion import rules
from dmtrl_keras.conversion.graph import (
    checked_functional,
    exportable,
    output_spec,
    replaced,
    run,
    values_in,
)
from dmtrl_keras.factorization import factorization_report, print_report, with_factors
from dmtrl_keras.layers import TaskBatch, TaskGroup, TaskRepeat, TaskSplit, TaskStack
from dmtrl_keras.layers.conv import TaskConv
from dmtrl_keras.model import MultiTaskModel
from dmtrl_keras.parameterizations import FactorizedParameterization, SimilarKernels
from dmtrl_keras.regularizers import TensorNormalRegularizer
from dmtrl_keras.validation import task_names


def multitask(
    backbone,
    tasks,
    sharing="independent",
    rank=None,
    tolerance=None,
    share_until=None,
    shared_input=True,
    heads=None,
    prior=None,
    implementation="auto",
    threshold=None,
    between=None,
    name=None,
    verbose=True,
):
    """The network of T tasks that has a given Keras model as every task's backbone.

    Each layer with a kernel becomes one layer with T kernels; how these are related is
    said by `sharing`. Batch, group and layer normalization are per task. All
    tasks start from the weights of the backbone, which stays as it is.

    Equal kernels have task rank 1, so that a tolerance alone would never let them
    differ: `tolerance` and `rank` therefore say how one kernel is approximated (DMTRL
    Eq. 1-8), while the task rank is T (or that of `rank`), its latent kernels beyond
    the first starting at zero. The first step of training can already take the
    tasks apart.

    Args:
        backbone: a built functional or Sequential Keras model with one output, such as
            `keras.applications.ResNet50(include_top=False, pooling="avg")`.
        tasks: list of T distinct names, or int T for `task_0`, `task_1`, ...
        sharing: what becomes of the kernels: `"independent"`, `"hard"`, `"laf"`,
            `"tucker"`, `"tt"`, `"similar"` (MTAL; of convolutions only, as in the paper),
            another registered name, or a `Parameterization`; or a dict of them by layer
            name or name pattern such as `"conv5_*"`, of which the first that fits holds,
            and layers that none fits are independent.
        rank: for the factorisations that are given by name: int (a cap), float in (0, 1] (a
            fraction), or a tuple with one of them for each rank.
        tolerance: instead of the rank, a number in (0, 1): the error of each kernel
            relative to its Frobenius norm. Without both: 0.1.
        share_until: name of a layer (or nested model) of the backbone. It and everything
            that it depends on is shared by all tasks and computed once: ordinary
            layers, with one input for each task on the batch of all tasks' inputs.
        shared_input: bool. True: one input for all tasks. False: a dict of one input per
            task, by name.
        heads: what comes after the backbone: an int, the classes (a `Dense` layer with
            softmax, for 1 with sigmoid; images of features are averaged first); a
            function of the features that returns the output tensor, or a Keras
            layer; or a dict of these by task name. None: the backbone's output.
        prior: a `TensorNormalRegularizer` for the stacked kernels, which learns how the
            tasks are related (DRN, MRN); or a dict of them by layer name or pattern, as for
            `sharing`. Each layer has covariances of its own. None: the regularizers
            of the backbone.
        implementation: `"auto"`, `"compose"` or `"contract"`, as in `TuckerConv2D`.
        threshold: for factorisations that are given by name, `"frobenius"` (the default) or
            `"singular_value"`, as in `TuckerConv2D`; for `"similar"`, the cosine from which
            kernels are shared: a number in [0, 1], `"related"` (0.4, the default),
            `"unrelated"` (0.55), a schedule, or a dict of these by layer name or pattern.
        between: layers that let tasks see each other's features: a function of the list of
            task names that returns a layer on grouped features, such as `CrossStitch` or
            `NDDR`, for which every pooling layer is followed by one; or a dict of such
            functions by layer name or pattern, after which layers they go. None: none.
        name: name of the model. None: that of the backbone and `_multitask`.
        verbose: bool, whether to print the report of the factorisations, if there
            are any: ranks, errors and parameters, as from `factorization_report`.

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
    names = task_names(tasks, "multitask")
    backbone = checked_functional(backbone, "multitask")
    survey = _survey(backbone, share_until)
    choose = _sharing_of(
        sharing, survey.with_weights, names, rank, tolerance, implementation, threshold
    )
    heads = _heads(heads, names)
    prior_of = _by_pattern("prior", prior, survey.with_weights, _check_prior)
    fusion_of = _fusion_of(between, survey)
    builder = _Builder(names, survey, choose, prior_of, fusion_of)
    inputs = _inputs(backbone, names, shared_input)
    features = builder.enter(backbone, inputs, shared_input)
    outputs = run(backbone, features, builder.visit)
    outputs = _outputs(builder, outputs, heads, names)
    name = name or exportable(f"{backbone.name}_multitask")
    model = MultiTaskModel(inputs, outputs, name=name)
    if verbose and factorization_report(model):
        print_report(model)
    return model


_POOLINGS = tuple(
    getattr(keras.layers, f"{kind}Pooling{axes}D")
    for kind in ("Max", "Average")
    for axes in (1, 2, 3)
)

# --- before anything is built ----------------------------------------------------


@dataclasses.dataclass
class _Survey:
    """What is known of the backbone.

    Attributes:
        shared: ids of the operations that all tasks share.
        with_weights: names of the layers with weights, in order.
        poolings: names of the pooling layers, but for global ones.
        layers: names of all layers.
        calls: how often each operation is called, by id.
    """

    shared: frozenset
    with_weights: list
    poolings: list
    layers: list
    calls: collections.Counter


class _Surveyed:
    """A symbolic tensor, and the ids of all operations that it depends on."""

    def __init__(self, spec, ids=frozenset()):
        self.spec = spec
        self.ids = ids


def _survey(backbone, share_until):
    """Look at every layer of the backbone.

    Raises:
        ValueError: if layers can't be converted, or there is no layer `share_until`.
    """
    problems, names, with_weights, calls = {}, {}, [], collections.Counter()
    poolings, layers = [], []

    def visit(operation, args, kwargs, path):
        values = values_in(_Surveyed, args, kwargs)
        shapes = [tuple(value.spec.shape) for value in values]
        problem = _problem(operation, args, kwargs, shapes)
        if problem is not None:
            place = "/".join((*path, operation.name))
            problems[id(operation)] = f"{type(operation).__name__} {place!r}{problem}"
        elif rules.rule_of(operation).has_weights and not calls[id(operation)]:
            with_weights.append(operation.name)
        if isinstance(operation, keras.layers.Layer) and not calls[id(operation)]:
            layers.append(operation.name)
            if isinstance(operation, _POOLINGS):
                poolings.append(operation.name)
        calls[id(operation)] += 1
        ids = frozenset([id(operation)]).union(*(value.ids for value in values))
        args, kwargs = replaced(_Surveyed, args, kwargs, lambda value: value.spec)
        outputs = output_spec(operation, args, kwargs)
        outputs = tree.map_structure(lambda spec: _Surveyed(spec, ids), outputs)
        leave(operation, outputs)
        return outputs

    def leave(operation, outputs):
        ids = frozenset().union(*(value.ids for value in tree.flatten(outputs)))
        names[operation.name] = names.get(operation.name, frozenset()) | ids

    run(backbone, tree.map_structure(_Surveyed, backbone.input), visit, leave)
    if problems:
        lines = "\n".join(f"- {line}" for line in problems.values())
        raise ValueError(
            f"multitask: model {backbone.name!r} has {len(problems)} layers that can't be "
            f"converted (see `dmtrl_keras.conversion.register_rule`):\n{lines}"
        )
    names.update({x.name: frozenset() for x in tree.flatten(backbone.input)})
    if share_until is not None and share_until not in names:
        raise ValueError(
            f"multitask: `share_until` must be the name of a layer of {backbone.name!r}. "
            f"Received: share_until={share_until!r}. Its layers are: {list(names)}."
        )
    shared = names.get(share_until, frozenset())
    return _Survey(shared, with_weights, poolings, layers, calls)


def _problem(operation, args, kwargs, shapes):
    rule = rules.rule_of(operation)
    if rule is None:
        return ""
    if getattr(operation, "data_format", None) == "channels_first":
        return ": channels_first"
    for value in tree.flatten((args, kwargs)):
        constant = not isinstance(value, (str, _Surveyed, keras.KerasTensor))
        if constant and np.ndim(value):
            return ": a constant tensor among its inputs"
    problem = rule.problem(operation, shapes)
    return None if problem is None else f": {problem}"


def _sharing_of(sharing, layers, names, rank, tolerance, implementation, threshold):
    """A function from a layer's name to its parameterization."""
    ranked = limited = False

    def factorized(kind):
        nonlocal ranked, limited
        ranked = True
        default = 0.1 if rank is None and tolerance is None else tolerance
        # A dict is for the similar kernels beside them.
        by_layer = threshold is None or isinstance(threshold, dict)
        limited = limited or not by_layer
        error = "frobenius" if by_layer else threshold
        return kind(rank, default, implementation, error)

    def similar():
        nonlocal limited
        limited = True
        by_layer = _by_pattern("threshold", threshold, layers, _similar_kernels)
        return lambda name: by_layer(name) or SimilarKernels()

    def resolve(choice):
        own = parameterizations.get(choice)
        if not isinstance(choice, parameterizations.Parameterization):
            if isinstance(own, SimilarKernels):
                return similar()
            if isinstance(own, FactorizedParameterization):
                own = factorized(type(own))
        own = own.with_names(names)
        return lambda name: own

    choose = _by_pattern("sharing", sharing, layers, resolve)
    if (rank is not None or tolerance is not None) and not ranked:
        raise ValueError(
            "multitask: `rank` and `tolerance` are for factorisations given by name, such "
            f"as 'tucker'. Received: sharing={sharing!r}, rank={rank!r}, "
            f"tolerance={tolerance!r}."
        )
    if threshold is not None and not limited:
        raise ValueError(
            "multitask: `threshold` is for 'similar' and for factorisations given by name. "
            f"Received: sharing={sharing!r}, threshold={threshold!r}."
        )
    independent = parameterizations.get("independent")

    def of_layer(name, convolution):
        make = choose(name)
        own = independent if make is None else make(name)
        # Layers that are named are meant.
        named = isinstance(sharing, dict)
        return own if convolution or named or not own.convolutions_only else independent

    return of_layer


def _similar_kernels(threshold):
    return None if threshold is None else SimilarKernels(threshold)


def _by_pattern(argument, value, layers, resolve):
    """A function from a layer's name to what an argument gives it, or None."""
    if not isinstance(value, dict):
        only = resolve(value)
        return lambda name: only
    patterns = {pattern: resolve(choice) for pattern, choice in value.items()}
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise ValueError(
                f"multitask: each key of `{argument}` must fit the name of a layer. "
                f"Received: {pattern!r}, which fits none of {layers}."
            )

    def choose(name):
        fitting = (own for p, own in patterns.items() if fnmatch.fnmatchcase(name, p))
        return next(fitting, None)

    return choose


def _fusion_of(between, survey):
    """A function from a layer's name to the function that makes what comes after it."""
    if callable(between):
        if not survey.poolings:
            raise ValueError(
                "multitask: `between` goes after the pooling layers, and the backbone has "
                "none. Give a dict by layer name or pattern. Its layers are: "
                f"{survey.layers}."
            )
        between = dict.fromkeys(survey.poolings, between)
    elif between is not None and not isinstance(between, dict):
        raise ValueError(
            "multitask: `between` must be a function of the task names that returns a "
            f"layer, or a dict of them. Received: {between!r}."
        )
    return _by_pattern("between", between, survey.layers, _check_fusion)


def _check_fusion(make):
    # A layer would be one for all places.
    if make is not None and (not callable(make) or isinstance(make, keras.layers.Layer)):
        raise ValueError(
            "multitask: `between` must have functions of the task names that return a "
            f"layer, such as `lambda tasks: CrossStitch(tasks)`. Received: {make!r}."
        )
    return make


def _check_prior(prior):
    if prior is not None and not isinstance(prior, TensorNormalRegularizer):
        raise ValueError(
            "multitask: `prior` must be a TensorNormalRegularizer, or a dict of them by "
            f"layer name. Received: {prior!r}."
        )
    return prior


def _heads(heads, names):
    """A dict by task name of None, ints, layers and functions."""
    if isinstance(heads, dict):
        if set(heads) != set(names):
            raise ValueError(
                f"multitask: `heads` must have one entry for each of the tasks "
                f"{list(names)}. Received: {sorted(map(str, heads))}."
            )
    elif isinstance(heads, keras.layers.Layer) and len(names) > 1:
        raise ValueError(
            f"multitask: the layer {heads.name!r} as `heads` would be one for all tasks. "
            "Give a function of the features that makes one, or a dict by task name."
        )
    else:
        heads = dict.fromkeys(names, heads)
    for task, head in heads.items():
        whole = isinstance(head, numbers.Integral) and not isinstance(head, bool)
        if not (head is None or callable(head) or (whole and head >= 1)):
            raise ValueError(
                f"multitask: the head of task {task!r} must be a positive int, a layer or "
                f"a function of the features. Received: {head!r}."
            )
    return heads


# --- building -----------------------------------------------------------------------


def _inputs(backbone, names, shared_input):
    def make(x, name):
        return keras.Input(x.shape[1:], dtype=x.dtype, name=name)

    if shared_input:
        return tree.map_structure(lambda x: make(x, x.name), backbone.input)
    if isinstance(backbone.input, keras.KerasTensor):
        return {task: make(backbone.input, task) for task in names}
    return {
        task: tree.map_structure(lambda x, t=task: make(x, f"{t}_{x.name}"), backbone.input)
        for task in names
    }


class _Features:
    """Features of the backbone, in each form in which the tasks need them.

    Attributes:
        form: the form in which they were computed: `"shared"`, the same for all tasks;
            `"batched"`, the batch of all tasks' examples; `"grouped"`; or `"apart"`, a
            dict of one input per task.
    """

    def __init__(self, builder, form, tensor, source):
        self._builder = builder
        self._source = source
        self._forms = {form: tensor}
        self.form = form

    @property
    def shape(self):
        """The shape that one task's features have."""
        tensor = self._forms[self.form]
        if self.form == "apart":
            return tuple(next(iter(tensor.values())).shape)
        tasks = len(self._builder.names) if self.form == "grouped" else 1
        return (*tensor.shape[:-1], tensor.shape[-1] // tasks)

    @property
    def common(self):
        """The form in which an ordinary layer serves all tasks at once; or None."""
        forms = {"shared": "shared", "batched": "batched", "apart": "batched"}
        return forms.get(self.form)

    def take(self, form):
        """The features in a given form."""
        if form not in self._forms:
            self._forms[form] = self._convert(form)
        return self._forms[form]

    def _convert(self, form):
        if form == "batched":
            layer, source = TaskBatch, "apart" if self.form == "apart" else "grouped"
        else:
            layer = {"apart": TaskStack, "shared": TaskRepeat, "batched": TaskGroup}
            layer, source = layer[self.form], self.form
        name = self._builder.new_name(f"{self._source}_{form}")
        return layer(list(self._builder.names), name=name)(self.take(source))


class _Builder:
    """Makes the layers of all tasks, call by call of the backbone."""

    def __init__(self, names, survey, choose, prior_of, fusion_of):
        self.names = names
        self.tasks = len(names)
        self._survey = survey
        self._choose = choose
        self._prior_of = prior_of
        self._fusion_of = fusion_of
        self._made = {}
        self._taken = set()

    def new_name(self, name, path=()):
        """A name that no other layer of the network has, from one and where it was."""
        candidates = [
            exportable("_".join((*path[start:], name)))
            for start in range(len(path), -1, -1)
        ]
        numbered = (f"{candidates[-1]}_{n}" for n in itertools.count(1))
        for candidate in itertools.chain(candidates, numbered):
            if candidate not in self._taken:
                self._taken.add(candidate)
                return candidate

    def enter(self, backbone, inputs, shared_input):
        """The features that the inputs of the network are."""
        self._taken.update(x.name for x in tree.flatten(inputs))
        if shared_input:
            return tree.map_structure(
                lambda x: _Features(self, "shared", x, x.name), inputs
            )
        apart = zip(*(tree.flatten(inputs[task]) for task in self.names))
        features = [
            _Features(self, "apart", dict(zip(self.names, parts)), x.name)
            for x, parts in zip(tree.flatten(backbone.input), apart)
        ]
        return tree.pack_sequence_as(backbone.input, features)

    def visit(self, operation, args, kwargs, path):
        """What a call of the backbone becomes; takes and returns `_Features`."""
        features = self._converted(operation, args, kwargs, path)
        make = self._fusion_of(operation.name)
        if make is None:
            return features
        if not isinstance(features, _Features) or features.form != "grouped":
            raise ValueError(
                f"multitask: after layer {operation.name!r} tasks have no features of "
                "their own for `between` to mix; they are shared there."
            )
        key = (id(operation), "fusion")
        if key not in self._made:
            layer = make(list(self.names))
            layer.name = self.new_name(f"{operation.name}_fusion", path)
            self._made[key] = layer
        layer = self._made[key]
        return _Features(self, "grouped", layer(features.take("grouped")), layer.name)

    def _converted(self, operation, args, kwargs, path):
        call = _Call(operation, args, kwargs, path)
        rule = rules.rule_of(operation)
        sharing = self._choose(operation.name, convolution=True)
        hard = id(operation) in self._survey.shared or sharing.name == "hard"
        forms = {features.common for features in call.features}
        made = {key for key in ("plain", "tasks") if (id(operation), key) in self._made}
        if forms != {None} and len(forms) == 1 and "tasks" not in made:
            if hard or not rule.has_weights:
                return self._plain(call, forms.pop())
        if rule.has_weights and "plain" in made:
            # A layer that is called again has the weights that it had before.
            return self._plain(call, "batched")
        if isinstance(rule, rules.Kernels):
            return self._kernels(call, rule)
        shapes = [features.shape for features in call.features]
        layer = self._made.get((id(operation), "tasks"))
        layer = layer or rule.grouped(operation, self.tasks, shapes)
        if layer is None:
            return self._plain(call, "batched")
        weights = _is_layer(layer) and rule.grouped_weights(operation, self.tasks)
        return self._run(call, layer, "tasks", "grouped", weights)

    def _plain(self, call, form):
        """The backbone's own layer, in a form in which it can serve all tasks."""
        layer = self._made.get((id(call.operation), "plain"))
        layer = layer or rules.copy_of(call.operation)
        weights = _is_layer(layer) and call.operation.get_weights()
        return self._run(call, layer, "plain", form, weights)

    def _run(self, call, layer, key, form, weights):
        key = (id(call.operation), key)
        fresh = key not in self._made
        if fresh:
            layer.name = self.new_name(call.operation.name, call.path)
            self._made[key] = layer
        args, kwargs = replaced(_Features, call.args, call.kwargs, lambda f: f.take(form))
        outputs = layer(*args, **kwargs)
        if fresh and weights:
            rules.load_weights(layer, weights)
        return tree.map_structure(lambda x: _Features(self, form, x, layer.name), outputs)

    def _kernels(self, call, rule):
        """A layer with kernels as layers with T kernels, one after another."""
        operation, features = call.operation, call.features[0]
        chain = self._made.get((id(operation), "tasks"))
        fresh = chain is None
        if fresh:
            # A layer that is called again may find other features then.
            once = self._survey.calls[id(operation)] == 1
            chain = []
            for part in rule.parts(operation, [features.shape]):
                shared_input = not chain and once and features.form == "shared"
                convolution = issubclass(part.cls, TaskConv)
                sharing = self._choose(operation.name, convolution)
                layer = self._task_layer(part, sharing, shared_input, call.path)
                prior = self._prior_of(operation.name)
                if prior is not None:
                    layer.kernel_regularizer = prior
                chain.append((layer, part.bias))
            self._made[id(operation), "tasks"] = chain
        for layer, bias in chain:
            x = layer(features.take("shared" if layer.shared_input else "grouped"))
            if fresh and bias is not None:
                layer.bias.assign(np.repeat(bias[:, None], self.tasks, axis=-1))
            features = _Features(self, "grouped", x, layer.name)
        activation = rule.activation(operation)
        if activation is None:
            return features
        return self._plain(_Call(activation, [features], {}, call.path), "batched")

    def _task_layer(self, part, sharing, shared_input, path):
        config = {**part.config, "name": self.new_name(part.config["name"], path)}
        config.update(tasks=self.tasks, shared_input=shared_input)
        layer = part.cls.from_config(config)
        kernel = part.kernel.astype("float64")
        try:
            factors = sharing.replicate(kernel, self.tasks)
        except ValueError as error:
            raise ValueError(
                f"multitask: layer {layer.name!r}, kernel {kernel.shape}: {error}"
            ) from error
        stacked = np.broadcast_to(kernel[..., None], (*kernel.shape, self.tasks))
        return with_factors(layer, sharing, stacked, factors)


@dataclasses.dataclass
class _Call:
    """One call of an operation of the backbone, with `_Features` as its tensors."""

    operation: keras.Operation
    args: list
    kwargs: dict
    path: tuple

    @property
    def features(self):
        """All features among the arguments."""
        return values_in(_Features, self.args, self.kwargs)


def _is_layer(operation):
    return isinstance(operation, keras.layers.Layer)


def _outputs(builder, outputs, heads, names):
    """A dict of the output tensor of each task."""
    flat = tree.flatten(outputs)
    if len(flat) > 1 and not all(callable(head) for head in heads.values()):
        raise ValueError(
            f"multitask: the backbone has {len(flat)} outputs. Give `heads`, a function "
            "for each task that makes one output tensor of them."
        )
    parts = [_per_task(builder, features) for features in flat]
    result = {}
    for task in names:
        features = tree.pack_sequence_as(outputs, [part[task] for part in parts])
        head = heads[task]
        if isinstance(head, numbers.Integral):
            features = _classes(features, head, builder.new_name(f"{task}_head"))
        elif head is not None:
            features = head(features)
        if not isinstance(features, keras.KerasTensor):
            raise ValueError(
                f"multitask: the head of task {task!r} must return one output tensor. "
                f"Received: {features!r}."
            )
        result[task] = features
    return result


def _per_task(builder, features):
    names = list(builder.names)
    if features.form == "shared":
        tensor = features.take("shared")
        return {
            task: keras.layers.Identity(name=builder.new_name(f"{task}_features"))(tensor)
            for task in names
        }
    name = builder.new_name("tasks")
    return TaskSplit(names, name=name)(features.take("grouped"))


def _classes(features, classes, name):
    if len(features.shape) > 2:
        axes = len(features.shape) - 2
        pooling = getattr(keras.layers, f"GlobalAveragePooling{axes}D")
        features = pooling(name=f"{name}_pooling")(features)
    activation = "softmax" if classes > 1 else "sigmoid"
    # Probabilities in full precision, whatever the backbone computes in.
    layer = keras.layers.Dense(classes, activation, name=name, dtype=keras.config.floatx())
    return layer(features)
