"""A search for how much is shared, with Keras Tuner on data of one's own.

The factors of a kernel may differ from it by a tolerance, from which the ranks follow.
Any tuner of Keras Tuner takes the hypermodel. `python -m tuning.search` does more:
several objectives, searches that go on after an interruption, tables.

    python -m examples.search
"""

import keras
import keras_tuner
from sklearn.datasets import load_digits

from dmtrl_keras import task_layers

# Without the checkout: dmtrl_keras.tuning.hypermodels.
from tuning.hypermodels import Factorized

keras.utils.set_random_seed(0)

digits = load_digits()
images = (digits.images[..., None] / 16).astype("float32")
labels = {"digit": digits.target, "odd": digits.target % 2}


# One for all trials: from equal start kernels a tolerance gives equal ranks.
backbone = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
        keras.layers.Flatten(),
        keras.layers.Dense(32, activation="relu", name="dense"),
    ]
)
hypermodel = Factorized(
    "tucker",
    lambda: backbone,
    losses=dict.fromkeys(labels, "sparse_categorical_crossentropy"),
    heads={"digit": 10, "odd": 2},
    metrics={task: ["accuracy"] for task in labels},
    tune=("sharing", "learning_rate"),
    learning_rate=3e-3,  # around which it is searched for
)
tuner = keras_tuner.RandomSearch(
    hypermodel,
    keras_tuner.Objective("val_digit_accuracy", "max"),
    max_trials=3,
    seed=1,
    directory="search",
    overwrite=True,
)
tuner.search(images, labels, validation_split=0.25, epochs=3, verbose=0)
for trial in tuner.oracle.get_best_trials(3):
    print(f"{trial.score:.3f}", trial.hyperparameters.values)
best = tuner.get_best_models()[0]
print({layer.name: layer.rank for layer in task_layers(best)})
