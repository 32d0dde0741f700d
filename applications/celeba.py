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

import argparse
import hashlib
import itertools
import pathlib
import time
import typing
import zipfile

import keras
import numpy as np
import pandas as pd
from rich.console import Console
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

from .experiment import (
    OPTIMIZERS,
    Results,
    Run,
    add_training,
    check_names,
    in_range,
    markdown_table,
    mean_and_spread,
    parse_arguments,
    rich_table,
    run_all,
    trainable_parameters,
    whole_batches,
)
from .resnet import resnet18

LABELS, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
PARTS = ("train", "validation", "test")
METHODS = ("stl", "mtl", "trn")
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
        ValueError: if it is not in the form of CelebA's.
    """
    path = pathlib.Path(path)
    if path.suffix == ".zip" and path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(LABELS)]
            if not names:
                raise FileNotFoundError(f"{path} has no {LABELS}.")
            with archive.open(names[0]) as file:
                return _read(file, path)
    if path.is_dir():
        files = sorted(path.rglob(LABELS))
        if not files:
            raise FileNotFoundError(f"The folder {path} has no {LABELS}.")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        return _read(file, path)


def _read(file, path):
    try:
        count = int(file.readline())
        frame = pd.read_csv(file, sep=r"\s+")
        labels = frame.to_numpy("int8")
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a number of images, a line of attribute names, and a line "
            f"of a file name and 1 or -1 for each attribute ({error})."
        ) from error
    if len(frame) != count or not np.all(np.abs(labels) == 1):
        raise ValueError(
            f"{path}: expected {count} lines of 1 and -1, as its first line says. "
            f"Received: {len(frame)} lines, values {np.unique(labels)[:5].tolist()}."
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
        ValueError: if a list is not in the form of CelebA's, or a part is empty.
    """
    if str(data) == "tfds":
        return _from_tfds(size, limit)
    folder = pathlib.Path(data)
    labels = load_attributes(folder)
    lists = sorted(folder.rglob(PARTITION))
    if not lists:
        raise FileNotFoundError(f"The folder {folder} has no {PARTITION}.")
    parts = pd.read_csv(lists[0], sep=r"\s+", header=None, names=["image", "part"])
    parts = parts.set_index("image")["part"].reindex(labels.index)
    if not parts.isin([0, 1, 2]).all():
        raise ValueError(
            f"{lists[0]}: expected a part (0, 1 or 2) for each of {len(labels)} images. "
            f"Received: {int(parts.isin([0, 1, 2]).sum())} of them."
        )
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
            raise ValueError(f"{lists[0]}: the {name} part is empty.")
        found[name] = Images(paths, chosen.reset_index(drop=True), None)
    return found


def _from_tfds(size, limit):
    """Each part in memory, scaled."""
    import tensorflow_datasets as tfds

    found = {}
    for name in PARTS:
        images, labels = [], []
        split = name if limit is None else f"{name}[:{limit}]"
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
        image = tf.image.decode_jpeg(tf.io.read_file(path), 3)
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


def run(options, method, names, parts, seed, tick, callbacks=None):
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
    started = time.perf_counter()
    keras.utils.set_random_seed(seed)
    model = make_network(names, options.size, options.width)
    if method == "trn":
        # Two attributes are two tasks, more are the paper's two groups.
        half = len(names) // 2
        groups = {"first": names[:half], "second": names[half:]}
        relation = Relation("output", options.weight, groups=groups)
        model = TaskRelationModel(model, relation, momentum=options.momentum)
    count = whole_batches(options, len(parts["train"].labels))
    train = stream(parts["train"], names, options.size, options.batch_size, seed, count)
    rate = keras.optimizers.schedules.CosineDecay(
        options.learning_rate, len(train) * options.epochs
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    weights = {name: options.loss_weights.get(name, 1.0) for name in names}
    model.compile(OPTIMIZERS[options.optimizer](rate), loss, loss_weights=weights)
    testing = stream(parts["test"], names, options.size, 256)
    model.fit(
        train,
        validation_data=None if callbacks is None else testing,
        epochs=options.epochs,
        verbose=0,
        shuffle=False,
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: tick()),
            *(callbacks or ()),
        ],
    )
    seconds = time.perf_counter() - started
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
        "seconds": seconds,
    }


def plan(options, parts, digest):
    """The runs: all attributes together (Table 2), and pairs (Table 3)."""
    every = list(parts["train"].labels)
    settings = ("size", "width", "epochs", "batch_size", "learning_rate", "images")
    settings += ("optimizer", "loss_weights")
    whole = [options.attributes or every] if 2 in options.tables else []
    pairs = PAIRS if 3 in options.tables else []
    for repeat, names in itertools.product(range(options.repeats), [*whole, *pairs]):
        names = list(names)
        for method in options.methods:
            alone = method == "stl"
            for group in [[name] for name in names] if alone else [names]:
                own = {key: getattr(options, key) for key in settings}
                own |= {"method": method, "attributes": group, "data": digest}
                own |= {"seed": options.seed + repeat}
                if method == "trn":
                    own |= {"weight": options.weight, "momentum": options.momentum}
                some = ", ".join(group) if len(group) < 3 else f"{len(group)} attributes"
                yield Run(
                    f"{method.upper()}, {some}, seed {own['seed']}",
                    own,
                    options.epochs,
                    lambda tick, group=group, method=method, seed=own["seed"]: run(
                        options, method, group, parts, seed, tick
                    ),
                )


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
                    "Method": method.upper(),
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
                row[f"AP {number} {method.upper()} %"] = text
        rows.append(row)
    return pd.DataFrame(rows)


def parse(arguments=None):
    """The parsed arguments."""
    return parse_arguments(parser(), arguments)


def parser():
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m applications.celeba",
        description="CelebA's attributes as tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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
    p.add_argument(
        "--data",
        required=True,
        help=f"{LABELS}, or a folder or zip file that has it; for classification a folder "
        "that has the images too, or 'tfds'",
    )
    p.add_argument("--attributes", nargs="+", help="those to compare; all by default")
    p.add_argument("--pairs", type=in_range(int, 0), default=10, help="to print")
    p.add_argument("--output", type=pathlib.Path, default="results/celeba")
    c = p.add_argument_group("classification")
    c.add_argument("--tables", nargs="+", type=int, choices=[2, 3], default=[2, 3])
    c.add_argument("--methods", nargs="+", choices=METHODS, default=["mtl", "trn"])
    c.add_argument("--images", type=in_range(int, 1), help="of each part; all by default")
    c.add_argument("--size", type=in_range(int, 7), default=64, help="side of the images")
    c.add_argument("--width", type=in_range(int, 0), default=64, help="of the first stage")
    c.add_argument("--epochs", type=in_range(int, 0), default=10)
    c.add_argument("--batch-size", type=in_range(int, 1), default=128)
    c.add_argument("--learning-rate", type=in_range(float, 0), default=1e-3)
    add_training(c, "adam")
    c.add_argument("--weight", type=in_range(float, -1e-9), default=0.01, help="λ")
    c.add_argument("--momentum", type=float, default=0.99, help="of the covariances")
    c.add_argument("--repeats", type=in_range(int, 0), default=1)
    c.add_argument("--seed", type=int, default=0)
    return p


def main(arguments=None):
    """Run the experiment; returns similarities, or a dict of tables, as data frames."""
    options = parse(arguments)
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.similarity:
        return compare(options, console)
    return classify(options, console)


def classify(options, console):
    """Train and test on the images; returns a dict from a table's name to a data frame."""
    parts = load_images(options.data, options.size, options.images)
    labels = parts["train"].labels
    _checked(options.attributes, labels)
    check_names("--loss-weights", options.loss_weights, labels)
    absent = {name for pair in PAIRS for name in pair} - set(labels)
    if 3 in options.tables and absent:
        raise ValueError(f"Table 3 needs the attributes {sorted(absent)} too.")
    digest = hashlib.sha256(
        b"".join(part.labels.to_numpy().tobytes() for part in parts.values())
    ).hexdigest()[:16]
    # An attribute in two pairs is learned alone once.
    runs = {run.title: run for run in plan(options, parts, digest)}
    runs = run_all(
        Results(options.output / "runs.jsonl"),
        list(runs.values()),
        console,
        lambda found: (
            f"mean error {np.mean(list(found['error'].values())):.2%}, "
            f"mean AP {np.mean(list(found['precision'].values())):.2%}"
        ),
        options.strategy,
    )
    tables = {}
    if 2 in options.tables:
        tables["table_2"] = table_2(runs, options.attributes or list(labels))
    if 3 in options.tables:
        tables["table_3"] = table_3(runs, labels)
    for name, table in tables.items():
        console.print(rich_table(table, name.replace("_", " ").capitalize()))
        options.output.joinpath(f"{name}.md").write_text(markdown_table(table))
    console.print(f"Runs and tables are in {options.output}.")
    return tables


def _checked(attributes, labels):
    if attributes is not None and (
        not set(attributes) <= set(labels) or len(attributes) < 2
    ):
        raise ValueError(
            f"--attributes: expected two at least of {list(labels)}. "
            f"Received: {attributes}."
        )


def compare(options, console):
    """Compare the labels of the attributes; returns their similarities."""
    labels = load_attributes(options.data)
    _checked(options.attributes, labels)
    if options.attributes is not None:
        labels = labels[options.attributes]
    names = list(labels)
    matrix = task_similarity_matrix(labels.to_numpy())
    table = similarity_table(matrix, names, options.pairs)
    title = f"Similarity of attributes over {len(labels):,} images"
    console.print(rich_table(table, title))
    frame = pd.DataFrame(matrix, names, names)
    frame.to_csv(options.output / "similarity.csv")
    options.output.joinpath("pairs.md").write_text(markdown_table(table))
    plot_heat_map(matrix, names, options.output / "similarity.png", limits=(0, 1))
    console.print(f"Matrix, pairs and heat map are in {options.output}.")
    return frame


if __name__ == "__main__":
    main()
