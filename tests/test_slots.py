"""The slots for ideas: each is filled from outside, and what is in them goes together."""

import ast
import math
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import dmtrl_keras
from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    TaskRelations,
    TensorNormalRegularizer,
    factorization_report,
    factorize,
    layers,
    multitask,
    parameterizations,
    single_task,
    task_correlation,
    task_summary,
)
from dmtrl_keras.kernels.plan import Geometry
from dmtrl_keras.kernels.task_kernel import TaskKernel
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric
from dmtrl_keras.parameterizations import LAF, SimilarKernels, Tucker

ROOT = pathlib.Path(dmtrl_keras.__file__).parent
TASKS = ["a", "b", "c"]


def backbone():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(4, 3, activation="tanh", name="conv"),
            keras.layers.MaxPooling2D(name="pool"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(5, "tanh", name="fc"),
        ],
        name="small",
    )


def heads():
    return {task: keras.layers.Dense(1, name=f"{task}_head") for task in TASKS}


def data(rng, n=24):
    x = rng.normal(size=(n, 6, 6, 1)).astype("float32")
    y = {t: x[:, i, i] + 0.1 * rng.normal(size=(n, 1)) for i, t in enumerate(TASKS)}
    return x, y


@pytest.fixture(scope="module")
def everything():
    """Factors, similar kernels, a prior, a fusion unit and relations in one network."""
    keras.utils.set_random_seed(0)
    network = multitask(
        backbone(),
        TASKS,
        sharing={"conv": SimilarKernels(0.3, update_every=2), "fc": Tucker(rank=0.9)},
        prior={"fc": TensorNormalRegularizer(0.1, epsilon=0.1)},
        between={"pool": layers.CrossStitch},
        heads=heads(),
        verbose=False,
    )
    relations = TaskRelations([Relation("output", 0.5), Relation("fc", 0.5)], momentum=0.5)
    model = MultiTaskModel(network.input, network.output, terms=[relations])
    x, y = data(np.random.default_rng(0))
    masked = {task: MaskedLoss("mse") for task in TASKS}
    metrics = {task: [MaskedMetric("mae", name="mae")] for task in TASKS}
    model.compile("adam", masked, metrics=metrics)
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
    return model, x, y, history


def test_everything_learns(everything):
    """Every part has moved, and its logs are there."""
    model, _, _, history = everything
    assert np.all(np.isfinite(history["loss"]))
    first, last = (sum(history[f"{t}_loss"][epoch] for t in TASKS) for epoch in (0, 1))
    assert last < first
    (correlation,) = task_correlation(model).values()
    assert np.abs(correlation - np.eye(3)).max() > 1e-3
    assert int(model.get_layer("conv").selection.step) == 6
    alpha = ops.convert_to_numpy(model.get_layer("pool_fusion").alpha)
    assert not np.allclose(alpha, 0.05 + 0.85 * np.eye(3))
    found = model.terms[0].similarities()
    assert len(found["fc"]) == 3 and 0 < found["fc"]["a", "b"] < 1
    assert {"a_mae", "b_loss", "fc_similarity_a_b", "label_similarity_b_c"} <= set(history)


def test_everything_stays_at_inference(everything):
    model, x, y, _ = everything
    before = [ops.convert_to_numpy(v) for v in model.variables]
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_everything_is_saved(everything, tmp_path):
    """In a `.keras` file with the terms' settings and state; trains on the same."""
    model, x, y, _ = everything
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is MultiTaskModel
    assert loaded.terms[0].similarities() == model.terms[0].similarities()
    assert loaded.terms[0].get_config() == model.terms[0].get_config()
    for a, b in zip(model.variables, loaded.variables):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    logs = [each.evaluate(x, y, verbose=0, return_dict=True) for each in (model, loaded)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    loaded.fit(x, y, batch_size=8, verbose=0)


def test_everything_is_seen(everything):
    """The summary knows each way to share; factors made of it keep the terms."""
    model, x, _, _ = everything
    rows = {row.layer: row.sharing for row in task_summary(model, verbose=False)}
    assert (rows["conv"], rows["fc"]) == ("similar", "tucker")
    assert rows["pool_fusion"] == "features"
    with pytest.raises(ValueError, match="mixes the features of the tasks"):
        single_task(model, "a")
    network = model.inference_network()
    assert not network.terms and network.get_layer("fc") is model.get_layer("fc")
    np.testing.assert_array_equal(network(x)["a"], model(x)["a"])


def test_terms_outlive_other_layers(rng):
    """`factorize` of a model with terms has copies of them, as they were."""
    network = multitask(backbone(), TASKS, heads=heads())
    model = TaskRelationModel(network, Relation("fc", 0.5), momentum=0.5)
    model.compile("sgd", "mse")
    x, y = data(rng)
    model.fit(x, y, verbose=0)
    new = factorize(model, "laf", rank=2, verbose=False)
    assert type(new) is TaskRelationModel
    assert new.similarities() == model.similarities()
    new.compile("sgd", "mse")
    new.fit(x, y, verbose=0)
    assert new.terms[0].similarities() != model.similarities()


def test_losses_by_task(rng):
    """Before they are added: each by itself; the total is their weighted sum."""
    network = multitask(backbone(), TASKS, heads=heads())
    x, y = data(rng)
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    losses = {"a": "mse", "b": MaskedLoss("mae"), "c": keras.losses.Huber()}
    network.compile("sgd", losses, loss_weights=weights)
    outputs = network(x)
    y["b"][:5] = np.nan
    found, given = network.task_losses(y, outputs)
    assert given == weights and list(found) == TASKS
    assert float(found["a"]) == pytest.approx(
        float(np.mean((outputs["a"] - y["a"]) ** 2)), rel=1e-5
    )
    present = np.abs(outputs["b"] - y["b"])[5:]
    assert float(found["b"]) == pytest.approx(float(np.mean(present)), rel=1e-5)
    total = network.compute_loss(x, y, outputs, training=False)
    expected = sum(float(found[task]) * weights[task] for task in TASKS)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="a dict of labels by task"):
        network.task_losses(y["a"], outputs)
    # Of a single task the labels alone will do, and a sample weight counts.
    alone = multitask(backbone(), ["only"], heads=1)
    alone.compile("sgd", "mse")
    outputs, weight = alone(x), np.arange(24.0)
    found, _ = alone.task_losses(y["a"], outputs, weight)
    expected = np.mean(weight * (outputs["only"] - y["a"])[:, 0] ** 2)
    assert float(found["only"]) == pytest.approx(float(expected), rel=1e-5)
    assert np.isfinite(alone.fit(x, y["a"], verbose=0).history["loss"][0])


def test_losses_as_keras_adds_them(rng):
    """`evaluate` and `fit` log what a plain Keras model of the same graph logs."""
    network = multitask(backbone(), TASKS, heads=heads(), verbose=False)
    network.get_layer("fc").kernel.regularizer = keras.regularizers.L2(0.1)
    plain = keras.Model(network.input, network.output)
    x, y = data(rng)
    logs = []
    for model in (network, plain):
        weights = dict(zip(TASKS, (1.0, 2.0, 3.0)))
        model.compile("sgd", dict.fromkeys(TASKS, "mse"), loss_weights=weights)
        logs.append(model.evaluate(x, y, verbose=0, return_dict=True))
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert set(logs[0]) == {"loss", "a_loss", "b_loss", "c_loss"}
    # Several losses of a task with weights of their own; tasks without a loss or labels.
    losses = {"a": ["mse", "mae"], "b": "mse", "c": None}
    weights = {"a": [1.0, 0.1], "b": 2.0, "c": 1.0}
    totals = []
    for model in (network, plain):
        model.compile("sgd", losses, loss_weights=weights)
        totals.append(model.evaluate(x, y, verbose=0, return_dict=True)["loss"])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    del y["c"]
    network.compile("sgd", {"a": "mse", "b": "mse", "c": None})
    assert np.isfinite(network.evaluate(x, y, verbose=0, return_dict=True)["loss"])


def test_no_paper_is_named():
    """`conversion` and `training` name no class of a paper's room, nor its modules."""
    papers = ("dmtrl", "mtal", "fusion", "mrn", "trn")
    classes = {
        node.name
        for paper in papers
        for path in (ROOT / paper).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {"Tucker", "SimilarKernels", "TensorNormalState", "TRL", "NDDR"} <= classes
    for room in ("conversion", "training", "tasks", "kernels", "ground"):
        for path in (ROOT / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "id", getattr(node, "attr", None))
                assert name not in classes, f"{path}, line {node.lineno}: {name}"


class Bilinear(keras.layers.Layer):
    """A layer with two kernels of each task: `x_t Q_t (x_t K_t)`, element by element."""

    def __init__(self, units, tasks, sharing, **kwargs):
        super().__init__(**kwargs)
        self.units, self.tasks, self.sharing = units, tasks, sharing
        for name in ("query", "key"):
            regularizer = TensorNormalRegularizer(0.1) if name == "key" else "l2"
            kernel = TaskKernel(
                parameterizations.get(sharing),
                tasks,
                f"Bilinear {name}",
                regularizer=keras.regularizers.get(regularizer),
                name=name,
            )
            setattr(self, name, kernel)

    def build(self, input_shape):
        for kernel in (self.query, self.key):
            kernel.build((input_shape[-1] // self.tasks, self.units))
            kernel.plan_for(Geometry(32, 1, 1))

    def call(self, inputs, training=None):
        parts = []
        for kernel in (self.query, self.key):
            kernel(training=training)
            parts.append(kernel.apply(inputs, training, None))
        return parts[0] * parts[1]

    def get_config(self):
        config = {"units": self.units, "tasks": self.tasks, "sharing": self.sharing}
        return {**super().get_config(), **config}


@pytest.mark.parametrize("sharing", ["independent", "tt"])
def test_several_kernels_in_one_layer(sharing, tmp_path, rng):
    """Each with its own variables, penalty and state, in files too."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, Bilinear(3, 2, sharing, name="bilinear")(inputs))
    x = rng.normal(size=(8, 6)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, np.ones((8, 6)), verbose=0)
    layer = model.layers[1]
    query, key = (ops.convert_to_numpy(k.value()) for k in (layer.query, layer.key))
    for task in range(2):
        own = x[:, 3 * task : 3 * task + 3]
        expected = (own @ query[..., task]) * (own @ key[..., task])
        np.testing.assert_allclose(model(x)[:, 3 * task : 3 * task + 3], expected, 1e-4)
    assert np.abs(layer.key.prior.covariances["task"] - np.eye(2)).max() > 1e-3
    assert layer.query.prior is None and len(model.losses) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Bilinear": Bilinear}
    )
    for a, b in zip(model.variables, loaded.variables):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)


def test_reports_survive_files(tmp_path):
    """What a factorisation did to each layer is known after loading."""
    model = multitask(backbone(), TASKS, "tucker", tolerance=0.2, verbose=False)
    report = factorization_report(model)
    assert [entry.layer for entry in report] == ["conv", "fc"]
    assert all(0 < entry.error <= 0.2 for entry in report)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert factorization_report(loaded) == report


@pytest.mark.parametrize(
    ("short", "sharing"),
    [
        ({"sharing": "tucker", "rank": 2}, Tucker(rank=2)),
        ({"sharing": "tucker"}, Tucker(tolerance=0.1)),
        ({"sharing": "laf", "tolerance": 0.3}, LAF(tolerance=0.3)),
        ({"sharing": "laf", "rank": {"conv": 2, "*": 3}}, {"conv": LAF(2), "fc": LAF(3)}),
    ],
    ids=str,
)
def test_short_forms(short, sharing):
    """A name with `rank` or `tolerance` is the object with these arguments."""
    found, expected = (
        [
            (layer.rank, layer.sharing.get_config(), type(layer))
            for layer in dmtrl_keras.task_layers(
                multitask(backbone(), TASKS, verbose=False, **arguments)
            )
        ]
        for arguments in (short, {"sharing": sharing})
    )
    assert found == expected


def test_deprecated_arguments():
    """They work, and say what to write instead."""
    with pytest.warns(DeprecationWarning, match=r"sharing=Tucker\(tolerance=0.1"):
        model = multitask(
            backbone(), TASKS, "tucker", implementation="compose", verbose=False
        )
    assert model.get_layer("fc").sharing.implementation == "compose"
    with pytest.warns(DeprecationWarning, match="SimilarKernels"):
        model = multitask(backbone(), TASKS, "similar", threshold={"conv": 0.7})
    assert model.get_layer("conv").sharing.threshold == 0.7
    assert model.get_layer("fc").sharing.name == "independent"
    with pytest.raises(ValueError, match=r"\['rank'\] are for parameterizations"):
        multitask(backbone(), TASKS, rank=2)


IDLE = [
    ({"prior": {"flat": TensorNormalRegularizer()}}, "fits none"),
    ({"sharing": "hard", "prior": TensorNormalRegularizer()}, "`prior` .* does nothing"),
    (
        {"share_until": "conv", "prior": {"conv": TensorNormalRegularizer()}},
        r"`prior` for layers \['conv'\] does nothing",
    ),
    ({"share_until": "conv", "sharing": {"conv": "tucker"}}, r"for the layers \['fc'\]"),
    ({"sharing": {"conv": "tucker"}, "rank": {"fc": 2}}, r"`rank` for layers \['fc'\]"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), IDLE, ids=["flat", "hard", "shared", "factors", "rank"]
)
def test_what_does_nothing_is_refused(arguments, message):
    """Layers that are named, and have no kernels for what was given."""
    with pytest.raises(ValueError, match=message):
        multitask(backbone(), TASKS, verbose=False, **arguments)


def test_names_of_relations(rng, tmp_path):
    """A name that TensorFlow would not take is cleaned, and exports."""
    relation = Relation("output", name="age and gender!")
    assert relation.name == "age_and_gender_"
    network = multitask(backbone(), TASKS, heads=heads())
    model = TaskRelationModel(network, relation)
    model.compile("sgd", "mse")
    x, y = data(rng)
    logs = model.fit(x, y, verbose=0).history
    assert "age_and_gender__similarity_a_b" in logs
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.similarities() == model.similarities()


def test_bad_terms(rng):
    """Features that are not those of the outputs, and unknown labels."""
    network = multitask(backbone(), TASKS, heads=heads())
    model = TaskRelationModel(network, Relation("fc"))
    model.compile("sgd", "mse")
    x, y = data(rng)
    with pytest.raises(ValueError, match="with `training=True` before `compute_loss`"):
        model.compute_loss(x, y, model(x), training=True)
    for terms, message in [
        (Relation("fc"), "a list of LossTerm"),
        ([Relation("fc")], "a list of LossTerm"),
        ([TaskRelations(Relation("fc")), TaskRelations(Relation())], "different names"),
        (list(model.terms), "belongs to another model"),
    ]:
        with pytest.raises(ValueError, match=message):
            MultiTaskModel(network.input, network.output, terms=terms)
    with pytest.raises(ValueError, match=r"also for \['b', 'c'\]"):
        model.task_losses({"a": y["a"]}, model(x))
    with pytest.raises(ValueError, match="give `compile` a `loss`"):
        network.task_losses(y, network(x))
    outputs = model(x, training=True)
    assert math.isfinite(float(model.compute_loss(x, y, outputs, training=True)))
