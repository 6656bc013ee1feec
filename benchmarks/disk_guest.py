"""The workload ``disk`` as a guest to measure: the longest stop that it notes, and the check of it all."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.engines import Engine, Postcopy, Setup
from benchmarks.workload import MIB, Workload
from postcopy.machine import disk_oracle, oracle, workload
from postcopy.machine.workload_records import RECORDS_ADDRESS, is_running, read_record

DISK_BYTES: Final = 4 * MIB
_VISIT_S: Final = 400e-6
_HOT_BYTES: Final = 2 * MIB
_CONTROL: Final = 0x78
_FORGET: Final = 1
_LOOK_S: Final = 0.02


@dataclass(frozen=True)
class DriveSetup(Setup):
    """A run whose machines have a drive.

    :param drives: options of the command line for it: the source's and the destination's.
    """

    drives: tuple[Sequence[str], Sequence[str]] = field(kw_only=True)


class WithDrive(Postcopy):
    """Our machine with a drive; its setup is a :class:`DriveSetup`."""

    @classmethod
    def command(cls, setup: Setup, qmp_path: Path, *, incoming: bool) -> list[str]:
        """See :class:`~benchmarks.engines.Engine`."""
        assert isinstance(setup, DriveSetup)
        return [*super().command(setup, qmp_path, incoming=incoming), *setup.drives[incoming]]


@dataclass(frozen=True)
class DiskWork(Workload):
    """The workload ``disk`` in a guest of one vCPU.

    A visit every 400 µs at most, each with a write and a read of the drive, of 2 MiB: a guest that dirties
    little, so that its memory takes the same time at each switch, and that often has a request under way.

    :param memory_bytes: of the machine; nearly all of it is filled.
    """

    memory_bytes: int = 0

    @classmethod
    def of_size(cls, memory_mib: int) -> "DiskWork":
        """All of so much memory."""
        return cls(memory_mib * MIB, 0, random=True, memory_bytes=memory_mib * MIB)

    def made(self, tsc_hz: float) -> workload.Workload:
        """The workload with its parameters."""
        delay = int(_VISIT_S * tsc_hz)
        size = self.memory_bytes
        return workload.load(
            "disk", size, hot_bytes=_HOT_BYTES, disk_bytes=DISK_BYTES, delay_cycles=delay
        )

    def image(self, tsc_hz: float) -> bytes:
        """See :class:`Workload`."""
        return self.made(tsc_hz).image()


class DiskGuest:
    """Such a guest in one machine."""

    def __init__(self, engine: Engine, setup: Setup) -> None:
        assert isinstance(setup.workload, DiskWork)
        self._memory, self._hz = engine.memory, setup.clock.hz
        self._work = setup.workload.made(self._hz)

    def wait_running(self, timeout_s: float) -> None:
        """Wait until it uses its drive.

        :raises TimeoutError: it does not.
        """
        end = time.monotonic() + timeout_s
        while not is_running(self._memory.read, self._work):
            if time.monotonic() > end:
                raise TimeoutError("the guest did not begin its work")
            time.sleep(_LOOK_S)

    def forget(self, timeout_s: float = 10) -> None:
        """Have it note its longest stop from now on."""
        control = RECORDS_ADDRESS + _CONTROL
        self._memory.write(control, _FORGET.to_bytes(8, "little"))
        end = time.monotonic() + timeout_s
        while any(self._memory.read(control, 8)):
            if time.monotonic() > end:
                raise TimeoutError("the guest does not run")
            time.sleep(_LOOK_S / 10)

    def longest_stop_ms(self) -> float:
        """The longest time from the end of a visit to the end of the next."""
        record = read_record(self._memory.read, 0)
        assert record is not None
        return record.largest_gap_ms(self._hz)

    def verify(self, disk: Path) -> dict[str, Any]:
        """Compare every word of memory and of the drive; the guest stands still."""
        memory = oracle.verify(self._memory.read, self._work)
        fd = os.open(disk, os.O_RDONLY)
        try:
            drive = disk_oracle.verify_disk(
                self._memory.read, self._work, lambda at, size: os.pread(fd, size, at)
            )
        finally:
            os.close(fd)
        found = {"memory": str(memory), "drive": str(drive)}
        return {"ok": memory.ok and drive.ok} | found
