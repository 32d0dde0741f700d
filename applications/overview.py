"""All methods on all data: what sharing gains, and on what.

Each data set is a small problem, such as two cores bear, on which `dmtrl_keras.compare`
trains all methods that fit, with equal trials and paired draws. One table has a row for
each method and a column for each data set: how far its error is below that of the better
one of the methods that share nothing, in per cent, with a 95% interval.

    python -m applications.overview --data FOLDER --budget 10
"""

import argparse
import json
import pathlib

import pandas as pd

from dmtrl_keras import compare
from dmtrl_keras.ground.tables import make_console

from .arguments import REPEATS, SEED, add_page, check_page, parse_arguments, real, whole
from .experiment import Table, publish
from .files import working_in, write
from .reading import one_line

# Data sets in the order of the table; they are presets of `compare --experiment`.
NAMES = {
    "school": "School",
    "office_caltech": "Office-Caltech",
    "outlier": "Office-Caltech, an outlier",
    "faces": "faces",
    "omniglot": "Omniglot",
    "mtal": "digits and letters",
    "mtal_unrelated": "digits and objects",
    "digits": "ten digits",
}
BLOCKS = ("overview", "overview-answers")


def parse(arguments=None):
    """The parsed arguments."""
    p = argparse.ArgumentParser(
        prog="python -m applications.overview",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help="folder with the data sets, as their experiments take them",
    )
    p.add_argument("--names", nargs="+", choices=list(NAMES), default=list(NAMES))
    p.add_argument("--methods", nargs="+", help="of `compare`; by default all that fit")
    p.add_argument(
        "--budget",
        type=real(above=0),
        help="minutes for each data set, with fewer trials and draws where needed",
    )
    p.add_argument("--trials", type=whole(1), default=6, help="of each method")
    p.add_argument("--repeats", type=REPEATS, default=5, help="draws")
    p.add_argument("--epochs", type=whole(1), default=30, help="of networks")
    p.add_argument("--batch-size", type=whole(1), default=32, help="of networks")
    p.add_argument("--seed", type=SEED, default=0)
    p.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results/overview"),
        help="folder of results; a call that was interrupted goes on from them, and a data "
        "set that was begun with the settings that it was begun with",
    )
    add_page(p)
    options = parse_arguments(p, arguments)
    check_page(p, options, BLOCKS)
    return options


def begun_with(folder, settings):
    """The settings with which a data set was begun, so that it goes on with them.

    Data sets that take longer can so have another budget than the others of one table.

    Args:
        folder: `pathlib.Path` of its results.
        settings: dict, those of this call, which are written down if it is the first.
    """
    path = folder / "settings.json"
    if path.exists():
        return json.loads(path.read_text())
    write(path, json.dumps(settings, indent=1))
    return settings


def table_of_gains(found):
    """A row for each method, a column for each data set.

    Args:
        found: dict from the name of a data set to its comparison.

    Returns:
        A data frame of strings.
    """
    columns, titles = {}, {}
    for name, comparison in found.items():
        cells = {}
        for method, row in comparison.table.iterrows():
            titles[method] = row.title
            if method == comparison.baseline:
                cells[method] = f"baseline, {row.error:.3f}"
            else:
                cells[method] = f"{row.delta:+.1f}"
                if len(comparison.errors[method]) > 1:
                    cells[method] += f" ({row.low:+.1f} to {row.high:+.1f})"
            if method == comparison.recommendation.method:
                cells[method] = f"**{cells[method]}**"
        columns[NAMES[name]] = cells
    frame = pd.DataFrame(columns).reindex(list(titles)).fillna("")
    frame.insert(0, "Method", list(titles.values()))
    return frame.reset_index(drop=True)


def table_of_answers(found):
    """What is recommended for each data set."""
    rows = [
        {
            "Data": NAMES[name],
            "Tasks": str(len(comparison.tasks)),
            "Draws": str(len(next(iter(comparison.errors.values())))),
            "Methods": str(len(comparison.table)),
            "Answer": comparison.sentence,
        }
        for name, comparison in found.items()
    ]
    return pd.DataFrame(rows)


@one_line()
def main(arguments=None):
    """Run the command.

    Returns:
        A dict of its tables, data frames of strings.
    """
    options = parse(arguments)
    console = make_console()
    own = {n: getattr(options, n) for n in ("budget", "trials", "repeats", "epochs")}
    own |= {"batch_size": options.batch_size, "seed": options.seed}
    found = {}
    with working_in(options.output), options.strategy.scope():
        for name in options.names:
            console.print(f"{NAMES[name]}:")
            problem = compare.experiment_problem(name, options.data)
            folder = options.output / name
            folder.mkdir(exist_ok=True)
            settings = begun_with(folder, own | {"methods": options.methods})
            found[name] = compare.compare(
                problem, folder=folder, told=console.print, **settings
            )
            console.print(found[name].sentence, highlight=False)
        note = (
            "Δm against the better method that shares nothing, %, and its 95% interval "
            "over the draws; that method has its mean error. In bold: what is recommended."
        )
        tables = {
            "overview": Table("Gains", table_of_gains(found), "overview", note=note),
            "overview-answers": Table("Answers", table_of_answers(found), "answers"),
        }
        publish(tables, options, console)
        console.print(f"Results are in {options.output}.")
    return {name: table.frame for name, table in tables.items()}


if __name__ == "__main__":
    main()
