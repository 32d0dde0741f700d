"""Which tasks to train together, by what is known of every pair."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.validation import (
    check_number,
    check_positive,
    finite_array,
    is_list,
    refusal,
)

# More have too many partitions.
MOST_EXACT = 10


def task_groups(
    affinity: ArrayLike,
    names: Sequence[str] | None = None,
    most: int | None = None,
    threshold: float = 0.0,
) -> list[list[str]]:
    """A partition of the tasks into groups that gain from each other.

    The one with the largest `sum over groups G, over i != j in G of (A_ij - threshold)`,
    where `A_ij` is what task i is worth to task j: correlation clustering (Bansal, Blum &
    Chawla, 2004). A task by itself has 0. Up to 10 tasks it is the best of all partitions;
    of more it is what merging two groups after two, as long as that is better, and moving
    single tasks lead to. (Fifty et al., NeurIPS 2021, take the mean over the others of a
    group instead of the sum, and a given number of networks; without one the mean makes
    pairs of nearly everything, as a third task lowers it.)

    Args:
        affinity: array `(T, T)`: `task_affinity(model, x, y)`; or a similarity of kernels
            or labels, such as one of `task_relations(model)`, with a `threshold`, since
            similarities that are all positive make one group of all.
        names: list of T names of tasks; None: their numbers.
        most: int, the largest number of groups; None: any.
        threshold: float, what a pair must have to be worth anything.

    Returns:
        A list of lists of names, each in the order of the tasks.

    Raises:
        ValueError: on what is no finite square matrix, on a wrong number of names.

    Example:

    >>> from dmtrl_keras import task_groups
    >>> affinity = [[0, 0.3, -0.1], [0.2, 0, -0.2], [-0.1, 0.1, 0]]
    >>> task_groups(affinity, ["age", "gender", "weather"])
    [['age', 'gender'], ['weather']]
    """
    owner = "task_groups"
    matrix = finite_array("affinity", affinity, owner)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        what = "a finite square matrix (T, T)"
        raise refusal("affinity", affinity, owner, what)
    count = len(matrix)
    if names is None:
        names = [str(number) for number in range(count)]
    if not is_list(names) or not all(isinstance(name, str) for name in names):
        raise refusal("names", names, owner, "a list of names")
    if len(names) != count or len(set(names)) != count:
        raise refusal("names", names, owner, f"{count} different names")
    if most is not None:
        check_positive("most", most, owner)
    check_number("threshold", threshold, owner, low=-np.inf)
    gain = matrix - threshold
    np.fill_diagonal(gain, 0)
    most = count if most is None else min(most, count)
    find = _best if count <= MOST_EXACT else _merged
    return [[names[task] for task in group] for group in sorted(find(gain, most))]


def _worth(gain: np.ndarray, group: Sequence[int]) -> float:
    """What tasks are worth to each other in a group."""
    return float(gain[np.ix_(group, group)].sum()) if len(group) > 1 else 0.0


def _best(gain: np.ndarray, most: int) -> list[list[int]]:
    """The best of all partitions, by dynamic programming over sets of tasks."""
    count = len(gain)
    members = [[t for t in range(count) if mask >> t & 1] for mask in range(1 << count)]
    worth = [_worth(gain, group) for group in members]
    full = (1 << count) - 1
    # By number of groups and set: what its best partition is worth, and one of its groups.
    best = [[(0.0 if not mask else -np.inf, 0) for mask in range(full + 1)]]
    for _ in range(most):
        last, row = best[-1], [(0.0, 0)] * (full + 1)
        for mask in range(1, full + 1):
            # The group of the set's first task.
            first = mask & -mask
            rest = part = mask ^ first
            found = (-np.inf, 0)
            while True:
                group = part | first
                value = worth[group] + last[mask ^ group][0]
                # Of equals the smaller group, which comes later.
                if value >= found[0]:
                    found = value, group
                if not part:
                    break
                part = (part - 1) & rest
            row[mask] = found
        best.append(row)
    groups, mask = [], full
    for row in reversed(best[1:]):
        if mask:
            group = row[mask][1]
            groups.append(members[group])
            mask ^= group
    return groups


def _merged(gain: np.ndarray, most: int) -> list[list[int]]:
    """Groups that are merged, two after two, and then exchange tasks."""
    groups = [[task] for task in range(len(gain))]
    while len(groups) > 1:
        gains = {}
        for i, one in enumerate(groups):
            for j, other in enumerate(groups[:i]):
                apart = _worth(gain, one) + _worth(gain, other)
                gains[i, j] = _worth(gain, one + other) - apart
        (i, j), value = max(gains.items(), key=lambda item: item[1])
        if value <= 0 and len(groups) <= most:
            break
        groups[j] = groups[j] + groups.pop(i)
    return [sorted(group) for group in _exchanged(gain, groups, most)]


def _exchanged(gain: np.ndarray, groups: list[list[int]], most: int) -> list[list[int]]:
    """Groups after all moves of single tasks that are for the better."""
    better = True
    while better:
        better = False
        for task in range(len(gain)):
            (own,) = [group for group in groups if task in group]
            rest = [t for t in own if t != task]
            lost = _worth(gain, own) - _worth(gain, rest)
            others = [group for group in groups if group is not own]
            if rest and len(groups) < most:
                others.append([])
            values = [
                _worth(gain, [*group, task]) - _worth(gain, group) for group in others
            ]
            if values and max(values) > lost + 1e-12:
                chosen = others[int(np.argmax(values))]
                kept = [
                    group for group in groups if group is not own and group is not chosen
                ]
                groups = [*kept, [*chosen, task], *([rest] if rest else [])]
                better = True
    return groups
