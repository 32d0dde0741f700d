"""Keras Tuner hypermodels: one for each family, of any backbone.

hypermodel = Factorized("tucker", backbone, {"age": "mse", "gender": "mse"}, heads=...)
tuner = keras_tuner.BayesianOptimization(hypermodel, "val_loss")

`Several` is one space of several families.
"""

import warnings

import keras
import keras_tuner as kt
import numpy as np

from dmtrl_keras import (
    Relation,
    TaskRelationModel,
    balancing,
    multitask,
    parameterizations,
)
from dmtrl_keras.conversion.survey import POOLINGS
from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.layers import NDDR, CrossStitch
from dmtrl_keras.mrn.network import prior_by_name
from dmtrl_keras.parameterizations import LoRA, SimilarKernels
from dmtrl_keras.regularizers import MeanDeviation, TraceNorm
from dmtrl_keras.tasks.graph import is_trained

from . import application
from .spaces import Space

OPTIMIZERS = application("arguments").OPTIMIZERS
TUNABLE = ("sharing", "learning_rate", "dropout", "optimizer", "loss_weights")


class MultiTask(kt.HyperModel):
    """A network of T tasks of one family, compiled; here with independent kernels.

    Hyperparameters of all families are, if they are asked for, `learning_rate`,
    `optimizer` and `loss_weight/<task>`; the subclasses add their own.

    Args:
        method: str, one of the family's methods.
        backbone: function without arguments that returns a Keras model, as for
            `dmtrl_keras.multitask`; or the model, which is not changed.
        losses: dict from task name to loss, as in `compile`.
        heads: as in `multitask`.
        metrics: dict from task name to metrics, as in `compile`.
        tune: what is searched for, some of `"sharing"` (the family's own),
            `"learning_rate"`, `"optimizer"`, `"loss_weights"`; `"dropout"` is for
            experiments that have such an argument, and does nothing here.
        per_layer: bool, whether ranks, or thresholds, are searched for each layer.
        shared_input: as in `multitask`.
        optimizer: str, the default.
        learning_rate: float, the default.
        loss_weights: dict of the defaults by task; 1 where there is none.
        defaults: dict of the defaults of the family's hyperparameters.

    Raises:
        ValueError: on unknown methods or things to tune.

    Example:

    >>> import keras
    >>> import keras_tuner
    >>> backbone = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(8, "relu", name="fc")]
    ... )
    >>> hypermodel = Factorized(
    ...     "tucker", backbone, {"age": "mse", "income": "mse"}, heads=1
    ... )
    >>> hp = keras_tuner.HyperParameters()
    >>> model = hypermodel.build(hp)
    >>> sorted(hp.values)
    ['learning_rate', 'tolerance']
    """

    methods = ("independent",)
    defaults = {}

    def __init__(
        self,
        method,
        backbone,
        losses,
        heads=None,
        metrics=None,
        tune=("sharing", "learning_rate"),
        per_layer=False,
        shared_input=True,
        optimizer="adam",
        learning_rate=1e-3,
        loss_weights=None,
        defaults=None,
    ):
        super().__init__(name=method)
        unknown = sorted(set(tune) - set(TUNABLE))
        unknown += sorted(set(defaults or {}) - set(self.defaults))
        if method not in self.methods or unknown:
            raise ValueError(
                f"{type(self).__name__}: expected a method from {self.methods}, `tune` "
                f"from {TUNABLE}, `defaults` from {sorted(self.defaults)}. "
                f"Received: {method!r}, and unknown {unknown}."
            )
        self.method = method
        self.losses = losses
        self.tasks = list(losses)
        self.heads = heads
        self.metrics = metrics
        self.tune = tuple(tune)
        self.per_layer = per_layer
        self.shared_input = shared_input
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.loss_weights = loss_weights or {}
        self.defaults = {**self.defaults, **(defaults or {})}
        self._backbone = backbone

    def backbone(self):
        """The model that is every task's backbone."""
        is_model = isinstance(self._backbone, keras.Model)
        return self._backbone if is_model else self._backbone()

    def lack(self):
        """Why the family can't be used here, a str; None if it can."""
        return None

    def space(self, hp):
        """What declares hyperparameters."""
        return Space(hp, self.tune, self.per_layer)

    def network(self, hp, **arguments):
        """The network of all tasks, not compiled.

        Args:
            hp: `keras_tuner.HyperParameters`.
            **arguments: of `multitask`, as the family wants them.
        """
        with warnings.catch_warnings():
            # How large a trial's network is, the search itself says; and of the smallest
            # fractions, which a small layer can't have, it gets its least.
            warnings.filterwarnings("ignore", "multitask: the factors have")
            warnings.filterwarnings("ignore", ".*the smallest ranks with which")
            return multitask(
                arguments.pop("backbone", None) or self.backbone(),
                self.tasks,
                heads=_new(self.heads),
                shared_input=self.shared_input,
                verbose=False,
                **arguments,
            )

    def build(self, hp):
        """The compiled network with some hyperparameters."""
        space = self.space(hp)
        optimizer, rate = space.optimizer_and_rate(self.optimizer, self.learning_rate)
        weights = space.loss_weights(lambda: self.tasks, self.loss_weights)
        model = self.network(hp)
        model.compile(
            OPTIMIZERS[optimizer](rate),
            self.losses,
            loss_weights=weights or None,
            weighted_metrics=_new(self.metrics),
            balancing=self.balancing(),
        )
        return model

    def balancing(self):
        """How the losses of the network that was made last are balanced; None: not."""
        return None


def _new(value):
    """Copies of layers and metrics, which would take their state from trial to trial."""

    def copy(one):
        stateful = isinstance(one, (keras.layers.Layer, keras.metrics.Metric))
        return type(one).from_config(one.get_config()) if stateful else one

    return keras.tree.map_structure(copy, value)


_OWN_EXAMPLES = "the tasks' examples are not the same"
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def _has_kernel(layer):
    return getattr(layer, "kernel", None) is not None


def _names(backbone, fits):
    """Names of the layers of a backbone, also of nested models, that fit."""
    return [layer.name for layer in flatten_layers(backbone) if fits(layer)]


def _widened(backbone, factor):
    """A backbone with new weights, all layers so many times as wide."""

    def wider(layer):
        config = layer.get_config()
        for name in ("units", "filters"):
            if isinstance(config.get(name), int):
                config[name] = round(config[name] * factor)
        return type(layer).from_config(config)

    return keras.models.clone_model(backbone, clone_function=wider, recursive=True)


class HardSharing(MultiTask):
    """All tasks have the same kernels, up to the heads."""

    methods = ("hard",)

    def network(self, hp, **arguments):
        return super().network(hp, sharing="hard", **arguments)


# Methods from losses alone, and from gradients.
_BY_LOSSES = ("uncertainty", "dwa", "famo", "imtl_l", "gls")
_BY_GRADIENTS = ("upgrad", "nash", "imtl_g", "cagrad", "pcgrad", "aligned", "mgda")


class BalancedSharing(HardSharing):
    """Hard sharing, in which the losses are balanced.

    The method is the hyperparameter `balancing`; by default Nash-MTL, on other backends
    than TensorFlow FAMO. Gradients are those with respect to the last features that tasks
    share, where they have one input.
    """

    methods = ("balanced",)
    defaults = {"balancing": None}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._chosen = None

    def lack(self):
        return "there is one task" if len(self.tasks) == 1 else None

    def network(self, hp):
        gradients = keras.backend.backend() == "tensorflow"
        names = [*_BY_LOSSES, *(_BY_GRADIENTS if gradients else ())]
        name = self.defaults["balancing"] or ("nash" if gradients else "famo")
        if "sharing" in self.tune:
            name = hp.Choice("balancing", names, default=name)
        method = balancing.get(name)
        if method.looks_at_gradients and self.shared_input:
            method = type(method)(**{**method.get_config(), "at": "features"})
        self._chosen = method
        return super().network(hp)

    def balancing(self):
        return self._chosen


class WideSharing(HardSharing):
    """Hard sharing in a wider network, with about as many weights as T networks.

    So it says what sharing does where cost is equal. All layers are wider by one factor.
    """

    methods = ("wide",)

    def lack(self):
        backbone = self.backbone()
        if is_trained(backbone):
            return "the network is trained, so that it can't be made wider"
        try:
            _widened(backbone, 2.0)
        except (ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0][:100]
            return f"the network can't be made wider ({reason})"
        return None

    def network(self, hp):
        own = self.backbone()
        most = MultiTask.network(self, hp, backbone=own).count_params()

        def weights(width):
            backbone = _widened(own, width)
            return HardSharing.network(self, hp, backbone=backbone).count_params()

        # Most weights grow with the square of the width, and some with itself.
        widths = np.array([1.0, 1 + len(self.tasks) ** 0.5])
        found = [weights(width) for width in widths]
        square, linear = np.linalg.solve(widths[:, None] ** [2, 1], found)
        width = (np.sqrt(linear**2 + 4 * square * most) - linear) / (2 * square)
        return super().network(hp, backbone=_widened(own, max(1.0, float(width))))


class CutSharing(MultiTask):
    """Hard sharing up to a layer, after which each task has kernels of its own.

    The last shared layer is the hyperparameter `share_until`; by default the middle one of
    those with a kernel.
    """

    methods = ("cut",)
    defaults = {"share_until": None}

    def lack(self):
        enough = len(_names(self.backbone(), _has_kernel)) > 1
        return None if enough else "the network has one layer with a kernel"

    def network(self, hp):
        backbone, until = self.backbone(), self.defaults["share_until"]
        # With the last one shared it would be `"hard"`.
        layers = _names(backbone, _has_kernel)[:-1]
        if not layers:
            return super().network(hp, backbone=backbone)
        until = layers[(len(layers) - 1) // 2] if until is None else until
        if "sharing" in self.tune and len(layers) > 1:
            until = hp.Choice("share_until", layers, default=until)
        return super().network(hp, backbone=backbone, share_until=until)


class Fusion(MultiTask):
    """`"stitch"` (Cross-Stitch) or `"nddr"`: networks that see each other's features.

    After every pooling layer, or, where there is none, after every layer with a kernel.
    """

    methods = ("stitch", "nddr")

    def lack(self):
        return None if self.shared_input else _OWN_EXAMPLES

    def network(self, hp):
        backbone = self.backbone()
        between = {"stitch": CrossStitch, "nddr": NDDR}[self.method]
        if not _names(backbone, lambda one: isinstance(one, POOLINGS)):
            between = dict.fromkeys(_names(backbone, _has_kernel), between)
        return super().network(hp, backbone=backbone, between=between)


class Normed(MultiTask):
    """Classic norms of the kernels of all tasks.

    `"trace"`: their trace norm; `"deviation"`: how far each is from the mean of all
    (Evgeniou & Pontil 2004).
    """

    methods = ("trace", "deviation")
    defaults = {"strength": None}

    def network(self, hp):
        kind, default = {"trace": (TraceNorm, 1e-3), "deviation": (MeanDeviation, 0.03)}[
            self.method
        ]
        strength = self.defaults["strength"] or default
        if "sharing" in self.tune:
            strength = self.space(hp).around("strength", strength, 30)
        return super().network(hp, prior=kind(strength))


class Factorized(MultiTask):
    """DMTRL: `"laf"`, `"tucker"` or `"tt"`, by one tolerance or a rank for each layer.

    A rank is a fraction of the layer's weights; the task rank is full, `task_rank` of the
    defaults, or, with ranks by layer and more than two tasks, a hyperparameter.
    """

    methods = ("laf", "tucker", "tt")
    defaults = {"tolerance": 0.1, "task_rank": None}

    def lack(self):
        if self.method == "laf" and self.defaults["task_rank"] is not None:
            return (
                "LAF has no other rank than that of the tasks, which the tolerance chooses"
            )
        return None

    def network(self, hp):
        tolerance, task_rank = self.defaults["tolerance"], self.defaults["task_rank"]
        lack = self.lack()
        if lack is not None:
            raise ValueError(f"Factorized: {lack}. Received: task_rank={task_rank!r}.")
        by = {"sharing": self.method, "task_rank": task_rank}
        if "sharing" not in self.tune:
            return super().network(hp, tolerance=tolerance, **by)
        backbone = self.backbone()
        layers = _names(backbone, _has_kernel)
        tolerance, ranks = self.space(hp).factorization(layers, tolerance, highest=0.95)
        if self.method != "laf":
            task_rank = self.space(hp).task_rank(len(self.tasks), task_rank)
        if ranks is None:
            return super().network(hp, backbone=backbone, tolerance=tolerance, **by)
        kind = type(parameterizations.get(self.method))
        sharing = {layer: kind(rank, task_rank=task_rank) for layer, rank in ranks.items()}
        return super().network(hp, backbone=backbone, sharing=sharing)


class LowRank(MultiTask):
    """`"lora"`: frozen kernels, and a difference of low rank for each task.

    The backbone must be trained already.
    """

    methods = ("lora",)
    defaults = {"rank": 4}

    def lack(self):
        trained = is_trained(self.backbone())
        return (
            None if trained else "the network is not trained, so that all would be frozen"
        )

    def network(self, hp):
        rank = self.defaults["rank"]
        if "sharing" in self.tune:
            rank = hp.Choice("rank", sorted({1, 2, 4, 8, 16, rank}), default=rank)
        return super().network(hp, sharing=LoRA(rank))


class Similar(MultiTask):
    """MTAL: one threshold, or one for each convolution."""

    methods = ("similar",)
    defaults = {"threshold": 0.4}

    def lack(self):
        found = _names(self.backbone(), lambda one: isinstance(one, _CONVOLUTIONS))
        return None if found else "the network has no convolution"

    def network(self, hp):
        threshold = self.defaults["threshold"]
        if "sharing" not in self.tune:
            return super().network(hp, sharing=SimilarKernels(threshold))
        backbone = self.backbone()
        layers = _names(backbone, lambda one: isinstance(one, _CONVOLUTIONS))
        found = self.space(hp).threshold(threshold, layers)
        if len(found) > 1:
            sharing = {n: SimilarKernels(own) for n, own in zip(layers, found)}
        else:
            sharing = SimilarKernels(found[0])
        return super().network(hp, backbone=backbone, sharing=sharing)


class Prior(MultiTask):
    """`"drn"` or `"mrn"`: a tensor-normal prior over the kernels of all layers."""

    methods = ("drn", "mrn")
    defaults = {"strength": 0.1, "epsilon": 1e-2, "update_every": 10}

    def network(self, hp):
        strength, epsilon = self.defaults["strength"], self.defaults["epsilon"]
        if "sharing" in self.tune:
            strength, epsilon = self.space(hp).prior(strength, epsilon)
        every = self.defaults["update_every"]
        prior = prior_by_name(self.method, strength, epsilon, every)
        return super().network(hp, prior=prior)


class RelationNetwork(MultiTask):
    """`"trn"`: a common network whose outputs are held to the labels' similarity."""

    methods = ("trn",)
    defaults = {"output_weight": 0.01, "momentum": 0.99, "share_until": None}

    def lack(self):
        return None if self.shared_input else _OWN_EXAMPLES

    def network(self, hp):
        weight, momentum = self.defaults["output_weight"], self.defaults["momentum"]
        if "sharing" in self.tune:
            weights, momentum = self.space(hp).relation({"output": weight}, momentum)
            weight = weights["output"]
        until = self.defaults["share_until"]
        how = {"sharing": "hard"} if until is None else {"share_until": until}
        model = super().network(hp, **how)
        return TaskRelationModel(model, Relation("output", weight), momentum=momentum)


FAMILIES = {
    method: family
    for family in (
        MultiTask,
        HardSharing,
        BalancedSharing,
        WideSharing,
        CutSharing,
        Fusion,
        Normed,
        Factorized,
        LowRank,
        Similar,
        Prior,
        RelationNetwork,
    )
    for method in family.methods
}


class Several(MultiTask):
    """A network of one of several families: one space of them all.

    The first hyperparameter, `method`, is the family. Those of a family have its name
    before their own, as `tucker/tolerance`, and are active only where it is chosen;
    `learning_rate`, `optimizer` and `loss_weight/<task>` are of all.

    Args:
        methods: names, keys of `FAMILIES`; None: all. Those that can't be used are left
            out.
        backbone: as for `MultiTask`.
        losses: likewise.
        defaults: dict from a name to the `defaults` of its family.
        **options: further arguments of `MultiTask`.

    Attributes:
        families: dict from each name to its hypermodel.
        left_out: dict from the names of those that can't be used to the reason.

    Raises:
        ValueError: on unknown methods, and if none can be used.

    Example:

    >>> import keras
    >>> import keras_tuner
    >>> backbone = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(8, "relu", name="fc")]
    ... )
    >>> hypermodel = Several(
    ...     ["tucker", "mrn", "similar"], backbone, {"age": "mse", "income": "mse"}, heads=1
    ... )
    >>> hypermodel.left_out
    {'similar': 'the network has no convolution'}
    >>> hp = keras_tuner.HyperParameters()
    >>> hp.values = {"method": "mrn"}
    >>> model = hypermodel.build(hp)
    >>> sorted(hp.values)
    ['learning_rate', 'method', 'mrn/epsilon', 'mrn/strength']
    """

    methods = ("several",)

    def __init__(self, methods, backbone, losses, defaults=None, **options):
        super().__init__("several", backbone, losses, **options)
        methods, defaults = list(FAMILIES if methods is None else methods), defaults or {}
        unknown = sorted({*methods, *defaults} - {*FAMILIES})
        if unknown:
            raise ValueError(
                f"Several: expected methods from {list(FAMILIES)}. Received: {unknown}."
            )
        made = {
            name: FAMILIES[name](
                name, backbone, losses, defaults=defaults.get(name), **options
            )
            for name in methods
        }
        lacks = {name: family.lack() for name, family in made.items()}
        self.left_out = {name: lack for name, lack in lacks.items() if lack is not None}
        self.families = {n: family for n, family in made.items() if n not in self.left_out}
        if not self.families:
            raise ValueError(
                f"Several: none of the methods can be used. Received: {self.left_out}."
            )

    def network(self, hp):
        def of(name):
            self._last = self.families[name]
            return self._last.network(hp)

        return self.space(hp).chosen(list(self.families), of)[1]

    def balancing(self):
        return self._last.balancing()

    def build(self, hp):
        if len(self.families) > 1:
            # Before those of all families.
            hp.Choice("method", list(self.families))
        return super().build(hp)
