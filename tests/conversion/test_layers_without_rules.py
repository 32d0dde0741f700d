"""Layers that no rule knows serve all tasks as they are, where they may."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import multitask, single_task, task_summary

TASKS = ["topic", "tone"]


@keras.saving.register_keras_serializable("tests")
class Position(kl.Layer):
    """Adds what it learns for each place."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="normal")

    def call(self, x):
        return x + self.table


def text():
    """Words with a mask, positions, attention, a recurrent layer; then a plain one."""
    words = keras.Input((6,), dtype="int32")
    x = kl.Embedding(20, 8, mask_zero=True, name="words")(words)
    x = Position(name="places")(x)
    x = kl.MultiHeadAttention(2, 4, name="attention")(x, x) + x
    x = kl.Bidirectional(kl.LSTM(4), name="recurrent")(x)
    x = kl.Dense(5, "relu", name="last")(x)
    return keras.Model(words, x, name="text")


def images():
    """Up and down, a constant, and an operation that no rule knows."""
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(4, 3, 2, padding="same", name="down")(inputs)
    x = ops.cumsum(x, axis=1) * np.full((4, 4, 4), 0.1, "float32")
    x = kl.Conv2DTranspose(3, 3, 2, padding="same", name="up")(x)
    x = kl.Flatten(name="flat")(x)
    return keras.Model(inputs, kl.Dense(5, name="last")(x), name="images")


def example(backbone, rng):
    shape = (7, *backbone.input_shape[1:])
    if len(shape) == 2:
        return rng.integers(0, 20, size=shape).astype("int32")
    return rng.normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    ("make", "until", "shared_input"),
    [
        (text, "recurrent", True),
        (images, "flat", False),
        pytest.param(text, None, False, marks=pytest.mark.long),
        pytest.param(text, "recurrent", False, marks=pytest.mark.long),
        pytest.param(images, None, True, marks=pytest.mark.long),
    ],
)
def test_as_they_are(make, until, shared_input, rng, tmp_path):
    """Equal to the backbone, up to a layer or all of it; files, one task, a step."""
    backbone = make()
    how = {"sharing": "hard"} if until is None else {"share_until": until}
    model = multitask(backbone, TASKS, shared_input=shared_input, verbose=False, **how)
    x = {task: example(backbone, rng) for task in TASKS}
    if shared_input:
        x = dict.fromkeys(TASKS, x["tone"])
    given = x["tone"] if shared_input else x
    found = model.predict(given, verbose=0)
    for task in TASKS:
        expected = backbone.predict(x[task], verbose=0)
        np.testing.assert_allclose(found[task], expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(given, verbose=0)["topic"], found["topic"], atol=1e-6
    )
    alone = single_task(model, "tone")
    np.testing.assert_allclose(
        alone.predict(x["tone"], verbose=0), found["tone"], atol=1e-5
    )
    sharing = {row.layer: row.sharing for row in task_summary(model, verbose=False)}
    assert sharing["last"] == ("hard" if until is None else "independent")
    model.compile("sgd", "mse")
    y = {task: np.ones((7, 5), "float32") for task in TASKS}
    before = [np.array(v) for v in model.trainable_variables]
    model.fit(given, y, verbose=0)
    moved = [np.any(np.array(v) != b) for v, b in zip(model.trainable_variables, before)]
    # Dead units of the last layer, at most.
    assert np.mean(moved) > 0.7


def called_twice():
    """An activation after a task's own layer, then before an operation without a rule."""
    inputs = keras.Input((5,))
    relu = kl.ReLU(name="relu")
    one = relu(kl.Dense(5, name="own")(inputs))
    for _ in range(4):
        one = kl.ReLU()(one)
    return keras.Model(inputs, kl.Concatenate()([one, ops.softmax(relu(inputs))]))


def test_called_twice(rng):
    """What no rule knows never runs on the channels of all tasks side by side."""
    backbone = called_twice()
    x = rng.normal(size=(7, 5)).astype("float32")
    found = multitask(backbone, TASKS, verbose=False).predict(x, verbose=0)
    expected = backbone.predict(x, verbose=0)
    np.testing.assert_allclose(found["tone"], expected, atol=1e-5)


def test_vocabularies_and_what_is_frozen(rng):
    """What was adapted comes along, and what is frozen within a layer stays so."""
    words = keras.Input((), dtype="string")
    vectors = kl.TextVectorization(output_sequence_length=4, name="vectors")
    vectors.adapt(np.array(["to be or not", "be it so"]))
    x = kl.Embedding(20, 8, name="words")(vectors(words))
    attention = kl.MultiHeadAttention(2, 4, name="attention")
    x = kl.GlobalAveragePooling1D(name="mean")(attention(x, x))
    attention._query_dense.trainable = False
    backbone = keras.Model(words, x)
    model = multitask(backbone, TASKS, share_until="mean", heads=2, verbose=False)
    texts = ops.convert_to_tensor(np.array(["be or not", "so it is"]))
    shared = keras.Model(model.input, model.get_layer("mean").output)
    np.testing.assert_allclose(shared(texts), backbone(texts), atol=1e-6)
    heads = len([v for v in model.trainable_variables if "head" in v.path])
    own = len(backbone.trainable_variables)
    assert len(model.trainable_variables) - heads == own


def test_channels_first_are_not_averaged_as_last():
    inputs = keras.Input((3, 8, 9))
    x = kl.MaxPooling2D(2, data_format="channels_first", name="pool")(inputs)
    with pytest.raises(ValueError, match="channels come first"):
        multitask(keras.Model(inputs, x), TASKS, "hard", heads=2, verbose=False)


def test_by_name(rng):
    """With some layers hard, and the others of factors, as long as these come later."""
    backbone = text()
    sharing = {"last": "tucker", "*": "hard"}
    model = multitask(backbone, TASKS, sharing, tolerance=0.5, verbose=False)
    kinds = {row.layer: row.sharing for row in task_summary(model, verbose=False)}
    assert kinds["last"] == "tucker" and kinds["recurrent"] == "hard"
    x = example(backbone, rng)
    assert model.predict(x, verbose=0)["tone"].shape == (7, 5)


def test_masks_reach_every_task(rng):
    """Words behind the end change nothing, for tasks with inputs of their own too."""
    backbone = text()
    for shared_input in (True, False):
        model = multitask(backbone, TASKS, "hard", shared_input=shared_input, verbose=False)
        x = rng.integers(1, 20, size=(3, 6)).astype("int32")
        x[:, 4:] = 0
        given = x if shared_input else {"topic": x, "tone": x[::-1].copy()}
        found = model.predict(given, verbose=0)
        expected = backbone.predict(x, verbose=0)
        np.testing.assert_allclose(found["topic"], expected, atol=1e-5)
        # The backbone itself looks at the mask.
        filled = np.where(x == 0, 7, x)
        assert np.abs(backbone.predict(filled, verbose=0) - expected).max() > 1e-4


def test_copies_where_they_are_converted(rng):
    """After a layer whose kernels are each task's own, the others are copied."""
    model = multitask(text(), TASKS, {"words": "hard"}, verbose=False)
    rows = {row.layer: row for row in task_summary(model, verbose=False)}
    assert rows["words"].sharing == "hard"
    for name in ("places", "attention", "recurrent"):
        assert rows[name].kind == "TaskCopies" and rows[name].sharing == "independent"
        assert rows[name].parameters == rows[name].parameters_if_independent
