"""Experiments: one runnable module for each, `python -m applications.mnist`."""
