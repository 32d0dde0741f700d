"""What becomes of the tasks' relations while a network is trained."""

import os
from typing import Any

import keras
import numpy as np

from dmtrl_keras.dmtrl.strength import chance_of_sharing, sharing_strength
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.plots import plot_heat_map
from dmtrl_keras.ground.types import PathLike
from dmtrl_keras.ground.validation import (
    check_number,
    check_path,
    check_positive,
    is_list,
    refusal,
)
from dmtrl_keras.monitoring.gradients import cosines_and_affinity
from dmtrl_keras.monitoring.relations import task_relations
from dmtrl_keras.tasks.stacked import stacked_kernels
from dmtrl_keras.training.model import MultiTaskModel

# Pairs of more tasks have no curves of their own.
MOST_TASKS = 10


class TaskMonitor(keras.callbacks.Callback):
    """The relations of the tasks at the end of every epoch, for TensorBoard.

    Scalars are the sharing strength of each layer (DMTRL Eq. 9) beside its chance level;
    each pair of tasks in all that `task_relations` finds: correlations (DRN, MRN), task
    matrices (DMTRL), similar kernels (MTAL), weights of Cross-Stitch layers, similarities
    (TRN); and, on some `data`, the `gradient_cosines` and the `task_affinity` (TAG). The
    same matrices are images, heat maps with the names of the tasks, where Matplotlib is
    installed. With more than ten tasks the pairs have no scalars, but their mean. Epochs
    with weights that are not finite are left out.

    Args:
        log_dir: folder of TensorBoard, as for Keras's `TensorBoard`; the values are in its
            folder `tasks`. None: they are in `history` only.
        data: None, or `(x, y)` or `(x, y, sample_weight)`, arrays as for `fit`, on which
            gradients are compared: some hundred examples do. TensorFlow only.
        every: int, epochs.
        learning_rate: float, of the step of `task_affinity`.

    Attributes:
        history: list with a dict for each epoch that was looked at: `"epoch"`, and from
            title to float (sharing strength) or float64 array `(T, T)`.

    Raises:
        ValueError: on malformed arguments; in training, on a model that is no
            `MultiTaskModel`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import multitask
    >>> from dmtrl_keras.callbacks import TaskMonitor
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    >>> model = multitask(backbone, ["age", "income"], "hard", heads=1, verbose=False)
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((8, 4)), {"age": np.ones((8, 1)), "income": np.zeros((8, 1))}
    >>> monitor = TaskMonitor(data=(x, y))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
    >>> [sorted(found) for found in monitor.history]
    [['affinity', 'epoch', 'gradient cosines'], ['affinity', 'epoch', 'gradient cosines']]
    """

    def __init__(
        self,
        log_dir: PathLike | None = None,
        data: Any = None,
        every: int = 1,
        learning_rate: float = 0.01,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if log_dir is not None:
            check_path("log_dir", log_dir, owner)
        if data is not None and (not is_list(data) or len(data) not in (2, 3)):
            what = "None, or (x, y) or (x, y, sample_weight)"
            raise refusal("data", data, owner, what)
        check_positive("every", every, owner)
        check_number("learning_rate", learning_rate, owner, low=np.finfo(float).tiny)
        self.log_dir = log_dir
        self.data = data
        self.every = every
        self.learning_rate = learning_rate
        self.history: list[dict[str, Any]] = []
        self._writer: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not isinstance(self.model, MultiTaskModel):
            what = "a `MultiTaskModel`"
            raise refusal("model", self.model, type(self).__name__, what)
        if self.log_dir is not None:
            folder = os.path.join(os.fspath(self.log_dir), "tasks")
            self._writer = tensorflow().summary.create_file_writer(folder)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if (epoch + 1) % self.every or self._diverged():
            return
        found: dict[str, Any] = {"epoch": epoch, **self._strengths()}
        found |= task_relations(self.model)
        if self.data is not None:
            x, y, weight = (*self.data, None)[:3]
            both = cosines_and_affinity(self.model, x, y, weight, self.learning_rate)
            found |= dict(zip(("gradient cosines", "affinity"), both))
        self.history.append(found)
        if self._writer is not None:
            with self._writer.as_default(step=epoch):
                for title, value in found.items():
                    if title != "epoch":
                        self._write(title, value)
            self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _diverged(self) -> bool:
        """Whether there are weights of which nothing can be said."""
        weights = map(keras.ops.convert_to_numpy, self.model.trainable_variables)
        return not all(np.isfinite(weight).all() for weight in weights)

    def _strengths(self) -> dict[str, float]:
        """The sharing strength of factorised layers, and its chance level."""
        kernels = stacked_kernels(self.model, "TaskMonitor")
        if not any(one.tasks > 1 and one.stacked.rank for one in kernels):
            return {}
        strengths, chance = sharing_strength(self.model), chance_of_sharing(self.model)
        found = {f"sharing strength, {name}": value for name, value in strengths.items()}
        return found | {f"chance of sharing, {name}": v for name, v in chance.items()}

    def _write(self, title: str, value: Any) -> None:
        summary = tensorflow().summary
        name = title.replace(", ", "/").replace(" ", "_")
        if not isinstance(value, np.ndarray):
            summary.scalar(name, value)
            return
        tasks = self.model.task_names
        pairs = np.argwhere(~np.eye(len(value), dtype=bool) & np.isfinite(value))
        if np.allclose(value, value.T, equal_nan=True):
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        if len(value) <= MOST_TASKS:
            for i, j in pairs:
                summary.scalar(f"{name}/{tasks[i]}-{tasks[j]}", value[i, j])
        else:
            summary.scalar(f"{name}/mean", value[tuple(pairs.T)].mean())
        image = _image(title, np.nan_to_num(value), tasks)
        if image is not None:
            summary.image(name, image[None])


def _image(title: str, matrix: np.ndarray, tasks: tuple[str, ...]) -> np.ndarray | None:
    """A heat map as pixels; None without Matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError:
        return None
    within = np.abs(matrix).max() <= 1
    figure = plot_heat_map({title: matrix}, list(tasks), limits=(-1, 1) if within else None)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
