"""What a workload's vCPUs have noted about themselves, read from guest memory."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from postcopy.errors import GuestError
from postcopy.machine.workload import Workload

Read = Callable[[int, int], bytes]
"""Reads guest memory: address, bytes.  It may be a machine's, a QEMU's or a file's."""

RECORDS_ADDRESS: Final = 0x20000
RECORD_BYTES: Final = 0x2000
FILLING, RUNNING, DONE = 1, 2, 3

_MAGIC = b"PC_REC01"
_FIELDS = struct.Struct("<8s15Q")
_GAPS, _LATENCIES, _PARTS = 0x200, 0x1000, 8


@dataclass(frozen=True, slots=True)
class Record:
    """The record of one vCPU.  Times are in TSC cycles of the guest."""

    phase: int
    iterations: int
    writes: int
    begun: int
    target: int
    expected: int
    last_tsc: int
    start_tsc: int
    max_gap: int
    max_gap_tsc: int
    max_latency: int
    max_latency_tsc: int
    sum_latency: int
    passes: int
    control: int
    gaps: npt.NDArray[np.uint64]
    latencies: npt.NDArray[np.uint64]

    def largest_gap_ms(self, tsc_hz: float) -> float:
        """The longest time in which the guest did nothing."""
        return self.max_gap / tsc_hz * 1e3

    def latency_us(self, percent: float, tsc_hz: float) -> float:
        """The access latency that so many percent of the visits did not exceed.

        An upper bound: the end of the histogram's bucket, at most 12.5 % too high.  0 without data.
        """
        total = int(self.latencies.sum())
        if not total:
            return 0.0
        reached = np.cumsum(self.latencies, dtype=np.float64) >= total * percent / 100
        octave, part = divmod(int(np.argmax(reached)) + 1, _PARTS)
        return (1 << octave) * (1 + part / _PARTS) / tsc_hz * 1e6


def read_record(read: Read, vcpu: int) -> Record | None:
    """The record of a vCPU; None before it has begun."""
    raw = read(RECORDS_ADDRESS + vcpu * RECORD_BYTES, RECORD_BYTES)
    magic, *fields = _FIELDS.unpack_from(raw)
    if magic != _MAGIC:
        return None
    gaps = np.frombuffer(raw, "<u8", 64, _GAPS)
    latencies = np.frombuffer(raw, "<u8", 64 * _PARTS, _LATENCIES)
    return Record(*[*fields, gaps, latencies])


def read_records(read: Read, workload: Workload) -> list[Record]:
    """The records of all vCPUs.

    :raises GuestError: a vCPU has not begun, or is still filling its memory.
    """
    records = []
    for vcpu in range(workload.vcpus):
        record = read_record(read, vcpu)
        if record is None or record.phase == FILLING:
            raise GuestError(f"vCPU {vcpu} has not filled its memory yet; wait for its record")
        records.append(record)
    return records


def is_running(read: Read, workload: Workload) -> bool:
    """Whether every vCPU has filled its slice and gone to work."""
    found = (read_record(read, vcpu) for vcpu in range(workload.vcpus))
    return all(record is not None and record.phase != FILLING for record in found)
