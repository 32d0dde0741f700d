"""Faces in UTKFace's and Adience's forms."""

import doctest
import zipfile

import numpy as np
import pytest
from PIL import Image

from applications import mtfl, portraits
from applications.portraits import load_portraits
from applications.reading import DataError


def picture(path, value):
    """A grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10, 3), value, "uint8")).save(path)


def write_utkface(folder, count=20):
    """Names as UTKFace has them, one of which lacks the race, as some do there."""
    for number in range(count):
        name = f"{4 * number}_{number % 2}_{number % 5}_2017011617{number:04}.png"
        picture(folder / f"part{number % 2}" / name, 10 * number)
    picture(folder / "part1" / "39_1_20170116174525125.png", 0)
    (folder / "notes.txt").write_text("none")
    return folder


HEADER = "user_id\toriginal_image\tface_id\tage\tgender\tx\ty"


def write_adience(folder, count=5):
    """Five folds, each with a face whose age, and one whose gender is not known.

    Of a fifth face nothing is.
    """
    for fold in range(5):
        lines = [HEADER]
        for number in range(count):
            user, image = f"{fold}@N0", f"{number}.png"
            age = ["(25, 32)", "(0, 2)", "35", "None", ""][number % 5]
            gender = "mfufu"[number % 5]
            lines.append(f"{user}\t{image}\t{number}\t{age}\t{gender}\t0\t0")
            kind = ("faces", "coarse_tilt") if fold < 4 else ("aligned", "landmark")
            name = f"{kind[1]}_aligned_face.{number}.{image}"
            picture(folder / kind[0] / user / name, 40 * fold + 10 * number)
        (folder / f"fold_{fold}_data.txt").write_text("\n".join(lines) + "\n")
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for own in sorted(folder.rglob("*")):
            file.write(own, own.relative_to(folder.parent))
    return path


def test_examples():
    assert doctest.testmod(portraits).failed == 0


def test_utkface(tmp_path):
    """Labels from the names, of a folder and a zip file; what has none is counted."""
    folder = write_utkface(tmp_path / "faces")
    for source in (folder, zipped(folder, tmp_path / "faces.zip")):
        assert portraits.is_portraits(source)
        found = load_portraits(source, 6)
        assert found.images.shape == (20, 6, 6, 3) and found.left_out == 1
        number = found.images[:, 0, 0, 0].astype(int) // 10
        assert sorted(number) == list(range(20)) and found.fold is None
        assert found.gender.tolist() == (number % 2).tolist()
        assert found.race.tolist() == (number % 5).tolist()
        expected = [portraits.age_group(4 * n) for n in number]
        assert found.age.tolist() == expected
        assert found.years.tolist() == (4 * number).tolist()


def test_adience(tmp_path):
    """Labels from the lists; what is not known is marked."""
    folder = write_adience(tmp_path / "adience")
    for source in (folder, zipped(folder, tmp_path / "adience.zip")):
        found = load_portraits(source, 6)
        # Of five faces the third has no gender, the fourth no age, the fifth neither.
        assert len(found.images) == 20 and found.left_out == 5 and found.race is None
        assert found.age.tolist() == [4, 0, 4, -1] * 5
        assert found.gender.tolist() == [0, 1, -1, 1] * 5
        np.testing.assert_array_equal(found.years, [28.5, 1, 35, np.nan] * 5)
        assert found.fold.tolist() == np.repeat(range(5), 4).tolist()
        assert found.images[5, 0, 0, 0] == 50


def test_malformed(tmp_path):
    """The file and the row are named."""
    folder = write_adience(tmp_path / "a")
    (folder / "faces" / "1@N0" / "coarse_tilt_aligned_face.1.1.png").unlink()
    with pytest.raises(DataError, match=r"fold_1_data\.txt, row 3.*face\.1\.1\.png"):
        load_portraits(folder, 6)
    (folder / "fold_0_data.txt").write_text("user_id,age\n1,2\n")
    with pytest.raises(DataError, match=r"fold_0_data\.txt, row 1.*tabs.*user_id,age"):
        load_portraits(folder, 6)
    other = write_utkface(tmp_path / "b")
    (other / "part0" / "0_0_0_20170116170000.png").write_bytes(b"none")
    with pytest.raises(DataError, match="0_0_0_20170116170000"):
        load_portraits(other, 6)
    with pytest.raises(FileNotFoundError, match="There is no"):
        load_portraits(tmp_path / "c", 6)
    empty = tmp_path / "d"
    empty.mkdir()
    with pytest.raises(DataError, match="Found none"):
        load_portraits(empty, 6)


@pytest.mark.usefixtures("few_steps")
def test_relations_of_age_and_gender(tmp_path):
    """The experiment on them: a fifth to test on, or the last fold."""
    utkface = write_utkface(tmp_path / "utkface")
    arguments = ["--data", str(utkface), "--output", str(tmp_path / "results")]
    arguments += ["--network", "mlp", "--size", "8", "--epochs", "1", "--batch-size", "8"]
    arguments += ["--components", "3", "--units", "4", "--repeats", "1"]
    arguments += ["--methods", "stl", "trn"]
    given = [*arguments, "--tasks", "age", "gender", "race"]
    training, testing, _ = mtfl.EXPERIMENT.load(mtfl.parse(given))
    assert (len(training.images), len(testing.images)) == (16, 4)
    table = mtfl.main(given)["mtfl"]
    assert "Race, accuracy %" in table and list(table["Runs"]) == [1, 1]
    with pytest.raises(SystemExit, match=r"has \['gender', 'age', 'race'\].*'landmarks'"):
        mtfl.main(arguments)
    adience = write_adience(tmp_path / "adience", 8)
    given = [*given[2:-1], "--data", str(adience)]
    training, testing, _ = mtfl.EXPERIMENT.load(mtfl.parse(given))
    assert (len(training.images), len(testing.images)) == (16, 4)
