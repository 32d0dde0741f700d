"""What networks learned of their tasks; gradients by task; groups."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    TensorNormalRegularizer,
    gradient_cosines,
    multitask,
    sharing_strength,
    task_affinity,
    task_correlation,
    task_groups,
    task_relations,
)
from dmtrl_keras.callbacks import TaskMonitor
from dmtrl_keras.layers import NDDR, CrossStitch, TaskSplit
from dmtrl_keras.metrics import improvement
from dmtrl_keras.monitoring import groups as grouping

TASKS = ["age", "gender", "pose"]


def backbone():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(5, "tanh", name="fc"),
        ]
    )


def network(sharing="hard", **more):
    model = multitask(backbone(), TASKS, sharing, heads=1, verbose=False, **more)
    model.compile("sgd", "mse")
    return model


@pytest.fixture
def data(rng):
    """Twenty examples, of which the labels of the first task miss some."""
    x = rng.normal(size=(20, 6, 6, 2)).astype("float32")
    return x, {task: rng.normal(size=(20, 1)).astype("float32") for task in TASKS}


def by_hand(model, x, y):
    """Gradients by task over all examples, one after another: lists of arrays."""
    found = []
    for task in TASKS:
        with tf.GradientTape() as tape:
            error = model(x, training=False)[task] - y[task]
            loss = tf.reduce_mean(error**2)
        variables = [v.value for v in model.trainable_variables]
        found.append(tape.gradient(loss, variables))
    return found


def test_cosines_of_common_weights(data):
    """Those of the trunk, which all tasks have; heads do not count."""
    model = network()
    own = by_hand(model, *data)
    trunk = [n for n, v in enumerate(model.trainable_variables) if "head" not in v.path]
    expected = np.eye(3)
    for i, j in itertools.permutations(range(3), 2):
        one, other = (np.concatenate([np.ravel(own[k][n]) for n in trunk]) for k in (i, j))
        expected[i, j] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    before = [np.array(v) for v in model.variables]
    # The mean over batches of different lengths is that over all examples.
    found = gradient_cosines(model, *data, batch_size=8)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for old, new in zip(before, model.variables):
        np.testing.assert_array_equal(old, new)


def test_cosines_without_common_weights(data):
    """Independent kernels have nothing in common, factors have."""
    np.testing.assert_array_equal(
        gradient_cosines(network("independent"), *data), np.eye(3)
    )
    found = gradient_cosines(network("tucker", tolerance=0.5), *data)
    assert np.all(found[np.triu_indices(3, 1)] != 0)


def test_equal_and_opposite_tasks(data):
    """Equal labels and heads: 1; and a step for one task is a step for the other."""
    x, y = data
    y = dict.fromkeys(TASKS, y["age"])
    model = network()
    for task in TASKS:
        head = model.get_layer(f"{task}_head")
        sign = -1 if task == "pose" else 1
        head.set_weights([sign * w for w in model.get_layer("age_head").get_weights()])
    # The heads' activation is a sigmoid.
    labels = y | {"pose": 1 - y["age"]}
    np.testing.assert_allclose(
        gradient_cosines(model, x, labels), np.ones((3, 3)), atol=1e-5
    )
    found = task_affinity(model, x, labels)
    assert np.all(found > 0)
    # Off the diagonal the heads stay.
    np.testing.assert_allclose(found[0, 1], found[1, 0], rtol=1e-3)


def test_affinity_by_hand(data):
    """One batch: the loss before and after a step of gradient descent; all is as before."""
    model = network()
    x, y = data

    def losses():
        outputs = model(x, training=False)
        return np.array([np.mean((outputs[t] - y[t]) ** 2) for t in TASKS])

    start, gradients = losses(), by_hand(model, x, y)
    weights = model.get_weights()
    expected = np.zeros((3, 3))
    for i, own in enumerate(gradients):
        for variable, gradient in zip(model.trainable_variables, own):
            if gradient is not None:
                variable.assign_sub(0.1 * gradient)
        expected[i] = 1 - losses() / start
        model.set_weights(weights)
    found = task_affinity(model, x, y, learning_rate=0.1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for old, new in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_task_order_and_missing_labels(data):
    """Permuting the tasks permutes the matrices; what has no label changes nothing."""
    x, y = data
    y = {task: values.copy() for task, values in y.items()}
    y["age"][:5] = np.nan
    keras.utils.set_random_seed(0)
    model = multitask(backbone(), TASKS, "hard", heads=1, verbose=False)
    model.compile("sgd", _masked())
    other = multitask(backbone(), TASKS[::-1], "hard", heads=1, verbose=False)
    other.compile("sgd", _masked())
    for layer in other.layers:
        if layer.weights:
            layer.set_weights(model.get_layer(layer.name).get_weights())
    for function in (gradient_cosines, task_affinity):
        found = function(model, x, y)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(function(other, x, y), found[::-1, ::-1], atol=1e-6)


def _masked():
    from dmtrl_keras.losses import MaskedLoss

    return MaskedLoss("mean_squared_error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": backbone()}, "a `MultiTaskModel`"),
        ({"y": {"age": np.ones((20, 1)), "nose": np.ones((20, 1))}}, "labels by task"),
        ({"y": dict.fromkeys(TASKS, np.ones((19, 1)))}, r"lengths \[19, 20\]"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_refusals(data, arguments, message):
    given = {"model": network(), "x": data[0], "y": data[1]} | arguments
    for function in (gradient_cosines, task_affinity):
        with pytest.raises(ValueError, match=message):
            function(**given)


def test_not_compiled(data):
    model = multitask(backbone(), TASKS, "hard", heads=1, verbose=False)
    with pytest.raises(ValueError, match="expected a compiled model"):
        gradient_cosines(model, *data)


def partitions(items):
    """All partitions of a list."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for n, group in enumerate(smaller):
            yield [*smaller[:n], [first, *group], *smaller[n + 1 :]]


def worth(matrix, groups):
    """The sum over all pairs within groups, in both directions."""
    pairs = (pair for group in groups for pair in itertools.permutations(group, 2))
    return sum(matrix[pair] for pair in pairs)


@pytest.mark.parametrize("most", [None, 1, 2, 3])
def test_best_partition(rng, most):
    """Against all partitions of six tasks, one after another."""
    for _ in range(5):
        matrix = rng.normal(size=(6, 6))
        found = task_groups(matrix, most=most)
        numbers = [[int(name) for name in group] for group in found]
        assert sorted(itertools.chain(*numbers)) == list(range(6))
        every = [p for p in partitions(list(range(6))) if most is None or len(p) <= most]
        best = max(worth(matrix, p) for p in every)
        assert worth(matrix, numbers) == pytest.approx(best)


def test_many_tasks(rng, monkeypatch):
    """Planted groups of twenty tasks; on few tasks merging finds most of the best."""
    group = rng.permutation(np.repeat(range(4), 5))
    matrix = np.where(group[:, None] == group, 0.5, -0.2) + rng.normal(0, 0.05, (20, 20))
    found = task_groups(matrix, [f"t{k}" for k in range(20)])
    expected = [[f"t{k}" for k in np.flatnonzero(group == g)] for g in range(4)]
    assert sorted(found) == sorted(expected)
    assert len(task_groups(matrix, most=2)) == 2
    small = rng.normal(size=(7, 7))
    best = worth(small, [[int(n) for n in g] for g in task_groups(small)])
    monkeypatch.setattr(grouping, "MOST_EXACT", 3)
    found = worth(small, [[int(n) for n in g] for g in task_groups(small)])
    assert 0.8 * best <= found <= best + 1e-9


def test_similarities_need_a_threshold():
    """Of positive similarities all are one group; nothing is worth nothing."""
    matrix = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    assert task_groups(matrix) == [["0", "1", "2"]]
    assert task_groups(matrix, TASKS, threshold=0.5) == [["age", "gender"], ["pose"]]
    assert task_groups(np.zeros((3, 3))) == [["0"], ["1"], ["2"]]
    with pytest.raises(ValueError, match="3 different names"):
        task_groups(matrix, ["a", "b"])
    with pytest.raises(ValueError, match="square"):
        task_groups(matrix[:2])


def test_relations_of_every_kind(data):
    """Each has its matrix, which is what the other reports say."""
    x, y = data
    drn = network("independent", prior=TensorNormalRegularizer(0.1, update_every=1))
    drn.fit(x, y, verbose=0)
    found = task_relations(drn)
    assert list(found) == ["learned correlation, conv", "learned correlation, fc"]
    for name, matrix in task_correlation(drn).items():
        np.testing.assert_allclose(found[f"learned correlation, {name}"], matrix, atol=1e-6)
    tucker = network("tucker", tolerance=0.5)
    for name, strength in sharing_strength(tucker).items():
        matrix = task_relations(tucker)[f"cosine of S, {name}"]
        mean = matrix[np.triu_indices(3, 1)].mean()
        assert mean == pytest.approx(strength, abs=1e-5)
    stitch = network("independent", between={"conv": CrossStitch})
    (title,) = task_relations(stitch)
    assert title.startswith("weights of ")
    np.testing.assert_allclose(task_relations(stitch)[title].sum(axis=1), 1, atol=1e-6)
    (similar,) = task_relations(network("similar")).values()
    np.testing.assert_allclose(similar.sum(axis=1), 1, atol=1e-6)
    (sizes,) = task_relations(network("independent", between={"conv": NDDR})).values()
    np.testing.assert_allclose(sizes.sum(axis=1), 1, atol=1e-6)
    related = TaskRelationModel(network(), Relation("output", 0.1))
    related.compile("sgd", "mse")
    related.fit(x, y, verbose=0)
    values = related.similarities()["output"]
    matrix = task_relations(related)["similarity of the outputs"]
    assert matrix[1, 0] == pytest.approx(values["age", "gender"])
    assert task_relations(network()) == {}


def test_monitor(data, tmp_path):
    """Scalars and images are in the files, once an epoch, and the same in `history`."""
    model = network("tucker", tolerance=0.5)
    monitor = TaskMonitor(tmp_path, data, every=2)
    model.fit(*data, epochs=4, verbose=0, callbacks=[monitor])
    assert [found["epoch"] for found in monitor.history] == [1, 3]
    (file,) = (tmp_path / "tasks").iterdir()
    seen = {}
    for event in tf.compat.v1.train.summary_iterator(str(file)):
        for value in event.summary.value:
            kind = value.metadata.plugin_data.plugin_name
            seen.setdefault((kind or "more", value.tag), []).append(value)
    tags = {tag for _, tag in seen}
    assert {"sharing_strength/fc", "chance_of_sharing/conv"} <= tags
    assert {"gradient_cosines/age-gender", "cosine_of_S/fc/gender-pose"} <= tags
    assert {"affinity/age-pose", "affinity/pose-age", "gradient_cosines"} <= tags
    values = [
        float(tf.make_ndarray(one.tensor))
        for (_, tag), many in seen.items()
        if tag == "affinity/pose-age"
        for one in many
    ]
    expected = [found["affinity"][2, 0] for found in monitor.history]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_monitor_changes_nothing(data):
    """Training with it is training without it."""
    found = []
    for callbacks in ([], [TaskMonitor(data=data)]):
        keras.utils.set_random_seed(1)
        model = network()
        model.fit(*data, epochs=2, verbose=0, callbacks=callbacks)
        found.append(model.get_weights())
    for one, other in zip(*found):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"\(x, y\)"):
        TaskMonitor(data=data[0])
    plain = backbone()
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="MultiTaskModel"):
        plain.fit(data[0], np.ones((20, 5)), verbose=0, callbacks=[TaskMonitor()])


def test_monitor_of_a_network_that_diverged(data):
    """Training goes on; there is nothing to say."""
    model = network("tucker", tolerance=0.5)
    monitor = TaskMonitor(data=data)
    spoilt = {
        "on_epoch_begin": lambda epoch, logs: model.trainable_variables[0].assign(
            np.nan * np.ones(model.trainable_variables[0].shape)
        )
    }
    spoil = keras.callbacks.LambdaCallback(**spoilt)
    model.fit(*data, epochs=2, verbose=0, callbacks=[spoil, monitor])
    assert monitor.history == []


def test_order_of_the_tasks_and_tasks_without_loss(data, tmp_path):
    """Matrices are in the order of the outputs; without a loss there is nothing."""
    inputs = keras.Input((6,))
    features = keras.layers.Dense(6)(inputs)
    stitch = CrossStitch(TASKS, name="stitch")
    parts = keras.layers.Dense(1)
    split = TaskSplit(TASKS)(stitch(features))
    outputs = {task: parts(split[task]) for task in TASKS[::-1]}
    model = MultiTaskModel(inputs, outputs)
    alpha = np.arange(9.0).reshape(3, 3)
    stitch.alpha.assign(alpha)
    assert list(model.task_names) == TASKS[::-1]
    found = task_relations(model)["weights of stitch"]
    np.testing.assert_array_equal(found, alpha[::-1, ::-1])
    model.compile("sgd", {"age": "mse", "pose": "mse"})
    x, y = np.ones((8, 6)), {task: np.ones((8, 1)) for task in ("age", "pose")}
    cosines = gradient_cosines(model, x, y)
    assert cosines.shape == (3, 3) and cosines[1].tolist() == [0, 1, 0]
    assert task_affinity(model, x, y)[1].tolist() == [0, 0, 0]
    model.fit(x, y, verbose=0, callbacks=[TaskMonitor(tmp_path, (x, y))])


def test_improvement():
    """By hand; of names that are there."""
    alone = {"a_mae": 2.0, "b_accuracy": 0.5, "c_gain": -1.0}
    results = {"a_mae": 1.5, "b_accuracy": 0.6, "c_gain": -0.5, "loss": 9.0}
    mean, worst = improvement(results, alone, ["b_accuracy", "c_gain"])
    assert mean == pytest.approx((25 + 20 + 50) / 3) and worst == pytest.approx(20)
    with pytest.raises(ValueError, match=r"Received: \['c_gain'\]"):
        improvement({"a_mae": 1.0, "b_accuracy": 1.0}, alone)
    with pytest.raises(ValueError, match="a number"):
        improvement(results | {"a_mae": "1"}, alone)


def planted(seed, epochs):
    """The affinity of two functions of the inputs, each behind two tasks, by epoch."""
    names, rng = ["a", "b", "c", "d"], np.random.default_rng(seed)
    x = rng.normal(size=(200, 8)).astype("float32")
    first, second = rng.normal(size=(2, 8, 1)).astype("float32")
    noise = 0.1 * rng.normal(size=(4, 200, 1)).astype("float32")
    y = {n: x @ (first if n in "ab" else second) + e for n, e in zip(names, noise)}
    keras.utils.set_random_seed(seed)
    narrow = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="fc")])
    heads = {n: keras.layers.Dense(1, name=f"{n}_head") for n in names}
    model = multitask(narrow, names, "hard", heads=heads, verbose=False)
    model.compile(keras.optimizers.SGD(0.02), "mse")
    monitor = TaskMonitor(data=(x, y))
    model.fit(x, y, epochs=epochs, batch_size=50, verbose=0, callbacks=[monitor])
    return [found["affinity"] for found in monitor.history]


def found_after(affinities, epochs):
    groups = task_groups(np.mean(affinities[:epochs], axis=0), list("abcd"), most=2)
    return groups == [["a", "b"], ["c", "d"]]


def test_groups_of_planted_tasks():
    """Found by the affinity of the first epochs."""
    assert found_after(planted(3, 3), 3)


@pytest.mark.long
def test_affinity_is_early():
    """What the guide says: later, when all is learned, the affinity is that of noise."""
    every = [planted(seed, 10) for seed in range(6)]
    assert sum(found_after(own, 3) for own in every) >= 5
    assert sum(found_after(own, 10) for own in every) <= 3
