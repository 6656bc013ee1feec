"""Images are read right, and what is no image is refused by name."""

import ctypes
import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from image.images import PAGE, RAM_ID, devices, memory, stream_bytes, write_image
from postcopy.errors import ImageError, KernelError
from postcopy.image.base import LARGEST_RAM_BYTES
from postcopy.image.file import ImageFile
from postcopy.image.formats import open_image
from postcopy.image.records import read_records
from postcopy.stream.encoder import RamPart
from postcopy.stream.numbers import RamFlag, SectionType

FORMS = ("stream", "mapped-ram")


@pytest.fixture
def blocks():
    return memory()


@pytest.fixture(params=FORMS)
def path(request, tmp_path, blocks) -> Path:
    return write_image(tmp_path / "image", request.param, blocks)


def test_everything_of_an_image_is_read(path, blocks):
    with open_image(path) as image:
        assert image.machine_name == "microvm"
        assert {block.name: block.pages for block in image.blocks} == {"ram": 48, "rom": 4}
        assert list(image.devices) == devices()
        assert image.ram_bytes == 52 * PAGE
        for name, rows in blocks.items():
            np.testing.assert_array_equal(image.has_data(name), rows.any(axis=1))
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)


def test_any_range_of_pages_can_be_read(path, blocks):
    with open_image(path) as image:
        for first in range(0, 48, 5):
            for count in (0, 1, 2, 48 - first):
                expected = blocks["ram"][first : first + count]
                np.testing.assert_array_equal(image.read("ram", first, count), expected)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 49), (48, 1), (0, -1)])
def test_pages_outside_of_a_block_are_refused(path, first, count):
    with open_image(path) as image, pytest.raises(IndexError, match="ram"):
        image.read("ram", first, count)


def test_a_mapped_image_tells_where_its_pages_lie(tmp_path, blocks):
    path = write_image(tmp_path / "image", "mapped-ram", blocks)
    with open_image(path) as image:
        for page in np.flatnonzero(image.has_data("ram")).tolist():
            at = image.address("ram") + page * PAGE
            assert ctypes.string_at(at, PAGE) == blocks["ram"][page].tobytes()


def test_a_stream_has_no_fixed_places(tmp_path, blocks):
    with open_image(write_image(tmp_path / "image", "stream", blocks)) as image:
        assert image.address("ram") == 0


def test_what_a_byte_of_the_file_is_can_be_told(path, blocks):
    with open_image(path) as image:
        raw = path.read_bytes()
        page = int(np.flatnonzero(blocks["ram"].any(axis=1))[3])
        at = raw.index(blocks["ram"][page].tobytes())
        assert image.locate(at, at + 1) == ("ram", page * PAGE)
        assert image.locate(at + 7, at + 9) == ("ram", page * PAGE + 7)
        assert image.locate(0, 8) is None


def test_the_last_copy_of_a_page_counts(tmp_path, blocks):
    path = tmp_path / "image"
    path.write_bytes(stream_bytes(blocks, repeats=True))
    with open_image(path) as image:
        for name, rows in blocks.items():
            np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)
            np.testing.assert_array_equal(image.has_data(name), rows.any(axis=1))


def test_our_own_devices_need_no_description(tmp_path, blocks):
    path = tmp_path / "image"
    path.write_bytes(stream_bytes(blocks, described=False))
    with open_image(path) as image:
        assert list(image.devices) == devices()
        assert image.description is None


def test_bits_for_pages_that_there_are_not_are_refused(tmp_path, blocks):
    path = write_image(tmp_path / "image", "mapped-ram", blocks)
    with open_image(path) as image:
        place = image.place("rom")
    with path.open("r+b") as file:
        file.seek(place.bitmap_offset)
        file.write(b"\xff")
    with open_image(path) as image, pytest.raises(ImageError, match="rom has bits behind"):
        image.has_data("rom")


class TestRefused:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(ImageError, match=r"nowhere: cannot be opened: No such file"):
            open_image(tmp_path / "nowhere")

    def test_a_pipe_never_keeps_us_waiting(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ImageError, match="not a regular file"):
            open_image(tmp_path / "fifo")

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "image").touch()
        with pytest.raises(ImageError, match=r"empty \(at byte 0x0\)"):
            open_image(tmp_path / "image")

    def test_something_else(self, tmp_path):
        (tmp_path / "image").write_bytes(b"#!/bin/sh\n" * 100)
        with pytest.raises(ImageError, match=r"Not a migration stream \(at byte 0x0\)"):
            open_image(tmp_path / "image")

    def test_bytes_behind_the_end(self, tmp_path, blocks):
        path = tmp_path / "image"
        path.write_bytes(stream_bytes(blocks, described=False) + b"x")
        with pytest.raises(ImageError, match="1 bytes behind the end"):
            open_image(path)

    def test_each_truncation(self, path):
        size = path.stat().st_size
        ends = [*range(size - 1, size - 400, -1), *range(0, size, max(1, size // 300))]
        for end in sorted(ends, reverse=True):
            os.truncate(path, end)
            with pytest.raises(ImageError, match=str(path)):
                open_image(path)

    @pytest.mark.parametrize("size", [1 << 62, LARGEST_RAM_BYTES + PAGE, 7 * PAGE, PAGE + 1])
    def test_sizes_that_cannot_be(self, path, size):
        raw = bytearray(path.read_bytes())
        at = raw.index(struct.pack(">Q", 52 * PAGE | 4))
        raw[at : at + 8] = struct.pack(">Q", size & ~0xFFF | 4)
        path.write_bytes(raw)
        with pytest.raises(ImageError):
            open_image(path)

    def test_bitmaps_that_were_never_written(self, tmp_path, blocks):
        # What QEMU 10 writes with background-snapshot and mapped-ram: no last section, no bits.
        path = write_image(tmp_path / "image", "mapped-ram", blocks)
        raw = path.read_bytes()
        end = RamPart(RAM_ID, SectionType.END).around()
        assert raw.count(end) == 1
        path.write_bytes(raw.replace(end, b""))
        with pytest.raises(ImageError, match="bitmaps were never written"):
            open_image(path)

    def test_memory_that_is_somewhere_else(self, tmp_path, blocks):
        raw = stream_bytes(blocks)
        at = raw.index(b"\x01\0\0\0\x02\x03ram")
        name = b"x-ignore-shared"
        section = b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0f" + name
        (tmp_path / "image").write_bytes(raw[:at] + section + raw[at:])
        with pytest.raises(ImageError, match="not in the file"):
            open_image(tmp_path / "image")


def failing_reads(monkeypatch, *errnos):
    """Let the next reads of files fail with these."""
    left, real = list(errnos), os.pread

    def pread(*arguments):
        if left:
            raise OSError(left.pop(0), "cannot read")
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    return left


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EBADF])
def test_a_host_that_cannot_read_says_nothing_of_the_file(monkeypatch, tmp_path, code):
    """Pages are given up for what the disk says, and for nothing else."""
    (tmp_path / "image").write_bytes(bytes(4096))
    with ImageFile(tmp_path / "image") as file:
        failing_reads(monkeypatch, code)
        with pytest.raises(KernelError, match="pread"):
            file.read(0, 4096)


def test_what_the_disk_says_once_is_asked_again(monkeypatch, tmp_path):
    (tmp_path / "image").write_bytes(bytes(4096))
    with ImageFile(tmp_path / "image") as file:
        failing_reads(monkeypatch, errno.ENOMEM, errno.EIO, errno.EAGAIN)
        assert file.read(0, 4096).size == 4096
        failing_reads(monkeypatch, errno.EIO, errno.EIO)
        with pytest.raises(ImageError, match="cannot be read"):
            file.read(0, 4096)


class TestXbzrle:
    """What a source with the capability ``xbzrle`` sends of a page that it has sent before."""

    def delta(self, page: int, at: int, new: bytes) -> bytes:
        encoded = bytes([at & 0x7F | 0x80, at >> 7, len(new)]) + new
        word = page * PAGE | RamFlag.XBZRLE | RamFlag.CONTINUE
        return struct.pack(">QBH", word, 1, len(encoded)) + encoded

    def image(self, tmp_path, blocks, *deltas):
        raw = stream_bytes(blocks)
        (end,) = (struct.pack(">QBI", 0x10, 0x7E, RAM_ID),)
        at = raw.rindex(end)  # of the last section of the memory
        (tmp_path / "image").write_bytes(raw[:at] + b"".join(deltas) + raw[at:])
        return open_image(tmp_path / "image")

    def test_deltas_change_the_last_whole_copy(self, tmp_path, blocks):
        expected = {name: rows.copy() for name, rows in blocks.items()}
        # The block named last is the rom.
        data = int(np.flatnonzero(blocks["rom"].any(axis=1))[0])
        blocks["rom"][3] = expected["rom"][3] = 0
        expected["rom"][data][200:203] = (1, 2, 3)
        expected["rom"][data][201] = 9
        expected["rom"][3][4095] = 7
        parts = [(data, 200, b"\1\2\3"), (3, 4095, b"\7"), (data, 201, b"\x09")]
        with self.image(tmp_path, blocks, *(self.delta(*part) for part in parts)) as image:
            for name, rows in expected.items():
                np.testing.assert_array_equal(image.read(name, 0, len(rows)), rows)
                np.testing.assert_array_equal(image.has_data(name), rows.any(axis=1))
            for page in range(4):
                np.testing.assert_array_equal(image.read("rom", page, 1)[0], expected["rom"][page])
        found = []
        read_records(tmp_path / "image", found.append)
        pages = [each.values["pages"] for each in found if each.kind == "xbzrle"]
        assert sum(pages) == 3

    def test_a_delta_that_does_not_fit_is_refused(self, tmp_path, blocks):
        with self.image(tmp_path, blocks, self.delta(1, 4095, b"\1\2")) as image:
            image.read("rom", 2, 2)
            with pytest.raises(ImageError, match=r"XBZRLE page.*\(at byte 0x"):
                image.read("rom", 0, 4)

    def test_pages_that_are_on_other_channels_are_not_in_the_file(self, tmp_path, blocks):
        with pytest.raises(ImageError, match=r"multifd: the pages are not in this file \(at"):
            self.image(tmp_path, blocks, struct.pack(">Q", RamFlag.MULTIFD_FLUSH))
