"""Fixtures of all tests."""

import gc
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() == "torch":
    import torch

    # NumPy takes no tensor that a gradient reaches; the tests compare them as arrays.
    _as_array = torch.Tensor.__array__
    torch.Tensor.__array__ = lambda self, *args, **kwargs: _as_array(
        self.detach(), *args, **kwargs
    )


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _free_memory():
    """Models and traced functions of one module are not carried through the others."""
    yield
    keras.utils.clear_session()
    gc.collect()
    # What is left stays; later collections need not look through it.
    gc.freeze()


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)


TWO_DEVICES = """
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
"""


@pytest.fixture
def on_two_devices():
    """A function that runs a script where the CPU is two devices, and wants it to pass."""

    def run(script):
        # In a process of its own: devices are divided before TensorFlow starts.
        call = [sys.executable, "-c", TWO_DEVICES + script]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("DMTRL_DATA_DIR")
    if not folder:
        pytest.skip("DMTRL_DATA_DIR is not set")
    folder = pathlib.Path(folder)
    assert folder.is_dir(), f"DMTRL_DATA_DIR: no such folder: {folder}"
    return folder


def pytest_collection_finish(session):
    """Where every test must run, a skip is turned into a failure."""
    session.config.fail_on_skip = bool(os.environ.get("DMTRL_FAIL_ON_SKIP"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Report a skip as a failure if `DMTRL_FAIL_ON_SKIP` is set."""
    report = yield
    if report.skipped and getattr(item.config, "fail_on_skip", False):
        report.outcome = "failed"
        report.longrepr = f"skipped, but DMTRL_FAIL_ON_SKIP is set: {report.longrepr}"
    return report
