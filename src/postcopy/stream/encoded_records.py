"""RAM records besides pages and zero pages: deltas of XBZRLE, and the rendezvous with multifd's channels.

Source: QEMU's ``migration/xbzrle.c`` and ``migration/ram.c``.
"""

from typing import Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.stream.numbers import FLAGS_MASK, HEADER_BYTES, TARGET_PAGE_BYTES, RamFlag
from postcopy.stream.ram_records import RamRecords
from postcopy.stream.reader import StreamBuffer
from postcopy.stream.records import MultifdFlush, PageRows, Pages, XbzrlePage, ZeroPages

_ENCODING: Final = 1
_XBZRLE = int(RamFlag.XBZRLE)
_CONTINUE = int(RamFlag.CONTINUE)
_MULTIFD_FLUSH = int(RamFlag.MULTIFD_FLUSH)


def encode_delta(changed: npt.NDArray[np.bool_], page: PageRows) -> bytes | None:
    """What :func:`apply_delta` makes a page of, from its content before.

    :param changed: which bytes differ, shape ``(4096,)``.
    :param page: its content now, shape ``(4096,)``.
    :return: ``None``: it would not be shorter than the page.
    """
    ends = np.flatnonzero(changed[1:] != changed[:-1]) + 1
    edges = [*([0] if changed[0] else []), *ends.tolist()]
    if len(edges) % 2:
        edges.append(TARGET_PAGE_BYTES)
    # At least a byte for each number.
    if int(changed.sum()) + len(edges) >= TARGET_PAGE_BYTES:
        return None
    data, pieces, at = page.tobytes(), [], 0
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        pieces += [_encode_number(start - at), _encode_number(end - start), data[start:end]]
        at = end
    delta = b"".join(pieces)
    return delta if len(delta) < TARGET_PAGE_BYTES else None


def _encode_number(value: int) -> bytes:
    return bytes((value,)) if value < 0x80 else bytes((value & 0x7F | 0x80, value >> 7))


def apply_delta(record: XbzrlePage, page: PageRows) -> None:
    """Change a page in place.

    :param page: its content at the reader, shape ``(4096,)``.
    :raises StreamError: the delta does not fit a page; the page may have been changed in part.
    """
    delta, at, place = record.delta, 0, 0
    while at < len(delta):
        unchanged, next_at = _number(record, at)
        if at and not unchanged:
            _fail(record, at)
        changed, start = _number(record, next_at)
        place += unchanged
        end = start + changed
        if not changed or end > len(delta) or place + changed > TARGET_PAGE_BYTES:
            _fail(record, next_at)
        page[place : place + changed] = np.frombuffer(delta, np.uint8, changed, start)
        at, place = end, place + changed


def _number(record: XbzrlePage, at: int) -> tuple[int, int]:
    """Read a number of one or two bytes; return it, and where it ends."""
    raw = record.delta[at : at + 2]
    if raw and raw[0] < 0x80:
        return raw[0], at + 1
    if len(raw) < 2 or raw[1] >= 0x80:
        _fail(record, at)
    return raw[0] & 0x7F | raw[1] << 7, at + 2


def _fail(record: XbzrlePage, at: int) -> NoReturn:
    raise StreamError("Failed to load XBZRLE page - decode error!", record.position + at)


EncodedRecord: TypeAlias = Pages | ZeroPages | XbzrlePage | MultifdFlush


class EncodedRamRecords(RamRecords):
    """The RAM records of a main channel whose source may use ``xbzrle`` or ``multifd``."""

    def read_or_delta(self, reader: StreamBuffer) -> Pages | ZeroPages | XbzrlePage | None:
        """As :meth:`RamRecords.read`, with deltas."""
        while True:
            word = reader.u64()
            record: Pages | ZeroPages | XbzrlePage | None
            if word & FLAGS_MASK & ~_CONTINUE == _XBZRLE:
                record = self._read_delta(reader, word)
                reader.commit()
            else:
                reader.rollback()
                record = self._read_next(reader)
            if record is None or not self._dropping:
                return record

    def read_any(self, reader: StreamBuffer) -> EncodedRecord | None:
        """As :meth:`RamRecords.read`, with the other records.

        :return: ``None``: an EOS has been read.
        :raises Incomplete: no whole record is there.
        :raises StreamError: the next record is wrong.
        """
        word = reader.u64()
        record: EncodedRecord | None
        if word == _MULTIFD_FLUSH:
            record = MultifdFlush()
        elif word & FLAGS_MASK & ~_CONTINUE == _XBZRLE:
            record = self._read_delta(reader, word)
        else:
            reader.rollback()
            return self.read(reader)
        reader.commit()
        return record

    def _read_delta(self, reader: StreamBuffer, word: int) -> XbzrlePage:
        offset = word & ~FLAGS_MASK
        if not word & _CONTINUE:
            self._select(reader, offset)
        elif self.block is None:
            reader.fail("Ack, bad migration stream!", HEADER_BYTES)
        elif offset > self._last_offset:
            reader.fail(f"Illegal RAM offset {offset:x}", HEADER_BYTES)
        if (encoding := reader.u8()) != _ENCODING:
            reader.fail(f"Failed to load XBZRLE page - wrong compression! ({encoding})", 1)
        if (length := reader.u16()) > TARGET_PAGE_BYTES:
            reader.fail("Failed to load XBZRLE page - len overflow!", 2)
        position = reader.position
        assert self.block is not None
        return XbzrlePage(self.block, offset, reader.take(length), position)
