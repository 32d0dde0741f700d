"""A backbone of `keras.applications` for two tasks, and one task's model back from it.

The first blocks of MobileNet are shared and computed once; after them each task has its own
kernels, those of `conv_pw_6` generated from common factors. The images are drawn: discs
and squares in three colours.

    python -m examples.any_backbone
"""

import keras
import numpy as np

from dmtrl_keras import multitask, single_task, task_summary

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)


def draw(count):
    """Images `(count, 32, 32, 3)` of one thing each, and labels by task."""
    shape, colour = rng.integers(2, size=count), rng.integers(3, size=count)
    x0, y0 = rng.uniform(10, 22, size=(2, count, 1, 1))
    y, x = np.mgrid[:32, :32]
    disc = np.hypot(x - x0, y - y0) < 9
    square = (abs(x - x0) < 7) & (abs(y - y0) < 7)
    inside = np.where(shape[:, None, None] == 0, disc, square)
    images = inside[..., None] * np.eye(3)[colour][:, None, None]
    images = 2 * images - 1 + 0.1 * rng.normal(size=images.shape)
    return images.astype("float32"), {"shape": shape, "colour": colour}


# With `weights="imagenet"` all tasks start from pretrained kernels. Six blocks of thirteen.
mobilenet = keras.applications.MobileNet((32, 32, 3), 0.25, include_top=False, weights=None)
backbone = keras.Model(mobilenet.input, mobilenet.get_layer("conv_pw_6_relu").output)
model = multitask(
    backbone,
    ["shape", "colour"],
    sharing={"conv_pw_6": "tucker"},
    tolerance=0.3,
    share_until="conv_pw_4_relu",
    heads={"shape": 2, "colour": 3},  # each after an average over the map
)
task_summary(model)
loss = "sparse_categorical_crossentropy"
model.compile("adam", loss, loss_weights={"colour": 0.5}, metrics=["accuracy"])
images, labels = draw(512)
history = model.fit(images, labels, epochs=6, verbose=2).history

alone = single_task(model, "shape")  # An ordinary Keras model.
alone.save("shape.keras")
loaded = keras.saving.load_model("shape.keras")
test_images, _ = draw(8)
difference = loaded.predict(test_images) - model.predict(test_images)["shape"]
print(f"{loaded.count_params():,} of {model.count_params():,} parameters")
print(f"largest difference {abs(difference).max():.1e}")
