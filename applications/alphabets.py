"""Omniglot's original layout: folders of alphabets, their characters, and drawings."""

import pathlib
import re
import typing
import zipfile

import numpy as np

from .domains import IMAGE_SUFFIXES
from .image_tasks import ImageTask, fitted
from .reading import MOST_IMAGES, DataError, check_size, open_zip, read_image

# Both parts are alphabets; the paper takes the tasks from both.
PARTS = ("images_background", "images_evaluation")


class Drawing(typing.NamedTuple):
    """An image file.

    Attributes:
        alphabet: str.
        character: str, the name of its folder.
        path: `pathlib.Path` or `zipfile.Path`.
    """

    alphabet: str
    character: str
    path: typing.Any


def load_alphabets(folder, size, chosen=None):
    """The alphabets of Omniglot, each a data set of its own with its own classes.

    Args:
        folder: path of a folder that has `images_background` and `images_evaluation`, or
            one of them, each as a folder or as a zip file, whose name ends with that and
            `.zip`. In them are `<alphabet>/<character>/<image>`.
        size: int; images are scaled to squares of this side.
        chosen: None, all alphabets; an int, so many, the first ones in alphabetical order;
            or their names, as the folders or the tasks are called.

    Returns:
        A dict from the name of a task to `ImageTask`, in alphabetical order. A task is
        called as the folder, but that what TensorFlow takes in no name is `_`. The images
        are uint8 `(n, size, size, 1)`, those of one character after another, and in the
        order of their names.

    Raises:
        FileNotFoundError: if there is no such folder, or neither part in it.
        DataError: on files of another layout, on characters with a single image, on
            alphabets with a single character, on unknown names, on files that can't be
            read.
    """
    drawings = list(_drawings(pathlib.Path(folder)))
    by_alphabet = {}
    for drawing in drawings:
        characters = by_alphabet.setdefault(drawing.alphabet, {})
        characters.setdefault(drawing.character, []).append(drawing.path)
    names = _task_names(folder, by_alphabet)
    tasks = {}
    for name in _chosen(folder, names, chosen):
        characters = by_alphabet[names[name]]
        _check(folder, names[name], characters)
        tasks[name] = _read(folder, characters, size)
    return tasks


def _drawings(folder):
    """All image files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    roots = [root for part in PARTS for root in _roots(folder, part)]
    if not roots:
        raise FileNotFoundError(
            f"{folder}: expected {' and '.join(PARTS)}, folders or zip files "
            f"(*{PARTS[0]}.zip). "
            f"Found: {sorted(path.name for path in folder.iterdir())[:20]}."
        )
    for root, part in roots:
        for names, path in _images(root):
            # A zip file has the folder, or what is in it.
            names = names[1:] if names[0] == part else names
            if len(names) != 3:
                raise DataError(
                    f"{path}: expected <alphabet>/<character>/<image> in {part}. "
                    f"Received: {'/'.join(names)}."
                )
            yield Drawing(*names[:2], path)


def _roots(folder, part):
    """`(root, part)` of a part that is there: its folder, else its zip file."""
    if (folder / part).is_dir():
        return [(folder / part, part)]
    found = sorted(folder.glob(f"*{part}.zip"))
    if len(found) > 1:
        raise DataError(f"{folder}: expected one zip file of {part}. Found: {found}.")
    return [(path, part) for path in found]


def _images(root):
    """Names of the folders and of the file, and the path, of each image in order."""
    if root.is_dir():
        paths = (path for path in root.rglob("*") if path.is_file())
        entries = [(path.relative_to(root).parts, path) for path in paths]
    else:
        # Not folder by folder: `zipfile.Path` goes through all names for each.
        archive = zipfile.Path(open_zip(root)).root
        entries = [
            (pathlib.PurePosixPath(name).parts, zipfile.Path(archive, name))
            for name in archive.namelist()
        ]
    for names, path in sorted(entries, key=lambda entry: entry[0]):
        image = names and pathlib.PurePath(names[-1]).suffix.lower() in IMAGE_SUFFIXES
        # What macOS and editors leave.
        hidden = any(name.startswith((".", "__MACOSX")) for name in names)
        if image and not hidden:
            yield names, path


def _task_names(folder, alphabets):
    """A dict from the name of a task to that of its alphabet."""
    names = {}
    for alphabet in sorted(alphabets):
        name = task_name(alphabet)
        if name in names or not name:
            raise DataError(
                f"{folder}: expected alphabets with different names of letters and digits. "
                f"Received: {alphabet!r}, which is {name!r}."
            )
        names[name] = alphabet
    return names


def task_name(alphabet):
    """The name of a task.

    Example:

    >>> task_name("Malay_(Jawi_-_Arabic)")
    'Malay_Jawi_-_Arabic'
    """
    return re.sub(r"[^A-Za-z0-9.-]+", "_", alphabet).strip("_-")


def _chosen(folder, names, chosen):
    if chosen is None:
        return list(names)
    if isinstance(chosen, int):
        if chosen > len(names):
            raise DataError(f"{folder}: expected {chosen} alphabets. Found: {len(names)}.")
        return list(names)[:chosen]
    wanted = {task_name(name) for name in chosen}
    unknown = sorted(wanted - set(names))
    if unknown:
        raise DataError(f"{folder}: no alphabets {unknown}. There are: {list(names)}.")
    return [name for name in names if name in wanted]


def _check(folder, alphabet, characters):
    few = [name for name, paths in characters.items() if len(paths) < 2]
    if few or len(characters) < 2:
        what = f"{few[0]} has a single image" if few else f"{list(characters)} alone"
        raise DataError(
            f"{folder}, alphabet {alphabet}: expected two characters or more, of two "
            f"images or more each. Received: {what}."
        )


def _read(folder, characters, size):
    """One alphabet."""
    names = list(characters)
    labels = np.repeat(range(len(names)), [len(own) for own in characters.values()])
    check_size(folder, len(labels) * size**2, MOST_IMAGES)
    images = np.empty((len(labels), size, size, 1), "uint8")
    paths = (path for own in characters.values() for path in own)
    for number, path in enumerate(paths):
        images[number, ..., 0] = np.asarray(fitted(read_image(path).convert("L"), size))
    return ImageTask(images, labels, names)


def split(tasks, count, held_back, validation, seed, what):
    """For each task, `(train, test)`: indices, as many of each character.

    The drawings of a character are put in a random order, of which the first are trained
    on, so that a larger part of the same seed has those of a smaller one. Some drawings of
    each character, the last ones by their names, are never among them: they are what
    settings are chosen by.

    Args:
        tasks: dict from name to `ImageTask`.
        count: function from the number of drawings of a character, without those that are
            held back, to that of those to train on.
        held_back: int, of each character.
        validation: bool, whether these are what is tested on.
        seed: int.
        what: str, what `count` is in words, for the error.

    Raises:
        DataError: if nothing would be left to train or to test on.
    """
    parts = {}
    for number, (name, task) in enumerate(tasks.items()):
        rng = np.random.default_rng([seed, number])
        train, test = [], []
        for label in range(len(task.classes)):
            own = np.flatnonzero(task.labels == label)
            kept, back = np.split(own, [max(0, len(own) - held_back)])
            many = count(len(kept))
            if many >= len(kept):
                raise DataError(
                    f"Task {name!r}: {what} {len(kept)} drawings of a character leaves "
                    "none to test on."
                )
            kept = rng.permutation(kept)
            train.append(kept[:many])
            test.append(back if validation else kept[many:])
        parts[name] = np.concatenate(train), np.concatenate(test)
    return parts
