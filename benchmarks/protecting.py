"""What it takes the kernel to write-protect a guest's memory: the part of a stop that must grow with it."""

import os
import statistics
import time
from contextlib import closing
from typing import Final

from benchmarks.workload import HOT_SET_AT, MIB, Workload
from postcopy.abi.userfaultfd import RegisterMode
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import SNAPSHOT_FEATURES, Userfaultfd

_ROUNDS: Final = 5


def protect_ms(memory_mib: int, workload: Workload) -> float:
    """Median milliseconds of the ioctl, with as much data as the guest has and nobody running."""
    fd = memfd.create("ram", memory_mib * MIB)
    try:
        with Mapping.shared(fd, memory_mib * MIB) as memory:
            end = HOT_SET_AT + workload.hot_bytes + workload.fill_bytes
            memory.view()[HOT_SET_AT:end:4096] = 1
            with closing(Userfaultfd.open(SNAPSHOT_FEATURES)) as watch:
                watch.register(memory.address, memory.length, RegisterMode.WP)
                return statistics.median(_once_ms(watch, memory) for _ in range(_ROUNDS))
    finally:
        os.close(fd)


def _once_ms(watch: Userfaultfd, memory: Mapping) -> float:
    started = time.perf_counter()
    watch.write_protect(memory.address, memory.length, protect=True)
    took_s = time.perf_counter() - started
    watch.write_protect(memory.address, memory.length, protect=False)
    return took_s * 1e3
