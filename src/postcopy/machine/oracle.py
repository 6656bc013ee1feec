"""Whether a workload's memory is what its guest has made of it: every page, every word.

Only for a guest that stands still.  The rules are those of ``workloads/README.md``.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.machine.config import LOAD_ADDRESS
from postcopy.machine.workload import PAGE_BYTES, Workload
from postcopy.machine.workload_records import Read, Record, read_records

_CHUNK_BYTES: Final = 1 << 20
_WORDS: Final = PAGE_BYTES // 8
_MOST_NAMED: Final = 16

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Verification:
    """What the oracle found.

    ``bad_pages`` are the addresses of the first 16 of ``bad_page_count`` pages that hold what the
    guest never wrote there.  ``lost_writes`` is, over all vCPUs, by how many writes the counters
    differ from what the guest knows to have written: pages that are older than they should be (or
    newer than the record).
    """

    pages_checked: int
    bad_page_count: int
    bad_pages: tuple[int, ...]
    lost_writes: int
    writes: int

    @property
    def ok(self) -> bool:
        """Whether every page is exactly as the guest left it."""
        return not self.bad_page_count and not self.lost_writes


def verify(read: Read, workload: Workload) -> Verification:
    """Compare all memory that the workload defines with what it must be.

    :param read: reads guest memory, for instance ``Machine.read_memory``.
    :raises GuestError: the guest is not that far: its memory is still being filled.
    """
    records = read_records(read, workload)
    bad = _check_image(read, workload)
    lost = 0
    for vcpu, record in enumerate(records):
        slice_ = _Slice(read, workload, vcpu)
        bad += slice_.bad_pages()
        lost += abs(slice_.lost_writes(record))
    image_pages = -(-len(workload.image()) // PAGE_BYTES)
    return Verification(
        pages_checked=image_pages + workload.pages,
        bad_page_count=len(bad),
        bad_pages=tuple(bad[:_MOST_NAMED]),
        lost_writes=lost,
        writes=sum(record.writes for record in records),
    )


def mix(words: Words) -> Words:
    """The finalizer of SplitMix64, which the guest uses too."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


class _Slice:
    """One vCPU's slice, read once; its counters are kept."""

    def __init__(self, read: Read, workload: Workload, vcpu: int) -> None:
        self._read = read
        self._seed = np.uint64(workload.seed)
        self._first = workload.slice_address(vcpu)
        self._size = workload.slice_bytes
        self._in_page = mix(np.arange(0, PAGE_BYTES, 8, dtype=np.uint64))
        self._counters = np.zeros(self._size // PAGE_BYTES, dtype=np.uint64)

    def bad_pages(self) -> list[int]:
        """Addresses of pages with a wrong word; the counters are not looked at, but noted."""
        bad: list[int] = []
        for offset in range(0, self._size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, self._size - offset)
            first = self._first + offset
            words = np.frombuffer(self._read(first, length), "<u8").reshape(-1, _WORDS)
            number = offset // PAGE_BYTES
            self._counters[number : number + len(words)] = words[:, 0]
            pages = np.arange(first, first + length, PAGE_BYTES, dtype=np.uint64)
            expected = mix(pages + self._seed)[:, np.newaxis] ^ self._in_page
            wrong = (words[:, 1:] != expected[:, 1:]).any(axis=1)
            bad += [int(page) for page in pages[wrong]]
        return bad

    def lost_writes(self, record: Record) -> int:
        """Writes that the vCPU has made and the pages do not show; negative if they show more."""
        written = record.writes
        counted = int(self._counters.sum())
        if record.begun == record.writes + 1:
            number = (record.target - self._first) // PAGE_BYTES
            if not 0 <= number < len(self._counters):
                return written - counted or 1
            ahead = int(self._counters[number]) - record.expected
            if ahead in {0, 1}:
                written += ahead
        return written - counted


def _check_image(read: Read, workload: Workload) -> list[int]:
    image = workload.image()
    found = read(LOAD_ADDRESS, len(image))
    return [
        LOAD_ADDRESS + offset
        for offset in range(0, len(image), PAGE_BYTES)
        if found[offset : offset + PAGE_BYTES] != image[offset : offset + PAGE_BYTES]
    ]
