"""Fixtures that the tests of experiments and of searches have in common."""

import pytest
from threadpoolctl import threadpool_limits

from dmtrl_keras.ground.backend import tensorflow


@pytest.fixture(autouse=True)
def _one_thread():
    """On small arrays several threads of NumPy only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(params=["eager", pytest.param("traced", marks=pytest.mark.long)])
def few_steps(request):
    """For commands that train for a few steps: tracing them would take longer than these.

    With `-m long` the same test runs as users run it, traced.
    """
    yield from _eagerly(request.param == "eager")


@pytest.fixture(params=[pytest.param("traced", marks=pytest.mark.long)])
def steps_as_users(request):
    """For commands that take long even so: as users run them, with `-m long`."""
    yield from _eagerly(False)


@pytest.fixture
def few_eager_steps():
    """Likewise, for a command that another test runs traced."""
    yield from _eagerly(True)


def _eagerly(eager):
    config = tensorflow().config
    config.run_functions_eagerly(eager)
    yield
    config.run_functions_eagerly(False)
