"""Data-parallel training: strategies by name, and a loop for several machines.

Layers, priors and relations need nothing of this module: they work in the scope of any
`tf.distribute` strategy. Replicas have one state, since what is derived from data is
summed over them first, and what is derived from weights is equal anyway.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras

from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.keras_private import initial_epoch as restored_epoch
from dmtrl_keras.ground.keras_private import local_part, symbolic_build
from dmtrl_keras.ground.types import Dataset, Strategy
from dmtrl_keras.ground.validation import (
    check_model,
    check_one_of,
    check_positive,
    is_int,
    is_list,
    name_of,
    refusal,
)

STRATEGIES = ("auto", "mirrored", "cpu")


def make_strategy(
    name: Literal["auto", "mirrored", "cpu"] = "auto", replicas: int | None = None
) -> Strategy:
    """A `tf.distribute` strategy for one machine.

    Make it before anything else of TensorFlow runs, and the model in its `scope()`.

    Args:
        name: `"auto"`: `"mirrored"` where there are two or more GPUs, else TensorFlow's
            default, one device. `"mirrored"`: a replica of the model on each GPU, or,
            where there is none, on each logical CPU device. `"cpu"`: no GPU is used.
        replicas: positive int, how many of the devices are used; logical CPU devices are
            made. None: all GPUs, or one CPU.

    Returns:
        A `tf.distribute.Strategy`, whose `num_replicas_in_sync` says how many replicas
        there are; the same one for the same devices.

    Raises:
        ValueError: on an unknown name, on more replicas than GPUs.
        RuntimeError: if TensorFlow has already made another number of CPU devices; if
            Keras has another backend.

    Example:

    >>> from dmtrl_keras.distribution import make_strategy
    >>> make_strategy("cpu").num_replicas_in_sync
    1
    """
    check_one_of("name", name, STRATEGIES, "make_strategy")
    if replicas is not None:
        check_positive("replicas", replicas, "make_strategy", " or None")
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "tf.distribute needs Keras's TensorFlow backend. "
            f"The backend is {keras.backend.backend()!r}."
        )
    tf = tensorflow()
    gpus = [] if name == "cpu" else tf.config.list_physical_devices("GPU")
    if gpus:
        count = len(gpus) if replicas is None else replicas
        if count > len(gpus):
            raise ValueError(
                f"There are {len(gpus)} GPUs. Received: replicas={replicas}. "
                "Logical CPU devices are made with name='cpu'."
            )
        if name == "auto" and count == 1:
            return tf.distribute.get_strategy()
        return _mirrored("gpu", count)
    count = 1 if replicas is None else replicas
    if count > 1:
        _divide_cpu(tf, count)
        return _mirrored("cpu", count)
    if name == "auto":
        return tf.distribute.get_strategy()
    return tf.distribute.OneDeviceStrategy("/cpu:0")


@functools.cache
def _mirrored(kind: str, count: int) -> Strategy:
    """One strategy for the same devices: several take each other's collectives."""
    devices = [f"/{kind}:{number}" for number in range(count)]
    return tensorflow().distribute.MirroredStrategy(devices)


def _divide_cpu(tf: Any, count: int) -> None:
    """Make the CPU so many devices."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * count
    if len(tf.config.get_logical_device_configuration(cpu) or ()) == count:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, devices)
    except RuntimeError as error:
        raise RuntimeError(
            f"The CPU can't be made {count} devices any more, since TensorFlow runs "
            "already. Make the strategy first."
        ) from error


def divisible(count: int, batch_size: int, replicas: int) -> int:
    """How many of `count` examples give batches that divide among replicas.

    Keras gives each replica the same weight, however many examples it has, and batch
    statistics of no example are NaN. So a training set is cut such that every
    batch, also the last one, divides.

    Args:
        count: int, number of examples.
        batch_size: int, of the global batch.
        replicas: int.

    Returns:
        An int, at most `replicas - 1` less than `count`.

    Raises:
        ValueError: if the batch size does not divide, or nothing is left.

    Example:

    >>> from dmtrl_keras.distribution import divisible
    >>> divisible(33, 8, 2)
    32
    """
    owner = "divisible"
    check_positive("count", count, owner)
    check_positive("batch_size", batch_size, owner)
    check_positive("replicas", replicas, owner)
    if batch_size % replicas:
        raise ValueError(
            f"{owner}: a batch of {batch_size} does not divide among {replicas} replicas: "
            f"expected a multiple of {replicas}. Received: batch_size={batch_size}."
        )
    left = count - (count % batch_size) % replicas
    if left < 1:
        raise ValueError(
            f"{owner}: too few examples, expected one for each of {replicas} replicas. "
            f"Received: count={count}."
        )
    return left


def train(
    model: keras.Model,
    dataset: Dataset,
    epochs: int = 1,
    validation_data: Dataset | None = None,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    initial_epoch: int = 0,
) -> keras.callbacks.History:
    """Train as `model.fit`, under strategies of several machines too.

    `fit` of Keras 3.15 fails under `tf.distribute.MultiWorkerMirroredStrategy` (it takes
    the mean of scalars along an axis); this loop runs the model's own `train_step`, so
    that losses, metrics and updates are those of `fit`. Every machine runs the same
    script, with its own `TF_CONFIG`.

    Args:
        model: a compiled Keras model, made in the scope of its strategy.
        dataset: `tf.data.Dataset` of global batches, the same on every machine, in
            the same order; each takes its part of every batch. Batches must divide among
            the replicas: `batch(n, drop_remainder=True)`.
        epochs: int, as in `fit`.
        validation_data: `tf.data.Dataset` or None.
        callbacks: list of Keras callbacks, called at the start and end of training
            and of epochs. What writes files needs another path on each machine.
        initial_epoch: int.

    Returns:
        A `keras.callbacks.History`; its values are those of all machines.

    Raises:
        ValueError: if the model is not compiled; on data that is no `tf.data.Dataset`, or
            that has no batch.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import tensorflow as tf
    >>> from dmtrl_keras.distribution import train
    >>> strategy = tf.distribute.get_strategy()  # or MultiWorkerMirroredStrategy()
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")
    >>> data = tf.data.Dataset.from_tensor_slices((np.ones((8, 4)), np.ones((8, 1))))
    >>> len(train(model, data.batch(4, drop_remainder=True), epochs=2).history["loss"])
    2
    """
    owner = "train"
    if not check_model(model, owner).compiled:
        raise ValueError(
            f"{owner}: the model must be compiled. Received: {name_of(model)}, for which "
            "`compile` was not called."
        )
    for argument, value in (("epochs", epochs), ("initial_epoch", initial_epoch)):
        if not is_int(value):
            raise refusal(argument, value, owner, "an int that is not negative")
    callbacks = [] if callbacks is None else callbacks
    if not is_list(callbacks) or not all(
        isinstance(callback, keras.callbacks.Callback) for callback in callbacks
    ):
        raise refusal("callbacks", callbacks, owner, "a list of Keras callbacks, or None")
    tf = tensorflow()
    _check_dataset(tf, "dataset", dataset, owner)
    if validation_data is not None:
        _check_dataset(tf, "validation_data", validation_data, owner)
    strategy = model.distribute_strategy
    batches = _distributed(tf, strategy, dataset)
    first = local_part(_first(batches, owner), strategy)
    symbolic_build(model, first)

    def traced(step: Callable[[Any], Any]) -> Callable[[Any], None]:
        @tf.function
        def run_on_replicas(batch: Any) -> None:
            strategy.run(step, args=(batch,))

        return run_on_replicas

    def run(step: Callable[[Any], None], batches: Any, training: bool) -> dict[str, float]:
        evaluation = getattr(model, "through_evaluation", contextlib.nullcontext)
        with contextlib.nullcontext() if training else evaluation():
            model.reset_metrics()
        for batch in batches:
            step(batch)
        for state in getattr(model, "_balancing", ()):
            # Traced once, a step says no more which of them it is.
            state.is_training(training)
        return {name: float(value) for name, value in model.get_metrics_result().items()}

    if validation_data is not None:
        validation_data = _distributed(tf, strategy, validation_data)
    every = keras.callbacks.CallbackList(
        callbacks, add_history=True, model=model, epochs=epochs, verbose=0
    )
    model.stop_training = False
    every.on_train_begin()
    logs = {}
    train_step, test_step = traced(model.train_step), traced(model.test_step)
    frozen = getattr(model, "frozen_tasks", ())
    # Set by `BackupAndRestore`, as for `fit`.
    for epoch in range(restored_epoch(model) or initial_epoch, epochs):
        every.on_epoch_begin(epoch)
        if frozen != getattr(model, "frozen_tasks", ()):
            # A step does otherwise for tasks at rest.
            frozen, train_step = model.frozen_tasks, traced(model.train_step)
        logs = run(train_step, batches, training=True)
        if validation_data is not None:
            found = run(test_step, validation_data, training=False)
            logs |= {f"val_{name}": value for name, value in found.items()}
        every.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    every.on_train_end(logs)
    return model.history


def _first(batches: Any, owner: str) -> Any:
    """The first batch; a data set of unknown size may turn out to have none."""
    for batch in batches:
        return batch
    raise ValueError(f"{owner}: `dataset` must have one batch at least. Received: none.")


def _check_dataset(tf: Any, argument: str, dataset: Any, owner: str) -> None:
    """Raise unless it is a data set of batches."""
    if not isinstance(dataset, tf.data.Dataset):
        what = "a tf.data.Dataset of batches, such as from_tensor_slices(...).batch(n)"
        raise refusal(argument, dataset, owner, what)
    if int(dataset.cardinality()) == 0:
        raise ValueError(
            f"{owner}: `{argument}` must have one batch at least. Received: none; "
            "batch(n, drop_remainder=True) leaves none of fewer than n examples."
        )


def _distributed(tf: Any, strategy: Strategy, dataset: Dataset) -> Any:
    """The data set, each machine with its part of every batch."""
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    return strategy.experimental_distribute_dataset(dataset.with_options(options))
