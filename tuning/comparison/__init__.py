"""Which method for some data: all that fit, compared fairly, and what follows from it."""

from .candidates import CANDIDATES, Candidate, register
from .compared import Comparison, compare
from .problem import METRICS, Problem
from .search import Options

__all__ = [
    "CANDIDATES",
    "METRICS",
    "Candidate",
    "Comparison",
    "Options",
    "Problem",
    "compare",
    "register",
]
