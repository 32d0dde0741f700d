"""Experiments: one runnable module for each, `python -m applications.mnist`."""

from .quiet import start_quietly

# Before a module of this package imports Keras.
start_quietly()
