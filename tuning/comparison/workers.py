"""Several processes that do the trainings of one comparison, in a folder that all reach."""

import contextlib
import json
import os
import pathlib
import platform
import threading
import time

from .. import application

files = application("files")
results_of = application("results")

# Seconds: a worker that is heard of no more has so long.
TIMEOUT = 120.0


class SharedResults(results_of.Results):
    """Results of a file that other processes add to."""

    def __init__(self, path):
        self._seen = None
        super().__init__(path)

    def get(self, settings):
        self._look()
        return super().get(settings)

    def add(self, settings, results):
        with files.locked(self.path, keep=True):
            self._look()
            super().add(settings, results)
            self._seen = self._state()

    def _state(self):
        if not self.path.exists():
            return None
        found = self.path.stat()
        # A new file takes the old one's place at each change.
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _look(self):
        """Read the file again, if it has changed."""
        state = self._state()
        if state is not None and state != self._seen:
            self._lines, self._runs = [], {}
            self._read()
            self._seen = state


class Claims:
    """Which process does what.

    Args:
        folder: path of a folder that all processes reach.
        name: str, of this process.
        timeout: float, seconds after which what another process has claimed is taken from
            it, if it was not heard of; at once if it ran on this machine and has ended.
    """

    def __init__(self, folder, name="chief", timeout=TIMEOUT):
        self.folder = pathlib.Path(folder)
        self.name, self.timeout = name, timeout
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def on(self, what):
        """Yields whether this process may do it now; claims it meanwhile."""
        path = self.folder / f"{what}.json"
        if not self._taken(path):
            yield False
            return
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(path, ended), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            ended.set()
            beating.join()
            with files.locked(path, keep=True):
                # Another may have taken it, if this process was stopped meanwhile.
                if self._owner(path) == self._me():
                    path.unlink(missing_ok=True)

    def _taken(self, path):
        with files.locked(path, keep=True):
            if path.exists() and self._alive(path):
                return False
            files.write(path, json.dumps(self._me()))
            return True

    def _me(self):
        return {"name": self.name, "machine": platform.node(), "process": os.getpid()}

    @staticmethod
    def _owner(path):
        """Who has claimed something, as `_me`; None: nobody, as far as can be read."""
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None

    def _alive(self, path):
        """Whether the process that has claimed something still does it."""
        owner = self._owner(path)
        if owner is None:
            return False
        if owner["machine"] == platform.node() and not _runs(owner["process"]):
            return False
        return time.time() - path.stat().st_mtime < self.timeout

    def _beat(self, path, ended):
        while not ended.wait(self.timeout / 8):
            with contextlib.suppress(OSError):
                path.touch(exist_ok=True)


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # Of another user.
        return True
    return True


def together(jobs, claims, told=lambda text: None, wait=1.0):
    """Do jobs, each in one of several processes; ends when all are done.

    Args:
        jobs: dict from a name to `(done, do)`: a function that says whether it is done, by
            anybody, and one that does it.
        claims: `Claims`.
        told: function of a str.
        wait: float, seconds between two looks at what others do.
    """
    waited = False
    while True:
        left = {name: job for name, job in jobs.items() if not job[0]()}
        if not left:
            return
        for name, (done, do) in left.items():
            with claims.on(name) as mine:
                # It may have been done meanwhile.
                if mine and not done():
                    do()
                    break
        else:
            if not waited:
                told(f"Waiting for other workers: {', '.join(left)}.")
                waited = True
            time.sleep(wait)
