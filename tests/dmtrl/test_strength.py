"""Sharing strength (DMTRL Eq. 9): its ends, its properties, a loop written out."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import (
    chance_of_sharing,
    factorize,
    layers,
    plot_sharing_strength,
    sharing_strength,
    sharing_strength_of,
)
from dmtrl_keras.dmtrl import chance as by_chance


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


def by_hand(kernel, method, ranks):
    """S as the SVDs leave it, `(K, T)`, in plain steps: what the authors' code takes."""
    tasks = kernel.shape[-1]
    if method == "tucker":
        u, _, _ = np.linalg.svd(np.moveaxis(kernel, -1, 0).reshape(tasks, -1))
        return u[:, : ranks[-1]].T
    rest, left = kernel.reshape(-1, tasks), 1
    for size, rank in zip(kernel.shape[:-1], ranks if method == "tt" else ()):
        _, s, vt = np.linalg.svd(rest.reshape(left * size, -1), full_matrices=False)
        rest, left = np.diag(s[:rank]) @ vt[:rank], rank
    if method == "tt":
        return rest
    _, s, vt = np.linalg.svd(rest, full_matrices=False)
    return np.diag(s[: ranks[0]]) @ vt[: ranks[0]]


def of_layer(matrix):
    """The same with the rows of a layer, of norm `sqrt(T)`."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / norms * math.sqrt(matrix.shape[1])


def network(kernel, method, **choice):
    """One layer, dense or convolutional, with the factors of given kernels."""
    *window, inputs, outputs, tasks = kernel.shape
    given = {"tasks": tasks, "shared_input": True, "name": "one"}
    inputs = keras.Input((*window, inputs))
    layer = layers.TaskDense(outputs, **given)
    if window:
        layer = layers.TaskConv2D(outputs, window, **given)
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign(kernel)
    return factorize(model, method, verbose=False, keep_larger=True, **choice)


# Truncated nowhere, in the tasks, in the channels, and in several axes of a window.
CASES = [
    ((6, 5, 3), {"laf": (3,), "tucker": (6, 5, 3), "tt": (6, 3)}),
    ((2, 1, 4), {"laf": (2,), "tucker": (2, 1, 2), "tt": (2, 2)}),
    ((6, 5, 4), {"laf": (2,), "tucker": (3, 3, 2), "tt": (3, 2)}),
    ((3, 2, 3, 4, 3), {"laf": (3,), "tucker": (2, 2, 2, 2, 3), "tt": (2, 4, 5, 3)}),
    ((3, 2, 3, 4, 3), {"laf": (2,), "tucker": (3, 2, 3, 4, 2), "tt": (3, 6, 4, 2)}),
]


@pytest.mark.parametrize(("shape", "ranks"), CASES)
@pytest.mark.parametrize("method", ["laf", "tucker", "tt"])
def test_scalings(shape, ranks, method, rng):
    """Equal to plain SVDs of the kernels; tasks have no order, in chance either."""
    kernel, rank = rng.normal(size=shape), ranks[method]
    model = network(kernel, method, rank=rank)
    matrix = by_hand(kernel, method, rank)
    expected = {"svd": written_out(matrix), "layer": written_out(of_layer(matrix))}
    turned = network(kernel[..., ::-1], method, rank=rank)
    for scaling, strength in expected.items():
        (found,) = sharing_strength(model, scaling=scaling).values()
        assert found == pytest.approx(strength, abs=1e-4)
        (found,) = sharing_strength(turned, scaling=scaling).values()
        assert found == pytest.approx(strength, abs=1e-4)
        chance = chance_of_sharing(model, scaling, draws=5)
        assert chance == pytest.approx(chance_of_sharing(turned, scaling, draws=5), 1e-5)


@pytest.mark.parametrize(("shape", "ranks"), CASES)
@pytest.mark.parametrize("method", ["laf", "tucker", "tt"])
def test_chance_is_that_of_decomposed_kernels(shape, ranks, method, rng):
    """Mean and quantile over kernels that really are decomposed, in both scalings."""
    rank, draws = ranks[method], 400
    # In the scaling of the SVDs it depends on the kernels' norm.
    model = network(0.3 * rng.normal(size=shape), method, rank=rank)
    norm = np.linalg.norm(ops.convert_to_numpy(model.get_layer("one").kernel))
    found = {"layer": [], "svd": []}
    for _ in range(draws):
        matrix = by_hand(rng.normal(size=shape), method, rank)
        found["layer"].append(written_out(of_layer(matrix)))
        if method != "tucker":
            matrix = matrix * norm / np.linalg.norm(matrix)
        found["svd"].append(written_out(matrix))
    for scaling, values in found.items():
        (mean,) = chance_of_sharing(model, scaling, draws=draws, seed=1).values()
        error = np.std(values) * math.sqrt(2 / draws)
        assert abs(mean - np.mean(values)) <= 4 * error + 1e-6
        given = {"quantile": 0.9, "draws": draws, "seed": 1}
        (above,) = chance_of_sharing(model, scaling, **given).values()
        assert abs(np.mean(np.array(values) > above) - 0.1) < 0.08


@pytest.mark.parametrize(("shape", "ranks"), CASES)
@pytest.mark.parametrize("method", ["laf", "tt"])
def test_norms_of_rows(shape, ranks, method, rng):
    """They are drawn without kernels, once where layers are large: the mean is the same."""
    rank = ranks[method]
    expected = [
        np.linalg.norm(by_hand(rng.normal(size=shape), method, rank), axis=1)
        for _ in range(300)
    ]
    found = [by_chance._row_norms(shape, rank, rng) for _ in range(300)]
    error = np.std(expected, axis=0) * math.sqrt(2 / 300)
    assert np.all(np.abs(np.mean(found, 0) - np.mean(expected, 0)) <= 4.5 * error)
    np.testing.assert_allclose(np.std(found, 0), np.std(expected, 0), rtol=0.3)


@pytest.mark.parametrize("method", ["laf", "tucker", "tt"])
def test_equal_kernels(method, rng):
    """They have strength 1. That says nothing at task rank 1, where chance has it too."""
    kernel = np.repeat(rng.normal(size=(9, 8, 1)), 4, axis=-1)
    with pytest.warns(UserWarning, match="task rank is 1"):
        model = network(kernel, method, tolerance=0.1)
    for scaling in ("layer", "svd"):
        assert sharing_strength(model, scaling) == pytest.approx({"one": 1})
        assert chance_of_sharing(model, scaling) == pytest.approx({"one": 1})


@pytest.mark.parametrize("method", ["laf", "tt"])
def test_alike_kernels_are_above_chance(method, rng):
    """At full task rank, where the scale of the rows says how alike the kernels are."""
    kernel = rng.normal(size=(9, 8, 1)) + 0.2 * rng.normal(size=(9, 8, 4))
    model = network(kernel, method, rank=1.0)
    (strength,) = sharing_strength(model, "svd").values()
    (above,) = chance_of_sharing(model, "svd", quantile=0.95).values()
    assert strength > above and strength > 0.95


def test_assigned_sharing():
    """Chance is the strength itself; layers that are alike have the same draws."""
    inputs = keras.Input((6,))
    x = layers.TaskDense(5, 3, sharing="hard", name="hard")(inputs)
    x = layers.TaskDense(5, 3, name="independent")(x)
    for name in ("one", "two"):
        x = layers.TuckerDense(5, 3, rank=3, name=name)(x)
    x = layers.TaskDense(5, 3, sharing="similar", name="similar")(x)
    model = keras.Model(inputs, x)
    chance = chance_of_sharing(model, draws=20)
    assert list(chance) == list(sharing_strength(model))
    assert (chance["hard"], chance["independent"]) == (1, 0)
    assert chance["one"] == chance["two"] == chance_of_sharing(model, draws=20)["one"]
    assert chance["one"] != chance_of_sharing(model, draws=20, seed=1)["one"]
    # Slices of one entry have a cosine of 1 or -1: whole filters are compared.
    assert 0 <= chance["similar"] < 0.5
    assert chance_of_sharing(model, "svd", draws=20)["similar"] == chance["similar"]


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
    chance = chance_of_sharing(model)
    figure = plot_sharing_strength(
        {"ours": strengths, "other": strengths}, chance={"ours": chance}
    )
    full, dashed, _ = figure.axes[0].lines
    assert dashed.get_linestyle() == "--" and dashed.get_color() == full.get_color()
    np.testing.assert_allclose(dashed.get_ydata(), list(chance.values()))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["ours", "ours, by chance", "other"]
    assert len(plot_sharing_strength(strengths, chance=chance).axes[0].lines) == 2
    with pytest.raises(ValueError, match=r"`chance`.*labels.*\['ours'\]"):
        plot_sharing_strength({"ours": strengths}, chance=chance)


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
