"""Relationship networks: what is shared, what is whose, and the prior."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import (
    ModeCovariance,
    TensorNormalRegularizer,
    relationship_network,
    single_task,
    task_correlation,
    task_covariance,
    task_layers,
)
from dmtrl_keras.mrn.network import LAYERS, prior_by_name
from dmtrl_keras.parameterizations import LoRA

TASKS = ["amazon", "webcam", "dslr"]


def trunk():
    """A small convolutional network that gives a vector."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv1"),
            keras.layers.BatchNormalization(name="norm1"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
        ],
        name="trunk",
    )


def network(**arguments):
    """A network on features, without a trunk."""
    return relationship_network((6,), TASKS, 4, 5, **arguments)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("own", [(), *(LAYERS[-n:] for n in (1, 2, 3))])
def test_what_is_shared(own, shared_input, rng):
    """All sets of layers, with one input and with one per task, against plain Keras."""
    backbone = trunk()
    model = relationship_network(
        backbone, TASKS, 4, 5, layers=own, shared_input=shared_input, common_draw=False
    )
    kernels = {layer.name: layer for layer in task_layers(model)}
    assert set(kernels) == {"conv1", "bottleneck", "classifier"} & {
        {"trunk": "conv1"}.get(name, name) for name in own
    }
    for layer in kernels.values():
        has_prior = layer.name != "conv1"
        assert (layer.prior is not None) == has_prior
    images = rng.normal(size=(3, 2, 8, 8, 3)).astype("float32")
    if shared_input:
        images[:] = images[0]
        outputs = model(images[0])
    else:
        outputs = model(dict(zip(TASKS, images)))
    assert list(model.output) == TASKS
    for number, task in enumerate(TASKS):
        x = ops.convert_to_numpy(backbone(images[number]))
        for name in ("bottleneck", "classifier"):
            layer = model.get_layer(name)
            kernel, bias = layer.kernel, layer.bias
            if name in own:
                kernel, bias = kernel[..., number], bias[..., number]
            x = x @ ops.convert_to_numpy(kernel) + ops.convert_to_numpy(bias)
            x = np.maximum(x, 0) if name == "bottleneck" else np.exp(x)
        expected = x / x.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(outputs[task], expected, atol=1e-5)


@pytest.mark.parametrize("shared_input", [True, False])
def test_related_trunks(shared_input, rng):
    """The tasks' own trunks may be a frozen one and differences of low rank."""
    backbone = trunk()
    arguments = {"layers": LAYERS, "prior": None, "shared_input": shared_input}
    model = relationship_network(
        backbone, TASKS, 4, None, trunk_sharing=LoRA(1), **arguments
    )
    conv = model.get_layer("conv1")
    assert conv.sharing.name == "lora" and conv.rank == (1,)
    trained = {tuple(v.shape) for v in conv.trainable_variables}
    assert trained == {(3, 3, 3, 1, 3), (1, 4, 3), (4, 3)}
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    features = model(x if shared_input else dict.fromkeys(TASKS, x))
    assert set(features) == set(TASKS)
    np.testing.assert_allclose(
        conv.task_kernel(1), backbone.get_layer("conv1").kernel, atol=1e-6
    )
    with pytest.raises(ValueError, match="trunks that are the tasks' own"):
        relationship_network(backbone, TASKS, 4, trunk_sharing="tt")


def test_priors_are_one_argument_apart():
    """DRN, DRN_8, MRN, DRN_bi and the baselines."""

    def modes(**arguments):
        return {
            layer.name: list(layer.prior.modes) if layer.prior else []
            for layer in task_layers(network(**arguments))
        }

    assert modes() == {"bottleneck": ["task"], "classifier": ["task"]}
    assert modes(layers=("classifier",)) == {"classifier": ["task"]}
    mrn = ["feature", "class", "task"]
    assert modes(prior="mrn") == {"bottleneck": mrn, "classifier": mrn}
    assert modes(prior=None, layers=("classifier",)) == {"classifier": []}
    assert modes(prior=None) == {"bottleneck": [], "classifier": []}
    binary = network(binary=True)
    assert task_covariance(binary)["classifier"].shape == (4, 3, 3)
    assert task_covariance(binary)["bottleneck"].shape == (3, 3)
    binary = network(binary=True, prior="mrn")
    assert list(binary.get_layer("classifier").prior.modes) == ["feature", "task"]
    outputs = binary({task: np.ones((2, 6)) for task in TASKS})["amazon"]
    assert not np.allclose(np.sum(ops.convert_to_numpy(outputs), axis=1), 1)


def test_own_regularizer_and_shared_covariance():
    """Everything the regularizer can do; one covariance of both layers by its object."""
    shared = ModeCovariance()
    model = network(prior=TensorNormalRegularizer(0.2, task_covariance=shared))
    for name in ("bottleneck", "classifier"):
        prior = model.get_layer(name).prior
        assert prior.modes["task"] is shared
        assert prior.regularizer.strength == pytest.approx(0.2)
        assert prior.regularizer.mean == "zero"
    first, second = network(), network(strength=0.5)
    first, second = (
        model.get_layer("classifier").prior.regularizer for model in (first, second)
    )
    assert (first.strength, first.epsilon, first.mean) == (0.3, {"task": 0.01}, "start")
    assert second.strength == 0.5


def test_without_bottleneck_and_with_dropout(rng):
    """The classifier on the features; dropout in training only."""
    model = relationship_network(
        (6,), TASKS, 4, None, dropout=0.5, kernel_initializer="glorot_uniform"
    )
    assert [layer.name for layer in task_layers(model)] == ["classifier"]
    x = {task: rng.normal(size=(3, 6)).astype("float32") for task in TASKS}
    first, again = model(x)["dslr"], model(x)["dslr"]
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(model(x, training=True)["dslr"], first)


def test_draws():
    """Equal kernels at first, or a draw for each task."""
    for common in (True, False):
        model = network(common_draw=common)
        kernel = ops.convert_to_numpy(model.get_layer("bottleneck").kernel)
        assert np.array_equal(kernel[..., 0], kernel[..., 1]) == common
    model = network(common_draw={"classifier": False}, kernel_initializer="he_normal")
    for name, common in (("bottleneck", True), ("classifier", False)):
        kernel = ops.convert_to_numpy(model.get_layer(name).kernel)
        assert np.array_equal(kernel[..., 0], kernel[..., 1]) == common
        assert kernel.any()


def test_starts():
    """Classifiers with a prior at zero, all else from a draw, or as it is said."""

    def zero(name, **arguments):
        kernel = network(**arguments).get_layer(name).kernel
        return not ops.convert_to_numpy(kernel).any()

    assert zero("classifier") and not zero("bottleneck")
    assert zero("classifier", layers=("classifier",))
    for arguments in ({"prior": None}, {"layers": ()}):
        assert not zero("classifier", **arguments)
    assert zero("bottleneck", kernel_initializer=keras.initializers.Zeros())
    own = {"classifier": "glorot_uniform", "bottleneck": None}
    for name in own:
        assert not zero(name, kernel_initializer=own)


@pytest.mark.long
def test_training_saving_and_one_task(tmp_path, rng):
    """Tasks that are the same get the highest correlation; files and exports as ever."""
    truth = rng.normal(size=(6, 4))
    x, y = {}, {}
    for task in TASKS:
        own = rng.normal(size=(6, 4)) if task == "dslr" else truth
        x[task] = rng.normal(size=(200, 6)).astype("float32")
        y[task] = (x[task] @ own).argmax(axis=1)
    model = relationship_network(
        (6,), TASKS, 4, bottleneck=None, strength=1e-2, common_draw=False
    )
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=30, verbose=0)
    correlation = task_correlation(model)["classifier"]
    assert correlation[0, 1] > 0.8
    assert np.abs(correlation[2, :2]).max() < correlation[0, 1] - 0.2
    before = {name: matrix.copy() for name, matrix in task_covariance(model).items()}
    model.evaluate(x, y, verbose=0)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for copy in (model, loaded):
        for name, matrix in task_covariance(copy).items():
            np.testing.assert_array_equal(matrix, before[name])
    for task, output in loaded.predict(x, verbose=0).items():
        np.testing.assert_allclose(output, expected[task], atol=1e-5)
    alone = single_task(model, "webcam")
    np.testing.assert_allclose(
        alone.predict(x["webcam"], verbose=0), expected["webcam"], atol=1e-5
    )


def test_classifiers_of_different_classes_share_what_features_are_worth():
    """MRN: one covariance of features for all, also of a regularizer of one's own."""
    for prior in ("mrn", TensorNormalRegularizer(0.1, ("feature", "task"), epsilon=0.1)):
        model = relationship_network(
            (6,), ["a", "b", "c"], {"a": 3, "b": 2, "c": 3}, None, prior
        )
        found = [
            model.get_layer(f"classifier_{number}").prior.modes["feature"]
            for number in (1, 2)
        ]
        assert found[0] is found[1]
        assert found[0].epsilon == ("auto" if prior == "mrn" else 0.1)
    printed = prior_by_name("mrn", 0.1, 0.01, 1, relative=False)
    assert printed.epsilon == {"feature": 1.0, "class": 1.0, "task": 0.01}
    alone = relationship_network((6,), ["a", "b"], {"a": 3, "b": 2}, None, "drn")
    assert list(alone.get_layer("classifier_1").prior.modes) == ["task"]


@pytest.mark.parametrize("shared_input", [True, False])
def test_different_classes(shared_input, tmp_path, rng):
    """Features are related, and classes where they are the same; order and files."""
    tasks = ["a", "b", "c", "d"]
    classes = {"a": 3, "b": ["x", "y"], "c": 3, "d": ["y", "x"]}
    model = relationship_network(
        trunk(), tasks, classes, 5, shared_input=shared_input, dropout=0.1
    )
    assert list(model.output) == tasks
    assert [model.output[task].shape[-1] for task in tasks] == [3, 2, 3, 2]
    found = {name: len(matrix) for name, matrix in task_covariance(model).items()}
    expected = {"bottleneck": 4, "classifier_1": 2, "classifier_2": 1, "classifier_3": 1}
    assert found == expected
    for name in found:
        layer = model.get_layer(name)
        layer.kernel.assign(rng.normal(size=layer.kernel.shape))
    images = rng.normal(size=(4, 2, 8, 8, 3)).astype("float32")
    images[:] = images[0] if shared_input else images
    outputs = model(images[0] if shared_input else dict(zip(tasks, images)))
    places = {"a": (1, 0), "b": (2, 0), "c": (1, 1), "d": (3, 0)}
    for number, (task, (layer, place)) in enumerate(places.items()):
        x = ops.convert_to_numpy(model.get_layer("trunk")(images[number]))
        kernel = ops.convert_to_numpy(model.get_layer("bottleneck").kernel)
        x = np.maximum(x @ kernel[..., number], 0)
        kernel = ops.convert_to_numpy(model.get_layer(f"classifier_{layer}").kernel)
        x = np.exp(x @ kernel[..., place])
        np.testing.assert_allclose(
            outputs[task], x / x.sum(axis=1, keepdims=True), atol=1e-5
        )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded(images[0] if shared_input else dict(zip(tasks, images)))
    for task in tasks:
        np.testing.assert_allclose(again[task], outputs[task], atol=1e-6)


def test_regressions(rng):
    """One unit each, without a function; the sign of a task is learned."""
    x = {task: rng.normal(size=(30, 6)).astype("float32") for task in TASKS}
    truth = rng.normal(size=(6, 1))
    y = {task: sign * x[task] @ truth for task, sign in zip(TASKS, (1, 1, -1))}
    model = relationship_network((6,), TASKS, 1, None, activation="linear", strength=0.1)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(x, y, batch_size=10, epochs=10, verbose=0)
    correlation = task_correlation(model)["classifier"]
    assert correlation[0, 1] > 0.5 and correlation[0, 2] < -0.5
    mixed = relationship_network(
        (6,),
        TASKS,
        {"amazon": 3, "webcam": 1, "dslr": 1},
        activation={"webcam": "linear", "dslr": "sigmoid"},
    )
    assert [
        mixed.get_layer(f"{task}_probabilities").activation.__name__ for task in TASKS
    ] == ["softmax", "linear", "sigmoid"]


@pytest.mark.parametrize("own", [LAYERS[-n:] for n in (1, 2, 3)])
def test_pretrained_bottleneck(own, rng):
    """MRN's Figure 1: the last layer is copied for each task, and is its prior's mean."""
    backbone = keras.Sequential(
        [*trunk().layers, keras.layers.Dense(5, "tanh", name="fc7")], name="trunk"
    )
    backbone.build((None, 8, 8, 3))
    model = relationship_network(backbone, TASKS, 4, "fc7", layers=own)
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    expected = ops.convert_to_numpy(backbone(x))
    inputs = model.get_layer("classifier").input
    found = keras.Model(model.input, inputs).predict(dict.fromkeys(TASKS, x), verbose=0)
    np.testing.assert_allclose(found, np.tile(expected, (1, 3)), atol=1e-5)
    assert ("bottleneck" in [layer.name for layer in model.layers]) == (len(own) > 1)
    if len(own) > 1:
        prior = model.get_layer("bottleneck").prior
        kernel = ops.convert_to_numpy(backbone.get_layer("fc7").kernel)
        np.testing.assert_allclose(prior.mean[..., 2], kernel, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"classes": 0}, "`classes` must be a positive int"),
        ({"bottleneck": 0}, "`bottleneck` must be a positive int, the name of a layer"),
        ({"bottleneck": "fc7"}, "`backbone` must be a Keras model where `bottleneck`"),
        (
            {"bottleneck": "conv1", "backbone": trunk()},
            "the backbone's last layer, a Dense.*'conv1'; the last layer is 'global_av",
        ),
        ({"classes": {"amazon": 3}}, "`classes` must be an int, or a dict by task"),
        ({"classes": dict.fromkeys(TASKS, 0)}, "`classes` must be a positive int, or a"),
        ({"classes": dict(zip(TASKS, (2, 2, 1)))}, "softmax over one class"),
        (
            {"classes": dict(zip(TASKS, (2, 2, 3))), "layers": ()},
            "different classes need a classifier of their own",
        ),
        ({"activation": {"a": "relu"}}, "`activation` must be one, or a dict by task"),
        ({"activation": "nothing"}, "'nothing'"),
        ({"layers": ("bottleneck",)}, "must be the last few of"),
        ({"layers": ("fc8",)}, r"Received: layers=\('fc8',\)"),
        ({"common_draw": None}, "`common_draw` must be True or False, or a dict"),
        ({"common_draw": {"fc8": True}}, "`common_draw` must be one for all layers, or"),
        ({"kernel_initializer": "ones and zeros"}, "'ones and zeros'"),
        ({"prior": "normal"}, r"one of \['drn', 'mrn'\].*'normal'"),
        ({"tasks": ["a", "a"]}, "distinct"),
        ({"backbone": (4, 4, 3)}, r"expected a backbone with one output \(batch, features"),
    ],
)
def test_bad_arguments(arguments, message):
    """The error says what was received and what was expected."""
    given = {"backbone": (6,), "tasks": TASKS, "classes": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        relationship_network(**given)
