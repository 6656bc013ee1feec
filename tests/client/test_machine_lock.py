"""One command at a time drives a machine; the lock's file stays only while something is noted in it."""

import asyncio
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from postcopy.client import machine_lock
from postcopy.client.machine_lock import MachineLock
from postcopy.errors import Refused

ADDRESS = "unix:/tmp/some-machine"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the files are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machine_lock, "_PATIENCE_S", 0.1)
    return tmp_path / f"postcopy-{os.geteuid()}"


def take():
    return asyncio.run(MachineLock.take(ADDRESS))


def test_a_file_without_a_note_does_not_stay(folder):
    lock = take()
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    lock.write(b"note")
    lock.release()
    assert len(list(folder.iterdir())) == 1
    lock = take()
    assert lock.read() == b"note"
    lock.write(b"")
    lock.release()
    lock.release()
    assert list(folder.iterdir()) == []


def test_one_at_a_time():
    lock = take()
    with pytest.raises(Refused, match="another command runs"):
        take()
    lock.release()
    take().release()


def test_a_file_that_has_been_removed_locks_nothing(folder, monkeypatch):
    """It was opened, then removed by its holder, and another has made one anew: that one holds the lock."""
    lock = take()
    (path,) = folder.iterdir()
    opened = os.open
    held = []

    def opens(*arguments):
        fd = opened(*arguments)
        if not held:
            lock.release()
            held.append(opened(path, os.O_RDWR | os.O_CREAT))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return fd

    monkeypatch.setattr(os, "open", opens)
    with pytest.raises(Refused, match="another command runs"):
        take()
    assert path.exists()
    os.close(held[0])


def test_only_what_is_noted_is_taken_at_once():
    assert MachineLock.take_at_once(ADDRESS) is None
    lock = take()
    assert MachineLock.take_at_once(ADDRESS) is None
    lock.write(b"note")
    lock.release()
    found = MachineLock.take_at_once(ADDRESS)
    assert found is not None
    assert found.read() == b"note"
    found.release()


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path):
    folder.mkdir()
    folder.chmod(0o777)
    lock = take()
    lock.write(b"note")
    assert lock.read() == b""
    assert list(folder.iterdir()) == []
