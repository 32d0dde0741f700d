"""The experiment on ranks, on generated faces of the right form."""

import numpy as np
import pytest
from keras import ops
from test_mtfl import write

from applications import ranks
from dmtrl_keras import task_layers

SMALL = ["--data", "none", "--size", "8", "--width", "4"]


@pytest.fixture(scope="module")
def options():
    return ranks.parse(SMALL)


def ranks_of(options, method):
    """By layer, the ranks, the share of the weights, and the rank of the tasks' kernels."""
    model, found = ranks.network(options, method)
    kernels = {one.name: ops.convert_to_numpy(one.kernel) for one in task_layers(model)}
    differ = {
        name: np.linalg.matrix_rank(kernel.reshape(-1, kernel.shape[-1]), tol=1e-4)
        for name, kernel in kernels.items()
    }
    return found, differ


def test_methods(options):
    """What each is called is what it is."""
    old, _ = ranks_of(options, "tucker-0.1")
    assert old["conv2"][0] == [2, 2, 2, 4, 2]
    half, _ = ranks_of(options, "tucker-half")
    assert half["conv2"][0][:2] == [3, 3] and half["conv2"][0][-1] == 4
    assert all(share <= 0.5 for _, share in half.values())
    proportional, _ = ranks_of(options, "tt-proportional")
    assert {rank[-1] for rank, _ in proportional.values()} == {1}
    latent, _ = ranks_of(options, "laf-proportional")
    assert {tuple(rank) for rank, _ in latent.values()} == {(1,)}
    # One start for all tasks, or one for each.
    _, equal = ranks_of(options, "stl")
    _, apart = ranks_of(options, "stl-apart")
    assert set(equal.values()) == {1} and set(apart.values()) == {4}
    fresh, _ = ranks_of(options, "tucker-apart")
    within, _ = ranks_of(options, "tucker-tolerance")
    assert fresh["fc"][1] > within["fc"][1]
    assert ranks.network(options, "hard")[1] == {}


@pytest.mark.usefixtures("few_steps")
def test_command(tmp_path, rng):
    """Tables by method and by layer, from faces that are not trained on."""
    write(tmp_path, rng)
    page = tmp_path / "page.md"
    blocks = ("ranks", "ranks-by-layer")
    page.write_text("".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in blocks))
    arguments = ["--data", str(tmp_path), *SMALL[2:], "--epochs", "1", "--repeats", "2"]
    arguments += ["--training-images", "8", "--testing-images", "6", "--cuts", "2"]
    arguments += ["--methods", "stl", "tucker-half", "--output", str(tmp_path / "results")]
    tables = ranks.main([*arguments, "--page", str(page)])
    frame = tables["ranks"]
    assert list(frame["Method"]) == ["STL", "Tucker, half of the weights"]
    assert frame["Weights"][0] == "1.00" and float(frame["Weights"][1]) < 0.8
    assert list(frame["Runs"]) == [2, 2]
    assert list(tables["ranks-by-layer"]["Method"]) == ["Tucker, half of the weights"]
    assert page.read_text().count("Tucker, half of the weights") == 2
    options = ranks.parse(arguments)
    data = ranks.Ranks().load(options, None)
    training, testing = ranks.Ranks().draw(options, data, 0)
    assert len(training.images) == 16 == len(training.smile)
    assert len(testing.images) == 6 == len(testing.gender)
    # As the lists have them.
    assert set(training.gender) == {0} and set(training.smile) == {1}
    with pytest.raises(ValueError, match="at most 40 together, got 46"):
        ranks.main([*arguments, "--testing-images", "38"])
