"""Two tasks whose losses differ by a factor of ten thousand, balanced in training.

python -m examples.balancing
"""

import keras
import numpy as np

from dmtrl_keras import multitask

rng = np.random.default_rng(0)
x = rng.normal(size=(512, 8)).astype("float32")
y = {
    "price": 100 * np.sin(x[:, :1]) + 50 * x[:, 1:2],
    "share": np.cos(x[:, :1]) * x[:, 2:3],
}
unexplained = {}
for method in ("equal", "upgrad", "imtl_g", "nash"):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(16, "relu")]
    backbone = keras.Sequential([keras.Input((8,)), *layers])
    heads = {task: keras.layers.Dense(1) for task in y}
    model = multitask(backbone, list(y), "hard", heads=heads, verbose=False)
    model.compile(keras.optimizers.Adam(0.01), "mse", balancing=method)
    model.fit(x, y, epochs=40, verbose=0)
    found = model.predict(x, verbose=0)
    unexplained[method] = {t: np.mean((found[t] - y[t]) ** 2) / y[t].var() for t in y}
    print(method, {task: f"{100 * own:.1f}%" for task, own in unexplained[method].items()})
