"""The attributes of CelebA as tasks: the experiments of Task Relation Networks.

Li et al., "Task Relation Networks" (WACV 2019). Figure 3 and section 4.2.1: the largest
canonical correlation of the labels of each pair of the 40 attributes, which for binary
labels is the absolute correlation. It needs the labels only, `list_attr_celeba.txt`.
Tables 2 and 3: the attributes are classified by ResNet-18, by a network for each (`stl`),
with a common trunk (`mtl`), and with the outputs held to the similarity of the labels
(`trn`), all 40 together in two groups of 20, or two by two.

    python -m applications.celeba --similarity --data FOLDER
    python -m applications.celeba --classification --data FOLDER
"""

import contextlib
import functools
import pathlib
import typing

import keras
import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    plot_heat_map,
    task_similarity,
    task_similarity_matrix,
)
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.layers import TaskDense, TaskSplit

from .arguments import MOMENTUM, add_images, real, whole, whole_batches
from .experiment import (
    Experiment,
    Table,
    decaying,
    digest_of,
    ticking,
    timed,
    trainable_parameters,
)
from .files import write
from .reading import MOST_TEXT, DataError, check_size, open_zip, reading, reason, shortened
from .resnet import resnet18
from .results import mean_and_spread

LABELS, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
PARTS = ("train", "validation", "test")
METHODS = {"stl": "STL", "mtl": "MTL", "trn": "TRN"}
# Those of the paper's Table 3.
PAIRS = (
    ("Wearing_Hat", "Bald"),
    ("Mustache", "Goatee"),
    ("Sideburns", "No_Beard"),
    ("Sideburns", "Arched_Eyebrows"),
    ("Male", "Bags_Under_Eyes"),
)


def load_attributes(path):
    """The labels of CelebA's attributes.

    Args:
        path: the file `list_attr_celeba.txt`, a folder that has it somewhere, or a zip file
            that has it.

    Returns:
        A data frame of int8 zeros and ones, one column for each attribute, the file names
        of the images as index.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is not in the form of CelebA's.
    """
    path = pathlib.Path(path)
    if path.suffix == ".zip" and path.is_file():
        with open_zip(path) as archive:
            names = [n for n in archive.namelist() if pathlib.PurePath(n).name == LABELS]
            if not names:
                raise FileNotFoundError(f"{path} has no {LABELS}.")
            check_size(path, archive.getinfo(names[0]).file_size, MOST_TEXT)
            with reading(path), archive.open(names[0]) as file:
                return _read(file)
    if path.is_dir():
        files = sorted(path.rglob(LABELS))
        if not files:
            raise FileNotFoundError(f"The folder {path} has no {LABELS}.")
        path = files[0]
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    with reading(path), path.open("rb") as file:
        check_size(path, path.stat().st_size, MOST_TEXT)
        return _read(file)


def _read(file):
    try:
        count = int(file.readline(100))
        frame = pd.read_csv(file, sep=r"\s+")
        labels = frame.to_numpy("float64")
    except ValueError as error:
        raise DataError(
            "expected a number of images, a line of attribute names, and a line of a file "
            f"name and 1 or -1 for each attribute ({reason(error)})."
        ) from error
    if len(frame) != count or not count or not np.all(np.abs(labels) == 1):
        raise DataError(
            f"expected {count} lines of 1 and -1, as its first line says, and some. "
            f"Received: {len(frame)} lines, values {np.unique(labels)[:5].tolist()}."
        )
    names = frame.index
    if not all(isinstance(name, str) for name in names) or not names.is_unique:
        raise DataError(
            "expected a file name before the labels in each line, all of them different. "
            f"Received: {shortened(str(names[:3].tolist()))}."
        )
    return (frame > 0).astype("int8")


def similarity_table(matrix, names, count):
    """The most and the least similar pairs.

    Args:
        matrix: array `(T, T)`.
        names: list of T strings.
        count: int, how many pairs of each kind.

    Returns:
        A data frame, the most similar pair first.
    """
    first, second = np.triu_indices(len(names), 1)
    pairs = pd.DataFrame(
        {
            "Attribute": np.take(names, first),
            "Other attribute": np.take(names, second),
            "Similarity": matrix[first, second],
        }
    ).sort_values("Similarity", ascending=False, kind="stable")
    if len(pairs) > 2 * count:
        pairs = pd.concat([pairs.head(count), pairs.tail(count)])
    return pairs.assign(Similarity=pairs["Similarity"].map("{:.4f}".format))


class Images(typing.NamedTuple):
    """One part of CelebA.

    Attributes:
        paths: array of n paths of images; or None.
        labels: data frame of n rows of zeros and ones, a column for each attribute.
        images: uint8 `(n, size, size, 3)`; or None, then they are read from `paths`.
    """

    paths: np.ndarray | None
    labels: pd.DataFrame
    images: np.ndarray | None


def load_images(data, size, limit=None):
    """The training, validation and test part of CelebA, with images.

    Args:
        data: a folder that somewhere has `list_attr_celeba.txt`, `list_eval_partition.txt`
            and the images that they name (the aligned and cropped version); or
            `"tfds"`, for `celeb_a` of TensorFlow Datasets.
        size: int, side of the images.
        limit: int, at most so many of each part; None: all.

    Returns:
        A dict from `"train"`, `"validation"` and `"test"` to `Images`.

    Raises:
        FileNotFoundError: if a list or an image is not there.
        DataError: if a list is not in the form of CelebA's, or a part is empty.
    """
    if str(data) == "tfds":
        return _from_tfds(size, limit)
    folder = pathlib.Path(data)
    labels = load_attributes(folder)
    lists = sorted(folder.rglob(PARTITION))
    if not lists:
        raise FileNotFoundError(f"The folder {folder} has no {PARTITION}.")
    with reading(lists[0]):
        check_size(lists[0], lists[0].stat().st_size, MOST_TEXT)
        parts = pd.read_csv(lists[0], sep=r"\s+", header=None, names=["image", "part"])
        parts = parts.set_index("image")["part"].reindex(labels.index)
    if not parts.isin([0, 1, 2]).all():
        raise DataError(
            f"{lists[0]}: expected a part (0, 1 or 2) for each of {len(labels)} images. "
            f"Received: {int(parts.isin([0, 1, 2]).sum())} of them."
        )
    with reading(lists[0]):
        first = sorted(folder.rglob(labels.index[0]))
    if not first:
        raise FileNotFoundError(f"The folder {folder} has no image {labels.index[0]}.")
    found = {}
    for number, name in enumerate(PARTS):
        chosen = labels[parts == number][:limit]
        paths = np.array([str(first[0].parent / image) for image in chosen.index])
        absent = [path for path in paths if not pathlib.Path(path).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} images are not there, the first is {absent[0]}."
            )
        if not len(paths):
            raise DataError(f"{lists[0]}: the {name} part is empty.")
        found[name] = Images(paths, chosen.reset_index(drop=True), None)
    return found


def _from_tfds(size, limit):
    """Each part in memory, scaled."""
    import tensorflow_datasets as tfds

    found = {}
    for name in PARTS:
        images, labels = [], []
        split = name if limit is None else f"{name}[:{limit}]"
        with reading("tfds:celeb_a"):
            for example in tfds.as_numpy(tfds.load("celeb_a", split=split)):
                images.append(keras.utils.array_to_img(example["image"], scale=False))
                labels.append({key: int(v) for key, v in example["attributes"].items()})
        images = [np.asarray(image.resize((size, size)), "uint8") for image in images]
        found[name] = Images(None, pd.DataFrame(labels).astype("int8"), np.stack(images))
    return found


def stream(part, names, size, batch_size, seed=None, count=None):
    """Batches of images and labels, a `tf.data.Dataset`.

    Args:
        part: `Images`.
        names: list of attributes.
        size: int, side of the images.
        batch_size: int.
        seed: int, to shuffle; None: in order.
        count: int, how many examples of each pass are used; None: all.
    """
    tf = tensorflow()
    labels = {name: part.labels[name].to_numpy("float32")[:, None] for name in names}

    def read(path, labels):
        image = _decoded(path)
        image = tf.image.resize(image, (size, size), antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), "uint8"), labels

    source = part.paths if part.images is None else part.images
    data = tf.data.Dataset.from_tensor_slices((source, labels))
    if seed is not None:
        data = data.shuffle(min(len(source), 50_000), seed, True)
    if count is not None:
        data = data.take(count)
    if part.images is None:
        data = data.map(read, tf.data.AUTOTUNE)
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def _decoded(path):
    tf = tensorflow()
    return tf.image.decode_jpeg(tf.io.read_file(path), 3)


@contextlib.contextmanager
def _naming_images(parts):
    """Name the image that can't be read, which TensorFlow doesn't.

    Raises:
        DataError: instead of an error of TensorFlow, if there is such an image.
    """
    try:
        yield
    except tensorflow().errors.OpError:
        for part in parts.values():
            for path in () if part.paths is None else part.paths:
                with reading(path, "this image"):
                    _decoded(path)
        raise


def make_network(names, size, width):
    """ResNet-18 whose five stages all tasks share, with a classifier for each.

    Args:
        names: list of attributes.
        size: int, side of the images.
        width: int, filters of the first stage.

    Returns:
        A `MultiTaskModel` with logits `(batch, 1)` of each attribute.
    """
    images = keras.Input((size, size, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1, name="rescaling")(images)
    x = resnet18(x, width, name="trunk")
    x = keras.layers.GlobalAveragePooling2D(name="hidden")(x)
    x = TaskDense(1, len(names), shared_input=True, name="classifier")(x)
    return MultiTaskModel(images, TaskSplit(names, name="split")(x))


def train_and_test(options, method, names, parts, seed, tick, callbacks=None):
    """Train and test one network.

    Args:
        options: the command's.
        method: `"stl"`, `"mtl"` or `"trn"`.
        names: list of attributes; `stl` has one.
        parts: as from `load_images`.
        seed: int.
        tick: function without arguments, called after each epoch.
        callbacks: None, or Keras callbacks that see the loss on the test part (`val_loss`).

    Returns:
        A dict of the error and the average precision of each attribute on the test
        part, the number of weights, and the seconds of training.
    """
    with timed(seed) as took:
        model = make_network(names, options.size, options.width)
        if method == "trn":
            # Two attributes are two tasks, more are the paper's two groups.
            half = len(names) // 2
            groups = {"first": names[:half], "second": names[half:]}
            relation = Relation("output", options.weight, groups=groups)
            model = TaskRelationModel(model, relation, momentum=options.momentum)
        count = whole_batches(options, len(parts["train"].labels))
        train = stream(parts["train"], names, options.size, options.batch_size, seed, count)
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        weights = {name: options.loss_weights.get(name, 1.0) for name in names}
        optimizer = decaying(options, len(train) * options.epochs)
        model.compile(optimizer, loss, loss_weights=weights)
        testing = stream(parts["test"], names, options.size, 256)
        with _naming_images(parts):
            model.fit(
                train,
                validation_data=None if callbacks is None else testing,
                epochs=options.epochs,
                verbose=0,
                shuffle=False,
                callbacks=ticking(tick, callbacks),
            )
    with _naming_images(parts):
        logits = model.predict(testing, verbose=0)
    labels = parts["test"].labels
    return {
        "error": {
            name: float(np.mean((logits[name][:, 0] > 0) != labels[name])) for name in names
        },
        "precision": {
            name: float(average_precision_score(labels[name], logits[name][:, 0]))
            for name in names
        },
        "parameters": trainable_parameters(model),
        "seconds": took.seconds,
    }


def table_2(runs, names):
    """Mean error and average precision over all attributes, a data frame of strings."""
    rows = []
    for method in METHODS:
        chosen = runs[runs["method"] == method]
        if method != "stl":
            chosen = chosen[[sorted(a) == sorted(names) for a in chosen["attributes"]]]
        means = {"error": [], "precision": []}
        for _, group in chosen.groupby("seed"):
            for key, values in means.items():
                # With a network for each attribute, all of them together.
                found = {k: v for row in group[key] for k, v in row.items()}
                if set(found) >= set(names):
                    values.append(100 * np.mean([found[name] for name in names]))
        if means["error"]:
            rows.append(
                {
                    "Method": METHODS[method],
                    "Mean error %": mean_and_spread(means["error"]),
                    "Mean AP %": mean_and_spread(means["precision"]),
                    "Runs": len(means["error"]),
                }
            )
    return pd.DataFrame(rows)


def table_3(runs, labels):
    """Average precision of pairs of attributes, a data frame of strings."""
    rows = []
    for pair in PAIRS:
        similarity = task_similarity(*(labels[name].to_numpy() for name in pair))
        row = {"Attributes": ", ".join(pair), "τ labels": f"{similarity:.3f}"}
        for number, name in enumerate(pair, start=1):
            for method in METHODS:
                found = [
                    100 * result["precision"][name]
                    for _, result in runs[runs["method"] == method].iterrows()
                    if result["attributes"] in ([name], list(pair))
                ]
                text = mean_and_spread(found) if found else "-"
                row[f"AP {number} {METHODS[method]} %"] = text
        rows.append(row)
    return pd.DataFrame(rows)


class Celeba(Experiment):
    """Attributes of faces; CelebA has a validation part of its own."""

    name = "celeba"
    description = "CelebA's attributes as tasks."
    methods = METHODS
    default_methods = ("mtl", "trn")
    # A network for each attribute is no one network.
    searched = ("mtl", "trn")
    defaults = {
        "epochs": 10,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "repeats": 1,
        "optimizer": "adam",
    }
    least = {"batch_size": 2}
    settings = ("size", "width", "epochs", "batch_size", "learning_rate", "images")
    settings += ("optimizer", "loss_weights")
    families = {"hard": "mtl"}
    objectives = Experiment.objectives | {"precision": "max"}
    data_argument = {
        "required": True,
        "help": f"{LABELS}, or a folder or zip file that has it; for classification a "
        "folder that has the images too, or 'tfds'",
    }

    def add_arguments(self, p):
        what = p.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "--similarity",
            action="store_true",
            help="of the labels of all pairs of attributes: the paper's Figure 3",
        )
        what.add_argument(
            "--classification",
            action="store_true",
            help="STL, MTL and TRN on the images: the paper's Tables 2 and 3",
        )
        p.add_argument("--attributes", nargs="+", help="those to compare; all by default")
        p.add_argument("--pairs", type=whole(1), default=10, help="to print")
        c = p.add_argument_group("classification")
        c.add_argument("--tables", nargs="+", type=whole(2, 3), default=[2, 3])
        c.add_argument("--images", type=whole(2), help="of each part; all by default")
        add_images(c, 64)
        c.add_argument("--weight", type=real(least=0), default=0.01, help="λ")
        c.add_argument("--momentum", type=MOMENTUM, default=0.99, help="of the covariances")

    def mode(self, options):
        return Similarity() if options.similarity else self

    def load(self, options, console):
        """The parts, with images."""
        parts = load_images(options.data, options.size, options.images)
        labels = parts["train"].labels
        _checked(options.attributes, labels)
        absent = {name for pair in PAIRS for name in pair} - set(labels)
        if 3 in options.tables and absent:
            raise DataError(f"Table 3 needs the attributes {sorted(absent)} too.")
        return parts

    def tasks(self, options, data=None):
        return options.attributes or self.weighted(options, data)

    def weighted(self, options, data=None):
        return None if data is None else list(data()["train"].labels)

    def plan(self, options, parts):
        """All attributes together (Table 2), and pairs (Table 3)."""
        every = list(parts["train"].labels)
        groups = [options.attributes or every] if 2 in options.tables else []
        groups += PAIRS if 3 in options.tables else []
        digest = digest_of(part.labels for part in parts.values())
        runs = {}
        for _, seed, names, method in self.by_seed(options, groups, options.methods):
            for group in [[name] for name in names] if method == "stl" else [list(names)]:
                own = {"attributes": group, "data": digest, "seed": seed}
                if method == "trn":
                    own |= {"weight": options.weight, "momentum": options.momentum}
                some = ", ".join(group) if len(group) < 3 else f"{len(group)} attributes"
                run = self.planned(
                    f"{some}, seed {seed}",
                    options,
                    method,
                    functools.partial(self.draw, options, parts, seed, group),
                    seed,
                    own,
                )
                # An attribute in two pairs is learned alone once.
                runs.setdefault(run.title, run)
        return runs.values()

    def draw(self, options, parts, seed, names=None):
        return parts, names or self.tasks(options, lambda: parts)

    def hold_out(self, part, options, share, seed):
        parts, names = part
        return {**parts, "test": parts["validation"]}, names

    def run(self, options, method, part, seed, tick, callbacks=None):
        parts, names = part
        return train_and_test(options, method, names, parts, seed, tick, callbacks)

    def describe(self, found):
        error, precision = (
            np.mean(list(found[name].values())) for name in ("error", "precision")
        )
        return f"mean error {error:.2%}, mean AP {precision:.2%}"

    def search_arguments(self, arguments):
        needed = [] if "--classification" in arguments else ["--classification"]
        return [*needed, "--tables", "2", *arguments]

    def scores(self, found):
        return {
            name: float(np.mean(list(found[name].values())))
            for name in ("error", "precision")
        }

    def space(self, method, options, space):
        if method != "trn":
            return {}
        weights, momentum = space.relation({"output": options.weight}, options.momentum)
        return {"weight": weights["output"], "momentum": momentum}

    def blocks(self, options):
        return [f"celeba-table-{number}" for number in options.tables]

    def tables(self, options, parts, runs):
        labels = parts["train"].labels
        found = {}
        if 2 in options.tables:
            frame = table_2(runs, options.attributes or list(labels))
            found["celeba-table-2"] = Table("Table 2", frame, "table_2")
        if 3 in options.tables:
            found["celeba-table-3"] = Table("Table 3", table_3(runs, labels), "table_3")
        return found


class Similarity(Celeba):
    """The labels of the attributes, compared pair by pair."""

    def weighted(self, options, data=None):
        """Nothing is trained."""

    def blocks(self, options):
        return ["celeba-pairs"]

    def load(self, options, console):
        """A data frame of labels."""
        labels = load_attributes(options.data)
        _checked(options.attributes, labels)
        return labels if options.attributes is None else labels[options.attributes]

    def find(self, options, labels, console):
        """The matrix of similarities, a data frame."""
        matrix = task_similarity_matrix(labels.to_numpy())
        return pd.DataFrame(matrix, list(labels), list(labels))

    def tables(self, options, labels, matrix):
        write(options.output / "similarity.csv", matrix.to_csv())
        frame = similarity_table(matrix.to_numpy(), list(labels), options.pairs)
        title = f"Similarity of attributes over {len(labels):,} images"
        return {"celeba-pairs": Table(title, frame, "pairs", keys=2)}

    def figures(self, options, labels, matrix):
        path = options.output / "similarity.png"
        plot_heat_map(matrix.to_numpy(), list(matrix), path, limits=(0, 1))
        return [path]


def _checked(attributes, labels):
    if attributes is not None and (
        not set(attributes) <= set(labels)
        or not 1 < len(set(attributes)) == len(attributes)
    ):
        raise DataError(
            f"--attributes: expected two at least of {list(labels)}, each once. "
            f"Received: {attributes}."
        )


EXPERIMENT = Celeba()
parse, main = EXPERIMENT.parse, EXPERIMENT.main

if __name__ == "__main__":
    main()
