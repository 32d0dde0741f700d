"""Attributes of faces, on generated ones in three layouts."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import test_mtfl
from test_portraits import write_adience, write_utkface

from applications import faces
from applications.reading import DataError
from dmtrl_keras import task_layers

EXPERIMENT = faces.FacesExperiment()
SMALL = "--size 16 --width 0.02 --steps 3 --epochs 1 --batch-size 8 --repeats 1".split()


def given(data, *more):
    """Arguments of a small run."""
    return ["--data", str(data), *SMALL, *more]


@pytest.fixture
def mtfl(tmp_path, rng):
    """Forty faces in MTFL's layout."""
    test_mtfl.write(tmp_path / "mtfl", rng)
    return tmp_path / "mtfl"


def test_network_of_the_paper():
    """Levi & Hassner's, of the original's size."""
    model = faces.make_cnn(227, 1.0, 4, 0.5)
    shapes = {layer.name: layer.output.shape[1:] for layer in model.layers}
    assert shapes["conv1"] == (57, 57, 96) and shapes["conv2"] == (29, 29, 256)
    assert shapes["conv3"] == (15, 15, 384) and shapes["fc2"] == (512,)
    assert model.get_layer("conv3").count_params() == 9 * 256 * 384 + 384


@pytest.mark.parametrize("method", faces.METHODS)
def test_every_method_builds(method):
    """With the kernels that it should have, and an output for each task."""
    options = faces.parse(given("x", "--tasks", "pose", "gender", "years"))
    model = faces.Network(options).make(method)
    outputs = model.predict(np.zeros((2, 16, 16, 3)), verbose=0)
    assert {name: x.shape for name, x in outputs.items()} == {
        "pose": (2, 5),
        "gender": (2, 2),
        "years": (2, 1),
    }
    names = {layer.name for layer in task_layers(model)}
    stacked = {"conv1", "conv2", "conv3", "fc1", "fc2"}
    assert names & stacked == (
        set() if method in ("hard", "hard-large", "trn") else stacked
    )
    if method == "tucker-alone":
        own = [layer for layer in task_layers(model) if layer.name == "conv1"]
        assert [layer.tasks for layer in own] == [1, 1, 1]


def test_as_many_weights():
    """The wide network has about those of four single ones."""
    more = ["--tasks", "pose", "gender", "smile", "glasses", "--width", "0.1"]
    options = faces.parse(given("x", *more))
    options.width = 0.1
    one, four = (faces.Network(options).make(m) for m in ("hard-large", "stl"))
    assert 0.9 < one.count_params() / four.count_params() < 1.1


def test_shared_layers():
    """The first N of five; more than there are is an error."""
    options = faces.parse(given("x", "--tasks", "pose", "gender", "--shared-layers", "2"))
    model = faces.Network(options).make("hard")
    names = {layer.name for layer in task_layers(model)}
    assert names >= {"conv3", "fc1", "fc2"} and not names & {"conv1", "conv2"}
    options.shared_layers = [6]
    with pytest.raises(DataError, match="expected at most 5"):
        faces.Network(options).make("hard")


def test_trunks():
    """A class of `keras.applications`, its lower layers common and as they were."""
    own = ["--trunk", "MobileNetV2", "--weights", "none", "--tasks", "pose", "gender"]
    until = "block_15_project_BN"
    options = faces.parse(given("x", *own, "--size", "32", "--share-until", until))
    network = faces.Network(options)
    model = network.make("stl")
    trained = {variable.path for variable in model.trainable_variables}
    assert any("block_16" in path for path in trained)
    assert not any("block_15" in path or "Conv1" in path for path in trained)
    assert network.prepared(np.full((1, 2, 2, 3), 255, "uint8")).max() == 1
    options.share_until = "none"
    with pytest.raises(DataError, match="--share-until"):
        network.make("stl")


def test_labels_and_errors():
    """Missing labels have marks; errors in loops over what is known."""
    images = np.zeros((4, 2, 2, 3), "uint8")
    years = np.array([10, 20, np.nan, 60], "float32")
    own = faces.Faces(images, None, None, np.array([0, 1, 1, -1]), None, None, years=years)
    known = {"gender": np.array([False, True, True, True]), "years": np.ones(4, bool)}
    labels = faces.Labels(["gender", "years"], faces.Part(own, own, known))
    found = labels.of(own, slice(4))
    assert found["gender"].tolist() == [-1, 1, 1, -1]
    level, spread = years[[0, 1, 3]].mean(), years[[0, 1, 3]].std()
    expected = (years - level) / spread
    np.testing.assert_allclose(found["years"][:, 0], expected, rtol=1e-5)
    assert labels.of(own)["gender"].tolist() == [0, 1, 1, -1]
    answers = np.array([15.0, 20, 30, 40])
    outputs = {
        "gender": np.eye(2)[[0, 0, 1, 1]],
        "years": ((answers - level) / spread)[:, None],
    }
    errors, constant = labels.errors(outputs, own)
    assert errors["gender"] == pytest.approx(1 / 3)
    # Of two known labels for training, both 1.
    assert constant["gender"] == pytest.approx(1 / 3)
    # Absolute errors of 5, 0 and 20 years, of the median 10, 0 and 40.
    assert errors["years"] == pytest.approx(25 / 50) and constant["years"] == 1
    none = known | {"gender": np.zeros(4, bool)}
    with pytest.raises(DataError, match="label of 'gender'"):
        faces.Labels(["gender"], faces.Part(own, own, none))


def test_folds_of_adience(tmp_path):
    """Each seed tests on another fold, and trains on the others; labels may be missing."""
    data = write_adience(tmp_path / "adience")
    options = faces.parse(given(data))
    loaded = EXPERIMENT.load(options)
    assert options.tasks == ["gender", "age"]
    tested = set()
    for seed in range(5):
        part = EXPERIMENT.draw(options, loaded, seed)
        assert (len(part.training.images), len(part.testing.images)) == (16, 4)
        tested |= {int(image[0, 0, 0]) // 40 for image in part.testing.images}
        assert not set(part.training.images[:, 0, 0, 0]) & set(
            part.testing.images[:, 0, 0, 0]
        )
    assert tested == set(range(5))
    with pytest.raises(DataError, match="there are 16"):
        EXPERIMENT.load(faces.parse(given(data, "--training-images", "17")))
    with pytest.raises(DataError, match="'smile'"):
        EXPERIMENT.load(faces.parse(given(data, "--tasks", "smile", "age")))


def test_missing_labels(mtfl):
    """A share of each task's labels, others in each draw; nothing else changes."""
    parts = {}
    for share in ("0", "0.5"):
        options = faces.parse(given(mtfl, "--missing", share))
        loaded = EXPERIMENT.load(options)
        parts[share] = [EXPERIMENT.draw(options, loaded, seed) for seed in (0, 1)]
    for full, part in zip(*parts.values()):
        np.testing.assert_array_equal(full.training.images, part.training.images)
        assert all(known.all() for known in full.known.values())
        shares = [known.mean() for known in part.known.values()]
        assert 0.2 < min(shares) and max(shares) < 0.8
    first, second = (part.known["pose"] for part in parts["0.5"])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, parts["0.5"][0].known["gender"])


@pytest.mark.usefixtures("steps_as_users")
def test_command(mtfl, tmp_path, monkeypatch):
    """Settings are chosen on held-out images, results resume, a page is written."""
    page = tmp_path / "page.md"
    page.write_text("<!-- faces:begin -->\n<!-- faces:end -->\n")
    more = ["--methods", "stl", "hard", "--tasks", "pose", "gender"]
    more += ["--training-images", "20", "30", "--shared-layers", "1", "3"]
    more += ["--output", str(tmp_path / "results"), "--page", str(page), "--missing", "0.2"]
    table = faces.main(given(mtfl, *more))["faces"]
    assert list(table["Images"]) == ["20"] * 3 + ["30"] * 3
    assert list(table["Method"][:3]) == ["most frequent answer", "STL", "UD-MTL"]
    assert table["Setting"][2] in ("rate 0.001, N 1", "rate 0.001, N 3")
    assert table["To STL"][1] == "" == table["To all shared"][2]
    assert "Of the training labels 20% are missing" in page.read_text()
    assert (tmp_path / "results" / "errors.png").exists()
    monkeypatch.setattr(faces, "train_and_test", None)
    assert faces.main(given(mtfl, *more))["faces"].equals(table)


@pytest.mark.usefixtures("few_steps")
def test_utkface_in_years(tmp_path):
    """Age as a number beside gender and race; a fifth is tested on."""
    data = write_utkface(tmp_path / "utkface")
    more = ["--tasks", "years", "gender", "race", "--methods", "stl", "trn"]
    more += ["--output", str(tmp_path / "results"), "--relation-weights", "0.1"]
    table = faces.main(given(data, *more))["faces"]
    assert {"Years %", "Gender %", "Race %"} <= set(table)
    assert table["Years %"][0] == "100.0"


def test_table():
    """Differences are paired by draw, with Student's interval as SciPy has it."""
    gaps = np.array([0.01, 0.03, 0.02])
    rows = []
    for method, shift in (("stl", 0 * gaps), ("tucker", -gaps)):
        for seed in range(3):
            error = 0.3 + 0.05 * seed + shift[seed]
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "training_images": 100,
                    "learning_rate": 1e-3,
                    "setting": None if method == "stl" else 0.3,
                    "errors": {"pose": error, "smile": error},
                    "constant": {"pose": 0.5, "smile": 0.6},
                    "parameters": 10,
                    "seconds": 1.0,
                }
            )
    table = faces.summarize(pd.DataFrame(rows), ["pose", "smile"])
    low, high = scipy.stats.ttest_1samp(-100 * gaps, 0).confidence_interval(0.95)
    assert table["To STL"][2] == f"-2.0 ± {(high - low) / 2:.1f}"
    assert table["Mean %"][0] == "55.0 ± 0.0" and table["Mean %"][1] == "35.0 ± 5.0"
    assert table["Setting"][2] == "rate 0.001, tolerance 0.3"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "pose"], "two different tasks"),
        (["--extent", "0.5", "0.4"], "the least and the most"),
        (["--share-until", "conv1"], "expected a --trunk"),
        (["--methods", "hard-large", "--trunk", "VGG16"], "paper's network only"),
    ],
)
def test_wrong_arguments(more, message, capsys):
    with pytest.raises(SystemExit):
        faces.parse(given("x", *more))
    assert message in capsys.readouterr().err
