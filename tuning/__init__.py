"""Searches over ranks, thresholds, strengths and loss weights, with Keras Tuner."""

import importlib


def application(name):
    """A module of `applications`, from the checkout or from the installed package."""
    parent = __name__.removesuffix("tuning")
    return importlib.import_module(f"{parent}applications.{name}")


# Before a module of this package imports Keras.
application("quiet")
