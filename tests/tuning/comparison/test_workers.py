"""Several processes at one comparison."""

import json
import os
import platform
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from tuning.comparison import command, workers


def test_results_of_others(tmp_path):
    """What one adds the other finds; nothing is lost where both add at once."""
    one, other = (workers.SharedResults(tmp_path / "runs.jsonl") for _ in range(2))
    one.add({"n": 0}, {"error": 1.0})
    assert other.get({"n": 0}) == {"error": 1.0} and other.get({"n": 1}) is None

    def write(results, numbers):
        for number in numbers:
            results.add({"n": number}, {"error": number})

    both = [
        threading.Thread(target=write, args=(results, range(start, start + 20)))
        for results, start in ((one, 100), (other, 200))
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    third = workers.SharedResults(tmp_path / "runs.jsonl")
    for number in (*range(100, 120), *range(200, 220)):
        for results in (one, other, third):
            assert results.get({"n": number}) == {"error": number}


def test_claims(tmp_path):
    """One at a time; of a process that has ended at once, of another machine's later."""
    chief, worker = workers.Claims(tmp_path), workers.Claims(tmp_path, "w", timeout=0.2)
    with chief.on("stl") as mine:
        assert mine
        with worker.on("stl") as taken, worker.on("hard") as free:
            assert not taken and free
    with worker.on("stl") as mine:
        assert mine
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = {"name": "w", "machine": platform.node(), "process": ended.pid}
    (tmp_path / "tt.json").write_text(json.dumps(owner))
    with chief.on("tt") as mine:
        assert mine
    path = tmp_path / "laf.json"
    path.write_text(json.dumps(owner | {"machine": "elsewhere"}))
    with chief.on("laf") as mine:
        assert not mine
    os.utime(path, (0, 0))
    with chief.on("laf") as mine:
        assert mine
    path.write_text("{")
    with chief.on("laf") as mine:
        assert mine


def test_a_claim_is_kept_alive(tmp_path):
    """However long the work takes."""
    one = workers.Claims(tmp_path, "one", timeout=0.4)
    other = workers.Claims(tmp_path, "other", timeout=0.4)
    with one.on("stl") as mine:
        assert mine
        threading.Event().wait(0.8)
        with other.on("stl") as taken:
            assert not taken


def test_a_claim_that_was_lost(tmp_path):
    """A worker that was stopped for too long does not free what another has now."""
    one, other = workers.Claims(tmp_path, "one"), workers.Claims(tmp_path, "other")
    with one.on("stl") as mine:
        assert mine
        owner = json.loads((tmp_path / "stl.json").read_text()) | {"name": "other"}
        (tmp_path / "stl.json").write_text(json.dumps(owner))
    with one.on("stl") as mine:
        assert not mine
    with other.on("hard") as mine:
        assert mine


def test_together(tmp_path):
    """Every job is done once, by whom it may be; who has nothing left to do waits."""
    done, said = {}, []

    def jobs(name):
        def do(job):
            assert job not in done
            threading.Event().wait(0.05)
            done[job] = name

        return {
            str(n): (lambda n=n: str(n) in done, lambda n=n: do(str(n))) for n in range(9)
        }

    both = [
        threading.Thread(
            target=workers.together,
            args=(jobs(name), workers.Claims(tmp_path, name), said.append, 0.01),
        )
        for name in ("chief", "worker")
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(done) == 9 and {*done.values()} == {"chief", "worker"}


def test_a_failed_job_is_free_again(tmp_path):
    claims = workers.Claims(tmp_path)

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        workers.together({"stl": (lambda: False, fail)}, claims)
    with claims.on("stl") as mine:
        assert mine


@pytest.mark.long
def test_two_processes(tmp_path):
    """The same table as of one, and each training once."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(90, 3)), columns=["a", "b", "y"])
    rows["school"] = np.repeat(["n", "s", "w"], 30)
    rows.to_csv(tmp_path / "marks.csv", index=False)
    given = ["--csv", str(tmp_path / "marks.csv"), "--task", "school", "--target", "y"]
    given += ["--methods", "ridge", "pooled", "related", "mean", "--repeats", "2"]
    given += ["--trials", "3", "--budget", "5"]
    alone = command.main([*given, "--output", str(tmp_path / "alone")])
    given += ["--output", str(tmp_path / "both")]
    start = [sys.executable, "-m", "dmtrl_keras.compare", *given]
    processes = [
        subprocess.Popen(start + more, stdout=subprocess.PIPE, text=True)
        for more in ([], ["--worker", "one"])
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "All trainings are done." in outputs[1]
    found = json.loads((tmp_path / "both" / "results.json").read_text())
    for method, row in alone.table.iterrows():
        assert found["methods"][method]["error"] == pytest.approx(row.error)
    lines = (tmp_path / "both" / "runs.jsonl").read_text().splitlines()
    settings = [json.dumps(json.loads(line)["settings"], sort_keys=True) for line in lines]
    assert len(settings) == len(set(settings))
    # Both had something to do.
    assert all("error" in output for output in outputs)
