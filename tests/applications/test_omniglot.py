"""The Omniglot experiment, on generated alphabets."""

import doctest
import itertools
import os
import pathlib
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from searching import NUMBERS, Case, replace

from applications import alphabets, image_tasks, omniglot
from applications.results import Results

SMALL = (
    "--size 12 --epochs 2 --steps 1 --batch-size 4 --training-share 0.4 --repeats 2"
).split()
# Characters by alphabet.
SIZES = {"Ge_ez": 2, "Latin": 3, "Malay_(Jawi)": 2}


def write_alphabets(folder, rng, sizes=SIZES, drawings=7):
    """Omniglot's layout: a dot on another place for each character."""
    for place, (alphabet, count) in enumerate(sizes.items()):
        part = alphabets.PARTS[place % 2]
        for character in range(1, count + 1):
            own = folder / part / alphabet / f"character{character:02}"
            own.mkdir(parents=True)
            for number in range(1, drawings + 1):
                image = rng.uniform(size=(14, 14)) > 0.1
                image[4 * character - 4 : 4 * character, :7] = False
                path = own / f"{100 * place + character:04}_{number:02}.png"
                Image.fromarray(image).save(path)
    return folder


def zipped(folder, into, prefix=""):
    """The same in zip files, with and without the parts' own folders."""
    into.mkdir()
    for part, inside in zip(alphabets.PARTS, (True, False)):
        with zipfile.ZipFile(into / f"{prefix}{part}.zip", "w") as file:
            root = folder if inside else folder / part
            for path in sorted((folder / part).rglob("*")):
                file.write(path, path.relative_to(root))
            file.writestr("__MACOSX/._0001_01.png", b"no image")
    return into


def test_reader(tmp_path, rng):
    """Folders and zip files of them give the same tasks, in alphabetical order."""
    folder = write_alphabets(tmp_path / "a", rng)
    (folder / "images_background" / "Ge_ez" / "character01" / "notes.txt").write_text("a")
    tasks = alphabets.load_alphabets(folder, 14)
    assert list(tasks) == ["Ge_ez", "Latin", "Malay_Jawi"]
    for (name, count), task in zip(SIZES.items(), tasks.values()):
        assert task.images.shape == (7 * count, 14, 14, 1) and task.images.dtype == "uint8"
        assert set(np.unique(task.images)) == {0, 255}
        assert task.classes == [f"character{n + 1:02}" for n in range(count)]
        assert task.labels.tolist() == [n for n in range(count) for _ in range(7)]
        paths = sorted((folder).rglob(f"{name}/*/*.png"))
        for path, image in zip(paths, task.images):
            with Image.open(path) as expected:
                np.testing.assert_array_equal(255 * np.asarray(expected), image[..., 0])
    again = alphabets.load_alphabets(zipped(folder, tmp_path / "b", "omniglot_"), 14)
    for name, task in tasks.items():
        np.testing.assert_array_equal(task.images, again[name].images)
        assert task.labels.tolist() == again[name].labels.tolist()
    small = alphabets.load_alphabets(folder, 8, 2)
    assert list(small) == ["Ge_ez", "Latin"]
    assert small["Latin"].images.shape == (21, 8, 8, 1)
    assert list(alphabets.load_alphabets(folder, 8, ["Malay_(Jawi)", "Latin"])) == [
        "Latin",
        "Malay_Jawi",
    ]
    assert doctest.testmod(alphabets).failed == 0


def test_malformed(tmp_path, rng):
    """What is wrong is said with the file."""

    def refused(change, *words, kind=ValueError, **arguments):
        folder = write_alphabets(tmp_path / f"{next(numbers)}", rng, {"A": 2, "B": 2}, 2)
        change(folder)
        with pytest.raises(kind) as found:
            alphabets.load_alphabets(folder, 8, **arguments)
        for word in (str(folder), *words):
            assert word in str(found.value)

    numbers = itertools.count()
    own = pathlib.Path("images_background", "A", "character01")

    def deeper(folder):
        (folder / own / "more").mkdir()
        (folder / own / "0001_01.png").rename(folder / own / "more" / "1.png")

    def cut_zip(folder):
        (folder / "images_evaluation").rename(folder / "gone")
        (folder / "images_evaluation.zip").write_bytes(b"PK no zip")

    def two_zips(folder):
        (folder / "images_evaluation").rename(folder / "gone")
        for name in "ab":
            (folder / f"{name}images_evaluation.zip").write_bytes(b"")

    def one_character(folder):
        (folder / own).rename(folder / "gone")

    def same_name(folder):
        part = folder / "images_background"
        (folder / "images_evaluation" / "B").rename(part / "A-")

    refused(
        lambda folder: (folder / own / "0001_02.png").unlink(), "A", "character01 has a"
    )
    refused(lambda folder: (folder / own / "0001_02.png").write_bytes(b"x"), "0001_02.png")
    refused(deeper, "more/1.png: expected <alphabet>/<character>/<image>")
    refused(cut_zip, "images_evaluation.zip: it can't be read")
    refused(two_zips, "expected one zip file of images_evaluation")
    refused(one_character, "alphabet A: expected two characters", "['character02'] alone")
    refused(same_name, "different names", "'A-', which is 'A'")
    refused(lambda folder: None, "no alphabets ['C']", chosen=["A", "C"])
    refused(lambda folder: None, "expected 3 alphabets", chosen=3)

    def no_parts(folder):
        for part in alphabets.PARTS:
            (folder / part).rename(folder / f"old_{part}")

    refused(no_parts, "old_images_background", kind=FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="no folder"):
        alphabets.load_alphabets(tmp_path / "none", 8)


@pytest.mark.skipif("DMTRL_DATA_DIR" not in os.environ, reason="needs DMTRL_DATA_DIR")
def test_real_alphabets():
    """The first two alphabets of the real files."""
    tasks = alphabets.load_alphabets(os.environ["DMTRL_DATA_DIR"], 28, 2)
    assert {name: len(task.classes) for name, task in tasks.items()} == {
        "Alphabet_of_the_Magi": 20,
        "Angelic": 20,
    }
    for task in tasks.values():
        assert np.bincount(task.labels).tolist() == [20] * 20
        # Black on white.
        assert task.images.min() == 0 and np.median(task.images) == 255


def options_of(folder, *arguments):
    """Parsed arguments, of the first training share."""
    options = omniglot.parse(["--data", str(folder), *SMALL, *arguments])
    return omniglot.EXPERIMENT._of_share(options, options.training_share[0])


def test_split(tmp_path, rng):
    """As many of each character; larger shares have the smaller; tests are apart."""
    folder = write_alphabets(tmp_path, rng, drawings=20)
    tasks = alphabets.load_alphabets(folder, 8)
    before = dict.fromkeys(tasks, ())
    # Of 18 drawings: the others are held back.
    for share, count in ((0.05, 1), (0.1, 2), (0.2, 4), (0.5, 9), (0.9, 16)):
        options = options_of(folder, "--training-share", str(share))
        parts = omniglot.EXPERIMENT._split(options, tasks, 3)
        options.validation = True
        watched = omniglot.EXPERIMENT._split(options, tasks, 3)
        for name, (train, test) in parts.items():
            labels = tasks[name].labels
            assert set(np.bincount(labels[train])) == {count}
            assert set(np.bincount(labels[test])) == {18 - count}
            assert not {*train} & {*test} and {*before[name]} <= {*train}
            assert set(watched[name][1] % 20) == {18, 19}
            assert not {*watched[name][1]} & {*train, *test}
            assert sorted(watched[name][0]) == sorted(train)
            before[name] = train
    other = omniglot.EXPERIMENT._split(options_of(folder), tasks, 4)
    assert any(sorted(a[0]) != sorted(b[0]) for a, b in zip(other.values(), parts.values()))
    with pytest.raises(ValueError, match=r"'Ge_ez'.*leaves none to test on"):
        omniglot.EXPERIMENT._split(options_of(folder, "--training-share", "0.99"), tasks, 0)


def test_counts(tmp_path):
    """The weights of T networks, against the network itself; UD-MTL-Large has no more."""
    options = options_of(tmp_path, "--size", "105", "--padding", "valid")
    backbone = omniglot.make_backbone(options)
    assert [layer.count_params() for layer in map(backbone.get_layer, omniglot.LAYERS)] == [
        8 * 26,
        12 * (72 + 1),
        16 * (108 + 1),
        64 * (11 * 11 * 16 + 1),
    ]
    options = options_of(tmp_path, "--large", "0.6")
    classes = [2, 5, 3]
    stl = omniglot.weights_of(omniglot.make_backbone(options), 0, classes)
    tasks = {
        f"task_{n}": image_tasks.ImageTask(None, None, [""] * own)
        for n, own in enumerate(classes)
    }
    trainer = omniglot.Trainer(options, tasks, None, 0)
    for method, shared, most in (("stl", 0, stl), ("ud-mtl", 2, stl), ("ud-mtl", 4, stl)):
        model = trainer._untrained(method, shared)
        expected = omniglot.weights_of(omniglot.make_backbone(options), shared, classes)
        assert model.count_params() == expected <= most
    width = omniglot.width_of(options, classes)
    wider = [
        omniglot.weights_of(omniglot.make_backbone(options, width + more), 4, classes)
        for more in (0, 1 / 8)
    ]
    assert width > 1 and wider[0] <= 0.6 * stl < wider[1]


@pytest.mark.long
def test_command(tmp_path, rng, monkeypatch, few_steps):
    """Tables and figures, also in a page; finished runs are not run again."""
    folder = write_alphabets(tmp_path / "data", rng)
    methods = ["stl", "ud-mtl", "ud-mtl-large", "tucker", "tt"]
    page = tmp_path / "docs" / "omniglot.md"
    page.parent.mkdir()
    kinds = ("", "-sharing", "-alphabets", "-pairs")
    blocks = [f"omniglot{kind}" for kind in kinds]
    page.write_text("\n".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->" for n in blocks))
    output = tmp_path / "out"
    arguments = [
        "--data",
        str(folder),
        *SMALL,
        "--output",
        str(output),
        "--page",
        str(page),
    ]
    arguments += ["--start", "stl", "--weights", "0.5", "--rates", "tt=0.01"]
    arguments += ["--methods", *methods]
    tables = omniglot.main(arguments)
    errors = tables["omniglot"]
    assert list(errors["Splits"]) == [2] * len(methods)
    assert errors["Method"][0] == "STL" and (errors["To STL"] == "").sum() == 1
    assert set(tables) == set(blocks)
    assert list(tables["omniglot-alphabets"]["Characters"]) == [2, 3, 2]
    sharing = tables["omniglot-sharing"].set_index("Method")
    assert sharing.loc["STL", "fc"] == "0.00 ± 0.00 (0.00)"
    assert sharing.loc["UD-MTL", "conv3"] == "1.00 ± 0.00 (1.00)"
    pairs = tables["omniglot-pairs"]
    assert len(pairs) and "Ge_ez and Latin (" in " ".join(pairs["Most alike"])
    # A page may have the table of errors alone.
    short = page.with_name("short.md")
    short.write_text("<!-- omniglot:begin -->\n<!-- omniglot:end -->")
    omniglot.main([*arguments, "--page", str(short)])
    assert "UD-MTL-Large" in short.read_text()
    for name in ("errors.png", "sharing_strength.png", "omniglot.md"):
        assert (output / name).stat().st_size > 100
    assert "| STL |" in page.read_text()
    runs = list(Results(output / "runs.jsonl")._runs.values())
    assert len(runs) == 2 * len(methods)
    parameters = {run["settings"]["method"]: run["results"]["parameters"] for run in runs}
    assert parameters["stl"] > max(parameters["ud-mtl"], parameters["ud-mtl-large"])
    assert parameters["tt"] < parameters["stl"] > parameters["tucker"]
    rates = {run["settings"]["method"]: run["settings"]["learning_rate"] for run in runs}
    assert rates["tt"] == 0.01 and rates["tucker"] == 0.001
    monkeypatch.setattr(omniglot.Trainer, "train", None)
    again = omniglot.main(arguments)
    pd.testing.assert_frame_equal(again["omniglot"], errors)


@pytest.mark.parametrize(
    "method",
    ["tt", *(pytest.param(m, marks=pytest.mark.long) for m in omniglot.METHODS)],
)
def test_other_families(method, tmp_path, rng, few_steps):
    """Each trains; factors of a random start, too."""
    folder = write_alphabets(tmp_path, rng)
    options = options_of(folder, "--epochs", "1", "--rank", "0.5", "--start", "apart")
    tasks = alphabets.load_alphabets(folder, options.size)
    part = tasks, omniglot.EXPERIMENT._split(options, tasks, 0)
    found = omniglot.EXPERIMENT.run(options, method, part, 0, lambda: None)
    assert 0 <= found["error"] <= 1 and set(found["errors"]) == set(tasks)
    assert (found["similarity"] is None) == (method not in omniglot.FACTORIZATIONS)


def test_cross_validation(tmp_path, rng, monkeypatch):
    """N by folds of the training images; none where each character has one."""
    folder = write_alphabets(tmp_path, rng)
    tasks = alphabets.load_alphabets(folder, 12)
    seen = []

    def train(self, method, shared_layers):
        seen.append((shared_layers, self.parts))
        return shared_layers

    monkeypatch.setattr(omniglot.Trainer, "train", train)
    monkeypatch.setattr(
        omniglot.Trainer, "errors", lambda self, n: {"a": abs(n - 2), "b": 0}
    )
    options = options_of(folder)
    parts = omniglot.EXPERIMENT._split(options, tasks, 0)
    trainer = omniglot.Trainer(options, tasks, parts, 0)
    assert trainer.choose_shared_layers("ud-mtl") == {1: 0.5, 2: 0, 3: 0.5, 4: 1}
    # Two drawings of each character, two folds.
    assert [n for n, _ in seen] == [1, 2, 3, 4] * 2
    for name, task in tasks.items():
        first, second = seen[0][1][name], seen[4][1][name]
        assert sorted(first[1]) == sorted(second[0])
        assert set(np.bincount(task.labels[first[0]])) == {1}
        assert sorted([*first[0], *first[1]]) == sorted(parts[name][0])
    parts = omniglot.EXPERIMENT._split(
        options_of(folder, "--training-share", "0.1"), tasks, 0
    )
    trainer = omniglot.Trainer(options, tasks, parts, 0)
    assert trainer.choose_shared_layers("ud-mtl") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--validation --held-back 0", "--validation: expected --held-back of 1"),
        ("--rates x=1", "--rates: expected names from"),
        ("--weights 0.5", "--weights: expected --start stl"),
        ("--rank 2 --ranks conv1=2", "--ranks: expected those of"),
        ("--start stl --stl-epochs 2", "--stl-epochs: expected less than --epochs, 2"),
        ("--training-share 1", "above 0 and below 1, got '1'"),
        ("--shared-layers 5", "invalid choice: '5'"),
    ],
)
def test_arguments(arguments, message, tmp_path, capsys):
    """The parser refuses them."""
    with pytest.raises(SystemExit):
        options_of(tmp_path, *arguments.split())
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        omniglot.parse([])
    assert "--data: expected the folder" in capsys.readouterr().err


def search_case(monkeypatch):
    """For `tests/tuning`."""
    tasks = {
        name: image_tasks.ImageTask(
            np.broadcast_to(NUMBERS[:, None, None, None], (120, 8, 8, 1)).astype("uint8"),
            NUMBERS % classes,
            [str(number) for number in range(classes)],
        )
        for name, classes in (("Latin", 4), ("Greek", 3))
    }

    def run(options, method, part, seed, tick, callbacks):
        tasks, parts = part
        train, test = parts["Latin"]
        numbers = tasks["Latin"].images[:, 0, 0, 0]
        own = omniglot.EXPERIMENT._of_share(options, options.training_share[0])
        # The test part is what the experiment itself would test on.
        held = np.isin(test, omniglot.EXPERIMENT._split(own, tasks, seed)["Latin"][1])
        seen.append((numbers[train], numbers[test] + 200 * held.all(), options))
        errors = {name: 0.25 for name in tasks}
        return {"errors": errors, "error": 0.25, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, omniglot.EXPERIMENT, tasks, run)
    arguments = ["--data", "x", "--training-share", "0.7", "--epochs", "4"]
    return Case("tucker", arguments, seen, 80, 0.25)
