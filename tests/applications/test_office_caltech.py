"""Domains as tasks: protocol, resuming, tables and figures, on small generated data."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from keras import ops
from searching import NUMBERS, Case, replace
from test_domains import write_features, write_images

from applications import domains as data
from applications import office_caltech as office
from applications.experiment import Tick
from dmtrl_keras import task_correlation

TINY = ["--steps", "3", "--bottleneck", "4", "--draws", "2", "--fractions", "0.3"]


def options_of(folder, *arguments):
    """Parsed arguments."""
    return office.parse(["--features", str(folder), *TINY, *arguments])


def test_command(tmp_path, rng, monkeypatch, few_steps):
    """The table, the figures, a page; a second call trains nothing."""
    write_features(tmp_path, rng)
    methods = ("stl", "drn8", "mrn")
    page = tmp_path / "docs" / "office.md"
    page.parent.mkdir()
    page.write_text("# Title\n<!-- office:begin -->\n<!-- office:end -->\nEnd\n")
    output = tmp_path / "results"
    arguments = [
        *["--features", str(tmp_path), *TINY, "--strengths", "1e-3", "--page"],
        *[str(page), "--output", str(output), "--methods", *methods],
        *["--missing-classes", "1"],
    ]
    table = office.main(arguments)["office"]
    assert table["Method"].tolist() == [office.TITLES[m] for m in methods]
    assert (table["Draws"] == 2).all() and (table["Training"] == "30%").all()
    assert all("±" in cell for cell in table["Average"])
    names = ("relations.png", "classes.png", "classes_vectors.png", "tsne.png", "table.md")
    for name in names:
        assert (output / name).stat().st_size > 100
    assert (page.parent / "figures" / "results_tsne.png").exists()
    assert page.read_text().endswith("<!-- office:end -->\nEnd\n")
    assert "| MRN |" in page.read_text()
    assert "| Training | Method | Layer | amazon, dslr |" in page.read_text()
    lines = (output / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert len(runs) == 2 * len(methods)
    for run in runs:
        assert run["settings"]["missing_classes"] == 1
        assert set(run["results"]["accuracy"]) == {"amazon", "dslr"}
        prior = office.METHODS[run["settings"]["method"]]["prior"]
        assert ("task_correlation" in run["results"]) == (prior is not None)
    # Cut off in the middle of a line: that run alone is done again.
    (output / "runs.jsonl").write_text("\n".join(lines)[:-20])
    trained = []
    train = office.Trainer.train

    def counted(self, *arguments):
        trained.append(arguments[0])
        return train(self, *arguments)

    monkeypatch.setattr(office.Trainer, "train", counted)
    again = office.main(arguments)["office"]
    assert trained == ["mrn"]
    pd.testing.assert_frame_equal(
        again.drop(columns="Seconds"), table.drop(columns="Seconds")
    )


def test_known_crossentropy(rng):
    """Keras's crossentropy of probabilities among the known classes alone."""
    p = rng.dirichlet(np.ones(4), size=3)
    labels, known = np.array([0, 2, 2]), np.array([1.0, 0, 1, 0])
    y = np.concatenate([np.eye(4)[labels], np.tile(known, (3, 1))], axis=1)
    found = office.known_crossentropy(y, ops.convert_to_tensor(p))
    part = p[:, [0, 2]] / p[:, [0, 2]].sum(axis=1, keepdims=True)
    expected = keras.losses.sparse_categorical_crossentropy(labels // 2, part)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_missing_classes(tmp_path, rng):
    """A class that a domain has no example of is known from the related ones."""
    centres = 3 * rng.normal(size=(4, 8))
    for name in ("a", "b", "c", "d"):
        labels = np.arange(80) % 4
        x = centres[labels] + rng.normal(size=(80, 8))
        file = tmp_path / f"{name}.npz"
        np.savez(file, features=x.astype("float32"), labels=labels, classes=list("wxyz"))
    arguments = [
        "--features",
        str(tmp_path),
        "--missing-classes",
        "1",
        "--bottleneck",
        "16",
    ]
    options = office.parse([*arguments, "--steps", "60", "--update-every", "5"])
    assert "drn-bi" not in options.methods
    data = office.EXPERIMENT.load(options, None)
    _, parts = office.EXPERIMENT.draw(options, data, 0, 0.3)
    domains, classes, new_backbone, _ = data
    trainer = office.Trainer(options, domains, len(classes), new_backbone)
    accuracy = {}
    for method in ("stl", "drn8"):
        train, test = ({n: part[k] for n, part in parts.items()} for k in (0, 1))
        model = trainer.train(method, train, 0, 3e-3, 0.3)
        lacking = {n: set(range(4)) - set(domains[n].labels[i]) for n, i in train.items()}
        assert [len(classes) for classes in lacking.values()] == [1] * 4
        only = {
            n: i[np.isin(domains[n].labels[i], list(lacking[n]))] for n, i in test.items()
        }
        right = trainer.correct(model, only)
        accuracy[method] = np.mean([np.mean(values) for values in right.values()])
    assert accuracy["drn8"] > 0.8 > accuracy["stl"] + 0.2


@pytest.mark.long
def test_a_setting_that_diverges_is_not_chosen(tmp_path, rng):
    """Its accuracy is NaN, whatever the prior says of a kernel that is no number."""
    folder = write_features(tmp_path, rng)
    options = options_of(folder, "--strengths", "1e6", "--update-every", "1")
    options.steps, options.folds = 30, 2
    domains, classes = office.load_features(folder)
    trainer = office.Trainer(options, domains, len(classes), lambda: (6,))
    parts = {name: np.arange(8) for name in domains}
    grid = [(1e3, 1e6), (1e-3, 1e-3)]
    with np.errstate(all="ignore"):
        wrong, fine = trainer.cross_validate("mrn8", parts, 0, grid)
    assert np.isnan(wrong) and fine > 0


def test_same_run_gives_the_same(tmp_path, rng):
    """A network that is used again starts anew; nothing is left of earlier runs."""
    options = options_of(write_features(tmp_path, rng))
    domains, classes = office.load_features(tmp_path)
    trainer = office.Trainer(options, domains, len(classes), lambda: (6,))
    parts = {name: np.arange(8) for name in domains}
    ticks = []
    trainer.tick = Tick(lambda: ticks.append(1))
    for method in ("drn", "stl"):
        first = trainer.train(method, parts, 0, 0.01, 1e-2).get_weights()
        other = trainer.train(method, parts, 1, 0.01, 1e-2).get_weights()
        again = trainer.train(method, parts, 0, 0.01, 1e-2).get_weights()
        assert any(not np.array_equal(a, b) for a, b in zip(first, other))
        for a, b in zip(first, again):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    slow = trainer.train("stl", parts, 0, 1e-9, 1e-2)
    # As many as trainings, of which the last one's network is known.
    assert len(ticks) == 7 and trainer.tick.model is slow
    slow = slow.get_weights()
    assert any(not np.allclose(a, b, atol=1e-4) for a, b in zip(slow, first))


@pytest.mark.long
def test_learns(tmp_path, rng):
    """Far above chance where the classes are apart, and the same metric by hand."""
    options = options_of(write_features(tmp_path, rng), "--steps", "40")
    domains, classes = office.load_features(tmp_path)
    trainer = office.Trainer(options, domains, len(classes), lambda: (6,))
    train = {name: np.arange(10) for name in domains}
    test = {name: np.arange(10, len(d.labels)) for name, d in domains.items()}
    for method in office.METHODS:
        model = trainer.train(method, train, 0, 0.01, 1e-3)
        right = trainer.correct(model, test)
        assert all(np.mean(v) > 0.9 for v in right.values()), (method, right)
        assert [len(values) for values in right.values()] == [30, 10]


def accuracies(trainer, domains, methods):
    """The mean accuracy of each method, and the task correlations of the last one."""
    parts = office.draw(domains, 0.05, 0)
    train, test = ({name: part[k] for name, part in parts.items()} for k in (0, 1))
    found = {}
    for method in methods:
        model = trainer.train(method, train, 0, 1e-3, 0.3)
        right = trainer.correct(model, test)
        found[method] = np.mean([np.mean(values) for values in right.values()])
    return found, task_correlation(model)["classifier"]


@pytest.mark.long
def test_real_features(data_dir):
    """DRN above MTCNN above STL with 5% of the examples, as the paper has it."""
    folder = data_dir / "office_caltech10_features"
    options = office.parse(["--features", str(folder)])
    domains, classes = office.load_features(folder)
    trainer = office.Trainer(options, domains, len(classes), lambda: (1280,))
    accuracy, correlation = accuracies(trainer, domains, ("stl", "mtcnn", "drn"))
    assert 0.6 < accuracy["stl"] < accuracy["mtcnn"] < accuracy["drn"]
    assert accuracy["drn"] > accuracy["stl"] + 0.1
    assert correlation.min() > 0.5


def test_real_outlier(data_dir):
    """A domain with other labels: what it has in common is used, and its sign learned."""
    folder = data_dir / "office_caltech10_features"
    options = office.parse(["--features", str(folder), "--outlier", "amazon"])
    domains, classes, new_backbone, source = office.EXPERIMENT.load(options, None)
    assert (source["outlier"], source["shift"]) == ("amazon", 3)
    trainer = office.Trainer(options, domains, len(classes), new_backbone)
    accuracy, correlation = accuracies(trainer, domains, ("stl", "shared", "drn8"))
    assert accuracy["drn8"] > 0.9 > max(accuracy["stl"], accuracy["shared"]) + 0.05
    assert correlation[0, 1:].max() < 0 and correlation[1:, 1:].min() > 0.9


def test_cross_validation_is_on_the_training_part(tmp_path, rng, monkeypatch):
    """Every example of it is validated once, and no other is seen."""
    options = options_of(write_features(tmp_path, rng), "--folds", "3")
    domains, classes = office.load_features(tmp_path)
    trainer = office.Trainer(options, domains, len(classes), lambda: (6,))
    parts = {"amazon": np.arange(7), "dslr": np.array([3, 5])}
    seen = {"train": [], "valid": []}

    def train(method, own, seed, learning_rate, strength):
        seen["train"].append({name: sorted(part) for name, part in own.items()})
        return learning_rate

    def correct(model, own):
        seen["valid"].append({name: sorted(part) for name, part in own.items()})
        return {name: np.full(len(part), model > 0.1) for name, part in own.items()}

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(trainer, "correct", correct)
    grid = [(0.05, 1e-3), (0.5, 1e-3)]
    assert trainer.cross_validate("drn", parts, 0, grid) == [0.0, 1.0]
    for name, part in parts.items():
        validated = [index for own in seen["valid"][::2] for index in own[name]]
        assert sorted(validated) == sorted(part)
        for own, other in zip(seen["train"], seen["valid"]):
            assert sorted([*own[name], *other[name]]) == sorted(part)
    with pytest.raises(ValueError, match="expected 2 at"):
        trainer.cross_validate("drn", {"amazon": [0, 1], "dslr": [0]}, 0, grid)


@pytest.mark.parametrize("tune_from", [None, "norm1"])
def test_images(tune_from, tmp_path, rng, monkeypatch, few_steps):
    """A trunk from a file, frozen or fine-tuned; its lower part runs once."""
    folder = write_images(tmp_path / "images", rng, size=(8, 8))
    trunk = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.Conv2D(4, 3, name="conv1"),
            keras.layers.BatchNormalization(name="norm1"),
            keras.layers.Conv2D(5, 3, name="conv2"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(7, name="top"),
        ]
    )
    trunk.save(tmp_path / "trunk.keras")
    arguments = [
        *["--data", str(folder), "--trunk", str(tmp_path / "trunk.keras"), *TINY],
        *["--image-size", "8", "--feature-layer", "pool", "--scale", "127", "128"],
        *["--methods", "stl", "drn", "--strengths", "1e-2", "--draws", "1"],
        *["--output", str(tmp_path / "results")],
    ]
    if tune_from is not None:
        arguments += ["--tune-from", tune_from]
    assert len(office.main(arguments)["office"]) == 2
    monkeypatch.setattr(office.Trunk, "run_lower", None)
    options = office.parse(arguments)
    domains, _, new_backbone, _ = office.EXPERIMENT.load(options, None)
    backbone = new_backbone()
    x = domains["amazon"].x
    if tune_from is None:
        assert backbone == x.shape[1:] == (5,)
        features = x
    else:
        names = [layer.name for layer in backbone.layers]
        assert "conv1" not in names and "conv2" in names
        features = backbone.predict(x, verbose=0)
    images = office.load_images(folder, 8)[0]["amazon"].x.astype("float32")
    whole = keras.Model(trunk.inputs, trunk.get_layer("pool").output)
    bigger = keras.models.clone_model(whole, input_tensors=[keras.Input((8, 8, 3))])
    bigger.set_weights(whole.get_weights())
    expected = bigger.predict((images - 127) / 128, verbose=0)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_applications_of_keras(rng):
    """A class by name, with the scaling of pixels that belongs to it."""
    trunk = office.Trunk("MobileNetV2", 32, weights=None)
    images = rng.integers(256, size=(2, 32, 32, 3)).astype("uint8")
    expected = trunk.lower.predict(images / 127.5 - 1.0, verbose=0)
    np.testing.assert_allclose(trunk.run_lower(images), expected, atol=1e-5)
    with pytest.raises(ValueError, match="'ResNet7'"):
        office.Trunk("ResNet7", 32, weights=None)
    with pytest.raises(ValueError, match="--feature-layer"):
        office.Trunk("MobileNetV2", 32, feature_layer="Conv1", weights=None)


def test_embeddings(tmp_path, rng):
    """What each task's classifier sees, whether the bottleneck is shared or not."""
    options = options_of(write_features(tmp_path, rng))
    domains, classes = office.load_features(tmp_path)
    trainer = office.Trainer(options, domains, len(classes), lambda: (6,))
    inputs = {name: domain.x[:5] for name, domain in domains.items()}
    for method in ("drn", "mtcnn", "shared"):
        model = trainer.network(method, 1e-3)
        found = office.embeddings(model, inputs)
        layer = model.get_layer("bottleneck")
        for number, (name, x) in enumerate(inputs.items()):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            kernel = kernel[..., number] if kernel.ndim == 3 else kernel
            np.testing.assert_allclose(found[name], np.maximum(x @ kernel, 0), atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "one of the arguments --data --features is required"),
        (["--features", "x", "--fractions", "1"], "above 0 and below 1"),
        (["--features", "x", "--methods", "best"], "invalid choice: 'best'"),
        (
            ["--features", "x", "--missing-classes", "1", "--methods", "drn-bi"],
            "drn-bi would take what is missing for absent",
        ),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    """The parser says what was wrong."""
    with pytest.raises(SystemExit):
        office.main(arguments)
    assert message in capsys.readouterr().err


def search_case(monkeypatch):
    """For `tests/tuning`."""
    own = {name: data.Domain(NUMBERS[:, None] * 1.0, NUMBERS % 10) for name in ("a", "b")}
    classes = [str(number) for number in range(10)]
    loaded = (own, classes, lambda: (1,), {"data": "own"})

    def run(options, method, part, seed, tick, callbacks):
        _, parts = part
        train, test = parts["a"]
        whole = data.draw(own, options.fractions[0], seed, options.stratified)
        held = np.isin(test, whole["a"][1])
        seen.append((train, test + 200 * held.all(), options))
        return {"accuracy": {"a": 0.5, "b": 0.7}, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, office.EXPERIMENT, loaded, run)
    return Case("mrn", ["--features", "x", "--fractions", "0.5"], seen, 60, 0.4)
