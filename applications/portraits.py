"""Faces with age, gender and race: UTKFace's names of files, and Adience's lists.

UTKFace (Zhang, Song & Qi, CVPR 2017): `age_gender_race_time.jpg` in any folders. Adience
(Eidinger, Enbar & Hassner 2014): `fold_0_data.txt` to `fold_4_data.txt`, and aligned
faces in `faces/<user>/coarse_tilt_aligned_face.<face>.<image>` or
`aligned/<user>/landmark_aligned_face.<face>.<image>`.
"""

import csv
import io
import pathlib
import re
import typing
import zipfile

import numpy as np

from .reading import DataError, open_zip, read_image, read_text, reading

# The age groups of Adience, from and to; ages between two belong to the nearer one.
AGES = ((0, 2), (4, 6), (8, 13), (15, 20), (25, 32), (38, 43), (48, 53), (60, 100))
GENDERS, RACES = 2, 5
_FOLDS = re.compile(r"fold_(\d+)_data\.txt")
# Gender is 0 (male) or 1, race 0 to 4, whatever comes after it.
_NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_.*\.(jpg|jpeg|png)", re.IGNORECASE)
_IMAGE = re.compile(r".*\.(jpg|jpeg|png)", re.IGNORECASE)


class Portraits(typing.NamedTuple):
    """Faces; a class that is not known is -1, an age in years that is not NaN.

    Attributes:
        images: uint8 `(n, size, size, 3)`.
        age: ints `(n,)`, the number of the group in `AGES`.
        years: float32 `(n,)`; of a group the middle.
        gender: ints `(n,)`, 0 (male) and 1.
        race: ints `(n,)`, 0 to 4; None: the data set has none.
        fold: ints `(n,)`, the number of the data set's own fold; None: it has none.
        left_out: int, how many were left out, of which nothing is known.
    """

    images: np.ndarray
    age: np.ndarray
    years: np.ndarray
    gender: np.ndarray
    race: np.ndarray | None
    fold: np.ndarray | None
    left_out: int


def age_group(age):
    """The number of the group that an age is in, or nearest to.

    Example:

    >>> [age_group(age) for age in (1, 5, 7, 28, 35, 99)]
    [0, 1, 1, 4, 4, 7]
    """
    return int(np.argmin([max(low - age, age - high, 0) for low, high in AGES]))


def is_portraits(path):
    """Whether a folder or a zip file has faces in one of the two forms."""
    names = [name.rpartition("/")[2] for name in _files(path)]
    return any(_NAME.fullmatch(name) or _FOLDS.fullmatch(name) for name in names)


def load_portraits(path, size):
    """Faces with age, gender and, of UTKFace, race.

    Args:
        path: path of a folder or a zip file.
        size: int; images are scaled to this side.

    Returns:
        `Portraits`, in the order of the files' names, or of Adience's lists.

    Raises:
        FileNotFoundError: if there is none.
        DataError: on lists in another form, on images that can't be read or aren't there.
    """
    files = _files(path)
    folds = {}
    for name, file in files.items():
        found = _FOLDS.fullmatch(name.rpartition("/")[2])
        if found:
            folds[int(found[1])] = name, file
    rows = _adience(files, folds) if folds else _utkface(files)
    known = [row for row in rows if row is not None]
    if not known:
        raise DataError(
            f"{path}: expected faces named age_gender_race_time.jpg, or Adience's lists "
            "fold_0_data.txt, ..., with their images. Found none."
        )
    images = []
    for file, *_ in known:
        with reading(file):
            image = read_image(file).convert("RGB").resize((size, size))
            images.append(np.asarray(image, "uint8"))
    _, years, gender, race, fold = zip(*known)
    return Portraits(
        np.stack(images),
        np.array([-1 if np.isnan(age) else age_group(age) for age in years]),
        np.float32(years),
        np.array(gender),
        None if folds else np.array(race),
        np.array(fold) if folds else None,
        len(rows) - len(known),
    )


def _files(path):
    """A dict from the names of files, with their folders, to what can be opened."""
    path = pathlib.Path(path)
    if path.is_dir():
        found = {str(p.relative_to(path).as_posix()): p for p in path.rglob("*")}
        return dict(sorted((n, p) for n, p in found.items() if p.is_file()))
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    archive = open_zip(path)
    names = sorted(name for name in archive.namelist() if not name.endswith("/"))
    return {name: zipfile.Path(archive, name) for name in names}


def _utkface(files):
    """For each image `(file, years, gender, race, fold)`, or None for a name with less."""
    rows = []
    for name, file in files.items():
        last = name.rpartition("/")[2]
        if not _IMAGE.fullmatch(last) or last.startswith("."):
            continue
        found = _NAME.fullmatch(last)
        if found is None:
            rows.append(None)
            continue
        age, gender, race = map(int, found.groups()[:3])
        rows.append((file, age, gender, race, -1))
    return rows


def _adience(files, folds):
    """Likewise of the lists' rows."""
    rows = []
    for fold, (name, file) in sorted(folds.items()):
        reader = csv.DictReader(io.StringIO(read_text(file)), delimiter="\t")
        wanted = {"user_id", "original_image", "face_id", "age", "gender"}
        if not wanted <= set(reader.fieldnames or ()):
            raise DataError(
                f"{name}, row 1: expected the columns {sorted(wanted)}, separated by "
                f"tabs. Received: {reader.fieldnames}."
            )
        folder = name.rpartition("/")[0]
        for row in reader:
            with reading(f"{name}, row {reader.line_num}"):
                own = _labels(row)
                if own is None:
                    rows.append(None)
                    continue
                image = _face(files, folder, row)
                rows.append((image, *own, -1, fold))
    return rows


def _labels(row):
    """`(years, gender)`, NaN or -1 where one of them is not known, or None."""
    numbers = [int(number) for number in re.findall(r"\d+", row["age"] or "")]
    gender = {"m": 0, "f": 1}.get((row["gender"] or "").strip().lower(), -1)
    if not numbers and gender < 0:
        return None
    return sum(numbers) / len(numbers) if numbers else np.nan, gender


def _face(files, folder, row):
    """The image of a row of Adience's."""
    end = f"{row['face_id']}.{row['original_image']}"
    tried = []
    for kind, start in (("faces", "coarse_tilt"), ("aligned", "landmark")):
        place = f"{kind}/{row['user_id']}/{start}_aligned_face.{end}"
        tried.append(f"{folder}/{place}" if folder else place)
        if tried[-1] in files:
            return files[tried[-1]]
    raise DataError(f"expected its image, {' or '.join(tried)}.")
