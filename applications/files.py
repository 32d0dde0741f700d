"""Files that are whole or not there, and folders that one process writes into."""

import contextlib
import datetime
import os
import pathlib
import platform
import shutil
import sys

import numpy as np
from filelock import FileLock, Timeout

from .reading import DataError, read_arrays

GOES_ON = "The same command goes on from what is there."


class UnusableFileError(DataError):
    """A file that an interrupted call left, or another program, and can't be read."""


@contextlib.contextmanager
def replacing(path):
    """A file that takes another's place when it is whole.

    Whatever happens meanwhile, a killed process or a full disk among it, the old file stays
    as it was.

    Args:
        path: path of the file, which need not be there.

    Yields:
        The path to write to, in the same folder, with the same suffix.
    """
    # What a link points to is replaced, not the link.
    path = pathlib.Path(path).resolve()
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write(path, content):
    """Write a text or bytes into a file, which has the old content or the new one."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def cached_arrays(path, make):
    """Arrays of a file, which is made where it is not there.

    Args:
        path: `pathlib.Path` of an `.npz` file.
        make: function without arguments that returns a dict of arrays.
    """
    if path.exists():
        try:
            return read_arrays(path, most=float("inf"))
        except DataError as error:
            raise DataError(f"{error} Delete it, then it is made again.") from error
    arrays = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        np.savez(part, **arrays)
    return arrays


@contextlib.contextmanager
def locked(path, keep=False):
    """Wait for others that change a file, and let no other change it meanwhile.

    Args:
        path: path of the file.
        keep: bool, whether the lock's file stays. Where many processes come and go it
            must: one that waits for a file that is removed has a lock that no other sees.
    """
    path = pathlib.Path(path).resolve()
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock, timeout=60):
        try:
            yield
        finally:
            if not keep:
                # Beside a page nothing is left.
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def working_in(folder, hint=GOES_ON, name="lock"):
    """Write into a folder as the only process that does, and end well on Ctrl-C.

    Args:
        folder: path; it is made.
        hint: str, said after an interruption.
        name: str, of the lock; processes with different ones don't exclude each other.

    Raises:
        SystemExit: if another process has the folder, with its number; if the user
            interrupts; if a file there can't be used.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / f".{name}", timeout=0), folder / f".{name}-owner"
    try:
        lock.acquire()
    except Timeout:
        raise SystemExit(
            f"{folder} is in use by {_read(owner)}. Wait until that has ended, or give "
            "another folder."
        ) from None
    try:
        since = datetime.datetime.now().isoformat(" ", "seconds")
        write(owner, f"process {os.getpid()} on {platform.node()}, since {since}")
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted. {folder} has what is done. {hint}", file=sys.stderr)
        # As a shell has it.
        raise SystemExit(130) from None
    except UnusableFileError as error:
        raise SystemExit(str(error)) from error
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read(owner):
    try:
        return owner.read_text()
    except OSError:
        # It has only just taken it.
        return "another process"
