"""A raw file as a disk: what a virtio block device does for its driver's requests."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from postcopy.errors import Refused, RingError
from postcopy.kernel.patience import persist
from postcopy.virtio.block import (
    HEADER,
    ID_BYTES,
    SECTOR_BYTES,
    BlockFeature,
    BlockStatus,
    RequestType,
    configuration,
)

Pieces: TypeAlias = list[memoryview]

_MOST_SEGMENTS: Final = 126
"""A header and a status beside them fill a ring of 128."""

_OK, _IOERR, _UNSUPP = (int(status) for status in BlockStatus)
_IN, _OUT, _FLUSH, _GET_ID = map(
    int, (RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.GET_ID)
)


class Disk:
    """One raw file, or a block device; positions are in sectors of 512 bytes.

    Reads and writes go straight between the file and the pieces that the caller hands over; the calls
    let go of the interpreter lock, so a piece may be missing guest memory.

    :param say: is told of each kind of failure once; the driver is told each time.
    :param cure: of a file that cannot be opened.
    :raises Refused: it cannot be opened, is no file or block device, or holds no sector.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        say: Callable[[str], None] = lambda _: None,
        cure: str = "give a file that can be read and written",
    ) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._say = say
        self._said: set[tuple[int, ...]] = set()
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags)
        except OSError as error:
            raise Refused(f"{self.path}: {error.strerror}; {cure}") from error
        try:
            self.sectors = self._count_sectors()
        except BaseException:
            self.close()
            raise

    @property
    def features(self) -> BlockFeature:
        """What it offers to a driver."""
        offered = BlockFeature.SEG_MAX | BlockFeature.BLK_SIZE | BlockFeature.FLUSH
        return offered | BlockFeature.RO if self.read_only else offered

    def configuration(self, *, queues: int = 1) -> bytes:
        """Its configuration space."""
        return configuration(
            self.sectors, most_segments=_MOST_SEGMENTS, block_bytes=SECTOR_BYTES, queues=queues
        )

    def look_at_size(self) -> bool:
        """Take note of another size of the file; return whether it has one."""
        before = self.sectors
        try:
            self.sectors = self._count_sectors()
        except Refused as error:  # nothing can be read or written any more, which each request says
            self._say(str(error))
        return self.sectors != before

    def serve(self, readable: Pieces, writable: Pieces) -> int:
        """Do one request, and write its status into the last byte of ``writable``.

        :param readable: header and data, cut in any way.
        :param writable: data and status.
        :return: how many bytes have been written to ``writable``, from its beginning.
        :raises RingError: there is no room for a header or a status, so the driver cannot be told.
        """
        if not writable or not len(writable[-1]):
            raise RingError("a block request without a byte for its status")
        header, data_out = _split(readable, HEADER.size)
        kind, _, sector = HEADER.unpack(header)
        last = writable[-1]
        data_in = writable[:-1] if len(last) == 1 else [*writable[:-1], last[:-1]]
        length, status = self._execute(kind, sector, data_out, data_in)
        last[-1] = status
        return length + 1

    def flush(self) -> None:
        """Bring to the disk what has been written; harmless when nothing has.

        :raises OSError: that fails.
        """
        persist(os.fdatasync, self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _count_sectors(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise Refused(f"{self.path} is neither a file nor a block device; give one")
        sectors = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR_BYTES
        if not sectors:
            raise Refused(f"{self.path} holds no sector of {SECTOR_BYTES} bytes; make it larger")
        return sectors

    def _execute(self, kind: int, sector: int, out: Pieces, into: Pieces) -> tuple[int, int]:
        """Bytes of ``into`` that count as written, and the status."""
        try:
            if kind == _IN:
                return self._transfer(os.preadv, sector, into)
            if kind == _OUT:
                return 0, self._write(sector, out)
            if kind == _FLUSH:
                os.fdatasync(self._fd)
                return 0, _OK
            if kind == _GET_ID:
                return _fill(
                    into, os.fsencode(self.path.name)[:ID_BYTES].ljust(ID_BYTES, b"\0")
                ), _OK
        except OSError as error:
            self._tell(
                f"request {_name(kind)} at sector {sector}: {error.strerror}",
                kind,
                error.errno or 0,
            )
            return _total(into), _IOERR
        return 0, _UNSUPP

    def _write(self, sector: int, out: Pieces) -> int:
        if self.read_only:
            self._tell("a driver wrote to a disk that it was told is read-only", _OUT, 0)
            return _IOERR
        return self._transfer(os.pwritev, sector, out)[1]

    def _transfer(
        self, call: Callable[[int, Pieces, int], int], sector: int, pieces: Pieces
    ) -> tuple[int, int]:
        position, length = sector * SECTOR_BYTES, _total(pieces)
        if length % SECTOR_BYTES or position + length > self.sectors * SECTOR_BYTES:
            return 0, _IOERR
        done = persist(call, self._fd, pieces, position) if length else 0
        while done < length:
            moved = persist(call, self._fd, _behind(pieces, done), position + done)
            if not moved:
                raise OSError(0, "the file has become shorter")
            done += moved
        return length, _OK

    def _tell(self, text: str, *kind: int) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(f"{self.path}: {text}")


def _name(kind: int) -> str:
    try:
        return RequestType(kind).name
    except ValueError:
        return str(kind)


def _total(pieces: Pieces) -> int:
    return sum(map(len, pieces))


def _split(pieces: Pieces, n_bytes: int) -> tuple[bytes | memoryview, Pieces]:
    """The first bytes, and the pieces behind them."""
    if pieces and len(pieces[0]) == n_bytes:
        return pieces[0], pieces[1:]
    if _total(pieces) < n_bytes:
        raise RingError(f"a block request with {_total(pieces)} bytes for its header of {n_bytes}")
    head = bytearray()
    for piece in pieces:
        head += piece[: n_bytes - len(head)]
    return bytes(head), _behind(pieces, n_bytes)


def _behind(pieces: Pieces, n_bytes: int) -> Pieces:
    """What is left of the pieces behind so many bytes."""
    left = []
    for piece in pieces:
        if n_bytes < len(piece):
            left.append(piece[n_bytes:])
        n_bytes = max(n_bytes - len(piece), 0)
    return left


def _fill(pieces: Pieces, data: bytes) -> int:
    """Copy bytes into pieces, as far as there is room; return how many."""
    done = 0
    for piece in pieces:
        part = data[done : done + len(piece)]
        piece[: len(part)] = part
        done += len(part)
    return done
