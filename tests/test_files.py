"""Files are whole or not there, are never written through links, and what killed processes left is
told from what is at work."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmdit.data.cache.plain import read_entries
from mmdit.data.dataset.records import read_records
from mmdit.diagnostics.curves import read_metrics
from mmdit.files import (
    abandoned_files,
    clean,
    expanded,
    flush_file_system,
    lock,
    open_atomically,
    real_path,
    refuse_link,
    replace_folder,
    take_folder,
    write_atomically,
)
from mmdit.training import checkpoint
from mmdit.training.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[1]
LEAVE = """
import os, sys, signal
from mmdit.files import {how}
with {how}(sys.argv[1]) as aside:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "data", ["ä\n", b"bytes", memoryview(b"view"), [b"a", memoryview(b""), b"b"]]
)
def test_what_is_written_is_what_is_there(tmp_path, data):
    write_atomically(tmp_path / "a", iter(data) if isinstance(data, list) else data, flush=True)
    expected = (
        data.encode()
        if isinstance(data, str)
        else b"".join(data)
        if isinstance(data, list)
        else bytes(data)
    )
    assert (tmp_path / "a").read_bytes() == expected and names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a_file", "a_file/below"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, name):
    (tmp_path / "a_file").touch()
    with pytest.raises(ValueError, match=f"nothing can be written into .*{name} .*choose another"):
        take_folder(tmp_path / name, "held")


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a").write_text("old", encoding="utf-8")

    def half():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", half())
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "b") as aside:
        (aside / "inner").touch()
        raise RuntimeError
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old" and names(tmp_path) == ["a"]


def test_an_error_of_the_disk_names_the_file_that_a_person_knows(tmp_path, monkeypatch):
    with (
        pytest.raises(OSError, match="No space left.*wanted.txt"),
        open_atomically(tmp_path / "wanted.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="absent/wanted.txt"):
        write_atomically(tmp_path / "absent" / "wanted.txt", b"x")
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error", a)),
    )
    with pytest.raises(OSError, match="Input/output error.*wanted.txt"):
        write_atomically(tmp_path / "wanted.txt", b"x")
    assert names(tmp_path) == []


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    (tmp_path / "a").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "precious"
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_bytes() == b"new"
    (tmp_path / "c").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a link"):
        refuse_link(tmp_path / "c")


def test_devices_pipes_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(ValueError, match="no regular file"):
            write_atomically(path, b"x")
    with pytest.raises(ValueError, match="pipe is no regular file, and is not written to"):
        refuse_link(tmp_path / "pipe")
    assert names(tmp_path) == ["folder", "link", "pipe"]


def test_two_writers_of_one_name_never_mix(tmp_path):
    """As processes of two machines with one process id did: B writes between A's writing and A's
    renaming."""
    with open_atomically(tmp_path / "a") as first:
        first.write(b"first")
        with open_atomically(tmp_path / "b") as second:
            second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and (tmp_path / "b").read_bytes() == b"second"
    tokens = set()
    for _ in range(50):
        with open_atomically(tmp_path / "c") as file:
            tokens.add(file.name)
    assert len(tokens) == 50


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_then(tmp_path, monkeypatch):
    flushed = []

    def flush(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", flush)
    write_atomically(tmp_path / "a", b"x")
    assert not flushed, "it was not asked for"
    write_atomically(tmp_path / "a", b"y", flush=True)
    assert [number for number, _ in flushed] == [
        (tmp_path / "a").stat().st_ino,
        tmp_path.stat().st_ino,
    ]
    (tmp_path / "a").unlink()
    flushed.clear()
    write_atomically(tmp_path / "a", b"z", flush=True)
    assert [there for _, there in flushed] == [False, True]


def test_a_file_system_is_flushed_by_its_own_call_or_with_all_others(tmp_path, monkeypatch):
    called = []

    class Library:
        @staticmethod
        def syncfs(handle: int) -> int:
            called.append(os.fstat(handle).st_ino)
            return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library)
    flush_file_system(tmp_path)
    assert called == [tmp_path.stat().st_ino]
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # of a system that has none
    monkeypatch.setattr(os, "sync", lambda: called.append("all"), raising=False)
    flush_file_system(tmp_path)
    assert called[1:] == ["all"]


@pytest.mark.parametrize("how", ["open_atomically", "replace_folder"])
def test_leftovers_of_killed_writers_go_and_those_of_writers_at_work_stay(tmp_path, how):
    command = [sys.executable, "-c", LEAVE.format(how=how), str(tmp_path / "killed")]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    with open_atomically(tmp_path / "a") as file, replace_folder(tmp_path / "b") as folder:
        (folder / "inner").touch()
        file.write(b"at work")
        assert [path.name for path in abandoned_files(tmp_path)] == [left]
        clean(tmp_path)
        assert len(names(tmp_path)) == 2 and left not in names(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"at work" and (tmp_path / "b" / "inner").exists()


def test_cleaning_touches_nothing_that_links_lead_to_and_does_not_wait(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    work = tmp_path / "work"
    work.mkdir()
    (work / ".writing-a.tmp").symlink_to(tmp_path / "outside")
    os.mkfifo(work / ".writing-b.tmp")
    (work / ".writing-0-0.tmp").touch()  # of an earlier version
    clean(work, tmp_path / "absent")
    assert names(work) == [] and (tmp_path / "outside" / "precious").exists()


def test_writers_and_cleaners_at_once_lose_nothing(tmp_path):
    """A cleaner may see a new file before its writer has locked it: the writer takes another
    name."""
    stop = threading.Event()

    def tidy():
        while not stop.is_set():
            clean(tmp_path)

    cleaners = [threading.Thread(target=tidy, daemon=True) for _ in range(2)]
    for cleaner in cleaners:
        cleaner.start()
    try:
        for number in range(400):
            write_atomically(tmp_path / f"{number}", b"%d" % number)
    finally:
        stop.set()
        for cleaner in cleaners:
            cleaner.join()
    assert all((tmp_path / f"{number}").read_bytes() == b"%d" % number for number in range(400))
    assert len(names(tmp_path)) == 400


def test_a_lock_keeps_others_out_and_says_so_at_once(tmp_path):
    with (tmp_path / "lock").open("ab") as held, (tmp_path / "lock").open("ab") as other:
        lock(held)
        with pytest.raises(ValueError, match="another process is writing to .*lock"):
            lock(other)
        with pytest.raises(ValueError, match="busy"):
            lock(other, "busy")
    with (tmp_path / "lock").open("ab") as free:
        lock(free)


def test_a_ring_of_links_and_a_user_whom_nobody_knows_are_names_as_others(tmp_path, monkeypatch):
    (tmp_path / "ring").symlink_to("ring")
    assert real_path(tmp_path / "ring") == tmp_path / "ring"
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == Path("/home/me/x")
    assert expanded("~nobody_of_this_name/x") == Path("~nobody_of_this_name/x")
    # pathlib raises RuntimeError for such a user, which is no message to a person
    assert not [path for path in ROOT.glob("mmdit/**/*.py") if ".expanduser()" in path.read_text()]


@pytest.mark.parametrize(
    "read, name",
    [
        (lambda folder: read_records(folder / "meta.jsonl", "image"), "meta.jsonl"),
        (lambda folder: read_entries(folder, 4), "index.jsonl"),
        (checkpoint.Meta.read, "checkpoint.json"),
        (checkpoint.read_notes, "monitor.json"),
        (read_metrics, "metrics.jsonl"),
        (lambda folder: MetricsLog(folder, 3), "metrics.jsonl"),
    ],
)
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path, read, name):
    os.mkfifo(tmp_path / name)

    def stop(number, frame):
        raise TimeoutError("waits for the pipe")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        with pytest.raises((ValueError, OSError), match=f"{name}.*named pipe|named pipe.*{name}"):
            read(tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
