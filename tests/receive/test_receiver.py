"""Streams made by hand: what is right becomes an image, and of anything else nothing is left."""

import errno
import itertools
import os
import re
import socket
import struct

import numpy as np
import pytest

from fakes.multifd import ChannelWriter, initial
from fakes.precopy import (
    ANSWERED,
    DESCRIPTION,
    FLUSH,
    FLUSHED_SETUP,
    PAGE,
    PAGES,
    RAM,
    SETUP,
    START,
    STATE,
    TAIL,
    body,
    multifd_precopy,
    page,
    precopy,
)
from fakes.receiving import Receiving, send
from fakes.waiting import wait_until
from postcopy.channel.whole_file import WholeFile
from postcopy.errors import (
    MigrationCancelled,
    PostcopyError,
    Refused,
    StreamCut,
    StreamError,
)
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.options import ImageOptions
from postcopy.image.verify import find_damages
from postcopy.multifd import group
from postcopy.receive import source_channels
from postcopy.stream.commands import command
from postcopy.stream.configuration import encode_name
from postcopy.stream.encoder import end_of_stream
from postcopy.stream.numbers import Command

SHUT_FINE = struct.pack(">HHI", 1, 4, 0)
SHUT_FAILED = struct.pack(">HHI", 1, 4, 1)
PONG = struct.pack(">HHI", 2, 4, 1)


@pytest.fixture
def folder(tmp_path):
    """Where the images go, and nothing else."""
    made = tmp_path / "images"
    made.mkdir()
    return made


@pytest.fixture
def image(folder):
    return folder / "image"


@pytest.fixture
def receiving(tmp_path, image):
    with Receiving(f"unix:{tmp_path / 'm'}", image) as made:
        yield made


def names(folder):
    return {each.name for each in folder.iterdir()}


def check_arrived(path):
    assert list(find_damages(path, Manifest.load(path))) == []
    with open_image(path) as found:
        np.testing.assert_array_equal(found.read("microvm.ram", 0, PAGES), RAM)
        assert found.description == DESCRIPTION
        (device,) = found.devices
        assert (device.name, device.instance, device.version) == ("unheard-of", 3, 9)
        assert device.payload == STATE
    assert path.stat().st_mode & 0o777 == 0o600


def connect(uri):
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(30)
    connected.connect(uri.removeprefix("unix:"))
    return connected


def answers(uri, stream):
    """What is answered to a source that waits for the last answer with its socket open."""
    with connect(uri) as source:
        try:
            source.sendall(stream)
        except BrokenPipeError:
            pass
        found = b""
        try:
            while len(found) < len(PONG + SHUT_FINE) and (more := source.recv(4096)):
                found += more
        except ConnectionResetError:
            pass
        return found


def test_a_source_that_waits_for_no_answer(receiving, image):
    send([precopy()], receiving.uri)
    received = receiving.result()
    check_arrived(image)
    assert (received.pages, received.zero_pages, received.channels) == (PAGES, 1, 0)
    assert received.identity == Manifest.load(image).identity
    assert received.machine == "microvm"


def test_a_source_is_told_of_the_image_when_it_is_there(receiving, image, folder, monkeypatch):
    there = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: there.append(names(folder)) or real(fd))
    assert answers(receiving.uri, precopy(answered=True)) == PONG + SHUT_FINE
    assert {"image", "image.manifest.json"} <= there[-1]  # the disk has both names
    receiving.result()
    check_arrived(image)


@pytest.mark.parametrize("flushes", [True, False], ids=["QEMU 8.1 and newer", "older"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_channels_in_any_order_and_the_newer_copy_counts(receiving, image, flushes, order):
    streams = multifd_precopy(flushes=flushes)
    sources = {number: connect(receiving.uri) for number in order}
    for number in order:
        sources[number].sendall(streams[number])
    for source in sources.values():
        source.close()
    received = receiving.result()
    assert received.channels == 2
    check_arrived(image)


def test_strangers_are_ignored(receiving, image):
    with connect(receiving.uri) as stranger, connect(receiving.uri) as other:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        wait_until(lambda: receiving.notes)
        other.close()
        with connect(receiving.uri) as first, connect(receiving.uri) as second:
            first.sendall(precopy()[:50])
            wait_until(lambda: receiving.receiver.progress.connected)
            second.sendall(precopy())
            second.shutdown(socket.SHUT_WR)
            wait_until(lambda: len(receiving.notes) == 3)
            first.sendall(precopy()[50:])
            receiving.result()
    check_arrived(image)
    assert "Not a migration stream; ignored" in receiving.notes[0]
    assert "a second one; ignored" in receiving.notes[-1]


@pytest.mark.parametrize("way", ["exec", "file", "fd"])
def test_other_ways_to_come(tmp_path, image, way):
    path = tmp_path / "stream"
    path.write_bytes(precopy(answered=True))
    uri = {"exec": f"exec:cat {path}", "file": f"file:{path}"}.get(way)
    uri = uri or f"fd:{os.open(path, os.O_RDONLY)}"
    with Receiving(uri, image) as receiving:
        receiving.result()
    check_arrived(image)


def test_without_a_description_only_known_devices_are_read(receiving, image):
    send([precopy().removesuffix(TAIL) + end_of_stream()], receiving.uri)
    receiving.result()
    with open_image(image) as found:
        assert (len(found.devices), found.description) == (0, None)


def list_of(*blocks, total=None):
    """RAM's START up to the end of its list."""
    entries = b"".join(encode_name(name) + struct.pack(">Q", size) for name, size in blocks)
    total = sum(size for _, size in blocks) if total is None else total
    return SETUP[:17] + struct.pack(">Q", total | 4) + entries


BEFORE = START + ANSWERED
IN_RAM = BEFORE + SETUP
NAME_END = len(SETUP[:17]) + 8 + 2
REFUSED = {
    "version": (b"QEVM\0\0\0\2", "SaveVM v2 format is obsolete", 4),
    "mapped-ram": (
        START + b"\5" + encode_name("configuration/capabilities") + struct.pack(">II", 1, 1)
        + encode_name("mapped-ram") + ANSWERED,
        "a file of mapped-ram, which is an image already",
        None,
    ),
    "postcopy": (
        BEFORE + command(Command.POSTCOPY_ADVISE, bytes(16)),
        "CMD_POSTCOPY_ADVISE: no postcopy or COLO can be received; switch postcopy-ram off",
        len(BEFORE),
    ),
    "package": (
        IN_RAM + command(Command.PACKAGED, struct.pack(">I", 1 << 31)), "CMD_PACKAGED", len(IN_RAM)
    ),
    "command": (BEFORE + command(99), "MIG_CMD 0x63 unknown (len 0x0)", len(BEFORE)),
    "device first": (BEFORE + TAIL, "a device comes before the list of RAM blocks", len(BEFORE)),
    "too much RAM": (
        BEFORE + list_of(("a", 1 << 50)), "RAM of 0x4000000000000 bytes; at most", len(BEFORE) + 17
    ),
    "block too large": (
        BEFORE + list_of(("a", 8192), total=4096),
        'block "a" of 0x2000 bytes, where 0x1000 are left',
        len(BEFORE) + NAME_END,
    ),
    "no whole page": (BEFORE + list_of(("a", 100), total=4096), "of 0x64 bytes", None),
    "twice": (BEFORE + list_of(("a", PAGE), ("a", PAGE)), 'RAM block "a" is listed twice', None),
    "empty name": (
        BEFORE + list_of(("", PAGE)), "RAM blocks end 0x1000 bytes before the total", None
    ),
    "many blocks": (
        BEFORE + list_of(*((f"{n}", PAGE) for n in range(5000))), "more than 4096 RAM blocks", None
    ),
    "other live section": (
        BEFORE + b"\1\0\0\0\3" + encode_name("dirty-bitmap") + struct.pack(">II", 0, 1),
        "Unknown savevm section or instance 'dirty-bitmap' 0",
        None,
    ),
    "outside": (
        IN_RAM + body(page(PAGES, RAM[0])), f"Illegal RAM offset {PAGES * PAGE:x}", len(IN_RAM) + 5
    ),
    "other block": (
        IN_RAM + b"\2\0\0\0\2" + struct.pack(">Q", 8) + b"\3rom", "Can't find block rom", None
    ),
    "bad delta": (
        IN_RAM + b"\2\0\0\0\2" + struct.pack(">Q", 0x40) + b"\x0bmicrovm.ram\1\0\1\0",
        "Failed to load XBZRLE page - decode error!",
        len(IN_RAM) + 5 + 8 + 12 + 3 + 1,
    ),
    "footer": (
        IN_RAM + body(page(1, RAM[0]))[:-5] + b"\x7e\0\0\0\3", "Mismatched section id", None
    ),
    "set up twice": (IN_RAM + SETUP, "ram is set up twice", None),
    "device too short": (
        precopy(answered=True).replace(STATE, STATE[:-1]), "Missing section footer for unheard-of", None
    ),
    "unknown device": (
        precopy(answered=True).replace(b"heard", b"known", 1),
        "Unknown savevm section or instance 'unknown-of'", None
    ),
    "cut": (precopy(answered=True)[: len(IN_RAM) + 1000], "The stream ends in a section of ram", None),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "text", "offset"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_leaves_nothing(receiving, folder, stream, text, offset):
    with connect(receiving.uri) as source:
        source.sendall(stream)
        source.shutdown(socket.SHUT_WR)
        with pytest.raises(StreamError, match=re.escape(text)) as caught:
            receiving.result()
    if offset is not None:
        assert caught.value.offset == offset
    assert list(folder.iterdir()) == []


def test_a_source_is_told_that_it_failed(receiving, folder):
    assert answers(receiving.uri, REFUSED["outside"][0]) == PONG + SHUT_FAILED
    with pytest.raises(StreamError):
        receiving.result()
    assert list(folder.iterdir()) == []


CHANNEL = initial(0) + ChannelWriter().packet(sync=True)
BAD_CHANNELS = {
    "wrong packet": (
        [CHANNEL + ChannelWriter().packet("rom", [(0, RAM[0])])],
        "multifd channel 0: unknown ram block rom (at byte 0x5c0)",
    ),
    "two of one number": ([CHANNEL, CHANNEL], "multifd: two channels have the number 0"),
    "two machines": (
        [CHANNEL, initial(1, b"u" * 16)], "multifd: the channels have different UUIDs"
    ),
    "one is missing": ([CHANNEL, initial(2)], "the source has not opened all of its channels"),
    "none": ([], "the source has not opened all of its channels"),
    "one ends": (
        [CHANNEL, initial(1) + ChannelWriter().packet(sync=True)], "ends before a flush"
    ),
    "one is cut": ([CHANNEL + b"\x11\x22"], "multifd channel 0: The channel ends in a packet"),
}  # fmt: skip


@pytest.mark.parametrize(("channels", "text"), BAD_CHANNELS.values(), ids=BAD_CHANNELS.keys())
def test_bad_channels_leave_nothing(receiving, folder, monkeypatch, channels, text):
    if "not opened" in text:
        monkeypatch.setattr(source_channels, "IDENTIFY_S", 0.3)
        monkeypatch.setattr(group, "IDENTIFY_S", 0.3)
    main = START + FLUSHED_SETUP + body(FLUSH) + TAIL
    send([main, *channels], receiving.uri)
    with pytest.raises(StreamError, match=re.escape(text)):
        receiving.result()
    assert list(folder.iterdir()) == []


def test_a_source_that_goes(receiving, folder):
    with connect(receiving.uri) as source:
        source.sendall(precopy()[:100_000])
    with pytest.raises(StreamCut, match="The stream ends in a section of ram"):
        receiving.result()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("sent", [None, 0, 100_000])
def test_given_up(receiving, folder, sent):
    with connect(receiving.uri) as source:
        if sent:
            source.sendall(precopy()[:sent])
            wait_until(lambda: receiving.receiver.progress.page_bytes)
        assert receiving.receiver.cancel()
        with pytest.raises(MigrationCancelled, match="the guest stays at the source"):
            receiving.result()
    assert list(folder.iterdir()) == []


def test_a_full_disk(receiving, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "image")

    monkeypatch.setattr(WholeFile, "write_at", full)
    assert answers(receiving.uri, precopy(answered=True)) == PONG + SHUT_FAILED
    with pytest.raises(OSError, match="No space left"):
        receiving.result()
    assert list(folder.iterdir()) == []


def test_a_name_that_is_taken(tmp_path, image):
    image.write_bytes(b"something")
    taken = pytest.raises(Refused, match="exists")
    with Receiving(f"unix:{tmp_path / 'm'}", image) as receiving, taken:
        receiving.result()
    assert image.read_bytes() == b"something"
    assert not (tmp_path / "m").exists()


def test_mutations_of_all_channels(tmp_path, folder):
    """Whatever a sender does, there is a whole image at the end, or none."""
    chance = np.random.default_rng(8)
    for number in range(60):
        streams = [bytearray(each) for each in multifd_precopy(flushes=bool(number % 2))]
        for _ in range(chance.integers(1, 4)):
            stream = streams[chance.integers(3)]
            at = chance.integers(len(stream) if chance.random() < 0.3 else 300)
            stream[at] ^= 1 << chance.integers(8)
        path = folder / f"image{number}"
        with Receiving(f"unix:{tmp_path / 'm'}", path) as receiving:
            send(streams, receiving.uri)
            try:
                receiving.result()
            except PostcopyError:
                assert not path.exists()
            else:
                assert list(find_damages(path, Manifest.load(path))) == []
    assert not [name for name in names(folder) if name.endswith(".partial")]


@pytest.mark.parametrize(
    ("form", "options"),
    [("stream", ImageOptions("stream")), ("chunks", ImageOptions(compressed=True))],
)
def test_an_image_of_another_form(tmp_path, folder, form, options):
    with Receiving(f"unix:{tmp_path / 'm'}", folder / "image", options) as receiving:
        assert answers(receiving.uri, precopy(answered=True)) == PONG + SHUT_FINE
        received = receiving.result()
    assert received.format == form
    assert (received.data_bytes, received.zero_bytes) == (RAM.size, 0)
    manifest = Manifest.load(folder / "image")
    assert received.identity == manifest.identity
    assert list(find_damages(folder / "image", manifest)) == []
    with open_image(folder / "image") as image:
        np.testing.assert_array_equal(image.read("microvm.ram", 0, len(RAM)), RAM)
    assert not [name for name in names(folder) if name.endswith(".partial")]


def test_a_parent_without_a_store_is_refused_at_once(tmp_path, folder):
    with Receiving(f"unix:{tmp_path / 'm'}", folder / "parent") as receiving:
        answers(receiving.uri, precopy())
        receiving.result()
    options = ImageOptions(parent=folder / "parent")
    refused = pytest.raises(Refused, match="has no store of chunks to share")
    with Receiving(f"unix:{tmp_path / 'n'}", folder / "image", options) as receiving, refused:
        receiving.result()
    assert "image" not in names(folder)
