"""By how much a network of all tasks is better than single ones, while it is trained."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.validation import check_number, is_real, refusal

# Ends of the names of metrics of which more is better; of all others less is.
_HIGHER = re.compile(
    r"(acc|accuracy|auc|precision|recall|f1|f1_score|iou|r2|r2_score|similarity)(_?\d+)?$"
)


def is_better_if_higher(name: str) -> bool:
    """Whether the end of a metric's name says that more of it is better."""
    return _HIGHER.search(name.lower()) is not None


def improvement(
    results: Mapping[str, Any],
    baseline: Mapping[str, float],
    higher: Collection[str] | None = None,
) -> tuple[float, float]:
    """How much better than single-task learning: Delta_m, and of the worst task.

    `Delta_m = 100 / M sum_m s_m (R_m - B_m) / |B_m|` (Vandenhende et al., "Multi-Task
    Learning for Dense Prediction Tasks: A Survey", 2021, section 4.1), over the M metrics
    of the baseline; `s_m` is 1 where more is better, else -1.

    Args:
        results: dict from name to value, such as of `evaluate(..., return_dict=True)`; it
            may have others, too.
        baseline: dict from name to what single-task learning has.
        higher: names of which more is better. None: those with an end that says so, such as
            `"gender_accuracy"` or `"smile_auc"`.

    Returns:
        `(mean, worst)`, floats in per cent.

    Raises:
        ValueError: on malformed arguments, on names that are not in the results.

    Example:

    >>> from dmtrl_keras.metrics import improvement
    >>> alone = {"age_mae": 4.0, "gender_accuracy": 0.8}
    >>> together = {"loss": 1.3, "age_mae": 3.0, "gender_accuracy": 0.76}
    >>> tuple(round(value, 6) for value in improvement(together, alone))
    (10.0, -5.0)
    """
    baseline, better = _checked(baseline, higher, "improvement")
    if not isinstance(results, Mapping):
        raise refusal("results", results, "improvement", "a dict from name to value")
    gains = _gains(results, baseline, better, "improvement", "results")
    return float(100 * np.mean(gains)), float(100 * np.min(gains))


def _checked(
    baseline: Any, higher: Any, owner: str
) -> tuple[dict[str, float], frozenset[str]]:
    """The baseline, and of which of its names more is better."""
    if not isinstance(baseline, Mapping) or not baseline:
        what = "a dict from names in the logs to values"
        raise refusal("baseline", baseline, owner, what)
    for name, value in baseline.items():
        check_number(f"baseline[{name!r}]", value, owner, low=-np.inf)
        if not value:
            what = "other than zero, to which nothing can be relative"
            raise refusal(f"baseline[{name!r}]", value, owner, what)
    if higher is None:
        higher = [n for n in baseline if is_better_if_higher(n)]
    listed = isinstance(higher, (list, tuple, set, frozenset))
    if not listed or not all(name in list(baseline) for name in higher):
        raise refusal("higher", higher, owner, f"names of {list(baseline)}")
    return dict(baseline), frozenset(higher)


def _gains(
    found: Mapping[str, Any],
    baseline: Mapping[str, float],
    higher: frozenset[str],
    owner: str,
    where: str,
) -> list[float]:
    """By how much each value is better, a share of the baseline's."""
    missing = [name for name in baseline if name not in found]
    if missing:
        raise ValueError(
            f"{owner}: expected names that are in the {where} for `baseline`. "
            f"Received: {missing}. In the {where} are: {sorted(map(str, found))}."
        )
    gains = []
    for name, value in baseline.items():
        own = np.asarray(found[name], object)
        if own.ndim or not is_real(own.item()):
            raise refusal(f"{where}[{name!r}]", found[name], owner, "a number")
        gains.append(
            (1 if name in higher else -1) * (float(own.item()) - value) / abs(value)
        )
    return gains


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
        higher: names of which more is better. None: those with an end that says so, such as
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
        self.baseline, self.higher = _checked(baseline, higher, owner)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        of_validation = all(name.startswith("val_") for name in self.baseline)
        if of_validation and not any(name.startswith("val_") for name in logs):
            return
        gains = _gains(logs, self.baseline, self.higher, type(self).__name__, "logs")
        prefix = "val_" if of_validation else ""
        logs[f"{prefix}improvement"] = float(100 * np.mean(gains))
        logs[f"{prefix}worst_improvement"] = float(100 * np.min(gains))
