"""The three sources of digits, and what is wrong with broken files."""

import gzip
import shutil
import struct

import numpy as np
import pytest

from applications.digits import IDX_FILES, load_digits, read_idx


def idx(array):
    """An array of unsigned bytes as the content of an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype("uint8").tobytes()


def write_folder(folder, rng, packed=False, train=30):
    """A folder with four small IDX files of the right form."""
    sizes = {"train": train, "test": 12}
    for part, name in IDX_FILES.items():
        split, kind = part.split("_")
        size = sizes[split]
        if kind == "images":
            array = rng.integers(256, size=(size, 28, 28))
        else:
            array = np.arange(size) % 10
        content = idx(array)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.long
def test_sample():
    """2,000 balanced test images, the other 3,000 to draw from, the same every time."""
    digits, again = load_digits("sample"), load_digits("sample")
    assert digits.train_images.shape == (3000, 28, 28, 1)
    assert digits.test_images.shape == (2000, 28, 28, 1)
    assert np.bincount(digits.test_labels).tolist() == [200] * 10
    for a, b in zip(digits[1:], again[1:]):
        np.testing.assert_array_equal(a, b)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 255


@pytest.mark.parametrize("packed", [False, True])
def test_folder(packed, tmp_path, rng):
    """Plain and gzipped."""
    write_folder(tmp_path, rng, packed)
    digits = load_digits(str(tmp_path))
    assert digits.train_images.shape == (30, 28, 28, 1)
    assert digits.test_labels.tolist() == [*range(10), 0, 1]


def test_real_mnist(data_dir):
    """The original files: sizes, classes, and the first label of each part."""
    digits = load_digits(str(data_dir / "mnist"))
    assert digits.train_images.shape == (60_000, 28, 28, 1)
    assert digits.test_images.shape == (10_000, 28, 28, 1)
    assert digits.train_labels[0] == 5
    assert digits.test_labels[0] == 7
    assert set(digits.train_labels) == set(range(10))


@pytest.mark.long
def test_tfds_is_the_folder(data_dir, tmp_path, monkeypatch):
    """TensorFlow Datasets, prepared offline from the original files, gives the same."""
    tfds = pytest.importorskip("tensorflow_datasets")
    manual = tmp_path / "manual"
    shutil.copytree(data_dir / "mnist", manual)
    builder = tfds.builder("mnist", data_dir=tmp_path / "tfds")
    config = tfds.download.DownloadConfig(manual_dir=manual)
    builder.download_and_prepare(download_config=config)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    load = tfds.load
    monkeypatch.setattr(
        tfds, "load", lambda *a, **k: load(*a, data_dir=tmp_path / "tfds", **k)
    )
    digits = load_digits("tfds")
    original = load_digits(str(data_dir / "mnist"))
    assert digits.train_images.shape == original.train_images.shape
    np.testing.assert_array_equal(
        np.bincount(digits.test_labels), np.bincount(original.test_labels)
    )
    assert digits.test_images.sum() == original.test_images.sum()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "00 00 0d 01"),
        (b"\x00\x00\x08\x03\x00\x00", "cut off"),
        (idx(np.zeros((4, 2)))[:-3], r"8 values for the shape \(4, 2\).*5\."),
        (idx(np.zeros((4, 2))) + b"\x00", "Received: more"),
    ],
)
def test_corrupt_files(content, message, tmp_path):
    """The file, what was expected, what was received."""
    path = tmp_path / "images-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)images-idx.*{message}"):
        read_idx(path)


def test_corrupt_gzip(tmp_path):
    """A download that stopped half-way, and a file that is no gzip at all."""
    whole = gzip.compress(idx(np.arange(1000) % 7))
    for content in (whole[: len(whole) // 2], b"<html>not found</html>"):
        path = tmp_path / "labels-idx.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"labels-idx\.gz: it can't be read"):
            read_idx(path)


def test_missing_files(tmp_path, rng):
    """No folder; a folder without one of the files; parts that don't match."""
    with pytest.raises(FileNotFoundError, match=r"nowhere.*'sample', 'tfds'"):
        load_digits(str(tmp_path / "nowhere"))
    write_folder(tmp_path, rng)
    labels = tmp_path / IDX_FILES["train_labels"]
    labels.write_bytes(idx(np.arange(7)))
    with pytest.raises(ValueError, match=r"\(30, 28, 28\), labels \(7,\)"):
        load_digits(str(tmp_path))
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte"):
        load_digits(str(tmp_path))
