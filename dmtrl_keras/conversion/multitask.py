"""From a Keras model to the network of T tasks."""

import dataclasses
import itertools

import keras
import numpy as np
from keras import tree

from dmtrl_keras.conversion import rules
from dmtrl_keras.conversion.forms import Features
from dmtrl_keras.conversion.graph import (
    checked_functional,
    exportable,
    replaced,
    run,
    values_in,
)
from dmtrl_keras.conversion.heads import checked_heads, outputs_by_task
from dmtrl_keras.conversion.survey import by_pattern, survey
from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.ground.validation import task_names
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.mrn.regularizer import TensorNormalRegularizer
from dmtrl_keras.mtal.similar_kernels import SimilarKernels
from dmtrl_keras.tasks.conv import TaskConv
from dmtrl_keras.tasks.rewrite_models import (
    factorization_report,
    print_report,
    with_factors,
)
from dmtrl_keras.training.model import MultiTaskModel


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
    surveyed = survey(backbone, share_until)
    choose = _sharing_of(
        sharing, surveyed.with_weights, names, rank, tolerance, implementation, threshold
    )
    heads = checked_heads(heads, names)
    prior_of = by_pattern("prior", prior, surveyed.with_weights, _check_prior)
    fusion_of = _fusion_of(between, surveyed)
    builder = _Builder(names, surveyed, choose, prior_of, fusion_of)
    inputs = _inputs(backbone, names, shared_input)
    features = builder.enter(backbone, inputs, shared_input)
    outputs = run(backbone, features, builder.visit)
    outputs = outputs_by_task(builder, outputs, heads, names)
    name = name or exportable(f"{backbone.name}_multitask")
    model = MultiTaskModel(inputs, outputs, name=name)
    if verbose and factorization_report(model):
        print_report(model)
    return model


# --- before anything is built ----------------------------------------------------


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
        by_layer = by_pattern("threshold", threshold, layers, _similar_kernels)
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

    choose = by_pattern("sharing", sharing, layers, resolve)
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
    return by_pattern("between", between, survey.layers, _check_fusion)


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
            return tree.map_structure(lambda x: Features(self, "shared", x, x.name), inputs)
        apart = zip(*(tree.flatten(inputs[task]) for task in self.names))
        features = [
            Features(self, "apart", dict(zip(self.names, parts)), x.name)
            for x, parts in zip(tree.flatten(backbone.input), apart)
        ]
        return tree.pack_sequence_as(backbone.input, features)

    def visit(self, operation, args, kwargs, path):
        """What a call of the backbone becomes; takes and returns `Features`."""
        features = self._converted(operation, args, kwargs, path)
        make = self._fusion_of(operation.name)
        if make is None:
            return features
        if not isinstance(features, Features) or features.form != "grouped":
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
        return Features(self, "grouped", layer(features.take("grouped")), layer.name)

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
        args, kwargs = replaced(Features, call.args, call.kwargs, lambda f: f.take(form))
        outputs = layer(*args, **kwargs)
        if fresh and weights:
            rules.load_weights(layer, weights)
        return tree.map_structure(lambda x: Features(self, form, x, layer.name), outputs)

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
            features = Features(self, "grouped", x, layer.name)
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
    """One call of an operation of the backbone, with `Features` as its tensors."""

    operation: keras.Operation
    args: list
    kwargs: dict
    path: tuple

    @property
    def features(self):
        """All features among the arguments."""
        return values_in(Features, self.args, self.kwargs)


def _is_layer(operation):
    return isinstance(operation, keras.layers.Layer)
