"""Three attributes of a face, where each image has only some of the labels.

Collections of faces are often labelled for one question each. Here the faces are drawn,
and every label is missing (NaN) in half of the images. `MaskedLoss` and `MaskedMetric`
leave missing labels out, so that each task learns from the labels that it has.

    python -m examples.missing_labels
"""

import keras
import numpy as np

from dmtrl_keras import multitask
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)


def draw_faces(count):
    """Images `(count, 24, 24, 1)`, and a dict of labels `(count, 1)` by task."""
    smile, glasses = rng.integers(2, size=(2, count, 1)).astype("float32")
    turn = rng.uniform(-1, 1, (count, 1)).astype("float32")
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    x = x - 0.3 * turn[..., None]  # A turned head has its features on one side.
    bend = 1 - 2 * smile[..., None]
    mouth = (abs(y - 0.45 - bend * (x**2 - 0.05)) < 0.07) & (abs(x) < 0.4)
    from_eye = np.hypot(abs(x) - 0.35, y + 0.3)
    rims = (abs(from_eye - 0.25) < 0.07) & (glasses[..., None] > 0)
    images = np.where(mouth | rims | (from_eye < 0.1), 0.0, 0.8)
    images += 0.1 * rng.normal(size=images.shape)
    return images[..., None], {"smile": smile, "glasses": glasses, "turn": turn}


images, labels = draw_faces(1000)
partly = {k: np.where(rng.random(y.shape) < 0.5, y, np.nan) for k, y in labels.items()}
test_images, test_labels = draw_faces(200)

backbone = keras.Sequential([keras.Input((24, 24, 1))])
for block, filters in enumerate((8, 16), start=1):
    backbone.add(keras.layers.Conv2D(filters, 3, activation="relu", name=f"conv{block}"))
    backbone.add(keras.layers.MaxPooling2D(name=f"pool{block}"))
backbone.add(keras.layers.Flatten())
backbone.add(keras.layers.Dense(32, activation="relu", name="features"))

heads = {"smile": 1, "glasses": 1, "turn": keras.layers.Dense(1)}
losses = {"smile": "binary_crossentropy", "glasses": "binary_crossentropy", "turn": "mse"}
metrics = {"smile": "binary_accuracy", "glasses": "binary_accuracy", "turn": "mae"}
model = multitask(
    backbone, list(heads), sharing="tucker", tolerance=0.3, share_until="pool1", heads=heads
)
model.compile(
    keras.optimizers.Adam(3e-3),
    loss={task: MaskedLoss(loss) for task, loss in losses.items()},
    metrics={task: [MaskedMetric(name)] for task, name in metrics.items()},
)
model.fit(images, partly, epochs=10, verbose=2)
results = model.evaluate(test_images, test_labels, return_dict=True, verbose=0)
print({name: round(value, 3) for name, value in results.items()})
