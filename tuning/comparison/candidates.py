"""The methods that are compared, each with what it can't be used on."""

import functools
import time
import typing

import keras
import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from dmtrl_keras import (
    TensorNormalRegularizer,
    norm_regression,
    relationship_regression,
    zip_tasks,
)
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.monitoring.relations import learned_of
from dmtrl_keras.mrn.report import correlation
from dmtrl_keras.regularizers import ClusteredTasks, GroupLasso, MeanDeviation, TraceNorm

from .. import application, hypermodels
from .problem import BINARY, CLASSES, REGRESSION, present

trainable_parameters = application("experiment").trainable_parameters

# Of a training; tables of few rows would have one step in an epoch.
LEAST_STEPS = 600

LOSSES = {
    REGRESSION: "mse",
    BINARY: keras.losses.BinaryCrossentropy(from_logits=True),
    CLASSES: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
}


class Trained(typing.NamedTuple):
    """A method that was trained.

    Attributes:
        predict: function from a dict of examples by task to a dict of outputs (logits of
            classes).
        weights: int, how many numbers were learned.
        model: the Keras model of a network, on examples that are scaled as `scale` says;
            else None.
        scale: what scales a table's rows: an object with `transform`; or None.
        relations: what was learned of the tasks, a `Relations`, or None.
        step_ms: float, the median time of a step of training in milliseconds, without
            tracing; None: there are no steps.
        flops: int, operations with floats for one example of every task; None: they can't
            be counted.
    """

    predict: typing.Callable
    weights: int
    model: typing.Any = None
    scale: typing.Any = None
    relations: typing.Any = None
    step_ms: float | None = None
    flops: int | None = None


class Relations(typing.NamedTuple):
    """What a method learned of the tasks.

    Attributes:
        title: str, what it is.
        matrix: array `(T, T)`.
    """

    title: str
    matrix: np.ndarray


class Candidate:
    """A method.

    Attributes:
        name: str.
        title: str, for tables.
        has_epochs: bool, whether it trains for a number of epochs.
        folds: int, on how many splits of the training part settings are tried.
    """

    name = None
    title = None
    has_epochs = False
    folds = 1

    def lack(self, problem):
        """Why it can't be used on a problem, a str; None if it can."""

    def declare(self, hp, problem):
        """Declare its hyperparameters, with `keras_tuner.HyperParameters`."""

    def train(self, problem, part, hp, options, epochs, seed):
        """Train on a part of the examples.

        Args:
            problem: `Problem`.
            part: dict from task to indices.
            hp: `keras_tuner.HyperParameters` with values.
            options: has `batch_size`.
            epochs: int.
            seed: int.

        Returns:
            A `Trained`.
        """
        raise NotImplementedError


CANDIDATES = {}


def register(candidate):
    """Make a candidate known to `compare`, by its name; returns it.

    Args:
        candidate: a `Candidate`.
    """
    CANDIDATES[candidate.name] = candidate
    return candidate


# --- linear models ------------------------------------------------------------------


class Linear(Candidate):
    """Linear models of rows of numbers, scaled by the training part."""

    # Cheap, and what is known of a setting from one split of a few rows is little.
    folds = 5

    def lack(self, problem):
        if not problem.tabular:
            return "it is for rows of numbers"
        return None

    def declare(self, hp, problem):
        hp.Float("strength", 1e-3, 1e3, sampling="log", default=1.0)

    def train(self, problem, part, hp, options, epochs, seed):
        x, y = problem.rows(part)
        scaler = problem.encoder(x)
        known = {t: present(labels) for t, labels in y.items()}
        x = {t: scaler.transform(values)[known[t]] for t, values in x.items()}
        y = {t: labels[known[t]] for t, labels in y.items()}
        predict, weights, *relations = self.fit(problem, x, y, hp)
        width = next(iter(x.values())).shape[1]
        return Trained(
            lambda new: predict(
                {t: scaler.transform(v) for t, v in problem.by_task(new).items()}
            ),
            weights,
            None,
            scaler,
            *(relations or [None]),
            # A product and a sum for each slope, and the intercept.
            flops=sum((2 * width + 1) * problem.outputs(t) for t in problem.tasks),
        )

    def fit(self, problem, x, y, hp):
        """`(predict, weights)` for scaled examples, and a `Relations` if there is one."""
        raise NotImplementedError


def _linear(kind, hp):
    strength = hp.get("strength")
    if kind == REGRESSION:
        return Ridge(alpha=strength)
    return LogisticRegression(C=1 / strength, max_iter=500)


def _outputs(model, x, outputs):
    """Logits or predictions `(n, outputs)`; classes that were not seen have none."""
    if isinstance(model, Ridge):
        return model.predict(x).reshape(len(x), -1)
    logits = model.decision_function(x).reshape(len(x), -1)
    if outputs == 1:
        return logits
    if logits.shape[1] == 1:
        logits = np.concatenate([-logits, logits], axis=1)
    found = np.full((len(x), outputs), -np.inf)
    found[:, model.classes_] = logits
    return found


class _Constant:
    """The only class that a task's training part has."""

    def __init__(self, label):
        self.label = int(label)

    def outputs(self, x, outputs):
        if outputs == 1:
            return np.full((len(x), 1), 1.0 if self.label else -1.0)
        return np.tile(np.eye(outputs)[self.label], (len(x), 1))


class RidgeByTask(Linear):
    """A linear model for each task, by itself: the honest baseline."""

    name = "ridge"
    title = "linear, by task"

    def fit(self, problem, x, y, hp):
        models = {}
        for task in problem.tasks:
            kind, labels = problem.kinds[task], y[task]
            if not len(labels):
                models[task] = _Constant(0)
            elif kind != REGRESSION and len(np.unique(labels)) < 2:
                models[task] = _Constant(labels[0])
            else:
                labels = labels if labels.ndim == 2 else labels.ravel()
                models[task] = _linear(kind, hp).fit(x[task], labels)

        def predict(new):
            return {
                t: models[t].outputs(v, problem.outputs(t))
                if isinstance(models[t], _Constant)
                else _outputs(models[t], v, problem.outputs(t))
                for t, v in new.items()
            }

        width = next(iter(x.values())).shape[1]
        weights = sum((width + 1) * problem.outputs(t) for t in problem.tasks)
        return predict, weights


class Pooled(Linear):
    """One linear model for all tasks, with an intercept for each."""

    name = "pooled"
    title = "linear, all shared"

    def lack(self, problem):
        lack = super().lack(problem)
        if lack is not None:
            return lack
        if problem.shared:
            return "the tasks have the same examples, so that one model has one answer"
        kinds = {(problem.kinds[t], problem.outputs(t)) for t in problem.tasks}
        if len(kinds) > 1:
            return f"the tasks are of different kinds: {sorted(kinds)}"
        return None

    def fit(self, problem, x, y, hp):
        tasks = problem.tasks
        kind, outputs = problem.kinds[tasks[0]], problem.outputs(tasks[0])
        # Of a scale with which the ridge hardly holds the intercepts.
        own = 10 * np.eye(len(tasks))

        def rows(values, task):
            return np.hstack([values, np.tile(own[tasks.index(task)], (len(values), 1))])

        every = np.concatenate([rows(x[t], t) for t in tasks])
        labels = np.concatenate([y[t].reshape(len(y[t]), -1).squeeze(-1) for t in tasks])
        model = _linear(kind, hp).fit(every, labels)
        width = x[tasks[0]].shape[1]
        return (
            lambda new: {t: _outputs(model, rows(v, t), outputs) for t, v in new.items()},
            (width + len(tasks)) * outputs,
        )


class RelatedRegressions(Linear):
    """Linear regressions with a tensor-normal prior: related tasks, of either sign."""

    name = "related"
    title = "linear, DRN"

    def lack(self, problem):
        lack = super().lack(problem)
        if lack is None and not problem.regression:
            lack = "it is for regressions of one number"
        return lack

    def declare(self, hp, problem):
        hp.Float("strength", 1e-2, 10, sampling="log", default=0.3)
        hp.Choice("epsilon", [0.01, 0.1, 1.0], default=0.1)

    def fit(self, problem, x, y, hp):
        spread = np.std(np.concatenate([np.ravel(v) for v in y.values()])) or 1.0
        scaled = {t: np.ravel(values) / spread for t, values in y.items()}
        model = self.solve(x, scaled, hp)

        def predict(new):
            return {t: v[:, None] * spread for t, v in model.predict(new).items()}

        return predict, model.kernel.size + model.bias.size, self.related(model)

    def related(self, model):
        """What the regressions say of the tasks."""
        return Relations("learned correlation", correlation(model.covariances["task"]))

    def solve(self, x, y, hp):
        """The regressions of targets with a deviation of one, with a method `predict`."""
        strength, epsilon = hp.get("strength"), hp.get("epsilon")
        prior = TensorNormalRegularizer(strength, epsilon=epsilon, mean="zero")
        return relationship_regression(x, y, prior)


class NormedRegressions(RelatedRegressions):
    """Linear regressions with a classic norm of all tasks' slopes.

    Args:
        name: str.
        title: str.
        penalty: function from a strength to the norm.
        middle: float, a strength in the middle of those that are tried.
    """

    def __init__(self, name, title, penalty, middle):
        self.name, self.title = name, title
        self._penalty, self._middle = penalty, middle

    def declare(self, hp, problem):
        low, high = self._middle / 30, self._middle * 30
        hp.Float("strength", low, high, sampling="log", default=self._middle)

    def related(self, model):
        slopes = model.kernel
        return Relations("cosine of the slopes", correlation(slopes.T @ slopes))

    def solve(self, x, y, hp):
        return norm_regression(x, y, self._penalty(hp.get("strength")), tolerance=1e-5)


def _clustered(strength):
    return ClusteredTasks(strength, clusters=2, between=0.1)


# --- networks -----------------------------------------------------------------------


class Network(Candidate):
    """A network of one of the families of `tuning.hypermodels`.

    Args:
        name: str.
        title: str.
        method: str, of `hypermodels.FAMILIES`.
        fixed: dict of the family's `defaults`.
    """

    has_epochs = True

    def __init__(self, name, title, method, fixed=None):
        self.name, self.title, self.method = name, title, method
        self._fixed = fixed or {}

    def lack(self, problem):
        if problem.backbone is None and not problem.tabular:
            return "examples that are no rows of numbers need a backbone"
        # However many columns a table has, once they are encoded.
        return self.hypermodel(problem, width=1).lack()

    def hypermodel(self, problem, width=None):
        """The hypermodel of its family.

        Args:
            problem: `Problem`.
            width: int, the columns of a table's rows as they were encoded.
        """
        family = hypermodels.FAMILIES[self.method]
        return family(
            self.method,
            functools.partial(backbone_of, problem, width),
            {t: _loss(problem, t) for t in problem.tasks},
            heads=_linear_heads(problem),
            shared_input=problem.shared,
            defaults=self._fixed,
        )

    def declare(self, hp, problem):
        train, _ = problem.rows(problem.everything())
        width = _scales(problem, train, problem.y).width
        self.hypermodel(problem, width).build(hp)

    def train(self, problem, part, hp, options, epochs, seed):
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(seed)
        x, y = problem.rows(part)
        scale = _scales(problem, x, y)
        model = self.hypermodel(problem, scale.width).build(hp)
        inputs, labels = scale.inputs(x), scale.labels(y)
        size = options.batch_size
        steps = -(-max(map(len, labels.values())) // size)
        # By the epochs of a whole training, of which successive halving takes a part.
        least = -(-LEAST_STEPS // options.epochs)
        clock = StepClock()
        if problem.shared:
            times = -(-least // steps)
            x = np.concatenate([next(iter(inputs.values()))] * times)
            labels = {t: np.concatenate([own] * times) for t, own in labels.items()}
            model.fit(x, labels, size, epochs, verbose=0, callbacks=[clock])
        else:
            data = {t: (inputs[t], labels[t]) for t in problem.tasks}
            # Every method sees as many examples of a task, short ones repeatedly.
            stream = zip_tasks(data, size, epoch=max(steps, least), seed=seed)
            model.fit(stream, epochs=epochs, shuffle=False, verbose=0, callbacks=[clock])

        def predict(new):
            inputs = scale.inputs(problem.by_task(new))
            if problem.shared:
                inputs = next(iter(inputs.values()))
            outputs = model.predict(inputs, 256, verbose=0)
            return scale.outputs(outputs)

        return Trained(
            predict,
            trainable_parameters(model),
            model,
            scale.x,
            relations_of(model),
            clock.median_ms(),
            flops_of(model),
        )


class StepClock(keras.callbacks.Callback):
    """How long the steps of a training take."""

    def __init__(self):
        super().__init__()
        self._taken = []
        self._started = None

    def on_train_batch_begin(self, batch, logs=None):
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._taken.append(time.perf_counter() - self._started)

    def median_ms(self):
        """Their median in milliseconds, without the first one, which is traced."""
        return 1000 * float(np.median(self._taken[1:] or self._taken))


def flops_of(model):
    """Operations with floats for one example of every task, by TensorFlow's profiler.

    Kernels that are composed from factors, or mixed, are so once, however many examples
    there are.

    Args:
        model: a functional Keras model.

    Returns:
        An int; None on other backends, and where a dimension but the batch is open.
    """
    inputs = keras.tree.flatten(model.input)
    # Of an open length the profiler counts nothing.
    if keras.backend.backend() != "tensorflow" or any(None in x.shape[1:] for x in inputs):
        return None
    profiler = tensorflow().compat.v1.profiler
    specs = keras.tree.map_structure(
        lambda x: tensorflow().TensorSpec((1, *x.shape[1:]), x.dtype), model.input
    )
    traced = tensorflow().function(lambda x: model(x, training=False))
    graph = traced.get_concrete_function(specs).graph
    counted = profiler.ProfileOptionBuilder.float_operation()
    silent = profiler.ProfileOptionBuilder(counted).with_empty_output().build()
    logger = tensorflow().get_logger()
    level = logger.level
    # That the profiler is of TensorFlow 1, it says at every graph.
    logger.setLevel("ERROR")
    try:
        return int(profiler.profile(graph, options=silent).total_float_ops)
    finally:
        logger.setLevel(level)


def relations_of(model):
    """What a network learned of its tasks, in its last layer that says something.

    Returns:
        A `Relations`, or None.
    """
    tasks = list(model.task_names)
    found = [one for one in learned_of(model) if one.of_tasks and one.names == tasks]
    if not found:
        return None
    # A pair that is not compared is one of which nothing is known.
    return Relations(found[-1].title, np.nan_to_num(found[-1].matrix))


def _linear_heads(problem):
    """Outputs without an activation: logits, as the losses take them, and regressions."""
    return {
        task: keras.layers.Dense(outputs, name=f"{task}_head", dtype=keras.config.floatx())
        for task, outputs in problem.heads.items()
    }


def _loss(problem, task):
    kind = problem.kinds[task]
    missing = float("nan") if kind == REGRESSION else -1
    return MaskedLoss(LOSSES[kind], missing)


def backbone_of(problem, width=None):
    """A problem's own backbone, or a small network of a table's rows."""
    if problem.backbone is not None:
        return problem.backbone()
    return keras.Sequential(
        [
            keras.Input((width,)),
            keras.layers.Dense(64, "relu", name="hidden1"),
            keras.layers.Dense(32, "relu", name="hidden2"),
        ]
    )


class _scales:
    """Rows and targets of mean zero and deviation one on the training part."""

    def __init__(self, problem, x, y):
        self.x, self.width = None, None
        if problem.tabular:
            self.x = problem.encoder(x)
            first = next(iter(x.values()))
            self.width = self.x.transform(first[:1]).shape[1]
        self.y = {
            t: StandardScaler().fit(y[t].reshape(len(y[t]), -1))
            for t in problem.tasks
            if problem.kinds[t] == REGRESSION
        }

    def inputs(self, x):
        if self.x is None:
            return x
        return {t: self.x.transform(v).astype("float32") for t, v in x.items()}

    def labels(self, y):
        found = {}
        for task, values in y.items():
            values = values.reshape(len(values), -1)
            scaled = task in self.y
            found[task] = self.y[task].transform(values) if scaled else values
        return {t: v.astype("float32") for t, v in found.items()}

    def outputs(self, outputs):
        return {
            t: self.y[t].inverse_transform(v) if t in self.y else v
            for t, v in outputs.items()
        }


for _one in (
    RidgeByTask(),
    Pooled(),
    NormedRegressions("mean", "linear, near their mean", MeanDeviation, 3.0),
    NormedRegressions("trace-linear", "linear, trace norm", TraceNorm, 0.1),
    NormedRegressions("group-linear", "linear, L2,1 norm", GroupLasso, 0.1),
    NormedRegressions("clustered", "linear, clustered", _clustered, 3.0),
    RelatedRegressions(),
    Network("stl", "STL", "independent"),
    Network("hard", "hard sharing", "hard"),
    Network("balanced", "hard sharing, balanced", "balanced"),
    Network("wide", "hard sharing, wider", "wide"),
    Network("cut", "hard sharing up to a layer", "cut"),
    Network("stitch", "Cross-Stitch", "stitch"),
    Network("nddr", "NDDR", "nddr"),
    Network("deviation", "near their mean", "deviation"),
    Network("trace", "trace norm", "trace"),
    Network("laf", "DMTRL-LAF", "laf", fixed={"tolerance": 0.3}),
    Network("tucker", "DMTRL-Tucker", "tucker", fixed={"tolerance": 0.3}),
    Network("tt", "DMTRL-TT", "tt", fixed={"tolerance": 0.3}),
    Network("lora", "LoRA", "lora"),
    Network("similar", "similar kernels (MTAL)", "similar"),
    Network("drn", "DRN", "drn"),
    Network("mrn", "MRN", "mrn"),
    Network("trn", "TRN", "trn"),
):
    register(_one)
