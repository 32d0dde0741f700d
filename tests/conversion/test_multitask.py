"""multitask(): sharing, forms, heads, errors, on small backbones of every layer kind."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import (
    factorization_report,
    factorize,
    multitask,
    single_task,
    task_summary,
)
from dmtrl_keras.conversion import Rule, register_rule, rules
from dmtrl_keras.ground.copying import load_weights
from dmtrl_keras.layers import (
    TaskConv2D,
    TaskCopies,
    TaskDepthwiseConv2D,
    TaskRepeat,
    TTConv2D,
    TuckerConv2D,
    task_layers,
)
from dmtrl_keras.parameterizations import TT

NAMES = ["a", "b", "c"]


def randomize(model, rng):
    """Weights of the same scale that are all different."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.Model) or not layer.weights:
            continue
        weights = [
            w + 0.1 * rng.uniform(size=w.shape) if np.ndim(w) else w
            for w in layer.get_weights()
        ]
        load_weights(layer, weights)
    return model


def small(*, heads=True):
    """Conv -> batch norm -> residual block -> pooling -> dense."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = kl.Conv2D(6, 3, padding="same", name="stem")(inputs)
    x = kl.BatchNormalization(name="stem_bn")(x)
    x = kl.ReLU(name="stem_relu")(x)
    y = kl.Conv2D(6, 3, padding="same", use_bias=False, name="block_conv")(x)
    y = kl.BatchNormalization(name="block_bn")(y)
    x = kl.Add(name="block_add")([x, y])
    x = kl.Conv2D(8, 1, strides=2, activation="relu", name="last_conv")(x)
    x = kl.GlobalAveragePooling2D(name="pool")(x)
    if heads:
        x = kl.Dense(4, activation="softmax", name="classes")(x)
    return keras.Model(inputs, x, name="small")


def _every_layer():
    """Cases of one or few layers on an image `(8, 8, 6)`, as functions of a tensor."""

    def gate(x):
        y = kl.GlobalAveragePooling2D()(x)
        y = kl.Reshape((1, 1, 6))(y)
        return kl.Multiply()([x, kl.Conv2D(6, 1, activation="sigmoid")(y)])

    def spatial_gate(x):
        return kl.Multiply()([x, kl.Conv2D(1, 3, padding="same")(x)])

    def nested(x):
        inner = keras.Sequential([keras.Input((8, 8, 6)), kl.Conv2D(4, 2), kl.ReLU()])
        return keras.Model(inner.inputs, kl.Conv2D(3, 1)(inner.outputs[0]))(x)

    def twice(x):
        layer, norm = kl.Conv2D(6, 3, padding="same"), kl.BatchNormalization()
        return norm(layer(kl.ReLU()(norm(layer(x)))))

    def operators(x):
        return ops.relu(x + 3.0) * x - 0.5 * x

    def patches(x):
        x = kl.Permute((3, 1, 2))(kl.Conv2D(4, 2, strides=2)(x))
        return kl.Permute((2, 1))(kl.Reshape((4, 16))(x))

    def dense_softmax(x):
        return kl.Dense(5, activation="softmax")(kl.Flatten()(x))

    def concatenation(x):
        return kl.Concatenate()([kl.Conv2D(4, 3, padding="same")(x), x, kl.ReLU()(x)])

    def prelu(x):
        return kl.PReLU(shared_axes=(1, 2), alpha_initializer="random_normal")(x)

    return {
        "conv": lambda x: kl.Conv2D(4, 3, strides=2, padding="same")(x),
        "conv-groups": lambda x: kl.Conv2D(4, 3, groups=2)(x),
        "conv-depthwise-groups": lambda x: kl.Conv2D(12, 3, groups=6)(x),
        "conv-uneven-strides": lambda x: kl.Conv2D(6, 3, groups=6, strides=(1, 2))(x),
        "conv-dilated": lambda x: kl.Conv2D(4, 3, dilation_rate=2, use_bias=False)(x),
        "conv-softmax": lambda x: kl.Conv2D(4, 1, activation="softmax")(x),
        "depthwise": lambda x: kl.DepthwiseConv2D(3, depth_multiplier=2)(x),
        "separable": lambda x: kl.SeparableConv2D(
            4, 3, strides=2, depth_multiplier=2, padding="same", activation="relu"
        )(x),
        "conv1d": lambda x: kl.Conv1D(4, 3, padding="causal")(kl.Reshape((64, 6))(x)),
        "depthwise1d": lambda x: kl.DepthwiseConv1D(3)(kl.Reshape((64, 6))(x)),
        "separable1d": lambda x: kl.SeparableConv1D(4, 3)(kl.Reshape((64, 6))(x)),
        "conv3d": lambda x: kl.Conv3D(4, 2)(kl.Reshape((4, 4, 4, 6))(x)),
        "dense": lambda x: kl.Dense(5, activation="gelu")(x),
        "dense-softmax": dense_softmax,
        "batch-norm": lambda x: kl.BatchNormalization(axis=3)(x),
        "group-norm": lambda x: kl.GroupNormalization(groups=3)(x),
        "instance-norm": lambda x: kl.GroupNormalization(groups=-1)(x),
        "layer-norm": lambda x: kl.LayerNormalization(epsilon=1e-6)(x),
        "layer-norm-plain": lambda x: kl.LayerNormalization(center=False, scale=False)(x),
        "unit-norm": lambda x: kl.UnitNormalization()(x),
        "prelu": prelu,
        "softmax": lambda x: kl.Softmax()(x),
        "activation-softmax": lambda x: kl.Activation("softmax")(x),
        "pooling": lambda x: kl.AveragePooling2D(2)(kl.MaxPooling2D(3, 1)(x)),
        "padding": lambda x: kl.Cropping2D(1)(kl.ZeroPadding2D(((0, 2), (1, 0)))(x)),
        "upsampling": lambda x: kl.UpSampling2D(2, interpolation="bilinear")(x),
        "dropout": lambda x: kl.SpatialDropout2D(0.3)(kl.Dropout(0.5)(x)),
        "stochastic-depth": lambda x: kl.Dropout(0.5, noise_shape=(None, 1, 1, 1))(x),
        "rescaling": lambda x: kl.Rescaling([1.0, 2, 3, 4, 5, 6], offset=1.0)(x),
        "normalization": lambda x: kl.Normalization(
            mean=[1.0, 2, 3, 4, 5, 6], variance=[1.0, 2, 1, 2, 1, 2]
        )(x),
        "normalization-of-all": lambda x: kl.Normalization(None, mean=1, variance=4)(x),
        "squeeze-excite": gate,
        "spatial-gate": spatial_gate,
        "maximum": lambda x: kl.Maximum()([x, kl.Average()([x, kl.ReLU()(x)])]),
        "concatenate": concatenation,
        "concatenate-rows": lambda x: kl.Concatenate(axis=1)([x, x]),
        "flatten": lambda x: kl.Flatten()(x),
        "repeat-vector": lambda x: kl.RepeatVector(3)(kl.GlobalMaxPooling2D()(x)),
        "patches": patches,
        "nested": nested,
        "twice": twice,
        "operators": operators,
    }


EVERY_LAYER = _every_layer()


@pytest.mark.parametrize("case", EVERY_LAYER)
@pytest.mark.parametrize("shared_input", [True, False])
def test_every_layer(case, shared_input, rng):
    """After a layer that takes the tasks apart, each layer does what it does alone."""
    inputs = keras.Input((8, 8, 6))
    # With this the layer at hand meets grouped features.
    x = kl.Conv2D(6, 1, name="apart")(inputs)
    backbone = randomize(keras.Model(inputs, EVERY_LAYER[case](x)), rng)
    images = rng.normal(size=(3, 2, 8, 8, 6)).astype("float32")
    model = multitask(backbone, NAMES, shared_input=shared_input)
    given = images[0] if shared_input else dict(zip(NAMES, images))
    outputs = model(given)
    for index, name in enumerate(NAMES):
        own = images[0 if shared_input else index]
        expected = ops.convert_to_numpy(backbone(own))
        np.testing.assert_allclose(outputs[name], expected, atol=1e-4, rtol=1e-4)
        alone = single_task(model, name)
        np.testing.assert_allclose(alone(own), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", EVERY_LAYER)
@pytest.mark.parametrize("shared_input", [True, False])
def test_every_layer_first(case, shared_input, rng):
    """The same as the first layer of the network, hard-shared and not."""
    inputs = keras.Input((8, 8, 6))
    x = EVERY_LAYER[case](inputs)
    backbone = randomize(keras.Model(inputs, x), rng)
    images = rng.normal(size=(3, 2, 8, 8, 6)).astype("float32")
    given = images[0] if shared_input else dict(zip(NAMES, images))
    for sharing in ("hard", "independent"):
        model = multitask(backbone, NAMES, sharing=sharing, shared_input=shared_input)
        if sharing == "hard":
            assert model.count_params() == backbone.count_params()
            assert not task_layers(model)
        outputs = model(given)
        for index, name in enumerate(NAMES):
            own = images[0 if shared_input else index]
            expected = ops.convert_to_numpy(backbone(own))
            np.testing.assert_allclose(outputs[name], expected, atol=1e-4, rtol=1e-4)


def test_tasks_are_apart(rng):
    """Every weight of a task moves its own output and no other; so for the input."""
    backbone = randomize(small(heads=False), rng)
    model = multitask(backbone, NAMES, shared_input=False)
    images = {name: rng.normal(size=(2, 8, 8, 3)).astype("float32") for name in NAMES}
    before = {k: ops.convert_to_numpy(v) for k, v in model(images).items()}
    images["b"] = images["b"] + 1.0
    after = model(images)
    np.testing.assert_array_equal(after["a"], before["a"])
    np.testing.assert_array_equal(after["c"], before["c"])
    assert not np.allclose(after["b"], before["b"])
    conv = model.get_layer("block_conv")
    kernel = ops.convert_to_numpy(conv.kernel).copy()
    kernel[..., 2] = 0
    conv.kernel.assign(kernel)
    changed = model(images)
    np.testing.assert_array_equal(changed["a"], after["a"])
    np.testing.assert_array_equal(changed["b"], after["b"])
    assert not np.allclose(changed["c"], after["c"])


@pytest.mark.parametrize("shared_input", [True, False])
def test_share_until(shared_input, rng):
    """All up to a layer is ordinary Keras and runs once; the rest is per task."""
    backbone = randomize(small(), rng)
    model = multitask(backbone, NAMES, share_until="block_add", shared_input=shared_input)
    assert type(model.get_layer("stem")) is kl.Conv2D
    assert type(model.get_layer("block_conv")) is kl.Conv2D
    assert isinstance(model.get_layer("last_conv"), TaskConv2D)
    assert model.get_layer("last_conv").shared_input == shared_input
    trunk = sum(
        backbone.get_layer(name).count_params()
        for name in ("stem", "stem_bn", "block_conv", "block_bn")
    )
    assert model.count_params() == trunk + 3 * (backbone.count_params() - trunk)
    # Once: the trunk has one node, on all tasks' examples where their inputs differ.
    assert len(model.get_layer("stem")._inbound_nodes) == 1
    images = rng.normal(size=(3, 4, 8, 8, 3)).astype("float32")
    outputs = model(images[0] if shared_input else dict(zip(NAMES, images)))
    for index, name in enumerate(NAMES):
        own = images[0 if shared_input else index]
        np.testing.assert_allclose(outputs[name], backbone(own), atol=1e-5)


def test_share_until_in_a_branch(rng):
    """Common and task-specific features meet in an addition."""
    backbone = randomize(small(), rng)
    model = multitask(backbone, NAMES, share_until="stem_relu")
    assert any(isinstance(layer, TaskRepeat) for layer in model.layers)
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    for output in model(x).values():
        np.testing.assert_allclose(output, backbone(x), atol=1e-5)


def test_share_until_a_nested_model(rng):
    """A nested model's name stands for all that is in it."""
    trunk = small(heads=False)
    inputs = keras.Input((8, 8, 3))
    backbone = keras.Model(inputs, kl.Dense(4)(trunk(inputs)))
    model = multitask(randomize(backbone, rng), NAMES, share_until="small")
    assert len(task_layers(model)) == 1
    x = rng.normal(size=(6, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(model(x)["a"], backbone(x), atol=1e-5)
    alone = single_task(model, "c")
    np.testing.assert_allclose(alone(x), backbone(x), atol=1e-5)


def test_batch_statistics_of_tasks(rng):
    """In training each task's batch normalization has its own statistics."""
    backbone = small(heads=False)
    model = multitask(backbone, ["a", "b"], shared_input=False)
    images = {"a": rng.normal(size=(16, 8, 8, 3)), "b": 9 + rng.normal(size=(16, 8, 8, 3))}
    model(images, training=True)
    means = ops.convert_to_numpy(model.get_layer("stem_bn").moving_mean)
    backbone(images["b"], training=True)
    expected = ops.convert_to_numpy(backbone.get_layer("stem_bn").moving_mean)
    np.testing.assert_allclose(means[6:], expected, atol=1e-5)
    assert not np.allclose(means[:6], expected, atol=1e-2)


@pytest.mark.parametrize("sharing", ["laf", "tucker", "tt"])
def test_factorised(sharing, rng, capsys):
    """Pretrained kernels within the tolerance; a report with ranks, errors, sizes."""
    backbone = randomize(small(), rng)
    model = multitask(backbone, NAMES, sharing=sharing, tolerance=0.2)
    report = factorization_report(model)
    layers = [entry.layer for entry in report]
    assert layers == ["stem", "block_conv", "last_conv", "classes"]
    for entry in report:
        assert entry.method == sharing
        assert entry.error <= 0.2
        assert entry.rank[-1] == 3
        assert entry.shape[-1] == 3
        layer = model.get_layer(entry.layer)
        assert entry.rank == layer.rank
        kernel = ops.convert_to_numpy(backbone.get_layer(entry.layer).kernel)
        for task in range(3):
            difference = ops.convert_to_numpy(layer.task_kernel(task)) - kernel
            error = np.linalg.norm(difference) / np.linalg.norm(kernel)
            np.testing.assert_allclose(error, entry.error, atol=1e-4)
    printed = capsys.readouterr().out
    assert "block_conv" in printed and "Error" in printed
    # Nothing lost at full rank.
    whole = multitask(backbone, NAMES, sharing=sharing, rank=1.0, verbose=False)
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(whole(x)["b"], backbone(x), atol=1e-4)
    assert "block_conv" not in capsys.readouterr().out


def test_layers_that_grow():
    """They get the factors that were asked for; the report says so, and if the whole
    network grew, a warning.
    """
    backbone = keras.Sequential(
        [
            keras.Input((30,)),
            keras.layers.Dense(30, name="large"),
            keras.layers.Dense(3, name="narrow"),
            keras.layers.Dense(4, name="small"),
        ]
    )
    # Of rank 1, as a layer is that compresses.
    backbone.get_layer("large").kernel.assign(np.outer(np.arange(30), np.ones(30)))
    arguments = {"tolerance": 0.1, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = multitask(backbone, NAMES, sharing="tucker", **arguments)
    large, narrow, small = factorization_report(model)
    assert small.parameters_after > small.parameters_before
    for entry in (large, narrow):
        assert entry.parameters_after <= entry.parameters_before
    with pytest.warns(UserWarning, match=r"multitask: .* times: small \(1\.\d+\)\. ") as w:
        multitask(backbone, NAMES, {"small": "tucker"}, **arguments)
    assert any(warning.filename == __file__ for warning in w)


def test_sharing_by_name(rng):
    """The first pattern that fits holds; objects keep their own ranks."""
    model = multitask(
        randomize(small(), rng),
        NAMES,
        sharing={"stem*": "hard", "block_*": TT(rank=2), "*_conv": "tucker"},
        tolerance=0.1,
        verbose=False,
    )
    kinds = {name: model.get_layer(name) for name in ("stem", "block_conv", "last_conv")}
    assert type(kinds["stem"]) is kl.Conv2D
    assert isinstance(kinds["block_conv"], TTConv2D)
    assert max(kinds["block_conv"].rank[:-1]) == 2 and kinds["block_conv"].rank[-1] == 3
    assert isinstance(kinds["last_conv"], TuckerConv2D)
    assert model.get_layer("classes").sharing.name == "independent"
    assert model.get_layer("stem_bn").gamma.shape == (6,)
    assert model.get_layer("block_bn").gamma.shape == (18,)


def test_ranks_by_class(rng):
    """Layers of a kind have other modes than those of another; the tasks have their own."""
    backbone = randomize(small(), rng)
    ranks = {"stem": 2, "Conv2D": (1.0, 1.0, 0.5, 0.5), "Dense": (0.5, 2)}
    model = multitask(backbone, ["a", "b"], "tucker", rank=ranks, verbose=False)
    assert model.get_layer("stem").rank == (2, 2, 2, 2, 2)
    window, *channels, tasks = model.get_layer("last_conv").rank[1:]
    assert window == 1 and channels == [3, 4] and tasks == 2
    assert model.get_layer("classes").rank[1:] == (2, 2)
    few = multitask(
        backbone, 4, {"Dense": "tucker"}, rank=0.5, task_rank={"c*": 2}, verbose=False
    )
    assert few.get_layer("classes").rank[-1] == 2
    assert few.get_layer("stem").sharing.name == "independent"
    with pytest.raises(
        ValueError, match=r"`task_rank` for layers \['Conv2D'\] does nothing"
    ):
        multitask(
            backbone, 4, {"Dense": "tucker"}, task_rank={"Conv2D": 2, "*": 3}, verbose=False
        )
    with pytest.raises(ValueError, match=r"or be the class of one.*'Conv3D'"):
        multitask(backbone, 4, "tucker", rank={"Conv3D": 2})
    with pytest.raises(ValueError, match=r"layer 'stem'.*at most 2, the number of tasks"):
        multitask(backbone, 2, "tucker", rank=0.5, task_rank=3)


def test_hard_after_the_split(rng):
    """A hard-shared kernel on task-specific features: one kernel, three biases."""
    backbone = randomize(small(), rng)
    model = multitask(backbone, NAMES, sharing={"last_conv": "hard"})
    layer = model.get_layer("last_conv")
    assert layer.factors["kernel"].shape == (1, 1, 6, 8, 1)
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(model(x)["c"], backbone(x), atol=1e-5)


def test_depthwise_groups_run_at_once():
    """A convolution with one channel per group is one depthwise convolution."""
    inputs = keras.Input((8, 8, 6))
    backbone = keras.Model(inputs, kl.Conv2D(12, 3, groups=6, name="groups")(inputs))
    layer = multitask(backbone, 2).get_layer("groups")
    assert isinstance(layer, TaskDepthwiseConv2D)
    assert layer.depth_multiplier == 2


def test_arguments_of_layers_are_kept():
    """Regularizer, constraint, initializer, trainable, dtype and bias."""
    inputs = keras.Input((4,))
    layer = kl.Dense(
        5,
        kernel_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.MaxNorm(2),
        kernel_initializer=keras.initializers.HeNormal(),
        use_bias=False,
        trainable=False,
        dtype="mixed_bfloat16",
        name="fc",
    )
    backbone = keras.Model(inputs, kl.Dropout(0.1, name="drop")(layer(inputs)))
    model = multitask(backbone, 2)
    fc = model.get_layer("fc")
    assert fc.kernel_regularizer.l2 == pytest.approx(0.1)
    assert isinstance(fc.kernel_constraint, keras.constraints.MaxNorm)
    assert isinstance(fc.kernel_initializer, keras.initializers.HeNormal)
    assert fc.bias is None and not fc.trainable
    assert fc.dtype_policy.name == "mixed_bfloat16"
    assert model.get_layer("drop").rate == 0.1
    alone = single_task(model, 1).get_layer("fc")
    assert not alone.trainable and alone.dtype_policy.name == "mixed_bfloat16"
    assert isinstance(alone.kernel_constraint, keras.constraints.MaxNorm)


def test_adapted_normalization(rng):
    """Statistics from `adapt` are weights; they come along."""
    data = rng.normal(3, 5, size=(50, 8, 8, 6)).astype("float32")
    layer = kl.Normalization(name="norm")
    layer.adapt(data)
    inputs = keras.Input((8, 8, 6))
    for x in (layer(inputs), layer(kl.Conv2D(6, 1)(inputs))):
        backbone = keras.Model(inputs, x)
        for shared_input in (True, False):
            model = multitask(backbone, 2, shared_input=shared_input)
            given = data if shared_input else {"task_0": data, "task_1": data}
            expected = ops.convert_to_numpy(backbone(data))
            np.testing.assert_allclose(model(given)["task_1"], expected, atol=1e-4)
            np.testing.assert_allclose(single_task(model, 0)(data), expected, atol=1e-4)


def test_backbone_is_left_alone(rng):
    """Its weights and layers are what they were."""
    backbone = randomize(small(), rng)
    before = backbone.get_weights()
    model = multitask(backbone, NAMES, sharing="tucker", verbose=False)
    model.compile("sgd", {name: "sparse_categorical_crossentropy" for name in NAMES})
    labels = {name: rng.integers(4, size=8) for name in NAMES}
    model.fit(rng.normal(size=(8, 8, 8, 3)), labels, verbose=0)
    for a, b in zip(before, backbone.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_sequential_backbone(rng):
    """A Sequential model, with random preprocessing that runs in training only."""
    backbone = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            kl.RandomFlip(),
            kl.Conv2D(4, 3),
            kl.Flatten(),
            kl.Dense(2),
        ]
    )
    model = multitask(randomize(backbone, rng), NAMES)
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    outputs = model(x, training=False)
    np.testing.assert_allclose(outputs["a"], backbone(x, training=False), atol=1e-5)


def test_several_inputs(rng):
    """A backbone with an image and a vector, shared and one of each per task."""
    image, vector = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="vector")
    x = kl.Flatten()(kl.Conv2D(4, 3)(image))
    outputs = kl.Dense(2)(kl.Concatenate()([x, kl.Dense(3)(vector)]))
    backbone = keras.Model({"image": image, "vector": vector}, outputs)
    data = {"image": rng.normal(size=(2, 8, 8, 3)), "vector": rng.normal(size=(2, 4))}
    data = {k: v.astype("float32") for k, v in data.items()}
    model = multitask(backbone, NAMES)
    np.testing.assert_allclose(model(data)["b"], backbone(data), atol=1e-5)
    model = multitask(backbone, NAMES, shared_input=False)
    outputs = model(dict.fromkeys(NAMES, data))
    np.testing.assert_allclose(outputs["b"], backbone(data), atol=1e-5)
    alone = single_task(model, "b")
    np.testing.assert_allclose(alone(data), backbone(data), atol=1e-5)


def test_inputs_named_as_the_tasks(rng):
    """A shared dict of inputs that happen to have the tasks' names stays shared."""
    inputs = {name: keras.Input((4,), name=name) for name in ("a", "b")}
    x = kl.Concatenate()([inputs["a"], kl.Dense(3)(inputs["b"])])
    backbone = keras.Model(inputs, kl.Dense(2)(x))
    model = multitask(backbone, ["a", "b"])
    data = {name: rng.normal(size=(3, 4)).astype("float32") for name in inputs}
    np.testing.assert_allclose(model(data)["b"], backbone(data), atol=1e-5)
    np.testing.assert_allclose(single_task(model, "a")(data), backbone(data), atol=1e-5)


def test_heads(rng):
    """Classes, a function, a layer; probabilities; features that are images."""
    backbone = small(heads=False)
    heads = {"a": 5, "b": lambda x: kl.Dense(2)(kl.Dropout(0.5)(x)), "c": kl.Dense(3)}
    model = multitask(backbone, NAMES, heads=heads)
    outputs = model(rng.normal(size=(2, 8, 8, 3)))
    assert {k: v.shape[1] for k, v in outputs.items()} == {"a": 5, "b": 2, "c": 3}
    np.testing.assert_allclose(ops.sum(outputs["a"], -1), 1, atol=1e-5)
    binary = multitask(backbone, NAMES, heads=1)
    assert binary.get_layer("b_head").activation is keras.activations.sigmoid
    maps = keras.Model(backbone.inputs, backbone.get_layer("last_conv").output)
    pooled = multitask(maps, NAMES, heads=4, sharing="hard")
    assert pooled.output["a"].shape == (None, 4)
    raw = multitask(maps, NAMES, heads=lambda x: kl.Dense(1)(kl.Flatten()(x)))
    assert raw.output["c"].shape == (None, 1)


def test_one_task(rng):
    """T = 1 is the backbone."""
    backbone = randomize(small(), rng)
    for shared_input in (True, False):
        model = multitask(backbone, ["only"], shared_input=shared_input)
        x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
        outputs = model(x if shared_input else {"only": x})
        np.testing.assert_allclose(outputs["only"], backbone(x), atol=1e-5)


def test_permuting_the_tasks(rng):
    """Tasks in another order: the same outputs under the same names, all methods."""
    backbone = randomize(small(), rng)
    images = {name: rng.normal(size=(2, 8, 8, 3)).astype("float32") for name in NAMES}
    for sharing in ("independent", "hard", "laf", "tucker", "tt"):
        outputs = []
        for names in (NAMES, NAMES[::-1]):
            model = multitask(
                backbone, names, sharing=sharing, shared_input=False, verbose=False
            )
            outputs.append(model(images))
        for name in NAMES:
            np.testing.assert_allclose(outputs[0][name], outputs[1][name], atol=1e-4)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("sharing", ["independent", "tucker"])
def test_file_and_factorize(sharing, shared_input, rng, tmp_path):
    """.keras files in safe mode, weights files, `clone_model` and `factorize`."""
    backbone = randomize(small(), rng)
    model = multitask(
        backbone,
        NAMES,
        sharing=sharing,
        share_until="stem_relu",
        shared_input=shared_input,
        verbose=False,
    )
    x = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    given = x if shared_input else dict.fromkeys(NAMES, x)
    expected = model(given)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert type(loaded) is type(model) and loaded.task_names == tuple(NAMES)
    for name in NAMES:
        np.testing.assert_allclose(loaded(given)[name], expected[name], atol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = type(model).from_config(model.get_config())
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(fresh(given)["c"], expected["c"], atol=1e-6)
    if sharing == "independent":
        factorized = factorize(model, "tt", rank=1.0, verbose=False, keep_larger=True)
        assert type(factorized) is type(model)
        np.testing.assert_allclose(factorized(given)["b"], expected["b"], atol=1e-4)


def test_mixed_precision(rng):
    """A backbone in half precision; heads give float32."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        backbone = small(heads=False)
        model = multitask(backbone, NAMES, heads=3)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("block_conv").compute_dtype == "bfloat16"
    outputs = model(rng.normal(size=(2, 8, 8, 3)))
    assert ops.dtype(outputs["a"]) == "float32"


@pytest.mark.parametrize("shared_input", [True, False])
def test_trains_and_leaves_state_alone(shared_input, rng):
    """`fit` moves all trainable weights; `evaluate` and `predict` none at all."""
    model = multitask(
        small(), NAMES, sharing="tt", shared_input=shared_input, verbose=False
    )
    # Once in a graph.
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        run_eagerly=not shared_input,
    )
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    x = x if shared_input else dict.fromkeys(NAMES, x)
    y = {name: rng.integers(4, size=16) for name in NAMES}
    before = [ops.convert_to_numpy(v) for v in model.weights]
    model.predict(x, verbose=0)
    results = model.evaluate(x, y, verbose=0, return_dict=True)
    assert {f"{name}_accuracy" for name in NAMES} < set(results)
    for value, weight in zip(before, model.weights):
        np.testing.assert_array_equal(value, ops.convert_to_numpy(weight))
    model.fit(x, y, batch_size=8, verbose=0)
    trainable = {id(weight) for weight in model.trainable_weights}
    for value, weight in zip(before, model.weights):
        if id(weight) in trainable and "core" not in weight.path:
            assert not np.array_equal(value, ops.convert_to_numpy(weight)), weight.path


class Unknown(kl.Layer):
    """A layer that no rule knows."""

    def call(self, inputs):
        """Double the input."""
        return 2 * inputs


def odd_one():
    """Layers that no rule fits, for as many reasons as there are."""
    inputs = keras.Input((8, 8, 6))
    x = kl.Conv2DTranspose(4, 2, name="up")(inputs)
    inner = keras.Sequential([keras.Input((9, 9, 4)), Unknown(name="odd")], name="inner")
    x = kl.LayerNormalization(axis=[1, 2, 3], name="norm")(inner(x))
    x = kl.PReLU(name="slopes", shared_axes=(1, 2, 3))(x)
    x = kl.Conv2D(6, 1, name="conv")(ops.cumsum(x, axis=1))
    x = x * np.linspace(0, 1, 9 * 9 * 6, dtype="float32").reshape(9, 9, 6)
    x = kl.Conv2D(5, 1, data_format="channels_first", name="first")(x)
    return keras.Model(inputs, kl.Flatten()(x), name="odd_one")


@pytest.mark.parametrize("shared_input", [True, False])
def test_the_general_way(shared_input, rng):
    """What no rule fits is equal to the backbone, too, and each task's own."""
    backbone = odd_one()
    for weight in backbone.weights:
        weight.assign(rng.normal(size=weight.shape))
    x = rng.normal(size=(2, 8, 8, 6)).astype("float32")
    model = multitask(backbone, 2, shared_input=shared_input, verbose=False)
    found = model({"task_0": x, "task_1": x} if not shared_input else x)["task_1"]
    np.testing.assert_allclose(found, backbone(x), rtol=1e-4, atol=1e-4)
    kinds = {row.layer: row.kind for row in task_summary(model, verbose=False)}
    copied = ("norm", "slopes", "first")
    assert all(kinds[name] == "TaskCopies" for name in copied)
    assert kinds["up"] == "TaskConv2DTranspose"
    assert kinds["conv"] == "TaskConv2D"


def test_unsupported_layers_are_listed():
    """All of them, with class, place and reason, before anything is built."""
    inputs = keras.Input((8, 8, 6))
    inner = keras.Sequential(
        [keras.Input((8, 8, 6)), TaskConv2D(3, 1, 2, name="tasks")], name="inner"
    )
    x = TaskCopies(kl.Dense(4), 2, shared_input=True, name="copies")(inner(inputs))
    backbone = keras.Model(inputs, x, name="odd_one")
    with pytest.raises(ValueError) as error:
        multitask(backbone, 2)
    text = str(error.value)
    for part in (
        "'odd_one' has 2 layers",
        "TaskConv2D 'inner/tasks': it holds the kernels of several tasks",
        "TaskCopies 'copies': it holds",
    ):
        assert part in text, part


def test_registered_layer(rng):
    """A user's layer is converted once a rule says how."""
    inputs = keras.Input((8, 8, 6))
    backbone = keras.Model(inputs, Unknown()(kl.Conv2D(4, 1)(inputs)))
    register_rule(Unknown, rule=Rule())
    try:
        x = rng.normal(size=(2, 8, 8, 6)).astype("float32")
        found = multitask(backbone, 2)(x)["task_1"]
        np.testing.assert_allclose(found, backbone(x), atol=1e-5)
    finally:
        del rules._RULES[Unknown]


class Subclassed(keras.Model):
    """A model whose layers can't be seen."""

    def call(self, inputs):
        """Return the input."""
        return inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": 0}, "tasks=0"),
        ({"tasks": ["a", "a"]}, "distinct"),
        ({"sharing": "tensor"}, "sharing.*'tensor'"),
        ({"sharing": {"conv9*": "hard"}}, r"'conv9\*', which fits none of .*'stem'"),
        ({"tolerance": 0.1}, "'independent'.*tolerance=0.1"),
        ({"rank": 2, "sharing": "hard"}, "'hard'.*rank=2"),
        ({"sharing": "tucker", "tolerance": 1.5}, "1.5"),
        ({"sharing": "tucker", "rank": (1, 2)}, r"'stem', kernel \(3, 3, 3, 6\)"),
        ({"share_until": "conv9"}, "share_until='conv9'.*'stem'"),
        ({"heads": {"a": 2}}, r"'a', 'b', 'c'.*\['a'\]"),
        ({"heads": 0}, "'a'.*0"),
        ({"heads": kl.Dense(2, name="one")}, "'one'.*one for all tasks"),
        ({"heads": lambda x: [x, x]}, "one output tensor"),
    ],
)
def test_errors(arguments, message):
    """What was received, and what was expected."""
    arguments = {"tasks": NAMES, **arguments}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        multitask(small(), **arguments)


def test_errors_of_models():
    """Models that are not functional; several outputs without heads."""
    with pytest.raises(ValueError, match="Subclassed"):
        multitask(Subclassed(), 2)
    with pytest.raises(ValueError, match="Sequential"):
        multitask(keras.Sequential([kl.Dense(2)]), 2)
    inputs = keras.Input((4,))
    two = keras.Model(inputs, [kl.Dense(2)(inputs), kl.Dense(3)(inputs)])
    with pytest.raises(ValueError, match="2 outputs"):
        multitask(two, 2)
    model = multitask(two, 2, heads=lambda xs: kl.Concatenate()(xs))
    assert model.output["task_1"].shape == (None, 5)


def inverted_residuals():
    """The layers of MobileNetV2, in few blocks, on images of any size."""
    inputs = keras.Input((None, None, 3))
    x = kl.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    for block, strides in enumerate((2, 1, 2, 1), start=1):
        start = x
        x = kl.ReLU(6.0)(kl.BatchNormalization()(kl.Conv2D(24, 1, use_bias=False)(x)))
        if strides == 2:
            x = kl.ZeroPadding2D(((0, 1), (0, 1)))(x)
        padding = "valid" if strides == 2 else "same"
        x = kl.DepthwiseConv2D(3, strides, padding, use_bias=False)(x)
        x = kl.ReLU(6.0)(kl.BatchNormalization()(x))
        x = kl.BatchNormalization()(kl.Conv2D(8, 1, use_bias=False)(x))
        if strides == 1:
            x = kl.Add(name=f"block_{block}_add")([start, x])
    return keras.Model(inputs, kl.GlobalAveragePooling2D()(x))


def mobile_net():
    """The same of keras.applications."""
    return keras.applications.MobileNetV2(
        include_top=False, weights=None, pooling="avg", alpha=0.35
    )


@pytest.mark.parametrize(
    "make", [inverted_residuals, pytest.param(mobile_net, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("shared_input", [True, False])
def test_images_of_any_size(shared_input, make, rng):
    """A backbone without a fixed input size gives a network without one."""
    backbone = make()
    assert backbone.input_shape == (None, None, None, 3)
    model = multitask(
        backbone, ["a", "b"], share_until="block_2_add", shared_input=shared_input
    )
    for size in ((32, 32), (64, 48)):
        x = rng.normal(size=(2, *size, 3)).astype("float32")
        outputs = model.predict(x if shared_input else {"a": x, "b": x}, verbose=0)
        expected = ops.convert_to_numpy(backbone(x))
        np.testing.assert_allclose(outputs["b"], expected, atol=1e-4)
        np.testing.assert_allclose(single_task(model, "b")(x), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["dropout", "stochastic-depth"])
def test_tasks_drop_by_themselves(kind, rng):
    """What is dropped in training is drawn for each task."""
    inputs = keras.Input((1, 1, 4))
    if kind == "dropout":
        drop = kl.Dropout(0.5, noise_shape=(None, 1, 1, 1))
    else:
        from keras.src.applications.convnext import StochasticDepth

        drop = StochasticDepth(0.5)
    conv = kl.Conv2D(4, 1, kernel_initializer="ones", bias_initializer="ones")
    model = multitask(keras.Model(inputs, drop(conv(inputs))), NAMES)
    x = np.ones((64, 1, 1, 4), "float32")
    dropped = [
        ops.convert_to_numpy(output)[:, 0, 0] == 0
        for output in model(x, training=True).values()
    ]
    for own in dropped:
        assert np.all(own == own[:, :1]) and 8 < own[:, 0].sum() < 56
    assert not np.array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[1], dropped[2])


def names_and_paths(model):
    """The names of the layers, and the first parts of their weights' paths."""
    paths = {w.path.split("/")[0] for w in model.weights}
    return {layer.name for layer in model.layers}, paths


def test_names_of_heads():
    """A head is named after its task unless it has a name, however it is made."""
    backbone = keras.Sequential([keras.Input((4,)), kl.Dense(3, name="fc")])
    hidden = kl.Dense(5, name="hidden")
    heads = {
        "layer": kl.Dense(1),
        "named": kl.Dense(1, name="mine"),
        "function": lambda x: kl.Softmax()(kl.Dense(2)(x)),
        "deep": lambda x: kl.Dense(2)(hidden(x)),
        "count": 2,
        "own": None,
    }
    for shared in ("hard", "independent"):
        hidden = kl.Dense(5, name="hidden")
        heads |= {"layer": kl.Dense(1), "named": kl.Dense(1, name="mine")}
        names, paths = names_and_paths(
            multitask(backbone, list(heads), shared, heads=heads, verbose=False)
        )
        expected = {f"{task}_head" for task in ("layer", "function", "deep", "count")}
        assert expected | {"mine", "hidden"} <= names
        assert expected | {"mine", "hidden", "fc"} == paths
    # One layer of two tasks is nobody's, and one that a model has keeps its name.
    one = kl.Dense(1)
    names, _ = names_and_paths(multitask(backbone, ["a", "b"], heads={"a": one, "b": one}))
    assert one.name in names and "a_head" not in names
    name = one.name
    multitask(backbone, ["a"], heads=one)
    assert one.name == name
