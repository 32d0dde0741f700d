"""All methods on all data: the tables, and the command on small files."""

import numpy as np
import pytest
import scipy.io

from applications import overview
from dmtrl_keras.compare import Problem, compare


def regressions(seed, tasks=3):
    """Copies of one regression."""
    rng = np.random.default_rng(seed)
    slope = rng.normal(size=4)
    x = {f"task_{k + 1}": rng.normal(size=(16, 4)) for k in range(tasks)}
    return x, {t: rows @ slope + rng.normal(size=16) for t, rows in x.items()}


@pytest.fixture(scope="module")
def found():
    """Two comparisons, of which one lacks a method."""
    own = {"repeats": 2, "trials": 1, "test": 0.5}
    return {
        "school": compare(*regressions(0), methods=["ridge", "pooled", "related"], **own),
        "faces": compare(Problem(*regressions(1)), methods=["ridge", "related"], **own),
    }


def test_tables(found):
    """The numbers are those of the comparisons; a method that was left out has none."""
    frame = overview.table_of_gains(found)
    assert list(frame["Method"]) == ["linear, by task", "linear, all shared", "linear, DRN"]
    assert frame["faces"][1] == ""
    row = found["school"].table.loc["related"]
    expected = f"{row.delta:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
    assert expected in frame["School"][2]
    assert frame["School"][0].strip("*").startswith("baseline, ")
    for name, column in (("school", "School"), ("faces", "faces")):
        best = found[name].recommendation.method
        (bold,) = [m for m, cell in zip(frame["Method"], frame[column]) if "**" in cell]
        assert bold == found[name].table.loc[best].title
    answers = overview.table_of_answers(found)
    assert list(answers["Tasks"]) == ["3", "3"]
    assert list(answers["Answer"]) == [one.sentence for one in found.values()]


def test_a_problem_has_its_labels():
    with pytest.raises(ValueError, match=r"nothing of a problem.*\['y', 'kinds'\]"):
        compare(Problem(*regressions(0)), {"a": [1]}, kinds={})


def test_command(tmp_path, monkeypatch):
    """On a small School; a page is written, a second call trains nothing."""
    x, y = regressions(2, 4)
    cells = [np.empty(4, object) for _ in range(2)]
    for k, task in enumerate(x):
        cells[0][k], cells[1][k] = x[task], y[task][:, None]
    scipy.io.savemat(tmp_path / "school.mat", {"X": cells[0], "Y": cells[1]})
    page = tmp_path / "page.md"
    marks = [f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in overview.BLOCKS]
    page.write_text("".join(marks))
    arguments = ["--data", str(tmp_path), "--names", "school", "--methods", "ridge"]
    arguments += ["pooled", "--repeats", "2", "--trials", "2", "--page", str(page)]
    arguments += ["--output", str(tmp_path / "results")]
    tables = overview.main(arguments)
    assert list(tables["overview"]) == ["Method", "School"]
    assert "| linear, all shared |" in page.read_text()
    lines = (tmp_path / "results" / "school" / "runs.jsonl").read_text()
    again = overview.main(arguments)
    assert again["overview"].equals(tables["overview"])
    assert (tmp_path / "results" / "school" / "runs.jsonl").read_text() == lines
    with pytest.raises(SystemExit, match="images_background"):
        overview.main([*arguments, "--names", "omniglot", "--output", str(tmp_path / "r")])
