"""Reading of data files, which may be anything.

What goes wrong is a `DataError` that names the file, in one line. How much memory a file
may take is limited before it is unpacked.
"""

import contextlib
import sys
import warnings
import zipfile

import numpy as np
from PIL import Image

# The most bytes that an array may take, and a list of images with their labels; full MNIST
# takes 47 MB, CelebA's list 26 MB.
MOST_BYTES, MOST_TEXT = 2**30, 2**28
# And the images of a data set together, as arrays.
MOST_IMAGES = 2**32
# Others have readers that start programs, or values of no known range.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


class DataError(ValueError):
    """What is wrong with a user's data; a command ends with its text."""


@contextlib.contextmanager
def one_line():
    """End a command with one line, and no traceback, where a file is the reason."""
    try:
        yield
    except (DataError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        sys.exit(" ".join(text.split()))


@contextlib.contextmanager
def reading(name, what="it"):
    """Name what is read in every error, whatever a library raises.

    Args:
        name: path, or a str such as `"training.txt, line 3"`.
        what: str, what can't be read.

    Raises:
        DataError: instead of any other error.

    Example:

    >>> with reading("labels.npz"):
    ...     raise EOFError("no more bytes")
    Traceback (most recent call last):
    ...
    applications.reading.DataError: labels.npz: it can't be read (no more bytes).
    """
    try:
        yield
    except DataError as error:
        if str(name) in str(error):
            raise
        raise DataError(f"{name}: {error}") from error
    except Exception as error:
        raise DataError(f"{name}: {what} can't be read ({reason(error)}).") from error


def reason(error):
    """Why something failed, in a few words of one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(text.split())
    return f"no {text}" if type(error) is KeyError else shortened(text, 200)


def shortened(text, length=40):
    """A text of at most this length."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def check_size(path, size, most=MOST_BYTES):
    """Refuse what would take more bytes than `most`."""
    if size > most:
        raise DataError(
            f"{path}: it has more than {most:,} bytes when it is unpacked, which is the "
            "most that is read."
        )


def read_text(path, most=MOST_TEXT):
    """The text of a file in UTF-8.

    Args:
        path: `pathlib.Path` or `zipfile.Path`.
        most: int, the most bytes.
    """
    with reading(path):
        with path.open("rb") as file:
            content = file.read(most + 1)
        check_size(path, len(content), most)
        return content.decode("utf-8-sig")


def open_zip(path):
    """A `zipfile.ZipFile`, to be read."""
    with reading(path):
        return zipfile.ZipFile(path)


def read_arrays(path, *names, most=MOST_BYTES):
    """Arrays of an `.npz` file, a dict.

    Args:
        path: path.
        *names: those to read if they are there; all by default.
        most: the most bytes of each.
    """
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not names or entry.filename.removesuffix(".npy") in names:
                    check_size(path, entry.file_size, most)
        with np.load(path) as file:
            return {name: file[name] for name in names or file.files if name in file}


def read_image(path):
    """An image of Pillow with 8 bits, in the mode "L" if it is grey, else "RGB".

    Args:
        path: `pathlib.Path` or `zipfile.Path`.

    Raises:
        DataError: if it can't be read, or has more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with reading(path, "this image"), path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=_FORMATS)
        image.load()
        return in_8_bits(image)


def in_8_bits(image):
    """An image of Pillow in the mode "L" if it is grey, else "RGB".

    Pillow itself cuts 16 bits off at 255.
    """
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode[0] not in "IF":
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"expected pixels of 8 or 16 bits. Received: an image of the mode "
            f"{image.mode!r}, from {values.min():g} to {values.max():g}."
        )
    return Image.fromarray(np.rint(values / 257).astype("uint8"))


def check_labels(path, labels, known):
    """Labels as ints, if each is one of those that are known.

    Args:
        path: of the file that has them.
        labels: array.
        known: range of int.

    Returns:
        An int array `(n,)`.
    """
    labels = np.ravel(labels)
    right = np.zeros(len(labels), bool)
    if labels.dtype.kind in "biuf":
        # NaN is in no range.
        right = (labels >= known.start) & (labels < known.stop)
        right[right] = labels[right] % 1 == 0
    if not np.all(right):
        raise DataError(
            f"{path}: expected labels that are whole numbers from {known.start} to "
            f"{known.stop - 1}. Received: {labels[~right][:5].tolist()}."
        )
    return labels.astype(int)


def check_pixels(path, values):
    """Pixels from 0 to 1 as uint8, from 0 to 255."""
    values = np.asarray(values)
    if values.dtype.kind not in "biuf" or not np.all((values >= 0) & (values <= 1)):
        raise DataError(f"{path}: expected pixels that are numbers from 0 to 1.")
    return np.rint(255 * values).astype("uint8")
