"""task_summary: parameters and operations, counted by other means."""

import keras
import pytest
from keras import layers as kl

from dmtrl_keras import MultiTaskModel, layers, multitask, task_summary
from dmtrl_keras.ground.backend import tensorflow


def flops_of(model, inputs):
    """Operations of convolutions and products in the graph, counted by TensorFlow."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )
    from tensorflow.python.framework.ops import get_stats_for_node_def

    tf = tensorflow()
    function = tf.function(lambda x: model(x, training=False))
    graph = function.get_concrete_function(tf.TensorSpec(inputs))
    graph = convert_variables_to_constants_v2(graph).graph
    kinds = ("Conv2D", "MatMul", "BatchMatMulV2", "DepthwiseConv2dNative")
    return sum(
        get_stats_for_node_def(graph, operation.node_def, "flops").value
        for operation in graph.get_operations()
        if operation.type in kinds
    )


def network():
    """A shared trunk, task-specific layers, two heads."""
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(4, 3, name="trunk")(inputs)
    x = kl.BatchNormalization(name="trunk_bn")(x)
    x = layers.TaskConv2D(5, 3, tasks=2, shared_input=True, name="first")(x)
    x = kl.BatchNormalization(name="first_bn")(x)
    x = layers.TaskConv2D(6, 2, tasks=2, sharing="hard", strides=2, name="second")(x)
    x = layers.TaskFlatten(2)(x)
    features = layers.TaskSplit(["a", "b"])(layers.TaskDense(7, tasks=2, name="fc")(x))
    outputs = {"a": kl.Dense(2, name="ha")(features["a"])}
    outputs["b"] = kl.Dense(3, name="hb")(features["b"])
    return MultiTaskModel(inputs, outputs)


def test_rows():
    """Sharing, parameters, and those of independent networks, by hand."""
    rows = {row.layer: row for row in task_summary(network(), verbose=False)}
    assert {name: row.sharing for name, row in rows.items()} == {
        "trunk": "hard",
        "trunk_bn": "hard",
        "first": "independent",
        "first_bn": "independent",
        "second": "hard",
        "fc": "independent",
        "ha": "(a)",
        "hb": "(b)",
    }
    parameters = {name: row.parameters for name, row in rows.items()}
    assert parameters["trunk"] == 3 * 3 * 3 * 4 + 4
    assert parameters["first_bn"] == 4 * 10
    assert parameters["second"] == 2 * 2 * 5 * 6 + 2 * 6
    independent = {name: row.parameters_if_independent for name, row in rows.items()}
    assert independent["trunk"] == 2 * parameters["trunk"]
    assert independent["trunk_bn"] == 2 * parameters["trunk_bn"]
    assert independent["first"] == parameters["first"]
    assert independent["second"] == 2 * (2 * 2 * 5 * 6 + 6)
    assert independent["hb"] == parameters["hb"] == 7 * 3 + 3
    flops = {name: row.flops for name, row in rows.items()}
    assert flops["trunk"] == 2 * 6 * 6 * 3 * 3 * 3 * 4
    assert flops["first"] == 2 * 4 * 4 * 3 * 3 * 4 * 10
    assert flops["second"] == 2 * 2 * 2 * 2 * 2 * 5 * 6 * 2
    assert flops["fc"] == 2 * 24 * 7 * 2
    assert flops["ha"] == 2 * 7 * 2
    assert flops["first_bn"] == 0
    assert rows["first"].output_shape == (None, 4, 4, 10)


def test_totals_are_those_of_keras(capsys):
    """The printed total is `count_params`; every row is printed."""
    model = network()
    rows = task_summary(model)
    assert sum(row.parameters for row in rows) == model.count_params()
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row.layer} " in printed and f"({row.kind})" in printed
    assert f"{model.count_params():,}" in printed
    assert "of the parameters of 2 independent networks" in printed


@pytest.mark.parametrize("shared_input", [True, False])
def test_independent_networks_are_the_unit(shared_input):
    """Whatever is shared: "if independent" is T backbones."""
    inputs = keras.Input((16, 16, 3))
    x = kl.Conv2D(8, 3, strides=2, use_bias=False)(inputs)
    for size in (8, 12):
        x = kl.ReLU()(kl.BatchNormalization()(x))
        x = kl.BatchNormalization()(kl.DepthwiseConv2D(3, use_bias=False)(x))
        x = kl.ReLU(name=f"relu_{size}")(kl.Conv2D(size, 1)(x))
    x = kl.Add()([x, kl.SeparableConv2D(12, 3, padding="same")(x)])
    backbone = keras.Model(inputs, kl.Dense(5)(kl.GlobalAveragePooling2D()(x)))
    for arguments in (
        {},
        {"sharing": "hard"},
        {"sharing": "tucker", "rank": 0.5, "share_until": "relu_8"},
    ):
        model = multitask(
            backbone, 3, shared_input=shared_input, verbose=False, **arguments
        )
        rows = task_summary(model, verbose=False)
        total = sum(row.parameters_if_independent for row in rows)
        assert total == 3 * backbone.count_params()
        assert sum(row.parameters for row in rows) == model.count_params()


def test_flops_are_those_of_the_profiler(rng):
    """Of convolutions and products, as TensorFlow counts them in the graph."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("the profiler is TensorFlow's")
    backbone = keras.applications.MobileNet(
        (32, 32, 3), alpha=0.25, include_top=False, weights=None, pooling="avg"
    )
    model = multitask(backbone, 2, share_until="conv_pw_3_relu", heads=5)
    flops = sum(row.flops for row in task_summary(model, verbose=False))
    assert flops == flops_of(model, (1, 32, 32, 3))


def of_50_tasks(sharing):
    """50 heads on one layer, of two kinds."""
    inputs = keras.Input((4,))
    backbone = keras.Model(inputs, kl.Dense(3, name="fc")(inputs))
    heads = {f"task_{n}": 1 if n % 3 else 4 for n in range(50)}
    return multitask(backbone, list(heads), sharing=sharing, heads=heads, name="net")


def test_many_tasks(capsys, monkeypatch):
    """Heads that are alike share a line, in the order of the tasks, in 80 columns."""
    rows = task_summary(of_50_tasks("independent"))
    printed = capsys.readouterr().out
    heads = [f"task_{n}_head" for n in range(50)]
    assert [row.layer for row in rows] == ["fc", *heads]
    assert [row.sharing for row in rows[1:]] == [f"(task_{n})" for n in range(50)]
    lines = printed.splitlines()
    assert len(lines) < 15 and max(map(len, lines)) <= 80
    # 17 heads of 16 weights, 33 of 4.
    first = {line.split()[0]: line.split()[-6:] for line in lines if line.split()}
    assert first["task_0_head"] == ["4", "(each", "one)", "272", "272", "408"]
    assert first["task_1_head"] == ["1", "(each", "one)", "132", "132", "198"]
    assert first["Total"] == ["Total", "1,154", "1,154", "1.81k"]
    # Where the terminal is wide, too.
    monkeypatch.setenv("COLUMNS", "200")
    task_summary(of_50_tasks("independent"))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_heads_on_shared_features():
    """A head is its task's, also where nothing was taken apart before it."""
    fc, *heads = task_summary(of_50_tasks("hard"), verbose=False)
    assert fc.sharing == "hard" and fc.parameters_if_independent == 50 * fc.parameters
    assert [row.sharing for row in heads] == [f"(task_{n})" for n in range(50)]
    assert all(row.parameters_if_independent == row.parameters for row in heads)


def test_edited_and_wrapped_networks():
    """A task removed, one added on shared features, a network called inside another."""
    model = network()
    fewer = MultiTaskModel(model.input, {"a": model.output["a"]})
    rows = {row.layer: row for row in task_summary(fewer, verbose=False)}
    assert "hb" not in rows and rows["ha"].sharing == "(a)"
    assert rows["trunk"].parameters_if_independent == rows["trunk"].parameters
    # The layer has the kernels of both tasks still.
    assert rows["fc"].parameters == 24 * 7 * 2 + 7 * 2
    assert rows["fc"].parameters_if_independent == rows["fc"].parameters
    inputs = keras.Input((8, 8, 3))
    outputs = dict(model(kl.Rescaling(2.0)(inputs)))
    outputs["c"] = kl.Dense(1, name="hc")(kl.Flatten()(inputs))
    wrapped = MultiTaskModel(inputs, {"a": outputs["a"], "c": outputs["c"]})
    rows = {row.layer: row for row in task_summary(wrapped, verbose=False)}
    assert sum(row.parameters for row in rows.values()) == wrapped.count_params()
    assert rows["hb"].sharing == "unused" and rows["hb"].parameters_if_independent == 0
    assert (rows["ha"].sharing, rows["hc"].sharing) == ("(a)", "(c)")


def test_ranks(capsys):
    """Factorised layers show their ranks."""
    inputs = keras.Input((8,))
    layer = layers.TuckerDense(16, 4, rank=(2, 3, 4), shared_input=True, name="fc")
    x = layer(inputs)
    (row,) = task_summary(keras.Model(inputs, x))
    assert "rank 2 3 4" in " ".join(capsys.readouterr().out.split())
    assert row.rank == (2, 3, 4) and row.sharing == "tucker"
    assert row.parameters == 24 + 8 * 2 + 16 * 3 + 4 * 4 + 16 * 4


def test_errors():
    """No functional model; no tasks."""
    with pytest.raises(ValueError, match=r"task_summary.*Sequential"):
        task_summary(keras.Sequential([kl.Dense(2)]))
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="known number of tasks"):
        task_summary(keras.Model(inputs, kl.Dense(2)(inputs)))
