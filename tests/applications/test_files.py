"""Files that are whole or as before, and folders of one process."""

import errno
import multiprocessing
import os
import pathlib
import signal
import threading

import pytest

from applications.files import (
    UnusableFileError,
    locked,
    replacing,
    working_in,
    write,
)
from applications.results import write_block


def no_space(*_):
    """What a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_replaced_whole(tmp_path):
    """The new content, the old rights; a link stays one."""
    path, link = tmp_path / "file.txt", tmp_path / "link.txt"
    write(path, "old ±\n")
    path.chmod(0o640)
    link.symlink_to(path)
    write(link, "new ±\n")
    assert link.is_symlink() and path.read_text("utf-8") == "new ±\n"
    assert path.stat().st_mode & 0o777 == 0o640
    with replacing(tmp_path / "a.keras") as part:
        assert part.suffix == ".keras"
        part.write_bytes(b"1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.keras", "file.txt", "link.txt"]


@pytest.mark.parametrize("when", ["write", "fsync"])
def test_full_disk(tmp_path, monkeypatch, when):
    """The page that a table is written into stays as it was, and nothing is beside it."""
    page = tmp_path / "page.md"
    text = "before\r\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter ±\r\n"
    page.write_bytes(text.encode())
    with monkeypatch.context() as patch:
        if when == "write":

            def half(self, content):
                with self.open("wb") as file:
                    file.write(content[: len(content) // 2])
                no_space()

            patch.setattr(pathlib.Path, "write_bytes", half)
        else:
            patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            write_block(page, "a", "new")
    assert page.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [page]
    write_block(page, "a", "new")
    assert page.read_bytes() == text.replace("old", "new").encode()


def test_blocks_of_one_page_at_once(tmp_path):
    """Each of several writers finds its block there at the end."""
    page = tmp_path / "page.md"
    names = [f"block{number}" for number in range(6)]
    page.write_text("".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in names))
    writers = [
        threading.Thread(target=write_block, args=(page, n, f"text of {n}")) for n in names
    ]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert all(f"text of {n}" in page.read_text() for n in names)
    assert list(tmp_path.iterdir()) == [page]


def hold(folder, begun):
    """Work in a folder for ever."""
    with working_in(folder):
        begun.set()
        signal.pause()


def test_two_processes(tmp_path, capsys):
    """The second is refused with the first one's number, until that is killed."""
    folder = tmp_path / "deep" / "results"
    spawned = multiprocessing.get_context("fork")
    begun = spawned.Event()
    other = spawned.Process(target=hold, args=(folder, begun))
    other.start()
    assert begun.wait(30)
    message = rf"results is in use by process {other.pid} on .+, since 2.+ Wait until"
    with pytest.raises(SystemExit, match=message), working_in(folder):
        pass
    # Others' locks are others'.
    with working_in(folder, name="lock-worker1"):
        pass
    other.kill()
    other.join()
    with working_in(folder):
        text = (folder / ".lock-owner").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
    assert not (folder / ".lock-owner").exists()


def test_interrupted(tmp_path, capsys):
    """Ctrl-C ends with a line that says how to go on, and gives the folder back."""
    with pytest.raises(SystemExit) as ended, working_in(tmp_path):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    said = capsys.readouterr().err.strip()
    assert said == (
        f"Interrupted. {tmp_path} has what is done. "
        "The same command goes on from what is there."
    )
    with working_in(tmp_path):
        pass


def test_one_line(tmp_path):
    """What can't be used is said without a traceback; other errors stay as they are."""
    with pytest.raises(SystemExit, match="runs, line 3"), working_in(tmp_path):
        raise UnusableFileError("runs, line 3")
    with pytest.raises(ValueError, match="another"), working_in(tmp_path):
        raise ValueError("another")
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "page.md"):
        raise ZeroDivisionError
    assert not (tmp_path / ".page.md.lock").exists()
