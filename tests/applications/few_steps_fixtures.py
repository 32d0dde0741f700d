"""Fixtures that the tests of experiments and of searches have in common."""

import pytest
from threadpoolctl import threadpool_limits

from dmtrl_keras.ground.backend import tensorflow


@pytest.fixture(autouse=True)
def _one_thread():
    """On small arrays several threads of NumPy only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def few_steps():
    """For commands that train for a few steps, which tracing would take longer than."""
    yield from _eagerly(True)


@pytest.fixture(params=[pytest.param("traced", marks=pytest.mark.long)])
def steps_as_users(request):
    """For one command of each kind: traced, as users run them, with `-m long`."""
    yield from _eagerly(False)


def _eagerly(eager):
    config = tensorflow().config
    config.run_functions_eagerly(eager)
    yield
    config.run_functions_eagerly(False)
