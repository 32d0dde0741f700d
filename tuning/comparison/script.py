"""`best.py`: the script that trains what was recommended."""

import os
import pathlib
import pprint

from .. import application

files = application("files")

_SCRIPT = '''"""Trains what was recommended, {title}, on all examples, and predicts.

Written by dmtrl_keras.compare: {sentence}
"""

import pathlib

{imports}

{problem}
trained = train(
    problem,
    {method!r},
    {values},
    epochs={epochs},
    batch_size={batch_size},
    seed={seed},
)
predicted = trained.predict(problem.x)  # of your own examples: a dict by task, as problem.x
for task, outputs in predicted.items():  # in the order of its rows; logits of classes
    print(task, outputs.shape)
if trained.model is not None:
    trained.model.save(pathlib.Path(__file__).with_name("best.keras"))
'''
_TABLE = """problem = table_problem(
    {path!r}, {task!r}, {target!r}, {kind!r}, {categorical!r}{more}
)"""
_EXPERIMENT = """problem = experiment_problem({name!r}, {folder!r})"""
_OWN = """data = {data}()
x, y = data["train"]
problem = Problem(x, y, backbone={model}, metric={metric!r})"""


def write_script(comparison, options, path):
    """Write the script.

    Args:
        comparison: `Comparison`.
        options: the command's parsed arguments.
        path: path of the file.
    """
    method = comparison.recommendation.method
    if options.csv is not None:
        imports = "from dmtrl_keras.compare import table_problem, train"
        problem = _TABLE.format(
            path=str(options.csv.absolute()),
            task=options.task,
            target=options.target,
            kind=options.kind,
            categorical=list(options.categorical),
            more="" if options.separator == "," else f", separator={options.separator!r}",
        )
    elif options.experiment is not None:
        imports = "from dmtrl_keras.compare import experiment_problem, train"
        folder = options.data and str(pathlib.Path(options.data).absolute())
        problem = _EXPERIMENT.format(name=options.experiment, folder=folder)
    else:
        # Python looks in the folder of a script, not where it is called from.
        here = f"sys.path.insert(0, {os.getcwd()!r})  # where the functions were found\n"
        imports = f"import sys\n\n{here}from dmtrl_keras.compare import Problem, train"
        names = []
        for name in ("data", "model"):
            module, _, function = getattr(options, name).partition(":")
            imports += f"\nfrom {module} import {function} as {name}_of_mine"
            names.append(f"{name}_of_mine")
        data, model = names
        problem = _OWN.format(data=data, model=model, metric=options.metric)
    values = pprint.pformat(comparison.chosen[method], width=80, sort_dicts=False)
    text = _SCRIPT.format(
        title=comparison.table.loc[method].title,
        sentence=comparison.sentence.replace('"""', "'''"),
        imports=imports,
        problem=problem,
        method=method,
        values=values.replace("\n", "\n    "),
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    files.write(path, text)
