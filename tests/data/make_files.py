"""Writes one small `.keras` file of each family, with inputs and the outputs for them.

The files beside this script were written by version 0.1, before its modules moved into
rooms; `tests/test_saved_files.py` loads them. Run it only to add files of a later
version: `python tests/data/make_files.py FOLDER`.
"""

import json
import pathlib
import sys

import keras
import numpy as np

from dmtrl_keras import (
    ModeCovariance,
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    TensorNormalRegularizer,
    factorize,
    merge_similar_kernels,
    multitask,
    relationship_network,
)
from dmtrl_keras.layers import (
    NDDR,
    TRL,
    CrossStitch,
    LAFDense,
    SimilarKernelConv2D,
    TaskBatch,
    TaskConcatenate,
    TaskDense,
    TaskDepthwiseConv2D,
    TaskFlatten,
    TaskGroup,
    TaskLayerNormalization,
    TaskRepeat,
    TaskSplit,
    TaskStack,
    TensorNormalPrior,
    TTConv2D,
    TuckerConv2D,
)
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric
from dmtrl_keras.optimizers import LearningRateMultiplier
from dmtrl_keras.parameterizations import SimilarKernels

TASKS = ["a", "b"]


def backbone():
    """A convolution, pooling and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, activation="tanh", name="conv"),
            keras.layers.MaxPooling2D(name="pool"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(4, "tanh", name="fc"),
        ],
        name="backbone",
    )


def of_backbone(sharing="independent", **arguments):
    """`multitask` of it, with a number for each task."""
    heads = {task: keras.layers.Dense(1, name=f"{task}_head") for task in TASKS}
    return multitask(backbone(), TASKS, sharing, heads=heads, verbose=False, **arguments)


def named_layers():
    """Most layers of the grouped layout, by name."""
    inputs = {task: keras.Input((6, 6, 1), name=task) for task in TASKS}
    x = TaskStack(TASKS, name="stack")(inputs)
    x = TuckerConv2D(3, 2, tasks=2, rank=2, name="tucker")(x)
    x = TTConv2D(3, 2, tasks=2, rank=2, name="tt")(x)
    x = TaskDepthwiseConv2D(2, tasks=2, name="depthwise")(x)
    x = TaskLayerNormalization(tasks=2, name="normalization")(x)
    y = TaskGroup(2, name="group")(
        keras.layers.Conv2D(3, 1, name="shared")(TaskBatch(TASKS, name="batch")(x))
    )
    x = TaskConcatenate(2, name="concatenate")([x, y])
    x = SimilarKernelConv2D(3, 2, tasks=2, threshold=0.1, name="similar")(x)
    x = LAFDense(4, tasks=2, rank=1, name="laf")(TaskFlatten(2, name="flatten")(x))
    return MultiTaskModel(inputs, TaskSplit(TASKS, name="split")(x), name="named_layers")


def shared_covariance():
    """Two layers with one task covariance, one of an ordinary layer, MRN's three."""
    shared = ModeCovariance(epsilon=0.01, key="0" * 32)
    inputs = keras.Input((4,), name="x")
    x = TensorNormalPrior(
        keras.layers.Dense(5, name="dense"),
        TensorNormalRegularizer(0.01, modes=("feature", "class")),
        name="wrapped",
    )(inputs)
    x = TaskRepeat(2, name="repeat")(x)
    for name in ("fc7", "fc8"):
        prior = TensorNormalRegularizer(0.01, task_covariance=shared)
        x = TaskDense(3, tasks=2, kernel_regularizer=prior, name=name)(x)
    mrn = TensorNormalRegularizer(0.01, ("feature", "class", "task"), update_every=2)
    x = TaskDense(2, tasks=2, kernel_regularizer=mrn, name="mrn")(x)
    x = TaskDense(2, tasks=2, sharing="tt", kernel_regularizer="l2", name="penalised")(x)
    return MultiTaskModel(inputs, TaskSplit(TASKS, name="split")(x), name="covariance")


def related():
    """A TRN with two relations."""
    relations = [Relation("output", 0.5), Relation("fc", 0.5, name="hidden")]
    return TaskRelationModel(of_backbone(), relations, momentum=0.5)


def trl():
    """The Task Relation Layer by itself, beside outputs."""
    inputs = {task: keras.Input((4,), name=task) for task in TASKS}
    found = TRL([("a", "b")], momentum=0.5, name="trl")(inputs)
    return keras.Model(inputs, {"similarity": found}, name="trl_alone")


FAMILIES = {
    "independent": of_backbone,
    "hard": lambda: of_backbone("hard"),
    "laf": lambda: of_backbone("laf", rank=2),
    "tucker": lambda: of_backbone("tucker", tolerance=0.2),
    "tt": lambda: of_backbone({"conv": "tt"}, rank=2, share_until=None),
    "similar": lambda: of_backbone(SimilarKernels(0.3, weights="learned", update_every=2)),
    "cross_stitch": lambda: of_backbone(between=CrossStitch),
    "nddr": lambda: of_backbone(between=NDDR),
    "prior": lambda: of_backbone(prior=TensorNormalRegularizer(0.01, epsilon=0.1)),
    "relationship": lambda: relationship_network((4,), TASKS, 3, bottleneck=5, prior="mrn"),
    "covariance": shared_covariance,
    "named": named_layers,
    "relation": related,
    "trl": trl,
}


def examples(model, rng):
    """Five examples in the structure of a model's inputs."""
    return keras.tree.map_structure(
        lambda x: rng.normal(size=(5, *x.shape[1:])).astype("float32"), model.input
    )


def trained(family):
    """A model of a family after two steps, and its inputs."""
    keras.utils.set_random_seed(0)
    model = FAMILIES[family]()
    x = examples(model, np.random.default_rng(0))
    if family == "trl":
        model(x, training=True)
        return model, x
    if family == "relationship":
        labels = {task: np.arange(5) % 3 for task in TASKS}
        optimizer = LearningRateMultiplier(
            keras.optimizers.SGD(0.01, momentum=0.9), {"classifier": 10}
        )
        model.compile(optimizer, "sparse_categorical_crossentropy")
    else:
        shape = model.output["a"].shape[1:]
        labels = {task: np.random.default_rng(1).normal(size=(5, *shape)) for task in TASKS}
        losses = {task: MaskedLoss("mse") for task in TASKS}
        metrics = {task: MaskedMetric("mae") for task in TASKS}
        model.compile(keras.optimizers.Adam(0.01), losses, metrics=metrics)
    model.fit(x, labels, batch_size=5, epochs=2, verbose=0)
    return model, x


def write(folder):
    """All files."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    models = {family: trained(family) for family in FAMILIES}
    model, x = models["similar"]
    models["merged"] = (merge_similar_kernels(model, verbose=False), x)
    model, x = models["independent"]
    models["factorized"] = (factorize(model, "tt", tolerance=0.3, verbose=False), x)
    for name, (model, x) in models.items():
        model.save(folder / f"{name}.keras")
        outputs = keras.tree.map_structure(
            lambda y: keras.ops.convert_to_numpy(y).astype("float64").tolist(), model(x)
        )
        (folder / f"{name}.json").write_text(json.dumps(outputs))


if __name__ == "__main__":
    write(sys.argv[1])
