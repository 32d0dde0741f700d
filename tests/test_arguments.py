"""Whatever a public name refuses, it refuses with an error of ours.

Every argument of every public constructor and function is given wrong types, NaN,
infinities, numbers out of range, huge ones, and arrays of a wrong rank. What is taken is
none of these tests' business. What is refused must say what was received and expected, and
by which class or function; a bare error from somewhere within helps nobody.
"""

import functools
import inspect
import pathlib
import re
import traceback
import types
import warnings

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import dmtrl_keras
from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TensorNormalRegularizer,
    layers,
    multitask,
    testing,
)
from dmtrl_keras.balancing import Balancing
from dmtrl_keras.ground.keras_private import sharing_scope
from dmtrl_keras.parameterizations import SimilarKernels
from dmtrl_keras.regularizers import ClusteredTasks, GroupLasso, MeanDeviation, TraceNorm

# Arguments that are Keras's own, which it checks itself: tried only where a case has them.
OF_KERAS = {"dtype", "name", "trainable"}
# What functions return, and bases whose constructors are not for direct use.
NOT_CALLED = {
    "dmtrl_keras.CombinedRegressions",
    "dmtrl_keras.Factorization",
    "dmtrl_keras.KernelSharing",
    "dmtrl_keras.LayerSummary",
    "dmtrl_keras.LossTerm",
    "dmtrl_keras.NormRegressions",
    "dmtrl_keras.RelatedRegressions",
    "balancing.Balanced",
    "balancing.Balancing",
    "balancing.Equal",
    "balancing.GLS",
    "balancing.LogLoss",
    "balancing.RLW",
    "balancing.Seen",
    "canonical_correlation.CanonicalCorrelation",
    "conversion.Kernels",
    "conversion.Rule",
    "layers.FactorizedLayer",
    "layers.FusionLayer",
    "layers.SimilarKernelLayer",
    "layers.TaskLayer",
    "parameterizations.Hard",
    "parameterizations.Independent",
    "parameterizations.Parameterization",
    "regularizers.KernelRegularizer",
    "regularizers.KernelState",
    "regularizers.MatrixNorm",
    "regularizers.StatefulRegularizer",
    "regularizers.TensorNormalState",
    "tensor_normal.TensorNormal",
}
EXAMPLES = 25

# That a rank of 1 is a bad idea is said, and not what is looked for here.
pytestmark = pytest.mark.filterwarnings("ignore:.*the task rank is 1")


def public():
    """Every public class and function, by its module and name; aliases once."""
    doors = [dmtrl_keras]
    doors += [vars(dmtrl_keras)[name] for name in dmtrl_keras.__all__]
    found = {}
    for door in [d for d in doors if isinstance(d, types.ModuleType)]:
        for name in door.__all__:
            thing = getattr(door, name)
            if callable(thing) and thing not in found.values():
                module = door.__name__.rpartition(".")[2]
                found[f"{module}.{thing.__name__}"] = thing
    return {**found, "testing.check_layer": testing.check_layer}


PUBLIC = public()
CALLED = sorted(set(PUBLIC) - NOT_CALLED)


class Case:
    """How a public name is called.

    Args:
        use: function of it and its arguments; None: it is called.
        skip: names of arguments that aren't tried.
        owners: other names by which an error may call it, such as that of what it makes.
        last: part of the error by which it refuses also the arguments given here, so that
            what takes seconds is never begun; None: it takes them.
        **arguments: valid ones, of those that have no default or are to be another.
    """

    def __init__(self, use=None, skip=(), owners=(), last=None, **arguments):
        self.use = use or (lambda thing, **given: thing(**given))
        self.skip = skip
        self.owners = owners
        self.last = last
        self.arguments = arguments

    def tried(self, thing):
        """The names of the arguments that are tried, a list."""
        named = [
            name
            for name, parameter in inspect.signature(thing).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        own = [name for name in named if name not in OF_KERAS]
        return [n for n in dict.fromkeys([*own, *self.arguments]) if n not in self.skip]


def built(shape, owners=(), **given):
    """A case of a layer, which is built too."""

    def use(cls, **arguments):
        inner = arguments.get("layer")
        if isinstance(inner, keras.layers.Layer):
            # The one of the case is built by no test, in whatever order they run.
            arguments["layer"] = type(inner).from_config(inner.get_config())
        layer = cls(**arguments)
        layer.build(shape)
        return layer.compute_output_shape(shape)

    return Case(use, owners=owners, **given)


def backbone():
    """A small network with a convolution, a pooling and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            keras.layers.Conv2D(2, 2, name="conv"),
            keras.layers.MaxPooling2D(name="pool"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(2, name="fc"),
        ]
    )


def of_earlier_version(tasks):
    """A network with names that are refused today, as from a file."""
    with sharing_scope():
        return MultiTaskModel(**in_and_out(tasks))


def in_and_out(names=("a", "b")):
    """Inputs and outputs of two tasks."""
    inputs = keras.Input((3,))
    return {
        "inputs": inputs,
        "outputs": {task: keras.layers.Dense(2)(inputs) for task in names},
    }


def vectors():
    """A compiled network of two tasks on vectors, with a prior."""
    inputs = keras.Input((3,))
    prior = TensorNormalRegularizer()
    x = layers.TaskDense(2, 2, kernel_regularizer=prior, shared_input=True)(inputs)
    model = MultiTaskModel(inputs, layers.TaskSplit(["a", "b"])(x))
    model.compile("sgd", "mse")
    return model


def batches():
    """A data set for `vectors`."""
    labels = {task: np.ones((4, 2)) for task in "ab"}
    return tf.data.Dataset.from_tensor_slices((np.ones((4, 3)), labels)).batch(2)


def nothing(*arguments, **named):
    """A function that makes nothing."""


class Unknown(keras.layers.Layer):
    """A layer of a user."""


@functools.cache
def cases():
    """A case for each public name that is called, by its module and name, a dict."""
    rng = np.random.default_rng(0)
    x, y, samples = (rng.normal(size=(8, *size)) for size in ((2,), (3,), (2, 3)))
    eyes = [np.eye(2), np.eye(3)]
    common = {"tasks": 2, "shared_input": False, "common_draw": True}
    dense = {"units": 2, "activation": None, "use_bias": True, **common}
    conv = {"filters": 2, "kernel_size": 2, "strides": 1, "padding": "same", **common}
    ranks = {"rank": 1, "tolerance": None, "threshold": "frobenius"}
    factors = {**ranks, "implementation": "auto"}
    tensor = {"tensor": rng.normal(size=(4, 3, 2)), **ranks}
    operands = {"x": samples, "whiteners": eyes}
    plain, similar = (
        multitask(backbone(), ["a", "b"], sharing, heads=1, verbose=False)
        for sharing in ("independent", SimilarKernels())
    )
    trained = vectors()
    regressions = {
        "x": {"a": samples[:, 0], "b": samples[:, 1]},
        "y": {"a": samples[:, 0, 0], "b": samples[:, 1, 0]},
    }
    relations = {"relations": Relation(), "label_similarity": {("a", "b"): 0.5}}
    found = {}
    for kind in ("LAF", "Tucker", "TT"):
        found[f"layers.{kind}Dense"] = built((None, 4), [kind], **dense, **factors)
        found[f"parameterizations.{kind}"] = Case(**factors)
    for axes in (1, 2, 3):
        shape = (None, *[4] * axes, 4)
        for kind in ("LAF", "Tucker", "TT"):
            found[f"layers.{kind}Conv{axes}D"] = built(shape, [kind], **conv, **factors)
        owners = ["SimilarKernels"]
        found[f"layers.SimilarKernelConv{axes}D"] = built(shape, owners, **conv)
        found[f"layers.TaskConv{axes}D"] = built(shape, **conv)
        found[f"layers.TaskConv{axes}DTranspose"] = built(shape, **conv)
        if axes < 3:
            depthwise = built(shape, kernel_size=2, tasks=2)
            found[f"layers.TaskDepthwiseConv{axes}D"] = depthwise
    for name in (
        *("TaskBatch", "TaskFlatten", "TaskGroup", "TaskRepeat", "TaskSplit"),
        *("CrossStitch", "NDDR", "TaskLayerNormalization", "TaskRMSNormalization"),
    ):
        found[f"layers.{name}"] = built((2, 4), tasks=2)
    found["parameterizations.LoRA"] = Case()
    methods = "Uncertainty DWA IMTLL FAMO STCH Scheduled MGDA PCGrad GradVac CAGrad NashMTL"
    methods += " IMTLG AlignedMTL UPGrad GradNorm MoCo ExcessMTL GradientBalancing"
    for name in methods.split():
        found[f"balancing.{name}"] = Case()
    found["balancing.get"] = Case(identifier="upgrad")
    found["balancing.names"] = Case()
    found["balancing.register"] = Case(cls=type("Own", (Balancing,), {"name": "own"}))
    found["layers.TaskCopies"] = built(
        (2, 4), layer=keras.layers.Dense(3, name="dense"), tasks=2
    )
    found["layers.TaskColumn"] = built((None, 4), latents=2, outputs=3)
    for name in ("TaskConcatenate", "TaskStack"):
        found[f"layers.{name}"] = built([(None, 4), (None, 4)], tasks=2)
    for name in ("laf", "tucker", "tt"):
        found[f"decomposition.{name}"] = Case(owners=["resolve_rank"], **tensor)
        found[f"decomposition.{name}_bounds"] = Case(shape=(4, 3, 2))
    for name in ("canonical_correlation", "task_similarity"):
        module = "dmtrl_keras" if name == "task_similarity" else name
        found[f"{module}.{name}"] = Case(owners=["canonical_correlation"], x=x, y=y)
    for name in (
        *("chance_of_sharing", "sharing_strength"),
        *("task_layers", "factorization_report"),
    ):
        found[f"dmtrl_keras.{name}"] = Case(model=plain)
    for name in ("task_covariance", "task_correlation"):
        found[f"dmtrl_keras.{name}"] = Case(model=trained)
    for name in ("mode_covariance", "mode_correlation"):
        found[f"dmtrl_keras.{name}"] = Case(model=trained, mode="task")
    for name in ("merge_similar_kernels", "kernel_sharing_ratio"):
        found[f"dmtrl_keras.{name}"] = Case(model=similar, verbose=False)
    for name in ("plot_hinton", "plot_heat_map"):
        found[f"dmtrl_keras.{name}"] = Case(matrices=np.eye(2), names=["a", "b"])
    found["dmtrl_keras.plot_eigenvectors"] = Case(matrices=np.eye(2), count=1)
    return found | {
        "layers.TaskDense": built((None, 4), **dense),
        "layers.TensorNormalPrior": built(
            (None, 4),
            layer=keras.layers.Dense(2),
            regularizer=TensorNormalRegularizer(modes="class"),
        ),
        "layers.TRL": built([(None, 4), (None, 4)], pairs=[(0, 1)]),
        "dmtrl_keras.ModeCovariance": Case(start=np.eye(2)),
        "dmtrl_keras.TensorNormalRegularizer": Case(
            lambda cls, **given: layers.TaskDense(
                2, 2, kernel_regularizer=cls(**given)
            ).build((1, 4)),
            owners=["ModeCovariance", "TaskDense"],
            modes=("task", "class"),
            start={"task": np.eye(2)},
            mean=np.zeros((2, 2, 1)),
        ),
        "dmtrl_keras.MultiTaskModel": Case(**in_and_out()),
        "dmtrl_keras.TaskRelationModel": Case(
            owners=["TaskRelations"], network=plain, **relations
        ),
        "dmtrl_keras.TaskRelations": Case(
            lambda cls, **given: MultiTaskModel(**in_and_out(), terms=[cls(**given)]),
            **relations,
        ),
        "dmtrl_keras.Relation": Case(
            lambda cls, **given: cls(**given).sets(("a", "b")), name="other"
        ),
        "dmtrl_keras.aggregate_similar_kernels": Case(
            kernels=rng.normal(size=(3, 2, 2)), threshold=0.5
        ),
        "dmtrl_keras.export_tasks": Case(
            last="'serve'",
            model=of_earlier_version(["a", "serve"]),
            filepath="folder",
        ),
        "dmtrl_keras.factorize": Case(
            owners=["Tucker", "TaskDense"], model=trained, method="tucker", verbose=False
        ),
        "dmtrl_keras.label_similarity": Case(
            owners=["Relation"], labels={"a": x[:, 0], "b": y}
        ),
        "dmtrl_keras.multitask": Case(
            owners=["LAF"],
            backbone=backbone(),
            tasks=["a", "b"],
            sharing="laf",
            rank=1,
            name="other",
            verbose=False,
        ),
        "dmtrl_keras.single_task": Case(model=plain, task="a", name="other"),
        "dmtrl_keras.add_task": Case(
            model=plain, name="c", head=2, data=(np.ones((4, 4, 4, 2)), [0, 1, 0, 1])
        ),
        "dmtrl_keras.remove_task": Case(model=plain, name="a"),
        "dmtrl_keras.plot_sharing_strength": Case(strengths={"fc": 0.5}),
        "dmtrl_keras.sharing_strength_of": Case(task_matrix=np.ones((3, 2))),
        "dmtrl_keras.relationship_network": Case(
            owners=["TaskDense 'bottleneck'", "TaskDense 'classifier'"],
            backbone=(4,),
            tasks=["a", "b"],
            classes=2,
            bottleneck=2,
            name="other",
        ),
        "dmtrl_keras.relationship_regression": Case(
            **regressions,
            owners=["TensorNormalRegularizer"],
            max_sweeps=2,
        ),
        "dmtrl_keras.norm_regression": Case(
            penalty=TraceNorm(0.1), max_steps=2, **regressions
        ),
        "dmtrl_keras.combined_regression": Case(latents=1, max_sweeps=2, **regressions),
        "dmtrl_keras.task_similarity_matrix": Case(
            owners=["canonical_correlation"], tasks=[x, y]
        ),
        "dmtrl_keras.task_summary": Case(model=plain, verbose=False),
        "dmtrl_keras.zip_tasks": Case(datasets={"a": (x, y)}, batch_size=2, seed=1),
        "callbacks.EarlyStoppingByTask": Case(),
        "callbacks.TaskImprovement": Case(baseline={"val_a_loss": 0.5}),
        "callbacks.TaskMonitor": Case(data=(x, y)),
        "metrics.improvement": Case(results={"a": 1.0}, baseline={"a": 0.5}),
        **{
            f"dmtrl_keras.{name}": Case(
                skip=["x", "y", "sample_weight"],
                model=trained,
                x=np.ones((8, 3)),
                y={task: np.ones((8, 2)) for task in "ab"},
            )
            for name in ("gradient_cosines", "task_affinity")
        },
        "dmtrl_keras.task_groups": Case(affinity=np.eye(3), most=2),
        "dmtrl_keras.task_relations": Case(model=trained),
        "conversion.register_rule": Case(
            lambda function, classes, **given: function(classes, **given), classes=Unknown
        ),
        "decomposition.check_choice": Case(**ranks, skip=["owner"]),
        "decomposition.resolve_rank": Case(rank=2, bounds=(3, 4), skip=["owner"]),
        **{
            f"decomposition.{kind}_ranks": Case(owners=[kind], shape=(3, 4, 2), rank=2)
            for kind in ("laf", "tucker", "tt")
        },
        "decomposition.truncation_rank": Case(
            singular_values=np.array([2.0, 1.0]), tolerance=0.1, norm=2.3
        ),
        "decomposition.mode_product": Case(tensor=samples, matrix=np.ones((4, 2)), mode=1),
        "decomposition.unfold": Case(tensor=samples, mode=1),
        "distribution.divisible": Case(count=10, batch_size=4, replicas=2),
        "distribution.make_strategy": Case(name="cpu"),
        "distribution.train": Case(model=trained, dataset=batches(), epochs=0),
        "losses.MaskedLoss": Case(loss="mse", name="other"),
        "losses.TaskHinge": Case(),
        "losses.one_vs_rest": Case(labels=np.array([0, 1]), tasks=2),
        "metrics.MaskedMetric": Case(metric="mae", name="other"),
        "metrics.MeanBinaryError": Case(),
        "metrics.MulticlassError": Case(),
        "optimizers.LearningRateMultiplier": Case(
            optimizer=keras.optimizers.SGD(), multipliers={"fc": 2}
        ),
        "optimizers.ProximalOptimizer": Case(optimizer=keras.optimizers.SGD()),
        "parameterizations.FactorizedParameterization": Case(**factors),
        "parameterizations.Parts": Case(),
        "parameterizations.SimilarKernels": Case(),
        "parameterizations.StoredOnce": Case(numbers=[[0, 0], [1, 2]]),
        "parameterizations.get": Case(identifier="tucker", skip=["owner"]),
        "parameterizations.names": Case(),
        "parameterizations.register": Case(last="registered already", cls=SimilarKernels),
        **{
            f"regularizers.{kind.__name__}": Case(
                lambda cls, **given: cls(**given)(np.ones((2, 2, 3)))
            )
            for kind in (ClusteredTasks, GroupLasso, MeanDeviation, TraceNorm)
        },
        "regularizers.mode_names": Case(order=3, task_axis=True),
        "tensor_normal.check_covariance": Case(
            owner="check_covariance", skip=["owner"], matrix=np.eye(2), size=2
        ),
        "tensor_normal.common_mean": Case(x=samples, whitener=np.eye(3), mode=1),
        "regularizers.SparseTaskPrecision": Case(alpha=0.1),
        "tensor_normal.graphical_lasso": Case(covariance=np.eye(2) + 1, alpha=0.1),
        "tensor_normal.flip_flop": Case(
            samples=samples, modes=(0, 1), start=eyes, mean=np.zeros((2, 3)), max_sweeps=2
        ),
        "tensor_normal.log_density": Case(x=samples, covariances=eyes, mean=samples[0]),
        "tensor_normal.log_determinant": Case(shape=(2, 3), whiteners=eyes),
        "tensor_normal.mode_covariance": Case(**operands, mode=1),
        "tensor_normal.mode_products": Case(x=samples, matrices=eyes),
        "tensor_normal.quadratic_form": Case(**operands),
        "tensor_normal.sample": Case(
            covariances=eyes, mean=samples[0], shape=(2, 3), seed=1
        ),
        "tensor_normal.whitener": Case(covariance=np.eye(2)),
        "testing.check_layer": Case(
            last="make_layer=None",
            make_layer=lambda **arguments: None,
            inputs=np.ones((2, 4), "float32"),
        ),
    }


# What no argument, or hardly any, can be. No small positive int is among them, which would
# be taken for a size.
HOSTILE = [
    *(None, "quick", "", b"x", True, -1, 0, 10**30, 2.5, 1e300, 1e-300),
    *(float("nan"), float("inf"), -float("inf"), 1j, {}, {"a": None}, object()),
    *([], [None], ["a", "a"], [float("nan")], (-1, 2.5), [[1.0], [2.0, 3.0]]),
    *(np.zeros(()), np.zeros((2, 0)), np.ones((2, 1, 2, 1)), np.full((2, 2), np.nan)),
    *(np.array(["a", "b"]), np.array([1j, 2.0]), np.array([None, object()])),
    *(np.ma.masked_array([1.0, 2.0], [True, False]), np.datetime64("2020"), nothing),
]
NUMBERS = st.one_of(st.floats(), st.integers(max_value=0), st.complex_numbers())
VALUES = st.one_of(
    st.sampled_from(HOSTILE),
    NUMBERS,
    st.text(max_size=3),
    st.lists(st.one_of(NUMBERS, st.text(max_size=2), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=2), NUMBERS, max_size=2),
)
ROOT = str(pathlib.Path(dmtrl_keras.__file__).parent)
EXPECTED = "must|[Ee]xpected|can't|can be|needs?|[Gg]ive|unknown|fits none|does nothing"


def problem_of(name, argument, value):
    """What is wrong with how a value is refused, or None."""
    if argument in ("path", "filepath") and isinstance(value, str) and value:
        # Any text is a path; whether there is such a folder, the system says.
        return None
    thing, case = PUBLIC[name], cases()[name]
    given = {**case.arguments, argument: value}
    return problem_in(lambda: case.use(thing, **given), [thing.__name__, *case.owners])


def problem_in(call, owners):
    """What is wrong with the error of a call, or None; it may name one of some owners."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        return None
    except Exception as error:
        text = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        complaints = {
            "another class": not isinstance(error, (ValueError, TypeError)),
            "not raised by the library": not frame.filename.startswith(ROOT),
            "says not what was received": "received" not in text.lower(),
            "says not what was expected": not re.search(EXPECTED, text),
            "names no owner": not any(owner in text for owner in owners),
        }
        found = [complaint for complaint, so in complaints.items() if so]
        where = f"{frame.filename}:{frame.lineno}"
        return f"{type(error).__name__}: {text[:300]} ({where}): {found}" if found else None


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    # A text may be a path.
    monkeypatch.chdir(tmp_path)


def test_every_public_name_has_a_case():
    """A new public name comes with how it is called; one that went takes its own along."""
    assert not NOT_CALLED & set(cases())
    assert {*NOT_CALLED, *cases()} == set(PUBLIC)


@pytest.mark.parametrize("name", CALLED)
def test_valid_arguments(name):
    """The arguments that are the ground of the others are taken."""
    case = cases()[name]
    if case.last is None:
        case.use(PUBLIC[name], **case.arguments)
    else:
        with pytest.raises(ValueError, match=case.last):
            case.use(PUBLIC[name], **case.arguments)


@pytest.mark.parametrize("name", CALLED)
def test_what_is_refused(name):
    """Some of the arguments and values of each name, the same at every run."""
    tried = cases()[name].tried(PUBLIC[name])
    if not tried:
        return

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(argument=st.sampled_from(tried), value=VALUES)
    def check(argument, value):
        assert problem_of(name, argument, value) is None, (argument, value)

    check()


TENSOR = np.ones((2, 4), "float32")
CALLS = [
    *(None, "quick", b"x", 5, 2.5, True, 1j, object(), nothing, [], {}, (), [None]),
    *([TENSOR], [TENSOR, TENSOR], (TENSOR, TENSOR), {"a": TENSOR}, {1: TENSOR, "a": None}),
    *([[TENSOR], [TENSOR]], [TENSOR, "a"], [TENSOR, np.ones((2, 4, 4, 1))]),
    *([[1.0, 2.0]], np.ones(()), np.ones(4), np.ones((1,) * 7), np.ones((2, 0))),
    *(np.array(["a", "b"]), np.array([None, object()]), tf.constant([["a", "b"]])),
    *(keras.Input(()), [keras.Input((4,)), keras.Input((4,))], {"a": keras.Input((4,))}),
    *(keras.Input((4,), dtype="string"), keras.Input((None,)), keras.Input((5, 5, 5, 5))),
]


@pytest.mark.parametrize("name", [n for n in CALLED if n.startswith("layers.")])
def test_calls_that_are_refused(name):
    """Every layer, called with what is no input of it, or of few layers."""
    cls = PUBLIC[name]
    problems = {}
    for inputs in CALLS:
        layer = cls(**cases()[name].arguments)
        said = problem_in(functools.partial(layer, inputs), [cls.__name__])
        if said:
            problems[repr(inputs)] = said
    assert not problems, "\n".join(f"{k}: {v}" for k, v in problems.items())


def no_layer(names):
    """What `between` must not be: it returns no layer."""
    return names


def trl(present):
    """A training step of a TRL of two tasks."""
    x = {"a": np.ones((4, 2), "float32"), "b": np.ones((4, 1), "float32")}
    return layers.TRL()(x, training=True, present=present)


ONES = np.ones(4)
FOUND = [
    (
        lambda: TensorNormalRegularizer(modes=None),
        "TensorNormalRegularizer: `modes` must be one or several .*modes=None",
    ),
    (
        lambda: TensorNormalRegularizer(start=np.eye(2)),
        "TensorNormalRegularizer: `start` must be a dict by modes.*ndarray of shape",
    ),
    (
        lambda: multitask(backbone(), 2, between=no_layer),
        "multitask: `between` must .*that return a layer.*'pool'.*task_0",
    ),
    (lambda: dmtrl_keras.factorize(None, "tt"), "factorize: `model` must be a Keras.*None"),
    (
        lambda: dmtrl_keras.relationship_network(5, ["a", "b"], 3),
        "relationship_network: `backbone` must be a Keras model, or the shape.*=5",
    ),
    (lambda: layers.TRL(pairs=5), "TRL 'trl.*: `pairs` must be a list of pairs.*pairs=5"),
    (lambda: Relation(pairs=5), "Relation 'output': `pairs` must be a list.*pairs=5"),
    (
        lambda: dmtrl_keras.task_similarity(ONES, ONES, ridge="a"),
        "canonical_correlation: `ridge` must be a number from 0 .*ridge='a'",
    ),
    (
        lambda: trl({"a": np.ones(4, bool)}),
        r"TRL 'trl.*: `present` must have tensors \(batch,\) .*\['a', 'b'\].*\{'a'",
    ),
    (
        lambda: dmtrl_keras.distribution.train(vectors(), batches().take(0)),
        "train: `dataset` must have one batch at least. Received: none",
    ),
    (
        # Nothing says its size before it is run through.
        lambda: dmtrl_keras.distribution.train(
            vectors(), batches().filter(lambda x, y: False)
        ),
        "train: `dataset` must have one batch at least. Received: none",
    ),
    (
        lambda: dmtrl_keras.distribution.train(vectors(), np.ones((4, 3))),
        "train: `dataset` must be a tf.data.Dataset of batches.*ndarray of shape",
    ),
    (
        lambda: dmtrl_keras.losses.one_vs_rest([0, 1], tasks=2.5),
        "one_vs_rest: `tasks` must be a positive int.*tasks=2.5",
    ),
    (
        lambda: layers.TaskDense(2, 2, shared_input="no"),
        "TaskDense: `shared_input` must be True or False.*='no'",
    ),
    (
        lambda: layers.TuckerDense(2, 2, implementation="quick"),
        'Tucker: `implementation` must be "auto", "compose" or "contract".*=\'quick\'',
    ),
    (
        lambda: dmtrl_keras.relationship_network((4,), ["a", "b"], classes=1),
        "relationship_network: `classes` must be 2 or more, since a softmax.*classes=1",
    ),
    (
        lambda: layers.TaskDense(2, 10**9),
        r"TaskDense: `tasks` must be a positive int, .*at most 100000\).*tasks=1000000000",
    ),
    (
        lambda: layers.TaskSplit(2)(np.ones(3)),
        r"TaskSplit 'task_split.*: expected one tensor \(batch, ..., .*least 2-dim.*\(3,\)",
    ),
    (
        lambda: layers.CrossStitch(2)([ONES, ONES]),
        r"CrossStitch 'cross.*: expected one tensor \(batch, ..., tasks \* channels\).*"
        r"inputs=\[ndarray of shape \(4,\), float64, ndarray.*\]\. .* by TaskStack",
    ),
    (
        lambda: layers.CrossStitch(2)(np.ones((2, 3))),
        "CrossStitch 'cross.*: expected a grouped input whose channels divide by tasks=2",
    ),
    (
        # Nothing is built at the second call.
        lambda: [(layer := layers.TaskDense(2, 2)), layer(TENSOR), layer({"a": TENSOR})],
        r"TaskDense 'task_dense.*: expected one tensor .*\{'a': ndarray of shape \(2, 4\)",
    ),
    (lambda: trl(5), "TRL 'trl.*: `present` must be a list or a dict .*present=5"),
    (
        lambda: multitask(backbone(), 2, between=lambda: layers.CrossStitch(2)),
        "multitask: `between` must .*called with the list of them.*<lambda>",
    ),
]


@pytest.mark.parametrize(("call", "message"), FOUND)
def test_found_in_the_field(call, message):
    """Each of these was an error of Python, NumPy or TensorFlow, or none."""
    with pytest.raises(ValueError, match=message):
        call()


def test_sigmoid_of_one_class():
    """One class of its own is fine where it isn't a softmax."""
    model = dmtrl_keras.relationship_network((4,), ["a", "b"], classes=1, binary=True)
    assert [tuple(x.shape) for x in model.output.values()] == [(None, 1)] * 2


def test_functions_of_users():
    """As in Keras, a layer takes functions that nobody registered; files ask for that."""
    layer = layers.TaskDense(
        2, 2, activation=lambda x: 2 * x, kernel_initializer="ones", shared_input=True
    )
    np.testing.assert_array_equal(layer(np.ones((1, 3))), np.full((1, 4), 6.0))


@pytest.mark.long
@pytest.mark.parametrize("name", CALLED)
def test_all_that_is_refused(name):
    """Every argument with every value."""
    problems = {
        f"{argument}={value!r}": problem_of(name, argument, value)
        for argument in cases()[name].tried(PUBLIC[name])
        for value in HOSTILE
    }
    assert not [f"{what}: {said}" for what, said in problems.items() if said]
