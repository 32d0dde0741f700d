"""Fixtures of all tests."""

import gc
import json
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


# Runs the scripts that it is sent, one after the other, and answers with what they raised.
TWO_DEVICES = """
import json
import os
import sys
import traceback

import keras
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
answers, sys.stdout = sys.stdout, sys.stderr
shared = {}
for line in sys.stdin:
    folder, script = json.loads(line)
    try:
        os.chdir(folder)
        exec(compile(script, "script", "exec"), {"tf": tf, "shared": shared})
        raised = ""
    except BaseException:
        raised = traceback.format_exc()
    keras.utils.clear_session()
    print(json.dumps(raised), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def _two_devices(tmp_path_factory):
    """A process whose CPU is two devices, which must be divided before TensorFlow starts.

    One for all tests of a module, since it takes longer to start than most scripts do.
    """
    with open(tmp_path_factory.mktemp("two_devices") / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", TWO_DEVICES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        yield process
        process.stdin.close()
        process.wait()


@pytest.fixture
def on_two_devices(_two_devices):
    """A function that runs a script where the CPU is two devices, and wants it to pass.

    The script has `tf`, and a dict `shared` with the scripts before it: two strategies in
    one process take each other's messages.
    """

    def run(script):
        _two_devices.stdin.write(json.dumps([os.getcwd(), script]) + "\n")
        _two_devices.stdin.flush()
        answer = _two_devices.stdout.readline()
        assert answer, f"the process ended: {_two_devices.wait()}"
        raised = json.loads(answer)
        assert not raised, raised[-2000:]

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
