"""Which method for my tasks: all that fit, compared fairly.

    python -m dmtrl_keras.compare --csv FILE --task COLUMN --target COLUMN
    python -m dmtrl_keras.compare --model module:backbone --data module:data
    python -m dmtrl_keras.compare --experiment omniglot --data FOLDER

Settings are chosen on a part of the training examples, with equal trials for all methods;
then each is trained on the same draws, and tested. Results are written as they come: called
again with the same arguments it goes on where it was.
"""

import argparse
import dataclasses
import json
import pathlib

import pandas as pd

from .. import application
from ..own import checked_data, function_of
from .candidates import CANDIDATES
from .compared import compare_on
from .example import EXAMPLES, METHODS, write_example
from .experiments import PRESETS
from .experiments import problem_of as experiment_problem
from .problem import BINARY, CLASSES, METRICS, REGRESSION, Problem, table_problem
from .report import COSTS, curve_rows, methods_rows, report, to_json
from .script import write_script
from .search import Options

arguments = application("arguments")
experiment = application("experiment")
files = application("files")
reading = application("reading")
make_console = experiment.make_console


def parser():
    """The arguments."""
    own = Options()
    p = argparse.ArgumentParser(
        prog="python -m dmtrl_keras.compare",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", type=pathlib.Path, help="a table with a row per example")
    source.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="returns the backbone of each task; with --data",
    )
    source.add_argument(
        "--experiment",
        choices=list(PRESETS),
        help="a small part of one of this project's data sets; with --data",
    )
    source.add_argument(
        "--example",
        choices=list(EXAMPLES),
        help="a table that is at hand, which is written to --output as a file for --csv",
    )
    p.add_argument(
        "--data",
        metavar="MODULE:FUNCTION|FOLDER",
        help="of --model: returns a dict, as for searches; of --experiment: its folder",
    )
    p.add_argument("--task", help="of --csv: the column that says whose example it is")
    p.add_argument("--target", help="of --csv: the column to be predicted")
    p.add_argument(
        "--kind",
        choices=(REGRESSION, BINARY, CLASSES),
        help="of --csv: what the target is; by default binary with two values, classes "
        "with more that are no numbers, else a regression",
    )
    p.add_argument(
        "--categorical",
        nargs="+",
        default=[],
        help="of --csv: columns that are categories although they look like numbers",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        choices=list(CANDIDATES),
        help="by default all that fit; of an example some",
    )
    p.add_argument("--metric", choices=list(METRICS), help="by the kind of the tasks")
    p.add_argument("--separator", default=",", help="of --csv: what is between its columns")
    p.add_argument(
        "--trials",
        type=arguments.whole(1),
        default=own.trials,
        help="settings that are tried of each method that has some",
    )
    p.add_argument(
        "--repeats",
        type=arguments.REPEATS,
        default=own.repeats,
        help="draws of the training part, the same for all methods",
    )
    p.add_argument(
        "--budget",
        type=arguments.real(above=0),
        help="minutes; fewer trials and draws, of all methods, where they take longer",
    )
    p.add_argument(
        "--fractions",
        nargs="+",
        type=arguments.real(above=0, below=1),
        default=[],
        help="of the training examples, for a learning curve, such as 0.25 0.5",
    )
    p.add_argument(
        "--epochs",
        type=arguments.whole(1),
        default=own.epochs,
        help="of networks; at least 600 steps in all, few examples are repeated",
    )
    p.add_argument(
        "--batch-size", type=arguments.whole(1), default=own.batch_size, help="of networks"
    )
    share = arguments.real(above=0, below=1)
    p.add_argument(
        "--validation",
        type=share,
        default=own.validation,
        help="the share of the training part by which settings are chosen",
    )
    p.add_argument(
        "--test",
        type=share,
        help="the share of the examples that are tested on, where no test part is given; "
        "by default 0.3, of an experiment its own",
    )
    p.add_argument("--seed", type=arguments.SEED, default=own.seed, help="of the draws")
    p.add_argument(
        "--worker",
        metavar="NAME",
        help="do a part of the trainings for a call with the same other arguments, from "
        "another process or machine that has the same folder; end when all are done",
    )
    p.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/compare"))
    return p


@reading.one_line()
def main(given=None):
    """Run the command; returns the `Comparison`."""
    p = parser()
    options = arguments.parse_arguments(p, given)
    if options.csv is not None and not (options.task and options.target):
        p.error("--csv needs --task COLUMN and --target COLUMN")
    if options.model is not None and options.data is None:
        p.error("--model MODULE:FUNCTION needs --data MODULE:FUNCTION")
    if options.data is not None and not (options.model or options.experiment):
        p.error("--data needs --model MODULE:FUNCTION or --experiment NAME")
    console = make_console()
    name = "lock" if options.worker is None else f"lock-{options.worker}"
    with files.working_in(options.output, name=name), options.strategy.scope():
        if options.example is not None:
            found = write_example(options.example, options.output)
            options.csv, options.task, options.target = found
            options.methods = options.methods or METHODS
            console.print(f"The table is {options.csv}.")
        problem = problem_of(p, options)
        names = [field.name for field in dataclasses.fields(Options)]
        own = Options(**{n: getattr(options, n) for n in names if hasattr(options, n)})
        found = compare_on(problem, own, options.output, console.print, options.worker)
        if found is None:
            console.print("All trainings are done.")
            return None
        experiment.Table("Methods", shown(found)).print(console)
        console.print(found.sentence, highlight=False)
        files.write(options.output / "results.json", json.dumps(to_json(found), indent=1))
        report(found, options.output / "report.html")
        write_script(found, options, options.output / "best.py")
        if len(found.curve):
            experiment.Table("Learning curve", shown(found, curve_rows)).print(console)
        console.print(
            f"The report is {options.output / 'report.html'}, the script that trains what "
            f"is recommended {options.output / 'best.py'}."
        )
    return found


def problem_of(p, options):
    """The problem that the arguments name."""
    if options.csv is not None:
        return table_problem(
            options.csv,
            options.task,
            options.target,
            options.kind,
            options.categorical,
            options.metric,
            options.separator,
        )
    if options.experiment is not None:
        return experiment_problem(options.experiment, options.data)
    try:
        make, data = function_of(options.model), function_of(options.data)
    except ValueError as error:
        p.error(str(error))
    data = checked_data(data(), options.data)
    x, y = data["train"]
    return Problem(x, y, data["test"], backbone=make, metric=options.metric)


def shown(found, rows_of=methods_rows):
    """A table of the terminal, a data frame of strings."""
    header, rows = rows_of(found)
    frame = pd.DataFrame(
        [[text for text, _ in row] for row in rows.values()], columns=header
    )
    # 80 columns have no room for these.
    return frame.drop(columns=list(COSTS), errors="ignore")


if __name__ == "__main__":
    main()
