"""single_task(): ordinary Keras models, from any network of this library's layers."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import MultiTaskModel, layers, multitask, single_task
from dmtrl_keras.parameterizations import LAF

NAMES = ["zeta", "alpha", "mid"]


def by_hand(*, split=True):
    """A network as a user would write it, with every kind of layer."""
    inputs = {name: keras.Input((8, 8, 2), name=name) for name in NAMES}
    x = layers.TaskStack(NAMES)(inputs)
    x = layers.TTConv2D(4, 3, tasks=3, rank=2, activation="relu")(x)
    x = kl.BatchNormalization()(x)
    y = kl.DepthwiseConv2D(3, padding="same")(x)
    y = layers.TaskLayerNormalization(3)(y)
    x = layers.TaskConcatenate(3)([x, y])
    x = layers.TaskDepthwiseConv2D(2, tasks=3, sharing=LAF(rank=2))(x)
    x = kl.MaxPooling2D(2)(x)
    x = layers.TaskFlatten(3)(x)
    x = layers.TuckerDense(6, tasks=3, rank=0.5, kernel_constraint="max_norm")(x)
    x = layers.TaskGroup(3)(kl.Dense(5, "relu")(layers.TaskBatch(3)(x)))
    if not split:
        return keras.Model(inputs, x)
    features = layers.TaskSplit(NAMES)(x)
    outputs = {name: kl.Dense(n + 1)(features[name]) for n, name in enumerate(NAMES)}
    return MultiTaskModel(inputs, outputs)


@pytest.fixture
def images(rng):
    """One batch of images for each task."""
    return {name: rng.normal(size=(5, 8, 8, 2)).astype("float32") for name in NAMES}


def test_by_hand(images):
    """Every task's outputs, from its own input alone, by name and by number."""
    model = by_hand()
    model(images, training=True)
    outputs = model(images)
    for index, name in enumerate(NAMES):
        alone = single_task(model, name)
        assert alone.input.name == name
        np.testing.assert_allclose(alone(images[name]), outputs[name], atol=1e-5)
        numbered = single_task(model, index)
        np.testing.assert_allclose(numbered(images[name]), outputs[name], atol=1e-5)
        modules = {type(layer).__module__.split(".")[0] for layer in alone.layers}
        assert modules == {"keras"}


def test_order_of_names_is_that_of_the_channels(images):
    """A dict of outputs in another order takes nothing apart wrongly."""
    model = by_hand()
    turned = {name: model.output[name] for name in sorted(NAMES)}
    turned = MultiTaskModel(model.input, turned)
    outputs = model(images)
    for name in NAMES:
        alone = single_task(turned, name)
        np.testing.assert_allclose(alone(images[name]), outputs[name], atol=1e-5)


def test_without_a_split(images):
    """A grouped output: the task's part of it."""
    model = by_hand(split=False)
    parts = np.split(ops.convert_to_numpy(model(images)), 3, axis=-1)
    for index, name in enumerate(NAMES):
        alone = single_task(model, index)
        np.testing.assert_allclose(alone(images[name]), parts[index], atol=1e-5)


def test_only_what_the_task_needs(rng):
    """The heads of other tasks are left out."""
    inputs = keras.Input((4,))
    x = layers.TaskDense(3, tasks=2, shared_input=True)(inputs)
    features = layers.TaskSplit(["a", "b"])(x)
    outputs = {"a": kl.Dense(2, name="ha")(features["a"])}
    outputs["b"] = kl.Dense(2, name="hb")(kl.Dense(9, name="mb")(features["b"]))
    alone = single_task(MultiTaskModel(inputs, outputs), "a")
    assert len(alone.layers) == 3
    assert not {"hb", "mb"} & {layer.name for layer in alone.layers}


@pytest.mark.parametrize("sharing", ["independent", "hard", "laf", "tucker", "tt"])
def test_round_trip(sharing, rng):
    """Multitask of a single task is that task's network, for every method."""
    inputs = keras.Input((16, 16, 3))
    x = kl.Conv2D(8, 3, strides=2, name="stem")(inputs)
    x = kl.BatchNormalization(name="stem_bn")(x)
    y = kl.SeparableConv2D(8, 3, padding="same", activation="relu")(x)
    y = kl.LayerNormalization()(kl.Conv2D(8, 1)(y))
    x = kl.GlobalAveragePooling2D()(kl.Concatenate()([x, kl.Add()([x, y])]))
    backbone = keras.Model(inputs, kl.Dense(4, "softmax")(x))
    model = multitask(backbone, 2, sharing=sharing, share_until="stem_bn", verbose=False)
    # Tasks that differ.
    for weight in model.trainable_weights:
        weight.assign(weight + 0.01 * rng.normal(size=weight.shape))
    x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    expected = model(x)
    for index, name in enumerate(model.task_names):
        alone = single_task(model, index)
        np.testing.assert_allclose(alone(x), expected[name], atol=1e-4, rtol=1e-4)
        again = multitask(alone, ["p", "q"])
        np.testing.assert_allclose(again(x)["q"], expected[name], atol=1e-4, rtol=1e-4)
        back = single_task(again, "p")
        np.testing.assert_allclose(back(x), expected[name], atol=1e-4, rtol=1e-4)
        assert back.count_params() == alone.count_params() == backbone.count_params()
        assert {type(layer).__module__.split(".")[0] for layer in back.layers} == {"keras"}


@pytest.mark.long
def test_loads_where_the_library_is_not_installed(rng, tmp_path):
    """A process that can't import dmtrl_keras loads the file in safe mode and predicts."""
    from keras.src.applications.convnext import ConvNeXt

    # ConvNeXt, for the layers of its own that it has; smaller than `ConvNeXtTiny`.
    backbone = ConvNeXt(
        depths=(1, 1, 1, 1),
        projection_dims=(8, 16, 24, 32),
        include_top=False,
        weights=None,
        input_shape=(32, 32, 3),
        pooling="avg",
        name="convnext",
    )
    model = multitask(
        backbone,
        ["a", "b"],
        sharing={"*stage_3*conv_1": "tucker"},
        rank=4,
        heads=3,
        verbose=False,
    )
    kinds = {type(layer).__name__ for layer in single_task(model, "b").layers}
    assert "LayerScale" in kinds
    x = rng.uniform(0, 255, size=(2, 32, 32, 3)).astype("float32")
    expected = ops.convert_to_numpy(model(x)["b"])
    single_task(model, "b").save(tmp_path / "b.keras")
    np.save(tmp_path / "x.npy", x)
    script = """
        import sys
        sys.modules["dmtrl_keras"] = None
        import keras, numpy as np
        model = keras.saving.load_model("b.keras", safe_mode=True)
        np.save("y.npy", model.predict(np.load("x.npy"), verbose=0))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-4)


def test_kernel_is_composed_once(rng):
    """The layer has one kernel: that of the task, its constraint applied."""
    inputs = keras.Input((6,))
    layer = layers.TTDense(5, 3, rank=2, shared_input=True, kernel_constraint="non_neg")
    alone = single_task(keras.Model(inputs, layer(inputs)), 2)
    (dense,) = (each for each in alone.layers if isinstance(each, kl.Dense))
    np.testing.assert_allclose(dense.kernel, layer.task_kernel(2), atol=1e-6)
    assert np.all(ops.convert_to_numpy(dense.kernel) >= 0)


def test_layers_that_mix_tasks_are_listed():
    """All at once, with class and reason; what follows from them is not."""
    inputs = keras.Input((8,))
    x = layers.TaskDense(4, 2, name="grouped")(inputs)
    y = kl.Dense(8, name="mixing")(layers.TaskDense(4, 2, shared_input=True)(inputs))
    z = layers.TaskDense(4, 2, shared_input=True)(inputs)
    z = kl.Lambda(lambda x: x, name="unknown", output_shape=lambda s: s)(z)
    both = kl.Add(name="both")([x, y, z])
    model = keras.Model(inputs, layers.TaskSplit(["a", "b"])(both))
    with pytest.raises(ValueError) as error:
        single_task(model, "a")
    text = str(error.value)
    for part in (
        "has 3 layers that task 'a'",
        "TaskDense 'grouped': its input is grouped, but not by a layer",
        "Dense 'mixing': it mixes the features of the tasks",
        "Lambda 'unknown': how it treats grouped channels is not known",
    ):
        assert part in text, text


def test_task_that_needs_another():
    """Its head takes the other task's features; the other task is free."""
    inputs = keras.Input((8,))
    x = layers.TaskDense(4, 2, shared_input=True)(inputs)
    features = layers.TaskSplit(["a", "b"])(x)
    a = kl.Add(name="across")([features["a"], features["b"]])
    model = MultiTaskModel(inputs, {"a": a, "b": features["b"]})
    with pytest.raises(ValueError, match="'across': it needs the features of other"):
        single_task(model, "a")
    assert single_task(model, "b").output_shape == (None, 4)


def test_shared_input_on_grouped_features():
    """Every task would see the channels of all."""
    inputs = keras.Input((8,))
    x = layers.TaskDense(4, 2, shared_input=True)(inputs)
    x = layers.TaskDense(4, 2, shared_input=True, name="all")(x)
    with pytest.raises(ValueError, match="'all': with `shared_input=True` it mixes"):
        single_task(keras.Model(inputs, x), 0)


@pytest.mark.parametrize(
    ("task", "message"), [("beta", "'zeta'.*'beta'"), (3, "3"), (-1, "-1"), (True, "True")]
)
def test_unknown_task(task, message):
    """What there is, and what was asked for."""
    with pytest.raises(ValueError, match=message):
        single_task(by_hand(), task)


def test_not_a_network_of_tasks():
    """Models of no or several numbers of tasks."""
    inputs = keras.Input((12,))
    with pytest.raises(ValueError, match=r"known number of tasks.*\[\]"):
        single_task(keras.Model(inputs, kl.Dense(2)(inputs)), 0)
    x = layers.TaskDense(2, 3)(layers.TaskDense(6, 2)(inputs))
    with pytest.raises(ValueError, match=r"known number of tasks.*\[2, 3\]"):
        single_task(keras.Model(inputs, x), 0)
    with pytest.raises(ValueError, match="Sequential"):
        single_task(keras.Sequential([kl.Dense(2)]), 0)


def with_heads():
    """Kernels for three tasks, a head for each."""
    inputs = keras.Input((6,))
    x = layers.TuckerDense(4, tasks=3, rank=2, shared_input=True, name="fc")(inputs)
    features = layers.TaskSplit(NAMES)(layers.TaskDense(5, 3, name="hidden")(x))
    outputs = {n: kl.Dense(2, name=f"{n}_head")(features[n]) for n in NAMES}
    return MultiTaskModel(inputs, outputs)


def check_each(model, x, own_inputs=False):
    """Every task alone gives what the network gives, by name and by number."""
    expected = model(x)
    for name in model.task_names:
        alone = single_task(model, name)
        given = x[name] if own_inputs else x
        np.testing.assert_allclose(alone(given), expected[name], atol=1e-5)
    return expected


def test_called_inside_another(rng):
    """A network with heads is a layer of another: what others need is left out."""
    inner, inputs = with_heads(), keras.Input((6,))
    model = MultiTaskModel(inputs, inner(kl.Rescaling(2.0)(inputs)))
    check_each(model, rng.normal(size=(3, 6)).astype("float32"))
    alone = single_task(model, "alpha")
    kinds = [type(layer).__name__ for layer in alone.layers]
    assert kinds == ["InputLayer", "Rescaling", "Dense", "Dense", "Dense"]
    # Once more, on its own outputs.
    twice = model(kl.Dense(6)(model.output["mid"]))
    check_each(MultiTaskModel(inputs, twice), rng.normal(size=(3, 6)).astype("float32"))
    # A task of one call beside, and together with, another of another call.
    other = inner(kl.Rescaling(3.0)(inputs))
    outputs = {"mid": other["mid"], "zeta": model.output["zeta"]}
    outputs["sum"] = kl.Add()([other["mid"], model.output["zeta"]])
    check_each(MultiTaskModel(inputs, outputs), rng.normal(size=(3, 6)).astype("float32"))


def test_layers_of_one_name_in_two_networks(rng):
    """Nested models have names for themselves; in one model they are told apart."""
    inputs = keras.Input((6,))
    first, second = with_heads(), with_heads()
    first.name, second.name = "first", "second"
    y = first(inputs)["mid"]
    model = MultiTaskModel(inputs, second(kl.Dense(6)(y)))
    check_each(model, rng.normal(size=(3, 6)).astype("float32"))
    names = {layer.name for layer in single_task(model, "zeta").layers}
    assert {"fc", "second_fc", "mid_head", "zeta_head"} <= names


@pytest.mark.parametrize("own_inputs", [False, True])
def test_tasks_removed_and_added(own_inputs, rng):
    """The kernels of a layer are known by its TaskSplit, not by counting outputs."""
    if own_inputs:
        model = by_hand()
        x = {name: rng.normal(size=(5, 8, 8, 2)).astype("float32") for name in NAMES}
    else:
        model, x = with_heads(), rng.normal(size=(3, 6)).astype("float32")
    for kept in (["mid"], ["mid", "zeta"], ["alpha", "mid"]):
        fewer = MultiTaskModel(model.input, {name: model.output[name] for name in kept})
        check_each(fewer, x, own_inputs)
        # By number: in the order of the channels.
        ordered = [name for name in NAMES if name in kept]
        last = single_task(fewer, len(kept) - 1)
        given = x[ordered[-1]] if own_inputs else x
        np.testing.assert_allclose(last(given), model(x)[ordered[-1]], atol=1e-5)
        with pytest.raises(ValueError, match="task=1" if kept == ["mid"] else "task=2"):
            single_task(fewer, len(kept))
    # Under other names.
    renamed = {f"my_{name}": model.output[name] for name in reversed(NAMES)}
    renamed = MultiTaskModel(model.input, renamed)
    alone = single_task(renamed, "my_alpha")
    given = x["alpha"] if own_inputs else x
    np.testing.assert_allclose(alone(given), model(x)["alpha"], atol=1e-5)


def test_tasks_added(rng):
    """On what all have in common, and on what one task has."""
    model, x = with_heads(), rng.normal(size=(3, 6)).astype("float32")
    features = model.get_layer("mid_head").input
    outputs = {
        "first": kl.Dense(1, name="on_input")(model.input),
        **model.output,
        "more": kl.Dense(1, name="on_mid")(features),
        "deep": kl.Dense(1)(model.output["alpha"]),
    }
    larger = MultiTaskModel(model.input, outputs)
    check_each(larger, x)
    assert len(single_task(larger, "first").layers) == 2
    # One that takes the features of two can't be had alone; the others can.
    both = kl.Add(name="both")([model.output["alpha"], model.output["mid"]])
    larger = MultiTaskModel(model.input, {**model.output, "sum": both})
    with pytest.raises(ValueError, match=r"1 layers.*'sum'.*\n.*'both': it needs the feat"):
        single_task(larger, "sum")
    assert single_task(larger, "mid").output_shape == (None, 2)


def test_two_numbers_of_tasks_in_one_network(rng):
    """Layers of two and of three tasks, one behind the other, or beside it."""
    model, x = with_heads(), rng.normal(size=(3, 6)).astype("float32")
    pair = layers.TaskDense(4, 2, shared_input=True, name="pair")(model.input)
    pair = layers.TaskSplit(["p", "q"])(pair)
    stacked = layers.TaskStack(["p", "q"])(
        {"p": model.output["mid"], "q": model.output["zeta"]}
    )
    behind = layers.TaskSplit(["r", "s"])(layers.TaskDense(3, 2, name="behind")(stacked))
    joined = MultiTaskModel(model.input, {**model.output, **pair, **behind})
    check_each(joined, x)
    wrong = layers.TaskDense(2, 5, name="wrong")(layers.TaskDense(5, 2)(stacked))
    wrong = MultiTaskModel(model.input, layers.TaskSplit(list("abcde"))(wrong))
    with pytest.raises(ValueError, match="'wrong': it is for 5 tasks, its input has those"):
        single_task(wrong, "a")


def test_nothing_takes_the_tasks_apart():
    """A dict whose output is of all tasks."""
    inputs = keras.Input((4,))
    x = layers.TaskDense(2, 3, shared_input=True)(inputs)
    with pytest.raises(ValueError, match="'a' has the features of 3 tasks side by side"):
        single_task(keras.Model(inputs, {"a": x}), "a")
