"""A raw file as a virtio disk: its requests, its errors, its configuration."""

import errno
import os
import struct

import pytest

from postcopy.errors import Refused, RingError
from postcopy.virtio.block import BlockFeature
from postcopy.virtio.disk import Disk

IN, OUT, FLUSH, GET_ID, DISCARD = 0, 1, 4, 8, 11
OK, IOERR, UNSUPP = 0, 1, 2
SECTORS = 64


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "disk.raw"
    file.write_bytes(b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS)))
    return file


@pytest.fixture
def said():
    return []


@pytest.fixture
def disk(path, said):
    made = Disk(path, say=said.append)
    yield made
    made.close()


def header(kind, sector=0):
    return memoryview(struct.pack("<IIQ", kind, 0, sector))


def request(disk, kind, sector=0, out=b"", into=0):
    """Do one; return its status, what was written before it, and the count that was told."""
    answer, status = bytearray(into), bytearray(b"\xff")
    readable = [header(kind, sector), *([memoryview(out)] if out else [])]
    writable = [*([memoryview(answer)] if into else []), memoryview(status)]
    count = disk.serve(readable, writable)
    return status[0], bytes(answer), count


def test_a_read_gives_the_files_bytes(disk):
    assert request(disk, IN, 3, into=1024) == (
        OK, struct.pack("<Q", 3) * 64 + struct.pack("<Q", 4) * 64, 1025)  # fmt: skip


def test_a_write_is_in_the_file_and_stays_after_a_flush(disk, path):
    assert request(disk, OUT, 5, out=b"x" * 512) == (OK, b"", 1)
    assert request(disk, FLUSH) == (OK, b"", 1)
    assert path.read_bytes()[5 * 512 : 6 * 512] == b"x" * 512


def test_a_request_may_be_cut_anywhere(disk, path):
    whole = bytes(header(OUT, 7)) + bytes(range(256)) * 4
    pieces = [memoryview(whole[a:b]) for a, b in ((0, 3), (3, 3), (3, 20), (20, 500), (500, 1040))]
    status = bytearray(1)
    assert disk.serve(pieces, [memoryview(status)]) == 1
    assert (status[0], path.read_bytes()[7 * 512 : 9 * 512]) == (OK, bytes(range(256)) * 4)
    answer = bytearray(513)
    assert disk.serve([header(IN, 7)], [memoryview(answer)[:100], memoryview(answer)[100:]]) == 513
    assert bytes(answer) == (bytes(range(256)) * 2) + b"\0"


def test_the_id_is_the_files_name(disk):
    assert request(disk, GET_ID, into=20) == (OK, b"disk.raw".ljust(20, b"\0"), 21)


@pytest.mark.parametrize(
    ("kind", "sector", "out", "into"),
    [
        (IN, SECTORS, b"", 512),
        (IN, SECTORS - 1, b"", 1024),
        (IN, (1 << 64) - 1, b"", 512),
        (IN, 0, b"", 100),
        (OUT, SECTORS, b"x" * 512, 0),
        (OUT, 0, b"x" * 511, 0),
    ],
)
def test_what_is_not_on_the_disk_is_an_error_of_the_request(disk, path, kind, sector, out, into):
    before = path.read_bytes()
    assert request(disk, kind, sector, out, into)[0] == IOERR
    assert path.read_bytes() == before


def test_a_request_of_another_kind_is_not_supported(disk):
    assert request(disk, DISCARD, out=bytes(16))[0] == UNSUPP
    assert request(disk, 1 << 31)[0] == UNSUPP


def test_without_header_or_status_the_driver_cannot_be_told(disk):
    with pytest.raises(RingError, match="without a byte for its status"):
        disk.serve([header(IN)], [])
    with pytest.raises(RingError, match="with 15 bytes for its header of 16"):
        disk.serve([header(IN)[:15]], [memoryview(bytearray(1))])


def test_a_disk_that_fails_is_told_to_the_driver_each_time_and_to_the_user_once(
    disk, said, monkeypatch
):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    assert [request(disk, IN, n, into=512)[0] for n in range(3)] == [IOERR] * 3
    assert len(said) == 1
    assert "IN at sector 0: Input/output error" in said[0]


def test_a_file_that_was_cut_is_an_error(disk, path, said):
    os.truncate(path, 4096)
    assert request(disk, IN, 20, into=512)[0] == IOERR
    assert "shorter" in said[0]


def test_a_read_only_disk_says_so_and_writes_nothing(path, said):
    path.chmod(0o444)
    disk = Disk(path, read_only=True, say=said.append)
    assert disk.features & BlockFeature.RO
    assert request(disk, OUT, 0, b"x" * 512)[0] == IOERR
    assert request(disk, IN, 1, into=512)[0] == OK
    assert path.read_bytes()[:8] == bytes(8)
    assert len(said) == 1
    disk.close()


def test_the_configuration_is_that_of_the_specification(disk):
    data = disk.configuration(queues=4)
    assert len(data) == 72
    assert struct.unpack_from("<Q", data)[0] == SECTORS
    assert struct.unpack_from("<I", data, 12)[0] == 126
    assert struct.unpack_from("<I", data, 20)[0] == 512
    assert struct.unpack_from("<H", data, 34)[0] == 4


def test_what_cannot_be_a_disk_is_refused(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 511)
    for path, why in (
        (tmp_path / "none", "No such file or directory; give a file that can be read and written"),
        (tmp_path / "small", "holds no sector of 512 bytes"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(Refused, match=why):
            Disk(path)
    with pytest.raises(Refused, match="neither a file nor a block device"):
        Disk("/dev/null")
