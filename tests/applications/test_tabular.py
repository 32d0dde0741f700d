"""Tables of many tasks: what is read, what is refused and where, and how it is encoded."""

import numpy as np
import pandas as pd
import pytest
import scipy.io

from applications.reading import DataError
from applications.tabular import fold_numbers, make_encoder, read_tabular, split_rows

TABLE = """clinic,age,sex,ward,days
north,30,f,1,3.5

north,?,m,2,4
south, 41 ,F,1,2
south,52,,NA,1e1
"""


def written(folder, text, name="patients.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_table_of_mixed_types(tmp_path):
    """Numbers, categories, missing values, empty lines, blanks, another separator."""
    for text, separator in ((TABLE, ","), (TABLE.replace(",", ";"), ";")):
        path = written(tmp_path, text)
        data = read_tabular(path, "clinic", "days", ["ward"], separator)
        assert list(data.tasks) == ["north", "north", "south", "south"]
        assert data.target.tolist() == [3.5, 4.0, 2.0, 10.0]
        assert data.features.age.tolist()[::2] == [30.0, 41.0]
        assert np.isnan(data.features.age.iloc[1])
        assert data.features.ward.dtype == data.features.sex.dtype == object
        assert data.features.sex.tolist()[:3] == ["f", "m", "F"]
        assert {name: rows.tolist() for name, rows in data.rows().items()} == {
            "north": [0, 1],
            "south": [2, 3],
        }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("52", "5x2", "patients.csv, row 6, column 'age': expected finite numbers"),
        ("52", "inf", "row 6, column 'age': expected finite numbers"),
        (
            "1e1",
            "",
            "row 6, column 'days': expected a number in every row",
        ),
        ("1e1", "ten", "row 6, column 'days': expected finite numbers"),
        ("north,30", ",30", "row 2, column 'clinic': expected a task in every row"),
        ("north,30,f", "north,f", "row 2: expected 5 values, as many as the first row has"),
        ("age", "sex", "row 1: expected a name of its own for each column"),
        ("age", " ", "row 1: expected a name of its own for each column"),
        (
            "days",
            "nights",
            "there is no column 'days'. The columns, separated by ',', are",
        ),
        ("south,52,", 'south,"52,', "it can't be read .unexpected end of data"),
        (TABLE[25:], "", "expected a row of names and at least one of values"),
    ],
)
def test_malformed_tables(old, new, message, tmp_path):
    """An error of one line that names the file, and the row and the column as they are."""
    path = written(tmp_path, TABLE.replace(old, new))
    with pytest.raises(DataError, match=f"(?s).*{message}") as found:
        read_tabular(path, "clinic", "days")
    assert str(found.value).startswith(str(path)) and len(str(found.value)) < 400


def test_no_columns(tmp_path):
    """Task and target must be named, and something must be left."""
    path = written(tmp_path, "a,b\nx,1\n")
    with pytest.raises(DataError, match="a CSV file needs --task COLUMN and --target"):
        read_tabular(path)
    with pytest.raises(DataError, match="expected a column besides 'a' and 'b'"):
        read_tabular(path, "a", "b")
    with pytest.raises(DataError, match="expected different columns"):
        read_tabular(path, "b", "b")


def cells(*arrays):
    made = np.empty(len(arrays), dtype=object)
    made[:] = arrays
    return made


def test_mat_files(tmp_path):
    """Cells as those of School; what else is refused with the file and the task."""
    path = tmp_path / "tasks.mat"
    x, y = (np.arange(6.0).reshape(3, 2), np.ones((2, 2))), ([[1], [2], [3]], [[4], [5]])
    scipy.io.savemat(path, {"X": cells(*x), "Y": cells(*map(np.array, y))})
    data = read_tabular(path)
    assert data.names == ["task_1", "task_2"] and data.target.tolist() == [1, 2, 3, 4, 5]
    assert data.features.shape == (5, 2)
    wrong = {
        "it can't be read": {"X": cells(*x)},
        "expected cells X and Y": {"X": np.ones((2, 2)), "Y": np.ones(2)},
        "expected as many tasks in X as in Y": {"X": cells(*x), "Y": cells(np.ones(3))},
        r"task 2: expected X of shape \(n, 2\)": {
            "X": cells(x[0], np.ones((2, 3))),
            "Y": cells(np.ones(3), np.ones(2)),
        },
        "task 1: expected X of shape": {"X": cells(*x), "Y": cells(np.ones(2), np.ones(2))},
        "task 2: expected finite values": {
            "X": cells(*x),
            "Y": cells(np.ones(3), np.array([1, np.nan])),
        },
        "task 2: expected arrays of numbers": {
            "X": cells(x[0], np.array([["a"]])),
            "Y": cells(np.ones(3), np.ones(1)),
        },
    }
    for message, content in wrong.items():
        scipy.io.savemat(path, content)
        with pytest.raises(DataError, match=message) as found:
            read_tabular(path)
        assert str(path) in str(found.value)
    path.write_bytes(b"no mat file")
    with pytest.raises(DataError, match="it can't be read"):
        read_tabular(path)


def test_encoder():
    """Medians, categories and scales are those of the rows that it is fitted on."""
    train = pd.DataFrame({"a": [1.0, 3.0, np.nan, 8.0], "b": ["x", "y", "x", np.nan]})
    test = pd.DataFrame({"a": [np.nan, 100.0], "b": ["new", "x"]})
    encoder = make_encoder(train).fit(train)
    found = encoder.transform(train)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found.std(axis=0), 1)
    # The number, whether it was missing, and three categories.
    assert found.shape == (4, 5)
    values = np.array([1.0, 3.0, 3.0, 8.0])
    np.testing.assert_allclose(found[:, 0], (values - values.mean()) / values.std())
    other = encoder.transform(test)
    np.testing.assert_allclose(other[0, :2], found[2, :2])
    assert np.all(other[0, 2:] < 0)  # a new category is none of those known
    empty = pd.DataFrame({"a": [np.nan, np.nan], "b": ["x", "y"]})
    assert np.all(np.isfinite(make_encoder(empty).fit_transform(empty)))


def test_splits_and_folds():
    """Every task is trained on something; five rows, two, and one."""
    rows = {"a": np.arange(5), "b": np.array([5, 6]), "c": np.array([7])}
    train, test = split_rows(rows, 0.75, seed=0)
    assert [len(own) for own in train.values()] == [4, 1, 1]
    assert [len(own) for own in test.values()] == [1, 1, 0]
    for name, own in rows.items():
        assert sorted([*train[name], *test[name]]) == own.tolist()
    small, _ = split_rows(rows, 0.01, seed=0)
    assert [len(own) for own in small.values()] == [1, 1, 1]
    again, _ = split_rows(rows, 0.75, seed=0)
    assert all(np.array_equal(train[name], again[name]) for name in rows)
    numbers = fold_numbers(train, 3, seed=0)
    assert sorted(numbers["a"]) == [0, 0, 1, 2] and numbers["c"].tolist() == [-1]
