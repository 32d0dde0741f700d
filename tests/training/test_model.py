"""MultiTaskModel: names of tasks are checked wherever they are given."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import (
    LossTerm,
    MultiTaskModel,
    TensorNormalRegularizer,
    export_tasks,
    multitask,
    relationship_network,
    single_task,
)
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.layers import TaskDense, TaskSplit
from dmtrl_keras.losses import MaskedLoss

LOSS = "sparse_categorical_crossentropy"


def network():
    """Two tasks, whose order is not the alphabetical one."""
    inputs = keras.Input((4,))
    outputs = {name: kl.Dense(3, "softmax")(inputs) for name in ("zeta", "alpha")}
    return MultiTaskModel(inputs, outputs)


@pytest.fixture
def data(rng):
    """Inputs and labels of both tasks."""
    x = rng.normal(size=(12, 4)).astype("float32")
    return x, {name: rng.integers(3, size=12) for name in ("zeta", "alpha")}


def test_order_of_tasks():
    """That of the outputs."""
    assert network().task_names == ("zeta", "alpha")
    assert network().tasks == 2
    again = MultiTaskModel.from_config(network().get_config())
    assert type(again) is MultiTaskModel and again.task_names == ("zeta", "alpha")
    assert keras.models.clone_model(network()).task_names == ("zeta", "alpha")


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": LOSS},
        {"loss": {"zeta": LOSS, "alpha": LOSS}},
        {"loss": {"alpha": LOSS}},
        {"loss": {"zeta": LOSS, "alpha": LOSS}, "metrics": ["accuracy"]},
        {"loss": LOSS, "metrics": {"alpha": ["accuracy"], "zeta": []}},
        {"loss": LOSS, "weighted_metrics": "accuracy"},
        {"loss": {"zeta": LOSS, "alpha": None}},
    ],
)
def test_trains(arguments, data):
    """One loss for all or a dict, some tasks left out, metrics for all."""
    model = network()
    model.compile("sgd", **arguments)
    history = model.fit(*data, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    metrics = arguments.get("metrics") or arguments.get("weighted_metrics")
    if isinstance(metrics, (list, str)):
        assert any(name.startswith("zeta_") and "acc" in name for name in history)
    assert model.evaluate(*data, verbose=0, return_dict=True)["loss"] > 0


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="others trace nothing")
def test_steps_are_traced_once(data):
    """What is made in a trace would have it done again: here nothing is."""
    model = network()
    model.compile("adam", LOSS, metrics=["accuracy"])
    step, traced = model.train_step, []

    def counted(batch):
        traced.append(1)
        return step(batch)

    model.train_step = counted
    model.fit(*data, epochs=2, verbose=0)
    assert len(traced) == 1
    # The optimizer has what it needs of the variables that are trained.
    assert model.optimizer.iterations == 2


def test_loss_weights(data):
    """Weights reach the task that they name; tasks left out have 1."""
    x, y = data
    model = network()
    losses = {}
    for weights in ({}, {"alpha": 3.0}, {"zeta": 0.0, "alpha": 1.0}):
        for loss in (LOSS, {"zeta": LOSS, "alpha": LOSS}):
            model.compile("sgd", loss=loss, loss_weights=weights)
            found = model.evaluate(x, y, verbose=0, return_dict=True)
            losses.setdefault(tuple(weights.items()), []).append(found)
    for pair in losses.values():
        assert pair[0] == pytest.approx(pair[1])
    plain = losses[()][0]
    expected = plain["zeta_loss"] + 3 * plain["alpha_loss"]
    assert losses[(("alpha", 3.0),)][0]["loss"] == pytest.approx(expected, rel=1e-5)
    found = losses[(("zeta", 0.0), ("alpha", 1.0))][0]["loss"]
    assert found == pytest.approx(plain["alpha_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": {"zeta": LOSS, "beta": LOSS}}, r"unknown tasks in `loss`: \['beta'\]"),
        ({"loss": [LOSS, LOSS]}, "`loss` must be a dict"),
        ({"loss": LOSS, "loss_weights": {"beta": 1.0}}, "unknown tasks in `loss_weights`"),
        ({"loss": LOSS, "loss_weights": [1.0, 2.0]}, "`loss_weights` must be a dict"),
        ({"loss": LOSS, "loss_weights": 2.0}, "`loss_weights` must be a dict"),
        (
            {"loss": {"zeta": LOSS}, "loss_weights": {"alpha": 1.0}},
            r"without a loss: \['alpha'\]",
        ),
        ({"loss": LOSS, "metrics": {"beta": "accuracy"}}, "unknown tasks in `metrics`"),
        ({"loss": LOSS, "metrics": [["accuracy"], []]}, "`metrics` must be a dict"),
        (
            {"loss": LOSS, "weighted_metrics": [keras.metrics.Mean()]},
            "one for all tasks",
        ),
    ],
)
def test_compile_errors(arguments, message):
    """Names, lists, and metric objects that tasks would share."""
    with pytest.raises(ValueError, match=f"MultiTaskModel.*{message}"):
        network().compile("sgd", **arguments)


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["zeta", "beta"], r"unknown tasks in `y`: \['beta'\]"),
        (["zeta", "alpha", "beta"], r"unknown tasks in `y`: \['beta'\]"),
        (["zeta"], r"also for \['alpha'\]"),
        (None, "`y` must be a dict"),
    ],
)
def test_label_errors(method, names, message, data):
    """Labels of tasks that there aren't, labels that are missing, lists."""
    x, y = data
    model = network()
    model.compile("sgd", LOSS, run_eagerly=method != "fit")
    labels = [y["zeta"], y["alpha"]]
    if names is not None:
        labels = dict.fromkeys(names, y["zeta"])
    verbose = {"verbose": 0} if method in ("fit", "evaluate") else {}
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(x, labels, **verbose)


def test_labels_only_where_there_is_a_loss(data):
    """A task without a loss needs no labels."""
    x, y = data
    model = network()
    model.compile("sgd", {"alpha": LOSS})
    model.fit(x, {"alpha": y["alpha"]}, verbose=0)
    with pytest.raises(ValueError, match=r"also for \['alpha'\]"):
        model.fit(x, {"zeta": y["zeta"]}, verbose=0)


def test_compiled_model_is_saved(data, tmp_path):
    """The compilation comes back with the model."""
    model = network()
    model.compile("sgd", LOSS, loss_weights={"alpha": 2.0}, metrics=["accuracy"])
    model.fit(*data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.evaluate(*data, verbose=0, return_dict=True)
    assert loaded.evaluate(*data, verbose=0, return_dict=True) == pytest.approx(expected)


def test_outputs_must_be_a_dict():
    """Of single tensors by name."""
    inputs = keras.Input((4,))
    for outputs in (inputs, [inputs], {}, {"a": [inputs]}, {1: inputs}):
        with pytest.raises(ValueError, match="`outputs` must be a dict"):
            MultiTaskModel(inputs, outputs)


def test_image_layers_keep_inference(rng, tmp_path):
    """A direct call and an exported model are in inference mode, also after Resizing."""
    inputs = keras.Input((6, 6, 3), name="image")
    x = keras.layers.Resizing(8, 8)(inputs)
    x = keras.layers.BatchNormalization(name="normalization")(x)
    x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(x))
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in ("a", "b")}
    model = MultiTaskModel(inputs, outputs)
    images = rng.uniform(size=(4, 6, 6, 3)).astype("float32")
    expected = model.predict(images, verbose=0)
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    called = model(images)
    for value, variable in zip(before, model.variables):
        np.testing.assert_array_equal(value, keras.ops.convert_to_numpy(variable))
    for task in "ab":
        np.testing.assert_allclose(called[task], expected[task], atol=1e-5)
    if keras.config.backend() == "tensorflow":
        model.export(tmp_path / "saved", verbose=False)
        loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
        np.testing.assert_allclose(loaded.serve(images)["a"], expected["a"], atol=1e-5)
    trained = model(images, training=True)
    assert np.abs(trained["a"] - expected["a"]).max() > 1e-2


def few_labels(losses):
    """64 examples, of which three have a label of a; zero weights, which stay so."""
    inputs = keras.Input((1,))
    heads = {task: kl.Dense(1, kernel_initializer="zeros") for task in losses}
    model = MultiTaskModel(inputs, {task: head(inputs) for task, head in heads.items()})
    labels = np.full((64, 1), np.nan)
    labels[[3, 20, 40]] = [[1], [1], [3]]
    return model, np.ones((64, 1)), {"a": labels, "b": np.full((64, 1), 2.0)}


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_logged_losses_of_missing_labels(reduction):
    """The mean over the labels of an epoch, whatever the batch size; and in the total."""
    losses = {"a": MaskedLoss("mse", reduction=reduction), "b": "mse"}
    model, x, y = few_labels(losses)
    weights = {"a": 3.0, "b": 0.5}
    eagerly = reduction == "mean_with_sample_weight"
    model.compile(keras.optimizers.SGD(0.0), losses, weights, run_eagerly=eagerly)
    for size in (64, 32, 16, 8):
        logs = model.evaluate(x, y, batch_size=size, verbose=0, return_dict=True)
        expected = {"loss": 11 + 2, "a_loss": 11 / 3, "b_loss": 4}
        assert logs == pytest.approx(expected), size
    fitted = model.fit(x, y, batch_size=16, epochs=2, verbose=0).history
    assert fitted == {key: pytest.approx([found] * 2) for key, found in expected.items()}
    # Weights of the labels; with them in the divisor or not.
    weights = np.ones(64)
    weights[40] = 0.5
    divisor = 3 if reduction == "sum_over_batch_size" else 2.5
    logs = model.evaluate(
        x,
        y,
        batch_size=8,
        sample_weight={"a": weights, "b": weights},
        return_dict=True,
        verbose=0,
    )
    assert logs["a_loss"] == pytest.approx(6.5 / divisor)


class Quarter(keras.regularizers.Regularizer):
    """A penalty that is always the same."""

    def __call__(self, x):
        return 0 * keras.ops.sum(x) + 0.25


def test_logged_total_of_one_task():
    """Of a task alone Keras logs the total only; a penalty is beside it."""
    losses = {"a": MaskedLoss("mse")}
    model, x, y = few_labels(losses)
    del y["b"]
    (head,) = (layer for layer in model.layers if isinstance(layer, kl.Dense))
    head.kernel.regularizer = Quarter()
    model.compile("sgd", losses["a"], run_eagerly=True)
    for size in (64, 16):
        logs = model.evaluate(x, y, batch_size=size, verbose=0, return_dict=True)
        assert logs == {"loss": pytest.approx(11 / 3 + 0.25)}
    # A sum is a sum: the mean over batches, as in Keras.
    model.compile("sgd", MaskedLoss("mse", reduction="sum"), run_eagerly=True)
    logs = model.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    assert logs == {"loss": pytest.approx(11 / 4 + 0.25)}
    # Of an epoch without any label: nothing.
    y["a"][:] = np.nan
    model.compile("sgd", losses, run_eagerly=True)
    logs = model.evaluate(x, y, batch_size=32, verbose=0, return_dict=True)
    assert logs == {"loss": pytest.approx(0.25)}


NAMES_REFUSED = {
    "a b": "a_b",
    "é": "e",
    "": "task_0",
    "年齢": "task_0",
    "ö ther": "o_ther",
    "5_o'Clock_Shadow": "5_o_Clock_Shadow",
    "_private": "private",
    "a/b": "a_b",
    "a:b": "a_b",
    "tab\t": "tab_",
}


@pytest.mark.parametrize("name", NAMES_REFUSED)
def test_names_that_no_saved_model_can_hold(name):
    """Refused before anything is trained, with one that is possible."""
    inputs = keras.Input((4,))
    outputs = {name: kl.Dense(1)(inputs), "other": kl.Dense(1)(inputs)}
    possible = NAMES_REFUSED[name]
    with pytest.raises(ValueError, match="MultiTaskModel: task names") as error:
        MultiTaskModel(inputs, outputs)
    text = str(error.value)
    assert text.endswith(f"Received: {[name]}. Possible: {[possible]}.")
    backbone = keras.Model(inputs, kl.Dense(2)(inputs))
    for make in (
        lambda: multitask(backbone, [name, "other"]),
        lambda: relationship_network((4,), [name, "other"], classes=2),
    ):
        with pytest.raises(ValueError, match=r"^(multitask|relationship_n\w+): task names"):
            make()
    MultiTaskModel(inputs, {possible: outputs[name], "other": outputs["other"]})


@pytest.mark.parametrize("name", ["signatures", "variables", "serve"])
def test_names_that_a_saved_model_has_already(name):
    """Every task is an endpoint of it."""
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match=rf"for something else.*Received: \['{name}'\]"):
        MultiTaskModel(inputs, {name: kl.Dense(1)(inputs)})


def test_files_with_such_names_load(tmp_path, monkeypatch):
    """Those that were saved when the names were not checked."""
    module = "dmtrl_keras.training.model.check_task_names"
    monkeypatch.setattr(module, lambda names, owner: None)
    inputs = keras.Input((4,))
    model = MultiTaskModel(inputs, {"my age": kl.Dense(1, name="head")(inputs)})
    model.save(tmp_path / "old.keras")
    serving = MultiTaskModel(inputs, {"serve": model.output["my age"]})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"export_tasks: .*Received: \['serve'\]"):
        export_tasks(serving, tmp_path / "saved")
    loaded = keras.saving.load_model(tmp_path / "old.keras")
    assert loaded.task_names == ("my age",)
    assert MultiTaskModel.from_config(model.get_config()).task_names == ("my age",)


@keras.saving.register_keras_serializable("test_model")
class Mean(LossTerm):
    """The mean of the first task's outputs, times a factor; counts its steps."""

    def __init__(self, factor=2.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def connect(self, network):
        """Ask for the first output."""
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False)
        return next(iter(network.output.values()))

    def call(self, step, training=False):
        """Return the mean."""
        if not training:
            return 0.0
        self.steps.assign_add(1)
        return self.factor * ops.mean(step.features)

    def get_config(self):
        """Return the factor."""
        return {**super().get_config(), "factor": self.factor}


@pytest.mark.parametrize("function", [None, lambda x: type(x).from_config(x.get_config())])
def test_clones_keep_terms(function, data):
    """Terms of their own, as they were at the start; other models of the outputs do not."""
    plain = network()
    model = MultiTaskModel(plain.input, plain.output, terms=[Mean(3.0, name="mean")])
    model.compile("sgd", LOSS, run_eagerly=True)
    model.train_on_batch(*data)
    clone = keras.models.clone_model(model, clone_function=function)
    (term,) = clone.terms
    assert (type(term), term.factor, term.name) == (Mean, 3.0, "mean")
    assert float(term.steps) == 0 and float(model.terms[0].steps) == 1
    clone.set_weights(model.get_weights())
    assert float(term.steps) == 1
    model.reset_metrics()  # Of the batch before, on older Keras.
    losses = [m.train_on_batch(*data, return_dict=True)["loss"] for m in (model, clone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not MultiTaskModel(clone.input, clone.output).terms
    assert not clone.inference_network().terms
    # Nor does a network around it, whose input has another shape.
    inputs = keras.Input(batch_shape=(7, 4))
    assert not MultiTaskModel(inputs, model(inputs)).terms
    around = keras.Model(plain.input, model(plain.input))
    assert not MultiTaskModel(inputs, around(inputs)).terms


def test_h5_files(tmp_path, monkeypatch):
    """Whole models are refused, before a file is touched; weights alone are fine."""
    model = network()
    path = tmp_path / "model.h5"
    with pytest.raises(ValueError, match=r"MultiTaskModel.*`.keras` file.*`.weights.h5`"):
        model.save(path)
    assert not path.exists()
    with pytest.raises(ValueError, match=r"MultiTaskModel.*`.keras` file"):
        keras.saving.save_model(model, str(path))
    weights = tmp_path / "model.weights.h5"
    model.save_weights(weights)
    other = network()
    other.load_weights(weights)
    np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method:UserWarning")
def test_quantize(data):
    """Keras's layers, and those of T kernels; or nothing, where one of these can't be."""
    x, _ = data
    model = network()
    expected = model(x)
    model.quantize("int8")
    assert {layer.dtype_policy.quantization_mode for layer in dense_of(model)} == {"int8"}
    np.testing.assert_allclose(model(x)["alpha"], expected["alpha"], atol=0.02)
    inputs = keras.Input((4,))
    features = TaskDense(3, 2, shared_input=True, name="fc")(inputs)
    features = TaskSplit(["a", "b"])(features)
    model = MultiTaskModel(inputs, {t: kl.Dense(2)(f) for t, f in features.items()})
    with pytest.raises(ValueError, match=r"'fc'.*to 'int8'.*mode='int4'.*single_task"):
        model.quantize("int4")
    assert all(layer.dtype_policy.name == "float32" for layer in model.layers)
    expected = model(x)["a"]
    alone = single_task(model, "a")
    alone.quantize("int8")
    np.testing.assert_allclose(alone(x), expected, atol=0.05)
    model.quantize("int8", filters="dense")
    assert {layer.dtype_policy.quantization_mode for layer in dense_of(model)} == {"int8"}
    assert model.get_layer("fc").quantization is None
    model.quantize("int8", filters="fc")
    assert model.get_layer("fc").quantization == "int8"
    np.testing.assert_allclose(model(x)["a"], expected, atol=0.1)


@pytest.mark.filterwarnings("ignore:.*InputLayer does not have a `quantize`:UserWarning")
def test_plain_models_around_task_layers(tmp_path):
    """What the model of several tasks refuses, the layers refuse in one of Keras."""
    inputs = keras.Input((4,))
    prior = TensorNormalRegularizer()
    for regularizer in (None, prior):
        layer = TaskDense(
            3, 2, shared_input=True, kernel_regularizer=regularizer, name="fc"
        )
        model = keras.Model(inputs, layer(inputs))
        with pytest.raises(ValueError, match=r"^TaskDense 'fc': .*`.keras` file"):
            model.save(tmp_path / "model.h5")
        with pytest.raises(ValueError, match=r"^TaskDense 'fc'.*mode='float8'"):
            model.quantize("float8")
        model.save(tmp_path / "model.keras")
        model.quantize("int8")
        assert layer.quantization == "int8"
        x = np.ones((2, 4), "float32")
        expected = model.predict(x, verbose=0)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(again.predict(x, verbose=0), expected)


def test_possible_names_differ():
    inputs = keras.Input((4,))
    outputs = {name: kl.Dense(1)(inputs) for name in ("e", "é", "è")}
    with pytest.raises(ValueError, match=r"Possible: \['e_1', 'e_2'\]"):
        MultiTaskModel(inputs, outputs)


def dense_of(model):
    """The dense layers of Keras."""
    return [layer for layer in model.layers if type(layer) is kl.Dense]
