"""How the stacked kernel of T tasks comes to be.

A parameterization says what a layer's variables are, how they compose to the
stacked kernel, and how they are applied. Layers take one by name or as an object:
`TaskConv2D(32, 3, tasks=4, sharing="tucker")`.
"""

from dmtrl_keras.parameterizations.base import (
    FactorizedParameterization,
    Parameterization,
    get,
    names,
    register,
)
from dmtrl_keras.parameterizations.independent import Hard, Independent
from dmtrl_keras.parameterizations.laf import LAF
from dmtrl_keras.parameterizations.similar import SimilarKernels, StoredOnce
from dmtrl_keras.parameterizations.tt import TT
from dmtrl_keras.parameterizations.tucker import Tucker

__all__ = [
    "LAF",
    "TT",
    "FactorizedParameterization",
    "Hard",
    "Independent",
    "Parameterization",
    "SimilarKernels",
    "StoredOnce",
    "Tucker",
    "get",
    "names",
    "register",
]
