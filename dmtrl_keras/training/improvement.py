"""By how much a network of all tasks is better than single ones, while it is trained."""

from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.validation import check_number, refusal

# Parts of the names of metrics of which more is better; of all others less is.
_HIGHER = ("acc", "auc", "precision", "recall", "f1", "iou", "r2", "similarity")


class TaskImprovement(keras.callbacks.Callback):
    """How much better than single-task learning, at the end of every epoch.

    `Delta_m = 100 / T sum_t s_t (M_t - B_t) / |B_t|` (Vandenhende et al., "Multi-Task
    Learning for Dense Prediction Tasks: A Survey", 2021, section 4.1): the mean, over the
    metrics that are given, of the relative distance to what single tasks have, in per cent;
    `s_t` is 1 where more is better, else -1. It adds to the logs `val_improvement`, and
    `val_worst_improvement`, the least of all: positive where no task has become worse. (Of
    metrics without `val_` they have none either.)

    Callbacks after it in the list, and the history, see both. So Keras's `EarlyStopping`
    and `ModelCheckpoint` look at all tasks: `EarlyStopping("val_improvement",
    mode="max")`. In an epoch without validation there is nothing to add.

    Args:
        baseline: dict from a name in the logs, such as `"val_age_loss"`, to the value that
            single-task learning has.
        higher: names of which more is better. None: those with a part that says so, such as
            `"val_gender_accuracy"` or `"val_smile_auc"`.

    Raises:
        ValueError: on malformed arguments; in training, on names that are not in the logs.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import multitask
    >>> from dmtrl_keras.callbacks import TaskImprovement
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    >>> model = multitask(backbone, ["age", "income"], "hard", heads=1, verbose=False)
    >>> model.compile("sgd", "mse")
    >>> better = TaskImprovement({"val_age_loss": 0.25, "val_income_loss": 0.3})
    >>> stop = keras.callbacks.EarlyStopping("val_improvement", mode="max", patience=2)
    >>> x, y = np.ones((8, 4)), {"age": np.ones(8), "income": np.zeros(8)}
    >>> history = model.fit(
    ...     x, y, validation_split=0.5, epochs=3, verbose=0, callbacks=[better, stop]
    ... )
    >>> "val_worst_improvement" in history.history
    True
    """

    def __init__(
        self, baseline: Mapping[str, float], higher: Collection[str] | None = None
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if not isinstance(baseline, Mapping) or not baseline:
            what = "a dict from names in the logs to values"
            raise refusal("baseline", baseline, owner, what)
        for name, value in baseline.items():
            check_number(f"baseline[{name!r}]", value, owner, low=-np.inf)
            if not value:
                what = "other than zero, to which nothing can be relative"
                raise refusal(f"baseline[{name!r}]", value, owner, what)
        if higher is None:
            higher = [n for n in baseline if any(part in n.lower() for part in _HIGHER)]
        listed = isinstance(higher, (list, tuple, set, frozenset))
        if not listed or not all(name in list(baseline) for name in higher):
            raise refusal("higher", higher, owner, f"names of {list(baseline)}")
        self.baseline = dict(baseline)
        self.higher = frozenset(higher)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        missing = [name for name in self.baseline if name not in logs]
        of_validation = all(name.startswith("val_") for name in self.baseline)
        if of_validation and not any(name.startswith("val_") for name in logs):
            return
        if missing:
            raise ValueError(
                f"{type(self).__name__}: `baseline` has names that are not in the logs. "
                f"Received: {missing}. In the logs are: {sorted(logs)}."
            )
        gains = [
            (1 if name in self.higher else -1) * (float(logs[name]) - value) / abs(value)
            for name, value in self.baseline.items()
        ]
        prefix = "val_" if of_validation else ""
        logs[f"{prefix}improvement"] = float(100 * np.mean(gains))
        logs[f"{prefix}worst_improvement"] = float(100 * np.min(gains))
