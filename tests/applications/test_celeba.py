"""Similarity of CelebA's attributes, from labels of the right form and the real ones."""

import zipfile

import numpy as np
import pytest

from applications import celeba

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
    frame = celeba.main(arguments)
    np.testing.assert_allclose(frame, np.abs(np.corrcoef(labels.T)), atol=1e-9)
    for name in ("similarity.csv", "similarity.png", "pairs.md"):
        assert (output / name).stat().st_size > 50
    assert "| Bald | Male |" in (output / "pairs.md").read_text().splitlines()[2]
    two = celeba.main([*arguments, "--attributes", "Smiling", "Bald"])
    assert list(two) == ["Smiling", "Bald"]
    with pytest.raises(ValueError, match=r"Received: \['Bald', 'Happy'\]"):
        celeba.main([*arguments, "--attributes", "Bald", "Happy"])


def test_figure_3(tmp_path, data_dir):
    """The pairs that the paper names are the extremes among 780."""
    path = data_dir / "celeba_attributes.zip"
    frame = celeba.main(
        ["--similarity", "--data", str(path), "--output", str(tmp_path), "--pairs", "7"]
    )
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
    with pytest.raises(ValueError, match=r"values \[-1, 0, 1\]"):
        celeba.load_attributes(path)
    path.write_text("no labels\n")
    with pytest.raises(ValueError, match="expected a number of images"):
        celeba.load_attributes(path)
