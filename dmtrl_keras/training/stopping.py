"""Early stopping of each task by itself, while the others are trained on."""

import warnings
from typing import Any, Literal

import keras
import numpy as np

from dmtrl_keras.ground.validation import (
    check_bool,
    check_number,
    check_one_of,
    is_int,
    refusal,
)
from dmtrl_keras.training.improvement import is_better_if_higher
from dmtrl_keras.training.model import MultiTaskModel


class EarlyStoppingByTask(keras.callbacks.Callback):
    """Stops training tasks one by one, each when its own metric has stopped improving.

    A task whose metric has not improved for `patience` epochs is frozen (see
    `MultiTaskModel.freeze`): its loss counts no more, and what is its alone stays as it is,
    or becomes again what it was in its best epoch. Training ends when the last task has
    stopped. After it, tasks that were frozen by this callback can be trained again.

    What a task shares with others goes on without it, so that its outputs may still
    change, where a kernel is shared; not where tasks are independent.

    Args:
        monitor: str, the name in the logs with `{task}` in the place of the task's, such as
            `"val_{task}_loss"`. (A network of one task logs `"val_loss"`.)
        min_delta: float, not negative: by so much a value must be better to be an
            improvement.
        patience: int, the number of epochs without an improvement after which a task stops.
        mode: `"min"`, `"max"`, or `"auto"`: more is better of names with an end that says
            so, such as `"val_{task}_accuracy"`, less of all others.
        restore_best_weights: bool, whether a task that stops gets back the weights that are
            its alone from its best epoch.
        start_from_epoch: int, the number of epochs to wait before looking.
        verbose: 0 or 1; 1 says which tasks stop.

    Attributes:
        stopped_epochs: dict from task to the epoch, from 0, after which it stopped.
        best: dict from task to its best value.

    Raises:
        ValueError: on malformed arguments; in training, on a model that is no
            `MultiTaskModel`, on names that are not in the logs.

    Warns:
        UserWarning: at the end, if there was no validation to look at.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import multitask
    >>> from dmtrl_keras.callbacks import EarlyStoppingByTask
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    >>> model = multitask(backbone, ["age", "income"], heads=1, verbose=False)
    >>> model.compile("sgd", "mse", loss_weights={"age": 0.0})
    >>> x, y = np.ones((8, 4)), {"age": np.ones(8), "income": np.zeros(8)}
    >>> stop = EarlyStoppingByTask(patience=1)
    >>> _ = model.fit(x, y, validation_split=0.5, epochs=3, verbose=0, callbacks=[stop])
    >>> stop.stopped_epochs
    {'age': 1}
    """

    def __init__(
        self,
        monitor: str = "val_{task}_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        mode: Literal["auto", "min", "max"] = "auto",
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if not isinstance(monitor, str) or "{task}" not in monitor:
            what = "a name in the logs with {task} in it, such as 'val_{task}_loss'"
            raise refusal("monitor", monitor, owner, what)
        for name, value in (("patience", patience), ("start_from_epoch", start_from_epoch)):
            if not is_int(value, 0):
                raise refusal(name, value, owner, "a whole number from 0")
        check_one_of("mode", mode, ("auto", "min", "max"), owner)
        if not is_int(verbose, 0, 1):
            raise refusal("verbose", verbose, owner, "0 or 1")
        self.monitor = monitor
        self.min_delta = check_number("min_delta", min_delta, owner)
        self.patience = int(patience)
        self.mode = mode
        self.restore_best_weights = check_bool(
            "restore_best_weights", restore_best_weights, owner
        )
        self.start_from_epoch = int(start_from_epoch)
        self.verbose = verbose
        higher = is_better_if_higher(monitor) if mode == "auto" else mode == "max"
        self._sign = 1 if higher else -1
        self.stopped_epochs: dict[str, int] = {}
        self.best: dict[str, float] = {}
        self._waited: dict[str, int] = {}
        self._values: dict[str, list[np.ndarray]] = {}
        self._looked = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin anew."""
        if not isinstance(self.model, MultiTaskModel):
            what = "a MultiTaskModel, such as `multitask` makes"
            raise refusal("model", self.model, type(self).__name__, what)
        self.stopped_epochs, self.best, self._waited, self._values = {}, {}, {}, {}
        self._looked = False

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Freeze the tasks that have not improved for long enough."""
        logs = logs or {}
        if self.monitor.startswith("val_") and not any(n.startswith("val_") for n in logs):
            # There was no validation in this epoch.
            return
        self._looked = True
        if epoch < self.start_from_epoch:
            return
        for task in self.model.task_names:
            if task in self.stopped_epochs or task in self.model.frozen_tasks:
                continue
            value = self._value(task, logs)
            best = self.best.get(task)
            if best is None or self._sign * (value - best) > self.min_delta:
                self.best[task], self._waited[task] = value, 0
                if self.restore_best_weights:
                    self._values[task] = [
                        keras.ops.convert_to_numpy(v) for v, _ in self._own(task)
                    ]
                continue
            self._waited[task] = self._waited.get(task, 0) + 1
            if self._waited[task] >= self.patience:
                self._stop(task, epoch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Let the tasks that were stopped be trained again."""
        if not self._looked:
            warnings.warn(
                f"{type(self).__name__}: there was no validation, so that "
                f"{self.monitor!r} was never looked at.",
                stacklevel=2,
            )
        stopped = [t for t in self.stopped_epochs if t in self.model.frozen_tasks]
        if stopped:
            self.model.unfreeze(*stopped)

    def _name(self, task: str) -> str:
        return self.monitor.replace("{task}", task)

    def _value(self, task: str, logs: dict[str, Any]) -> float:
        name = self._name(task)
        if name not in logs:
            raise ValueError(
                f"{type(self).__name__}: expected names that are in the logs for "
                f"`monitor`. Received: {name!r}. In the logs are: {sorted(logs)}."
            )
        return float(logs[name])

    def _own(self, task: str) -> list[tuple[keras.Variable, Any]]:
        return self.model.own_of(task).weights

    def _stop(self, task: str, epoch: int) -> None:
        self.stopped_epochs[task] = epoch
        if self.verbose:
            print(
                f"Epoch {epoch + 1}: task {task!r} stops, {self._name(task)} was best at "
                f"{self.best[task]:.5g}."
            )
        for (variable, entries), value in zip(self._own(task), self._values.get(task, [])):
            kept = True if entries is None else entries
            variable.assign(np.where(kept, value, keras.ops.convert_to_numpy(variable)))
        trained = set(self.model.task_names) - {*self.model.frozen_tasks, task}
        if trained:
            self.model.freeze(task)
        else:
            self.model.stop_training = True
