"""The MTFL experiment, on generated faces of the right form, and on the real ones."""

import doctest
import zipfile

import numpy as np
import pytest
from PIL import Image
from searching import Case, replace
from sklearn import preprocessing

from applications import mtfl
from applications.experiment import Tick
from applications.mtfl import Faces, cut_out, load_mtfl, normalized_mean_error
from applications.reading import DataError
from applications.results import Results
from dmtrl_keras import task_similarity

SMALL = ["--size", "16", "--width", "2", "--epochs", "1", "--batch-size", "16"]


def draw(rng, size=48):
    """A dark image with bright landmarks, their places, and a pose."""
    middle = rng.uniform(0.45, 0.55, size=2)
    shape = np.array([[-0.1, 0.1, 0, -0.07, 0.07], [-0.08, -0.08, 0, 0.09, 0.09]])
    points = size * (middle[:, None] + shape + rng.normal(scale=0.005, size=(2, 5)))
    image = np.zeros((size, size, 3), "uint8")
    for x, y in points.T:
        image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = 255
    return image, points, 1 + int(np.clip((middle[0] - 0.45) * 50, 0, 4))


def write(folder, rng, count=40):
    """A data set in the original's layout, Windows' separators and all."""
    (folder / "lfw_5590").mkdir(parents=True)
    kept = {}
    for name in (mtfl.TRAINING, mtfl.TESTING):
        lines, kept[name] = [], []
        for number in range(count):
            image, points, pose = draw(rng)
            file = f"{name[:4]}_{number}.png"
            Image.fromarray(image).save(folder / "lfw_5590" / file)
            values = " ".join(f"{v:.3f}" for v in points.ravel())
            lines.append(f" lfw_5590\\{file} {values} 1 2 2 {pose}")
            kept[name].append((points, pose))
        (folder / name).write_text("\n".join([*lines, "", ""]))
    return kept


def test_load(tmp_path, rng):
    """From a folder and a zip file; landmarks are in shares of the image's side."""
    kept = write(tmp_path / "data" / "MTFL", rng)
    archive = tmp_path / "mtfl.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tmp_path / "data").rglob("*")):
            file.write(path, path.relative_to(tmp_path))
    for source in (tmp_path / "data", archive):
        training, testing = load_mtfl(source, 24)
        assert training.images.shape == (40, 24, 24, 3) == testing.images.shape
        points, pose = kept[mtfl.TRAINING][7]
        np.testing.assert_allclose(training.landmarks[7], points.ravel() / 48, atol=1e-4)
        assert training.pose[7] == pose - 1
        assert (training.gender[7], training.smile[7], training.glasses[7]) == (0, 1, 1)
        x, y = (points[:, 2] / 2).astype(int)
        assert training.images[7, y, x].min() > 60


def test_load_errors(tmp_path, rng):
    """The file and the line are named."""
    with pytest.raises(FileNotFoundError, match="There is no"):
        load_mtfl(tmp_path / "nothing", 24)
    with pytest.raises(FileNotFoundError, match=r"has no training\.txt"):
        load_mtfl(tmp_path, 24)
    write(tmp_path, rng, 2)
    path = tmp_path / mtfl.TESTING
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-1] + "6"]))
    with pytest.raises(ValueError, match=r"testing\.txt, line 2: .*the pose, 1 to 5"):
        load_mtfl(tmp_path, 24)
    path.write_text(lines[0].replace(" 1 2 2 ", " 1 0 2 "))
    with pytest.raises(ValueError, match=r"line 1: .*smile and glasses to be 1 or 2"):
        load_mtfl(tmp_path, 24)
    path.write_text(lines[0].replace("test_0", "nobody"))
    with pytest.raises(ValueError, match=r"testing\.txt, line 1: .*nobody"):
        load_mtfl(tmp_path, 24)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no lines"):
        load_mtfl(tmp_path, 24)


def faces(rng, count=30, size=48):
    """Drawn faces, as `Faces`."""
    images, points, poses = zip(*(draw(rng, size) for _ in range(count)))
    landmarks = np.stack(points).reshape(count, 10) / size
    attributes = rng.integers(2, size=(3, count))
    pose = np.array(poses) - 1
    return Faces(np.stack(images), landmarks.astype("float32"), pose, *attributes)


def test_cut_out(rng):
    """The landmarks lie where the new image is bright; sides change in a mirror."""
    before = faces(rng)
    after = cut_out(before, (0.4, 0.6), rng)
    assert after.images.shape == before.images.shape
    points = after.landmarks.reshape(-1, 2, 5)
    extent = (points.max(axis=2) - points.min(axis=2)).max(axis=1)
    assert 0.4 - 1e-6 < extent.min() < extent.max() < 0.6 + 1e-6
    assert np.all(points[:, 0, 0] < points[:, 0, 1])
    for image, places in zip(after.images, points):
        for x, y in (48 * places.T).astype(int):
            assert image[y, x].max() > 100
    mirrored = after.pose != before.pose
    assert 3 < mirrored.sum() < 27
    np.testing.assert_array_equal(after.pose[mirrored], 4 - before.pose[mirrored])


def test_error(rng):
    """Against loops over faces and landmarks."""
    truth, found = rng.random((2, 6, 10))
    total = 0.0
    for t, f in zip(truth, found):
        eyes = np.hypot(t[0] - t[1], t[5] - t[6])
        for k in range(5):
            total += np.hypot(t[k] - f[k], t[5 + k] - f[5 + k]) / eyes / 5 / 6
    assert normalized_mean_error(truth, found) == pytest.approx(total)
    assert doctest.testmod(mtfl).failed == 0


@pytest.mark.parametrize("network", ["resnet", "mlp"])
@pytest.mark.parametrize("method", mtfl.TITLES)
def test_networks(method, network):
    """STL shares nothing; the others the first layers; relations where they belong."""
    tasks = ["pose", "landmarks", "smile"]
    options = ["--data", "x", *SMALL, "--network", network, "--tasks", *tasks]
    options = mtfl.parse([*options, "--wrong-target", "0.3", "--gradient", "moving"])
    model = mtfl.make_model(options, method)
    names = {layer.name for layer in model.layers}
    shared, own = "shared_conv4_block2_out", "pose_conv2_block1_out"
    if network == "mlp":
        shared, own = "shared", "pose_first"
    assert (shared in names) == (method != "stl")
    assert (own in names) == (method == "stl")
    assert model.output["landmarks"].shape == (None, 10)
    assert model.output["smile"].shape == (None, 2)
    relations = getattr(model, "relations", [])
    both = ["output", "hidden"]
    expected = {"trn-output": ["output"], "trn-hidden": ["hidden"], "stl": [], "mtl": []}
    assert [r.name for r in relations] == expected.get(method, both)
    assert {r.target for r in relations} <= {0.3 if method == "trn-wrong" else None}
    if relations:
        assert model.terms[0].settings["gradient"] == "moving"
        assert len(model.similarities()["hidden" if "hidden" in method else "output"]) == 3


def test_components(rng):
    """Of unit variance and uncorrelated; no more than there are examples."""
    images = rng.integers(256, size=(20, 8, 8, 3)).astype("uint8")
    transform = mtfl.components_of(images, 5)
    found = transform(images)
    np.testing.assert_allclose(np.cov(found.T), np.eye(5), atol=1e-4)
    pixels = images.mean(axis=3).reshape(20, -1)
    u, *_ = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    expected = np.abs(u[:, :5]) * np.sqrt(19)
    np.testing.assert_allclose(np.abs(found), expected, atol=1e-2)
    assert mtfl.components_of(images, 50)(images[:3]).shape == (3, 20)


def test_command(tmp_path, rng, few_steps):
    """All methods; the table's values are the runs'; a second call runs nothing."""
    write(tmp_path / "data", rng)
    output = tmp_path / "results"
    page = tmp_path / "mtfl.md"
    page.write_text("<!-- mtfl:begin -->\n<!-- mtfl:end -->\n")
    arguments = ["--data", str(tmp_path / "data"), "--output", str(output), *SMALL]
    arguments += ["--repeats", "1", "--page", str(page), "--training-images", "32"]
    arguments += ["--methods", "mtl", "trn"]
    table = mtfl.main(arguments)["mtfl"]
    assert list(table["Method"]) == ["MTL", "TRN (hidden + output)"]
    assert list(table["λ output"]) == ["-", "0.01"]
    assert list(table["Runs"]) == [1, 1]
    lines = (output / "runs.jsonl").read_text()
    runs = [run["results"] for run in Results(output / "runs.jsonl")._runs.values()]
    error = runs[0]["errors"]["landmarks"]
    assert len(runs) == 2 and 0 < error < 20
    assert table["Landmarks, error %"][0] == f"{100 * error:.2f}"
    assert set(runs[1]["online"]) == {"output", "hidden", "label"}
    assert "| MTL |" in page.read_text()
    mtfl.main(arguments)
    assert (output / "runs.jsonl").read_text() == lines
    options = mtfl.parse([*arguments, "--scales", "1", "100"])
    plan = [run.settings for run in mtfl.EXPERIMENT.plan(options, (None, None, "digest"))]
    weights = [(own["output_weight"], own["hidden_weight"]) for own in plan[:3]]
    assert weights == [(None, None), (0.01, 0.001), (1.0, 0.1)] and len(plan) == 3
    with pytest.raises(SystemExit, match=r"there are 40. Received: \[41\]"):
        mtfl.main([*arguments, "--training-images", "41"])


def test_faces_of_the_training_part_to_test_on(tmp_path, rng):
    """Others than those trained on, cut out as they are; the results are others."""
    write(tmp_path / "data", rng)
    arguments = ["--data", str(tmp_path / "data"), *SMALL]
    whole, _, first = mtfl.EXPERIMENT.load(mtfl.parse(arguments))
    options = mtfl.parse([*arguments, "--test-images", "10"])
    training, testing, second = mtfl.EXPERIMENT.load(options)
    assert (len(training.pose), len(testing.pose)) == (len(whole.pose) - 10, 10)
    both = np.concatenate([training.gender, testing.gender])
    assert sorted(both) == sorted(whole.gender) and first != second
    known = {image.tobytes() for image in whole.images}
    assert all(image.tobytes() in known for image in training.images)
    assert not any(image.tobytes() in known for image in testing.images)
    with pytest.raises(DataError, match=r"at most 38.*Received: 39"):
        mtfl.EXPERIMENT.load(mtfl.parse([*arguments, "--test-images", "39"]))


@pytest.mark.usefixtures("few_steps")
def test_mlp(rng):
    """Trained and tested, on some tasks, with a control."""
    options = ["--data", "x", *SMALL, "--network", "mlp", "--tasks", "landmarks", "smile"]
    options = mtfl.parse([*options, "--components", "4", "--units", "8"])
    ticks = []
    tick = Tick(lambda: ticks.append(1))
    found = mtfl.train_and_test(options, "trn-wrong", faces(rng), faces(rng, 10), 0, tick)
    assert tick.model.task_names == ("landmarks", "smile")
    assert set(found["errors"]) == {"landmarks", "smile"} and ticks == [1]
    assert set(found["similarity"]) == {"output", "hidden", "labels"}
    # The control does not look at the labels.
    assert set(found["online"]) == {"output", "hidden"}
    assert list(found["online"]["hidden"]) == ["landmarks-smile"]


def test_weights_are_chosen(tmp_path, rng, monkeypatch):
    """By the first seed's validation part; the control too; sizes one after the other."""
    write(tmp_path / "data", rng)
    seen = []

    def run(options, method, part, seed, tick, callbacks=None):
        training, testing = (len(faces.pose) for faces in part)
        seen.append((method, options.output_weight, training, testing, seed))
        # As if the second of three scales were best.
        error = abs(options.output_weight - 0.3) if testing < 40 else 0.2
        similarity = {name: {"gender-pose": 0.5} for name in ("output", "hidden", "labels")}
        errors = dict.fromkeys(options.tasks, error)
        return {"errors": errors, "similarity": similarity, "seconds": 1.0}

    monkeypatch.setattr(mtfl.EXPERIMENT, "run", run)
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "results")]
    arguments += [*SMALL, "--tasks", "gender", "pose", "--training-images", "30", "20"]
    arguments += ["--output-weight", "1", "--scales", "0.1", "0.3", "1", "--repeats", "2"]
    arguments += ["--validation", "0.2", "--methods", "stl", "trn-wrong"]
    table = mtfl.main(arguments)["mtfl"]
    final = [("stl", 1.0, 30, 40, 0), ("stl", 1.0, 30, 40, 1)]
    tried = [("trn-wrong", scale, 24, 6, 0) for scale in (0.1, 0.3, 1.0)]
    best = [("trn-wrong", 0.3, 30, 40, seed) for seed in (0, 1)]
    assert seen[:7] == [*final, *tried, *best]
    assert [one[2:4] for one in seen[7:]] == [(20, 40)] * 2 + [(16, 4)] * 3 + [(20, 40)] * 2
    assert list(table["Images"]) == ["30", "30", "20", "20"]
    assert list(table["λ output"]) == ["-", "0.3"] * 2
    assert list(table["Gender, accuracy %"]) == ["80.00 ± 0.00"] * 4
    # Nothing is run again.
    mtfl.main(arguments)
    assert len(seen) == 14


@pytest.mark.long
def test_convergence_command(tmp_path, rng, monkeypatch):
    """Curves, figure and table; the features are those of a network at its start."""
    monkeypatch.setattr(
        mtfl,
        "train",
        lambda options, method, *_: mtfl.Trained(
            mtfl.make_model(options, method), lambda images: images, None, None
        ),
    )
    write(tmp_path / "data", rng)
    output = tmp_path / "results"
    arguments = ["--data", str(tmp_path / "data"), "--output", str(output), *SMALL]
    arguments += ["--convergence", "--momenta", "0.5", "0.9", "--batch-sizes", "8"]
    table = mtfl.main(arguments)["mtfl-convergence"]
    assert list(table["Momentum"]) == ["0.5", "0.9"] * 3
    assert list(table["Examples remembered"]) == [24, 152] * 3
    assert table["After 30 steps"].astype(float).between(0, 1).all()
    assert (output / "convergence.png").stat().st_size > 10_000
    assert len(list(output.glob("features_*.npz"))) == 1


def test_online_estimates_converge(rng):
    """To the offline value, for small and large batches and momenta."""
    common = rng.normal(size=(2000, 3))
    sets = {
        "a": (common @ rng.normal(size=(3, 6)) + rng.normal(size=(2000, 6))),
        "b": (common @ rng.normal(size=(3, 4)) + rng.normal(size=(2000, 4))),
    }
    sets = {name: x.astype("float32") for name, x in sets.items()}
    offline = task_similarity(*sets.values(), mtfl.RIDGE)
    for momentum, size, steps in ((0.9, 32, 100), (0.9, 128, 100), (0.99, 128, 800)):
        found = mtfl.online_estimates({"x": sets}, momentum, size, steps, rng)["x"]
        assert len(found) == steps
        assert found[steps // 2 :].mean() == pytest.approx(offline, abs=0.03)


@pytest.mark.long
def test_real_faces(data_dir):
    """MTFL at 64 x 64: sizes, and how similar landmarks and pose are."""
    training, testing = load_mtfl(data_dir / "mtfl_64.zip", 64)
    assert len(training.images) == 10_000 and len(testing.images) == 2_995
    assert np.array_equal(np.unique(testing.pose), range(5))
    labels = mtfl.labels_of(testing)
    assert 0.85 < task_similarity(labels["landmarks"], labels["pose"]) < 0.95
    # Thirty steps are enough with momentum 0.99, whatever the scale of the labels.
    raw = {t: np.float32(x) for t, x in mtfl.labels_of(training).items()}
    scaled = preprocessing.scale(training.landmarks.astype("float64"))
    standard = raw | {"landmarks": np.float32(scaled)}
    sets = {"raw": raw, "standard": standard}
    found = mtfl.online_estimates(sets, 0.99, 128, 30, np.random.default_rng(0))
    offline = mtfl.similarity_of(raw)
    np.testing.assert_allclose(found.iloc[29], [offline] * 2, atol=0.02)
    # The first step is the first batch's estimate.
    assert found["raw"][0] == pytest.approx(found["standard"][0], abs=1e-3)


@pytest.mark.parametrize(
    ("momentum", "sizes"),
    [
        pytest.param(0.9, (32, 128), marks=pytest.mark.long),
        (0.99, (128,)),
        pytest.param(0.99, (32,), marks=pytest.mark.long),
        pytest.param(0.999, (128,), marks=pytest.mark.long),
    ],
)
def test_online_estimates_converge_on_real_labels(data_dir, momentum, sizes):
    """Figure 4 on MTFL's labels: the estimate is what as many examples give offline."""
    training, _ = load_mtfl(data_dir / "mtfl_64.zip", 64)
    sets = {task: np.float32(x) for task, x in mtfl.labels_of(training).items()}
    rng = np.random.default_rng(0)
    for size in sizes:
        steps = max(500, round(10 / (1 - momentum)))
        found = mtfl.online_estimates({"x": sets}, momentum, size, steps, rng)["x"]
        late = found[steps // 2 :]
        offline = mtfl.offline_estimates(
            sets, mtfl.examples_remembered(momentum, size), 20, rng
        )
        assert late.mean() == pytest.approx(offline.mean(), abs=0.01)
        assert late.std() < 0.03


def numbered_faces(count, offset):
    numbers = np.arange(count) + offset
    landmarks = np.tile([0.3, 0.7, 0.5, 0.35, 0.65, 0.3, 0.3, 0.5, 0.7, 0.7], (count, 1))
    images = np.zeros((count, 8, 8, 3), "uint8")
    others = np.zeros((3, count), int)
    pose = numbers % 5 + 10 * numbers
    return mtfl.Faces(images, landmarks.astype("float32"), pose, *others)


def search_case(monkeypatch):
    """For `tests/tuning`."""
    parts = (numbered_faces(100, 0), numbered_faces(20, 200), "digest")
    # Mirroring would change the poses, which are numbers here.
    monkeypatch.setattr(mtfl, "cut_out", lambda faces, extent, rng: faces)

    def run(options, method, part, seed, tick, callbacks):
        training, testing = part
        seen.append((training.pose // 10, testing.pose // 10, options))
        errors = {"landmarks": 0.2, "pose": 0.4}
        return {"errors": errors, "weights": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, mtfl.EXPERIMENT, parts, run)
    return Case("trn", ["--data", "x"], seen, 100, 0.3)
