"""TaskRelationModel: losses, labels of all kinds, state, files, errors."""

import itertools
import json

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    factorize,
    label_similarity,
    layers,
    single_task,
    task_similarity,
    task_summary,
)
from dmtrl_keras.losses import MaskedLoss

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_network(units=None, hidden=6):
    """Two dense layers for each task; layers `<task>_hidden` and outputs by task."""
    units = {"pose": 5, "landmarks": 4} if units is None else units
    inputs = keras.Input((8,), name="x")
    outputs = {}
    for task, size in units.items():
        x = keras.layers.Dense(hidden, "tanh", name=f"{task}_hidden")(inputs)
        outputs[task] = keras.layers.Dense(size, name=task)(x)
    return MultiTaskModel(inputs, outputs)


def make_data(rng, n=96):
    """Inputs, integer classes and vectors that have something in common, `n` of each."""
    x = rng.normal(size=(n, 8)).astype("float32")
    pose = np.clip(np.rint(x[:, 0] + 2), 0, 4).astype(int)
    landmarks = x[:, :4] + 0.5 * rng.normal(size=(n, 4))
    return x, {"pose": pose, "landmarks": landmarks.astype("float32")}


HIDDEN = {"pose": "pose_hidden", "landmarks": "landmarks_hidden"}


def make_model(
    relations=None, network=None, losses=None, optimizer=None, eager=True, **kwargs
):
    """A compiled model; without a graph, which takes ten times as long as its few steps."""
    network = make_network() if network is None else network
    relations = Relation(weight=0.1) if relations is None else relations
    model = TaskRelationModel(network, relations, **kwargs)
    losses = {"pose": SPARSE, "landmarks": "mse"} if losses is None else losses
    optimizer = keras.optimizers.SGD(0.1) if optimizer is None else optimizer
    model.compile(optimizer, losses, run_eagerly=eager)
    return model


def state_of(model):
    return [ops.convert_to_numpy(v) for v in model.variables]


def by_hand(sets, ridge):
    """The similarity of two sets, written out: Algorithm 1 after one batch."""
    x = np.concatenate(sets, axis=1).astype("float64")
    d = sets[0].shape[1]
    whole = np.zeros((x.shape[1], x.shape[1]))
    for row in x - x.mean(axis=0):
        whole += np.outer(row, row) / (len(x) - 1)
    roots = []
    for block in (whole[:d, :d], whole[d:, d:]):
        values, vectors = np.linalg.eigh(block + ridge * np.diag(np.diag(block)))
        roots.append(vectors / np.sqrt(values) @ vectors.T)
    return np.linalg.svd(roots[0] @ whole[:d, d:] @ roots[1])[1][0]


def test_total_loss(rng):
    """Eq. 13 and 14, from outputs and features computed apart."""
    x, y = make_data(rng)
    relations = [Relation("output", 0.3), Relation(HIDDEN, 0.7)]
    settings = {"momentum": 0.4, "ridge": 1e-2, "eager": False}
    model = make_model(relations, optimizer="sgd", **settings)
    outputs = model.predict(x, verbose=0)
    hidden = keras.Model(
        model.input, [model.get_layer(HIDDEN[t]).output for t in ("pose", "landmarks")]
    )
    sets = {
        "output": [outputs["pose"], outputs["landmarks"]],
        "hidden": hidden.predict(x, verbose=0),
        "label": [np.eye(5)[y["pose"]], y["landmarks"]],
    }
    tau = {name: by_hand(pair, 1e-2) for name, pair in sets.items()}
    scores = outputs["pose"] - outputs["pose"].max(axis=1, keepdims=True)
    scores = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    expected = -np.mean(scores[np.arange(96), y["pose"]])
    expected += np.mean((outputs["landmarks"] - y["landmarks"]) ** 2)
    expected += 0.3 * abs(tau["output"] - tau["label"])
    expected += 0.7 * abs(tau["hidden"] - tau["label"])
    logs = model.fit(x, y, batch_size=96, verbose=0).history
    assert logs["loss"][0] == pytest.approx(expected, rel=1e-4)
    for name, value in tau.items():
        assert logs[f"{name}_similarity_pose_landmarks"][0] == pytest.approx(
            value, abs=1e-4
        )
        found = model.similarities()[name]["pose", "landmarks"]
        assert found == pytest.approx(value, abs=1e-4)


def test_a_target_instead_of_the_labels(tmp_path, rng):
    """The term is the distance to it; labels are compared where there is none."""
    x, y = make_data(rng)
    pair = ("pose", "landmarks")
    wrong = Relation("output", 0.3, target={pair[::-1]: 0.4})
    relations = [wrong, Relation(HIDDEN, 0.7)]
    model = make_model(relations)
    without = make_network()
    without.set_weights(model.network.get_weights())
    without.compile("sgd", {"pose": SPARSE, "landmarks": "mse"}, run_eagerly=True)
    expected = without.evaluate(x, y, batch_size=96, verbose=0, return_dict=True)["loss"]
    loss = model.train_on_batch(x, y, return_dict=True)["loss"]
    found = {name: value[pair] for name, value in model.similarities().items()}
    expected += 0.3 * abs(found["output"] - 0.4)
    expected += 0.7 * abs(found["hidden"] - found["label"])
    assert loss == pytest.approx(expected, rel=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.relations[0].target == wrong.target
    assert again.similarities() == model.similarities()
    # No labels are needed where all relations have a target.
    alone = make_model(Relation(target=0.4), losses={"landmarks": "mse"})
    alone.train_on_batch(x, {"landmarks": y["landmarks"]})
    assert list(alone.similarities()) == ["output"]
    with pytest.raises(ValueError, match="None, since every relation has a `target`"):
        make_model(Relation(target=0.4), label_similarity={pair: 0.5})
    with pytest.raises(ValueError, match=r"Relation 'output': `target`.*every pair of"):
        make_model(Relation(target={("pose", "age"): 0.5}))


def test_without_weight_it_is_the_network(rng):
    """With lambda 0 the weights are those of the network trained alone."""
    x, y = make_data(rng)
    model = make_model(Relation(weight=0.0))
    alone = make_network()
    alone.set_weights(model.network.get_weights())
    losses = {"pose": SPARSE, "landmarks": "mse"}
    alone.compile(keras.optimizers.SGD(0.1), losses, run_eagerly=True)
    for each in (model, alone):
        each.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(model.network.get_weights(), alone.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_similarity_goes_to_the_target(rng):
    """From above and from below; hidden features and outputs."""
    targets = {("a", "b"): 0.0, ("c", "d"): 1.0}
    units = {"a": 5, "b": 4, "c": 5, "d": 4}
    x = rng.normal(size=(512, 8)).astype("float32")
    y = {task: np.zeros((512, size)) for task, size in units.items()}
    pairs = list(targets)
    hidden = {task: f"{task}_hidden" for task in units}
    losses = dict.fromkeys(y, "mse")
    model = make_model(
        [Relation("output", 1.0, pairs), Relation(hidden, 1.0, pairs)],
        network=make_network(units),
        losses=losses,
        label_similarity={pair[::-1]: target for pair, target in targets.items()},
        momentum=0.0,
    )
    weights = dict.fromkeys(y, 0.0)
    model.compile(keras.optimizers.Adam(0.01), losses, loss_weights=weights)
    model.fit(x, y, batch_size=512, verbose=0)
    first = model.similarities()
    # More examples than features; the whole set in every batch, a hundred times.
    x = np.tile(x, (100, 1))
    y = {task: np.tile(values, (100, 1)) for task, values in y.items()}
    history = model.fit(x, y, batch_size=512, shuffle=False, verbose=0).history
    for name in ("output", "hidden"):
        for pair, target in targets.items():
            found, start = model.similarities()[name][pair], first[name][pair]
            assert abs(found - target) < 0.3 * abs(start - target)
    for (i, j), target in targets.items():
        assert history[f"label_similarity_{i}_{j}"][-1] == pytest.approx(target)


def binary(rng, n, width=1):
    return (rng.random((n, width)) < 0.4).astype("float32")


KINDS = {
    "integers": (5, SPARSE, lambda p, rng: p),
    "integers_in_a_column": (5, SPARSE, lambda p, rng: p[:, None]),
    "one-hot": (5, "categorical_crossentropy", lambda p, rng: np.eye(5)[p]),
    "binary": (1, "binary_crossentropy", lambda p, rng: (p > 2).astype("float32")),
    "binary_in_a_column": (1, "binary_crossentropy", lambda p, rng: (p > 2)[:, None] * 1),
    "multi-label": (
        3,
        "binary_crossentropy",
        lambda p, rng: np.concatenate([binary(rng, len(p), 2), (p > 2)[:, None]], axis=1),
    ),
    "regression": (1, "mse", lambda p, rng: p + rng.normal(size=len(p))),
}


def test_labels(rng):
    """The online similarity of one whole batch is the offline one, for every kind."""
    x, given = make_data(rng)
    y = {kind: make(given["pose"], rng) for kind, (_, _, make) in KINDS.items()}
    y["landmarks"] = given["landmarks"]
    units = {kind: size for kind, (size, _, _) in KINDS.items()} | {"landmarks": 4}
    losses = {kind: loss for kind, (_, loss, _) in KINDS.items()} | {"landmarks": "mse"}
    pairs = [(kind, "landmarks") for kind in KINDS]
    # In a graph, where the size of a batch is not known.
    model = make_model(
        Relation(weight=0.1, pairs=pairs),
        network=make_network(units),
        losses=losses,
        momentum=0.0,
        ridge=0.0,
        eager=False,
    )
    model.fit(x, y, batch_size=96, verbose=0)
    found = model.similarities()["label"]
    assert set(found) == set(pairs)
    offline = dict(y)
    offline["integers_in_a_column"] = offline["integers_in_a_column"][:, 0]
    for pair, expected in label_similarity(offline, pairs).items():
        assert found[pair] == pytest.approx(expected, abs=2e-3), pair
        assert 0.2 < expected < 1, pair


def test_missing_labels(rng):
    """By NaN, by a mark of the loss, by weights of zero; other values don't matter."""
    x, y = make_data(rng, 512)
    gone = rng.random((2, 512)) < 0.3
    labels = {"pose": y["pose"].astype("float32"), "landmarks": y["landmarks"].copy()}
    labels["pose"][gone[0]] = -1
    labels["landmarks"][gone[1], 2] = np.nan
    weights = {"pose": ~gone[0] * 1.0, "landmarks": ~gone[1] * 1.0}
    dummies = {
        "pose": np.where(gone[0], 3, y["pose"]),
        "landmarks": np.where(gone[1][:, None], 7.0, y["landmarks"]),
    }
    one_hot = np.eye(5)[y["pose"]]
    sets, present = [one_hot, y["landmarks"]], [~gone[0], ~gone[1]]
    both = present[0] & present[1]
    own = [np.cov(s[p].T) for s, p in zip(sets, present)]
    cross = np.cov(np.concatenate([s[both] for s in sets], axis=1).T)[:5, 5:]
    roots = []
    for block in own:
        values, vectors = np.linalg.eigh(block + 1e-3 * np.diag(np.diag(block)))
        roots.append(vectors / np.sqrt(values) @ vectors.T)
    expected = np.linalg.svd(roots[0] @ cross @ roots[1])[1][0]

    def check(model, y, sample_weight=None):
        logs = model.fit(
            x, y, sample_weight=sample_weight, batch_size=512, epochs=2, verbose=0
        ).history
        assert np.all(np.isfinite(logs["loss"]))
        for pair, found in model.similarities()["label"].items():
            assert found == pytest.approx(expected, abs=2e-3), pair

    # Two marks of missing classes, in a graph.
    losses = {
        "pose": MaskedLoss(SPARSE, missing=-1),
        "landmarks": MaskedLoss("mse"),
        "ignored": keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-1),
    }
    check(
        make_model(
            Relation(weight=0.1, pairs=[("pose", "landmarks"), ("ignored", "landmarks")]),
            make_network({"pose": 5, "landmarks": 4, "ignored": 5}),
            losses,
            momentum=0.0,
            eager=False,
        ),
        labels | {"ignored": labels["pose"]},
    )
    check(make_model(momentum=0.0), dummies, weights)


def test_label_similarity_offline(rng):
    """Against pairs one by one; groups; missing labels; errors."""
    _, y = make_data(rng)
    y["age"] = rng.normal(size=96) + y["pose"]
    vectors = {"pose": np.eye(5)[y["pose"]], "age": y["age"], "landmarks": y["landmarks"]}
    for (i, j), value in label_similarity(y).items():
        assert value == pytest.approx(task_similarity(vectors[i], vectors[j]))
    groups = {"face": ["pose", "landmarks"], "person": ["age"]}
    face = np.concatenate([vectors["pose"], vectors["landmarks"]], axis=1)
    found = label_similarity(y, groups=groups)
    assert found == {("face", "person"): pytest.approx(task_similarity(face, y["age"]))}
    y["age"][:10] = np.nan
    found = label_similarity(y, [("age", "landmarks")])["age", "landmarks"]
    assert found == pytest.approx(task_similarity(y["age"][10:], y["landmarks"][10:]))
    with pytest.raises(ValueError, match=r"unknown tasks \['wealth'\]"):
        label_similarity(y, [("age", "wealth")])
    with pytest.raises(ValueError, match=r"same examples.*'b': 4"):
        label_similarity(
            {"a": np.zeros(3), "b": np.zeros(4)}, groups={"g": ["a"], "h": ["b"]}
        )
    y["age"][:] = np.nan
    with pytest.raises(ValueError, match="no example has labels of both"):
        label_similarity(y)


def many(rng, tasks):
    """A network of many binary tasks by grouped layers, with data."""
    names = [f"attribute_{t}" for t in range(tasks)]
    inputs = keras.Input((8,))
    x = layers.TaskDense(3, tasks, shared_input=True, activation="tanh", name="own")(inputs)
    x = layers.TaskDense(1, tasks)(x)
    network = MultiTaskModel(inputs, layers.TaskSplit(names)(x))
    x = rng.normal(size=(256, 8)).astype("float32")
    y = {
        name: (x[:, t % 8] + 0.5 * rng.normal(size=256) > 0).astype("float32")
        for t, name in enumerate(names)
    }
    return network, names, x, y


@pytest.mark.parametrize("tasks", [12, pytest.param(40, marks=pytest.mark.long)])
def test_many_tasks(tasks, rng):
    """The paper's two groups of 20, and all 780 pairs, each in one computation."""
    network, names, x, y = many(rng, tasks)
    half = tasks // 2
    groups = {"first": names[:half], "second": names[half:]}
    relations = [Relation("own"), Relation("output", groups=groups)]
    losses = dict.fromkeys(names, "mse")
    model = make_model(relations, network, losses, momentum=0.0, ridge=1e-3)
    hidden = keras.Model(network.input, network.get_layer("own").output)
    hidden = hidden.predict(x, verbose=0)
    outputs = network.predict(x, verbose=0)
    history = model.fit(x, y, batch_size=256, verbose=0).history
    found = model.similarities()
    pairs = list(itertools.combinations(range(tasks), 2))
    assert len(found["own"]) == len(pairs) and len(found["label"]) == len(pairs) + 1
    for i, j in pairs[:: len(pairs) // 20]:
        pair = names[i], names[j]
        sides = hidden[:, 3 * i : 3 * i + 3], hidden[:, 3 * j : 3 * j + 3]
        expected = task_similarity(*sides, ridge=1e-3)
        assert found["own"][pair] == pytest.approx(expected, abs=1e-2)
        phi = abs(np.corrcoef(y[pair[0]], y[pair[1]])[0, 1])
        assert found["label"][pair] == pytest.approx(phi, abs=2e-3)
    for values, name in ((outputs, "output"), (y, "label")):
        flat = np.stack([np.ravel(values[task]) for task in names], axis=1)
        expected = task_similarity(flat[:, :half], flat[:, half:], ridge=1e-3)
        assert found[name]["first", "second"] == pytest.approx(expected, abs=1e-2)
    for name in ("own", "label"):
        mean = np.mean(list(found[name].values()))
        assert history[f"{name}_similarity"][0] == pytest.approx(mean, abs=1e-4)


def test_grouped_features_go_to_their_tasks(rng):
    """Also where the outputs come in another order than the channels."""
    inputs = keras.Input((8,))
    x = layers.TaskDense(3, 2, shared_input=True, name="own")(inputs)
    parts = layers.TaskSplit(["b", "a"])(x)
    outputs = {task: keras.layers.Dense(1)(parts[task]) for task in ("a", "b")}
    network = MultiTaskModel(inputs, outputs)
    relation = Relation("own", groups={"alone": ["a"], "other": ["b"]})
    model = TaskRelationModel(network, relation)
    x = rng.normal(size=(4, 8)).astype("float32")
    own = keras.Model(inputs, network.get_layer("own").output)(x)
    _, (features,) = model._training_graph.value(x)
    np.testing.assert_allclose(features["own"]["b"], own[:, :3], atol=1e-6)
    np.testing.assert_allclose(features["own"]["a"], own[:, 3:], atol=1e-6)


def test_state_stays_at_inference(rng):
    """`evaluate` and `predict` change nothing; the loss has the last estimates."""
    x, y = make_data(rng)
    model = make_model([Relation(weight=2.0), Relation(HIDDEN, 3.0)], momentum=0.5)
    model.fit(x, y, batch_size=32, epochs=2, verbose=0)
    model.run_eagerly = False
    before = state_of(model)
    logs = model.evaluate(x, y, batch_size=32, return_dict=True, verbose=0)
    model.predict(x, verbose=0)
    model(x)
    for a, b in zip(before, state_of(model)):
        np.testing.assert_array_equal(a, b)
    last = {n: v["pose", "landmarks"] for n, v in model.similarities().items()}
    for name, value in last.items():
        assert logs[f"{name}_similarity_pose_landmarks"] == pytest.approx(value)
    losses = {"pose": SPARSE, "landmarks": "mse"}
    model.network.compile("sgd", losses, run_eagerly=True)
    alone = model.network.evaluate(x, y, batch_size=32, return_dict=True, verbose=0)
    expected = alone["loss"] + 2 * abs(last["output"] - last["label"])
    expected += 3 * abs(last["hidden"] - last["label"])
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", [None, {("landmarks", "pose"): 0.25}])
def test_files(given, tmp_path, rng):
    """A `.keras` file trains on as the model would have; weights; the network alone."""
    x, y = make_data(rng)
    relations = [Relation("output", 0.5), Relation(HIDDEN, name="deep")]
    model = make_model(relations, label_similarity=given, momentum=0.5, ridge=1e-2)
    model.fit(x, y, batch_size=32, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is TaskRelationModel
    configs = [each.get_config() for each in (model, loaded)]
    # Keras writes further layers' shapes into the file.
    assert len({config.pop("network")["config"]["name"] for config in configs}) == 1
    assert configs[0] == configs[1]
    assert loaded.similarities() == model.similarities()
    for each in (model, loaded):
        each.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    for a, b in zip(state_of(model), state_of(loaded)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make_model(relations, label_similarity=given, momentum=0.5)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.similarities() == model.similarities()
    model.network.save(tmp_path / "network.keras")
    network = keras.saving.load_model(tmp_path / "network.keras")
    assert type(network) is MultiTaskModel
    np.testing.assert_allclose(network(x)["pose"], model(x)["pose"], atol=1e-6)
    names = {v.path.split("/")[-1] for v in network.variables}
    assert not names & {"covariance", "similarity", "seen"}


def test_export_has_the_network_alone(tmp_path, rng):
    """No moving covariances in a SavedModel; the outputs are the same."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("a SavedModel is TensorFlow's")
    from dmtrl_keras.ground.backend import tensorflow

    x, y = make_data(rng)
    model = make_model([Relation(), Relation(HIDDEN)])
    model.fit(x, y, verbose=0)
    model.export(str(tmp_path / "saved"), verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    expected = model.predict(x, verbose=0)
    found = loaded.serve(x)
    assert set(found) == {"pose", "landmarks"}
    np.testing.assert_allclose(found["pose"], expected["pose"], atol=1e-5)
    reader = tensorflow().train.load_checkpoint(str(tmp_path / "saved/variables/variables"))
    sizes = [tuple(s) for s in reader.get_variable_to_shape_map().values()]
    assert (8, 6) in sizes
    assert not {(9, 9), (12, 12)} & set(sizes)


@pytest.mark.filterwarnings("ignore:.*the task rank is 1")
def test_with_the_rest_of_the_library(rng):
    """One task alone, the summary, factorising the network, another relation on it."""
    network, _, x, y = many(rng, 3)
    model = TaskRelationModel(network, Relation("own"))
    alone = single_task(model, "attribute_1")
    np.testing.assert_allclose(alone(x), model(x)["attribute_1"], atol=1e-5)
    assert task_summary(model)[0].layer.startswith("own")
    smaller = factorize(model.network, "tucker", tolerance=0.5, keep_larger=True)
    again = make_model(Relation("own"), smaller, dict.fromkeys(y, "mse"))
    again.fit(x, y, verbose=0)
    assert model.tasks == 3 and model.task_names[0] == "attribute_0"
    assert model.relations[0].at == "own"
    assert model.network.get_layer("own") is model.get_layer("own")


@pytest.mark.long
def test_ways_to_run(rng):
    """Compiled, or several steps at once: the same as step by step without a graph."""
    x, y = make_data(rng)
    losses = {"pose": SPARSE, "landmarks": "mse"}
    network = make_network()
    start = network.get_weights()
    ways = [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}]
    results = []
    for settings in ways:
        network.set_weights(start)
        model = TaskRelationModel(network, Relation(HIDDEN, 1.0), momentum=0.5)
        model.compile(keras.optimizers.SGD(0.1), losses, **settings)
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        results.append(state_of(model))
    for way, result in zip(ways, results):
        for a, b in zip(results[0], result):
            np.testing.assert_allclose(a, b, atol=2e-4, err_msg=str(way))


def test_mixed_precision(rng):
    """Trains; similarities are in float32."""
    x, y = make_data(rng)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = make_model([Relation(), Relation(HIDDEN)], momentum=0.5)
        logs = model.fit(x, y, batch_size=32, verbose=0).history
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert np.isfinite(logs["loss"][0])
    assert 0 < model.similarities()["hidden"]["pose", "landmarks"] < 1


def test_configuration():
    """Relations and trackers come back from their configurations."""
    for target in (None, 0.5, {("f", "c"): 0.5}):
        relation = Relation("own", 0.5, [("f", "c")], {"f": ["a", "b"]}, "x", target)
        config = keras.saving.serialize_keras_object(relation)
        again = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
        assert again.get_config() == relation.get_config()
        assert again.target == target
    model = make_model(Relation(HIDDEN, groups={"f": ["pose"], "g": ["landmarks"]}))
    copy = TaskRelationModel.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    # A configuration of version 0.1 means what it meant.
    config = model.get_config()
    del config["estimate"], config["gradient"]
    settings = TaskRelationModel.from_config(config).terms[0].settings
    assert (settings["estimate"], settings["gradient"]) == ("mean", "moving")
    tracker = model.terms[0]._trackers["label"]
    assert tracker.from_config(tracker.get_config()).names == tracker.names
    with pytest.raises(ValueError, match="no sample weights"):
        tracker.update_state([0.5], sample_weight=[1.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"at": 3}, "`at` must be .*at=3"),
        ({"at": {}}, "`at` must be"),
        ({"at": {"pose": 1}}, "`at` must be"),
        ({"weight": -1}, "Relation 'output': `weight` must be a number.*weight=-1"),
        ({"groups": ["pose"]}, "`groups` must be a dict"),
        ({"groups": {"a": []}}, "`groups` must be a dict"),
        ({"groups": {"a": ["b", "b"]}}, "`groups` must be a dict"),
        ({"pairs": [("a", "a")]}, "pairs of two different tasks"),
        ({"pairs": []}, "pairs of two different tasks"),
        ({"target": 1.5}, r"Relation 'output': `target` .*in \[0, 1\].*target=1.5"),
        ({"target": {("a", "b"): -1}}, "`target` must be"),
        ({"target": {"a": 0.5}}, "`target` must be"),
        ({"target": {}}, "`target` must be"),
    ],
)
def test_bad_relations(arguments, message):
    """The error says what was received."""
    with pytest.raises(ValueError, match=message):
        Relation(**arguments)


@pytest.mark.parametrize(
    "relations, message",
    [
        (Relation(pairs=[("pose", "smile")]), r"unknown tasks \['smile'\].*'landmarks'"),
        (Relation(groups={"a": ["pose", "smile"], "b": ["landmarks"]}), "unknown tasks"),
        (Relation({"pose": "pose_hidden", "x": "y"}), r"unknown tasks \['x'\]"),
        (Relation({"pose": "pose_hidden"}), "two tasks or groups at least"),
        (
            Relation({"pose": "pose_hidden"}, groups={"a": ["landmarks"], "b": ["pose"]}),
            r"unknown tasks \['landmarks'\]",
        ),
        (Relation(HIDDEN | {"pose": "nose"}), "unknown layer 'nose'.*'pose_hidden'"),
        (Relation("nose"), "unknown layer 'nose' in Relation 'nose'"),
        (Relation("pose_hidden"), "channels of all tasks side by side"),
        (Relation(groups={"pose": ["landmarks"], "b": ["pose"]}), "names of tasks"),
        (
            Relation(groups={"a": ["pose"], "b": ["pose", "landmarks"]}),
            "have tasks in common",
        ),
        ([Relation(), Relation()], "different names.*'output', 'output'"),
        (Relation(name="label"), "none may be"),
        ([], "a Relation or a list of them"),
        ("output", "a Relation or a list of them"),
        (
            [
                Relation(groups={"a": ["pose"], "b": ["landmarks"]}),
                Relation(HIDDEN, groups={"b": ["pose"], "a": ["landmarks"]}),
            ],
            "different tasks in different relations",
        ),
    ],
)
def test_relations_that_do_not_fit(relations, message):
    """Unknown names and impossible pairs: the error lists what there is."""
    with pytest.raises(ValueError, match=message):
        TaskRelationModel(make_network(), relations)


def test_bad_models(rng):
    """Networks, similarities and settings that can't be."""
    inputs = keras.Input((8,))
    with pytest.raises(ValueError, match="must be a dict from task name"):
        TaskRelationModel(keras.Model(inputs, keras.layers.Dense(1)(inputs)), Relation())
    with pytest.raises(ValueError, match="functional or built Sequential"):
        TaskRelationModel("network", Relation())
    for given in ({}, {("pose", "landmarks"): 1.5}, 0.5):
        with pytest.raises(ValueError, match=r"number in .0, 1. for every pair"):
            TaskRelationModel(make_network(), Relation(), given)
    with pytest.raises(ValueError, match="`momentum` must be"):
        TaskRelationModel(make_network(), Relation(), momentum=1.0)
    images = keras.Input((None, 3))
    outputs = {t: keras.layers.Dense(2)(images) for t in "ab"}
    with pytest.raises(ValueError, match="features of known sizes"):
        TaskRelationModel(MultiTaskModel(images, outputs), Relation())


def test_bad_batches(rng):
    """Batches of one, NaN, absent labels, labels of another shape, no call before."""
    x, y = make_data(rng)
    with pytest.raises(Exception, match=r"(two examples|examples, two) at least"):
        make_model().fit(x, y, batch_size=1, verbose=0)
    # The last batch of an epoch may have one example.
    model = make_model(eager=False)
    history = model.fit(x[:33], {t: v[:33] for t, v in y.items()}, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    bad = x.copy()
    bad[5] = np.nan
    with pytest.raises(Exception, match="not finite"):
        model.fit(bad, y, verbose=0)
    model = make_model(losses={"landmarks": "mse"})
    with pytest.raises(ValueError, match="expected labels of task 'pose'"):
        model.fit(x, {"landmarks": y["landmarks"]}, verbose=0)
    given = make_model(
        losses={"landmarks": "mse"}, label_similarity={("pose", "landmarks"): 0.5}
    )
    given.fit(x, {"landmarks": y["landmarks"]}, verbose=0)
    with pytest.raises(ValueError, match="with `training=True` before"):
        model.compute_loss(x, y, model(x), training=True)
    model = make_model(losses={"pose": SPARSE})
    wrong = y | {"landmarks": np.zeros((96, 3))}
    with pytest.raises(ValueError, match=r"task 'landmarks': expected labels that match"):
        model.fit(x, wrong, verbose=0)


@pytest.mark.parametrize("function", [None, lambda x: type(x).from_config(x.get_config())])
def test_clone_keeps_relations(function, rng):
    """A model of the same class, relations and settings, with state of its own."""
    x, y = make_data(rng)
    model = make_model([Relation("output", 0.3)], momentum=0.4, ridge=1e-2)
    model.train_on_batch(x, y)
    clone = keras.models.clone_model(model, clone_function=function)
    assert type(clone) is TaskRelationModel
    assert clone.get_config()["relations"] == model.get_config()["relations"]
    assert clone.terms[0].settings == model.terms[0].settings
    assert clone.similarities()["output"] == {("pose", "landmarks"): 0}
    clone.set_weights(model.get_weights())
    assert clone.similarities() == model.similarities()
    model.reset_metrics()  # Of the batch before, on older Keras.
    losses = [m.train_on_batch(x, y, return_dict=True)["loss"] for m in (model, clone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_frozen_relations(rng):
    """Their covariances don't move; the gradient flows on."""
    x, y = make_data(rng)
    model = make_model(momentum=0.4)
    model.train_on_batch(x, y)
    model.terms[0].trainable = False
    before = [ops.convert_to_numpy(w) for w in model.terms[0].weights]
    kernel = ops.convert_to_numpy(model.get_layer("pose_hidden").kernel)
    model.train_on_batch(x, y)
    for old, new in zip(before, model.terms[0].weights):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))
    assert np.any(kernel != ops.convert_to_numpy(model.get_layer("pose_hidden").kernel))
    model.terms[0].trainable = True
    model.train_on_batch(x, y)
    assert np.any(before[0] != ops.convert_to_numpy(model.terms[0].weights[0]))


def test_relation_in_an_edited_network(rng):
    """Channels are those of the tasks' outputs, whatever was removed or renamed."""
    inputs = keras.Input((8,))
    x = layers.TaskDense(4, 3, shared_input=True, common_draw=False, name="fc")(inputs)
    features = layers.TaskSplit(["a", "b", "c"])(x)
    outputs = {"last": features["c"], "first": features["a"]}
    model = TaskRelationModel(
        MultiTaskModel(inputs, outputs), Relation("fc"), momentum=0.4, ridge=1e-2
    )
    model.compile("sgd", "mse", run_eagerly=True)
    x = rng.normal(size=(64, 8)).astype("float32")
    sets = [ops.convert_to_numpy(model(x)[task]) for task in ("last", "first")]
    expected = by_hand(sets, ridge=1e-2)
    labels = {task: rng.normal(size=(64, 4)) for task in outputs}
    model.train_on_batch(x, labels)
    found = model.similarities()["fc"]
    assert found[("last", "first")] == pytest.approx(expected, rel=1e-3)
