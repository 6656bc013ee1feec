"""Streams of a real QEMU, decoded to the last byte; and cut where it hurts.

What a device's payload is long is taken from the description of a first recording into a file; with
that, live streams can be answered as a destination would.
"""

import random
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fakes.qemu_machine import description_of
from fakes.qemu_versions import ALL
from fakes.real_qemu import BIOS_BYTES, MACHINES, TIMEOUT_S, RealQemu
from fakes.streams import PAGE
from postcopy.errors import StreamCut
from postcopy.stream.decoder import Decoder
from postcopy.stream.description import (
    DescribedFormats,
    described_bytes,
    parse_description,
)
from postcopy.stream.encoder import device_section
from postcopy.stream.layout import BlockLayout, Expected, Limits
from postcopy.stream.numbers import SectionType
from postcopy.stream.records import (
    Configuration,
    Description,
    DeviceSection,
    EndOfStream,
    OpenReturnPath,
    Package,
    Pages,
    Ping,
    Pong,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamBody,
    RamDiscard,
    RamSetup,
    RequestPages,
    Shut,
    SwitchoverStart,
    ZeroPages,
)
from postcopy.stream.return_path import encode_message

pytestmark = pytest.mark.qemu(*ALL)

RAM_BYTES = 16 << 20


@dataclass
class Recording:
    version: tuple[int, int]
    machine: str
    ram: Path
    data: bytes
    description: str

    @property
    def block(self) -> str:
        return MACHINES[self.machine][1]

    def decoder(self, **options) -> Decoder:
        formats = DescribedFormats(parse_description(self.description))
        layout = {self.block: BlockLayout(RAM_BYTES)}
        expect = Expected(self.machine)
        return Decoder(formats, layout, expect=expect, ignored_blocks=["pc.bios"], **options)


@pytest.fixture(params=sorted(MACHINES))
def recording(request, qemu_version, tmp_path) -> Recording:
    folder = tmp_path / request.param
    folder.mkdir()
    ram, stream = folder / "ram", folder / "stream"
    contents = np.random.default_rng(0).integers(0, 256, RAM_BYTES, dtype=np.uint8)
    contents[5 * PAGE : 300 * PAGE] = 0
    ram.write_bytes(contents.tobytes())
    with RealQemu(request.param, ram, folder) as qemu:
        qemu.save(stream)
        version = qemu.version
    data = stream.read_bytes()
    return Recording(version, request.param, ram, data, description_of(data))


class Destination:
    """Takes records in as a destination would: pages into memory, the rest onto a list."""

    def __init__(self, block: str) -> None:
        self.block = block
        self.memory = np.full((RAM_BYTES // PAGE, PAGE), 0xEE, np.uint8)
        self.records: list[object] = []

    def take(self, record) -> None:
        if isinstance(record, Pages | ZeroPages):
            assert record.block == self.block
            rows = (record.offsets // np.uint64(PAGE)).astype(int)
            self.memory[rows] = record.data if isinstance(record, Pages) else 0
        else:
            self.records.append(record)

    def of(self, kind: type) -> list:
        return [record for record in self.records if isinstance(record, kind)]

    def has(self, ram: Path) -> bool:
        return self.memory.tobytes() == ram.read_bytes()


def drain(decoder: Decoder, destination: Destination) -> list[object]:
    found = []
    while (record := decoder.next_record()) is not None:
        destination.take(record)
        if not isinstance(record, Pages | ZeroPages):
            found.append(record)
    return found


def test_file(recording):
    decoder = recording.decoder()
    destination = Destination(recording.block)
    for at in range(0, len(recording.data), 100_000):
        decoder.feed(recording.data[at : at + 100_000])
        drain(decoder, destination)
    decoder.finish()
    assert decoder.position == len(recording.data)
    assert destination.has(recording.ram)
    assert destination.records[0] == Configuration(recording.machine)
    (setup,) = destination.of(RamSetup)
    sizes = {block.name: block.size_bytes for block in setup.blocks}
    bios = {} if recording.machine == "none" else {"pc.bios": BIOS_BYTES}
    assert sizes == {recording.block: RAM_BYTES, **bios}
    assert destination.of(RamBody)[-1] == RamBody(SectionType.END)
    assert (SwitchoverStart() in destination.records) is (recording.version >= (10, 0))
    assert destination.records[-2:] == [EndOfStream(), Description(recording.description)]


def test_device_sections_are_written_as_qemu_writes_them(recording):
    destination = Destination(recording.block)
    decoder = recording.decoder()
    decoder.feed(recording.data)
    drain(decoder, destination)
    sections = destination.of(DeviceSection)
    assert sections[-1].name == "globalstate"
    raw = b"".join(map(device_section, sections))
    tail = 1 + 5 + len(recording.description)
    assert recording.data[:-tail].endswith(raw)
    described = [
        (device["name"], device["instance_id"], described_bytes(device))
        for device in parse_description(recording.description)["devices"]
    ]
    assert described == [(each.name, each.instance, len(each.payload)) for each in sections]


def cuts(data: bytes, end: int) -> list[int]:
    chance = random.Random(1)
    points = {*range(8 << 10), *(chance.randrange(len(data)) for _ in range(200))}
    return sorted(points - {end})  # an EOF without a description is how postcopy ends


def test_cut_anywhere(recording):
    data = recording.data
    for cut in cuts(data, len(data) - 5 - len(recording.description)):
        decoder = recording.decoder(limits=Limits(pages_per_record=1000))
        for at in range(0, cut, 1 << 20):
            decoder.feed(data[at : min(at + (1 << 20), cut)])
            while decoder.next_record() is not None:
                pass
        with pytest.raises(StreamCut) as caught:
            decoder.finish()
        assert caught.value.offset == cut


class Peer:
    """The other end of a live migration: answers pings, unpacks packages."""

    def __init__(self, recording: Recording, channel: socket.socket) -> None:
        self.recording = recording
        self.channel = channel
        self.decoder = recording.decoder()
        self.destination = Destination(recording.block)
        self.packages: list[list[object]] = []
        self.asked: list[int] = []

    def run(self) -> None:
        """Read until the source has closed."""
        while count := self.channel.recv_into(self.decoder.buffer()):
            self.decoder.received(count)
            for record in drain(self.decoder, self.destination):
                self.answer(record)
        self.decoder.finish()

    def say(self, message) -> None:
        self.channel.sendall(encode_message(message))

    def answer(self, record) -> None:
        match record:
            case Ping(value):
                self.say(Pong(value))
            case Package(data):
                self.unpack(data)
            case Description():
                self.say_shut()
            case EndOfStream() if self.packages:
                self.say_shut()

    def say_shut(self) -> None:
        if OpenReturnPath() in self.destination.records:
            self.say(Shut(0))

    def unpack(self, data: bytes) -> None:
        decoder = self.recording.decoder(package=True)
        decoder.feed(data)
        self.packages.append(drain(decoder, self.destination))
        assert decoder.finished
        decoder.finish()
        for record in self.packages[-1]:
            self.answer(record)
        self.say(RequestPages(self.recording.block, RAM_BYTES - PAGE, PAGE))
        self.say(RequestPages(None, PAGE, PAGE))


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        yield server


def serve(listener: socket.socket, recording: Recording, order_postcopy=None) -> Peer:
    channel, _ = listener.accept()
    with channel:
        channel.settimeout(TIMEOUT_S)
        peer = Peer(recording, channel)
        if order_postcopy:
            order_postcopy()
        peer.run()
    return peer


@pytest.mark.parametrize("capabilities", [(), ("return-path",), ("postcopy-ram",)])
def test_precopy_over_a_socket(recording, capabilities, listener, tmp_path):
    with RealQemu(recording.machine, recording.ram, tmp_path) as qemu:
        qemu.capabilities(*capabilities)
        qemu("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        peer = serve(listener, recording)
        qemu.wait_migration("completed")
    assert peer.destination.has(recording.ram)
    answered = bool(capabilities)
    assert peer.destination.of(OpenReturnPath) == [OpenReturnPath()] * answered
    advise = [PostcopyAdvise(PAGE, PAGE)] * ("postcopy-ram" in capabilities)
    assert peer.destination.of(PostcopyAdvise) == advise


def test_postcopy(recording, listener, tmp_path):
    with RealQemu(recording.machine, recording.ram, tmp_path) as qemu:
        qemu.capabilities("return-path", "postcopy-ram")
        qemu("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        qemu("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        peer = serve(listener, recording, lambda: qemu("migrate-start-postcopy"))
        qemu.wait_migration("completed")
    assert peer.destination.has(recording.ram)
    (package,) = peer.packages
    assert package[0] == PostcopyListen()
    assert package[-1] == PostcopyRun()
    rest = [record for record in package[1:-1] if not isinstance(record, DeviceSection)]
    assert rest in ([Ping(3)], [Ping(3), Ping(66)])  # QEMU 11 has another
    assert peer.destination.of(RamDiscard)
    assert not peer.destination.of(Description)
    assert peer.destination.records[-1] == EndOfStream()
