"""What is known of a backbone before anything is built."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import tree

from dmtrl_keras.conversion import rules
from dmtrl_keras.ground.validation import is_for
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.graph import output_spec, replaced, run, values_in
from dmtrl_keras.tasks.task_layer import TaskLayer

POOLINGS = tuple(
    getattr(keras.layers, f"{kind}Pooling{axes}D")
    for kind in ("Max", "Average")
    for axes in (1, 2, 3)
)


@dataclasses.dataclass
class Survey:
    """What is known of the backbone.

    Attributes:
        shared: ids of the operations that all tasks share.
        with_weights: the layers with weights, in order, a dict from name to class name.
        poolings: names of the pooling layers, but for global ones.
        layers: all layers, such a dict.
        calls: how often each operation is called, by id.
        problems: why operations can't be converted, by id.
        ancestors: ids of the operations that an operation depends on, and its own, by id.
        names: the names of all operations, by id.
    """

    shared: frozenset[int]
    with_weights: dict[str, str]
    poolings: list[str]
    layers: dict[str, str]
    calls: collections.Counter[int]
    problems: dict[int, str]
    ancestors: dict[int, frozenset[int]]
    names: dict[int, str]

    def check(self, name: str, apart: Callable[[str], bool]) -> None:
        """Refuse layers that would have to be converted, and can't be.

        Those that serve all tasks as they are need no rule: before `share_until`, and
        where neither they nor anything that they depend on is each task's own.

        Args:
            name: str, of the backbone.
            apart: function of an operation's name that says whether its weights, or what
                comes from it, are each task's own.

        Raises:
            ValueError: with a line for each of them.
        """
        own = {
            number
            for number, layer in self.names.items()
            if number not in self.shared and apart(layer)
        }
        problems = [
            text for number, text in self.problems.items() if self.ancestors[number] & own
        ]
        if problems:
            lines = "\n".join(f"- {line}" for line in problems)
            raise ValueError(
                f"multitask: model {name!r} has {len(problems)} layers that can't be "
                "converted (see `dmtrl_keras.conversion.register_rule`; before "
                "`share_until`, and with `sharing='hard'` up to them, they stay as they "
                f"are):\n{lines}"
            )


class _Surveyed:
    """A symbolic tensor, and the ids of all operations that it depends on."""

    def __init__(self, spec: Any, ids: frozenset[int] = frozenset()) -> None:
        self.spec = spec
        self.ids = ids


def survey(backbone: keras.Model, share_until: str | None) -> Survey:
    """Look at every layer of the backbone.

    Raises:
        ValueError: if there is no layer `share_until`.
    """
    problems: dict[int, str] = {}
    ancestors: dict[int, frozenset[int]] = {}
    every: dict[int, str] = {}
    names: dict[str, frozenset[int]] = {}
    with_weights: dict[str, str] = {}
    poolings: list[str] = []
    layers: dict[str, str] = {}
    calls: collections.Counter[int] = collections.Counter()

    def visit(
        operation: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        path: tuple[str, ...],
    ) -> Any:
        values = values_in(_Surveyed, args, kwargs)
        shapes = [tuple(value.spec.shape) for value in values]
        rule = rules.fitting(operation, args, kwargs, shapes)
        if isinstance(operation, (TaskLayer, TaskCopies)):
            own = rules.rule_of(operation)
            assert own is not None
            place = "/".join((*path, operation.name))
            problem = own.problem(operation, shapes)
            problems[id(operation)] = f"{type(operation).__name__} {place!r}: {problem}"
        if rule.has_weights:
            with_weights.setdefault(operation.name, type(operation).__name__)
        every[id(operation)] = operation.name
        if isinstance(operation, keras.layers.Layer) and not calls[id(operation)]:
            layers.setdefault(operation.name, type(operation).__name__)
            if isinstance(operation, POOLINGS):
                poolings.append(operation.name)
        calls[id(operation)] += 1
        ids = frozenset([id(operation)]).union(*(value.ids for value in values))
        ancestors[id(operation)] = ancestors.get(id(operation), frozenset()) | ids
        args, kwargs = replaced(_Surveyed, args, kwargs, lambda value: value.spec)
        outputs = output_spec(operation, args, kwargs)
        outputs = tree.map_structure(lambda spec: _Surveyed(spec, ids), outputs)
        leave(operation, outputs)
        return outputs

    def leave(operation: Any, outputs: Any) -> None:
        ids = frozenset().union(*(value.ids for value in tree.flatten(outputs)))
        names[operation.name] = names.get(operation.name, frozenset()) | ids

    run(backbone, tree.map_structure(_Surveyed, backbone.input), visit, leave)
    names.update({x.name: frozenset() for x in tree.flatten(backbone.input)})
    if share_until is not None and share_until not in names:
        raise ValueError(
            f"multitask: `share_until` must be the name of a layer of {backbone.name!r}. "
            f"Received: share_until={share_until!r}. Its layers are: {list(names)}."
        )
    shared = frozenset() if share_until is None else names[share_until]
    return Survey(
        shared,
        with_weights,
        poolings,
        layers,
        calls,
        problems,
        ancestors,
        every,
    )


def by_pattern(
    argument: str, value: Any, layers: Mapping[str, str], resolve: Callable[[Any], Any]
) -> Callable[[str], Any]:
    """A function from a layer's name to what an argument gives it, or None.

    Args:
        argument: str, the argument's name.
        value: what was given: one for all layers, or a dict by name, pattern or class.
        layers: dict from a layer's name to that of its class.
        resolve: function of a value that checks it, and returns what is given.
    """
    if not isinstance(value, dict):
        only = resolve(value)
        return lambda name: only
    patterns = {pattern: resolve(choice) for pattern, choice in value.items()}
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(
            is_for(pattern, *layer) for layer in layers.items()
        ):
            raise ValueError(
                f"multitask: each key of `{argument}` must fit the name of a layer, or be "
                f"the class of one. Received: {pattern!r}, which fits none of {layers}."
            )

    def choose(name: str) -> Any:
        kind = layers.get(name)
        fitting = (own for key, own in patterns.items() if is_for(key, name, kind))
        return next(fitting, None)

    return choose
