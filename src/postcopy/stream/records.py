"""What a stream can say, as frozen records.

Each record means the same to the decoder that yields it and to the encoder that writes it.
Records that hold arrays compare by identity; all others by value.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from postcopy.stream.file_records import Configuration as Configuration  # noqa: PLC0414 - given on
from postcopy.stream.file_records import DeviceSection as DeviceSection  # noqa: PLC0414 - given on
from postcopy.stream.file_records import MappedBlock as MappedBlock  # noqa: PLC0414 - given on
from postcopy.stream.numbers import SectionType

Offsets: TypeAlias = npt.NDArray[np.uint64]
"""Byte offsets of target pages in their block, shape ``(n,)``."""

PageRows: TypeAlias = npt.NDArray[np.uint8]
"""Contents of target pages, shape ``(n, 4096)``."""


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One RAM block in the list of RAM's START section.

    ``page_size_bytes`` is there for huge pages under postcopy, ``guest_address`` only with the
    capability ``x-ignore-shared``.
    """

    name: str
    size_bytes: int
    page_size_bytes: int | None = None
    guest_address: int | None = None


@dataclass(frozen=True, slots=True)
class RamSetup:
    """RAM's START section, whole: the blocks that the source has.

    ``multifd_flush``: behind them stands a :class:`MultifdFlush`.
    """

    section_id: int
    blocks: tuple[BlockEntry, ...]
    multifd_flush: bool = False


@dataclass(frozen=True, slots=True)
class RamBody:
    """A PART or END section of RAM begins; pages follow."""

    kind: SectionType


@dataclass(frozen=True, slots=True)
class RamBodyEnd:
    """A PART or END section of RAM has ended, its footer was right."""

    kind: SectionType


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Target pages of one block, in the order of the wire.

    ``data[i]`` belongs at byte ``offsets[i]`` of the block.  ``data`` is a view into the decoder's
    buffer: valid only until the next call to the decoder.  ``neighbours``: they are known to follow
    one another in the block.
    """

    block: str
    offsets: Offsets
    data: PageRows
    neighbours: bool = False


@dataclass(frozen=True, slots=True)
class BegunPage:
    """The beginning of the page at byte ``offset`` of a block: ``data`` is what has come of it."""

    block: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class ZeroPages:
    """Target pages of one block that are all zero."""

    block: str
    offsets: Offsets


@dataclass(frozen=True, slots=True)
class XbzrlePage:
    """What has changed in a target page since its copy before; see ``encoded_records.apply_delta``.

    ``position`` is that of the delta in the stream, for errors.
    """

    block: str
    offset: int
    delta: bytes
    position: int


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """Wait here until each channel of multifd has come to its next SYNC; they wait for this record."""


@dataclass(frozen=True, slots=True)
class RamRecordsEnd:
    """The records of a section of RAM have ended; the footer is still to come."""

    kind: SectionType


@dataclass(frozen=True, slots=True)
class OpenReturnPath:
    """From now on the destination may answer on the same socket."""


@dataclass(frozen=True, slots=True)
class Ping:
    """To be answered with a :class:`Pong` of the same value."""

    value: int


@dataclass(frozen=True, slots=True)
class PostcopyAdvise:
    """Postcopy may follow.

    ``page_sizes`` is the bitwise OR of the page sizes of all blocks, in bytes; both numbers are
    ``None`` when RAM takes no part in postcopy.
    """

    page_sizes: int | None = None
    target_page_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PostcopyListen:
    """Start the pager, and go on reading RAM from the main channel while the package is loaded."""


@dataclass(frozen=True, slots=True)
class PostcopyRun:
    """Run the guest; nothing behind it in the package counts."""


@dataclass(frozen=True, slots=True, eq=False)
class RamDiscard:
    """Ranges of a block, in bytes, whose content is stale: start and length, shape ``(n, 2)``.

    There may be thousands, and a guest stands still meanwhile.
    """

    block: str
    ranges: npt.NDArray[np.uint64]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RamDiscard):
            return NotImplemented
        return self.block == other.block and np.array_equal(self.ranges, other.ranges)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Package:
    """Elements of a stream, without header, that are to be decoded on their own."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PostcopyResume:
    """Recovery is done; go on."""


@dataclass(frozen=True, slots=True)
class RecvBitmap:
    """Recovery: tell which pages of this block you have."""

    block: str


@dataclass(frozen=True, slots=True)
class SwitchoverStart:
    """The source's guest has stopped; the rest follows."""


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """The source has nothing more to say, but for a description in precopy."""


@dataclass(frozen=True, slots=True)
class Description:
    """The JSON that describes the device sections; see :mod:`postcopy.stream.description`."""

    text: str


CommandRecord: TypeAlias = (
    OpenReturnPath
    | Ping
    | PostcopyAdvise
    | PostcopyListen
    | PostcopyRun
    | RamDiscard
    | Package
    | PostcopyResume
    | RecvBitmap
    | SwitchoverStart
)

Record: TypeAlias = (
    Configuration
    | RamSetup
    | MappedBlock
    | RamBody
    | RamBodyEnd
    | Pages
    | ZeroPages
    | XbzrlePage
    | MultifdFlush
    | RamRecordsEnd
    | DeviceSection
    | CommandRecord
    | EndOfStream
    | Description
)


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination's last message; 0 = the guest has arrived."""

    value: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a :class:`Ping`."""

    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """Send these pages now.  ``block`` is ``None`` on the wire for the block asked for last."""

    block: str | None
    start: int
    length_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class RecvBitmapReply:
    """Which target pages of a block have been received; shape ``(pages,)``, bool."""

    block: str
    bitmap: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """The destination is ready to go on after a recovery."""

    value: int = 1


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination's devices are ready for the switchover."""


ReturnPathMessage: TypeAlias = (
    Shut | Pong | RequestPages | RecvBitmapReply | ResumeAck | SwitchoverAck
)
