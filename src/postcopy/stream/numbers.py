"""The numbers of QEMU's migration stream, version 3, retired ones included.

Source: QEMU's ``migration/savevm.h``, ``migration/ram.h`` and ``docs/devel/migration/`` as of 10.0.
Everything on the wire is big endian; the bitmaps alone are little endian.
"""

import enum
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from postcopy.stream.reader import StreamBuffer

MAGIC = 0x5145564D  # "QEVM"
VERSION = 3
RETIRED_VERSION = 2  # recognised only to be refused by name

TARGET_PAGE_BITS = 12
TARGET_PAGE_BYTES = 1 << TARGET_PAGE_BITS
"""The page of the wire on x86, whatever pages a RAM block is made of: each RAM record has one."""

FLAGS_MASK = TARGET_PAGE_BYTES - 1

RAM_SECTION_NAME = "ram"
RAM_SECTION_VERSION = 4
RAM_SECTION_ID = 2
"""As QEMU's own machines have it; its reader takes 0 for "never seen"."""

IGNORED_BLOCKS = frozenset({"pc.bios", "pc.rom"})
"""Blocks of a real microvm that a guest without firmware has no use for."""

FIRMWARE_PAGE_BYTES = {"microvm": TARGET_PAGE_BYTES}
"""The pages of those blocks, by machine: they count among the page sizes that an advise names."""

BITMAP_END = 0x0123456789ABCDEF
"""Ends a received-bitmap on the return path."""

LONGEST_NAME = 255  # a name's length is one byte
LONGEST_RETURN_PAYLOAD = 512  # what a source takes in one message of the return path

HEADER_BYTES = 8  # the word that leads each RAM record
PAGE_RECORD_BYTES = HEADER_BYTES + TARGET_PAGE_BYTES
ZERO_RECORD_BYTES = HEADER_BYTES + 1


class SectionType(enum.IntEnum):
    """The byte that leads each element of the stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class RamFlag(enum.IntFlag):
    """The low bits of the word that leads each RAM record."""

    FULL = 0x001  # retired in 2009
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080  # RDMA's
    COMPRESS_PAGE = 0x100  # retired in QEMU 9.1
    MULTIFD_FLUSH = 0x200


class Command(enum.IntEnum):
    """What a source may order, by number."""

    INVALID = 0
    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


class ReturnPathType(enum.IntEnum):
    """What a destination may say on the return path."""

    INVALID = 0
    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


RESUME_ACK_VALUE = 1

VALIDATED_CAPABILITIES = ("x-ignore-shared", "mapped-ram")
"""The capabilities that a configuration section may name, in the order in which it does."""

_REFUSED = {
    RamFlag.XBZRLE: "xbzrle is not supported; switch the capability off at the source",
    RamFlag.MULTIFD_FLUSH: "multifd is off here; switch the capability on here too, or off at the source",
    RamFlag.HOOK: "RDMA is not supported; migrate over a socket or into a file",
}


def refuse_flags(reader: "StreamBuffer", flags: int) -> NoReturn:
    """Refuse the record whose word has just been read, by the name of what it belongs to."""
    for flag, message in _REFUSED.items():
        if flags & ~RamFlag.CONTINUE == flag:
            reader.fail(message, HEADER_BYTES)
    reader.fail(f"Unknown combination of migration flags: {flags:#x}", HEADER_BYTES)


TLS_HANDSHAKE = 0x1603
TLS_ALERT = 0x1503
"""How a record of TLS begins (RFC 8446): what a peer that is set otherwise sends."""
