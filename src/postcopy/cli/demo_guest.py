"""The guest of a demonstration: its own measurements of a migration, and a check of its memory.

All of it is read over QMP.
"""

import asyncio
import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from postcopy.client import Machine
from postcopy.machine.config import LOAD_ADDRESS
from postcopy.machine.oracle import Verification, verify
from postcopy.machine.workload import BASE_ADDRESS, PAGE_BYTES, Workload
from postcopy.machine.workload_records import (
    RECORD_BYTES,
    RECORDS_ADDRESS,
    Read,
    Record,
    is_running,
    read_records,
)

_POLL_S: Final = 0.1
_CALIBRATION_S: Final = 0.5


class DemoGuest:
    """The guest of a demonstration, at either machine."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._tsc_hz = 0.0
        self._before: list[Record] = []

    async def wait_until_running(self, machine: Machine) -> None:
        """Wait until all vCPUs have filled their memory and run the workload."""
        while not is_running(await self._read_low(machine), self.workload):
            await asyncio.sleep(_POLL_S)

    async def calibrate(self, machine: Machine) -> None:
        """Measure the rate of the guest's clock, and its stops so far."""
        first, began = await self._records(machine), time.monotonic()
        await asyncio.sleep(_CALIBRATION_S)
        self._before, ended = await self._records(machine), time.monotonic()
        cycles = max(b.last_tsc - a.last_tsc for a, b in zip(first, self._before, strict=True))
        self._tsc_hz = cycles / (ended - began)

    async def longest_stops_ms(self, machine: Machine) -> tuple[float, float]:
        """The longest time in which a vCPU did not run: before the migration, and until now."""
        after = await self._records(machine)
        return self._longest_ms(self._before), self._longest_ms(after)

    def _longest_ms(self, records: Sequence[Record]) -> float:
        return max(record.largest_gap_ms(self._tsc_hz) for record in records)

    async def _records(self, machine: Machine) -> list[Record]:
        return read_records(await self._read_low(machine), self.workload)

    async def _read_low(self, machine: Machine) -> Read:
        length = self.workload.vcpus * RECORD_BYTES
        data = await machine.read_memory(RECORDS_ADDRESS, length)

        def read(address: int, length_bytes: int) -> bytes:
            start = address - RECORDS_ADDRESS
            return data[start : start + length_bytes]

        return read

    async def check(self, machine: Machine, origin: Machine, folder: Path) -> "Check":
        """Compare all memory of the stopped ``machine`` with its expected contents.

        :param origin: the source; pages that the guest never writes must be the same there.
        :param folder: has room for the memory.
        """
        size = self.workload.memory_bytes
        await machine.save_memory(folder / "memory", 0, size)
        await origin.save_memory(folder / "origin", 0, BASE_ADDRESS)
        with _mapped(folder / "memory") as memory, _mapped(folder / "origin") as before:
            found = await asyncio.to_thread(verify, _reader(memory), self.workload)
            fixed = list(self._fixed_pages())
            differing = [
                address
                for address in fixed
                if memory[address : address + PAGE_BYTES] != before[address : address + PAGE_BYTES]
            ]
        # The records have been read, and agree with the memory.
        records = self.workload.vcpus * RECORD_BYTES // PAGE_BYTES
        return Check(found, len(fixed) + records, differing)

    def _fixed_pages(self) -> Iterator[int]:
        """Pages below the workload's slices that are not written while it runs."""
        records = range(RECORDS_ADDRESS, RECORDS_ADDRESS + self.workload.vcpus * RECORD_BYTES)
        image = range(LOAD_ADDRESS, LOAD_ADDRESS + len(self.workload.image()))
        for address in range(0, BASE_ADDRESS, PAGE_BYTES):
            if address not in records and address not in image:
                yield address


class Check:
    """The result of the check of a guest's memory."""

    def __init__(self, oracle: Verification, other_pages: int, differing: list[int]) -> None:
        self._oracle = oracle
        self.pages = oracle.pages_checked + other_pages
        self._differing = differing

    @property
    def ok(self) -> bool:
        """Whether every page has its expected contents."""
        return self._oracle.ok and not self._differing

    def fault(self) -> str:
        """Describe the bad pages."""
        bad = [*self._oracle.bad_pages, *self._differing][:4]
        where = ", ".join(f"{address:#x}" for address in bad)
        count = self._oracle.bad_page_count + len(self._differing)
        lost = self._oracle.lost_writes
        return f"{count} bad pages ({where or 'none'}), {lost} lost writes of {self.pages} pages"


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory:
        yield memory


def _reader(memory: mmap.mmap) -> Read:
    def read(address: int, length_bytes: int) -> bytes:
        return memory[address : address + length_bytes]

    return read
