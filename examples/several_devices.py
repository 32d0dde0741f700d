"""Training on several devices: a replica of the network on each, one state of all.

The CPU is made into two devices here, which is how to try it without GPUs. The network
has state besides its weights, the covariance of its tasks, which learns how they are
related and is the same on all devices.

    python -m examples.several_devices
"""

import keras
import numpy as np

from dmtrl_keras import TensorNormalRegularizer, multitask, task_correlation
from dmtrl_keras.distribution import divisible, make_strategy

# Before anything else of TensorFlow runs. On GPUs: `make_strategy("mirrored")`.
strategy = make_strategy("cpu", replicas=2)
replicas = strategy.num_replicas_in_sync
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

# Three regressions: the first two nearly the same, the third another one.
features = rng.normal(size=(1001, 16)).astype("float32")
first, third = (np.tanh(features @ rng.normal(size=(16, 1))) for _ in range(2))
labels = {"first": first, "second": 0.9 * first + 0.1, "third": third}
# Batches must divide among the replicas, the last one too.
batch_size = 32 * replicas
count = divisible(len(features), batch_size, replicas)
features, labels = features[:count], {task: y[:count] for task, y in labels.items()}

with strategy.scope():
    backbone = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(1, activation="tanh", name="dense")]
    )
    prior = TensorNormalRegularizer(1e-3, update_every=5, mean="start")
    model = multitask(backbone, list(labels), prior=prior)
    model.compile(keras.optimizers.Adam(0.03), "mse")

history = model.fit(features, labels, batch_size=batch_size, epochs=10, verbose=2).history
for task in labels:
    losses = history[f"{task}_loss"]
    print(f"{replicas} replicas, {task}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
for layer, correlation in task_correlation(model).items():
    print(layer, *np.round(correlation, 2).tolist(), sep="\n")
