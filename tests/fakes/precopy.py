"""A whole precopy as a stock QEMU sends it, made by hand, with the channels of multifd."""

import json
import struct

import numpy as np

from fakes.multifd import ChannelWriter, initial
from postcopy.stream.encoder import (
    RamPart,
    description,
    device_section,
    encode_command,
    end_of_stream,
    ram_setup,
    stream_start,
)
from postcopy.stream.numbers import SectionType
from postcopy.stream.records import (
    BlockEntry,
    Configuration,
    DeviceSection,
    OpenReturnPath,
    Ping,
    RamSetup,
    SwitchoverStart,
)

PAGE = 4096
PAGES = 40
RAM = np.random.default_rng(6).integers(1, 256, (PAGES, PAGE), dtype=np.uint8)
START = stream_start(Configuration("microvm"))
ANSWERED = encode_command(OpenReturnPath()) + encode_command(Ping(1))
SETUP = ram_setup(RamSetup(2, (BlockEntry("microvm.ram", PAGES * PAGE),)), postcopy=False)
FLUSH = struct.pack(">Q", 0x200)
FLUSHED_SETUP = SETUP[:-13] + FLUSH + SETUP[-13:]
STATE = b"the state of a device that is known to nobody"
DEVICES = device_section(DeviceSection(7, "unheard-of", 3, 9, STATE))
DESCRIPTION = json.dumps(
    {
        "devices": [
            {
                "name": "unheard-of",
                "instance_id": 3,
                "fields": [{"name": "data", "size": len(STATE)}],
            }
        ]
    }
)
TAIL = DEVICES + end_of_stream() + description(DESCRIPTION)


def page(number: int, row: np.ndarray | bytes) -> bytes:
    """The record of a page, with its block's name."""
    return struct.pack(">Q", number * PAGE | 8) + b"\x0bmicrovm.ram" + bytes(row)


def body(*records: bytes, end: bool = False) -> bytes:
    """A section of RAM."""
    return RamPart(2, SectionType.END if end else SectionType.PART).around(*records)


def precopy(*, answered: bool = False) -> bytes:
    """A main channel with all of :data:`RAM`."""
    records = [page(number, row) for number, row in enumerate(RAM)]
    return b"".join(
        (
            START,
            ANSWERED if answered else b"",
            SETUP,
            body(page(3, bytes(PAGE)), *records[:30]),
            encode_command(SwitchoverStart()),
            body(*records[30:], end=True),
            TAIL,
        )
    )


def multifd_precopy(*, flushes: bool) -> list[bytes]:
    """A main channel and two of multifd: page 5 is sent on one of them, and again on the other.

    :param flushes: the main channel tells of each rendezvous, as QEMU 8.1 and newer do.
    """
    flush = FLUSH if flushes else b""
    main = START + (FLUSHED_SETUP if flushes else SETUP)
    main += body(flush) + body(flush, end=True) + TAIL
    old, new = ChannelWriter(), ChannelWriter()
    rest = [(number * PAGE, row) for number, row in enumerate(RAM) if number != 5]
    first = initial(0) + old.packet(sync=True)
    first += old.packet("microvm.ram", [(5 * PAGE, RAM[6])]) + old.packet("microvm.ram", rest)
    first += old.packet(sync=True) + old.packet(sync=True)
    second = initial(1) + new.packet(sync=True) + new.packet(sync=True)
    second += new.packet("microvm.ram", [(5 * PAGE, RAM[5])], sync=True)
    return [main, first, second]
