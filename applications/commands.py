"""The console scripts: `dmtrl-mnist` calls `commands.mnist`, and so on."""

import importlib
import sys

OURS = ("dmtrl_keras", "applications", "tuning")


def __getattr__(name):
    """A function for each experiment, `search` and `compare`, that runs its command.

    A console script ends with what its function returns as its exit status, so that the
    tables that `main` returns are left out.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    # What to install for it, and where it is.
    elsewhere = {
        "search": ("tuning", "tuning.search"),
        "compare": ("compare", "tuning.comparison.command"),
    }
    package, path = elsewhere.get(name, ("applications", f"applications.{name}"))
    # The installed package, or the checkout.
    module = f"{__name__.removesuffix('applications.commands')}{path}"

    def command():
        try:
            main = importlib.import_module(module).main
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] in OURS:
                raise
            sys.exit(
                f"{error.name} is not installed. The commands need "
                f"pip install 'dmtrl_keras[{package}]'"
            )
        main()

    return command
