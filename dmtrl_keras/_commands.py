"""A quiet start of the installed commands, which import this package before their own.

`import dmtrl_keras` in any other program changes nothing.
"""

import importlib
import pathlib
import sys

_MODULES = ("dmtrl_keras.applications", "dmtrl_keras.tuning")


def is_command(arguments: list[str]) -> bool:
    """Whether a process was started as one of the library's commands.

    Args:
        arguments: list of str, as `sys.orig_argv`.

    Example:

    >>> is_command(["python", "-m", "dmtrl_keras.applications.mnist", "--repeats", "2"])
    True
    >>> is_command(["/usr/bin/python", "/usr/bin/dmtrl-search", "--experiment", "mnist"])
    True
    >>> is_command(["python", "train.py", "dmtrl-search"])
    False
    """
    if "-m" in arguments[:-1]:
        return arguments[arguments.index("-m") + 1].startswith(_MODULES)
    return any(pathlib.Path(part).name.startswith("dmtrl-") for part in arguments[:2])


if is_command(sys.orig_argv):
    # The experiments start TensorFlow without its messages, before Keras does.
    importlib.import_module("dmtrl_keras.applications")
