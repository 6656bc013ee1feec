"""Drives for tests: files of zeros, the workload that uses one, and the check of every byte."""

import os
from pathlib import Path
from typing import Any

from postcopy.machine import disk_oracle
from postcopy.machine.workload import Workload, load
from postcopy.machine.workload_records import Read

DISK_BYTES = 2 << 20
MEMORY_BYTES = 32 << 20


def make_disk(path: Path, size_bytes: int = DISK_BYTES) -> str:
    """A file of zeros; return its path as ``MachineConfig`` and ``--drive`` want it."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return str(path)


def disk_workload(
    accelerator: str = "kvm", vcpus: int = 1, *, memory_bytes: int = MEMORY_BYTES, **more: Any
) -> Workload:
    """Uses every block of a drive of :func:`make_disk`."""
    fill = 4 << 20 if accelerator == "kvm" else 512 << 10
    options = {"fill_bytes": fill, "disk_bytes": DISK_BYTES} | more
    return load("disk", memory_bytes, vcpus, **options)


def writes_and_reads(read: Read, workload: Workload) -> tuple[int, int]:
    """How many requests the guest has done."""
    record = disk_oracle.read_disk_record(read, workload)
    return record.writes, record.reads


def check_disk(read: Read, workload: Workload, path: str | Path) -> disk_oracle.DiskVerification:
    """Of a guest that stands still: every byte of the drive, and every buffer."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = disk_oracle.verify_disk(read, workload, lambda at, size: os.pread(fd, size, at))
    finally:
        os.close(fd)
    assert found.ok, found
    assert found.blocks_checked == Path(path).stat().st_size // 4096
    return found
