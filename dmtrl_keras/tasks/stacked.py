"""The stacked kernels of a model, whichever layers have them."""

import dataclasses

import keras

from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.kernels.factorization import Factorization
from dmtrl_keras.kernels.parameterization import Parameterization
from dmtrl_keras.kernels.task_kernel import TaskKernel
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.task_layer import TaskLayer, layers_of


@dataclasses.dataclass(frozen=True, eq=False)
class StackedKernel:
    """One stacked kernel of a layer.

    Attributes:
        name: str, that of the layer; of copies of a layer with that of the kernel in it,
            such as `lstm/lstm_cell/recurrent_kernel`.
        layer: the layer that has it, a `TaskLayer` or `TaskCopies`.
        stacked: its `TaskKernel`.
    """

    name: str
    layer: keras.layers.Layer
    stacked: TaskKernel

    @property
    def kind(self) -> str:
        """The class of the layer that one task alone would have."""
        return type(self.layer.task_twin()).__name__

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return self.stacked.tasks

    @property
    def sharing(self) -> Parameterization:
        """The parameterization."""
        return self.stacked.sharing

    @property
    def kernel(self) -> Tensor:
        """The effective stacked kernel, the task axis last."""
        return self.stacked.value()


def kernels_in(layer: TaskLayer | TaskCopies) -> list[StackedKernel]:
    """The stacked kernels of a layer that is built, in order."""
    if isinstance(layer, TaskLayer):
        return [StackedKernel(layer.name, layer, layer.stacked)]
    names = (f"{layer.name}/{name}" for name in layer.kernel_names)
    return [StackedKernel(n, layer, own) for n, own in zip(names, layer.kernels)]


def stacked_kernels(model: keras.Model, owner: str) -> list[StackedKernel]:
    """The stacked kernels of a model, in the order of its layers.

    Args:
        model: a Keras model.
        owner: str, the function to name in the error.

    Raises:
        ValueError: on what is no Keras model.
    """
    layers = layers_of((TaskLayer, TaskCopies), model, owner)
    return [one for layer in layers if layer.built for one in kernels_in(layer)]


def factorizations_of(model: keras.Model, owner: str) -> list[Factorization]:
    """What became of the kernels that were to be factorised, in the order of the layers.

    Args:
        model: a Keras model.
        owner: str, the function to name in the error.
    """
    found: list[Factorization] = []
    for layer in layers_of((TaskLayer, TaskCopies), model, owner):
        if isinstance(layer, TaskCopies):
            found += layer.factorizations
        elif layer.factorization is not None:
            found.append(layer.factorization)
    return found
