"""Files that get their names when they are whole, and replace nothing but such files."""

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from postcopy.channel.whole_file import (
    Place,
    WholeFile,
    check_replaceable,
    give_name,
    is_partial,
    kept,
    look_at,
    partial_name,
    publish,
    remove_all_leftovers,
    remove_leftovers,
    write_whole,
)
from postcopy.errors import Refused

DIES = """
import os, signal, sys
from pathlib import Path
from postcopy.channel.whole_file import WholeFile
file = WholeFile(Path(sys.argv[1]))
file.write_at(0, b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def names_in(folder):
    return sorted(each.name for each in folder.iterdir())


def test_it_has_its_name_when_it_is_whole(path):
    path.write_bytes(b"old")
    path.chmod(0o644)
    with WholeFile(path) as file:
        file.write_at(3, b"def")
        file.write_at(0, memoryview(b"abc"))
        assert path.read_bytes() == b"old"
        file.publish()
    file.close()
    assert path.read_bytes() == b"abcdef"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names_in(path.parent) == ["file"]


def test_nothing_of_it_stays_when_it_is_not_published(path):
    with pytest.raises(ZeroDivisionError), WholeFile(path) as file:
        file.write_at(1 / 0, b"")
    assert names_in(path.parent) == []


@pytest.mark.parametrize("replacing", [True, False])
def test_any_number_of_writers_at_once(path, replacing):
    """Each file is one of theirs, and none of them is in another's way."""
    with WholeFile(path) as first, WholeFile(path) as second:
        first.write_at(0, b"first")
        second.write_at(0, b"second")
        second.publish()
        if replacing:
            first.publish()
        else:
            with pytest.raises(Refused, match="exists; remove it, or give another path"):
                first.publish(replacing=False)
    assert path.read_bytes() == (b"first" if replacing else b"second")
    assert names_in(path.parent) == ["file"]


def test_what_a_killed_writer_has_left_goes_with_the_next(path):
    ended = subprocess.run([sys.executable, "-c", DIES, path], timeout=30, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = names_in(path.parent)
    assert is_partial(path.with_name(left))
    other = path.with_name("other")
    write_whole(other, b"whole")
    assert names_in(path.parent) == [left, "other"]
    write_whole(path, b"whole")
    assert names_in(path.parent) == ["file", "other"]


def test_what_others_have_left(path):
    left = [partial_name(path.with_name(name)) for name in ("file", "other")]
    for each in left:
        each.touch()
    with WholeFile(path) as living, kept(left[1]):
        assert not left[0].exists()
        remove_all_leftovers(path.parent)
        assert living.partial.exists()
        assert left[1].exists()
    remove_all_leftovers(path.parent)
    assert names_in(path.parent) == []


def test_where_files_cannot_be_locked_none_is_taken_for_a_dead_writers(path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    left = partial_name(path)
    left.touch()
    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_whole(path, b"whole")
    assert names_in(path.parent) == ["file", left.name]


def test_where_files_have_no_second_names(path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    write_whole(path, b"whole", replacing=False)
    with pytest.raises(Refused, match="exists"):
        write_whole(path, b"other", replacing=False)
    assert path.read_bytes() == b"whole"
    assert names_in(path.parent) == ["file"]


def test_only_names_of_its_own_are_taken_for_leftovers(path):
    names = [
        "file.partial", "file.0123456789abcdeg.partial", "file.0123456789abcdef.partial.lock",
        ".0123456789abcdef.partial", "file.0123456789abcdef",
    ]  # fmt: skip
    for name in names:
        path.with_name(name).touch()
        assert not is_partial(path.with_name(name))
    path.with_name("file.0123456789abcdef.partial").symlink_to("file.partial")
    remove_all_leftovers(path.parent)
    remove_leftovers(path)
    assert len(names_in(path.parent)) == len(names) + 1


@pytest.mark.parametrize("name", ["x" * 255, "\N{SNOWMAN}" * 85, "\udcff" * 255])
def test_the_longest_name(tmp_path, name):
    path, other = tmp_path / name, tmp_path / f"{name[:-1]}y"
    for each in (path, other):
        partial_name(each).touch()
        write_whole(each, b"whole")
        assert [found for found in tmp_path.iterdir() if is_partial(found)] == []
    partial_name(other).touch()
    remove_leftovers(path)
    assert len(names_in(tmp_path)) == 3


class TestWhatIsThere:
    def test_free(self, path):
        assert look_at(path) is Place.FREE
        path.touch()
        assert look_at(path) is Place.FILE

    def test_devices(self, path):
        os.mkfifo(path)
        link = path.with_name("link")
        link.symlink_to(path)
        for each in (path, link, type(path)("/dev/null")):
            assert look_at(each) is Place.DEVICE
            with pytest.raises(Refused, match="is a device or a FIFO, which no file can replace; "):
                check_replaceable(each)
            with pytest.raises(Refused, match="is a device"):
                WholeFile(each)

    def test_what_must_stay(self, path):
        path.symlink_to("nothing")
        folder, door = path.with_name("folder"), path.with_name("door")
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(door))
            for each, why in (
                (path, "is a symbolic link; remove it, or give the path that it leads to"),
                (folder, "is a folder; give the path of a file"),
                (door, "is a socket; give another path"),
                (type(path)(""), "is not the name of a file; give the path of a file"),
                (path / "a\0b", "has a zero byte in it; give another path"),
            ):
                with pytest.raises(Refused, match=why):
                    write_whole(each, b"")
        assert names_in(path.parent) == ["door", "file", "folder"]
        assert path.is_symlink()

    def test_what_comes_meanwhile_stays(self, path):
        with WholeFile(path) as file:
            path.symlink_to("nothing")
            with pytest.raises(Refused, match="is a symbolic link"):
                file.publish()
        assert path.is_symlink()
        assert names_in(path.parent) == ["file"]

    @pytest.mark.parametrize("name", ["nowhere/file", "plain/file"])
    def test_no_such_folder(self, path, name):
        path.with_name("plain").touch()
        with pytest.raises(OSError, match=r"No such file|Not a directory") as failed:
            write_whole(path.parent / name, b"")
        assert failed.value.filename == str(path.parent / name)


class TestDiskThatFails:
    def test_when_it_is_to_be_published(self, path, monkeypatch):
        path.write_bytes(b"old")

        def fail(_fd):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space") as failed:
            write_whole(path, b"new")
        assert failed.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert names_in(path.parent) == ["file"]

    def test_what_was_free_is_free_again(self, path, monkeypatch):
        sync, folder = os.fsync, path.parent.stat()

        def fail(fd):
            if os.path.samestat(os.fstat(fd), folder):
                raise OSError(errno.EIO, "Input/output error")
            sync(fd)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            write_whole(path, b"new", replacing=False)
        assert names_in(path.parent) == []

    def test_what_has_gone_is_not_published(self, path):
        with pytest.raises(FileNotFoundError):
            give_name(partial_name(path), path, replacing=False)
        with pytest.raises(FileNotFoundError):
            publish(partial_name(path), path)
        assert names_in(path.parent) == []
