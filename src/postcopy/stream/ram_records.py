"""RAM records: pages and zero pages, decoded run by run.

Every record is led by a word: the page's byte offset in its block, and flags in the low bits.  All
but the first of a block carry CONTINUE and no name, so a run of pages is a run of records of 4104
bytes, and one of zero pages of 9 bytes.  How far a run goes is found by looking at all the words
at once; the pages are handed out where they lie in the buffer.

What has arrived whole is handed out at once: a vCPU may be waiting for that page.
"""

from typing import NoReturn

import numpy as np

from postcopy.stream.layout import Limits, Receiver
from postcopy.stream.numbers import (
    FLAGS_MASK,
    HEADER_BYTES,
    PAGE_RECORD_BYTES,
    TARGET_PAGE_BYTES,
    ZERO_RECORD_BYTES,
    RamFlag,
    refuse_flags,
)
from postcopy.stream.reader import Incomplete, StreamBuffer
from postcopy.stream.records import BegunPage, MultifdFlush, Offsets, Pages, ZeroPages

_PAGE = int(RamFlag.PAGE)
_ZERO = int(RamFlag.ZERO)
_CONTINUE = int(RamFlag.CONTINUE)
_EOS = int(RamFlag.EOS)
# Where pages and zero pages alternate, runs are short: look at so many records before at all.
_PROBE_RECORDS = 8
_NEIGHBOURS = 1024
_RAMP = np.arange(_NEIGHBOURS, dtype=np.uint64) * np.uint64(TARGET_PAGE_BYTES)
_FLAGS_OF = np.uint64(FLAGS_MASK)
_OFFSET_OF = ~_FLAGS_OF


class RamRecords:
    """The RAM records of one channel, which remembers the block named last."""

    def __init__(self, receiver: Receiver, limits: Limits) -> None:
        self._receiver = receiver
        self._limits = limits
        self.block: str | None = None
        self._last_offset = 0  # of the last page in the block
        self.page_read: int | None = None
        """The byte offset of the page read last; None: that was a zero page."""
        self._dropping = False

    def forget(self) -> None:
        """Forget the block named last: a new connection names its blocks afresh."""
        self.block = None

    def begun(self, reader: StreamBuffer) -> BegunPage | None:
        """What there is of a page that has not come whole, if its header has."""
        rest = reader.rest()
        if (
            self.block is None
            or self._dropping
            or not HEADER_BYTES <= len(rest) < PAGE_RECORD_BYTES
        ):
            return None
        word = int.from_bytes(rest[:HEADER_BYTES], "big")
        offset = word & ~FLAGS_MASK
        if word & FLAGS_MASK != _PAGE | _CONTINUE or offset > self._last_offset:
            return None
        return BegunPage(self.block, offset, bytes(rest[HEADER_BYTES:]))

    def read(self, reader: StreamBuffer) -> Pages | ZeroPages | None:
        """Read the pages that are there, as many of one kind and block as follow one another.

        Commits what it has read, dropped pages too.

        :return: ``None``: an EOS has been read.
        :raises Incomplete: no whole record is there.
        :raises StreamError: the next record is wrong.
        """
        while True:
            record = self._read_next(reader)
            if record is None or not self._dropping:
                return record

    def _read_next(self, reader: StreamBuffer) -> Pages | ZeroPages | None:
        """As :meth:`read`, pages to be dropped too."""
        word = reader.u64()
        flags = word & FLAGS_MASK
        if word == _EOS:
            reader.commit()
            return None
        kind = flags & ~_CONTINUE
        if kind not in {_PAGE, _ZERO}:
            self._refuse(reader, word)
        if flags & _CONTINUE:
            if self.block is None:
                reader.fail("Ack, bad migration stream!", HEADER_BYTES)
            reader.rollback()
            record = self._read_run(reader, kind)
        else:
            record = self._read_named(reader, word & ~FLAGS_MASK, kind)
        reader.commit()
        return record

    def read_or_flush(self, reader: StreamBuffer) -> Pages | ZeroPages | MultifdFlush | None:
        """As :meth:`read`, of a main channel beside which channels of multifd are open."""
        while True:
            if reader.u64() == RamFlag.MULTIFD_FLUSH:
                reader.commit()
                return MultifdFlush()
            reader.rollback()
            record = self._read_next(reader)
            if record is None or not self._dropping:
                return record

    def _refuse(self, reader: StreamBuffer, word: int) -> NoReturn:
        if word & FLAGS_MASK == _EOS:
            reader.fail(f"Illegal RAM offset {word & ~FLAGS_MASK:x}", HEADER_BYTES)
        refuse_flags(reader, word & FLAGS_MASK)

    def _select(self, reader: StreamBuffer, offset: int) -> str:
        """Read the name of a block: the records from here on belong to it."""
        name = reader.name()
        local = self._receiver.layout.get(name)
        if local is None and name not in self._receiver.ignored_blocks:
            reader.fail(f"Can't find block {name}", len(name.encode()))
        last = local.size_bytes - TARGET_PAGE_BYTES if local is not None else offset
        if offset > last:
            reader.fail(f"Illegal RAM offset {offset:x}", 1 + len(name.encode()) + HEADER_BYTES)
        self.block, self._last_offset, self._dropping = name, last, local is None
        return name

    def _read_named(self, reader: StreamBuffer, offset: int, kind: int) -> Pages | ZeroPages:
        name = self._select(reader, offset)
        offsets = np.array([offset], np.uint64)
        record: Pages | ZeroPages
        if kind == _PAGE:
            record = Pages(name, offsets, reader.rows(1, TARGET_PAGE_BYTES, 0, TARGET_PAGE_BYTES))
            reader.skip(TARGET_PAGE_BYTES)
            self.page_read = offset
        else:
            self.page_read = None
            if value := reader.u8():
                reader.fail(f"Found a zero page with value {value}", 1)
            record = ZeroPages(name, offsets)
        return record

    def _read_run(self, reader: StreamBuffer, kind: int) -> Pages | ZeroPages:
        assert self.block is not None
        if kind == _PAGE:
            offsets, neighbours = self._page_offsets(reader)
            count = len(offsets)
            rows = reader.rows(count, PAGE_RECORD_BYTES, HEADER_BYTES, TARGET_PAGE_BYTES)
            reader.skip(count * PAGE_RECORD_BYTES)
            self.page_read = int(offsets[-1])
            return Pages(self.block, offsets, rows, neighbours)
        offsets = self._offsets(reader, kind, ZERO_RECORD_BYTES, self._limits.zero_pages_per_record)
        self._check_zeros(reader, len(offsets))
        reader.skip(len(offsets) * ZERO_RECORD_BYTES)
        self.page_read = None
        return ZeroPages(self.block, offsets)

    def _page_offsets(self, reader: StreamBuffer) -> tuple[Offsets, bool]:
        """Where the next pages belong, and whether they are neighbours."""
        limit = self._limits.pages_per_record
        count = min(reader.available // PAGE_RECORD_BYTES, limit, _NEIGHBOURS)
        if count == 1:
            return self._one_offset(reader), True
        if count > 1 and len(run := self._neighbours(reader, PAGE_RECORD_BYTES, count)) > 1:
            return run, True
        offsets = self._offsets(reader, _PAGE, PAGE_RECORD_BYTES, limit)
        return offsets, len(offsets) == 1

    def _one_offset(self, reader: StreamBuffer) -> Offsets:
        """Where the one page belongs that is there: the shortest way, since a vCPU waits for it."""
        offset = reader.u64() & ~FLAGS_MASK
        reader.rollback()
        if offset > self._last_offset and not self._dropping:
            reader.fail(f"Illegal RAM offset {offset:x}")
        return np.array([offset], np.uint64)

    def _offsets(self, reader: StreamBuffer, kind: int, stride: int, limit: int) -> Offsets:
        # The caller knows that the first record is of the kind.
        count = min(reader.available // stride, limit)
        if not count:
            raise Incomplete
        offsets = self._good_offsets(reader, kind, stride, min(count, _PROBE_RECORDS))
        if len(offsets) == _PROBE_RECORDS < count:
            offsets = self._good_offsets(reader, kind, stride, count)
        return offsets

    def _neighbours(self, reader: StreamBuffer, stride: int, count: int) -> Offsets:
        """The usual case in one look: each record is of the page behind the one before, as far as so."""
        words = reader.words(count, stride)
        offsets: Offsets = words[0] + _RAMP[:count]
        if words[-1] != offsets[-1] or not np.array_equal(words, offsets):
            offsets = offsets[: int((words == offsets).argmin())]
        offsets &= _OFFSET_OF
        fit = int(offsets[-1]) <= self._last_offset or self._dropping
        return offsets if fit else offsets[:0]

    def _good_offsets(self, reader: StreamBuffer, kind: int, stride: int, count: int) -> Offsets:
        words = reader.words(count, stride)
        offsets = words & _OFFSET_OF
        good = (words & _FLAGS_OF) == kind | _CONTINUE
        if not self._dropping:
            good &= offsets <= self._last_offset
        run = count if good.all() else int(good.argmin())
        if not run:
            reader.fail(f"Illegal RAM offset {int(offsets[0]):x}")
        return offsets[:run]

    def _check_zeros(self, reader: StreamBuffer, count: int) -> None:
        values = reader.rows(count, ZERO_RECORD_BYTES, HEADER_BYTES, 1)
        if values.any():
            first = int(values[:, 0].astype(bool).argmax())
            reader.skip(first * ZERO_RECORD_BYTES + HEADER_BYTES)
            reader.fail(f"Found a zero page with value {int(values[first, 0])}")
