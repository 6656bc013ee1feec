"""What a QEMU destination refuses is refused, in its words, and a little more besides."""

import struct

import pytest

from fakes.streams import (
    LAYOUT,
    PAGE,
    SECTION,
    SETUP,
    START,
    CountedFormats,
    decode,
    device,
    new_decoder,
    part,
)
from postcopy.errors import StreamCut, StreamError
from postcopy.stream.commands import command, encode_command
from postcopy.stream.configuration import encode_configuration, encode_header
from postcopy.stream.decoder import Decoder
from postcopy.stream.encoder import device_section, end_of_stream, footer, ram_setup, stream_start
from postcopy.stream.layout import BlockLayout, Expected, Limits
from postcopy.stream.numbers import Command
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    DeviceSection,
    Package,
    PostcopyAdvise,
    RamDiscard,
    RamSetup,
    RecvBitmap,
)

HEADER = encode_header()
RAM = ram_setup(SETUP, postcopy=False)
READY = START + RAM


def record(offset: int, flags: int, name: str | None = None, data: bytes = b"") -> bytes:
    raw = struct.pack(">Q", offset | flags)
    return raw + (bytes([len(name)]) + name.encode() if name is not None else b"") + data


def start(name: str, instance: int = 0, version: int = 4, kind: int = 1) -> bytes:
    raw = struct.pack(">BIB", kind, SECTION, len(name)) + name.encode()
    return raw + struct.pack(">II", instance, version)


def listed(*entries: tuple[str, int], total: int | None = None, end: int = 0x10) -> bytes:
    whole = sum(size for _, size in entries) if total is None else total
    raw = struct.pack(">Q", whole | 4)
    for name, size in entries:
        raw += bytes([len(name)]) + name.encode() + struct.pack(">Q", size)
    return start("ram") + raw + struct.pack(">Q", end) + footer(SECTION)


def subsection(name: str, payload: bytes, version: int = 1) -> bytes:
    raw = HEADER + encode_configuration(Configuration("none"))
    return raw + b"\5" + bytes([len(name)]) + name.encode() + struct.pack(">I", version) + payload


def discard(payload: bytes) -> bytes:
    return READY + command(Command.POSTCOPY_RAM_DISCARD, payload)


WRONG = {
    "magic": (b"QEVN" + bytes(20), "Not a migration stream", 0),
    "version 2": (b"QEVM\0\0\0\2", "SaveVM v2 format is obsolete and don't work anymore", 4),
    "version 4": (b"QEVM\0\0\0\4", "Unsupported migration stream version", 4),
    "no configuration": (HEADER + b"\1", "Configuration section missing", 8),
    "machine": (
        stream_start(Configuration("pc")) + b"\0",
        "Machine type received is 'pc' and local is 'none'",
        13,
    ),
    "machine is a prefix": (
        stream_start(Configuration("non")) + b"\0",
        "Machine type received is 'non' and local is 'none'",
        13,
    ),
    "machine too long": (HEADER + b"\7\0\1\0\0", "machine type of 65536 bytes", 9),
    "machine not text": (HEADER + b"\7\0\0\0\1\xff", "not UTF-8", 13),
    "capability unknown": (
        stream_start(Configuration("none", None, ("turbo",))) + b"\0",
        "Received unknown capability turbo",
        None,
    ),
    "capability on": (
        stream_start(Configuration("none", None, ("mapped-ram",))) + b"\0",
        "Capability mapped-ram is off, but received capability is on",
        None,
    ),
    "capabilities": (
        subsection("configuration/capabilities", b"\xff" * 4),
        "4294967295 capabilities",
        None,
    ),
    "page bits": (
        stream_start(Configuration("none", 14)) + b"\0",
        "Received TARGET_PAGE_BITS is 14 but local is 12",
        None,
    ),
    "uuid": (
        stream_start(Configuration("none", None, (), b"\1" * 16)) + b"\0",
        "UUID received is 01010101-0101-0101-0101-010101010101 and local is 02020202",
        None,
    ),
    "subsection": (
        subsection("configuration/x", b""),
        "unknown subsection 'configuration/x'",
        None,
    ),
    "subsection version": (
        subsection("configuration/uuid", b"", 2),
        "configuration/uuid: unsupported version 2",
        None,
    ),
    "subsection twice": (
        subsection("configuration/uuid", b"\2" * 16)
        + subsection("configuration/uuid", b"")[len(START) :],
        "comes twice",
        None,
    ),
    "ram version 3": (START + start("ram", 0, 3), "ram: incoming version_id 3 is too old", None),
    "ram version 5": (
        START + start("ram", 0, 5),
        "savevm: unsupported version 5 for 'ram' v4",
        None,
    ),
    "ram instance": (
        START + start("ram", 1),
        "Unknown savevm section or instance 'ram' 1. Make sure that your current VM setup",
        None,
    ),
    "live section": (
        START + start("dirty-bitmap"),
        "Unknown savevm section or instance 'dirty-bitmap' 0",
        None,
    ),
    "ram twice": (READY + RAM, "ram is set up twice", None),
    "block unknown": (
        START + listed(("pc.ram", PAGE)),
        'Unknown ramblock "pc.ram", cannot accept migration',
        None,
    ),
    "block size": (
        START + listed(("ram", 2 * PAGE)),
        "Size mismatch: ram: 0x2000 != 0x40000: Invalid argument",
        None,
    ),
    "total too large": (
        START + listed(("ram", 64 * PAGE), ("rom", 16 * PAGE), total=100 * PAGE),
        "add up to less than the 0x64000 bytes promised",
        None,
    ),
    "total too small": (
        START + listed(("ram", 64 * PAGE), total=PAGE),
        "add up to 0x40000 bytes, not 0x1000",
        None,
    ),
    "block twice": (
        START + listed(("ram", 64 * PAGE), ("ram", 64 * PAGE)),
        'RAM block "ram" is listed twice',
        None,
    ),
    "block missing": (
        START + listed(("ram", 64 * PAGE)),
        'RAM block "rom" of this side is not in the list',
        None,
    ),
    "no list": (
        START + start("ram") + record(0, 0x10) + footer(SECTION),
        "Unknown combination of migration flags: 0x10",
        None,
    ),
    "multifd in the list": (
        START + listed(("ram", 64 * PAGE), ("rom", 16 * PAGE), end=0x200),
        "multifd is off here; switch the capability on here too, or off at the source",
        None,
    ),
    "page outside": (
        READY + part(record(64 * PAGE, 8, "ram", bytes(PAGE))),
        "Illegal RAM offset 40000",
        len(READY) + 5,
    ),
    "page outside, continued": (
        READY + part(record(0, 2, "ram", b"\0"), record(64 * PAGE, 0x22, None, b"\0")),
        "Illegal RAM offset 40000",
        len(READY) + 5 + 13,
    ),
    "page of unknown block": (
        READY + part(record(0, 8, "foo", bytes(PAGE))),
        "Can't find block foo",
        None,
    ),
    "CONTINUE first": (
        READY + part(record(0, 0x28, None, bytes(PAGE))),
        "Ack, bad migration stream!",
        len(READY) + 5,
    ),
    "flag 0x100": (READY + part(record(0, 0x100)), "migration flags: 0x100", len(READY) + 5),
    "PAGE and ZERO": (READY + part(record(0, 0xA)), "migration flags: 0xa", None),
    "MEM_SIZE in a PART": (READY + part(record(0, 4)), "migration flags: 0x4", None),
    "no EOS": (
        READY + b"\2\0\0\0\2" + footer(SECTION) + bytes(16),
        "Unknown combination of migration flags",
        None,
    ),
    "EOS with an address": (READY + part(record(PAGE, 0x10)), "Illegal RAM offset 1000", None),
    "zero page with a value": (
        READY + part(record(0, 2, "ram", b"\1")),
        "Found a zero page with value 1",
        len(READY) + 5 + 12,
    ),
    "zero page with a value, continued": (
        READY + part(record(0, 2, "ram", b"\0"), record(0, 0x22, None, b"\3")),
        "Found a zero page with value 3",
        len(READY) + 5 + 13 + 8,
    ),
    "XBZRLE of another encoding": (
        READY + part(record(0, 0x40, "ram", b"\2\0\1\0")),
        "wrong compression! (2)",
        None,
    ),
    "XBZRLE of no block": (READY + part(record(0, 0x60)), "Ack, bad migration stream!", None),
    "MULTIFD_FLUSH": (READY + part(record(0, 0x200)), "multifd is off here", None),
    "HOOK": (READY + part(record(0, 0x80)), "RDMA is not supported", None),
    "no footer": (READY + part()[:-5] + b"\0", "Missing section footer for ram", None),
    "footer of another": (
        READY + part()[:-5] + footer(9),
        "Mismatched section id in footer for ram - read 0x9 expected 0x2",
        None,
    ),
    "PART of unknown id": (READY + b"\2\0\0\0\x4d", "Unknown savevm section 77", len(READY) + 1),
    "PART before START": (START + b"\2\0\0\0\2", "Unknown savevm section 2", None),
    "PART of id 0": (READY + b"\2\0\0\0\0", "Unknown savevm section 0", None),
    "type 9": (READY + b"\x09", "Unknown savevm section type 9", len(READY)),
    "second configuration": (
        READY + encode_configuration(Configuration("none")),
        "Unknown savevm section type 7",
        None,
    ),
    "device unknown": (
        READY + device_section(DeviceSection(3, "serial", 0, 2, b"")),
        "Unknown savevm section or instance 'serial' 0",
        None,
    ),
    "device version": (
        READY + device_section(DeviceSection(3, "timer", 0, 5, b"\0")),
        "savevm: unsupported version 5 for 'timer' v2",
        len(READY) + 1 + 4 + 6 + 8,
    ),
    "device too long": (
        READY + device_section(device(b"abc"))[:-5] + b"x" + footer(7),
        "Missing section footer for timer",
        None,
    ),
    "device over the limit": (READY + device_section(device(b"x" * 101)), "longer than the", None),
    "command 0": (READY + command(Command.INVALID), "MIG_CMD 0x0 unknown (len 0x0)", len(READY)),
    "command 12": (READY + b"\x08\0\x0c\0\0", "MIG_CMD 0xc unknown (len 0x0)", len(READY)),
    "PING of 8": (
        READY + command(Command.PING, bytes(8)),
        "PING received with bad length - expecting 4, got 8",
        None,
    ),
    "COLO": (
        READY + command(Command.ENABLE_COLO),
        "ENABLE_COLO command come in migration stream, but x-colo capability is not set",
        None,
    ),
    "ADVISE of 8": (
        START + command(Command.POSTCOPY_ADVISE, bytes(8)),
        "CMD_POSTCOPY_ADVISE invalid length (8)",
        None,
    ),
    "ADVISE twice": (
        START + 2 * encode_command(PostcopyAdvise()),
        "CMD_POSTCOPY_ADVISE in wrong postcopy state (1)",
        None,
    ),
    "ADVISE after RAM": (
        READY + encode_command(PostcopyAdvise(4096, 4096)),
        "CMD_POSTCOPY_ADVISE behind the list of RAM blocks",
        len(READY),
    ),
    "DISCARD version": (
        discard(b"\1\3ram\0" + bytes(16)),
        "CMD_POSTCOPY_RAM_DISCARD invalid version (1)",
        len(READY),
    ),
    "DISCARD nil": (
        discard(b"\0\3ramx" + bytes(16)),
        "CMD_POSTCOPY_RAM_DISCARD missing nil (120)",
        None,
    ),
    "DISCARD of nothing": (
        discard(b"\0\3ram\0"),
        "CMD_POSTCOPY_RAM_DISCARD invalid length (6)",
        None,
    ),
    "DISCARD of a range and a half": (
        discard(b"\0\3ram\0" + bytes(24)),
        "CMD_POSTCOPY_RAM_DISCARD invalid length (30)",
        None,
    ),
    "DISCARD name too long": (
        discard(b"\0\xff" + bytes(30)),
        "CMD_POSTCOPY_RAM_DISCARD invalid length (32)",
        None,
    ),
    "DISCARD unaligned": (
        READY + encode_command(RamDiscard("ram", ((100, PAGE),))),
        "ram_block_discard_range: Unaligned start address: 0x64",
        None,
    ),
    "DISCARD length": (
        READY + encode_command(RamDiscard("ram", ((0, 100),))),
        "ram_block_discard_range: Unaligned length: 64",
        None,
    ),
    "DISCARD overrun": (
        READY + encode_command(RamDiscard("ram", ((64 * PAGE, PAGE),))),
        "ram_block_discard_range: Overrun block 'ram' (262144/1000/40000)",
        None,
    ),
    "DISCARD unknown": (
        READY + encode_command(RamDiscard("x", ((0, PAGE),))),
        "ram_discard_range: Failed to find block 'x'",
        None,
    ),
    "RECV_BITMAP unknown": (
        READY + encode_command(RecvBitmap("x")),
        "loadvm_handle_recv_bitmap: block 'x' not found",
        None,
    ),
    "RECV_BITMAP length": (
        READY + command(Command.RECV_BITMAP, b"\3ramx"),
        "CMD_RECV_BITMAP invalid length (5)",
        None,
    ),
    "package too large": (
        READY + command(Command.PACKAGED, struct.pack(">I", 1 << 31)),
        "CMD_PACKAGED: Unreasonably large packaged state: 2147483648",
        len(READY),
    ),
    "description too large": (
        READY + end_of_stream() + b"\6\xff\xff\xff\xff",
        "description of 4294967295 bytes",
        None,
    ),
    "no description": (
        READY + end_of_stream() + b"\0",
        "Expected vmdescription section, but got 0",
        None,
    ),
    "more at the end": (
        READY + end_of_stream() + b"\6\0\0\0\2{}x",
        "byte 0x78 behind the end of the stream",
        None,
    ),
}


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize("what", WRONG)
def test_refused(what, piece):
    raw, text, offset = WRONG[what]
    decoder = new_decoder(expect=Expected("none", uuid=b"\2" * 16), limits=Limits(device_bytes=100))
    with pytest.raises(StreamError) as caught:
        decode(raw, decoder, range(0, len(raw), piece))
    assert not isinstance(caught.value, StreamCut)
    assert text in caught.value.message
    assert caught.value.offset is not None
    if offset is not None:
        assert caught.value.offset == offset


def test_device_whose_length_never_shows_is_bounded():
    class Endless:
        def payload_length(self, name, instance, version, data):
            return None

    decoder = Decoder(Endless(), LAYOUT, limits=Limits(device_bytes=1000))
    with pytest.raises(StreamError, match="longer than the 1000 bytes"):
        decode(READY + device_section(device(b""))[:-5] + bytes(2000), decoder)


def test_capability_of_ours_that_the_peer_lacks():
    decoder = new_decoder(expect=Expected(capabilities=frozenset({"x-ignore-shared"})))
    with pytest.raises(StreamError, match="x-ignore-shared is on, but received capability is off"):
        decode(READY, decoder)


def test_huge_page_size_differs():
    huge = 2 << 20
    entry = BlockEntry("ram", huge, 1 << 30)
    raw = START + encode_command(PostcopyAdvise(huge, PAGE))
    raw += ram_setup(RamSetup(1, (entry,)), postcopy=True)
    decoder = Decoder(CountedFormats(), {"ram": BlockLayout(huge, huge)})
    with pytest.raises(StreamError, match=r"Mismatched RAM page size ram \(local\) 2097152 !="):
        decode(raw, decoder)


def test_packages_do_not_nest():
    decoder = new_decoder(package=True)
    with pytest.raises(StreamError, match="CMD_PACKAGED within a package"):
        decode(encode_command(Package(b"")), decoder)


@pytest.mark.parametrize(
    ("raw", "element"),
    [
        (b"", "the header"),
        (b"QEVM\0\0", "the header"),
        (HEADER, "the configuration"),
        (START, "the configuration"),
        (READY[:-1], "section ram"),
        (READY, "an element, without an end of stream"),
        (READY + part()[:-1], "the footer of a section of ram"),
        (READY + part()[:-6], "a section of ram"),
        (READY + device_section(device(b"abc"))[:-6], "section timer"),
        (READY + encode_command(Package(bytes(5000)))[:-4900], "command PACKAGED"),
        (READY + b"\x08\0", "a command"),
        (READY + b"\0\6\0\0\0\2{", "the description"),
    ],
)
def test_cut(raw, element):
    decoder = new_decoder()
    decode(raw, decoder)
    with pytest.raises(StreamCut) as caught:
        decoder.finish()
    assert caught.value.message == f"The stream ends in {element}"
    assert caught.value.offset == len(raw)
