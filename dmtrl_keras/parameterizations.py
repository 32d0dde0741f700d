"""How the stacked kernel of T tasks comes to be.

A parameterization says what a layer's variables are, how they compose to the
stacked kernel, and how they are applied. Layers take one by name or as an object:
`TaskConv2D(32, 3, tasks=4, sharing="tucker")`.
"""

from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.dmtrl.laf import LAF
from dmtrl_keras.dmtrl.tt import TT
from dmtrl_keras.dmtrl.tucker import Tucker
from dmtrl_keras.kernels.independent import Hard, Independent
from dmtrl_keras.kernels.lora import LoRA
from dmtrl_keras.kernels.parameterization import Parameterization, get, names, register
from dmtrl_keras.mtal.similar_kernels import SimilarKernels
from dmtrl_keras.mtal.stored_once import StoredOnce
from dmtrl_keras.norms.parts import Parts

__all__ = [
    "LAF",
    "TT",
    "FactorizedParameterization",
    "Hard",
    "Independent",
    "LoRA",
    "Parameterization",
    "Parts",
    "SimilarKernels",
    "StoredOnce",
    "Tucker",
    "get",
    "names",
    "register",
]
