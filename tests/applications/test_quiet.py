"""TensorFlow's start-up messages are left out, and nothing else."""

import os
import pathlib
import subprocess
import sys

import pytest

import applications
from applications import quiet

MESSAGES = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795599655.017696   32178 port.cc:153] oneDNN custom operations are on.
W0000 00:00:1795599655.017696   32178 gpu_device.cc:2342] Cannot dlopen some GPU libraries.
2026-11-25 09:38:01.123456: I tensorflow/core/util/port.cc:153] oneDNN is on.
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow.
E0000 00:00:1795599666.579600   32178 cuda_platform.cc:52] failed call to cuInit: UNKNOWN
2026-11-25 11:45:26.315465: E xla/cuda_platform.cc:51] failed call to cuInit: INTERNAL
"""
OTHERS = """\
E0000 00:00:1795599666.579600   32178 other.cc:52] out of memory
2026-11-25 11:45:26.315465: E xla/other.cc:51] out of memory
Traceback (most recent call last):
To enable anything, read this.
"""


def test_messages_are_left_out(capfd):
    """They are recognised line by line; errors come through."""
    with quiet._filtered_stderr():
        os.write(2, MESSAGES.encode())
        os.write(2, OTHERS.encode())
    os.write(2, b"later\n")
    assert capfd.readouterr().err == OTHERS + "later\n"


def test_exceptions_come_through(capfd):
    """And the standard error is what it was."""
    with pytest.raises(ImportError), quiet._filtered_stderr():
        os.write(2, (MESSAGES + "why it failed\n").encode())
        raise ImportError
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "why it failed\nlater\n"


def test_nothing_changes_after_the_start(monkeypatch):
    """Here TensorFlow runs already."""
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    quiet.start_quietly()
    assert "TF_CPP_MIN_LOG_LEVEL" not in os.environ


def test_command():
    """A command that starts TensorFlow writes nothing but its own error."""
    own = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "tuning.search", "--experiment", "mnist", "--method", "cp"],
        cwd=pathlib.Path(applications.__file__).parents[1],
        env=own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not done.stdout
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("usage: ") and "--method: expected" in last
