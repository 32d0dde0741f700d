"""Image folders and feature files of several domains."""

import keras
import numpy as np
import pytest

from applications.domains import (
    Domain,
    draw,
    load_features,
    load_images,
    with_shifted_labels,
    without_classes,
)
from applications.reading import DataError

CLASSES = ["bike", "mug"]


def write_images(folder, rng, domains=("amazon", "dslr"), per_class=3, size=(24, 16)):
    """A tree of real image files."""
    for domain in domains:
        for kind in CLASSES:
            path = folder / domain / kind
            path.mkdir(parents=True)
            for number in range(per_class):
                image = rng.integers(256, size=(*size, 3)).astype("uint8")
                keras.utils.save_img(path / f"{number}.png", image, scale=False)
    return folder


def write_features(folder, rng, sizes=None, features=6, prefix="net_"):
    """Feature files whose classes are apart, the same way in all domains."""
    centres = np.random.default_rng(1).normal(size=(2, features)) * 3
    for name, size in (sizes or {"amazon": 40, "dslr": 20}).items():
        labels = np.arange(size) % 2
        x = centres[labels] + rng.normal(size=(size, features))
        np.savez(
            folder / f"{prefix}{name}.npz",
            features=x.astype("float32"),
            labels=labels.astype("int32"),
            classes=np.array(CLASSES),
        )
    return folder


def test_images(tmp_path, rng):
    """Scaled by the shorter side and cut; labels by the order of the classes."""
    write_images(tmp_path, rng)
    domains, classes = load_images(tmp_path, 8)
    assert list(domains) == ["amazon", "dslr"] and classes == CLASSES
    images, labels = domains["dslr"]
    assert images.shape == (6, 8, 8, 3) and images.dtype == "uint8"
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    same, _ = load_images(tmp_path, 16, ["dslr"])
    whole = keras.utils.img_to_array(keras.utils.load_img(tmp_path / "dslr/mug/0.png"))
    np.testing.assert_array_equal(same["dslr"].x[3], whole[4:20])


def test_shifted_labels():
    """Of one domain, modulo the classes; the others are as they were."""
    domains = {name: Domain(np.zeros((3, 2)), np.array([0, 2, 3])) for name in "ab"}
    found = with_shifted_labels(domains, "b", 3, 5)
    assert found["b"].labels.tolist() == [3, 0, 1] and found["a"] is domains["a"]
    assert domains["b"].labels.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match=r"--outlier: .*\['a', 'b'\].*'c'"):
        with_shifted_labels(domains, "c", 3, 5)
    with pytest.raises(ValueError, match=r"--shift: .*that 5.*Received: 10"):
        with_shifted_labels(domains, "a", 10, 5)


def test_features(tmp_path, rng):
    """A file for each domain; the common prefix is no part of its name."""
    domains, classes = load_features(write_features(tmp_path, rng))
    assert list(domains) == ["amazon", "dslr"] and classes == CLASSES
    assert domains["dslr"].x.shape == (20, 6) and domains["dslr"].x.dtype == "float32"
    assert list(load_features(tmp_path, ["dslr"])[0]) == ["dslr"]
    other = tmp_path / "other"
    other.mkdir()
    write_features(other, rng, prefix="")
    assert list(load_features(other)[0]) == ["amazon", "dslr"]


def test_real_features(data_dir):
    """Those of Office-Caltech-10."""
    domains, classes = load_features(data_dir / "office_caltech10_features")
    sizes = {name: len(domain.labels) for name, domain in domains.items()}
    assert sizes == {"amazon": 958, "caltech10": 1123, "dslr": 157, "webcam": 295}
    assert len(classes) == 10 and classes[0] == "backpack"


def test_draws(rng):
    """Random, the same for the same seed, of the domain or of each class."""
    labels = np.repeat([0, 1], [90, 10])
    domains = {
        "a": Domain(np.zeros((100, 1)), labels),
        "b": Domain(np.zeros((50, 1)), np.zeros(50, int)),
    }
    first, again, other = (draw(domains, 0.1, seed) for seed in (0, 0, 1))
    for name, size in (("a", 100), ("b", 50)):
        train, test = first[name]
        assert len(train) == size // 10
        assert sorted([*train, *test]) == list(range(size))
        np.testing.assert_array_equal(train, again[name][0])
        assert not np.array_equal(train, other[name][0])
    train, _ = draw(domains, 0.05, 0, stratified=True)["a"]
    assert np.bincount(labels[train]).tolist() == [4, 1]
    with pytest.raises(ValueError, match=r"'a' has 1 examples.*none is left"):
        draw({"a": Domain(np.zeros((1, 1)), np.zeros(1))}, 0.5, 0)


def test_errors(tmp_path, rng):
    """They name the file or folder."""
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_images(tmp_path / "absent", 8)
    with pytest.raises(FileNotFoundError, match=r"\(one at least\)"):
        load_features(tmp_path)
    write_images(tmp_path, rng)
    with pytest.raises(FileNotFoundError, match=r"\['webcam'\].*\['amazon', 'dslr'\]"):
        load_images(tmp_path, 8, ["amazon", "webcam"])
    broken = tmp_path / "dslr" / "mug" / "0.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png: this image can't be read"):
        load_images(tmp_path, 8)
    (tmp_path / "dslr" / "pen").mkdir()
    with pytest.raises(ValueError, match=r"'amazon' and 'dslr' differ: \['pen'\]"):
        load_images(tmp_path, 8)
    empty = tmp_path / "empty"
    (empty / "a" / "bike").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"'a' .* has no images"):
        load_images(empty, 8)
    folder = tmp_path / "features"
    folder.mkdir()
    np.savez(folder / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz: expected arrays 'features'"):
        load_features(folder)
    np.savez(folder / "a.npz", features=np.full((2, 3), np.nan), labels=np.zeros(2))
    with pytest.raises(ValueError, match="finite features"):
        load_features(folder)
    (folder / "a.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"a\.npz: it can't be read"):
        load_features(folder)
    np.savez(folder / "a.npz", features=np.ones((2, 3)), labels=np.arange(2))
    np.savez(folder / "b.npz", features=np.ones((2, 4)), labels=np.arange(2))
    with pytest.raises(ValueError, match="features of one length"):
        load_features(folder)


def test_without_classes():
    """Each domain lacks its own classes in training, and no test example."""
    labels = np.repeat(np.arange(6), 4)
    domains = {n: Domain(np.zeros((24, 2)), labels) for n in ("a", "b", "c")}
    parts = draw(domains, 0.5, 0, stratified=True)
    found = without_classes(parts, domains, 2, 1)
    lacking = {}
    for name, (train, test) in found.items():
        np.testing.assert_array_equal(test, parts[name][1])
        lacking[name] = set(range(6)) - set(labels[train])
        assert len(lacking[name]) == 2
        assert set(train) == {i for i in parts[name][0] if labels[i] not in lacking[name]}
    assert set.union(*lacking.values()) == set(range(6))
    with pytest.raises(DataError, match="--missing-classes 6: domain 'a' has no example"):
        without_classes(parts, domains, 6, 1)
