"""The MNIST experiment: exact counts, the same budget for all, resuming."""

import json
from functools import partial

import keras
import numpy as np
import pytest
from searching import NUMBERS, Case, replace
from test_digits import write_folder

from applications import digits, mnist
from dmtrl_keras import task_layers

TINY = ["--epochs", "2", "--fraction", "0.0005", "--fc", "8", "--padding", "valid"]


def test_parameter_counts_of_the_paper():
    """DESIGN: 10 x 435,104 for STL, 436,256 for UD-MTL with N = 3, no biases."""
    stl, ud = mnist.lenet(0, use_bias=False), mnist.lenet(3, use_bias=False)
    assert stl.count_params() == mnist.kernel_parameters(stl) == 4_351_040
    assert ud.count_params() == mnist.kernel_parameters(ud) == 436_256
    # Biases are not counted, whether there are any or not.
    assert mnist.kernel_parameters(mnist.lenet(0)) == 4_351_040
    text = mnist.lenet(0, padding="valid", fc=512)
    one = 5 * 5 * 32 + 4 * 4 * 32 * 64 + 4 * 4 * 64 * 512 + 512
    assert mnist.kernel_parameters(text) == 10 * one


@pytest.mark.parametrize("shared_layers", [0, 1, 2, 3])
def test_networks(shared_layers, rng):
    """Layers up to N are ordinary Keras layers; one output for each task."""
    model = mnist.lenet(shared_layers, fc=8, padding="valid")
    assert model.output_shape == (None, 10)
    names = [layer.name for layer in task_layers(model)]
    assert names == ["conv1", "conv2", "fc", "output"][shared_layers:]
    images = rng.integers(256, size=(2, 28, 28, 1)).astype("float32")
    assert np.all(np.isfinite(model.predict(images, verbose=0)))


def test_stl_is_ten_networks(rng):
    """The multi-task STL network equals ten LeNets with its kernels."""
    model = mnist.lenet(0, fc=8, padding="same")
    for layer in task_layers(model):
        for variable in (*layer.factors.values(), layer.bias):
            variable.assign(rng.normal(size=variable.shape) * 0.1)
    images = rng.integers(256, size=(3, 28, 28, 1)).astype("float32")
    outputs = model.predict(images, verbose=0)
    for t in (0, 7):
        one = mnist.lenet(3, fc=8, padding="same", tasks=1)
        for name in ("conv1", "conv2", "fc", "output"):
            layer = model.get_layer(name)
            kernel = keras.ops.convert_to_numpy(layer.task_kernel(t))
            bias = keras.ops.convert_to_numpy(layer.bias)[:, t]
            variables = one.get_layer(name).weights
            for variable, value in zip(variables, (kernel, bias)):
                variable.assign(value.reshape(variable.shape))
        np.testing.assert_allclose(
            outputs[:, t : t + 1], one.predict(images, verbose=0), atol=1e-4
        )


@pytest.mark.long
def test_same_budget_for_every_method(tmp_path, rng, few_steps):
    """Each method sees every epoch of the budget once."""
    write_folder(tmp_path, rng)
    options = mnist.parse([*TINY, "--epochs", "3", "--batch-size", "32"])
    digits = mnist.load_digits(str(tmp_path))
    for method in mnist.METHODS:
        ticks = []
        trainer = mnist.Trainer(
            options,
            digits.train_images,
            digits.train_labels,
            0,
            partial(ticks.append, 1),
        )
        trainer.train(method, 3)
        assert len(ticks) == 3, method


def test_stl_is_not_interrupted(tmp_path, rng):
    """STL in two halves, the optimizer's state carried over, is STL in one."""
    write_folder(tmp_path, rng)
    digits = mnist.load_digits(str(tmp_path))
    options = mnist.parse([*TINY, "--epochs", "4"])
    trainer = mnist.Trainer(options, digits.train_images, digits.train_labels, 0)
    source, state, _ = trainer.half_trained()
    model, _ = trainer.train("stl")
    assert int(state[0]) == 2 * 2
    assert int(model.optimizer.iterations) == 4 * 2
    assert trainer.half_trained()[0] is source


def test_later_options_leave_earlier_runs(tmp_path):
    """Runs of before are found: what they lacked is no setting while it is the default."""
    options = mnist.parse([])
    own = mnist.EXPERIMENT._own_settings
    assert own(options, "stl") == {}
    assert own(options, "tt") == {"tolerance": 0.1, "ranks": {}}
    assert own(options, "ud-mtl") == {"shared_layers": 3}
    other = mnist.parse(["--weights", "0.5", "--weight-decay", "1", "--stl-epochs", "2"])
    assert own(other, "stl") == {"weight_decay": 1.0}
    added = {"weights": 0.5, "weight_decay": 1.0, "stl_epochs": 2}
    assert own(other, "tt") == {"tolerance": 0.1, "ranks": {}, **added}
    assert own(other, "ud-mtl-large") == {"large": 0.5, "weight_decay": 1.0}
    smaller = mnist.parse(["--ud-batch-size", "8"])
    assert own(smaller, "stl") == {} and own(smaller, "tt") == own(options, "tt")
    assert own(smaller, "ud-mtl") == {"shared_layers": 3, "ud_batch_size": 8}


@pytest.mark.parametrize("share", [0.1, 0.38, 1.0])
def test_as_many_weights_as_dmtrl(share):
    """UD-MTL-Large: the widest that keeps to them; one unit more does not."""
    width = mnist.width_of(share, "same", 128)
    count = partial(lambda w: mnist.kernel_parameters(mnist.lenet(3, "same", 128, width=w)))
    budget = share * 4_351_040
    assert count(width) <= budget < count(width + 1 / 32) or width == 1 / 32


@pytest.mark.parametrize(("most", "seen_in_all"), [(48, 48), (8, 30)])
def test_examples_are_capped(tmp_path, rng, most, seen_in_all):
    """Each epoch the same number of other examples, and in all each of them once."""
    order = mnist.in_order(10, 25, 4, 2, seed=1)
    assert order.shape == (4, 6)
    assert sorted(order.ravel()[:10]) == sorted(order.ravel()[10:20]) == list(range(10))
    write_folder(tmp_path, rng)
    digits = mnist.load_digits(str(tmp_path))
    images = digits.train_images
    options = mnist.parse([*TINY, "--epochs", "3", "--max-examples", str(most)])
    options.batch_size = 2
    trainer = mnist.Trainer(options, images, digits.train_labels, 0)
    seen = []

    class Seeing(keras.Model):
        def train_step(self, data):
            seen.extend(data[0].numpy().sum(axis=(1, 2, 3)).tolist())
            return super().train_step(data)

        def compile(self, *args, **kwargs):
            super().compile(*args, run_eagerly=True, **kwargs)

    inner = mnist.lenet(3, "valid", 8)
    model = Seeing(inner.inputs, inner.outputs)
    trainer.fit(model, last=1)
    trainer.fit(model, first=1)
    sums = images.sum(axis=(1, 2, 3))[mnist.in_order(30, seen_in_all, 3, 2, 0).ravel()]
    assert seen == sums.tolist()


@pytest.mark.long
def test_options_of_the_start_and_the_ranks(tmp_path, rng, few_steps):
    """Another optimizer before the factorisation, a budget of weights, and validation."""
    write_folder(tmp_path, rng, train=90)
    command = [*TINY, "--data", str(tmp_path), "--batch-size", "16", "--epochs", "3"]
    command += ["--methods", "stl", "ud-mtl-large", "tucker", "--weights", "0.5"]
    command += ["--stl-optimizer", "sgd", "--stl-learning-rate", "0.1", "--stl-epochs", "1"]
    command += ["--weight-decay", "0.1", "--max-examples", "48", "--task-rank", "1.0"]
    command += ["--layers", "conv1", "conv2", "fc", "--factor-learning-rate", "0.01"]
    command += ["--ud-batch-size", "8"]
    command += ["--validation-images", "20", "--output", str(tmp_path / "out")]
    mnist.main(command)
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    found = {r["settings"]["method"]: r for r in map(json.loads, lines)}
    weights = {name: run["results"]["parameters"] for name, run in found.items()}
    assert weights["tucker"] <= (weights["stl"] + 80) / 2
    assert weights["ud-mtl-large"] <= weights["stl"] / 2
    assert found["tucker"]["settings"]["stl_optimizer"] == "sgd"
    assert "stl_optimizer" not in found["stl"]["settings"]
    ranks = found["tucker"]["results"]["ranks"]
    assert {name: rank[-1] for name, rank in ranks.items()} == {
        "conv1": 10,
        "conv2": 10,
        "fc": 10,
    }
    # Steps of 20 images.
    wrong = 20 * found["stl"]["results"]["multiclass_error"]
    assert wrong == pytest.approx(round(wrong), abs=1e-3)
    options = mnist.parse(command)
    digits = mnist.load_digits(str(tmp_path))
    part = mnist.EXPERIMENT.draw(options, digits, 0)
    again = mnist.draw_part(digits, 0.0005, 0)
    np.testing.assert_array_equal(part.train_labels, again.train_labels)
    both = [x.reshape(len(x), -1) for x in (part.train_images, part.test_images)]
    assert len(np.unique(np.concatenate(both), axis=0)) == 30 + 20


def test_whole_command(tmp_path, rng, capsys, steps_as_users):
    """Two fractions, two repeats: lines, table, figures, a page's block; then resumed."""
    data, output, page = tmp_path / "data", tmp_path / "out", tmp_path / "docs" / "a.md"
    data.mkdir()
    page.parent.mkdir()
    write_folder(data, rng, train=90)
    page.write_text("<!-- mnist:begin -->\n<!-- mnist:end -->\n")
    command = [
        *TINY,
        "--data",
        str(data),
        "--fraction",
        "0.0005",
        "0.001",
        "--repeats",
        "2",
        "--output",
        str(output),
        "--page",
        str(page),
        "--batch-size",
        "32",
        "--methods",
        "ud-mtl",
        "tucker",
    ]
    table = mnist.main(command)["mnist"]
    lines = (output / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 2
    assert len(table) == 2 * 2
    assert set(table["Runs"]) == {2}
    for line in lines:
        results = json.loads(line)["results"]
        assert 0 <= results["multiclass_error"] <= 1
        for name in ("sharing_strength", "chance_of_sharing"):
            assert list(results[name]) == ["conv1", "conv2", "fc", "output"]
    for name in ("errors.png", "sharing_strength.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert (page.parent / "figures" / f"out_{name}").exists()
    assert "DMTRL-Tucker" in page.read_text()
    assert "repeat 2" in capsys.readouterr().out
    before = (output / "runs.jsonl").read_text()
    again = mnist.main(command)["mnist"]
    assert (output / "runs.jsonl").read_text() == before
    assert again.equals(table)
    fewer = mnist.main([*command, "--once-from", table["Fraction"].max()])["mnist"]
    assert fewer["Runs"].tolist() == [2, 2, 1, 1]
    assert (output / "runs.jsonl").read_text() == before


@pytest.mark.long
def test_cross_validated_sharing(tmp_path, rng, few_steps):
    """N is the one with the smallest error over the folds of the training images."""
    write_folder(tmp_path, rng)
    command = [*TINY, "--data", str(tmp_path), "--methods", "ud-mtl", "--folds", "2"]
    command += ["--shared-layers", "cv", "--output", str(tmp_path / "out")]
    mnist.main(command)
    results = json.loads((tmp_path / "out" / "runs.jsonl").read_text())["results"]
    errors = results["cross_validation"]
    assert set(errors) == {"1", "2", "3"}
    assert errors[str(results["shared_layers"])] == min(errors.values())


def test_draws_are_the_same_for_all_methods():
    """By seed alone; different repeats differ."""
    digits = mnist.load_digits("sample")
    one, two = mnist.draw(digits, 0.01, 5), mnist.draw(digits, 0.01, 5)
    assert len(set(one.tolist())) == 600
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, mnist.draw(digits, 0.01, 6))
    with pytest.raises(ValueError, match=r"0\.5 is 30000.*has 3000.*up to 0\.05"):
        mnist.draw(digits, 0.5, 0)


@pytest.mark.long
def test_learns_real_digits():
    """DMTRL on 600 real digits is far better than chance within a minute."""
    arguments = ["--padding", "valid", "--fc", "32", "--epochs", "4"]
    options = mnist.parse(arguments)
    digits = mnist.load_digits("sample")
    part = mnist.draw_part(digits, 0.01, 0)
    trainer = mnist.Trainer(options, part.train_images, part.train_labels, 0)
    model, _ = trainer.train("tt")
    _, error = mnist.evaluate(model, digits.test_images, digits.test_labels)
    assert error < 0.25


@pytest.mark.parametrize(
    "arguments",
    [
        ["--fraction", "0"],
        ["--fraction", "1.5"],
        ["--tolerance", "1.5"],
        ["--methods", "cp"],
        ["--shared-layers", "4"],
        ["--epochs", "1"],
        ["--repeats", "0"],
        ["--rank", "0.5", "--weights", "0.5"],
        ["--stl-epochs", "20"],
        ["--threshold", "other"],
        ["--max-examples", "0"],
    ],
)
def test_bad_arguments(arguments, capsys):
    """Argparse says which argument, and what it takes."""
    with pytest.raises(SystemExit):
        mnist.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def search_case(monkeypatch):
    """For `tests/tuning`."""
    labels = np.arange(120) % 10
    images = np.broadcast_to(NUMBERS[:, None, None, None], (120, 28, 28, 1)).astype("uint8")
    tests = images[:20] + 200, labels[:20]
    small = digits.Digits("own", images, labels, *tests)

    def run(options, method, part, seed, tick, callbacks):
        numbers = (x[:, 0, 0, 0] for x in (part.train_images, part.test_images))
        seen.append((*numbers, options))
        return {
            "multiclass_error": 0.3,
            "binary_error": 0.1,
            "parameters": 10,
            "seconds": 1.0,
        }

    seen = []
    replace(monkeypatch, mnist.EXPERIMENT, small, run)
    return Case("tucker", ["--fraction", "0.001", "--epochs", "4"], seen, 60, 0.1)
