"""The experiment on how well kernels compress, on generated digits."""

import numpy as np
import pytest
from test_digits import write_folder

from applications import compression, mnist
from dmtrl_keras import factorization_report, factorize, task_layers


def test_parts():
    """All images once in an epoch, cut where the kernels are looked at."""
    images = np.arange(12)
    parts = list(compression.in_parts(images, -images, [2.0, 0.5, 1.0], 3, 0))
    assert [epochs for epochs, *_ in parts] == [0.5, 1.0, 2.0]
    assert [len(x) for _, x, _ in parts] == [6, 6, 12]
    for _, x, y in parts:
        np.testing.assert_array_equal(x, -y)
    first = np.concatenate([parts[0][1], parts[1][1]])
    assert sorted(first) == sorted(parts[2][1]) == list(range(12))


@pytest.mark.filterwarnings("ignore:.*multiples of each other")
@pytest.mark.parametrize("threshold", compression.THRESHOLDS)
def test_kept_is_what_factorize_keeps(threshold, rng):
    """Of LAF and Tucker exactly; of TT at least as much."""
    model = mnist.lenet(0, "valid", 8)
    for layer in task_layers(model):
        kernel = layer.stacked.factors["kernel"]
        kernel.assign(kernel + 0.02 * rng.normal(size=kernel.shape))
    found = compression.kept(model, 0.2)[threshold]
    for name, share in found.items():
        new = factorize(
            model, name.lower(), tolerance=0.2, threshold=threshold, verbose=False
        )
        report = factorization_report(new)
        before = sum(entry.parameters_before for entry in report)
        own = sum(entry.parameters_after for entry in report) / before
        if name == "TT":
            assert own - 0.02 <= share <= own + 0.1
        else:
            assert share == pytest.approx(own)


@pytest.mark.usefixtures("steps_as_users")
def test_command(tmp_path, rng):
    """A row for each training and number of epochs, from images that are not seen."""
    write_folder(tmp_path, rng, train=90)
    page = tmp_path / "page.md"
    name = "mnist-compression"
    page.write_text(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n")
    arguments = ["--data", str(tmp_path), "--fraction", "0.0005", "--padding", "valid"]
    arguments += ["--fc", "8", "--validation", "20", "--after", "1", "0.5"]
    arguments += ["--repeats", "2", "--methods", "adam", "sgd-decay"]
    arguments += ["--output", str(tmp_path / "results"), "--page", str(page)]
    frame = compression.main(arguments)[name]
    assert list(frame["Training"]) == ["Adam"] * 2 + ["SGD, weight decay"] * 2
    assert list(frame["Epochs"]) == ["0.5", "1"] * 2
    assert list(frame["Runs"]) == [2] * 4
    assert page.read_text().count("SGD, weight decay") == 2
    assert compression.main(arguments)[name].equals(frame)
    options = compression.parse(arguments)
    part = compression.Compression().draw(options, mnist.load_digits(str(tmp_path)), 3)
    both = [x.reshape(len(x), -1) for x in (part.train_images, part.test_images)]
    assert len(np.unique(np.concatenate(both), axis=0)) == 30 + 20
