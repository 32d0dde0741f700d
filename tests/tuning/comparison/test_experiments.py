"""The data of the experiments as problems, from small files in their forms."""

import keras
import keras_tuner as kt
import numpy as np
import pytest

from dmtrl_keras import multitask
from tuning.comparison import candidates, command, experiments
from tuning.comparison.problem import BINARY, CLASSES, REGRESSION, Problem, classes_of
from tuning.comparison.search import Options, draw, methods_of


def test_digits():
    """One digit against the rest: ten tasks on the same images, a label in ten is one."""
    problem = experiments.problem_of("digits")
    labels = np.stack([problem.y[f"is_{digit}"] for digit in range(10)])
    np.testing.assert_array_equal(labels.sum(axis=0), 1)
    assert problem.shared and problem.heads == dict.fromkeys(problem.tasks, 1)
    train, test = draw(problem, Options(), 0)
    assert (len(train["is_0"]), len(test["is_0"])) == (300, 700)
    assert problem.backbone().outputs[0].shape[1:] == (64,)


def test_unknown():
    with pytest.raises(ValueError, match=r"'school'.*Received: 'none'"):
        experiments.problem_of("none")
    with pytest.raises(ValueError, match="--data FOLDER"):
        experiments.problem_of("omniglot")


@pytest.mark.parametrize(
    "kind",
    [BINARY, *(pytest.param(k, marks=pytest.mark.long) for k in (CLASSES, REGRESSION))],
)
def test_networks_learn(kind, rng):
    """What has no linear answer, by a network: it is far better than any constant."""
    x = rng.normal(size=(300, 2)).astype("float32")
    product = x[:, 0] * x[:, 1]
    y = {REGRESSION: 5 * product + 40, BINARY: (product > 0).astype(int)}
    y[CLASSES] = y[BINARY] + 2 * (x[:, 0] > 0)
    problem = Problem(
        x, {"a": y[kind], "b": y[kind][::-1] * 0 + y[kind]}, kinds={"a": kind, "b": kind}
    )
    network = candidates.Network("stl", "STL", "independent")
    part = {task: np.arange(200) for task in problem.tasks}
    hp = kt.HyperParameters()
    hp.Fixed("learning_rate", 0.01)
    trained = network.train(problem, part, hp, Options(epochs=20), 20, 0)
    outputs = trained.predict({task: x[200:] for task in problem.tasks})
    for task in problem.tasks:
        labels = problem.y[task][200:]
        if kind == REGRESSION:
            left = np.mean((np.ravel(outputs[task]) - np.ravel(labels)) ** 2)
            assert left < 0.2 * np.var(labels)
            continue
        assert np.mean(classes_of(outputs[task]) != np.ravel(labels)) < 0.15
        # They are logits.
        assert outputs[task].min() < -0.5 and outputs[task].max() > 1


@pytest.mark.long
def test_real(data_dir):
    """All of them; every method of the issue finds a problem that it fits."""
    fitting = set()
    for name in experiments.PRESETS:
        problem = experiments.problem_of(name, data_dir)
        fitting |= set(methods_of(problem, Options())[0])
        train, test = draw(problem, Options(), 1)
        for task in problem.tasks:
            assert not set(train[task]) & set(test[task])
        if problem.backbone is not None:
            own = problem.backbone()
            assert next(iter(problem.x.values())).shape[1:] == own.input_shape[1:]
    # These networks are not trained.
    assert fitting == set(candidates.CANDIDATES) - {"lora"}


@pytest.mark.long
def test_command(tmp_path):
    """By its name; the script that is written makes the same problem."""
    arguments = ["--experiment", "digits", "--methods", "hard", "--trials", "1"]
    arguments += ["--repeats", "1", "--epochs", "1", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "LEAST_STEPS", 2)
        found = command.main(arguments)
    row = found.table.loc["hard"]
    assert row.flops > 0 and row.step_ms > 0
    assert "experiment_problem('digits', None)" in (tmp_path / "best.py").read_text()
    assert "MFLOP" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "a.csv", "--task", "a", "--target", "b", "--data", "c"], "--data needs"),
        (["--model", "a:b"], "--model MODULE:FUNCTION needs"),
    ],
)
def test_sources(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_flops():
    """Products and sums of a network by hand, of two tasks with one head each."""
    backbone = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()]
    )
    found = candidates.flops_of(multitask(backbone, 2, heads=5, verbose=False))
    # A product and a sum for each weight of each place, and its bias.
    convolution = 2 * 36 * 4 * (2 * 27 + 1)
    heads = 2 * 5 * (2 * 144 + 1)
    assert found == pytest.approx(convolution + heads, rel=0.02)
