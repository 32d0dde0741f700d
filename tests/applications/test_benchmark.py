"""The benchmark: its networks are of one size, and the command writes its tables."""

import doctest
import time

import keras
import numpy as np
import pytest

from applications import benchmark, mnist

SIZES = ("valid", 8)


def test_networks_are_of_one_size():
    """(a), (b) and (c) have equally many weights and equal output shapes."""
    networks = [
        benchmark.plain_networks(10, *SIZES),
        benchmark.grouped_network(10, *SIZES),
        mnist.lenet(0, *SIZES),
    ]
    assert len({network.count_params() for network in networks}) == 1
    assert {network.output_shape for network in networks} == {(None, 10)}


@pytest.mark.parametrize("shared_input", [True, False])
def test_backbones_are_of_one_size(shared_input):
    """Plain copies and `multitask` have equally many weights and equal outputs."""
    from dmtrl_keras import multitask

    plain = benchmark.plain_backbones("MobileNet", 2, 32, 10, shared_input)
    ours = multitask(
        benchmark.backbone_of("MobileNet", 32), 2, heads=10, shared_input=shared_input
    )
    assert plain.count_params() == ours.count_params()
    assert {k: v.shape for k, v in plain.output.items()} == {
        k: v.shape for k, v in ours.output.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--backbone LeNet5", "LeNet5"),
        ("--similar-backbone LeNet5", "--similar-backbone: "),
        ("--repeats 0", "--repeats: expected a whole number from 1"),
        ("--ranks 1.5", "--ranks: expected a finite number above 0 and at most 1"),
        ("--prior-kernel 4 0 2", "--prior-kernel: "),
        ("--page none.md", "--page: "),
    ],
)
def test_arguments(arguments, message, capsys):
    """What is wrong with them is said before anything is measured."""
    with pytest.raises(SystemExit):
        benchmark.main(arguments.split())
    assert message in capsys.readouterr().err


def test_settings_from_a_file(tmp_path):
    """As every command takes them."""
    path = tmp_path / "settings.json"
    path.write_text('{"repeats": 2, "ranks": [0.25], "skip_grouped": true}')
    options = benchmark.parse(["--config", str(path), "--repeats", "3"])
    assert (options.repeats, options.ranks, options.skip_grouped) == (3, [0.25], True)
    assert options.batch_size == 64 and not hasattr(options, "strategy")


def test_bare_step_is_of_the_same_size():
    """(e) has a gradient for each kernel of the three large layers, and each input."""
    gradients = benchmark.bare_step(2, 3, *SIZES)()
    shapes = [tuple(g.shape) for g in gradients]
    assert shapes[0] == (5, 5, 1, 64)
    assert shapes[3:5] == [(4, 4, 32, 64)] * 2
    assert shapes[-2:] == [(1024, 8)] * 2


def test_in_turn_gives_medians():
    """Each function runs as often as the others, after two warm-ups."""
    calls = {"x": 0, "y": 0}

    def count(name):
        calls[name] += 1

    times = benchmark.in_turn({n: lambda n=n: count(n) for n in calls}, 5)
    assert calls == {"x": 7, "y": 7}
    assert set(times) == {"x", "y"}
    assert min(times.values()) >= 0


def test_ratios_do_not_drift(rng):
    """A machine whose speed changes from turn to turn changes no ratio."""
    speed = rng.uniform(0.5, 2, size=6)
    times = {name: list(seconds * speed) for name, seconds in {"x": 2.0, "y": 3.0}.items()}
    found = benchmark.at_one_speed(times)
    assert found["y"] / found["x"] == pytest.approx(1.5)
    assert found["x"] == pytest.approx(2 * np.median(speed))
    assert doctest.testmod(benchmark).failed == 0


def test_one_core(monkeypatch):
    """There other work on the machine doesn't count, and the tables say so."""
    monkeypatch.setattr(benchmark.os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert benchmark.in_turn({"x": lambda: time.sleep(0.05)}, 1)["x"] < 0.04
    options = benchmark.parse([])
    assert benchmark.how(options).endswith(", seconds of one core")
    monkeypatch.setattr(benchmark.os, "sched_getaffinity", lambda _: {0, 3})
    assert benchmark.in_turn({"x": lambda: time.sleep(0.05)}, 1)["x"] > 0.04
    assert "one core" not in benchmark.how(options)


@pytest.mark.parametrize("method", benchmark.FACTORIZATIONS)
def test_variants_are_one_function(method, rng):
    """Composed, contracted and automatic give the same outputs."""
    source = mnist.lenet(0, *SIZES)
    models, size = benchmark.factorized_variants(source, method, 0.5, None)
    assert 0 < size < 1
    images = rng.uniform(0, 255, size=(2, 28, 28, 1)).astype("float32")
    outputs = [model.predict(images, verbose=0) for model in models.values()]
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-4)


@pytest.mark.long
def test_command(tmp_path, monkeypatch, few_steps):
    """A small run writes all tables, also into a page."""

    def small(name, size, copy=""):
        layers = [keras.Input((size, size, 3)), keras.layers.Conv2D(4, 3)]
        layers.append(keras.layers.GlobalAveragePooling2D())
        return keras.Sequential(layers, name=f"{name}{copy}")

    monkeypatch.setattr(benchmark, "backbone_of", small)
    # The kernels that are factorised are those of a start, after two steps.
    monkeypatch.setattr(mnist, "FULL_SIZE", 3200)
    page = tmp_path / "performance.md"
    blocks = ("benchmark", "backbone", "prior", "relation", "similar")
    marks = [f"<!-- {n}:begin -->\n<!-- {n}:end -->" for n in blocks]
    page.write_text("\n".join(marks))
    arguments = (
        "--batch-size 2 --fc 4 --repeats 1 --ranks 0.5 --stl-epochs 1 --skip-grouped"
    )
    tables = benchmark.main(
        [
            *arguments.split(),
            "--skip-grouped",
            "--methods",
            "tt",
            *"--backbone MobileNet --backbone-batch 2 --image-size 32".split(),
            *"--backbone-tasks 2 --prior-kernel 12 6 2 --prior-image-size 32".split(),
            *"--prior-batch 2 --prior-update-every 4 --relation-features 6".split(),
            *"--relation-batch 4 --relation-image-size 16 --relation-width 2".split(),
            *"--similar-backbone VGG16 --similar-update-every 5".split(),
            *"--parts lenet backbone prior relation similar".split(),
            "--output",
            str(tmp_path / "out"),
            "--page",
            str(page),
        ]
    )
    steps, ranks = tables["benchmark"]
    assert len(steps) == 3
    assert list(ranks["Rank"]) == ["10% error", "0.5"]
    prior, naive = tables["prior"]
    assert len(naive) == 4
    last = prior["Part"].iloc[-1]
    assert last == "together, with an update every 4 steps"
    assert len(tables["backbone"][0]) == 5 and "MobileNet, T = 2" in page.read_text()
    assert tables["relation"][0]["Ratio to Cholesky"][1] == "1.0"
    assert tables["similar"][0]["Ratio to independent"][0] == "1.00"
    assert "every 5 steps" in tables["similar"][0]["Training step"][2]
    for name in blocks:
        text = (tmp_path / "out" / f"{name}.md").read_text().strip()
        assert text in page.read_text()
    assert keras.config.backend() in page.read_text()


@pytest.mark.long
def test_copies_balancing_and_streams(tmp_path, monkeypatch):
    """Ratios of all that is compared, of few layers and short epochs."""
    every = benchmark.copied_layers()
    few = [name for name in every if "8 places" in name or "1000" in name]
    monkeypatch.setattr(
        benchmark, "copied_layers", lambda: {name: every[name] for name in few}
    )
    arguments = "--parts copies balancing streams --repeats 1 --balancing-tasks 2"
    arguments += " --balancing-steps 1 --copies-tasks 2 --copies-batch 2"
    tables = benchmark.main([*arguments.split(), "--output", str(tmp_path)])
    (copies,), (balanced,), (streams,) = tables.values()
    assert list(copies["Layer"]) == few and len(few) == 2
    for frame, columns in ((copies, 3), (balanced, 7), (streams, 1)):
        ratios = frame.iloc[:, -columns:].astype(float)
        assert ((ratios > 0.01) & (ratios < 100)).all(axis=None)
