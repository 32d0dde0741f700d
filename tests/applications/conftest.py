"""Fixtures of the experiments' tests."""

from few_steps_fixtures import _one_thread, few_eager_steps, few_steps

__all__ = ["_one_thread", "few_eager_steps", "few_steps"]
