"""CelebA's attributes, from data of the right form, and from the real labels."""

import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from searching import Case, replace

from applications import celeba
from applications.results import Results

NAMES = ["Bald", "Male", "Smiling"]


def write_labels(folder, labels, names=NAMES):
    """A file in the form of CelebA's."""
    lines = [str(len(labels)), " ".join(names)]
    for number, row in enumerate(labels, start=1):
        lines.append(f"{number:06d}.jpg " + "".join(f"{v:3d}" for v in row))
    path = folder / celeba.LABELS
    path.write_text("\n".join(lines) + "\n")
    return path


def random_labels(rng, n=200):
    """1 and -1; bald people are male here."""
    labels = rng.choice([-1, 1], size=(n, 3))
    labels[:, 0] = np.where(labels[:, 1] < 0, -1, labels[:, 0])
    return labels


def test_load(tmp_path, rng):
    """From the file, a folder around it, a zip file."""
    labels = random_labels(rng)
    inner = tmp_path / "celeba" / "Anno"
    inner.mkdir(parents=True)
    path = write_labels(inner, labels)
    archive = tmp_path / "labels.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, f"some/{celeba.LABELS}")
    for source in (path, tmp_path, archive):
        frame = celeba.load_attributes(source)
        assert list(frame) == NAMES and frame.index[0] == "000001.jpg"
        np.testing.assert_array_equal(frame, labels > 0)
        assert all(frame.dtypes == "int8")


def test_command(tmp_path, rng):
    """Matrix, table and figure."""
    labels = random_labels(rng)
    path = write_labels(tmp_path, labels)
    output = tmp_path / "results"
    arguments = ["--similarity", "--data", str(path), "--output", str(output)]
    table = celeba.main(arguments)["celeba-pairs"]
    assert list(table["Similarity"]) == sorted(table["Similarity"], reverse=True)
    frame = pd.read_csv(output / "similarity.csv", index_col=0)
    np.testing.assert_allclose(frame, np.abs(np.corrcoef(labels.T)), atol=1e-9)
    for name in ("similarity.csv", "similarity.png", "pairs.md"):
        assert (output / name).stat().st_size > 50
    assert "| Bald | Male |" in (output / "pairs.md").read_text().splitlines()[2]
    celeba.main([*arguments, "--attributes", "Smiling", "Bald"])
    two = pd.read_csv(output / "similarity.csv", index_col=0)
    assert list(two) == list(two.index) == ["Smiling", "Bald"]
    with pytest.raises(SystemExit, match=r"Received: \['Bald', 'Happy'\]"):
        celeba.main([*arguments, "--attributes", "Bald", "Happy"])


def test_figure_3(tmp_path, data_dir):
    """The pairs that the paper names are the extremes among 780."""
    path = data_dir / "celeba_attributes.zip"
    celeba.main(
        ["--similarity", "--data", str(path), "--output", str(tmp_path), "--pairs", "7"]
    )
    frame = pd.read_csv(tmp_path / "similarity.csv", index_col=0)
    assert frame.shape == (40, 40)
    table = celeba.similarity_table(frame.to_numpy(), list(frame), 40)
    pairs = list(zip(table["Attribute"], table["Other attribute"]))
    for pair in [
        ("Heavy_Makeup", "Wearing_Lipstick"),
        ("Male", "Wearing_Lipstick"),
        ("No_Beard", "Sideburns"),
        ("Mouth_Slightly_Open", "Smiling"),
    ]:
        assert pair in pairs[:7]
    for pair in [
        ("Black_Hair", "Receding_Hairline"),
        ("Narrow_Eyes", "Rosy_Cheeks"),
        ("Bags_Under_Eyes", "Wearing_Hat"),
    ]:
        assert pair in pairs[40:]
    for first, second, tau in [
        ("Wearing_Hat", "Bald", 0.031),
        ("Mustache", "Goatee", 0.451),
        ("Sideburns", "No_Beard", 0.543),
        ("Sideburns", "Arched_Eyebrows", 0.116),
        ("Male", "Bags_Under_Eyes", 0.301),
    ]:
        assert round(frame.loc[first, second], 3) == tau


def test_bad_files(tmp_path, rng):
    """The error names the file and what was expected."""
    with pytest.raises(FileNotFoundError, match="no file"):
        celeba.load_attributes(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match=r"has no list_attr_celeba\.txt"):
        celeba.load_attributes(tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(FileNotFoundError, match=r"empty\.zip has no"):
        celeba.load_attributes(tmp_path / "empty.zip")
    path = write_labels(tmp_path, random_labels(rng))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-5]))
    with pytest.raises(ValueError, match=r"expected 200 lines.*Received: 195 lines"):
        celeba.load_attributes(path)
    path.write_text("\n".join([*lines[:-1], "000200.jpg 1 0 1"]))
    with pytest.raises(ValueError, match=r"values \[-1\.0, 0\.0, 1\.0\]"):
        celeba.load_attributes(path)
    path.write_text("no labels\n")
    with pytest.raises(ValueError, match="expected a number of images"):
        celeba.load_attributes(path)


SMALL = ["--size", "16", "--width", "2", "--epochs", "1", "--batch-size", "16"]


def write_images(folder, rng, parts=(32, 8, 12)):
    """Images, labels and partition in the form of CelebA's, of all of Table 3's names."""
    names = sorted({name for pair in celeba.PAIRS for name in pair} | {"Smiling"})
    labels = rng.choice([-1, 1], size=(sum(parts), len(names)))
    write_labels(folder, labels, names)
    lines = []
    images = folder / "img_align_celeba"
    images.mkdir()
    for number, part in enumerate(np.repeat(range(3), parts), start=1):
        lines.append(f"{number:06d}.jpg {part}")
        pixels = rng.integers(256, size=(22, 18, 3)).astype("uint8")
        Image.fromarray(pixels).save(images / f"{number:06d}.jpg")
    (folder / celeba.PARTITION).write_text("\n".join(lines) + "\n")
    return names, labels > 0


def test_images_of_a_folder(tmp_path, rng):
    """Three parts; what a batch has; what is missing is named."""
    names, labels = write_images(tmp_path, rng)
    parts = celeba.load_images(tmp_path, 16)
    assert [len(parts[name].labels) for name in celeba.PARTS] == [32, 8, 12]
    np.testing.assert_array_equal(parts["test"].labels, labels[40:])
    images, batch = next(iter(celeba.stream(parts["validation"], names[:2], 16, 8)))
    assert images.shape == (8, 16, 16, 3) and images.dtype == "uint8"
    np.testing.assert_array_equal(batch[names[1]][:, 0], labels[32:40, 1])
    shuffled = celeba.stream(parts["train"], names[:1], 16, 32, seed=1)
    first, second = (next(iter(shuffled))[1][names[0]] for _ in range(2))
    assert np.sum(first) == np.sum(second) == labels[:32, 0].sum()
    assert not np.array_equal(first, second)
    limited = celeba.load_images(tmp_path, 16, limit=5)
    assert [len(limited[name].labels) for name in celeba.PARTS] == [5, 5, 5]
    (tmp_path / "img_align_celeba" / "000050.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images are not there.*000050.jpg"):
        celeba.load_images(tmp_path, 16)
    lines = (tmp_path / celeba.PARTITION).read_text().splitlines()
    (tmp_path / celeba.PARTITION).write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"a part \(0, 1 or 2\) for each of 52.*51"):
        celeba.load_images(tmp_path, 16)
    (tmp_path / celeba.PARTITION).unlink()
    with pytest.raises(FileNotFoundError, match=celeba.PARTITION):
        celeba.load_images(tmp_path, 16)


def test_images_of_tfds():
    """The same form, from TensorFlow Datasets' own mock."""
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        parts = celeba.load_images("tfds", 16)
    assert parts["train"].images.shape == (3, 16, 16, 3)
    assert {name for pair in celeba.PAIRS for name in pair} < set(parts["test"].labels)
    assert len(parts["test"].labels.columns) == 40
    images, labels = next(iter(celeba.stream(parts["train"], ["Bald"], 16, 3)))
    assert images.shape == (3, 16, 16, 3) and labels["Bald"].shape == (3, 1)


def test_classification(tmp_path, rng, capsys, steps_as_users):
    """Both tables; a second call finds all results."""
    names, _ = write_images(tmp_path, rng)
    output = tmp_path / "results"
    arguments = ["--classification", "--data", str(tmp_path), "--output", str(output)]
    tables = celeba.main([*arguments, *SMALL, "--tables", "2"])
    assert list(tables["celeba-table-2"]["Method"]) == ["MTL", "TRN"]
    runs = Results(output / "runs.jsonl")._runs.values()
    for run in runs:
        assert set(run["results"]["error"]) == set(run["results"]["precision"]) == {*names}
        mean = 100 * np.mean(list(run["results"]["error"].values()))
        method = run["settings"]["method"].upper()
        row = tables["celeba-table-2"].set_index("Method").loc[method]
        assert row["Mean error %"] == f"{mean:.2f}" and row["Runs"] == 1
    before = (output / "runs.jsonl").read_text()
    celeba.main([*arguments, *SMALL, "--tables", "2"])
    assert (output / "runs.jsonl").read_text() == before
    assert (output / "table_2.md").read_text().count("|") > 15
    with pytest.raises(SystemExit, match="expected two at least"):
        celeba.main([*arguments, *SMALL, "--attributes", "Bald"])


def test_table_3(tmp_path, rng):
    """An attribute in two pairs is learned alone once; each value is in its place."""
    write_images(tmp_path, rng)
    options = celeba.parse(
        ["--classification", "--data", "x", "--tables", "3", "--methods", *celeba.METHODS]
    )
    parts = celeba.load_images(tmp_path, 16)
    plan = {run.title: run for run in celeba.EXPERIMENT.plan(options, parts)}
    assert len(plan) == 9 + 5 + 5
    assert all(run.settings["seed"] == 0 for run in plan.values())
    rows = []
    for number, run in enumerate(plan.values()):
        found = {name: number / 100 for name in run.settings["attributes"]}
        rows.append(run.settings | {"precision": found, "error": found})
    table = celeba.table_3(pd.DataFrame(rows), parts["train"].labels)
    titles = list(plan)
    first = table.iloc[0]
    assert first["AP 1 STL %"] == f"{titles.index('STL, Wearing_Hat, seed 0'):.2f}"
    assert first["AP 2 TRN %"] == f"{titles.index('TRN, Wearing_Hat, Bald, seed 0'):.2f}"
    assert table["AP 1 STL %"][2] == table["AP 1 STL %"][3] != table["AP 1 STL %"][0]


def search_case(monkeypatch):
    """For `tests/tuning`."""
    names = ["Bald", "Hat"]

    def part(numbers):
        labels = pd.DataFrame({name: np.array(numbers) for name in names})
        return celeba.Images(None, labels, np.zeros((len(labels), 8, 8, 3), "uint8"))

    parts = {
        "train": part(range(100)),
        "validation": part(range(100, 120)),
        "test": part(range(200, 220)),
    }

    def run(options, method, part, seed, tick, callbacks):
        parts, names = part
        seen.append((parts["train"].labels.Bald, parts["test"].labels.Bald, options))
        each = {name: 0.25 for name in names}
        return {"error": each, "precision": each, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, celeba.EXPERIMENT, parts, run)
    return Case("trn", ["--data", "x"], seen, 100, 0.25, True)
