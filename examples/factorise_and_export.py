"""Train tasks independently, share their kernels afterwards, train on, and ship the file.

Two questions about scikit-learn's digits: which one it is, and whether it has a loop, as
0, 6, 8, 9 have. The trained kernels are decomposed within a given error, as in the DMTRL
paper. The exported file is run by LiteRT, without Keras and without this library.

    python -m examples.factorise_and_export
"""

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from sklearn.datasets import load_digits

from dmtrl_keras import factorize, multitask

keras.utils.set_random_seed(0)

digits = load_digits()
images = (digits.images[..., None] / 16).astype("float32")
labels = {"digit": digits.target, "loop": np.isin(digits.target, (0, 6, 8, 9)) * 1}
train, test = slice(1300), slice(1300, None)

backbone = keras.Sequential(
    [
        keras.Input((8, 8, 1), name="image"),
        keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu", name="dense"),
    ]
)


def fit(model, epochs):
    """Train, and return the results on the test part."""
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    model.fit(images[train], {k: y[train] for k, y in labels.items()}, epochs=epochs)
    expected = {k: y[test] for k, y in labels.items()}
    return model.evaluate(images[test], expected, return_dict=True, verbose=0)


independent = multitask(backbone, list(labels), heads={"digit": 10, "loop": 2})
before = fit(independent, epochs=6)
model = factorize(independent, "tucker", tolerance=0.3)  # prints ranks and errors
after = fit(model, epochs=2)
for name, value in after.items():
    print(f"{name}: {before[name]:.3f} independent, {value:.3f} factorised")
print(f"parameters: {independent.count_params():,}, {model.count_params():,}")

model.export("digits.tflite", format="litert", verbose=False)
runner = Interpreter("digits.tflite").get_signature_runner()
served = runner(image=images[test][:5])
expected = model.predict(images[test][:5], verbose=0)
print({task: abs(served[task] - expected[task]).max() for task in expected})
