"""Reports of `tuning.comparison`, opened by a browser as files."""

import json

import keras
import numpy as np
import pytest

from dmtrl_keras.layers import CrossStitch, TaskSplit, TuckerDense
from tuning.comparison import compare
from tuning.comparison.report import report, to_json

pytestmark = pytest.mark.browser

SIZES = {1280: 800, 390: 844}
# A sheet of A4 between margins of a centimetre.
PAPER = 718

WIDER = """
return [...document.querySelectorAll(".dmtrl-report *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width > 1 && box.right > innerWidth + 1 && !element.closest(".scroll, svg");
}).map((element) => element.tagName + "." + element.className).slice(0, 5)
"""
# Texts of a figure outside of it, and axis labels of which one lies on another.
OUTSIDE_FIGURE = """
const found = [];
for (const figure of document.querySelectorAll("figure")) {
  const own = figure.getBoundingClientRect();
  for (const text of figure.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect();
    const out = box.left < own.left - 1 || box.right > own.right + 1 ||
      box.top < own.top - 1 || box.bottom > own.bottom + 1;
    if (box.width && out) found.push(text.textContent);
  }
}
return found;
"""
ON_EACH_OTHER = """
const found = [];
for (const figure of document.querySelectorAll("figure")) {
  const groups = [".legendtext", ".ytick text", ".gtitle, .xtitle, .ytitle, .legendtext"];
  for (const group of groups) {
    const boxes = [...figure.querySelectorAll(group)].map((text) =>
      [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, other]) => {
      if (one.left < other.right - 1 && other.left < one.right - 1 &&
          one.top < other.bottom - 2 && other.top < one.bottom - 2) found.push([a, b]);
    }));
  }
}
return found;
"""
CUT_OFF = """
return [...document.querySelectorAll(".scroll, figure")].filter((box) =>
  box.scrollWidth > box.clientWidth + 1).map((box) => box.textContent.slice(0, 40))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report and `results.json` of linear methods on planted tasks, one an outlier."""
    rng = np.random.default_rng(0)
    tasks = ["north", "south", "west>east", "1995", "1996", "a_long_name_of_a_task"]
    slope = np.array([1.0, 2.0, 0.0, -1.0])
    x = {task: rng.normal(size=(30, 4)) for task in tasks}
    y = {task: x[task] @ slope + rng.normal(size=30) for task in tasks}
    y["1996"] -= 2 * x["1996"] @ slope
    methods = ["ridge", "pooled", "mean", "clustered", "related", "nddr"]
    settings = {"methods": methods, "repeats": 3, "trials": 2, "fractions": [0.3]}
    found = compare(x, y, **settings)
    own = tmp_path_factory.mktemp("report")
    report(found, own / "report.html")
    own.joinpath("results.json").write_text(json.dumps(to_json(found)))
    return own


@pytest.fixture(scope="module")
def results(folder):
    """What `results.json` says."""
    return json.loads(folder.joinpath("results.json").read_text())


def opened(browser, path, width):
    """Open a file in a window of a size, and return what goes wrong in it."""
    size = {"width": width, "height": SIZES.get(width, 800), "deviceScaleFactor": 1}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**size, "mobile": width < 600}
    )
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    entries = browser.get_log("browser")
    found = [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            found += [] if url.startswith(("file:", "data:", "blob:")) else [url]
    return found


def check_layout(browser, width):
    """Nothing is wider than the window, nor outside of a figure, nor on another text."""
    script = "return document.scrollingElement.scrollWidth"
    assert browser.execute_script(script) <= width
    for script in (WIDER, OUTSIDE_FIGURE, ON_EACH_OTHER):
        assert browser.execute_script(script) == []
    smallest = """return Math.min(...[...document.querySelectorAll(
        "p, li, td, th, .legendtext, .xtick text, .ytick text")].map(
        (element) => parseFloat(getComputedStyle(element).fontSize)))"""
    assert browser.execute_script(smallest) >= 12


def cells(browser, identity):
    """The rows of a table as they stand, lists of `(text, value)`."""
    script = """return [...document.getElementById(arguments[0]).tBodies[0].rows].map(
        (row) => [...row.cells].map((cell) => [cell.textContent, cell.dataset.value]))"""
    return browser.execute_script(script, identity)


def traces(browser, identity):
    """The data of a figure."""
    script = "return JSON.stringify(document.getElementById(arguments[0]).data)"
    return json.loads(browser.execute_script(script, identity))


@pytest.mark.parametrize("width", SIZES)
def test_comparison(browser, folder, width):
    """No error, nothing from elsewhere, and all is to be seen."""
    assert opened(browser, folder / "report.html", width) == []
    check_layout(browser, width)


def test_tables_sort(browser, folder, results):
    """By numbers, in both directions; what has no value comes last."""
    opened(browser, folder / "report.html", 1280)
    heads = "#methods th button"
    names = [button.text for button in browser.find_elements("css selector", heads)]
    errors = sorted(row["error"] for row in results["methods"].values())
    for name, values, missing in (
        ("Mean error", errors, 0),
        (
            "Against linear, by task",
            sorted(
                row["delta"]
                for name, row in results["methods"].items()
                if name != results["baseline"]
            ),
            1,
        ),
    ):
        column = names.index(name)
        for expected, direction in ((values, "ascending"), (values[::-1], "descending")):
            browser.find_elements("css selector", heads)[column].click()
            found = [row[column][1] for row in cells(browser, "methods")]
            shown = found[: len(found) - missing]
            np.testing.assert_allclose(np.array(shown, float), expected)
            assert found[len(shown) :] == [""] * missing
            sorts = "[...document.querySelectorAll('#methods th')].map((h) => h.ariaSort)"
            marks = browser.execute_script(f"return {sorts}")
            assert [n for n, mark in enumerate(marks) if mark] == [column]
            assert marks[column] == direction
    # Words, too.
    browser.find_elements("css selector", heads)[0].click()
    titles = [row[0][0] for row in cells(browser, "methods")]
    assert titles == sorted(row["title"] for row in results["methods"].values())


def test_numbers(browser, folder, results):
    """Tables and figures have the numbers of `results.json`."""
    opened(browser, folder / "report.html", 1280)
    methods, baseline = results["methods"], results["baseline"]
    rows = cells(browser, "methods")
    assert [row[0][0] for row in rows] == [own["title"] for own in methods.values()]
    for row, (name, own) in zip(rows, methods.items()):
        texts = [text for text, _ in row]
        assert texts[1] == f"{own['error']:.4f} ± {own['spread']:.4f}"
        against = [f"{own['delta']:+.1f}%", f"{own['low']:+.1f} to {own['high']:+.1f}"]
        assert texts[2:4] == (["-", "-"] if name == baseline else against)
        assert texts[5:7] == [f"{own['weights']:,}", f"{own['seconds']:.1f}"]
        assert float(row[1][1]) == pytest.approx(own["error"], rel=1e-9)
    by_task = {name: np.mean(errors, axis=0) for name, errors in results["errors"].items()}
    for row, name in zip(cells(browser, "tasks"), methods):
        assert [text for text, _ in row[1:]] == [f"{v:.4f}" for v in by_task[name]]
    for row, own in zip(cells(browser, "fractions"), results["curve"]):
        assert row[0][0] == f"{own['fraction']:.0%}" and row[2][0] == f"{own['error']:.4f}"

    front, *points = traces(browser, "size")
    for trace, own in zip(points, methods.values(), strict=True):
        assert trace["name"] == own["title"] and trace["x"] == [own["weights"]]
        assert trace["y"] == pytest.approx([own["error"]])
        assert trace["error_y"]["array"] == pytest.approx([own["spread"]])
    least = min(own["weights"] for own in methods.values())
    assert front["x"][0] == least
    assert front["y"][-1] == pytest.approx(min(own["error"] for own in methods.values()))
    for trace, (name, own) in zip(traces(browser, "curve"), methods.items(), strict=True):
        expected = [row for row in results["curve"] if row["method"] == name]
        assert trace["name"] == own["title"]
        assert trace["x"] == pytest.approx([100 * row["fraction"] for row in expected])
        assert trace["y"] == pytest.approx([row["error"] for row in expected])
    (gains,) = traces(browser, "gains")
    others = [name for name in methods if name != baseline]
    expected = [100 * (1 - by_task[name] / by_task[baseline]) for name in others]
    np.testing.assert_allclose(gains["z"], expected)
    assert gains["y"] == [methods[name]["title"] for name in others]
    assert set(results["relations"]) == {"mean", "clustered", "related"}
    for name, relation in results["relations"].items():
        (trace,) = traces(browser, f"relations-{name}")
        np.testing.assert_allclose(trace["z"], relation["matrix"])
        assert trace["x"][:2] == trace["y"][:2] == results["tasks"][:2]
    # Names are names, whatever they look like.
    ticks = "[...document.querySelectorAll('#gains .xtick text')].map((t) => t.textContent)"
    shown = browser.execute_script(f"return {ticks}")
    assert shown == [*results["tasks"][:5], "a_long_name_o…"]


def test_printed(browser, folder):
    """On paper nothing is cut off, and no buttons are printed."""
    opened(browser, folder / "report.html", PAPER)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script(CUT_OFF) == []
        script = "return document.scrollingElement.scrollWidth"
        assert browser.execute_script(script) <= PAPER
        bars = """return [...document.querySelectorAll(".modebar")].filter(
            (bar) => bar.getBoundingClientRect().width).length"""
        assert browser.execute_script(bars) == 0
        mark = """document.querySelector("th button").click();
        return getComputedStyle(document.querySelector("th button"), "::after").content"""
        assert browser.execute_script(mark) in ('""', "none")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.fixture(scope="module")
def network():
    """A network with factors and cross-stitch weights."""
    inputs = keras.Input((6,))
    x = TuckerDense(8, 3, rank=2, shared_input=True, name="fc")(inputs)
    x = CrossStitch(["a", "b", "c"], name="stitch")(x)
    return keras.Model(inputs, TaskSplit(["a", "b", "c"])(x), name="small")


@pytest.mark.parametrize("width", SIZES)
def test_network(browser, network, tmp_path, width):
    """The report of a network, with what its layer learned."""
    report(network, tmp_path / "network.html")
    assert opened(browser, tmp_path / "network.html", width) == []
    check_layout(browser, width)
    # Before it comes what the factors say.
    (trace,) = traces(browser, "learned-1")
    np.testing.assert_allclose(trace["z"], network.get_layer("stitch").alpha)


def test_notebook(browser, network, tmp_path):
    """Two reports in one notebook have their own figures, and their tables sort."""
    own = "".join(report(network)._repr_html_() for _ in range(2))
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'><body>{own}</body>")
    assert opened(browser, page, 1280) == []
    figures = "return document.querySelectorAll('.js-plotly-plot .main-svg').length"
    count = browser.execute_script(figures)
    assert count >= 8
    sorts = """
    return [...document.querySelectorAll(".dmtrl-report")].map((root) => {
      root.querySelector("th button").click();
      return root.querySelectorAll("[aria-sort=ascending]").length;
    })"""
    assert browser.execute_script(sorts) == [1, 1]
