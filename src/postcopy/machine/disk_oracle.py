"""Whether a drive holds what the workload ``disk`` has written to it, and memory what it has read.

Only for a guest that stands still.  The rules are those of ``workloads/README.md``.  The guest's slices
are checked by :mod:`postcopy.machine.oracle`; here are the drive, and the buffers that it writes to.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from postcopy.errors import GuestError
from postcopy.machine.oracle import Words, mix
from postcopy.machine.workload import BLOCK_BYTES, Workload
from postcopy.machine.workload_records import Read

_RECORD, _BUFFERED, _COUNTERS, _BUFFERS = 0x4000, 0x5000, 0x8000, 0x10000
_INDICES: Final = 0x82, 0x1002
"""Of the available and the used ring."""
_INDEX: Final = 1 << 16
_MAGIC: Final = b"PC_DSK01"
_FIELDS: Final = struct.Struct("<8s13Q")
_AT_WORK: Final = 1
_WRITING: Final = 1
_MOST_NAMED: Final = 16
_CHUNK: Final = 256  # blocks


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """What vCPU 0 has noted about the drive; see ``workloads/README.md``."""

    phase: int
    block: int
    counter: int
    buffer: int
    writes: int
    reads: int
    flushes: int
    wrong: int
    errors: int
    state: int
    capacity: int
    available: int
    used: int


@dataclass(frozen=True, slots=True)
class DiskVerification:
    """What the oracle found.

    :ivar bad_blocks: the first 16 of ``bad_block_count`` blocks that are not as they were last written.
    :ivar bad_buffers: buffers in memory that are not what was last written from, or read into, them.
    :ivar lost_writes: by how many the counters of the blocks differ from the writes that were done.
    :ivar wrong_reads: how often the guest itself has read something else than it had written.
    :ivar failed_requests: requests that the drive has failed.
    :ivar answered_again: by how many the used ring tells of more requests than the guest has made.
    """

    blocks_checked: int
    bad_block_count: int
    bad_blocks: tuple[int, ...]
    bad_buffers: tuple[int, ...]
    lost_writes: int
    wrong_reads: int
    failed_requests: int
    answered_again: int
    writes: int

    @property
    def ok(self) -> bool:
        """Whether all is exactly as the guest left it."""
        wrong = self.bad_block_count, self.bad_buffers, self.lost_writes, self.wrong_reads
        return not any((*wrong, self.failed_requests, self.answered_again))


def read_disk_record(read: Read, workload: Workload) -> DiskRecord:
    """The record of the drive.

    :raises GuestError: the guest has not come to its drive yet, or has found none.
    """
    magic, *fields = _FIELDS.unpack(read(workload.device_area + _RECORD, _FIELDS.size))
    record = DiskRecord(*fields)
    if magic != _MAGIC or not record.state:
        raise GuestError("the guest has not begun to use its drive; wait for its record")
    if record.state != _AT_WORK:
        raise GuestError(f"the guest has found no drive that it can use ({record.state})")
    return record


def verify_disk(read: Read, workload: Workload, disk: Read) -> DiskVerification:
    """Compare the drive, and the buffers in memory, with what they must be.

    :param read: reads guest memory; ``disk``: reads the drive, at an offset in bytes.
    :raises GuestError: the guest has not written every block yet.
    """
    record = read_disk_record(read, workload)
    seed = np.uint64(workload.seed)
    counters = _words(read, workload.device_area + _COUNTERS, workload.disk_blocks)
    if not counters.all():
        raise GuestError(
            "the guest has not written every block of its drive yet; wait for its record"
        )
    bad = [
        number
        for number in _bad_blocks(disk, counters, seed)
        if not _is_in_flight(record, number, disk, seed)
    ]
    ahead = int(counters.sum()) - record.writes
    if record.phase == _WRITING and ahead == 1:
        ahead = 0  # stopped between the two
    return DiskVerification(
        blocks_checked=len(counters),
        bad_block_count=len(bad),
        bad_blocks=tuple(bad[:_MOST_NAMED]),
        bad_buffers=tuple(_bad_buffers(read, workload, record, seed)),
        lost_writes=ahead,
        wrong_reads=record.wrong,
        failed_requests=record.errors,
        answered_again=_answered_again(read, workload),
        writes=record.writes,
    )


def _bad_blocks(disk: Read, counters: Words, seed: np.uint64) -> list[int]:
    bad: list[int] = []
    for first in range(0, len(counters), _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, len(counters)), dtype=np.uint64)
        raw = disk(first * BLOCK_BYTES, len(numbers) * BLOCK_BYTES)
        expected = _expected(numbers, counters[first : first + len(numbers)], seed)
        wrong = (np.frombuffer(raw, "<u8").reshape(expected.shape) != expected).any(axis=1)
        bad += [int(number) for number in numbers[wrong]]
    return bad


def _is_in_flight(record: DiskRecord, number: int, disk: Read, seed: np.uint64) -> bool:
    """Whether a block is being written, and holds what it had before or is to have."""
    if record.phase != _WRITING or record.block != number:
        return False
    found = disk(number * BLOCK_BYTES, BLOCK_BYTES)
    numbers = np.array([number, number], np.uint64)
    either = _expected(numbers, np.array([record.counter - 1, record.counter], np.uint64), seed)
    return any(found == each.tobytes() for each in either)


def _bad_buffers(read: Read, workload: Workload, record: DiskRecord, seed: np.uint64) -> list[int]:
    held = _words(read, workload.device_area + _BUFFERED, 2 * workload.disk_buffers).reshape(-1, 2)
    expected = _expected(held[:, 0], held[:, 1], seed)
    expected[held[:, 1] == 0] = 0  # never used
    address = workload.device_area + _BUFFERS
    found = _words(read, address, workload.disk_buffers * BLOCK_BYTES // 8)
    wrong = np.flatnonzero((found.reshape(expected.shape) != expected).any(axis=1)).tolist()
    return [number for number in wrong if not record.phase or number != record.buffer]


def _expected(numbers: Words, counters: Words, seed: np.uint64) -> Words:
    """The words of blocks with these counters, shape ``(blocks, 512)``."""
    bases = mix(mix(numbers + seed) + counters)
    words: Words = bases[:, np.newaxis] ^ mix(np.arange(0, BLOCK_BYTES, 8, dtype=np.uint64))
    return words


def _answered_again(read: Read, workload: Workload) -> int:
    """Each request that was made is answered at most once: used is never ahead of available."""
    available, used = (
        int.from_bytes(read(workload.device_area + at, 2), "little") for at in _INDICES
    )
    ahead = (used - available) % _INDEX
    return ahead if ahead < _INDEX // 2 else 0


def _words(read: Read, address: int, count: int) -> Words:
    return np.frombuffer(read(address, 8 * count), "<u8")
