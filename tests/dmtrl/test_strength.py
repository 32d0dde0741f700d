"""Sharing strength (DMTRL Eq. 9): its ends, its properties, a loop written out."""

import itertools
import math

import keras
import numpy as np
import pytest

from dmtrl_keras import (
    layers,
    plot_sharing_strength,
    sharing_strength,
    sharing_strength_of,
)


def written_out(matrix):
    """Absolute value, softmax of each column, mean cosine of the pairs."""
    columns = []
    for t in range(matrix.shape[1]):
        values = [math.exp(abs(v)) for v in matrix[:, t]]
        columns.append([v / sum(values) for v in values])
    cosines = []
    for a, b in itertools.combinations(columns, 2):
        dot = sum(x * y for x, y in zip(a, b))
        cosines.append(dot / math.hypot(*a) / math.hypot(*b))
    return sum(cosines) / len(cosines)


def test_formula(rng):
    """Equal to the loops, for more and for fewer latent tasks than tasks."""
    for shape in [(2, 5), (5, 5), (7, 3), (1, 4)]:
        matrix = 3 * rng.normal(size=shape)
        np.testing.assert_allclose(sharing_strength_of(matrix), written_out(matrix))


def test_ends():
    """The identity shares nothing, one row of ones everything, equal columns too."""
    assert sharing_strength_of(np.eye(6)) == 0
    assert sharing_strength_of(np.eye(6)[[3, 1, 0, 2, 5, 4]]) == 0
    assert sharing_strength_of(np.vstack([np.ones(4), np.zeros((3, 4))])) == 1
    column = np.array([[2.0], [-1.0], [0.3]])
    assert sharing_strength_of(np.repeat(column, 5, axis=1)) == pytest.approx(1)


def test_one_task():
    """There is no pair to compare; a network of several tasks may have a layer of one."""
    with pytest.raises(ValueError, match=r"sharing_strength_of: .* two tasks.*\(2, 1\)"):
        sharing_strength_of(np.ones((2, 1)))
    inputs = keras.Input((6,))
    one = layers.TaskDense(4, 1, shared_input=True, name="one")(inputs)
    with pytest.raises(ValueError, match=r"sharing_strength: .* two tasks or more"):
        sharing_strength(keras.Model(inputs, one))
    two = layers.TaskDense(4, 2, shared_input=True, name="two")(one)
    assert sharing_strength(keras.Model(inputs, two)) == {"two": 0.0}


def test_permutations_and_signs(rng):
    """Order of tasks, order of latent tasks, and signs don't matter."""
    matrix = rng.normal(size=(4, 5))
    strength = sharing_strength_of(matrix)
    assert sharing_strength_of(matrix[:, ::-1]) == pytest.approx(strength)
    assert sharing_strength_of(matrix[::-1]) == pytest.approx(strength)
    assert sharing_strength_of(-matrix) == pytest.approx(strength)
    assert 0 <= strength <= 1


def test_large_values_stay_finite():
    """The softmax of large coefficients does not overflow."""
    assert sharing_strength_of(np.array([[1e4, 0], [0, 1e4]])) == pytest.approx(0)


def test_model(tmp_path):
    """Each layer by name and in order; the plot has one line for each network."""
    inputs = keras.Input((6,))
    x = layers.TaskDense(5, 3, sharing="hard", name="first")(inputs)
    x = layers.TuckerDense(4, 3, rank=1.0, common_draw=False, name="second")(x)
    model = keras.Model(inputs, layers.TaskDense(1, 3, name="third")(x))
    strengths = sharing_strength(model)
    assert list(strengths) == ["first", "second", "third"]
    assert strengths["first"] == 1
    assert 0 < strengths["second"] < 1
    assert strengths["third"] == 0
    figure = plot_sharing_strength(
        {"ours": strengths, "other": strengths}, tmp_path / "s.png"
    )
    assert len(figure.axes[0].lines) == 2
    np.testing.assert_allclose(
        figure.axes[0].lines[0].get_ydata(), list(strengths.values())
    )
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("matrix", [np.ones(3), np.ones((0, 3)), np.array([[np.nan, 1]])])
def test_errors(matrix):
    """Only a finite matrix has a strength."""
    with pytest.raises(ValueError, match=r"sharing_strength_of: .*shape"):
        sharing_strength_of(matrix)


def test_model_without_tasks():
    """A model without T kernels is an error, not an empty answer."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="plain")
    with pytest.raises(ValueError, match="'plain'"):
        sharing_strength(model)
