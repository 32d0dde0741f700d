"""Reports of networks and of comparisons: every part, with the right numbers."""

import json
import re

import keras
import numpy as np
import pytest

from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    TaskRelations,
    TensorNormalRegularizer,
    chance_of_sharing,
    merge_similar_kernels,
    sharing_strength,
    task_correlation,
    task_covariance,
    task_summary,
)
from dmtrl_keras.layers import (
    NDDR,
    CrossStitch,
    SimilarKernelConv2D,
    TaskDense,
    TaskSplit,
    TuckerDense,
)
from dmtrl_keras.monitoring.relations import learned_of, nddr_shares
from tuning.comparison import compare
from tuning.comparison.candidates import relations_of
from tuning.comparison.page import heat_map
from tuning.comparison.report import report

TASKS = ["a", "b>c", "1996"]


def model_of(*layers, shape=(5,), names=TASKS, **arguments):
    """A network of some layers, with an output for each task."""
    inputs = x = keras.Input(shape)
    for layer in layers:
        x = layer(x)
    outputs = TaskSplit(names)(x)
    return MultiTaskModel(inputs, outputs, name="tasks_of_mine", **arguments)


def first(units=4, **arguments):
    """A layer that all tasks enter by one input."""
    return TaskDense(units, tasks=3, shared_input=True, **arguments)


def figures(page):
    """The data of all figures on a page, by their `id`."""
    found = re.findall(r'Plotly\.newPlot\(\s*"([^"]+)",\s*(\[.*?\]),\s*\{"', page.html)
    return {identity: json.loads(data) for identity, data in found}


def texts(page):
    """What stands on a page, without its scripts."""
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", page.html, flags=re.S)


@pytest.fixture(autouse=True)
def no_plotly(monkeypatch):
    """Pages without five megabytes of script."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


def test_fusion(rng):
    """Weights of Cross-Stitch units and, by loops, sizes of NDDR's kernels."""
    stitch, each = CrossStitch(3, name="one"), CrossStitch(3, per_channel=True, name="two")
    nddr = NDDR(3, name="three")
    model = model_of(first(), stitch, each, nddr)
    for layer in (stitch, each, nddr):
        layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    one, two, three = learned_of(model)
    np.testing.assert_allclose(one.matrix, stitch.alpha, rtol=1e-6)
    np.testing.assert_allclose(two.matrix, np.mean(each.alpha, axis=-1), rtol=1e-5)
    kernel, sizes = np.asarray(nddr.kernel), np.zeros((3, 3))
    for t in range(3):
        for s in range(3):
            block = kernel[4 * s : 4 * s + 4, 4 * t : 4 * t + 4]
            sizes[t, s] = np.linalg.norm(block)
    np.testing.assert_allclose(three.matrix, sizes / sizes.sum(1, keepdims=True), rtol=1e-5)
    # The names of the tasks, which these layers were not told.
    assert one.names == two.names == three.names == TASKS
    assert relations_of(model).title == three.title
    start = np.kron(
        np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]), np.eye(2)
    )
    np.testing.assert_allclose(nddr_shares(start, 3)[1], [0.1, 0.8, 0.1])

    page = report(model)
    found = figures(page)
    assert list(found) == ["learned-0", "learned-1", "learned-2"]
    (trace,) = found["learned-0"]
    np.testing.assert_allclose(trace["z"], stitch.alpha, rtol=1e-6)
    assert trace["x"] == trace["y"] == ["a", "b&gt;c", "1996"]
    assert "weights of two, the mean over the channels" in texts(page)


def test_priors():
    """Correlations and variances of every mode that a prior learns."""
    own = {"modes": ("task", "class")}
    prior = TensorNormalRegularizer(0.1, **own)
    each = TensorNormalRegularizer(0.1, each="class")
    model = model_of(
        first(kernel_regularizer=prior, name="fc", common_draw=False),
        TaskDense(2, tasks=3, kernel_regularizer=each, name="last"),
    )
    for name in ("fc", "last"):
        model.get_layer(name).prior.update()
    found = {one.title: one for one in learned_of(model)}
    assert set(found) == {
        "learned correlation, fc",
        "learned correlation by class, fc",
        "learned correlation, the mean of 2 covariances, last",
    }
    task = found["learned correlation, fc"]
    np.testing.assert_allclose(task.matrix, task_correlation(model)["fc"])
    np.testing.assert_allclose(task.variances, np.diag(task_covariance(model)["fc"]))
    assert task.names == TASKS and np.abs(task.matrix - np.eye(3)).max() > 0.01
    other = found["learned correlation by class, fc"]
    assert other.names == ["0", "1", "2", "3"] and not other.of_tasks
    last = next(reversed(found.values()))
    mean = task_covariance(model)["last"].mean(axis=0)
    deviation = np.sqrt(np.diag(mean))
    np.testing.assert_allclose(
        last.matrix, mean / np.outer(deviation, deviation), rtol=1e-5
    )
    assert relations_of(model).title == last.title
    page = texts(report(model))
    variances = ", ".join(f"{n} {v:.3g}" for n, v in zip(TASKS, task.variances))
    assert f"Variances: {variances}.".replace(">", "&gt;") in page


def test_large_covariances_are_not_drawn():
    """Those of all features are said, not drawn."""
    prior = TensorNormalRegularizer(0.1, modes=("task", "feature"))
    model = model_of(first(kernel_regularizer=prior, name="fc"), shape=(129,))
    page = report(model)
    assert "129 x 129 numbers, too many to draw" in texts(page)
    assert list(figures(page)) == ["learned-1"]


def test_relations():
    """TRN's similarities: of a model of its own and of a term; pairs, and groups."""
    network = model_of(first(2, name="fc"))
    pairs = Relation("output", pairs=[("a", "1996")])
    groups = Relation("output", name="sides", groups={"one": ["a"], "two": ["b>c", "1996"]})
    model = TaskRelationModel(network, [groups, pairs])
    sides, labels, last = learned_of(model)
    (expected,) = model.similarities()["output"].values()
    np.testing.assert_allclose(
        last.matrix, [[1, np.nan, expected], [np.nan, 1, np.nan], [expected, np.nan, 1]]
    )
    assert sides.names == ["one", "two"] and not sides.of_tasks
    assert labels.names == ["a", "1996", "one", "two"] and not labels.of_tasks
    assert last.title == relations_of(model).title == "similarity of the outputs"
    # Of a pair that is not compared nothing is known, which JSON can't say.
    assert np.isfinite(relations_of(model).matrix).all()
    (trace,) = figures(report(model))["learned-2"]
    assert trace["z"][0][1] is None and trace["z"][0][2] == pytest.approx(expected)
    term = TaskRelations(Relation("output"))
    titles = [one.title for one in learned_of(model_of(first(2), terms=[term]))]
    assert titles == ["similarity of the labels", "similarity of the outputs"]


def test_similar_kernels():
    """Whose kernels a task's are mixed from; which are in common once they are merged."""
    layer = SimilarKernelConv2D(
        2,
        3,
        tasks=3,
        threshold=0.1,
        weights=[[0.5, 0.8, 0.5], [0.2, 0.5, 0.5], [0.5, 0.5, 0.5]],
        related=[[0, 1]],
        shared_input=True,
        common_draw=True,
        name="conv",
    )
    model = model_of(layer, shape=(6, 6, 2))
    (one,) = learned_of(model)
    # Of equal kernels, w_i = phi_ij w_i + phi_ji w_j (Eq. 5); the last task has no other.
    np.testing.assert_allclose(
        one.matrix, [[0.8, 0.2, 0], [0.8, 0.2, 0], [0, 0, 1]], atol=1e-6
    )
    page = texts(report(model))
    assert "Similar kernels" in page and "id='similar'" in page
    merged = merge_similar_kernels(model, verbose=False)
    (one,) = learned_of(merged)
    assert one.matrix[0, 1] == 1 and one.names == TASKS


def test_layers_and_strength():
    """The tables have what `task_summary` and `sharing_strength` say."""
    model = model_of(
        keras.layers.Dense(6, name="common"),
        TuckerDense(4, tasks=3, rank=2, shared_input=True, name="factors"),
        TaskDense(2, tasks=3, name="own"),
    )
    page = report(model)
    text = texts(page)
    for row in task_summary(model, verbose=False):
        line = re.search(rf"<tr><td[^>]*>{row.layer}</td>.*?</tr>", text).group()
        cells = re.findall(r'data-value="([^"]*)">([^<]*)<', line)
        rank = "-" if row.rank is None else " ".join(map(str, row.rank))
        assert [cells[i][1] for i in (1, 3, 4)] == [row.kind, row.sharing, rank]
        assert [int(cells[i][0]) for i in (5, 6, 7)] == [
            row.parameters,
            row.parameters_if_independent,
            row.flops,
        ]
    strength, mean, most = figures(page)["strength"]
    assert strength["x"] == ["factors", "own"]
    np.testing.assert_allclose(strength["y"], list(sharing_strength(model).values()))
    assert mean["y"] == [pytest.approx(chance_of_sharing(model)["factors"]), None]
    quantile = chance_of_sharing(model, quantile=0.95)["factors"]
    assert most["y"] == [pytest.approx(quantile), None]
    assert "3 tasks: a, b&gt;c, 1996." in text


def test_plain_models():
    """A Keras model with task layers; one that has nothing to do with tasks."""
    inputs = keras.Input((5,))
    page = report(keras.Model(inputs, first(name="fc")(inputs), name="plain"))
    assert "id='layers'" in page.html and "nothing to report" not in page.html

    single = keras.Sequential([inputs, keras.layers.Dense(2)], name="single")
    page = report(single)
    assert "There is nothing to report" in texts(page) and not figures(page)

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.fc = first(name="fc")

        def call(self, x):
            return self.fc(x)

    model = Subclassed()
    model(np.zeros((1, 5)))
    text = texts(report(model))
    assert "no table of its layers" in text and "id='strengths'" in text


def test_names_are_escaped(rng):
    """Names are no marks of HTML, neither on the page nor in figures."""
    names = ["<b>x</b>", "</script>", '"&']
    inputs = keras.Input((5,))
    x = CrossStitch(names, name="<i>stitch")(first(name="<u>fc")(inputs))
    page = report(keras.Model(inputs, x, name="<img src=x>"))
    for mark in ("<b>x", "<i>", "<u>", "<img"):
        assert mark not in page.html
    (trace,) = figures(page)["learned-0"]
    assert trace["x"] == ["&lt;b&gt;x&lt;/b&gt;", "&lt;/script&gt;", '"&amp;']


def test_heat_map():
    """Long names are shortened, and of many some are left out; values and hover stay."""
    names = [f"a_task_with_a_long_name_{n}" for n in range(50)]
    figure = heat_map(np.eye(50), names, names)
    assert list(figure.layout.xaxis.tickvals) == names[::3]
    assert set(map(len, figure.layout.xaxis.ticktext)) == {14}
    assert list(figure.data[0].x) == names and figure.data[0].texttemplate is None
    few = heat_map(np.array([[0.5, np.nan]]), ["r"], ["1", "2"])
    assert few.data[0].z[0] == (0.5, None) or list(few.data[0].z[0]) == [0.5, None]
    assert few.layout.xaxis.type == "category" and few.data[0].texttemplate


def test_comparison(tmp_path):
    """Its sentence and its table in a notebook; all of it as a page."""
    rng = np.random.default_rng(0)
    x = {task: rng.normal(size=(20, 3)) for task in TASKS}
    y = {task: values @ [1.0, 2.0, 3.0] for task, values in x.items()}
    settings = {"repeats": 1, "trials": 1}
    found = compare(x, y, methods=["ridge", "pooled", "nddr"], **settings)
    short = found._repr_html_()
    assert found.sentence in short and "plotly" not in short
    assert short.count("<tr") == 3 and "linear, all shared" in short
    # Words stand on the left, numbers on the right, also where there are none.
    heads = re.findall(r"<th scope='col'( class='words')?>", short)
    assert [bool(words) for words in heads] == [True] + 9 * [False]
    page = report(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page.html
    assert set(figures(page)) == {"size", "gains"}
    assert "nddr: the tasks&#x27; examples are not the same" in page.html
    # Two in one notebook have ids of their own.
    one, two = (set(re.findall(r"id=['\"]([^'\"]+)", page._repr_html_())) for _ in range(2))
    assert one and not one & two and "/* plotly.js */" in page._repr_html_()
    # With one method there is nothing to gain.
    alone = report(compare(x, y, methods=["ridge"], **settings))
    assert set(figures(alone)) == {"size"}


@pytest.mark.parametrize("wrong", [None, "report.html", {"a": 1}, keras.layers.Dense(2)])
def test_what_is_no_model(wrong):
    """What was received is said."""
    with pytest.raises(ValueError, match=r"report: `what` .*Comparison.* Received: what="):
        report(wrong)


def test_bad_arguments():
    """A model without weights, and a path that is none."""
    with pytest.raises(ValueError, match=r"report: `what` .*a model that is built"):
        report(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match=r"report: `path`"):
        report(model_of(first()), 3)
