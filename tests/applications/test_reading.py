"""Data files that are cut, of another kind, too large, or have what they should not.

Each reader says in one line which file it is.
"""

import doctest
import gzip
import io
import json
import pathlib
import struct
import tracemalloc
import typing
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image
from test_celeba import NAMES, random_labels, write_labels
from test_celeba import write_images as write_celeba
from test_digits import idx, write_folder
from test_domains import write_features, write_images
from test_mtfl import write as write_faces

from applications import celeba, files, mnist, mtal, mtfl, office_caltech, reading
from applications.digits import IDX_FILES, load_digits, read_idx
from applications.domains import load_features, load_images
from applications.image_tasks import load_task
from applications.reading import DataError


def packed(folder, file):
    """A folder as a zip file beside it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def png(values):
    """An array as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(np.asarray(values)).save(content, "png")
    return content.getvalue()


def write_usps(folder, change=None):
    """A file in the form of USPS's."""
    with h5py.File(folder / "usps.h5", "w") as file:
        for part in ("train", "test"):
            arrays = {
                "data": np.tile(np.linspace(0, 1, 256, dtype="float32"), (10, 1)),
                "target": np.arange(10.0),
            }
            if change is not None:
                change(arrays)
            for name, array in arrays.items():
                file[f"{part}/{name}"] = array
    return folder / "usps.h5"


def write_coil(folder, labels=(1, 2, 20), pixel=0.5):
    """A file in the form of COIL-20's."""
    arrays = {"X": np.full((len(labels), 1024), pixel), "Y": np.array(labels)[:, None]}
    scipy.io.savemat(folder / "COIL20.mat", arrays, do_compression=True)
    return folder / "COIL20.mat"


def write_classes(folder, top, names, file):
    """A zip file of images, a folder for each class."""
    inner = folder / "inner"
    for number, name in enumerate(names):
        (inner / top / name).mkdir(parents=True)
        image = np.full((8, 8), 40 * number, "uint8")
        (inner / top / name / "0.png").write_bytes(png(image))
    return packed(inner, folder / file)


def write_zipped_faces(folder, rng):
    write_faces(folder / "inner", rng, 2)
    return packed(folder / "inner", folder / "mtfl.zip")


def write_zipped_labels(folder, rng):
    (folder / "inner").mkdir()
    write_labels(folder / "inner", random_labels(rng, 20))
    return packed(folder / "inner", folder / "labels.zip")


def write_digits(folder, rng):
    write_folder(folder, rng, packed=True)
    return folder / f"{IDX_FILES['train_images']}.gz"


def write_one_feature_file(folder, rng):
    write_features(folder, rng)
    return folder / "net_dslr.npz"


def write_one_image(folder, rng):
    write_images(folder, rng, per_class=1)
    return folder / "dslr" / "mug" / "0.png"


SAMPLES = ("Sample001", "Sample002")


class Reader(typing.NamedTuple):
    """What writes a small data set and returns one of its files, and what reads it."""

    write: typing.Callable
    load: typing.Callable


READERS = {
    "digits": Reader(write_digits, load_digits),
    "usps": Reader(lambda f, _: write_usps(f), lambda f: load_task("usps", f, 8)),
    "coil20": Reader(lambda f, _: write_coil(f), lambda f: load_task("coil20", f, 8)),
    "typographic": Reader(
        lambda f, _: write_classes(f, "English/Fnt", SAMPLES, "chars74k_fnt_28.zip"),
        lambda f: load_task("typographic", f, 8),
    ),
    "amazon": Reader(
        lambda f, _: write_classes(
            f, "office_caltech10/amazon", ("bike", "mug"), "office_caltech10.zip"
        ),
        lambda f: load_task("amazon", f, 8),
    ),
    "folder": Reader(
        lambda f, _: write_classes(f, "set", ("bike", "mug"), "own.zip"),
        lambda f: load_task(f"folder:{f / 'own.zip'}", None, 8),
    ),
    "images": Reader(write_one_image, lambda f: load_images(f, 8)),
    "features": Reader(write_one_feature_file, load_features),
    "faces": Reader(write_zipped_faces, lambda f: mtfl.load_mtfl(f / "mtfl.zip", 8)),
    "face lists": Reader(
        lambda f, rng: write_faces(f, rng, 3) and f / mtfl.TESTING,
        lambda f: mtfl.load_mtfl(f, 8),
    ),
    "zipped labels": Reader(
        write_zipped_labels, lambda f: celeba.load_attributes(f / "labels.zip")
    ),
    "labels": Reader(
        lambda f, rng: write_labels(f, random_labels(rng, 20)), celeba.load_attributes
    ),
}


def refused(load, *words):
    """The text of the error, which is one line with these words."""
    with warnings.catch_warnings(), pytest.raises((DataError, FileNotFoundError)) as found:
        # Of libraries, on broken files.
        warnings.simplefilter("ignore")
        load()
    text = str(found.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert word in text
    return text


def folder_instead(path):
    path.unlink()
    path.mkdir()


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "of another kind": lambda path: path.write_bytes(
        b"<html>\xff\xfe not found</html>" * 9
    ),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": folder_instead,
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", READERS)
def test_broken_files(name, kind, tmp_path, rng):
    """Whatever is broken in whatever file, the error names it."""
    reader = READERS[name]
    path = reader.write(tmp_path, rng)
    reader.load(tmp_path)
    BROKEN[kind](path)
    # A folder in the place of an image is a folder without images, or no image.
    words = () if kind == "a folder" else (path.name,)
    refused(lambda: reader.load(tmp_path), str(tmp_path), *words)


@pytest.mark.parametrize("name", READERS)
def test_changed_bytes(name, tmp_path, rng):
    """Anything else that a file may be: it is read, or the error names the folder."""
    reader = READERS[name]
    path = reader.write(tmp_path, rng)
    content = path.read_bytes()
    for place in rng.integers(len(content), size=8):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reader.load(tmp_path)
            except (DataError, FileNotFoundError) as error:
                assert str(tmp_path) in str(error)


def test_zip_members(tmp_path):
    """A wrong checksum, an unknown compression, a password."""
    for offset, value in ((14, 0xFF), (8, 77), (6, 1)):
        folder = tmp_path / str(offset)
        folder.mkdir()
        path = write_classes(folder, "set", ("a", "b"), "own.zip")
        content = bytearray(path.read_bytes())
        for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            start = -1
            while (start := content.find(mark, start + 1)) >= 0:
                content[start + offset + shift] ^= value
        path.write_bytes(content)
        refused(lambda p=path: load_task(f"folder:{p}", None, 8), "own.zip/set/", "0.png")


# --- labels and pixels --------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [[0, 5, 10], [-1, 0, 1], [0, 0.5, 1], [0, 1, np.nan], [0, 1, np.inf], ["a", "b", "c"]],
)
def test_labels_of_features(labels, tmp_path):
    """They are indices of the classes, whether these have names or not."""
    path = tmp_path / "a.npz"
    for classes in ({}, {"classes": ["x", "y", "z"]}):
        np.savez(path, features=np.ones((3, 2)), labels=labels, **classes)
        refused(lambda: load_features(tmp_path), "a.npz: expected labels that are whole")
    np.savez(path, features=np.ones((3, 2)), labels=[2.0, 0, 1])
    (domain,), classes = load_features(tmp_path)[0].values(), load_features(tmp_path)[1]
    assert domain.labels.tolist() == [2, 0, 1] and classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    "arrays",
    [
        {"features": np.full((2, 3), 1e300)},
        {"features": np.full((2, 3), 1j)},
        {"features": np.full((2, 3), "1")},
        {"features": np.ones((2, 0))},
        {"features": np.ones(2)},
        {"features": np.array([[{}], [None]])},
        {"labels": np.zeros((2, 1))},
        {"classes": ["x", "x"]},
        {"classes": "x"},
    ],
)
def test_arrays_of_features(arrays, tmp_path):
    """Finite numbers of float32, classes of different names; no objects."""
    np.savez(
        tmp_path / "a.npz",
        allow_pickle=True,
        **{"features": np.ones((2, 3)), "labels": [0, 1], **arrays},
    )
    refused(lambda: load_features(tmp_path), "a.npz: ")


def test_labels_and_pixels_of_usps(tmp_path):
    """Pixels from 0 to 1, labels from 0 to 9."""

    def changed(name, value):
        def change(arrays):
            arrays[name].flat[3] = value

        return change

    for value in (77, -1, 0.5, np.nan):
        write_usps(tmp_path, changed("target", value))
        words = ("usps.h5: expected labels", "from 0 to 9. Received: [")
        refused(lambda: load_task("usps", tmp_path, 8), *words)
    for value in (np.nan, 255, -0.1, np.inf):
        write_usps(tmp_path, changed("data", value))
        refused(lambda: load_task("usps", tmp_path, 8), "usps.h5: expected pixels")
    write_usps(tmp_path, lambda arrays: arrays.update(target=np.arange(9)))
    refused(lambda: load_task("usps", tmp_path, 8), "usps.h5: ", "(20, 256) and (18,)")
    write_usps(tmp_path, lambda arrays: arrays.pop("target"))
    refused(lambda: load_task("usps", tmp_path, 8), "usps.h5: it can't be read (", "target")


def test_labels_and_pixels_of_coil(tmp_path):
    """Pixels from 0 to 1, labels from 1 to 20."""
    for label in (0, 21, np.nan):
        write_coil(tmp_path, (1, label))
        refused(lambda: load_task("coil20", tmp_path, 8), "COIL20.mat", "from 1 to 20")
    write_coil(tmp_path, pixel=np.nan)
    refused(lambda: load_task("coil20", tmp_path, 8), "COIL20.mat: expected pixels")
    scipy.io.savemat(tmp_path / "COIL20.mat", {"x": 1})
    refused(
        lambda: load_task("coil20", tmp_path, 8), "COIL20.mat: it can't be read (no 'X'"
    )


def test_digits(tmp_path, rng):
    """28 x 28 pixels and labels from 0 to 9; other sizes and classes as tasks of MTAL."""
    write_folder(tmp_path, rng)
    labels = tmp_path / IDX_FILES["train_labels"]
    labels.write_bytes(idx(np.full(30, 25)))
    refused(lambda: load_digits(tmp_path), labels.name, "from 0 to 9. Received: [25, 25")
    assert len(load_task(f"idx:{tmp_path}", None, 8).classes) == 26
    for part, count in (("train", 30), ("test", 12)):
        images = idx(np.zeros((count, 4, 5)))
        (tmp_path / IDX_FILES[f"{part}_images"]).write_bytes(images)
        if part == "train":
            refused(lambda: load_task(f"idx:{tmp_path}", None, 8), "images of one size")
    refused(lambda: load_digits(tmp_path), "28 x 28 pixels. Received: 4 x 5")
    labels.write_bytes(idx(np.zeros(0)))
    (tmp_path / IDX_FILES["train_images"]).write_bytes(idx(np.zeros((0, 28, 28))))
    refused(lambda: load_digits(tmp_path), "expected some train images")


def face(x=(4, 8, 6, 4, 8), y=(4, 4, 6, 8, 8), rest="1 2 2 3"):
    return " ".join(map(str, [*x, *y])) + f" {rest}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (face(x=(4, "nan", 6, 4, 8)), "expected landmarks on the image"),
        (face(y=("inf", 4, 6, 8, 8)), "expected landmarks on the image"),
        (face(x=(4, 8, 6, 4, 8000)), "expected landmarks on the image"),
        (face(x=(4, 4, 6, 4, 8)), "expected eyes in two places"),
        (face(rest="1 2 2 nan"), "the pose, 1 to 5"),
        (face(rest="1 2 2 2.5"), "the pose, 1 to 5"),
        (face(rest="1 2 3 3"), "gender, smile and glasses to be 1 or 2"),
        (face(rest="1 2 2"), "expected 14 numbers"),
        (face(rest="1 2 2 x"), "'x'"),
    ],
)
def test_faces(line, message, tmp_path, rng):
    """Finite landmarks about the image, eyes in two places, whole poses."""
    write_faces(tmp_path, rng, 2)
    path = tmp_path / mtfl.TRAINING
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{first.split()[0]} {line}\n")
    refused(lambda: mtfl.load_mtfl(tmp_path, 8), "training.txt, line 2: ", message)


@pytest.mark.parametrize(
    "rows",
    [
        ["1.jpg 1 257 1"],
        ["1.jpg 1 nan 1"],
        ["1.jpg 1 0.5 1"],
        ["1.jpg 1 1"],
        ["1.jpg x 1 1 1"],
        ["1 1 1"],
        ["1.jpg 1 1 1", "1.jpg 1 1 1"],
        [],
    ],
)
def test_attributes(rows, tmp_path):
    """1 and -1, which no overflow makes; a file name in each line, of its own."""
    path = tmp_path / celeba.LABELS
    path.write_text("\n".join([str(len(rows)), " ".join(NAMES), *rows, ""]))
    refused(lambda: celeba.load_attributes(path), f"{celeba.LABELS}: expected")


# --- images -------------------------------------------------------------------------


def test_16_bits(tmp_path):
    """They are scaled, not cut off at 255."""
    values = np.arange(65536, dtype="uint16").reshape(256, 256)
    expected = np.rint(values / 257)
    for number in range(2):
        folder = tmp_path / "domain" / str(number)
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png(values))
    task = load_task(f"folder:{tmp_path / 'domain'}", None, 8)
    assert task.images.shape == (2, 256, 256, 1)
    np.testing.assert_array_equal(task.images[0, ..., 0], expected)
    domains, _ = load_images(tmp_path, 256)
    np.testing.assert_array_equal(domains["domain"].x[1, ..., 2], expected)
    # As older versions of Pillow have them.
    image = reading.in_8_bits(Image.fromarray(values.astype("int32")))
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes(mode, tmp_path):
    """All are grey or in colour, with 8 bits."""
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4), 1).save(path)
    assert reading.read_image(path).mode == ("L" if mode in "1L" else "RGB")
    for values in (np.zeros((2, 2), "float32"), np.array([[-1]], "int32")):
        with pytest.raises(DataError, match="8 or 16 bits"):
            reading.in_8_bits(Image.fromarray(values))


def test_huge_images(tmp_path, monkeypatch):
    """Each has a limit, and all together; those that differ in size are scaled at once."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(np.zeros((20, 20), "uint8")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    refused(
        lambda: load_task(f"folder:{tmp_path}", None, 8), "a/0.png", "decompression bomb"
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    monkeypatch.setattr("applications.image_tasks.MOST_IMAGES", 2000)
    refused(lambda: load_task(f"folder:{tmp_path}", None, 8), str(tmp_path), "2,000 bytes")
    (tmp_path / "b" / "0.png").write_bytes(png(np.zeros((20, 10), "uint8")))
    assert load_task(f"folder:{tmp_path}", None, 8).images.shape == (2, 8, 8, 1)


def test_bad_image_while_training(tmp_path, rng):
    """CelebA's are read in the course of it, by TensorFlow, which doesn't say which."""
    names, _ = write_celeba(tmp_path, rng, (2, 2, 2))
    parts = celeba.load_images(tmp_path, 16)
    broken = tmp_path / "img_align_celeba" / "000006.jpg"
    broken.write_bytes(broken.read_bytes()[:300])

    def train():
        with celeba._naming_images(parts):
            list(celeba.stream(parts["test"], names, 16, 2))

    refused(train, "000006.jpg: this image can't be read (", "JPEG")
    with pytest.raises(ZeroDivisionError), celeba._naming_images(parts):
        raise ZeroDivisionError


# --- size ---------------------------------------------------------------------------


def peak(load):
    """The most bytes that Python takes meanwhile."""
    tracemalloc.start()
    load()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_large_gzip(tmp_path):
    """What a header says is refused before it is unpacked; what it doesn't say stays."""
    path = tmp_path / "images.gz"
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 8_000_000, 28, 28)
    path.write_bytes(gzip.compress(header))
    most = f"more than {reading.MOST_BYTES:,} bytes when it is unpacked"
    refused(lambda: read_idx(path), f"images.gz: it has {most}")
    small = bytes([0, 0, 8, 1]) + struct.pack(">I", 5)
    path.write_bytes(gzip.compress(small + bytes(2**24), 1))
    assert peak(lambda: refused(lambda: read_idx(path), "Received: more")) < 2**20


def test_large_archives(tmp_path, monkeypatch):
    """The same of arrays in zip, HDF5 and MATLAB files, and of lists."""
    monkeypatch.setattr(reading.check_size, "__defaults__", (1000,))
    monkeypatch.setattr(reading.read_arrays, "__kwdefaults__", {"most": 1000})
    np.savez_compressed(tmp_path / "a.npz", features=np.ones((99, 9)), labels=[0] * 99)
    refused(lambda: load_features(tmp_path), "a.npz: it has more than 1,000 bytes")
    write_usps(tmp_path)
    refused(lambda: load_task("usps", tmp_path, 8), "usps.h5: it has more than 1,000")
    write_coil(tmp_path)
    refused(lambda: load_task("coil20", tmp_path, 8), "COIL20.mat: it has more than 1,000")
    text = tmp_path / "lines.txt"
    text.write_text("x" * 1001)
    refused(lambda: reading.read_text(text, 1000), "lines.txt: it has more than 1,000")
    assert reading.read_text(text, 1001) == "x" * 1001
    monkeypatch.setattr(celeba, "MOST_TEXT", 100)
    path = write_labels(tmp_path, random_labels(np.random.default_rng(0), 20))
    refused(lambda: celeba.load_attributes(path), f"{celeba.LABELS}: it has more than 100")
    archive = packed(path.parent, tmp_path.with_suffix(".zip"))
    refused(lambda: celeba.load_attributes(archive), archive.name, "more than 100 bytes")


# --- commands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (mnist.main, ["--data", "bad"]),
        (mtal.main, ["--tasks", "a=folder:bad/x.zip", "b=sample"]),
        (mtal.main, ["--tasks", "a=nothing", "b=sample"]),
        (mtfl.main, ["--data", "bad/x.zip"]),
        (mtfl.main, ["--data", "nowhere"]),
        (celeba.main, ["--similarity", "--data", "bad/x.zip"]),
        (celeba.main, ["--classification", "--data", "bad"]),
        (office_caltech.main, ["--features", "bad"]),
        (office_caltech.main, ["--data", "bad", "--trunk", "bad/x.keras"]),
        (office_caltech.main, ["--data", "bad", "--trunk", "resnet"]),
    ],
)
def test_commands(main, arguments, tmp_path, monkeypatch):
    """They end with one line, which is no traceback."""
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("x.zip", "x.npz", "x.keras", celeba.LABELS, *IDX_FILES.values()):
        (bad / name).write_bytes(b"bad\n")
    with pytest.raises(SystemExit) as found:
        main(arguments)
    text = found.value.code
    assert isinstance(text, str) and "\n" not in text
    assert any(word in text for word in ("bad", "nowhere", "nothing", "resnet"))


def test_one_line():
    """Other errors come through as they are; those of files lose their lines."""
    with pytest.raises(SystemExit, match=r"^a b$"), reading.one_line():
        raise DataError("a\n  b")
    with pytest.raises(SystemExit, match=r"^nowhere: No such file"), reading.one_line():
        pathlib.Path("nowhere").read_bytes()
    with pytest.raises(ValueError, match="ours"), reading.one_line():
        raise ValueError("ours")


def test_reading():
    """Every error has the name, once."""
    with pytest.raises(DataError, match=r"^f: line 2: wrong$"):
        with reading.reading("f"), reading.reading("line 2"):
            raise DataError("wrong")
    with pytest.raises(DataError, match=r"^f: wrong$"), reading.reading("f"):
        raise DataError("f: wrong")
    for error in (KeyError("x"), MemoryError(), json.JSONDecodeError("a\nb", "", 0)):
        with pytest.raises(DataError, match=r"^f: it can't be read \(.+\)\.$"):
            with reading.reading("f"):
                raise error
    assert doctest.testmod(reading).failed == 0


def test_cached_arrays(tmp_path):
    """They are made once; a file that is cut says what to do."""
    path, made = tmp_path / "deep" / "features.npz", []

    def make():
        made.append(1)
        return {"a/b": np.arange(3)}

    for _ in range(2):
        assert files.cached_arrays(path, make)["a/b"].tolist() == [0, 1, 2]
    assert len(made) == 1 and [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:50])
    refused(lambda: files.cached_arrays(path, make), "features.npz: ", "Delete it, then")
