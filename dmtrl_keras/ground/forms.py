"""The forms in which features of T tasks lie in tensors: one vocabulary for all rooms."""

import enum


class Form(enum.StrEnum):
    """How the features of T tasks lie in tensors, C channels for each task.

    Attributes:
        SHARED: `(batch, ..., C)`, the same features for every task.
        GROUPED: `(batch, ..., T * C)`, task-major: the layout of the library.
        BATCHED: `(T * batch, ..., C)`, the examples of one task after those of another.
        APART: `(batch, ..., C)` for each task, in a tensor of its own.
    """

    SHARED = "shared"
    GROUPED = "grouped"
    BATCHED = "batched"
    APART = "apart"
