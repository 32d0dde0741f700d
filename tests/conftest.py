"""Fixtures of all tests."""

import os
import pathlib

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("DMTRL_DATA_DIR")
    if not folder:
        pytest.skip("DMTRL_DATA_DIR is not set")
    folder = pathlib.Path(folder)
    assert folder.is_dir(), f"DMTRL_DATA_DIR: no such folder: {folder}"
    return folder
