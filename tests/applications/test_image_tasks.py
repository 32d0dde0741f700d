"""Data sets as tasks: readers of folders, zip files, and what is in the data folder."""

import doctest
import zipfile

import numpy as np
import pytest
from PIL import Image

from applications import image_tasks
from applications.image_tasks import load_task


def write(folder, sizes, mode="L", classes=("b", "a")):
    """Images of given sizes in each class, filled with the class's number."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index, size in enumerate(sizes):
            colour = 50 * (number + 1) if mode == "L" else (50 * (number + 1), 0, 9)
            Image.new(mode, size, colour).save(folder / name / f"{index}.png")
        (folder / name / "notes.txt").write_text("no image")


def test_folder_of_equal_sizes(tmp_path):
    """Images keep their size; classes are in alphabetical order."""
    write(tmp_path / "set", [(6, 4)] * 3)
    task = load_task(f"folder:{tmp_path}", None, 8)
    assert task.images.shape == (6, 4, 6, 1) and task.images.dtype == np.uint8
    assert task.classes == ["a", "b"]
    np.testing.assert_array_equal(task.labels, [0] * 3 + [1] * 3)
    assert set(task.images[:3].ravel()) == {100} and set(task.images[3:].ravel()) == {50}


def test_folder_of_other_sizes_in_colour(tmp_path):
    """Images of different sizes become squares; one in colour makes all three-channel."""
    write(tmp_path, [(6, 4), (9, 9)])
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "a" / "z.png")
    task = load_task(f"folder:{tmp_path}", None, 8)
    assert task.images.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(task.images[2, 0, 0], [1, 2, 3])


def test_zip_file(tmp_path):
    """The same from a zip file."""
    write(tmp_path / "set", [(4, 4)], mode="RGB")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted((tmp_path / "set").rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    packed = load_task(f"folder:{tmp_path / 'set.zip'}", None, 8)
    plain = load_task(f"folder:{tmp_path / 'set'}", None, 8)
    np.testing.assert_array_equal(packed.images, plain.images)
    assert packed.classes == plain.classes


def test_tfds(tmp_path):
    """A data set of TensorFlow Datasets, here its mock."""
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=7):
        task = load_task("tfds:cifar10", None, 8)
    assert task.images.shape == (7, 32, 32, 3)
    assert len(task.classes) == 10 and task.labels.shape == (7,)


def test_errors(tmp_path):
    """Unknown sources, missing files, classes without images, broken images."""
    with pytest.raises(ValueError, match=r"'mnist'.*folder:PATH.*'svhn'"):
        load_task("svhn", tmp_path, 8)
    with pytest.raises(ValueError, match="csv:x"):
        load_task("csv:x", tmp_path, 8)
    with pytest.raises(ValueError, match="give --data"):
        load_task("usps", None, 8)
    for source in ("usps", "coil20", "capitals", "amazon"):
        with pytest.raises(FileNotFoundError, match="expected the file"):
            load_task(source, tmp_path, 8)
    with pytest.raises(FileNotFoundError, match="no folder or zip file"):
        load_task(f"folder:{tmp_path / 'none'}", None, 8)
    with pytest.raises(FileNotFoundError, match="one for each class"):
        load_task(f"folder:{tmp_path}", None, 8)
    write(tmp_path / "set", [(4, 4)])
    (tmp_path / "set" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_task(f"folder:{tmp_path}", None, 8)
    (tmp_path / "set" / "c" / "broken.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"broken\.png"):
        load_task(f"folder:{tmp_path}", None, 8)


@pytest.mark.parametrize(
    ("source", "count", "shape", "classes"),
    [
        ("usps", 9298, (16, 16, 1), 10),
        ("coil20", 1440, (32, 32, 1), 20),
        ("typographic", 10160, (28, 28, 1), 10),
        ("mnist", 70_000, (28, 28, 1), 10),
        ("amazon", 958, (224, 224, 3), 10),
    ],
)
def test_real_data(source, count, shape, classes, data_dir):
    """Sizes and classes of what is in the data folder, each class with images."""
    task = load_task(source, data_dir, 32)
    assert task.images.shape == (count, *shape)
    assert np.array_equal(np.unique(task.labels), range(classes))
    assert len(task.classes) == classes
    assert 20 < task.images.mean() < 230


def test_docstrings():
    """The examples run."""
    assert doctest.testmod(image_tasks).failed == 0
