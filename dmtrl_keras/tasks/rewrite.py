"""From one way of sharing kernels to another: the layer classes by parameterization."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import keras
import numpy as np

from dmtrl_keras.ground.validation import name_of
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.factorization import described
from dmtrl_keras.kernels.parameterization import Parameterization, warn_of_concerns
from dmtrl_keras.tasks.task_layer import TaskLayer

# The named classes, by the class of the layer below and that of the parameterization.
_NAMED: dict[tuple[type, type], type[TaskLayer]] = {}


if TYPE_CHECKING:
    # Every class that is mixed in is one of these layers too.
    _Mixin = TaskLayer
else:
    _Mixin = object


class NamedSharing(_Mixin):
    """Mixin of the layers whose class says how kernels are related (not for direct use).

    A class that names its `_parameterization` registers itself: `with_sharing` then makes
    layers of it. Its configuration holds the arguments of the parameterization.
    """

    _parameterization: type[Parameterization] | None = None
    # The class of the same layer whose kernels are related as `sharing` says.
    _general: type[TaskLayer] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        general = next(
            (
                base
                for base in cls.__mro__
                if issubclass(base, TaskLayer) and not issubclass(base, NamedSharing)
            ),
            None,
        )
        if general is not None and cls._parameterization is not None:
            cls._general = general
            # A user's subclass of a named class does not take its place.
            _NAMED.setdefault((general, cls._parameterization), cls)

    def _sharing_config(self) -> dict[str, Any]:
        sharing = self.stacked.fixed_sharing
        frozen = getattr(sharing, "of", None)
        if frozen is None:
            return sharing.get_config()
        # LoRA was enabled.
        lora = keras.saving.serialize_keras_object(sharing)
        return {**frozen.get_config(), "lora": lora}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        lora = config.pop("lora", None)
        layer = super().from_config(config)
        if lora is not None:
            layer.stacked.sharing = parameterizations.get(lora, cls.__name__)
        return layer


def named_classes() -> dict[tuple[type, type], type[TaskLayer]]:
    """The named classes, by the general class and the class of the parameterization."""
    return dict(_NAMED)


def make_layer(
    cls: type[TaskLayer], config: Mapping[str, Any], sharing: Parameterization
) -> TaskLayer:
    """A new, unbuilt layer whose kernels are parameterized in a given way.

    Args:
        cls: a general class, such as `TaskConv2D`.
        config: its configuration, without the sharing.
        sharing: a `Parameterization`.

    Returns:
        A layer of the named class where there is one (`TuckerConv2D`), else of `cls`.
    """
    named = _NAMED.get((cls, type(sharing)))
    if named is not None:
        return named.from_config({**config, **sharing.get_config()})
    return cls.from_config({**config, "sharing": sharing})


def with_sharing(layer: TaskLayer, sharing: Parameterization) -> TaskLayer:
    """A new, unbuilt layer like `layer`, with its kernels parameterized otherwise.

    Args:
        layer: a layer with T kernels, such as `TaskConv2D`.
        sharing: a `Parameterization`.

    Returns:
        The layer; see `make_layer` for its class.
    """
    config = layer.get_config()
    cls = type(layer)
    if isinstance(layer, NamedSharing):
        assert layer._general is not None
        cls = layer._general
        for name in layer._sharing_config():
            del config[name]
    for name in ("sharing", "factorization", "quantization"):
        config.pop(name, None)
    return make_layer(cls, config, sharing)


def started_layer(
    make: Callable[[Parameterization], TaskLayer],
    sharing: Parameterization,
    kernel: np.ndarray,
    factors: Mapping[str, np.ndarray],
) -> TaskLayer:
    """An unbuilt layer that starts from factors, and knows what they stand for.

    Args:
        make: function of a `Parameterization` that returns the layer.
        sharing: the parameterization that made the factors.
        kernel: float64 array, the stacked kernel that they stand for.
        factors: dict of arrays.

    Returns:
        The layer; its `factorization` says what became of the kernel, None without ranks.
    """
    given = sharing
    sharing, report = described(sharing, kernel, factors)
    layer = make(sharing)
    warn_of_concerns(given, factors, tuple(kernel.shape), name_of(layer))
    layer.start_from(factors)
    if report is not None:
        layer.factorization = dataclasses.replace(report, layer=layer.name)
    return layer
