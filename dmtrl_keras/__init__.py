"""Multi-task layers for Keras 3: one network runs T related tasks at once."""

from dmtrl_keras import layers, parameterizations
from dmtrl_keras.version import __version__

__all__ = ["__version__", "layers", "parameterizations"]
