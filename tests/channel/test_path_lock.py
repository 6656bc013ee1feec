"""One writer at a time for each file; the dead are in nobody's way."""

import subprocess
import sys

import pytest

from postcopy.channel.path_lock import SUFFIX, PathLock, path_locked
from postcopy.errors import Refused

DIES = """
import os, signal, sys
from postcopy.channel.path_lock import PathLock
claim = PathLock(sys.argv[1])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image"


def test_a_second_writer_is_refused_until_the_first_has_done(path):
    first = PathLock(path)
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            PathLock(path)
    assert str(refused.value) == (
        f"another process is writing {path}; wait until that is done, or give another path"
    )
    first.release()
    first.release()
    with path_locked(path):
        pass
    assert not list(path.parent.iterdir())


def test_other_files_are_free(path):
    with path_locked(path), path_locked(f"{path}.partial"), path_locked(path.with_name("other")):
        pass


def test_a_killed_writer_is_in_nobodys_way(path):
    ended = subprocess.run([sys.executable, "-c", DIES, path], timeout=30, check=False)
    assert ended.returncode == -9
    assert path.with_name(f"image{SUFFIX}").exists()
    with path_locked(path), pytest.raises(Refused):
        PathLock(path)
    assert not list(path.parent.iterdir())


def test_a_lock_that_is_taken_away_while_it_is_waited_for_is_taken_anew(path, monkeypatch):
    """Its holder has released it between our opening and locking it."""
    first, take = PathLock(path), PathLock._is_there
    looks = []

    def gone(claim):
        looks.append(take(claim))
        return looks[-1]

    monkeypatch.setattr(PathLock, "_is_there", gone)
    monkeypatch.setattr("postcopy.channel.path_lock._locked", lambda fd: (first.release(), True)[1])
    second = PathLock(path)
    assert looks == [False, True]
    second.release()


def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / f"image{SUFFIX}").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        PathLock(path)
    assert not (tmp_path / "elsewhere").exists()


def test_where_nothing_can_be_locked_nobody_is_kept_out(path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with path_locked(path), path_locked(path):
        pass
