"""Methods that look at the tasks' gradients with respect to what the tasks share."""

from typing import Any

import numpy as np
from keras import ops

from dmtrl_keras.balancing import maths
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
from dmtrl_keras.ground.validation import check_number, check_one_of

AT = ("weights", "features")


class GradientBalancing(Balancing):
    """Base of the methods that look at gradients (not for direct use).

    Args:
        at: `"weights"`, the gradients with respect to all weights that more than one task's
            loss depends on, a backward pass for each task; `"features"`, with respect to
            the features that all tasks' own layers take, which is one backward pass through
            what the tasks share, for networks in which there is such a layer.
    """

    looks_at_gradients = True

    def __init__(self, at: str = "weights") -> None:
        self.at = check_one_of("at", at, AT, type(self).__name__)

    def get_config(self) -> dict[str, Any]:
        return {"at": self.at}

    def weigh(self, seen: Seen, state: State) -> Balanced:
        gram = maths.without_absent(seen.gram, seen.present)
        return Balanced(self.weights(gram), state)

    def weights(self, gram: Tensor) -> Tensor:
        """The weights from the Gram matrix alone, where that says all."""
        raise NotImplementedError


@register
class MGDA(GradientBalancing):
    """Multiple-gradient descent (Sener & Koltun 2018, Eq. 3): the shortest convex mix.

    `w = argmin |sum_t w_t g_t|^2` on the simplex. The update has no negative product with
    any task's gradient, and is zero where the point is Pareto-stationary. Short gradients
    get large weights; with `normalize` lengths do not matter: `"l2"`, the gradients are
    divided by their lengths, `"loss"`, by the losses.

    Args:
        normalize: None, `"l2"` or `"loss"`.
        at: see `GradientBalancing`.

    References:
        Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS
        2018); Desideri, "Multiple-gradient descent algorithm (MGDA)" (2012).
    """

    name = "mgda"

    def __init__(self, normalize: str | None = None, at: str = "weights") -> None:
        super().__init__(at)
        if normalize is not None:
            owner = type(self).__name__
            check_one_of("normalize", normalize, ("l2", "loss"), owner, " or None")
        self.normalize = normalize

    def weigh(self, seen: Seen, state: State) -> Balanced:
        gram = maths.without_absent(seen.gram, seen.present)
        scale = ops.ones_like(seen.losses)
        if self.normalize == "l2":
            scale = ops.sqrt(ops.maximum(ops.diagonal(gram), 1e-20))
        elif self.normalize == "loss":
            scale = ops.where(seen.present > 0, ops.maximum(seen.losses, 1e-8), scale)
        found = maths.minimum_norm(gram / (scale[:, None] * scale[None, :]))
        # The update is that of the gradients as they were divided, in their mean length.
        return Balanced(found / scale * ops.mean(scale), state)

    def get_config(self) -> dict[str, Any]:
        return {"normalize": self.normalize, **super().get_config()}


@register
class PCGrad(GradientBalancing):
    """Gradient surgery (Yu et al. 2020, Algorithm 1): conflicts are projected away.

    See `balancing.maths.projected`; the order of the other tasks is random in each step.

    Args:
        at: see `GradientBalancing`.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020).
    """

    name = "pcgrad"

    def weigh(self, seen: Seen, state: State) -> Balanced:
        gram = maths.without_absent(seen.gram, seen.present)
        return Balanced(maths.projected(gram, _order(seen)), state)


def _order(seen: Seen) -> Tensor:
    assert seen.normal is not None
    tasks = seen.losses.shape[0]
    return ops.argsort(seen.normal((tasks, tasks)), axis=-1)


@register
class GradVac(GradientBalancing):
    """Gradient vaccine (Wang et al. 2021, Eq. 4 and 5): pairs stay as similar as they are.

    See `balancing.maths.vaccinated`. PCGrad is the case in which all pairs aim at 0.

    Args:
        beta: float in (0, 1], how fast the running means of the cosines follow.
        at: see `GradientBalancing`.

    References:
        Wang, Tsvetkov, Firat & Cao, "Gradient Vaccine: Investigating and Improving
        Multi-task Optimization in Massively Multilingual Models" (ICLR 2021).
    """

    name = "gradvac"

    def __init__(self, beta: float = 0.01, at: str = "weights") -> None:
        super().__init__(at)
        owner = type(self).__name__
        self.beta = check_number("beta", beta, owner, low=ABOVE_0, high=1)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({"targets": np.zeros((tasks, tasks))})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        gram = maths.without_absent(seen.gram, seen.present)
        old = state["targets"]
        weights, new = maths.vaccinated(gram, _order(seen), old, self.beta)
        both = seen.present[:, None] * seen.present[None, :]
        return Balanced(weights, {"targets": masked(new, old, both)})

    def get_config(self) -> dict[str, Any]:
        return {"beta": self.beta, **super().get_config()}


@register
class CAGrad(GradientBalancing):
    """Conflict-averse gradient descent (Liu et al. 2021, Algorithm 1).

    See `balancing.maths.conflict_averse`. With c = 0 it is the mean gradient; for c below 1
    it converges to a minimum of the mean loss.

    Args:
        c: float in [0, 1).
        at: see `GradientBalancing`.

    References:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning" (NeurIPS
        2021).
    """

    name = "cagrad"

    def __init__(self, c: float = 0.5, at: str = "weights") -> None:
        super().__init__(at)
        self.c = check_number("c", c, type(self).__name__, low=0, high=1 - 1e-6)

    def weights(self, gram: Tensor) -> Tensor:
        return maths.conflict_averse(gram, self.c)

    def get_config(self) -> dict[str, Any]:
        return {"c": self.c, **super().get_config()}


@register
class NashMTL(GradientBalancing):
    """Nash bargaining (Navon et al. 2022, Claim 3.1): `G w = 1 / w`.

    See `balancing.maths.nash`. The scales of the losses do not matter. The length of the
    update is `sqrt(T)` (Navon et al., section 3.2), whatever the gradients are, so that the
    learning rate must fall in the end.

    Args:
        at: see `GradientBalancing`.

    References:
        Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022).
    """

    name = "nash"

    def weights(self, gram: Tensor) -> Tensor:
        return maths.nash(gram)


@register
class IMTLG(GradientBalancing):
    """IMTL-G (Liu et al. 2021, Eq. 5): equal projections on all gradients' directions.

    See `balancing.maths.impartial`. The weights have sum 1 and may be negative.

    Args:
        at: see `GradientBalancing`.

    References:
        Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021).
    """

    name = "imtl_g"

    def weights(self, gram: Tensor) -> Tensor:
        return maths.impartial(gram)


@register
class AlignedMTL(GradientBalancing):
    """Aligned-MTL (Senushkin et al. 2023, Eq. 13 and 14): principal components made equal.

    See `balancing.maths.aligned`.

    Args:
        at: see `GradientBalancing`.

    References:
        Senushkin et al., "Independent Component Alignment for Multi-Task Learning" (CVPR
        2023).
    """

    name = "aligned"

    def weights(self, gram: Tensor) -> Tensor:
        return maths.aligned(gram)


@register
class UPGrad(GradientBalancing):
    """Unconflicting projection of gradients (Quinton & Rey 2024, Eq. 5).

    See `balancing.maths.unconflicting`. The update has no negative product with any task's
    gradient; unlike MGDA's it is as long as the gradients are.

    Args:
        at: see `GradientBalancing`.

    References:
        Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization" (2024).
    """

    name = "upgrad"

    def weights(self, gram: Tensor) -> Tensor:
        return maths.unconflicting(gram)


@register
class GradNorm(GradientBalancing):
    """Gradient normalization (Chen et al. 2018, Eq. 1 and 2): tasks train at one rate.

    `w_t |g_t|` is to be `mean_s(w_s |g_s|) r_t^alpha`, `r_t = (L_t / L_t(0)) / mean`. The
    weights follow the gradient of `sum_t |w_t |g_t| - target_t|`, divided by the mean
    length, and are scaled to the sum T.

    Args:
        alpha: float, at least 0: how much tasks that lag behind are helped.
        learning_rate: float, of the weights.
        at: see `GradientBalancing`; the paper's are the last weights that are shared.

    References:
        Chen, Badrinarayanan, Lee & Rabinovich, "GradNorm: Gradient Normalization for
        Adaptive Loss Balancing in Deep Multitask Networks" (ICML 2018).
    """

    name = "gradnorm"

    def __init__(
        self, alpha: float = 1.5, learning_rate: float = 0.025, at: str = "weights"
    ) -> None:
        super().__init__(at)
        owner = type(self).__name__
        self.alpha = check_number("alpha", alpha, owner, low=0)
        low = ABOVE_0
        self.learning_rate = check_number("learning_rate", learning_rate, owner, low=low)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        return arrays({"weights": np.ones(tasks), "first": np.zeros(tasks)})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        present, weights = seen.present, state["weights"]
        fresh = present * ops.cast(state["first"] <= 0, present.dtype)
        first = masked(ops.maximum(seen.losses, 1e-8), state["first"], fresh)
        lengths = ops.sqrt(ops.maximum(ops.diagonal(seen.gram), 0)) * present
        count = ops.maximum(ops.sum(present), 1)
        norms = weights * lengths
        mean = ops.sum(norms) / count
        ratios = present * seen.losses / ops.maximum(first, 1e-8)
        ratios = ratios / ops.maximum(ops.sum(ratios) / count, 1e-8)
        target = mean * ops.power(ops.maximum(ratios, 1e-8), self.alpha)
        scale = ops.maximum(ops.sum(lengths) / count, 1e-20)
        slope = present * ops.sign(norms - target) * lengths / scale
        new = ops.maximum(weights - self.learning_rate * slope, 1e-3)
        return Balanced(weights, {"weights": of_sum_tasks(new), "first": first})

    def get_config(self) -> dict[str, Any]:
        own = {"alpha": self.alpha, "learning_rate": self.learning_rate}
        return {**own, **super().get_config()}


@register
class MoCo(GradientBalancing):
    """Stochastic multi-objective descent with momentum (Fernando et al. 2023, Eq. 8 to 10).

    Running means of the gradients, `y_t <- y_t - beta (y_t - g_t)`, have less noise;
    `w <- P(w - gamma (Y Y^T + rho I) w)` on the simplex, and the update is `sum_t w_t y_t`.
    It holds T times the shared weights.

    Args:
        beta: float in (0, 1].
        gamma: float, the step of the weights, for gradients of mean length 1.
        rho: float, at least 0.

    References:
        Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably
        Convergent Approach" (ICLR 2023).
    """

    name = "moco"
    needs_gradients = True

    def __init__(self, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0) -> None:
        super().__init__()
        owner, low = type(self).__name__, ABOVE_0
        self.beta = check_number("beta", beta, owner, low=low, high=1)
        self.gamma = check_number("gamma", gamma, owner, low=low)
        self.rho = check_number("rho", rho, owner, low=0)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        weights = np.full(tasks, 1 / tasks)
        return arrays({"weights": weights, "means": np.zeros((tasks, size))})

    def weigh(self, seen: Seen, state: State) -> Balanced:
        means, weights = state["means"], state["weights"]
        # An absent task's gradient is what it was.
        change = (means - seen.gradients) * seen.present[:, None]
        means = means - self.beta * change
        gram = ops.matmul(means, ops.transpose(means))
        slope = ops.matmul(maths.normalized(gram, self.rho), weights[:, None])[:, 0]
        weights = maths.on_simplex(weights - self.gamma * slope)
        direction = ops.matmul(weights[None], means)[0]
        return Balanced(weights, {"weights": weights, "means": means}, direction)

    def get_config(self) -> dict[str, Any]:
        return {"beta": self.beta, "gamma": self.gamma, "rho": self.rho}


@register
class ExcessMTL(GradientBalancing):
    """Excess risks (He et al. 2024, Eq. 6 and Algorithm 1): by how far a loss can fall.

    A task's excess risk is estimated as `E_t = g_t^T diag(h_t)^(-1/2) g_t`, `h_t` the sum
    of its squared gradients so far, relative to that of the first step;
    `w_t <- w_t exp(eta E_t)`, of sum T. Noisy labels, whose loss stays high, get no more
    weight for it. It holds T times the shared weights.

    Args:
        learning_rate: float, eta.

    References:
        He et al., "Robust Multi-Task Learning with Excess Risks" (ICML 2024).
    """

    name = "excess"
    needs_gradients = True

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        owner, low = type(self).__name__, ABOVE_0
        self.learning_rate = check_number("learning_rate", learning_rate, owner, low=low)

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        squares = np.zeros((tasks, size))
        state = {"weights": np.ones(tasks), "first": np.zeros(tasks), "squares": squares}
        return arrays(state)

    def weigh(self, seen: Seen, state: State) -> Balanced:
        present, gradients = seen.present, seen.gradients
        squares = state["squares"] + ops.square(gradients)
        risks = ops.sum(ops.square(gradients) / (ops.sqrt(squares) + 1e-7), axis=-1)
        fresh = present * ops.cast(state["first"] <= 0, present.dtype)
        first = masked(ops.maximum(risks, 1e-12), state["first"], fresh)
        relative = present * risks / ops.maximum(first, 1e-12)
        grown = state["weights"] * ops.exp(ops.minimum(self.learning_rate * relative, 1.0))
        weights = of_sum_tasks(grown)
        new = {"weights": weights, "first": first, "squares": squares}
        return Balanced(weights, new)

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate}
