"""Results that survive interruptions, tables, blocks of a page."""

import pandas as pd
import pytest
import scipy.stats

from applications.files import UnusableFileError
from applications.results import (
    Results,
    markdown_table,
    mean_and_spread,
    paired,
    write_block,
)


def test_results_come_back(tmp_path):
    """A run is found by its settings, in this process and in the next."""
    path = tmp_path / "deep" / "runs.jsonl"
    results = Results(path)
    assert results.get({"method": "stl"}) is None
    results.add({"method": "stl", "seed": 1}, {"error": 0.5, "ranks": (1, 2)})
    for found in (results, Results(path)):
        assert found.get({"seed": 1, "method": "stl"}) == {"error": 0.5, "ranks": [1, 2]}
        assert found.get({"method": "stl", "seed": 2}) is None


def test_interrupted_write(tmp_path):
    """A line cut off at the end is dropped; the file stays usable."""
    path = tmp_path / "runs.jsonl"
    Results(path).add({"n": 1}, {"error": 0.5})
    with path.open("a") as file:
        file.write('{"settings": {"n": 2}, "resul')
    results = Results(path)
    assert results.get({"n": 2}) is None
    results.add({"n": 2}, {"error": 0.25})
    again = Results(path)
    assert (again.get({"n": 1}), again.get({"n": 2})) == ({"error": 0.5}, {"error": 0.25})


def test_lost_newline(tmp_path):
    """A last line that lacks only its newline is a run; the next begins a new line."""
    path = tmp_path / "runs.jsonl"
    Results(path).add({"n": 1}, {"error": 0.5})
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    results = Results(path)
    results.add({"n": 2}, {"error": 0.25})
    again = Results(path)
    assert (again.get({"n": 1}), again.get({"n": 2})) == ({"error": 0.5}, {"error": 0.25})
    assert path.read_bytes().count(b"\n") == 2


def test_full_disk(tmp_path, monkeypatch):
    """What was there stays, and the run can be added again."""
    path = tmp_path / "runs.jsonl"
    results = Results(path)
    results.add({"n": 1}, {"error": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            results.add({"n": 2}, {"error": 0.25})
    assert results.get({"n": 2}) is None and Results(path).get({"n": 1})
    results.add({"n": 2}, {"error": 0.25})
    assert Results(path).get({"n": 2}) == {"error": 0.25}


@pytest.mark.parametrize(
    "line",
    [
        b"method,error\n",
        b"method,error",
        b'{"settings": {"n": 1}}\n',
        b'{"settings": {"n": 1}}',
        b'{"settings": {"n": 1}, "results": null}\n',
        b'{"settings": [1], "results": {}}\n',
        b"[]\n",
        b"\xff\xfe\n",
        b"\n",
        b'{"settings": {"n": 1}, "resul\n',
    ],
)
def test_foreign_file(tmp_path, line):
    """Something else in the file is an error with the line, and is not overwritten."""
    path = tmp_path / "runs.jsonl"
    whole = b'{"settings": {"n": 0}, "results": {}}\n' + line
    path.write_bytes(whole)
    with pytest.raises(UnusableFileError, match=r"runs\.jsonl, line 2: .*Delete the line"):
        Results(path)
    assert path.read_bytes() == whole


def test_tables():
    """Mean and sample standard deviation; Markdown."""
    assert mean_and_spread([1, 2, 3]) == "2.00 ± 1.00"
    assert mean_and_spread([0.123], digits=1) == "0.1"
    frame = pd.DataFrame({"Method": ["stl", "tt"], "Error": ["1.0", "2.0"]})
    expected = "| Method | Error |\n| --- | --- |\n| stl | 1.0 |\n| tt | 2.0 |\n"
    assert markdown_table(frame) == expected


def test_block_of_a_page(tmp_path):
    """Only what is between the marks changes; marks must be there."""
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    write_block(path, "a", "new\n")
    write_block(path, "a", "newer\n")
    expected = "before\n<!-- a:begin -->\nnewer\n<!-- a:end -->\nafter\n"
    assert path.read_text() == expected
    with pytest.raises(ValueError, match="b:begin"):
        write_block(path, "b", "new")


def test_paired_differences(rng):
    """The interval against SciPy's; splits that only one of them has are left out."""
    own = pd.DataFrame({"seed": range(5), "error": rng.uniform(size=5)})
    other = pd.DataFrame({"seed": range(1, 6), "error": rng.uniform(size=5)})
    difference = 100 * (own.error[1:].to_numpy() - other.error[:4].to_numpy())
    low, high = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    expected = f"{difference.mean():+.1f} ± {(high - low) / 2:.1f}"
    assert paired(own, other) == expected
    assert paired(own[4:], other) == f"{difference[3]:+.1f}"
    assert paired(own[:1], other) == ""
