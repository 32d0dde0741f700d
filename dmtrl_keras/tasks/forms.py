"""Features on their way through a network of T tasks, in each form that layers need."""

from collections.abc import Callable, Sequence

import keras

from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import MASK, attached
from dmtrl_keras.ground.types import Shape, Tensor
from dmtrl_keras.tasks.layout import TaskBatch, TaskGroup, TaskRepeat, TaskStack
from dmtrl_keras.tasks.task_layer import TaskLayer

# From the form in which features were computed to the layer that groups them.
_GROUPING = {Form.APART: TaskStack, Form.SHARED: TaskRepeat, Form.BATCHED: TaskGroup}


class Features:
    """Symbolic features of T tasks, converted from form to form when they are asked for.

    Args:
        names: the names of the T tasks.
        form: the `Form` in which they were computed.
        tensor: the symbolic tensor; of `Form.APART` a dict of one for each task.
        source: str, what they are called in the names of layers.
        new_name: function from a name to one that no other layer of the network has.
    """

    def __init__(
        self,
        names: Sequence[str],
        form: Form,
        tensor: Tensor,
        source: str,
        new_name: Callable[[str], str] = str,
    ) -> None:
        self.names = tuple(names)
        self.form = form
        self._source = source
        self._new_name = new_name
        self._forms = {form: tensor}

    def become(self, form: Form, tensor: Tensor, source: str) -> "Features":
        """Other features of the same network."""
        return Features(self.names, form, tensor, source, self._new_name)

    @property
    def shape(self) -> Shape:
        """The shape that one task's features have."""
        tensor = self._forms[self.form]
        if self.form == Form.APART:
            return tuple(next(iter(tensor.values())).shape)
        if self.form != Form.GROUPED:
            return tuple(tensor.shape)
        return (*tensor.shape[:-1], tensor.shape[-1] // len(self.names))

    @property
    def masked(self) -> bool:
        """Whether a mask rides on them."""
        tensors = keras.tree.flatten(self._forms[self.form])
        return any(attached(x, MASK) is not None for x in tensors)

    @property
    def common(self) -> Form | None:
        """The form in which an ordinary layer serves all tasks at once; or None."""
        if self.form == Form.GROUPED:
            return None
        return Form.SHARED if self.form == Form.SHARED else Form.BATCHED

    def take(self, form: Form) -> Tensor:
        """The features in a given form."""
        if form not in self._forms:
            self._forms[form] = self._convert(form)
        return self._forms[form]

    def _convert(self, form: Form) -> Tensor:
        layer = TaskBatch if form == Form.BATCHED else _GROUPING[self.form]
        inputs = self._forms[self.form]
        if (self.form, form) == (Form.SHARED, Form.BATCHED):
            inputs = [inputs] * len(self.names)
        name = self._new_name(f"{self._source}_{form}")
        return layer(list(self.names), name=name)(inputs)

    def through(self, layer: keras.layers.Layer) -> "Features":
        """What a layer makes of them that keeps the form that they have."""
        return self.become(self.form, layer(self.take(self.form)), layer.name)

    def through_kernels(self, layer: TaskLayer) -> "Features":
        """What a layer with T kernels makes of them."""
        form = Form.SHARED if layer.shared_input else Form.GROUPED
        return self.become(Form.GROUPED, layer(self.take(form)), layer.name)
