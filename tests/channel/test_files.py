"""A file as a channel: a stream from some byte on, and any other place besides."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.page_cache import cached, need_disk
from postcopy.channel.address import FileAddress
from postcopy.channel.connect import connect
from postcopy.channel.files import FileChannel
from postcopy.channel.listen import Listener
from postcopy.errors import ChannelBroken, HostCannot
from postcopy.kernel.mapping import Mapping


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


@pytest.fixture
def page():
    """A page of memory where a page begins, as ``O_DIRECT`` has to have it."""
    mapping = Mapping.anonymous(4096)
    yield mapping.view().reshape(-1).data
    mapping.close()


def test_a_direct_duplicate_goes_past_the_page_cache(tmp_path, page):
    need_disk(tmp_path)
    path = tmp_path / "f"
    page[:] = b"x" * 4096
    with connect(FileAddress(str(path))) as channel:
        channel.send(b"begin")
        with channel.duplicate(direct=True) as direct:
            direct.write_at(8192, page)
    assert not cached(path)[1:].any()
    with path.open("ab") as file:
        file.write(b"end")
    with opened(path) as channel, channel.duplicate(direct=True) as direct:
        page[:] = bytes(4096)
        assert direct.read_at(8192, page) == 4096
        assert bytes(page) == b"x" * 4096
        assert not cached(path)[1:-1].any()
        assert direct.read_at(12288, page) == 3
        assert bytes(page[:3]) == b"end"
        assert direct.read_at(16384, page) == 0
    assert path.read_bytes() == b"begin".ljust(8192, b"\0") + b"x" * 4096 + b"end"


def test_a_file_system_without_direct_io_is_named():
    """As that of /proc is, whatever the host; its files are regular ones."""
    says = (
        "^file:/proc/self/comm: filesystem does not support O_DIRECT; switch direct-io off, or give a "
        "file on another file system$"
    )
    with opened("/proc/self/comm") as channel, pytest.raises(HostCannot, match=says):
        channel.duplicate(direct=True)


def test_a_disk_that_wants_other_places_is_explained(tmp_path, page):
    need_disk(tmp_path)
    says = (
        f"^file:{tmp_path}/f: Invalid argument; its disk may take no direct I/O in pages of 4096 bytes: "
        "switch direct-io off$"
    )
    with (
        connect(FileAddress(str(tmp_path / "f"))) as channel,
        channel.duplicate(direct=True) as direct,
        pytest.raises(ChannelBroken, match=says),
    ):
        direct.write_at(100, page)


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
