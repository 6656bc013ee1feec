"""A file as a channel: a stream from some byte on, and any other place besides."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy.channel.address import FileAddress
from postcopy.channel.connect import connect
from postcopy.channel.files import FileChannel
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken


def opened(path, offset=0):
    with Listener(FileAddress(str(path), offset)) as listener:
        return listener.accept()


def test_places_beside_the_stream(tmp_path):
    path = tmp_path / "f"
    with connect(FileAddress(str(path), 4)) as channel:
        assert isinstance(channel, FileChannel)
        channel.send(b"ab")
        channel.write_at(20, b"page")
        assert channel.position == 6
        channel.send_many([b"c", b"d"])
        channel.seek(12)
        channel.send(b"ef")
        assert channel.size_bytes == 24
        assert channel.sent_bytes == 10
    assert path.read_bytes() == b"\0\0\0\0abcd\0\0\0\0ef\0\0\0\0\0\0page"
    with opened(path, 4) as channel:
        room = memoryview(bytearray(4))
        assert channel.receive_into(room) == 4
        assert bytes(room) == b"abcd"
        assert channel.read_at(20, room) == 4
        assert bytes(room) == b"page"
        assert channel.position == 8
        channel.seek(12)
        assert channel.receive_into(room[:2]) == 2
        assert bytes(room[:2]) == b"ef"
        assert channel.received_bytes == 10


def test_reading_beyond_the_end_gives_what_there_is(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    with opened(path) as channel:
        room = memoryview(bytearray(4))
        assert channel.read_at(3, room) == 2
        assert channel.read_at(5, room) == 0


def test_each_way_only(tmp_path):
    path = tmp_path / "f"
    writing, reading = connect(FileAddress(str(path))), opened(path)
    with writing, pytest.raises(ChannelBroken, match="it can only be written to"):
        writing.read_at(0, memoryview(bytearray(1)))
    with reading, pytest.raises(ChannelBroken, match="it can only be read from"):
        reading.write_at(0, b"x")


def test_nothing_more_once_it_is_shut_down(tmp_path):
    for channel in (connect(FileAddress(str(tmp_path / "f"))), opened(tmp_path / "f")):
        channel.shutdown()
        for call in (
            lambda c: c.send(b"x"),
            lambda c: c.write_at(0, b"x"),
            lambda c: c.read_at(0, memoryview(bytearray(1))),
            lambda c: c.receive_into(memoryview(bytearray(1))),
        ):
            with pytest.raises(ChannelBroken, match="closed on this side"):
                call(channel)
        channel.close()


def write_beyond_the_limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    channel = connect(FileAddress(path))
    channel.write_at(0, bytes(8192))
    try:
        channel.write_at(4096, bytes(8192))
    except ChannelBroken as error:
        print(error)  # noqa: T201 - what the test reads


def test_no_room(tmp_path):
    path = tmp_path / "f"
    code = f"import test_files; test_files.write_beyond_the_limit({str(path)!r})"
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)])},
        check=False,
    )
    assert told.stdout == f"file:{path}: File too large\n", (told, errno.EFBIG)
