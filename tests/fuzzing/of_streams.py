"""Readers of what comes over a channel."""

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fakes.multifd import FLAGS, ChannelWriter, initial
from fakes.precopy import TAIL
from fakes.streams import LAYOUT, PAGE, SETUP, CountedFormats, Writer, device, offsets
from fuzzing.readers import Reader
from postcopy.bench import wire
from postcopy.bench.wire import Greeting, Kind, Wire
from postcopy.channel.sockets import SocketChannel
from postcopy.channel.whole_file import WholeFile
from postcopy.image.parser import formats_of
from postcopy.receive.page_file import PageFile
from postcopy.stream.commands import encode_command
from postcopy.stream.decoder import Decoder, PreemptDecoder
from postcopy.stream.encoded_records import apply_delta
from postcopy.stream.encoder import RamPart, ram_setup, stream_start
from postcopy.stream.layout import BlockLayout, Expected, Limits
from postcopy.stream.mapped_decoder import MappedDecoder
from postcopy.stream.multifd import MultifdDecoder
from postcopy.stream.numbers import SectionType
from postcopy.stream.precopy_decoder import PrecopyDecoder
from postcopy.stream.reader import DecoderInput
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
    RamBodyEnd,
    RamDiscard,
    RamSetup,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    Shut,
    SwitchoverAck,
    SwitchoverStart,
    XbzrlePage,
    ZeroPages,
)
from postcopy.stream.return_path import ReturnPathDecoder, encode_message
from stream.test_mapped_decoder import write as mapped_file

LIMITS = Limits(package_bytes=16384, description_bytes=16384, device_bytes=16384)
MOST_RAM_BYTES = 64 << 20
LINE_PAGE = b"\xa5" * PAGE


def readers(folder: Path) -> Iterator[Reader]:
    """All of them; files are made in ``folder``."""
    yield Reader.of_bytes("destination", [_postcopy()], _destination, 14)
    yield Reader.of_bytes("preempt", [_preempt()], _preempt_channel, 4)
    mapped, _ = mapped_file(blocks=[("ram", 4 * PAGE)])
    yield Reader.of_bytes("mapped-destination", [mapped], _mapped_destination, 2)
    yield Reader.of_bytes("return-path", _messages(), _return_path, 10)
    precopies = [_precopy(), _precopy(switch=True)]
    yield Reader.of_bytes("precopy", precopies, _precopy_channel, 14)
    yield Reader.of_bytes("received", precopies, _received(folder / "received"), 4)
    yield Reader.of_bytes("bench", [_measurement()], _measured, 2)
    yield Reader.of_bytes("xbzrle", [_delta(), b"\x05\x02ab\x10\x01c"], _xbzrle, 6)
    for compression in FLAGS:
        yield Reader.of_bytes(f"multifd-{compression}", [_channel(compression)], _multifd, 4)


def _drain(decoder: DecoderInput, step: Callable[[], object], raw: bytes) -> Iterator[object]:
    """Feed all in two pieces, so that elements are cut, too."""
    half = len(raw) // 2
    for piece in (raw[:half], raw[half:]):
        decoder.feed(piece)
        while (record := step()) is not None:
            yield record


# Section: our own destination, and its source


def _postcopy() -> bytes:
    packed = [PostcopyListen(), device(b"state"), PostcopyRun()]
    return Writer().write(
        [
            Configuration("none", 12),
            OpenReturnPath(),
            Ping(1),
            PostcopyAdvise(4096, 4096),
            SETUP,
            RamBody(SectionType.PART),
            ZeroPages("rom", offsets(0, 1, 2)),
            RamBodyEnd(SectionType.PART),
            RamDiscard("ram", ((0, PAGE), (PAGE, PAGE))),
            device(b"state"),
            Package(Writer().write(packed)),
        ]
    ) + (
        RamPart(2, SectionType.PART).around(_page(3), _page(4, again=True))
        + Writer().write(
            [
                RamBody(SectionType.END),
                RamBodyEnd(SectionType.END),
                EndOfStream(),
                Description("{}"),
            ]
        )
    )


def _page(
    number: int, *, again: bool = False, block: bytes = b"\x03ram", data: bytes = LINE_PAGE
) -> bytes:
    word = number * PAGE | 8 | (0x20 if again else 0)
    return struct.pack(">Q", word) + (b"" if again else block) + data


def _destination(raw: bytes) -> None:
    decoder = Decoder(CountedFormats(), LAYOUT, limits=LIMITS, expect=Expected("none"))
    for record in _drain(decoder, decoder.next_record, raw):
        if isinstance(record, Package):
            inner = Decoder(CountedFormats(), LAYOUT, package=True, limits=LIMITS)
            for _ in _drain(inner, inner.next_record, bytes(record.data)):
                pass
            inner.finish()
        elif isinstance(record, Pages):
            assert record.data.shape[1] == PAGE
    decoder.finish()


def _preempt() -> bytes:
    return b"".join((_page(3), _page(4, again=True), struct.pack(">Q", 5 * PAGE | 0x22) + b"\0"))


def _preempt_channel(raw: bytes) -> None:
    decoder = PreemptDecoder(LAYOUT)
    for _ in _drain(decoder, decoder.next_record, raw):
        pass
    decoder.finish()


def _mapped_destination(raw: bytes) -> None:
    expect = Expected("none", capabilities=frozenset({"mapped-ram"}))
    layout = {"ram": BlockLayout(4 * PAGE)}
    decoder = MappedDecoder(
        CountedFormats(), layout, expect=expect, start_offset=0, file_bytes=len(raw), limits=LIMITS
    )
    at = 0
    while at < len(raw):
        decoder.feed(raw[at : at + 1000])
        at += 1000
        while (record := decoder.next_record()) is not None:
            if (end := getattr(record, "end_offset", None)) is not None:
                assert end <= len(raw)
                at = end
    decoder.finish()


def _messages() -> list[bytes]:
    bits = np.arange(64) % 3 == 0
    said = [
        Pong(1), SwitchoverAck(), RequestPages("ram", PAGE, PAGE), RequestPages(None, 0, 2 * PAGE),
        RecvBitmapReply("ram", bits), ResumeAck(), Shut(0),
    ]  # fmt: skip
    return [b"".join(map(encode_message, said)), *map(encode_message, said)]


def _return_path(raw: bytes) -> None:
    decoder = ReturnPathDecoder(LAYOUT)
    for message in _drain(decoder, decoder.next_message, raw):
        if isinstance(message, RecvBitmapReply):
            assert len(message.bitmap) * PAGE == LAYOUT[message.block].size_bytes


# Section: the two ends of a measurement


def _measurement() -> bytes:
    pages = wire.encode(Kind.PAGES, wire.IN_PLACE, 100) + bytes(100)
    said = [wire.encode(kind, 1) for kind in (Kind.PING, Kind.PONG, Kind.MARK)]
    said += [wire.encode_marked(1, 2, 3), wire.encode(Kind.END), wire.encode_refusal("no")]
    return Greeting(1, b"s" * wire.SESSION_BYTES).encode() + pages + b"".join(said)


def _measured(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs, SocketChannel(ours, "peer") as channel:
        theirs.sendall(raw[: 64 << 10])
        theirs.shutdown(socket.SHUT_WR)
        reader = Wire(channel, wire.FROM_MEASURER | wire.FROM_LISTENER)
        if not raw:
            return
        reader.greeting()
        while (message := reader.message()).kind is not Kind.END:
            if message.kind is Kind.MARKED:
                reader.marked(message)
            elif message.length:
                reader.body_into(memoryview(bytearray(message.length)))


# Section: a stock QEMU that migrates into an image


def _delta() -> bytes:
    return b"\x80\x01\x20" + b"n" * 32 + b"\x10\x04abcd" + b"\x03\x01z"


def _precopy(*, switch: bool = False) -> bytes:
    setup = ram_setup(RamSetup(2, (SETUP.blocks[0],)), postcopy=False)
    delta = b"\x01" + struct.pack(">H", len(_delta())) + _delta()
    changed = struct.pack(">Q", 3 * PAGE | 0x60) + delta
    zero = struct.pack(">Q", 9 * PAGE | 0x22) + b"\0"
    records = (_page(3), _page(4, again=True), zero, changed)
    return b"".join(
        (
            stream_start(Configuration("microvm")),
            encode_command(OpenReturnPath()) + encode_command(Ping(1)),
            setup,
            RamPart(2, SectionType.PART).around(*records),
            encode_command(SwitchoverStart()) if switch else b"",
            RamPart(2, SectionType.END).around(
                _page(5), struct.pack(">Q", 0x200) if switch else b""
            ),
            TAIL,
        )
    )


def _precopy_channel(raw: bytes) -> None:
    decoder = PrecopyDecoder(formats_of, MOST_RAM_BYTES, LIMITS)
    page = np.zeros(PAGE, np.uint8)
    for record in _drain(decoder, decoder.next_record, raw):
        if isinstance(record, XbzrlePage):
            apply_delta(record, page)
    decoder.end_input()
    while decoder.next_record() is not None:
        pass
    decoder.finish()


def _received(path: Path) -> Callable[[bytes], None]:
    def read(raw: bytes) -> None:
        with WholeFile(path) as file, contextlib.ExitStack() as opened:
            _receive(raw, file, opened)

    return read


def _receive(raw: bytes, file: WholeFile, opened: contextlib.ExitStack) -> None:
    """As :class:`postcopy.receive.receiver.Receiver` does it, without a channel."""
    decoder = PrecopyDecoder(formats_of, MOST_RAM_BYTES, LIMITS)
    found: dict[type, Any] = {}
    pages: PageFile | None = None
    for record in _drain(decoder, decoder.next_record, raw):
        found.setdefault(type(record), []).append(record)
        if isinstance(record, RamSetup):
            pages = PageFile(file, found[Configuration][0], record)
            opened.callback(pages.close)
        elif (take := _TAKERS.get(type(record))) is not None:
            take(pages, record)
    decoder.finish()
    pages.finish(found.get(DeviceSection, []), None)


_TAKERS = {Pages: PageFile.write, ZeroPages: PageFile.clear, XbzrlePage: PageFile.change}


def _xbzrle(raw: bytes) -> None:
    page = np.zeros(PAGE + 64, np.uint8)
    page[PAGE:] = 7
    apply_delta(XbzrlePage("ram", 0, raw, 0), page[:PAGE])
    assert (page[PAGE:] == 7).all()


def _channel(compression: str) -> bytes:
    writer = ChannelWriter(compression)
    pages = [(number * PAGE, bytes([number]) * PAGE) for number in range(4)]
    parts = [initial(), writer.packet("ram", pages, [9 * PAGE]), writer.packet(sync=True)]
    parts += [writer.packet("rom", zeros=[0]) for _ in range(4)]
    parts.append(writer.packet("rom", pages[:1]))
    return b"".join(parts)


def _multifd(raw: bytes) -> None:
    decoder = MultifdDecoder(lambda: LAYOUT)
    at = 0
    while at < len(raw):
        wanted = decoder.wanted
        decoder.feed(raw[at : at + wanted])
        at += wanted
        while (record := decoder.next_record()) is not None:
            if isinstance(record, Pages):
                assert record.data.shape == (len(record.offsets), PAGE)
            if isinstance(record, Pages | ZeroPages):
                assert int(record.offsets.max(initial=0)) < LAYOUT[record.block].size_bytes
    decoder.finish()
