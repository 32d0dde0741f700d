"""The MTAL experiment, on generated images of different sizes and colours."""

import doctest

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from searching import NUMBERS, Case, replace

from applications import image_tasks, mtal, vgg
from applications.results import Results, markdown_table
from dmtrl_keras import task_layers
from dmtrl_keras.ground.backend import tensorflow
from docs import pictures

SMALL = (
    "--network vgg11 --width 2 --size 12 --epochs 2 --batch-size 4 --repeats 1 "
    "--learning-rate 0.05"
).split()


@pytest.fixture
def tasks(tmp_path, rng):
    """Three folders: bright and dark, grey and in colour, large and small."""
    sources = []
    for name, size, mode, classes in (
        ("letters", (8, 8), "L", 2),
        ("objects", (20, 14), "RGB", 3),
        ("digits", (6, 6), "L", 2),
    ):
        for label in range(classes):
            folder = tmp_path / name / str(label)
            folder.mkdir(parents=True)
            for index in range(6):
                shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
                image = rng.integers(80 * label, 80 * label + 60, size=shape)
                image = Image.fromarray(image.astype("uint8"), mode)
                image.save(folder / f"{index}.png")
        sources.append(f"{name}=folder:{tmp_path / name}")
    return ["--group", "own", "--tasks", *sources]


@pytest.mark.long
def test_command(tasks, tmp_path, monkeypatch, few_steps):
    """Tables and figures, also in a page; finished runs are not run again."""
    methods = ["single", "nddr", "mtda", "mtal", "mtal_r"]
    page = tmp_path / "docs" / "mtal.md"
    page.parent.mkdir()
    blocks = ("mtal-own", "mtal-sharing-own")
    page.write_text("\n".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->" for n in blocks))
    arguments = [*tasks, *SMALL, "--output", str(tmp_path / "out"), "--page", str(page)]
    arguments += ["--related", "letters,digits", "--training-images", "3"]
    arguments += ["--methods", *methods]
    tables = mtal.main(arguments)
    table = tables["mtal-own"]
    assert list(table["Method"]) == [mtal.TITLES[method] for method in methods]
    assert {"letters", "objects", "digits", "mean"} < set(table.columns)
    runs = [
        run["results"] for run in Results(tmp_path / "out" / "runs.jsonl")._runs.values()
    ]
    assert len(runs) == len(methods)
    assert all(len(run["losses"]["objects"]) == 2 for run in runs if run["losses"])
    sharing = [run["sharing"] for run in runs if "sharing" in run]
    layers = [row["layer"] for row in sharing[0]]
    assert layers[0] == "block1_conv1" and layers[-1] == "total" and len(layers) == 9
    names = ("errors", "losses"), ("mtal_1", "mtal_r_2")
    names = [f"{n}_own" for n in names[0]] + [f"activations_own_{n}" for n in names[1]]
    for name in names:
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5_000
        assert (page.parent / "figures" / f"out_{name}.png").exists()
    for name in blocks:
        assert (tmp_path / "out" / f"{name}.md").read_text().strip() in page.read_text()
    monkeypatch.setattr(mtal, "train", None)
    again = mtal.main(arguments)
    assert all(again[name].equals(tables[name]) for name in blocks)


@pytest.mark.long
def test_sweep(tasks, tmp_path, few_steps):
    """Figure 9: one run for each threshold; fewer kernels are shared as it grows."""
    arguments = [*tasks, *SMALL, "--output", str(tmp_path / "out"), "--sweep"]
    tables = mtal.main([*arguments, "mtal_forward", "--thresholds", "0.1", "1.0"])
    table = tables["mtal-forward-sweep-own"]
    assert list(table["Threshold"]) == ["0.1", "1"]
    shared = [float(entry.split()[0]) for entry in table["Pairs shared (%)"]]
    assert 80 > shared[0] > 20 > shared[1] == 0
    assert [float(entry.split()[0]) for entry in table["Chance (%)"]] == [39.2, 0]
    assert (tmp_path / "out" / "sweep_mtal_forward_own.png").stat().st_size > 5_000


def test_mean_square_error(rng):
    """Figure 8 of the runs, against loops; the page's picture has the same numbers."""
    accuracy = {
        method: [dict(zip("ab", rng.uniform(0.3, 1, 2))) for _ in range(3)]
        for method in ("single", "mtal_r")
    }
    runs = pd.DataFrame(
        {"method": method, "accuracy": own, "parameters": 1, "seconds": 1.0}
        for method, several in accuracy.items()
        for own in several
    )
    found = mtal.error_table(runs)
    header, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown_table(mtal.table_of_methods(runs, "ab")).splitlines()
    )
    drawn = pictures.errors_of(header, body)
    assert list(found.told) == list(drawn.told) == [False, True]
    assert list(found.title) == list(drawn.title)
    for place, (method, several) in enumerate(accuracy.items()):
        errors = [np.mean([(100 - 100 * a) ** 2 for a in one.values()]) for one in several]
        means = [100 * np.mean(list(one.values())) for one in several]
        expected = [np.mean(means), np.mean(errors), np.std(means, ddof=1)]
        columns = ["accuracy", "error", "accuracy_spread"]
        np.testing.assert_allclose(found.loc[method, columns].tolist(), expected)
        assert found.error_spread[method] == pytest.approx(np.std(errors, ddof=1))
        # The table has one decimal.
        np.testing.assert_allclose(drawn.loc[place, columns].tolist(), expected, rtol=5e-3)


@pytest.mark.long
def test_model_takes_original_images(tasks, tmp_path):
    """An exported network resizes and colours by itself, and takes bytes."""
    options = mtal.parse([*tasks, *SMALL])
    data = {
        name: mtal.load_task(source, None, options.size)
        for name, source in options.sources.items()
    }
    model = mtal.make_model(options, "mtal", data)
    assert model.get_layer("objects_resizing").output.shape == (None, 12, 12, 3)
    images = {name: task.images[:2] for name, task in data.items()}
    assert {x.shape[1:] for x in images.values()} == {(8, 8, 1), (14, 20, 3), (6, 6, 1)}
    expected = model.predict(images, verbose=0)
    model.export(tmp_path / "saved", verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    served = loaded.serve(images)
    for name, output in expected.items():
        assert output.shape == (2, len(data[name].classes))
        np.testing.assert_allclose(served[name], output, atol=1e-5)


@pytest.mark.parametrize("network", ["vgg16", "resnet18"])
def test_networks_and_starts(network, tasks):
    """Methods have equally many kernels; tasks start equal, or apart where that is said."""
    options = mtal.parse([*tasks, *SMALL, "--network", network, "--size", "16"])
    data = {
        name: mtal.load_task(source, None, options.size)
        for name, source in options.sources.items()
    }
    models = {
        m: mtal.make_model(options, m, data) for m in ("single", "mtal", "mtal_common")
    }
    sizes = {
        sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        for model in models.values()
    }
    assert len(sizes) == 1
    for method, model in models.items():
        first = keras.ops.convert_to_numpy(task_layers(model)[0].factors["kernel"])
        assert (np.ptp(first, axis=-1).max() > 0) == (method == "mtal")
        shares = {layer.sharing.name for layer in task_layers(model)}
        assert shares == {"independent" if method == "single" else "similar"}
    fused = mtal.make_model(options, "stitch", data)
    names = [layer.name for layer in fused._flatten_layers(recursive=True)]
    assert sum(name.endswith("_fusion") for name in names) == 4
    shared = mtal.make_model(options, "shared", data)
    assert shared.count_params() < models["single"].count_params() / 2


def test_split_keeps_classes(tasks):
    """Each class has its share, and at most so many images; parts are disjoint."""
    options = mtal.parse([*tasks, *SMALL, "--training-images", "3", "--test-images", "1"])
    data = {
        name: mtal.load_task(source, None, options.size)
        for name, source in options.sources.items()
    }
    first, second = (mtal.split(data, options, seed) for seed in (0, 1))
    for name, (train, test) in first.items():
        labels = data[name].labels
        assert np.bincount(labels[train]).tolist() == [3] * len(data[name].classes)
        assert np.bincount(labels[test]).tolist() == [1] * len(data[name].classes)
        assert not set(train) & set(test)
    assert any(not np.array_equal(first[n][0], second[n][0]) for n in data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "own"], "or --tasks"),
        (["--tasks", "usps"], "two or more"),
        (["--tasks", "usps", "usps"], "different names"),
        (["--tasks", "usps", "mnist", "--related", "usps,kmnist"], "kmnist"),
        (["--threshold", "1.2"], "at most 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    """Errors of the command say what was expected."""
    with pytest.raises(SystemExit):
        mtal.parse(arguments)
    assert message in capsys.readouterr().err


def test_single_task_in_mtal_r(tasks):
    """A group of one has nobody to share with."""
    options = mtal.parse([*tasks, *SMALL, "--related", "letters", "--methods", "mtal_r"])
    data = {
        name: mtal.load_task(source, None, options.size)
        for name, source in options.sources.items()
    }
    with pytest.raises(ValueError, match="two or more different tasks"):
        mtal.make_model(options, "mtal_r", data)


def test_docstrings():
    """The examples run."""
    assert doctest.testmod(mtal).failed == 0
    assert doctest.testmod(vgg).failed == 0


def search_case(monkeypatch):
    """For `tests/tuning`."""
    tasks = {
        name: image_tasks.ImageTask(
            np.broadcast_to(NUMBERS[:, None, None, None], (120, 8, 8, 1)).astype("uint8"),
            NUMBERS % classes,
            [str(number) for number in range(classes)],
        )
        for name, classes in (("mnist", 10), ("coil20", 4), ("amazon", 3))
    }

    def run(options, method, part, seed, tick, callbacks):
        tasks, parts = part
        train, test = parts["coil20"]
        numbers = tasks["coil20"].images[:, 0, 0, 0]
        # The test part is what the experiment itself would test on.
        held = np.isin(test, mtal.split(tasks, options, seed)["coil20"][1])
        seen.append((numbers[train], numbers[test] + 200 * held.all(), options))
        accuracy = {name: 0.75 for name in tasks}
        return {"accuracy": accuracy, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, mtal.EXPERIMENT, tasks, run)
    return Case("similar", ["--group", "unrelated", "--network", "vgg11"], seen, 84, 0.25)
