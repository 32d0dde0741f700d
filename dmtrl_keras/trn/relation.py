"""Which tasks are compared, where, and how similar their labels are."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.validation import (
    check_number,
    checked_pairs,
    clean_name,
    is_list,
    is_pair,
    is_real,
    name_of,
    real_array,
    refusal,
    shown,
)
from dmtrl_keras.trn.canonical_correlation import task_similarity, task_similarity_matrix

Pair = tuple[str, str]


@keras.saving.register_keras_serializable("dmtrl_keras")
class Relation:
    """Where in a network which tasks are compared, and with what weight.

    One term `lambda_l L_ts^(l)` of the total loss (TRN Eq. 13) for each pair.

    Args:
        at: where the features are taken. `"output"`: the network's outputs. The name of
            another layer: its output, the channels of all tasks side by side. A dict from
            task to the name of a layer of its own. Name a layer after pooling: all its
            values are features, and the state has the square of their number.
        weight: float, not negative, lambda. With `gradient="moving"` (see `layers.TRL`) the
            moving covariances keep all but a share of (1 - momentum) of the gradient.
        pairs: list of pairs of names of tasks or groups. None: all pairs of groups, or
            without groups all pairs of the tasks in `at`.
        groups: dict from name to list of tasks, whose features side by side are one set.
        name: str, how it is called in logs; what TensorFlow takes in no name, such as a
            space, becomes an underscore. None: `"output"`, the name of the layer,
            `"hidden"` for a dict.
        target: the similarity that the features are held to instead of the labels', a
            float in [0, 1] for every pair, or a dict from each pair to its own: a wrong
            one is a control, which shows whether it is the relation that helps. None: the
            labels' (Eq. 14).

    Raises:
        ValueError: on malformed arguments.

    Example:

    >>> from dmtrl_keras import Relation
    >>> Relation({"pose": "pose_pool", "landmarks": "landmarks_pool"}, weight=0.001).name
    'hidden'
    """

    def __init__(
        self,
        at: str | Mapping[str, str] = "output",
        weight: float = 0.01,
        pairs: Sequence[Pair] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        name: str | None = None,
        target: float | Mapping[Pair, float] | None = None,
    ) -> None:
        self.at = _checked_place(at)
        if name is None:
            name = "hidden" if isinstance(self.at, dict) else self.at
        if not isinstance(name, str):
            raise refusal("name", name, "Relation", "a string, or None")
        self.name = clean_name(name)
        self.weight = check_number("weight", weight, name_of(self))
        self.groups = _checked_groups(groups, name_of(self))
        self.pairs = checked_pairs(pairs, name_of(self), "tasks or groups")
        self.target = _checked_target(target, name_of(self))

    def sets(self, tasks: Sequence[str]) -> tuple[list[Pair], dict[str, tuple[str, ...]]]:
        """The pairs, and the tasks of each set in them, for the tasks of a network.

        Args:
            tasks: tuple of names.

        Returns:
            `(pairs, sets)`: a list of pairs of names, and a dict from name to a tuple of
            tasks.

        Raises:
            ValueError: on unknown tasks, on less than two of them, on pairs that have a
                task in common, on a group with the name of a task.
        """
        known = tuple(self.at) if isinstance(self.at, dict) else tuple(tasks)
        members = {**{task: (task,) for task in known}, **self.groups}
        named = [name for pair in self.pairs or () for name in pair]
        used = [task for group in self.groups.values() for task in group]
        unknown = sorted({*known, *used} - set(tasks)) + sorted({*named} - {*members})
        unknown += sorted({*used} - {*known, *unknown})
        if unknown:
            raise ValueError(
                f"{name_of(self)}: unknown tasks {unknown}. The tasks are {list(tasks)}, "
                f"those in `at` {list(known)}, the groups {list(self.groups)}."
            )
        doubled = sorted(set(self.groups) & set(known))
        if doubled:
            raise ValueError(f"{name_of(self)}: groups with names of tasks: {doubled}.")
        pairs = self.pairs
        if pairs is None:
            pairs = list(itertools.combinations(self.groups or known, 2))
        if not pairs:
            raise ValueError(
                f"{name_of(self)}: expected two tasks or groups at least. Received: "
                f"tasks {list(known)}, groups {list(self.groups)}."
            )
        sets = {name: tuple(members[name]) for pair in pairs for name in pair}
        common = [(i, j) for i, j in pairs if set(sets[i]) & set(sets[j])]
        if common:
            raise ValueError(
                f"{name_of(self)}: pairs that have tasks in common: {common}. The groups "
                f"are {self.groups}."
            )
        return pairs, sets

    def targets(self, pairs: Sequence[Pair]) -> list[float] | None:
        """The target of each pair.

        Args:
            pairs: list of pairs of names, as from `sets`.

        Returns:
            A list of floats, or None if they are held to the labels' similarity.

        Raises:
            ValueError: if a pair has none, or a target no pair.
        """
        if not isinstance(self.target, dict):
            return None if self.target is None else [self.target] * len(pairs)
        values = {frozenset(pair): value for pair, value in self.target.items()}
        if set(values) != {frozenset(pair) for pair in pairs}:
            what = f"None, a number in [0, 1], or a dict with one for every pair of {pairs}"
            raise refusal("target", self.target, name_of(self), what)
        return [values[frozenset(pair)] for pair in pairs]

    def get_config(self) -> dict[str, Any]:
        """The arguments, as a dict."""
        target: Any = self.target
        if isinstance(target, dict):
            # JSON has no pairs as keys.
            target = [[*pair, value] for pair, value in target.items()]
        return {
            "at": self.at,
            "weight": self.weight,
            "pairs": self.pairs,
            "groups": self.groups,
            "name": self.name,
            "target": target,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the dict of `get_config`."""
        target = config.get("target")
        if isinstance(target, list):
            config = config | {"target": {(i, j): value for i, j, value in target}}
        return cls(**config)


def label_similarity(
    labels: Mapping[str, ArrayLike],
    pairs: Sequence[Pair] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    ridge: float = 0.0,
) -> dict[Pair, float]:
    """The similarity of tasks' labels over a whole data set (TRN Eq. 12).

    Args:
        labels: dict from task to array of n labels. Ints `(n,)` are classes; everything
            else is vectors `(n, ...)`. An example with NaN in it has no label of the task;
            a pair is compared by the examples that have both.
        pairs: list of pairs of names of tasks or groups; None: all pairs of groups, or
            without groups of tasks.
        groups: dict from name to list of tasks, whose labels side by side are one set.
        ridge: as in `task_similarity`.

    Returns:
        A dict from pair to float in [0, 1], as `TaskRelationModel` takes it.

    Raises:
        ValueError: on unknown tasks, on different numbers of labels, on a pair of which no
            example has both.

    Example:

    >>> import numpy as np
    >>> label_similarity({"a": np.array([0, 0, 1, 2]), "b": np.array([1.0, 1.0, 2.0, 0.0])})
    {('a', 'b'): 1.0}
    """
    owner = "label_similarity"
    ridge = check_number("ridge", ridge, owner)
    if not isinstance(labels, Mapping) or not all(isinstance(t, str) for t in labels):
        raise refusal("labels", labels, owner, "a dict from task to array")
    pairs, sets = Relation(owner, pairs=pairs, groups=groups).sets(tuple(labels))
    vectors = {task: _vectors(task, values) for task, values in labels.items()}
    sizes = {task: len(values) for task, values in vectors.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{owner}: expected labels of the same examples. Received: {sizes}."
        )
    arrays = {
        name: np.concatenate([vectors[task] for task in tasks], axis=1)
        for name, tasks in sets.items()
    }
    present = {name: ~np.isnan(x).any(axis=1) for name, x in arrays.items()}
    if all(np.all(there) for there in present.values()):
        names = list(arrays)
        matrix = task_similarity_matrix(arrays, ridge)
        return {(i, j): float(matrix[names.index(i), names.index(j)]) for i, j in pairs}
    found = {}
    for i, j in pairs:
        both = present[i] & present[j]
        if not both.any():
            raise ValueError(
                f"{owner}: no example has labels of both {i!r} and {j!r}. "
                f"Received: {sizes} examples, expected some with both labels."
            )
        found[i, j] = task_similarity(arrays[i][both], arrays[j][both], ridge)
    return found


def _vectors(task: str, labels: ArrayLike) -> np.ndarray:
    """Labels as vectors: classes one-hot."""
    labels = real_array(f"labels[{task!r}]", labels, "label_similarity")
    if not labels.ndim or not labels.size:
        what = "one label or more for each example"
        raise refusal(f"labels[{task!r}]", labels, "label_similarity", what)
    if labels.ndim == 1 and labels.dtype.kind in "iub":
        _, classes = np.unique(labels, return_inverse=True)
        return np.eye(classes.max(initial=0) + 1)[classes]
    return np.asarray(labels).reshape(len(labels), -1).astype("float64")


def _checked_place(at: Any) -> str | dict[str, str]:
    """Where features are taken, see `Relation`."""
    by_task = isinstance(at, Mapping)
    layers = at.items() if by_task else [(at, at)]
    if (by_task and not at) or not all(
        isinstance(x, str) and x for pair in layers for x in pair
    ):
        raise ValueError(
            'Relation: `at` must be "output", the name of a layer, or a dict from task '
            f"to the name of a layer. Received: at={shown(at)}."
        )
    return dict(at) if isinstance(at, Mapping) else at


def _checked_target(target: Any, owner: str) -> float | dict[Pair, float] | None:
    """What features are held to instead of the labels' similarity, see `Relation`."""
    if target is None:
        return None
    by_pair = isinstance(target, Mapping)
    values = list(target.values()) if by_pair else [target]
    pairs = list(target) if by_pair else []
    fine = all(is_real(value) and 0 <= value <= 1 for value in values)
    if not fine or not all(map(is_pair, pairs)) or not values:
        what = "None, a number in [0, 1], or a dict from pair to one"
        raise refusal("target", target, owner, what)
    if by_pair:
        return {pair: float(value) for pair, value in target.items()}
    return float(target)


def _checked_groups(groups: Any, owner: str) -> dict[str, list[str]]:
    """Groups of different tasks by name."""
    groups = {} if groups is None else groups
    if not isinstance(groups, Mapping) or not all(map(_is_group, groups.items())):
        what = "a dict from name to a list of different tasks"
        raise refusal("groups", groups, owner, what)
    return {name: list(tasks) for name, tasks in groups.items()}


def _is_group(group: tuple[Any, Any]) -> bool:
    name, tasks = group
    named = is_list(tasks) and all(isinstance(task, str) for task in (name, *tasks))
    return named and 0 < len(tasks) == len(set(tasks))
