"""add_task and remove_task: what is old stays equal to the bit."""

import functools

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import (
    ModeCovariance,
    MultiTaskModel,
    TensorNormalRegularizer,
    add_task,
    layers,
    multitask,
    remove_task,
    single_task,
    task_summary,
)
from dmtrl_keras.conversion.growing import _leave_one_out_error

TASKS = ("a", "b", "c")
HEADS = {"a": 2, "b": 3, "c": 2}
FACTORS = ("laf", "tucker", "tt")


def backbone():
    """With convolutions, batch normalization, a dense layer."""
    inputs = keras.Input((6, 6, 2))
    x = kl.Conv2D(3, 3, name="conv1")(inputs)
    x = kl.ReLU()(kl.BatchNormalization(name="norm")(x))
    x = kl.MaxPooling2D()(kl.SeparableConv2D(4, 2, name="conv2")(x))
    return keras.Model(inputs, kl.Dense(5, "relu", name="fc")(kl.Flatten()(x)))


@functools.cache
def network(sharing, shared_input=True, share_until=None):
    """Tasks that differ."""
    sharing = {"conv*": sharing} if sharing == "similar" else sharing
    model = multitask(
        backbone(),
        TASKS,
        sharing,
        share_until=share_until,
        shared_input=shared_input,
        heads=HEADS,
        verbose=False,
    )
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(weight + 0.1 * rng.normal(size=weight.shape))
    return model


def given(images, model):
    """The inputs of a network, the same images for each task."""
    if isinstance(model.input, dict):
        return {task: images for task in model.input}
    return images


def outputs_of(model, images):
    return model.predict(given(images, model), verbose=0)


def assert_unchanged(new, old):
    """The outputs that two networks have in common are equal to the bit."""
    for task in set(new) & set(old):
        np.testing.assert_array_equal(new[task], old[task], err_msg=task)


def names(weights):
    return {weight.path for weight in weights}


CASES = [(kind, True, None) for kind in ("tucker", "hard", "independent")]
CASES += [("tucker", False, None)]
LONG = [(kind, True, None) for kind in ("laf", "tt", "similar")]
LONG += [("hard", False, "conv1"), ("laf", True, "conv1")]
CASES += [pytest.param(*case, marks=pytest.mark.long) for case in LONG]


@pytest.mark.parametrize(("sharing", "shared_input", "share_until"), CASES)
def test_added(sharing, shared_input, share_until, rng, tmp_path):
    """It starts as another task, learns, and nobody else notices; then it goes again."""
    model = network(sharing, shared_input, share_until)
    images = rng.normal(size=(6, 6, 6, 2)).astype("float32")
    before = outputs_of(model, images)
    untouched = names(model.trainable_weights), model.count_params()
    larger = add_task(model, "new", like="b")
    assert list(larger.task_names) == [*TASKS, "new"]
    assert (names(model.trainable_weights), model.count_params()) == untouched
    after = outputs_of(larger, images)
    assert_unchanged(after, before)
    np.testing.assert_allclose(after["new"], before["b"], atol=1e-5)
    larger.compile("sgd", {"new": "sparse_categorical_crossentropy"})
    labels = np.array([0, 1, 2, 0, 1, 2])
    larger.fit(given(images, larger), {"new": labels}, verbose=0)
    trained = outputs_of(larger, images)
    assert_unchanged(trained, before)
    assert np.abs(trained["new"] - after["new"]).max() > 1e-6
    larger.save(tmp_path / "larger.keras")
    loaded = keras.saving.load_model(tmp_path / "larger.keras")
    assert_unchanged(outputs_of(loaded, images), trained)
    assert names(loaded.trainable_weights) == names(larger.trainable_weights)
    alone = single_task(larger, "new")
    found = alone.predict(images, verbose=0)
    np.testing.assert_allclose(found, trained["new"], atol=1e-5)
    assert all(type(layer).__module__.startswith("keras") for layer in alone.layers)
    again = remove_task(loaded, "new")
    assert_unchanged(outputs_of(again, images), before)
    assert again.count_params() == model.count_params()


@pytest.mark.parametrize("sharing", FACTORS)
def test_column(sharing, rng):
    """`W_new = sum_k L_k s_k`, latent kernels by the unit columns of S; K numbers train."""
    inputs = keras.Input((5,))
    kind = {"laf": layers.LAFDense, "tucker": layers.TuckerDense, "tt": layers.TTDense}
    layer = kind[sharing](4, 3, rank=2, shared_input=True, name="fc")
    outputs = layers.TaskSplit(TASKS)(layer(inputs))
    model = add_task(MultiTaskModel(inputs, outputs), "new", like="c")
    assert names(model.trainable_weights) == {"fc_new/column", "fc_new/bias"}
    column = model.get_layer("fc_new").column
    column.assign(rng.normal(size=column.shape))
    kernel = np.zeros((5, 4))
    task_matrix = ops.convert_to_numpy(layer.task_matrix)
    stacked = ops.convert_to_numpy(layer.kernel)
    # The latent kernels, from those of the tasks: S has full row rank.
    latents = np.einsum("iot,tk->iok", stacked, np.linalg.pinv(task_matrix))
    for k, value in enumerate(ops.convert_to_numpy(column)):
        kernel += value * latents[..., k]
    alone = single_task(model, "new").get_layer("fc")
    np.testing.assert_allclose(ops.convert_to_numpy(alone.kernel), kernel, atol=1e-5)
    x = rng.normal(size=(3, 5)).astype("float32")
    np.testing.assert_allclose(model(x)["new"], x @ kernel, atol=1e-5)
    # Another one, from this.
    more = add_task(model, "newer", like="new")
    assert_unchanged(outputs_of(more, x), outputs_of(model, x))
    np.testing.assert_allclose(more(x)["newer"], x @ kernel, atol=1e-5)


def test_what_is_trained():
    """By kind of sharing; the head in any case."""
    head = {"new_head/kernel", "new_head/bias"}
    trained = {
        kind: names(add_task(network(kind), "new", head=4).trainable_weights) - head
        for kind in ("tucker", "hard", "independent")
    }
    scales = {"norm_new/gamma", "norm_new/beta"}
    assert trained["tucker"] == {
        *scales,
        *("conv1_new/column", "conv1_new/bias", "conv2_depthwise_new/column"),
        *("conv2_new/column", "conv2_new/bias", "fc_new/column", "fc_new/bias"),
    }
    assert trained["hard"] == set()
    assert "conv1_new/kernel" in trained["independent"]
    assert not trained["independent"] & names(network("independent").weights)


def test_heads():
    """A number of classes, a function, a layer, or one like the old one."""
    model = network("hard")
    heads = {"number": 4, "function": lambda x: kl.Dense(2)(kl.Dropout(0.1)(x))}
    heads["layer"] = kl.Dense(7, name="mine")
    shapes = {"number": 4, "function": 2, "layer": 7, "old": 3}
    for name, head in [*heads.items(), ("old", None)]:
        new = add_task(model, name, head=head, like="b")
        assert new.output[name].shape == (None, shapes[name])
        assert new.get_layer("mine" if name == "layer" else f"{name}_head").trainable


def test_nearest(rng):
    """By examples the task whose features tell the labels; without, the most typical."""
    model = network("independent")
    network_of = keras.Model(model.input, model.get_layer("c_head").input)
    images = rng.normal(size=(40, 6, 6, 2)).astype("float32")
    features = network_of.predict(images, verbose=0)
    labels = features @ rng.normal(size=5)
    larger = add_task(model, "new", head=1, data=(images, labels))
    for layer in ("conv1", "fc"):
        own = larger.get_layer(f"{layer}_new").kernel
        np.testing.assert_array_equal(own, model.get_layer(layer).kernel[..., 2])
    inputs = keras.Input((5,))
    layer = layers.TaskDense(4, 3, shared_input=True, name="fc")
    typical = MultiTaskModel(inputs, layers.TaskSplit(TASKS)(layer(inputs)))
    kernel = rng.normal(size=(5, 4))
    layer.kernel.assign(np.stack([kernel, rng.normal(size=(5, 4)), 2 * kernel + 0.1], -1))
    own = add_task(typical, "new").get_layer("fc_new").kernel
    assert any(np.array_equal(own, layer.kernel[..., n]) for n in (0, 2))


@pytest.mark.parametrize("classes", [True, False])
def test_leave_one_out(classes, rng):
    """Equal to fitting anew without each example."""
    x = rng.normal(size=(12, 30))
    y = rng.integers(3, size=12) if classes else rng.normal(size=12)
    z = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-8)
    targets = (y[:, None] == np.unique(y)).astype(float) if classes else y[:, None]
    targets = (targets - targets.mean(axis=0)) / (targets.std(axis=0) + 1e-8)
    errors = []
    for left_out in range(12):
        rest = np.arange(12) != left_out
        gram = z[rest] @ z[rest].T / 30 + 1.2 * np.eye(11)
        weights = z[rest].T @ np.linalg.solve(gram, targets[rest]) / 30
        errors.append((z[left_out] @ weights - targets[left_out]) ** 2)
    np.testing.assert_allclose(_leave_one_out_error([x], y), np.mean(errors))


def test_removed(rng):
    """An old task goes; of inputs its own goes too, again and again."""
    model = network("tucker", shared_input=False)
    images = rng.normal(size=(3, 6, 6, 2)).astype("float32")
    before = outputs_of(model, images)
    for gone in ("a", "c"):
        model = remove_task(model, gone)
        assert gone not in model.input and gone not in model.task_names
        assert_unchanged(outputs_of(model, images), before)
    assert set(model.input) == {"b"}
    with pytest.raises(ValueError, match="one of several tasks"):
        remove_task(model, "b")
    # A task of that name can come again.
    again = add_task(model, "a", head=2)
    assert_unchanged(outputs_of(again, images), {"b": before["b"]})


def test_what_layers_share_is_shared(rng):
    """One task covariance of two layers is one in the copies too, with its values."""
    shared = ModeCovariance()
    prior = TensorNormalRegularizer(task_covariance=shared)
    inputs = keras.Input((4,))
    first, second = (
        layers.TaskDense(4, 3, kernel_regularizer=prior, shared_input=n == 0, name=f"fc{n}")
        for n in range(2)
    )
    model = MultiTaskModel(inputs, layers.TaskSplit(TASKS)(second(first(inputs))))
    first.prior.modes["task"].covariance.assign(np.diag([1.0, 2.0, 3.0]))
    for new in (add_task(model, "new"), remove_task(model, "a")):
        one, other = (new.get_layer(f"fc{n}").prior.modes["task"] for n in range(2))
        assert one is other and one is not shared
        np.testing.assert_array_equal(one.covariance, np.diag([1.0, 2.0, 3.0]))


def test_summary():
    """The column is the new task's; T separate networks would have one kernel more."""
    model = network("tucker")
    old = {row.layer: row for row in task_summary(model, verbose=False)}
    new = {r.layer: r for r in task_summary(add_task(model, "new"), verbose=False)}
    assert new["conv1_new"].sharing == "(new)"
    assert new["conv1_new"].parameters == model.get_layer("conv1").rank[-1] + 3
    grown = new["conv1"].parameters_if_independent
    assert grown == old["conv1"].parameters_if_independent * 4 // 3
    assert new["conv1"].flops > old["conv1"].flops
    assert new["conv1"].parameters == old["conv1"].parameters


def test_nested_and_mixed_precision(rng):
    """Nested models are taken apart; half precision stays what it is."""
    inner = multitask(backbone(), TASKS, "laf", rank=2, heads=2, verbose=False)
    inputs = keras.Input((6, 6, 2))
    model = MultiTaskModel(inputs, inner(kl.Rescaling(0.5)(inputs)))
    x = rng.normal(size=(2, 6, 6, 2)).astype("float32")
    assert_unchanged(outputs_of(add_task(model, "new"), x), outputs_of(model, x))
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        half = multitask(backbone(), TASKS, "tt", rank=2, heads=2, verbose=False)
        larger = add_task(half, "new")
        assert larger.get_layer("conv1_new").compute_dtype == "bfloat16"
        assert_unchanged(outputs_of(larger, x), outputs_of(half, x))
    finally:
        keras.config.set_dtype_policy(policy)


def test_export(rng, tmp_path):
    """A SavedModel with the new task in it."""
    tf = pytest.importorskip("tensorflow")
    larger = add_task(network("tucker"), "new", head=2)
    larger.export(tmp_path, verbose=False)
    x = rng.normal(size=(2, 6, 6, 2)).astype("float32")
    loaded = tf.saved_model.load(str(tmp_path))
    found = loaded.serve(x)
    np.testing.assert_allclose(found["new"], larger(x)["new"], atol=1e-5)


def test_errors(rng):
    """What was received, and what there is."""
    model = network("hard")
    x = rng.normal(size=(4, 6, 6, 2))
    for arguments, message in (
        ({"name": "a"}, r"new task.*'a', 'b', 'c'.*name='a'"),
        ({"name": "a b"}, "letters A to Z"),
        ({"name": "new", "like": "z"}, "like='z'"),
        ({"name": "new", "head": -1}, "head of task 'new'"),
        ({"name": "new", "like": "a", "data": (x, [0, 1, 0, 1])}, "Give one of them"),
        ({"name": "new", "data": x}, "a pair"),
        ({"name": "new", "data": (x, [0, 1])}, "labels for 2 examples"),
        ({"name": "new", "data": (x[:, :5], [0, 1, 0, 1])}, r"\(None, 6, 6, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"(?s)add_task.*{message}"):
            add_task(model, **arguments)
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, layers.TaskDense(2, 2, shared_input=True)(inputs))
    for function in (add_task, remove_task):
        with pytest.raises(ValueError, match="dict of outputs by task"):
            function(plain, "a")
    x = layers.CrossStitch(2, name="across")(layers.TaskDense(2, 2)(keras.Input((4,))))
    inputs = keras.Input((4,))
    x = layers.CrossStitch(2, name="across")(layers.TaskDense(2, 2)(inputs))
    mixed = MultiTaskModel(inputs, layers.TaskSplit(["a", "b"])(x))
    with pytest.raises(ValueError, match=r"(?s)add_task: .*'across'"):
        add_task(mixed, "new")
    one = multitask(backbone(), ["a"], "hard", heads=2)
    with pytest.raises(ValueError, match="no telling"):
        add_task(one, "b", head=2)
    layer = layers.LAFDense(2, 3, rank=2)
    layer.build((None, 6))
    with pytest.raises(ValueError, match="expected 2 channels, one task's"):
        layer(np.ones((1, 6)), own={"column": np.ones(2)})
    with pytest.raises(ValueError, match="a column, a bias or both"):
        layers.TaskColumn(0, 0)
