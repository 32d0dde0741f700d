"""Data sets of several domains with the same classes: image folders, and features."""

import pathlib
import typing

import keras
import numpy as np

from .reading import DataError, check_labels, read_arrays, read_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


class Domain(typing.NamedTuple):
    """One domain, which is one task.

    Attributes:
        x: features `(n, d)` float32, or images `(n, height, width, 3)` uint8.
        labels: ints `(n,)`, indices of the classes.
    """

    x: np.ndarray
    labels: np.ndarray


def load_images(folder, size, domains=None):
    """Images in one folder for each domain and class, `domain/class/image.jpg`.

    That is the layout of Office-31, Office-Caltech-10, Office-Home and ImageCLEF-DA.

    Args:
        folder: path.
        size: int; images are scaled so that the shorter side has this many pixels, and
            the centre is cut out.
        domains: names of the domains to read; None: all folders.

    Returns:
        `(domains, classes)`: a dict from name to `Domain`, and the names of the classes.

    Raises:
        FileNotFoundError: if there is no such folder, domain or image.
        DataError: if the domains have different classes, or an image can't be read.
    """
    folder = _existing(folder)
    names = _chosen(folder, _folders(folder), domains)
    classes = _common_classes(folder, {name: _folders(folder / name) for name in names})
    found = {}
    for name in names:
        images, labels = [], []
        for label, kind in enumerate(classes):
            paths = sorted((folder / name / kind).rglob("*"))
            for path in (p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES):
                images.append(_image(path, size))
                labels.append(label)
        if not images:
            raise FileNotFoundError(
                f"Domain {name!r} of {folder} has no images ({', '.join(IMAGE_SUFFIXES)})."
            )
        found[name] = Domain(np.stack(images), np.array(labels))
    return found, classes


def _folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _image(path, size):
    array = np.asarray(read_image(path).convert("RGB"), "float32")
    array = keras.preprocessing.image.smart_resize(array, (size, size), "bicubic")
    return np.clip(np.rint(np.asarray(array)), 0, 255).astype("uint8")


def load_features(folder, domains=None):
    """Precomputed features, one `.npz` file for each domain.

    A file has `features` `(n, d)`, `labels` `(n,)` from 0 on and, if it likes, the names of
    the `classes`; without them, every class has a label. The domain is named by the file,
    without a prefix that all files have: `lite0_amazon.npz` and `lite0_webcam.npz` are
    `amazon` and `webcam`.

    Args:
        folder: path.
        domains: names of the domains to read; None: all files.

    Returns:
        As `load_images`.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        DataError: on malformed files, on different classes or numbers of features.
    """
    folder = _existing(folder)
    stems = sorted(path.stem for path in folder.glob("*.npz"))
    heads = {stem.partition("_")[:2] for stem in stems}
    prefix = "".join(heads.pop()) if len(stems) > 1 == len(heads) else ""
    names = _chosen(folder, [stem[len(prefix) :] for stem in stems], domains)
    found, classes = {}, {}
    for name in names:
        path = folder / f"{prefix}{name}.npz"
        found[name], classes[name] = _domain(path)
    sizes = {name: domain.x.shape[1] for name, domain in found.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{folder}: expected features of one length. Received: {sizes}.")
    return found, _common_classes(folder, classes)


def _domain(path):
    """The features in one file, and the names of the classes."""
    arrays = read_arrays(path, "features", "labels", "classes")
    if not {"features", "labels"} <= set(arrays):
        raise DataError(f"{path}: expected arrays 'features' and 'labels'.")
    x, labels = arrays["features"], arrays["labels"]
    with np.errstate(over="ignore"):
        x = x.astype("float32") if x.dtype.kind in "biuf" else np.full(x.shape, np.nan)
    if x.ndim != 2 or labels.shape != x.shape[:1] or not x.size or not np.isfinite(x).all():
        raise DataError(
            f"{path}: expected finite features (n, d) and labels (n,). "
            f"Received: {x.shape} of {arrays['features'].dtype}, and {labels.shape}."
        )
    kinds = arrays.get("classes", np.arange(len(np.unique(labels))))
    names = [str(kind) for kind in np.ravel(kinds)]
    if kinds.ndim != 1 or len(set(names)) < len(names):
        raise DataError(f"{path}: expected 'classes' (n,) of different names.")
    return Domain(x, check_labels(path, labels, range(len(names)))), names


def _existing(folder):
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    return folder


def _chosen(folder, available, domains):
    missing = [name for name in domains or () if name not in available]
    if missing or not available:
        raise FileNotFoundError(
            f"{folder}: expected the domains {missing or '(one at least)'}. "
            f"Found: {available}."
        )
    return list(domains or available)


def _common_classes(folder, classes):
    first, *others = classes.items()
    for name, own in others:
        if own != first[1]:
            different = sorted(set(own) ^ set(first[1]))
            raise DataError(
                f"{folder}: the domains must have the same classes, but {first[0]!r} and "
                f"{name!r} differ: {different or 'another order'}."
            )
    return list(first[1])


def with_shifted_labels(domains, name, shift, classes):
    """The same domains, but that one of them contradicts the others.

    Its labels are permuted by a shift, `label + shift` modulo the classes: what it
    has to learn is as hard as before, and wrong for every other domain.

    Args:
        domains: dict from name to `Domain`.
        name: the domain whose labels are shifted.
        shift: int.
        classes: int, their number.

    Returns:
        A dict like `domains`.

    Raises:
        DataError: if there is no such domain, or the shift leaves its labels as they are.
    """
    if name not in domains:
        raise DataError(f"--outlier: expected one of {list(domains)}. Received: {name!r}.")
    if not shift % classes:
        raise DataError(
            f"--shift: expected an int that {classes}, the number of classes, does not "
            f"divide. Received: {shift}."
        )
    own = domains[name]
    return {**domains, name: own._replace(labels=(own.labels + shift) % classes)}


def draw(domains, fraction, seed, stratified=False):
    """A random training part of each domain; the rest is for testing.

    Args:
        domains: dict from name to `Domain`.
        fraction: float in (0, 1), of every domain.
        seed: int.
        stratified: bool; the fraction of every class, one image of it at least, or (as in
            the paper) of the domain as a whole.

    Returns:
        A dict from name to `(train, test)`, arrays of indices.

    Raises:
        DataError: if a domain has nothing left for testing.
    """
    parts = {}
    for number, (name, domain) in enumerate(domains.items()):
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(len(domain.labels))
        if stratified:
            kinds = domain.labels[order]
            train = np.concatenate(
                [_share(order[kinds == kind], fraction) for kind in np.unique(kinds)]
            )
        else:
            train = _share(order, fraction)
        test = np.setdiff1d(order, train)
        if not len(test):
            raise DataError(
                f"Domain {name!r} has {len(order)} examples: with a fraction of {fraction} "
                "none is left for testing."
            )
        parts[name] = train, test
    return parts


def without_classes(parts, domains, count, seed):
    """The same parts, but that some classes have no training example in each domain.

    Which ones is drawn by domain, so that (where there are enough) each class is known
    to some other domain. Test parts stay whole.

    Args:
        parts: dict as from `draw`.
        domains: dict from name to `Domain`.
        count: int, how many classes each domain lacks.
        seed: int.

    Returns:
        A dict like `parts`.

    Raises:
        DataError: if a domain has no example left.
    """
    classes = 1 + max(int(domain.labels.max()) for domain in domains.values())
    order = np.random.default_rng(seed).permutation(classes)
    found = {}
    for number, (name, (train, test)) in enumerate(parts.items()):
        missing = order[(number * count + np.arange(count)) % classes]
        left = train[~np.isin(domains[name].labels[train], missing)]
        if not len(left):
            raise DataError(
                f"--missing-classes {count}: domain {name!r} has no example of the others "
                f"among its {len(train)} for training."
            )
        found[name] = left, test
    return found


def _share(order, fraction):
    return order[: max(1, round(fraction * len(order)))]
