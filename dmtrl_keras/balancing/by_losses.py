"""Methods that look at losses alone: no more than a few numbers in a step."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.balancing.weighting import (
    ABOVE_0,
    Balanced,
    Balancing,
    Seen,
    State,
    arrays,
    masked,
    of_sum_tasks,
    register,
)
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_number, from_keras, refusal

_LEAST = 1e-8


def _positive(losses: Tensor, present: Tensor) -> Tensor:
    """Losses of which logarithms and ratios can be taken; 1 where there is none."""
    return ops.where(present > 0, ops.maximum(losses, _LEAST), ops.ones_like(losses))


@register
class Equal(Balancing):
    """All losses count the same, `w_t = 1`: what a model does without balancing.

    Called EW (equal weighting) and linear scalarization elsewhere; weights of one's own are
    `loss_weights`.
    """

    name = "equal"

    def weigh(self, seen: Seen, state: State) -> Balanced:
        return Balanced(ops.ones_like(seen.losses), state)


@register
class Uncertainty(Balancing):
    """Homoscedastic uncertainty (Kendall et al. 2018, Eq. 7): `L_t / (2 s_t^2) + log s_t`.

    With `z_t = log s_t^2`, which is learned: `w_t = exp(-z_t) / 2`, and in each step
    `z_t <- z_t - eta (1 - L_t exp(-z_t)) / 2`. It rests where `s_t^2 = L_t`. (The paper
    lets the network's optimizer move them; here they have steps of their own, so that a
    network has no other weights because of how it is trained.)

    Args:
        learning_rate: float, eta.

    References:
        Kendall, Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for
        Scene Geometry and Semantics" (CVPR 2018).
    """

    name = "uncertainty"

    def __init__(self, learning_rate: float = 0.01) -> None:
        self.learning_rate = _rate(learning_rate, type(self).__name__)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({"log_variance": np.zeros(tasks)})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        logs = state["log_variance"]
        weights = 0.5 * ops.exp(-logs)
        slope = (0.5 - seen.losses * weights) * seen.present
        # Of a loss that is far larger than its variance a step must not overshoot.
        logs = logs - ops.clip(self.learning_rate * slope, -1, 1)
        return Balanced(weights, {"log_variance": logs})

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate}


@register
class DWA(Balancing):
    """Dynamic weight average (Liu et al. 2019, Eq. 7): by how fast losses fall.

    `w_t = T softmax(r_t / temperature)`, `r_t = L_t(e - 1) / L_t(e - 2)` with the mean
    losses of the last two epochs; `r_t = 1` in the first two.

    Args:
        temperature: float, above 0.

    References:
        Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention" (CVPR 2019).
    """

    name = "dwa"

    def __init__(self, temperature: float = 2.0) -> None:
        self.temperature = _rate(temperature, type(self).__name__, "temperature")

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({n: np.zeros(tasks) for n in ("total", "count", "last", "before")})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        last, before = state["last"], state["before"]
        known = ops.logical_and(last > 0, before > 0)
        ratio = ops.where(known, last / ops.maximum(before, _LEAST), ops.ones_like(last))
        weights = ops.softmax(ratio / self.temperature) * last.shape[0]
        total = state["total"] + seen.losses * seen.present
        count = state["count"] + seen.present
        return Balanced(weights, {**state, "total": total, "count": count})

    def next_epoch(self, state: State) -> State:
        total, count = state["total"], state["count"]
        known = count > 0
        mean = total / ops.maximum(count, 1)
        return {
            "total": ops.zeros_like(total),
            "count": ops.zeros_like(count),
            "last": ops.where(known, mean, state["last"]),
            "before": ops.where(known, state["last"], state["before"]),
        }

    def get_config(self) -> dict[str, Any]:
        return {"temperature": self.temperature}


@register
class RLW(Balancing):
    """Random loss weighting (Lin et al. 2022, Eq. 2): `w = T softmax(n)`, n normal draws.

    A baseline that methods have to beat.

    References:
        Lin, Ye, Zhang & Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test
        for Multi-Task Learning" (TMLR 2022).
    """

    name = "rlw"

    def weigh(self, seen: Seen, state: State) -> Balanced:
        assert seen.normal is not None
        tasks = seen.losses.shape[0]
        return Balanced(tasks * ops.softmax(seen.normal((tasks,))), state)


@register
class GLS(Balancing):
    """Geometric loss strategy (Chennupati et al. 2019, Eq. 3): `(prod_t L_t)^(1/T)`.

    `w_t = (prod_s L_s)^(1/T) / (T L_t)`: the gradient is that of this product.

    References:
        Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
        Strategy for Multi-Task Learning" (CVPR Workshops 2019).
    """

    name = "gls"

    def weigh(self, seen: Seen, state: State) -> Balanced:
        losses = _positive(seen.losses, seen.present)
        count = ops.maximum(ops.sum(seen.present), 1)
        mean = ops.exp(ops.sum(seen.present * ops.log(losses)) / count)
        return Balanced(mean / (count * losses), state)


@register
class LogLoss(Balancing):
    """The sum of the losses' logarithms, which their scales don't matter to: `w_t = 1/L_t`.

    Scale-invariant learning, called SI and "log" elsewhere (such as in the authors' code of
    FAMO).
    """

    name = "log"

    def weigh(self, seen: Seen, state: State) -> Balanced:
        return Balanced(1 / _positive(seen.losses, seen.present), state)


@register
class IMTLL(Balancing):
    """IMTL-L (Liu et al. 2021, Eq. 8): scales that are learned, `exp(s_t) L_t - s_t`.

    `w_t = exp(s_t)`, and in each step `s_t <- s_t - eta (exp(s_t) L_t - 1)`: all weighted
    losses become 1.

    Args:
        learning_rate: float, eta.

    References:
        Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021).
    """

    name = "imtl_l"

    def __init__(self, learning_rate: float = 0.01) -> None:
        self.learning_rate = _rate(learning_rate, type(self).__name__)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({"log_scale": np.zeros(tasks)})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        logs = state["log_scale"]
        weights = ops.exp(logs)
        slope = (weights * seen.losses - 1) * seen.present
        logs = logs - ops.clip(self.learning_rate * slope, -1, 1)
        return Balanced(weights, {"log_scale": logs})

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate}


@register
class FAMO(Balancing):
    """Fast adaptive multitask optimization (Liu et al. 2023, Algorithm 1).

    All losses are to fall at the same rate. `z = softmax(xi)`, `w_t = T c z_t / L_t` with
    `c = 1 / sum_s (z_s / L_s)`; after a step, by the changes `delta_t = log L_t - log L_t'`
    of the losses, `xi <- xi - eta (J^T delta + gamma xi)`, J the Jacobian of the softmax.
    (The authors' code looks at the same batch once more; here the next batch shows the
    change. They multiply by no T.)

    Args:
        learning_rate: float, eta.
        decay: float, gamma.

    References:
        Liu, Feng, Stone & Liu, "FAMO: Fast Adaptive Multitask Optimization" (NeurIPS 2023).
    """

    name = "famo"

    def __init__(self, learning_rate: float = 0.025, decay: float = 1e-3) -> None:
        owner = type(self).__name__
        self.learning_rate = _rate(learning_rate, owner)
        self.decay = check_number("decay", decay, owner, low=0)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({"logits": np.zeros(tasks), "last": np.zeros(tasks)})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        losses = _positive(seen.losses, seen.present)
        last, logits = state["last"], state["logits"]
        z = ops.softmax(logits)
        known = ops.logical_and(last > 0, seen.present > 0)
        change = ops.log(ops.maximum(last, _LEAST)) - ops.log(losses)
        change = ops.where(known, change, ops.zeros_like(change))
        slope = z * (change - ops.sum(z * change))
        moved = logits - self.learning_rate * (slope + self.decay * logits)
        logits = ops.where(ops.any(known), moved, logits)
        z = ops.softmax(logits)
        new = {"logits": logits, "last": masked(losses, last, seen.present)}
        return Balanced(of_sum_tasks(z / losses), new)

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate, "decay": self.decay}


@register
class STCH(Balancing):
    """Smooth Tchebycheff scalarization (Lin et al. 2024, Eq. 7): the worst loss, smoothly.

    `mu log sum_t exp(p_t (L_t - L*_t) / mu)`, whose gradient has the weights
    `w_t = p_t softmax(p (L - L*) / mu)_t`; here T times that. Small mu looks at the worst
    task alone, large mu at the mean.

    Args:
        mu: float, above 0.
        preferences: dict by task of numbers p_t; None: 1.
        ideal: dict by task of the losses L*_t that can be hoped for; None: 0.

    References:
        Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization"
        (ICML 2024).
    """

    name = "stch"

    def __init__(
        self,
        mu: float = 1.0,
        preferences: Mapping[str, float] | None = None,
        ideal: Mapping[str, float] | None = None,
    ) -> None:
        owner = type(self).__name__
        self.mu = _rate(mu, owner, "mu")
        self.preferences = _by_task("preferences", preferences, owner)
        self.ideal = _by_task("ideal", ideal, owner)
        self._names: tuple[str, ...] = ()

    def check(self, names: tuple[str, ...], owner: str) -> None:
        for what in ("preferences", "ideal"):
            _check_known(what, getattr(self, what), names, owner)
        self._names = names

    def weigh(self, seen: Seen, state: State) -> Balanced:
        tasks = seen.losses.shape[0]
        preferences = self._of_tasks(self.preferences, 1.0, tasks)
        gaps = seen.losses - self._of_tasks(self.ideal, 0.0, tasks)
        scores = preferences * gaps / self.mu
        scores = ops.where(seen.present > 0, scores, ops.full_like(scores, -1e9))
        return Balanced(tasks * preferences * ops.softmax(scores), state)

    def _of_tasks(
        self, given: Mapping[str, float] | None, default: float, tasks: int
    ) -> np.ndarray:
        if given is None:
            return np.full(tasks, default, "float32")
        return np.array([given.get(name, default) for name in self._names], "float32")

    def get_config(self) -> dict[str, Any]:
        return {"mu": self.mu, "preferences": self.preferences, "ideal": self.ideal}


@register
class Scheduled(Balancing):
    """Weights that follow given schedules.

    Args:
        schedules: dict by task of numbers, and of
            `keras.optimizers.schedules.LearningRateSchedule` objects that are asked for the
            weight at each step of training; tasks left out have 1.

    Example:

    >>> import keras
    >>> from dmtrl_keras.balancing import Scheduled
    >>> fall = keras.optimizers.schedules.PolynomialDecay(1.0, 1000, 0.1)
    >>> Scheduled({"age": fall}).name
    'scheduled'
    """

    name = "scheduled"

    def __init__(self, schedules: Mapping[str, Any] | None = None) -> None:
        owner = type(self).__name__
        kind = keras.optimizers.schedules.LearningRateSchedule
        if schedules is not None and not isinstance(schedules, Mapping):
            what = "a dict by task of numbers and schedules, or None"
            raise refusal("schedules", schedules, owner, what)
        found = {}
        for task, one in (schedules or {}).items():
            if isinstance(one, dict):
                one = from_keras(owner, keras.optimizers.schedules.deserialize, config=one)
            if not isinstance(one, kind):
                one = check_number(f"schedules[{task!r}]", one, owner, low=0)
            found[task] = one
        self.schedules = found
        self._names: tuple[str, ...] = ()

    def check(self, names: tuple[str, ...], owner: str) -> None:
        _check_known("schedules", self.schedules, names, owner)
        self._names = names

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({"step": np.zeros(())})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        step = state["step"]
        given = [self.schedules.get(name, 1.0) for name in self._names]
        weights = [one(step) if callable(one) else one for one in given]
        found = ops.stack([ops.cast(one, step.dtype) for one in weights])
        return Balanced(found, {"step": step + 1})

    def get_config(self) -> dict[str, Any]:
        kind = keras.optimizers.schedules.LearningRateSchedule
        serialize = keras.optimizers.schedules.serialize
        found = {
            task: serialize(one) if isinstance(one, kind) else one
            for task, one in self.schedules.items()
        }
        return {"schedules": found}


def _rate(value: Any, owner: str, name: str = "learning_rate") -> float:
    return check_number(name, value, owner, low=ABOVE_0)


def _by_task(name: str, given: Any, owner: str) -> dict[str, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise refusal(name, given, owner, "a dict of numbers by task, or None")
    return {
        task: check_number(f"{name}[{task!r}]", value, owner)
        for task, value in given.items()
    }


def _check_known(
    what: str, given: Mapping[str, Any] | None, names: tuple[str, ...], owner: str
) -> None:
    unknown = sorted(map(str, set(given or ()) - set(names)))
    if unknown:
        raise ValueError(
            f"{owner}: unknown tasks in `{what}` of the balancing: {unknown}. "
            f"Expected some of those with a loss, {list(names)}."
        )
