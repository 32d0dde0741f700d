"""The experiment on a tenth digit, on few of the digits that a package brings."""

import numpy as np
import pytest

from applications import new_task
from applications.digits import load_digits


def test_part():
    """No image of the new digit is among those of the nine; the few are half of it."""
    digits = load_digits("sample")
    part = new_task.Part(digits, 7, 200, 21, 100, seed=3)
    assert part.images.shape == (200, 28, 28, 1) and 7 not in part.labels
    assert part.is_new.tolist() == [1] * 10 + [0] * 11
    assert len(part.test_images) == len(part.test_labels) == 100
    flat = {image.tobytes() for image in part.images}
    assert not flat.intersection(image.tobytes() for image in part.few)


def test_balanced_error():
    """The mean of both rates; an answer of "no" to everything has one half."""
    is_new = np.array([True, False, False, False])
    assert new_task.balanced_error(is_new, np.zeros((4, 1))) == 0.5
    found = new_task.balanced_error(is_new, np.array([[0.9], [0.6], [0.1], [0.2]]))
    assert found == pytest.approx(1 / 6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*of independent kernels")
@pytest.mark.usefixtures("few_steps")
def test_command(tmp_path):
    """Rate and steps are those of the other digits; the old outputs are equal."""
    page = tmp_path / "page.md"
    page.write_text("<!-- new-task:begin -->\n<!-- new-task:end -->\n")
    arguments = "--images 64 --width 2 --epochs 1 --repeats 1 --steps 1 2 --rates 0.01 "
    arguments += "--test-images 50 --choose-on 4 --methods alone hard tucker"
    output = ["--output", str(tmp_path / "out"), "--page", str(page)]
    table = new_task.main([*arguments.split(), *output])["new-task"]
    assert list(table["Digits"]) == [1, 1, 1]
    assert list(table["Old outputs"]) == ["-", "equal", "equal"]
    trained = [int(text.replace(",", "")) for text in table["Trained"]]
    assert trained[1] == 9 and trained[1] < trained[2] < trained[0]
    assert set(table["Rate, steps"]) <= {"0.01, 1", "0.01, 2"}
    assert "alone" in page.read_text()
    with pytest.raises(SystemExit):
        new_task.parse(["--repeats", "9"])
