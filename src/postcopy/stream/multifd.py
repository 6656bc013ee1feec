"""One channel of multifd: bytes to records, without a socket and without a side.

A channel is one initial packet, and then packets::

    magic version │ uuid │ id │ reserved                                       64 bytes, once
    magic version flags slots n size number z │ block │ offset 0 ... 127       1344 bytes ┐
    the data of n pages, size bytes                                                       ┘ any number

The offsets are those of the n pages, then those of z pages that are all zero.  A packet with the flag SYNC
is one end of a rendezvous of all channels: what another channel sends behind its SYNC of the same number
may replace what has been sent before.  :class:`MultifdDecoder` gives out :class:`MultifdSync`; its caller
waits.

Source: QEMU's ``migration/multifd.h`` as of 7.2, 10.0 and 11.1, and ``docs/devel/migration/``.
"""

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamCut
from postcopy.stream.layout import Layout
from postcopy.stream.multifd_data import COMPRESSIONS, PageData, plain_pages
from postcopy.stream.multifd_header import (
    MAGIC,
    MOST_BYTES,
    PACKET_BYTES,
    PACKET_PAGES,
    VERSION,
    leading_zeros,
)
from postcopy.stream.numbers import FLAGS_MASK, TARGET_PAGE_BYTES
from postcopy.stream.reader import DecoderInput, Incomplete
from postcopy.stream.records import Offsets, Pages, ZeroPages

INITIAL_BYTES: Final = 64
HEADER_BYTES: Final = PACKET_BYTES - 8 * PACKET_PAGES
_LARGEST_DATA_BYTES: Final = 2 * PACKET_PAGES * TARGET_PAGE_BYTES
"""Of compressed pages: the room that QEMU has for them."""

_SYNC: Final = 0x01
_COMPRESSION: Final = 0x3E
_DEVICE_STATE: Final = 0x40
_KNOWN_FLAGS: Final = _SYNC | _COMPRESSION | _DEVICE_STATE

_INITIAL = struct.Struct(">II16sB39x")
_HEADER = struct.Struct(">IIIIIIQI28x256s")
_RAMP: Final = np.arange(PACKET_PAGES, dtype=np.uint64) * np.uint64(TARGET_PAGE_BYTES)
_NO_OFFSETS: Final = np.empty(0, np.uint64)
_NUMBER_AT, _PAGES_AT, _SIZE_AT, _NAME_AT = 24, 16, 20, 64


@dataclass(frozen=True, slots=True)
class MultifdInitial:
    """The first packet of a channel.

    :ivar uuid: of the source's machine, 16 bytes; all zero if it has none.
    :ivar channel: the number that the source has given it, from 0 on.
    """

    uuid: bytes
    channel: int


@dataclass(frozen=True, slots=True)
class MultifdSync:
    """The channel has come to a rendezvous.

    :ivar packet: the number of the packet, which counts over all channels.
    """

    packet: int


MultifdRecord: TypeAlias = MultifdInitial | Pages | ZeroPages | MultifdSync


@dataclass(slots=True)
class _Packet:
    flags: int
    n_pages: int
    n_zeros: int
    size: int
    number: int
    block: str
    offsets: Offsets
    neighbours: bool


class MultifdDecoder(DecoderInput):
    """Decodes one channel.  One thread only; use it as :class:`postcopy.stream.decoder.Decoder`.

    :param layout: returns the reader's blocks; asked at the first packet that has pages, and may wait until
        they are known.
    """

    def __init__(self, layout: Callable[[], Layout]) -> None:
        super().__init__(_LARGEST_DATA_BYTES + 2 * PACKET_BYTES)
        self._ask_layout = layout
        self._layout: Layout | None = None
        self._compression: int | None = None  # of the channel, once a packet with pages has come
        self._data: PageData = plain_pages
        self._begun = False
        self._name, self._named = b"", ""  # the last block
        self._packet: _Packet | None = None
        self._zeros_come = False  # the last packet had nothing but zero pages
        self._ready: deque[MultifdRecord] = deque()

    @property
    def wanted(self) -> int:
        """How many bytes complete what is being read, or are to be taken if they are there; never 0.

        A reader that receives no more than that at once has each packet at the start of the buffer: none
        is moved.
        """
        if self._zeros_come:
            return MOST_BYTES
        if not self._begun:
            size = INITIAL_BYTES
        else:
            size = PACKET_BYTES if self._packet is None else self._packet.size
        return max(1, size - self._reader.pending)

    @property
    def is_sure(self) -> bool:
        """Whether so many bytes will come as are :attr:`wanted`."""
        return not self._zeros_come

    def next_record(self) -> MultifdRecord | None:
        """Decode the next record; ``None``: it needs more bytes.

        Ends the life of :class:`Pages` given out before.

        :raises StreamError: the channel is wrong.
        """
        try:
            while not self._ready:
                self._step()
        except Incomplete:
            self._reader.rollback()
            return None
        return self._ready.popleft()

    def plain_run(self) -> tuple[str, int, int] | None:
        """Give block, byte offset and length of plain neighbouring pages whose bytes come next.

        A reader may receive these bytes itself, and then says so with :meth:`run_placed`.
        """
        packet = self._packet
        if packet is None or not packet.neighbours or self._compression or self._reader.pending:
            return None
        return packet.block, int(packet.offsets[0]), packet.size

    def behind_run(self) -> memoryview | None:
        """Give the room for what comes behind :meth:`plain_run`; None: nothing may come for now.

        A reader that receives it together with the pages says so with :meth:`received`, behind
        :meth:`run_placed`.
        """
        assert self._packet is not None
        # Behind pages there is a SYNC, if nothing else.  QEMU 7.2 has it in the last packet of pages.
        return None if self._packet.flags & _SYNC else self.buffer()[:PACKET_BYTES]

    def run_placed(self) -> None:
        """All bytes of :meth:`plain_run` have been received elsewhere, and are in place."""
        assert self._packet is not None
        self._reader.jump(self._reader.consumed + self._packet.size)
        self._end_packet(self._packet)
        self._packet = None

    def finish(self) -> None:
        """Say that no more bytes will come.

        :raises StreamCut: they end in the middle of a packet, or before the first.
        """
        if not self._begun or self._packet is not None or self._reader.pending:
            raise StreamCut("The channel ends in a packet", self._reader.consumed)

    def _step(self) -> None:
        if not self._begun:
            self._read_initial()
            self._begun = True
        elif self._packet is None:
            if not (self._zeros_come and self._read_zeros()):
                self._packet = packet = self._read_header()
                self._zeros_come = bool(packet.n_zeros) and not (
                    packet.n_pages or packet.flags & _SYNC
                )
        else:
            self._read_data(self._packet)
            self._packet = None
        self._reader.commit()

    def _read_initial(self) -> None:
        reader = self._reader
        magic, version, uuid, channel = _INITIAL.unpack(reader.take(INITIAL_BYTES))
        self._check_magic(magic, version, INITIAL_BYTES)
        self._ready.append(MultifdInitial(uuid, channel))

    def _check_magic(self, magic: int, version: int, back: int) -> None:
        if magic != MAGIC:
            self._reader.fail(
                f"multifd: received packet magic {magic:x} expected magic {MAGIC:x}", back
            )
        if version != VERSION:
            self._reader.fail(
                f"multifd: received packet version {version} expected version {VERSION}", back - 4
            )

    def _read_header(self) -> _Packet:
        reader = self._reader
        raw = reader.take(PACKET_BYTES)
        magic, version, flags, slots, n, size, number, z, name = _HEADER.unpack_from(raw)
        self._check_magic(magic, version, PACKET_BYTES)
        if flags & _DEVICE_STATE:
            self._wrong("multifd: device state (VFIO) is not supported", 8)
        if flags & ~_KNOWN_FLAGS:
            self._wrong(f"multifd: unknown flags {flags:#x}", 8)
        if slots > PACKET_PAGES:
            self._wrong(f"multifd: packet of {slots} pages; at most {PACKET_PAGES} are taken", 12)
        if n + z > PACKET_PAGES:
            self._wrong(f"multifd: {n} pages and {z} zero pages in a packet", _PAGES_AT)
        if n:
            self._choose(flags & _COMPRESSION)
            self._check_size(n, size)
        else:
            size = 0  # QEMU 7.2 leaves the size of the packet before there; nothing follows
        block, offsets, neighbours = "", _NO_OFFSETS, False
        if n or z:
            block = self._block(name)
            offsets = np.frombuffer(raw, ">u8", n + z, HEADER_BYTES).astype(np.uint64)
            run = offsets[0] + _RAMP[:n]  # looked at first: the usual case, in few steps
            neighbours = bool(n) and np.array_equal(run, offsets[:n])
            if z or not neighbours or not self._fits(block, int(offsets[0]), n):
                self._check_offsets(block, offsets)
        return _Packet(flags, n, z, size, number, block, offsets, neighbours)

    def _read_zeros(self) -> bool:
        """Read many packets of zero pages of the last block; return whether there are some."""
        found = leading_zeros(self._reader.rest(), self._name, _COMPRESSION)
        if found is None or not self._are_inside(self._named, found[1]).all():
            return False
        self._reader.skip(found[0])
        self._ready.append(ZeroPages(self._named, found[1]))
        return True

    def _fits(self, block: str, offset: int, n_pages: int) -> bool:
        assert self._layout is not None
        end = offset + n_pages * TARGET_PAGE_BYTES
        return not offset & FLAGS_MASK and end <= self._layout[block].size_bytes

    def _wrong(self, message: str, at: int) -> NoReturn:
        """Refuse the header that has just been read, for the field at this byte of it."""
        self._reader.fail(message, PACKET_BYTES - at)

    def _choose(self, compression: int) -> None:
        """Find out how the channel is compressed: it stays so."""
        if self._compression == compression:
            return
        if self._compression is not None:
            self._wrong(
                f"multifd: flags received {compression:x} flags expected {self._compression:x}", 8
            )
        found = COMPRESSIONS.get(compression)
        if found is None:
            self._wrong(f"multifd: unknown compression {compression:#x}", 8)
        if isinstance(found, str):
            self._wrong(
                f"multifd: compression {found} is not supported; set multifd-compression to none, "
                "zlib or zstd at the source",
                8,
            )
        self._compression, self._data = compression, found()

    def _check_size(self, n_pages: int, size: int) -> None:
        plain = n_pages * TARGET_PAGE_BYTES
        if self._compression:
            if not 0 < size <= _LARGEST_DATA_BYTES:
                self._wrong(f"multifd: {size} bytes of data for {n_pages} pages", _SIZE_AT)
        elif size != plain:
            self._wrong(f"multifd: {size} bytes of data for {n_pages} pages", _SIZE_AT)

    def _block(self, raw: bytes) -> str:
        if raw != self._name:
            self._named, self._name = self._find_block(raw), raw
        return self._named

    def _find_block(self, raw: bytes) -> str:
        name, zero, _ = raw.partition(b"\0")
        if not zero:
            self._wrong("multifd: the name of the block does not end", _NAME_AT)
        try:
            text = name.decode()
        except UnicodeDecodeError:
            self._wrong(f"multifd: not UTF-8: {name[:32]!r}", _NAME_AT)
        if self._layout is None:
            self._layout = self._ask_layout()
        if text not in self._layout:
            self._wrong(f"multifd: unknown ram block {text}", _NAME_AT)
        return text

    def _check_offsets(self, block: str, offsets: Offsets) -> None:
        inside = self._are_inside(block, offsets)
        if not inside.all():
            first = int(inside.argmin())
            self._wrong(
                f"multifd: offset outside of block {block}: {int(offsets[first]):x}",
                HEADER_BYTES + 8 * first,
            )

    def _are_inside(self, block: str, offsets: Offsets) -> npt.NDArray[np.bool_]:
        """Tell which of these are offsets of pages of a block."""
        assert self._layout is not None
        last = self._layout[block].size_bytes - TARGET_PAGE_BYTES
        if last < 0:
            return np.zeros(len(offsets), np.bool_)
        inside: npt.NDArray[np.bool_] = offsets <= np.uint64(last)
        inside &= (offsets & np.uint64(FLAGS_MASK)) == 0
        return inside

    def _read_data(self, packet: _Packet) -> None:
        ready, n, offsets = self._ready, packet.n_pages, packet.offsets
        if n:
            rows = self._data(self._reader, packet.size, n)
            ready.append(Pages(packet.block, offsets[:n], rows, packet.neighbours))
        self._end_packet(packet)

    def _end_packet(self, packet: _Packet) -> None:
        """Give out what follows the pages of a packet."""
        if packet.n_zeros:
            self._ready.append(ZeroPages(packet.block, packet.offsets[packet.n_pages :]))
        if packet.flags & _SYNC:
            self._ready.append(MultifdSync(packet.number))
