"""Features in each form in which the tasks need them."""

from dmtrl_keras.tasks.layout import TaskBatch, TaskGroup, TaskRepeat, TaskStack


class Features:
    """Features of the backbone, in each form in which the tasks need them.

    Attributes:
        form: the form in which they were computed: `"shared"`, the same for all tasks;
            `"batched"`, the batch of all tasks' examples; `"grouped"`; or `"apart"`, a
            dict of one input per task.
    """

    def __init__(self, builder, form, tensor, source):
        self._builder = builder
        self._source = source
        self._forms = {form: tensor}
        self.form = form

    @property
    def shape(self):
        """The shape that one task's features have."""
        tensor = self._forms[self.form]
        if self.form == "apart":
            return tuple(next(iter(tensor.values())).shape)
        tasks = len(self._builder.names) if self.form == "grouped" else 1
        return (*tensor.shape[:-1], tensor.shape[-1] // tasks)

    @property
    def common(self):
        """The form in which an ordinary layer serves all tasks at once; or None."""
        forms = {"shared": "shared", "batched": "batched", "apart": "batched"}
        return forms.get(self.form)

    def take(self, form):
        """The features in a given form."""
        if form not in self._forms:
            self._forms[form] = self._convert(form)
        return self._forms[form]

    def _convert(self, form):
        if form == "batched":
            layer, source = TaskBatch, "apart" if self.form == "apart" else "grouped"
        else:
            layer = {"apart": TaskStack, "shared": TaskRepeat, "batched": TaskGroup}
            layer, source = layer[self.form], self.form
        name = self._builder.new_name(f"{self._source}_{form}")
        return layer(list(self._builder.names), name=name)(self.take(source))
