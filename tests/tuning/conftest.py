"""Fixtures of the searches' tests."""

from few_steps_fixtures import _one_thread, few_steps, steps_as_users

__all__ = ["_one_thread", "few_steps", "steps_as_users"]
