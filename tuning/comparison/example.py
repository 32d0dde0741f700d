"""Tables to try the command on, which come with packages that it needs anyway."""

import numpy as np
import pandas as pd
import statsmodels.api as sm


def _grunfeld():
    """Investment of eleven firms in twenty years (Grunfeld 1958; statsmodels).

    A row is a firm in a year; investment, the firm's value and its stock of capital are in
    logarithms, since firms differ by two orders of magnitude.
    """
    table = sm.datasets.grunfeld.load_pandas().data
    columns = {
        "firm": table["firm"].astype(str),
        "log_value": np.log(table["value"]).round(4),
        "log_capital": np.log(table["capital"]).round(4),
        "log_invest": np.log(table["invest"]).round(4),
    }
    return pd.DataFrame(columns), "firm", "log_invest"


# What is compared on an example if nothing else is asked for: 14 rows of a task are too few
# for networks, which extrapolate to anything.
METHODS = "ridge pooled mean trace-linear clustered related".split()
EXAMPLES = {"grunfeld": _grunfeld}


def write_example(name, folder):
    """Write an example as a CSV file, as one's own would be.

    Args:
        name: a key of `EXAMPLES`.
        folder: path of a folder that exists.

    Returns:
        `(path, task, target)`: of the file, and the names of its columns.
    """
    table, task, target = EXAMPLES[name]()
    path = folder / f"{name}.csv"
    table.to_csv(path, index=False)
    return path, task, target
