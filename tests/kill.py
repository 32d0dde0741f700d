"""Kill what can be resumed at random moments, and look at what a second call ends with.

    python -m tests.kill
    python -m tests.kill --kills 5 --what search script --seed 1

Each time in a new folder: a process is begun, killed (SIGKILL) at a random moment, every
second time while it writes the next file after that, and begun again; what it ends with is
compared to what one that is left alone ends with. No part of the test run. What is killed:

- `mnist`: `applications.mnist`, two methods, two draws;
- `search`: a search over a network of one's own, and the test of its best settings;
- `script`: a script that trains four networks with Keras's `BackupAndRestore`, which tears
  a backup if it is killed between two files: the table says so, and that is no fault here;
- `saved`: the same with dropout, and another order of the examples in each epoch, by the
  loop of the guide on interruptions.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time

PRELOAD = ["applications.mnist", "tuning.search", "tensorboard.plugins.hparams.api"]
EPOCHS, BATCH, EXAMPLES = 6, 16, 64


def few_images():
    """Images and the labels of two tasks: a function of their mean each."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(EXAMPLES, 6, 6, 2)).astype("float32")
    mean = x.mean(axis=(1, 2, 3))[:, None]
    return x, {"a": (mean > 0).astype("float32"), "b": (mean < 0.05).astype("float32")}


def data():
    """For a search, as `--data`."""
    x, y = few_images()

    def part(rows):
        return x[rows], {task: labels[rows] for task, labels in y.items()}

    losses = dict.fromkeys(y, "binary_crossentropy")
    return {"train": part(slice(48)), "test": part(slice(48, 64)), "losses": losses} | {
        "heads": 1
    }


def backbone(dropout=0.0):
    """For a search, as `--model`."""
    import keras

    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(6, "tanh", name="fc"),
            *([keras.layers.Dropout(dropout)] if dropout else []),
        ]
    )


def networks(dropout=0.0):
    """Functions that make a network of each kind, a dict."""
    from dmtrl_keras import (
        Relation,
        TaskRelationModel,
        TensorNormalRegularizer,
        multitask,
    )
    from dmtrl_keras.parameterizations import SimilarKernels

    def network(**arguments):
        common = {"heads": 1, "verbose": False}
        return multitask(backbone(dropout), ["a", "b"], **common, **arguments)

    return {
        "tucker": lambda: network(sharing="tucker", tolerance=0.3),
        "trn": lambda: TaskRelationModel(
            network(sharing="hard"), Relation("output", 0.1), momentum=0.9
        ),
        "mrn": lambda: network(prior=TensorNormalRegularizer(1e-2, update_every=3)),
        "similar": lambda: network(sharing={"conv": SimilarKernels(0.4)}),
    }


# --- what is killed: a function that runs in a folder, and one that reads what it found ---


def write_digits(folder):
    """Few images in MNIST's files."""
    import numpy as np

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 70), ("t10k", 50)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28)) + 15 * labels[:, None, None]
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
            path = folder / f"{part}-{name}-ubyte"
            path.write_bytes(header + array.astype("uint8").tobytes())


def run_mnist(folder):
    from applications import mnist

    write_digits(folder / "digits")
    small = ["--epochs", "2", "--fraction", "0.0011", "--batch-size", "33", "--fc", "4"]
    small += ["--padding", "valid", "--methods", "stl", "tucker"]
    small += ["--repeats", "2", "--data", str(folder / "digits")]
    mnist.main([*small, "--output", str(folder / "mnist")])


def found_by_mnist(folder):
    lines = (folder / "mnist/runs.jsonl").read_text().splitlines()
    table = (folder / "mnist/table.md").read_text()
    # But for the seconds.
    rows = [line.split("|")[:-2] for line in table.splitlines()]
    runs = _plain(map(json.loads, lines))
    for run in runs:
        # It has the path.
        del run["settings"]["data"]
    return {"runs": runs, "table": rows}


def run_search(folder):
    from tuning import search

    own = ["--model", "tests.kill:backbone", "--data", "tests.kill:data"]
    own += ["--method", "tucker", "--epochs", "2", "--max-trials", "4"]
    search.main([*own, "--directory", str(folder / "search")])


def found_by_search(folder):
    import keras
    import pandas as pd

    own = folder / "search"
    trials = pd.read_csv(own / "trials.csv").drop(columns="seconds")
    tests = (own / "test.jsonl").read_text().splitlines()
    model = keras.saving.load_model(own / "best.keras")
    return {
        "trials": trials.to_dict("list"),
        "best": json.loads((own / "best.json").read_text()),
        "test": _plain(map(json.loads, tests)),
        "model": model.get_weights(),
    }


def run_script(folder):
    import keras

    x, y = few_images()
    for name, make in networks().items():
        if (folder / f"{name}.npz").exists():
            continue
        keras.utils.set_random_seed(0)
        model = make()
        model.compile("adam", "binary_crossentropy")
        path = folder / f"backup_{name}"
        if not (path / "training_metadata.json").exists():
            # The first backup is not whole.
            shutil.rmtree(path, ignore_errors=True)
        backup = keras.callbacks.BackupAndRestore(
            path, double_checkpoint=True, delete_checkpoint=False
        )
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[backup])
        _keep(model, folder / f"{name}.npz")


def run_saved(folder):
    import keras
    import numpy as np

    x, y = few_images()
    for name, make in networks(dropout=0.2).items():
        path = folder / f"{name}.keras"
        if path.exists():
            model = keras.saving.load_model(path)
        else:
            keras.utils.set_random_seed(0)
            model = make()
            model.compile("adam", "binary_crossentropy")
        done = int(model.optimizer.iterations) // (EXAMPLES // BATCH)
        for epoch in range(done, EPOCHS):
            seeds = [v for v in model.variables if v.path.endswith("seed_generator_state")]
            for number, seed in enumerate(seeds):
                seed.assign([number, epoch * 2**16])
            order = np.random.default_rng(epoch).permutation(EXAMPLES)
            labels = {task: values[order] for task, values in y.items()}
            model.fit(x[order], labels, BATCH, epochs=1, shuffle=False, verbose=0)
            part = path.with_name("part.keras")
            model.save(part)
            os.replace(part, path)
        _keep(model, folder / f"{name}.npz")


def _keep(model, path):
    """The variables of a model, the optimizer's and the states among them."""
    import numpy as np

    from applications.files import replacing

    with replacing(path) as part:
        # Seeds of a network that is done are drawn when it is loaded, for nothing.
        found = [v for v in model.variables if not v.path.endswith("seed_generator_state")]
        np.savez(part, *[np.asarray(v) for v in found])


def found_by_script(folder):
    import numpy as np

    found = {}
    for name in networks():
        with np.load(folder / f"{name}.npz") as arrays:
            found[name] = [arrays[key] for key in arrays]
    return found


WHAT = {
    "mnist": (run_mnist, found_by_mnist),
    "search": (run_search, found_by_search),
    "script": (run_script, found_by_script),
    "saved": (run_saved, found_by_script),
}


def _plain(runs):
    """Runs in any order, without the seconds that they took."""
    runs = [
        run | {"results": {k: v for k, v in run["results"].items() if k != "seconds"}}
        for run in runs
    ]
    return sorted(runs, key=lambda run: json.dumps(run["settings"], sort_keys=True))


def torn(folder):
    """What is wrong with a backup of Keras, in words; None if they are all whole."""
    import h5py

    for backup in folder.glob("backup_*"):
        try:
            epoch = json.loads((backup / "training_metadata.json").read_text())["epoch"]
        except FileNotFoundError:
            epoch = 0
        except ValueError:
            return "the epoch's file was cut off"
        if not epoch:
            continue
        try:
            with h5py.File(backup / "latest.weights.h5") as file:
                steps = int(file["optimizer/vars/0"][()])
        except (OSError, KeyError):
            # There is the one before.
            continue
        if steps != epoch * EXAMPLES // BATCH:
            return f"weights after {steps} steps, but epoch {epoch}"
    return None


# --- killing ------------------------------------------------------------------------------


def child(what, folder):
    """Run one of them in this process, which says nothing."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    import tensorflow as tf

    # Tracing would take longer than these steps.
    tf.config.run_functions_eagerly(True)
    WHAT[what][0](folder)


def started(processes, what, folder):
    """A process that runs one of them, begun."""
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=child, args=(what, folder))
    process.start()
    return process


def files_of(folder):
    """What changes when a file is written."""
    found = set()
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if path.name != "log":
            found.add((path, stat.st_size, stat.st_mtime_ns))
    return found


def next_write(process, folder, milliseconds):
    """Wait until a process has begun to write a file, and a little longer."""
    before = files_of(folder)
    while process.is_alive() and files_of(folder) == before:
        pass
    time.sleep(milliseconds / 1e3)


def largest_difference(one, other):
    """Between two structures of numbers; None if they are not alike."""
    import numpy as np

    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return None
        found = [largest_difference(*pair) for pair in zip(one, other)]
        return None if None in found else max(found, default=0.0)
    if one is None or isinstance(one, (str, bool)):
        return 0.0 if one == other else None
    one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        return None
    return float(np.abs(np.nan_to_num(one) - np.nan_to_num(other)).max(initial=0))


def verdict(expected, what, folder, exit_code):
    """How a second call ended, in words, and whether that is well."""
    if exit_code:
        last = (folder / "log").read_text().strip().splitlines()[-1]
        return f"ended with {exit_code}: {last}", False
    gap = largest_difference(expected, WHAT[what][1](folder))
    if gap is None or gap > 1e-5:
        return ("differs" if gap is None else f"differs by {gap:.1g}"), False
    return ("equal" if not gap else f"equal to {gap:.0e}"), True


def main(arguments=None):
    """Kill, and print a table; the status is 1 if something came out otherwise."""
    p = argparse.ArgumentParser(
        prog="python -m tests.kill", description=__doc__.splitlines()[0]
    )
    p.add_argument("--kills", type=int, default=20, help="of each")
    p.add_argument("--what", nargs="+", choices=list(WHAT), default=list(WHAT))
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    options = p.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    # On small arrays threads only wait for each other.
    for name in ("OMP_NUM", "OPENBLAS_NUM", "TF_NUM_INTRAOP", "TF_NUM_INTEROP"):
        os.environ[f"{name}_THREADS"] = "1"
    # Processes are forked from one that has imported all, and has run nothing.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    first = processes.Process(target=int)
    first.start()
    first.join()

    from dmtrl_keras.ground.tables import make_console, print_table

    rng, rows, well, console = random.Random(options.seed), [], True, make_console()
    with tempfile.TemporaryDirectory(prefix="kill_") as top:
        for what in options.what:
            folder = pathlib.Path(top, what)
            begun = time.monotonic()
            process = started(processes, what, folder)
            process.join()
            seconds = time.monotonic() - begun
            if process.exitcode:
                sys.exit((folder / "log").read_text())
            expected = WHAT[what][1](folder)
            for number in range(options.kills):
                folder = pathlib.Path(top, f"{what}_{number}")
                moment, later = rng.uniform(0, seconds), rng.uniform(0, 4)
                process = started(processes, what, folder)
                process.join(moment)
                if number % 2:
                    next_write(process, folder, later)
                process.kill()
                process.join()
                wrong = torn(folder)
                again = started(processes, what, folder)
                again.join()
                outcome, is_well = verdict(expected, what, folder, again.exitcode)
                well &= is_well or wrong is not None
                when = f"{moment:.2f} of {seconds:.1f}"
                when += f", write + {later:.1f} ms" if number % 2 else ""
                rows.append([what, when, wrong or "-", outcome])
                console.print(*rows[-1], sep="; ", highlight=False)
    columns = ["What", "Killed after s", "Keras's backup", "The second call"]
    print_table("Killed, and called again", columns, rows, 4, 2, console=console)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
