"""T copies of any layer against T layers by themselves."""

import doctest

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorly as tl
from keras import layers as kl
from keras import tree

from dmtrl_keras import TensorNormalRegularizer
from dmtrl_keras.layers import TaskCopies, TaskDense, TaskGroup
from dmtrl_keras.parameterizations import TT, Tucker
from dmtrl_keras.regularizers import TraceNorm
from dmtrl_keras.tasks import copies
from dmtrl_keras.testing import check_layer

TASKS = ["age", "mood", "smile"]


def test_examples():
    assert doctest.testmod(copies).failed == 0


@keras.saving.register_keras_serializable("tests")
class Own(kl.Layer):
    """A layer of layers, with a loss and a counter of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        own = {"dtype": self.dtype_policy}
        self.inner = kl.Dense(4, kernel_regularizer="l2", name="inner", **own)
        self.norm = kl.BatchNormalization(name="norm", **own)

    def build(self, shape):
        self.inner.build(shape)
        self.norm.build((*shape[:-1], 4))
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="calls"
        )

    def call(self, x, training=None):
        if training:
            self.calls.assign_add(1)
        y = self.norm(self.inner(x), training=training)
        self.add_loss(keras.ops.mean(y**2))
        return y


LAYERS = {
    "dense": lambda **own: kl.Dense(4, "relu", **own),
    "einsum": lambda **own: kl.EinsumDense("abc,cde->abde", (None, 2, 4), **own),
    "lstm": lambda **own: kl.LSTM(4, return_sequences=True, **own),
    "gru": lambda **own: kl.GRU(4, **own),
    "both ways": lambda **own: kl.Bidirectional(kl.LSTM(2, **own), **own),
    "transposed": lambda **own: kl.Conv1DTranspose(4, 2, strides=2, **own),
    "norm": lambda **own: kl.BatchNormalization(**own),
    "spectral": lambda **own: kl.SpectralNormalization(kl.Dense(4, **own), **own),
    "composite": lambda **own: Own(**own),
    "rms": lambda **own: kl.RMSNormalization(**own),
    "discrete": lambda **own: kl.TimeDistributed(kl.Dense(3, **own), **own),
}
# One of each kind every time.
QUICK = {"einsum", "gru", "composite"}
CASES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in LAYERS
]


def shuffled(layer, rng):
    """Give every variable values of its own."""
    for weight in layer.weights:
        values = rng.uniform(0.2, 1.0, size=weight.shape)
        weight.assign(values.astype(weight.dtype))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_layers_by_themselves(name, shared, rng):
    """In training and out of it: outputs, losses, and what is not trained."""
    make = LAYERS[name]
    layer = TaskCopies(make(name="layer"), TASKS, shared_input=shared)
    batches = 1 if shared else 3
    x = rng.normal(size=(batches * 4, 5, 6)).astype("float32")
    layer(x)
    shuffled(layer, rng)
    alone = []
    for task in range(3):
        twin = layer.task_twin()
        twin(x[:4])
        twin.set_weights(layer.task_weights(task))
        alone.append(twin)
    for training in (True, False):
        found = np.array(layer(x, training=training))
        parts = [x] * 3 if shared else np.split(x, 3)
        kwargs = {} if name in ("einsum", "rms", "transposed") else {"training": training}
        expected = [np.array(twin(p, **kwargs)) for twin, p in zip(alone, parts)]
        np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)
    losses = sum(float(sum(twin.losses)) for twin in alone)
    assert float(sum(layer.losses)) == pytest.approx(losses, rel=1e-5)
    for task, twin in enumerate(alone):
        for one, other in zip(layer.task_weights(task), twin.get_weights()):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["gru", pytest.param("composite", marks=pytest.mark.long)])
@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_promises(name, tasks, rng):
    x = rng.normal(size=(2, 5, 6)).astype("float32")

    def make(dtype=None, **kwargs):
        return TaskCopies(
            LAYERS[name](dtype=dtype), tasks, "tucker", shared_input=True, **kwargs
        )

    check_layer(make, x)


@pytest.mark.parametrize("sharing", ["laf", "tucker", "tt"])
def test_kernels_are_made_of_factors(sharing, rng):
    """Of full rank they are what they were; each rank is the decomposition's."""
    start = kl.LSTM(4, name="lstm")
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    start(x)
    whole = TaskCopies(start, TASKS, sharing, shared_input=True, common_draw=False)
    whole(x)
    assert whole.kernel_names == ["lstm_cell/kernel", "lstm_cell/recurrent_kernel"]
    stacked = [np.array(kernel.value()) for kernel in whole.kernels]
    assert [values.shape for values in stacked] == [(6, 16, 3), (4, 16, 3)]
    for kernel, values in zip(whole.kernels, stacked):
        factors = {name: np.array(v) for name, v in kernel.factors.items()}
        if sharing == "tucker":
            modes = [factors[f"factor_{n}"] for n in (1, 2, 3)]
            composed = tl.tucker_to_tensor((factors["core"], modes))
            np.testing.assert_allclose(composed, values, atol=1e-5)
        if sharing == "laf":
            latent, s = factors.values()
            np.testing.assert_allclose(
                np.einsum("iok,kt->iot", latent, s), values, atol=1e-5
            )
    assert {one.layer for one in whole.factorizations} == {
        "lstm_copies/lstm_cell/kernel",
        "lstm_copies/lstm_cell/recurrent_kernel",
    }


def test_a_start_from_trained_weights(rng):
    """All tasks have them, and can part in the first step."""
    trained = kl.Dense(4)
    x = rng.normal(size=(8, 6)).astype("float32")
    trained(x)
    shuffled(trained, rng)
    layer = TaskCopies(trained, TASKS, Tucker(tolerance=1e-3), shared_input=True)
    outputs = np.split(np.array(layer(x)), 3)
    for output in outputs:
        np.testing.assert_allclose(output, trained(x), atol=0.02)
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("sgd", "mse")
    model.train_on_batch(x, np.repeat([[0.0], [1.0], [2.0]], 8, axis=0) * np.ones(4))
    kernel = np.array(layer.kernels[0].value())
    assert np.abs(kernel[..., 0] - kernel[..., 2]).max() > 1e-4


def test_priors_and_norms(rng):
    """Of the stacked kernels, as of a layer with a rule."""
    x = rng.normal(size=(2, 6)).astype("float32")
    start = kl.Dense(4, use_bias=False)
    start(x)
    kernel = rng.normal(size=(6, 4, 3)).astype("float32")
    for prior in (TraceNorm(0.1), TensorNormalRegularizer(0.1, epsilon=0.1)):
        ours = TaskCopies(start, TASKS, shared_input=True, kernel_regularizer=prior)
        other = TaskDense(4, 3, shared_input=True, use_bias=False, kernel_regularizer=prior)
        for layer in (ours, other):
            layer(x)
        ours.kernels[0].factors["kernel"].assign(kernel)
        other.kernel.assign(kernel)
        for layer in (ours, other):
            layer(x, training=True)
        assert float(sum(ours.losses)) == pytest.approx(float(sum(other.losses)), rel=1e-4)


def test_random_numbers_of_each_task(rng):
    """No two tasks drop the same features, and the same seed drops the same again."""
    x = np.ones((4, 50, 6), "float32")

    def run():
        keras.utils.set_random_seed(1)
        inner = keras.Sequential([kl.Dropout(0.5), kl.Dense(4)])
        layer = TaskCopies(inner, 2, shared_input=True)
        return np.split(np.array(layer(x, training=True)), 2), layer

    (one, other), layer = run()
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(run()[0][0], one)
    before = [np.array(v) for v in layer.variables]
    layer(x, training=False)
    for variable, value in zip(layer.variables, before):
        np.testing.assert_array_equal(variable, value)
    layer(x, training=True)
    assert any(np.any(np.array(v) != b) for v, b in zip(layer.variables, before))


def test_masks(rng):
    """Those of the inputs reach each copy, those of the copies what comes after."""
    ids = np.array([[1, 2, 3, 0], [4, 0, 0, 0]], "int32")
    words = keras.Input((4,), dtype="int32")
    both = TaskCopies(kl.Embedding(9, 5, mask_zero=True), 2, shared_input=True, name="e")
    states = TaskCopies(kl.LSTM(3), 2, name="lstm")
    features = TaskGroup(2)(states(both(words)))
    model = keras.Model(words, features)
    found = model.predict(ids, verbose=0)
    filled = np.where(ids == 0, 7, ids)
    np.testing.assert_allclose(
        found[0], model.predict(np.array([[1, 2, 3, 0]], "int32"), verbose=0)[0], atol=1e-6
    )
    # A word behind the end changes nothing.
    embedding = both.task_weights(1)
    embedding[0][0] = 100.0
    alone = kl.Embedding(9, 5, mask_zero=True)
    lstm = states.task_twin()
    twin = keras.Sequential([keras.Input((4,), dtype="int32"), alone, lstm])
    alone.set_weights(embedding)
    lstm.set_weights(states.task_weights(1))
    np.testing.assert_allclose(found[:, 3:], twin.predict(ids, verbose=0), atol=1e-5)
    assert np.abs(found - model.predict(filled, verbose=0)).max() > 1e-3


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["all", "groups", "two of other lengths"])
def test_attention_at_once(kind, shared, rng):
    """All copies together are what they are one after another, with masks and scores."""
    x = rng.normal(size=(12, 5, 6)).astype("float32")
    other = rng.normal(size=(12, 4, 6)).astype("float32")
    mask = rng.uniform(size=(12, 5, 4)) > 0.3
    mask[..., 0] = True
    if shared:
        x, other, mask = (values[:4] for values in (x, other, mask))
    given = {"args": [{"input": 0}, {"input": 0}], "kwargs": {"use_causal_mask": True}}
    inputs, layer = [x], kl.MultiHeadAttention(2, 3, 4, dropout=0.2)
    if kind == "groups":
        layer = kl.GroupQueryAttention(3, 4, 2)
    if kind == "two of other lengths":
        given["args"][1] = {"input": 1}
        given["kwargs"] = {
            "attention_mask": {"input": 2},
            "return_attention_scores": True,
        }
        inputs += [other, mask]
    both = [
        TaskCopies(layer, TASKS, shared_input=shared, arguments=given) for _ in range(2)
    ]
    for one in both:
        one(inputs)
    shuffled(both[0], rng)
    both[1].set_weights(both[0].get_weights())
    for weight, value in zip(both[1].weights, both[0].get_weights()):
        np.testing.assert_array_equal(weight, value)
    assert both[0]._held.of_all is not None
    both[1]._held.of_all = None
    found, expected = (keras.tree.flatten(one(inputs)) for one in both)
    for y, z in zip(found, expected):
        np.testing.assert_allclose(np.array(y), np.array(z), atol=1e-5)
    parts = np.split(np.array(found[0]), 3)
    assert np.abs(parts[0] - parts[1]).max() > 1e-3


@keras.saving.register_keras_serializable("tests")
class TakesMasksOff(kl.Layer):
    """A layer that takes the mask off its input, as Keras's attention does."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1], 1), initializer="ones", name="w")

    def call(self, x, mask=None):
        x._keras_mask = None
        missing = 0 if mask is None else keras.ops.cast(mask, x.dtype)[..., None]
        return x @ self.scale * missing


RECURRENT = {
    "simple": lambda **own: kl.SimpleRNN(4, return_state=True, **own),
    "lstm": lambda **own: kl.LSTM(4, return_sequences=True, return_state=True, **own),
    "unrolled": lambda **own: kl.LSTM(4, unroll=True, go_backwards=True, **own),
    "no bias": lambda **own: kl.LSTM(4, use_bias=False, recurrent_activation="relu", **own),
    "gru": lambda **own: kl.GRU(4, return_sequences=True, **own),
    "gru before": lambda **own: kl.GRU(4, reset_after=False, **own),
    "gru no bias": lambda **own: kl.GRU(
        4, use_bias=False, zero_output_for_mask=True, **own
    ),
    "as large as possible": lambda **own: kl.LSTM(64, **own),
    "both ways": lambda **own: kl.Bidirectional(
        kl.LSTM(3, return_sequences=True, **own), **own
    ),
    "both ways, summed": lambda **own: kl.Bidirectional(
        kl.GRU(3, return_state=True, **own), merge_mode="sum", **own
    ),
    "two kinds": lambda **own: kl.Bidirectional(
        kl.LSTM(3, **own),
        backward_layer=kl.GRU(3, go_backwards=True, **own),
        merge_mode="mul",
        **own,
    ),
}


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("lstm", "gru", "both ways") else pytest.mark.long
        )
        for name in RECURRENT
    ],
)
def test_recurrent_at_once(name, masked, rng):
    """One loop over time is what the layers do by themselves: outputs, gradients, masks."""
    inputs = keras.Input((5, 6))
    x = kl.Masking()(inputs) if masked else inputs
    layer = TaskCopies(RECURRENT[name](name="layer"), TASKS, shared_input=False)
    copies = layer(x)
    assert layer._held.of_all is not None
    model = keras.Model(inputs, copies)
    shuffled(layer, rng)
    for weight in layer.weights:
        weight.assign(weight * rng.choice([-1.0, 1.0], size=weight.shape))
    data = rng.normal(size=(12, 5, 6)).astype("float32")
    data[::3, 3:] = 0
    with tf.GradientTape() as tape:
        found = model(data)
        loss = sum(tf.reduce_sum(y**2) for y in tf.nest.flatten(found))
    held = [*layer._held.kernels, *layer._held.others]
    stacked = [*(kernel.factors["kernel"] for kernel in layer.kernels), *layer._others]
    gradients = tape.gradient(loss, [v.value for v in stacked])
    for task in range(3):
        own = keras.Input((5, 6))
        twin = layer.task_twin()
        alone = keras.Model(own, twin(kl.Masking()(own) if masked else own))
        twin.set_weights(layer.task_weights(task))
        with tf.GradientTape() as tape:
            expected = alone(data[4 * task : 4 * task + 4])
            loss = sum(tf.reduce_sum(y**2) for y in tf.nest.flatten(expected))
        tree.map_structure(
            lambda one, other, t=task: np.testing.assert_allclose(
                one[4 * t : 4 * t + 4], other, atol=1e-5
            ),
            list(tf.nest.flatten(found)),
            list(tf.nest.flatten(expected)),
        )
        theirs = tape.gradient(loss, twin.trainable_variables)
        mine = {id(v): g[..., task] for v, g in zip(held, gradients)}
        for variable, gradient in zip(layer.layer.trainable_variables, theirs):
            np.testing.assert_allclose(mine[id(variable)], gradient, rtol=1e-3, atol=1e-4)


def test_states_of_recurrent_layers(rng):
    """Given ones, and those that a layer starts from."""
    sequences, states = keras.Input((5, 6)), [keras.Input((4,)), keras.Input((4,))]
    layer = TaskCopies(
        kl.LSTM(4),
        2,
        arguments={
            "args": [{"input": 0}],
            "kwargs": {"initial_state": [{"input": 1}, {"input": 2}]},
        },
    )
    model = keras.Model([sequences, *states], layer([sequences, *states]))
    assert layer._held.of_all is not None
    data = [rng.normal(size=(6, *x.shape[1:])).astype("float32") for x in model.inputs]
    found = model(data)
    for task in range(2):
        twin = layer.task_twin()
        twin.build((None, 5, 6))
        twin.set_weights(layer.task_weights(task))
        x, *start = (values[3 * task : 3 * task + 3] for values in data)
        expected = twin(x, initial_state=start)
        np.testing.assert_allclose(found[3 * task : 3 * task + 3], expected, atol=1e-5)


def test_recurrent_one_by_one():
    """Dropout, penalties on outputs, a loop within a loop, and large kernels."""
    for layer in (
        kl.LSTM(3, dropout=0.5),
        kl.GRU(3, recurrent_dropout=0.5),
        kl.Bidirectional(kl.SimpleRNN(3), activity_regularizer="l2"),
        kl.Bidirectional(kl.LSTM(3, dropout=0.1)),
        kl.RNN(kl.LSTMCell(3)),
        kl.LSTM(72),
    ):
        copies = TaskCopies(layer, 2)
        copies(np.zeros((4, 5, 6), "float32"))
        assert copies._held.of_all is None


def test_masks_that_a_layer_takes_off(rng):
    """The next task has it again."""
    x = keras.ops.convert_to_tensor(rng.normal(size=(2, 3, 4)).astype("float32"))
    x._keras_mask = keras.ops.convert_to_tensor([[True, True, False]] * 2)
    found = np.array(TaskCopies(TakesMasksOff(), 2, shared_input=True)(x))
    np.testing.assert_array_equal(found[:2], found[2:])
    assert np.abs(found[:, :2]).min() > 0 and not found[:, 2].any()


def test_penalties_on_what_attention_returns(rng):
    """They are of each copy, one after another."""
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    layer = kl.MultiHeadAttention(2, 3, activity_regularizer="l2")
    copies = TaskCopies(layer, 2, shared_input=True)
    copies([x, x])
    assert copies._held.of_all is None and copies.losses


def test_frozen(rng):
    """Frozen copies don't learn, and run as a frozen layer does."""
    norm = kl.BatchNormalization()
    x = rng.normal(3, size=(8, 6)).astype("float32")
    layer = TaskCopies(norm, 2, shared_input=True, trainable=False)
    np.testing.assert_allclose(layer(x, training=True), np.tile(x, (2, 1)), rtol=1e-3)
    assert not layer.trainable_variables
    layer.trainable = True
    assert len(layer.trainable_variables) == 2
    assert abs(float(np.mean(layer(x, training=True)))) < 1e-3
    frozen = kl.Dense(3, trainable=False)
    frozen(x)
    layer = TaskCopies(frozen, 2, "laf", shared_input=True)
    layer(x)
    assert not layer.trainable and not layer.trainable_variables
    layer.trainable = True
    assert len(layer.trainable_variables) == 3


def test_a_list_of_ways(rng):
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    layer = TaskCopies(kl.GRU(4), 2, ["hard", TT(rank=2)], shared_input=True)
    layer(x)
    assert [kernel.sharing.name for kernel in layer.kernels] == ["hard", "tt"]
    again = TaskCopies.from_config(layer.get_config())
    again(x)
    assert [k.rank for k in again.kernels] == [k.rank for k in layer.kernels]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "lstm"}, "TaskCopies: `layer` must be a Keras layer. Received: .*lstm"),
        ({"layer": TaskDense(3, 2)}, "a layer of one task"),
        ({"layer": kl.ReLU()}, "expected|must be a layer with weights"),
        ({"tasks": 0}, "tasks"),
        ({"sharing": ["laf", "laf"]}, r"each of the kernels \['kernel'\].*2 of them"),
        ({"sharing": Tucker(rank=99)}, "TaskCopies 'dense_copies', kernel.*99"),
        ({"shared_input": [True, False]}, "each of 1 inputs"),
        ({"shared_input": "no"}, "shared_input"),
    ],
)
def test_errors(arguments, message, rng):
    arguments = {"layer": kl.Dense(4, name="dense"), "tasks": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        TaskCopies(**arguments)(rng.normal(size=(4, 6)).astype("float32"))


def test_kernels_that_a_layer_assigns(rng):
    """They can't be factors, which would not be what was assigned."""
    x = rng.normal(size=(2, 6)).astype("float32")
    layer = TaskCopies(kl.SpectralNormalization(kl.Dense(4)), 2, "laf", shared_input=True)
    layer(x)
    with pytest.raises(ValueError, match=r"assigns its kernel.*'laf'.*'independent'"):
        layer(x, training=True)


def test_examples_of_other_tasks_are_missing(rng):
    with pytest.raises(ValueError, match=r"examples of 3 tasks.*shape \(4, 6\)"):
        TaskCopies(kl.Dense(2), 3)(rng.normal(size=(4, 6)).astype("float32"))
