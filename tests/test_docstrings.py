"""Every example in a docstring of the library runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import dmtrl_keras

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(dmtrl_keras.__path__, "dmtrl_keras.")
    if not name.startswith(("dmtrl_keras.applications", "dmtrl_keras.tuning"))
]


@pytest.mark.parametrize("name", [*MODULES, "applications.experiment"])
def test_examples(name):
    """Run the module's doctests."""
    failures, _ = doctest.testmod(importlib.import_module(name), verbose=False)
    assert failures == 0
