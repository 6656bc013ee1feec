"""How fast ``postcopy inspect`` reads a plain stream: the goal is 1 GB/s for one of 2 GiB.

``python -m benchmarks.inspecting`` (``make bench-inspecting``): two streams are written to a temporary
folder, one with long runs of pages with data, one in which they alternate with zero pages at random. The
file is in the host's page cache. A time is that of the whole command, process start included: by the clock,
and the CPU time of all its threads, which another load of the host changes little.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from postcopy.stream.encoder import RamPart, end_of_stream, ram_setup, stream_start
from postcopy.stream.numbers import SectionType
from postcopy.stream.ram_encoder import PageEncoder
from postcopy.stream.records import BlockEntry, Configuration, RamSetup

GOAL_BYTES_PER_S: Final = 1e9
_PAGE: Final = 4096
_BATCH: Final = 1024
_RAM_ID: Final = 2


def records(pages: int, zero_share: float) -> Iterator[bytes]:
    """Encode the pages of one block."""
    random = np.random.default_rng(1)
    encoder = PageEncoder(_BATCH)
    data = random.integers(0, 256, (_BATCH, _PAGE), dtype=np.uint8)
    for start in range(0, pages, _BATCH):
        offsets = np.arange(start, start + _BATCH, dtype=np.uint64) * np.uint64(_PAGE)
        zero = random.random(_BATCH) < zero_share
        bounds = np.flatnonzero(np.diff(zero)) + 1
        for run in np.split(np.arange(_BATCH), bounds):
            if zero[run[0]]:
                yield encoder.zeros("ram", offsets[run])
            else:
                yield bytes(encoder.nonzero_copies("ram", offsets[run], data[run])[0])


def write_stream(path: Path, size_bytes: int, zero_share: float) -> None:
    """Write a stream of one block of RAM, as a QEMU of ``-M none`` does but for its devices."""
    setup = RamSetup(_RAM_ID, (BlockEntry("ram", size_bytes),))
    ram = RamPart(_RAM_ID, SectionType.END)
    with path.open("wb") as file:
        file.write(stream_start(Configuration("none")) + ram_setup(setup, postcopy=False))
        file.write(ram.head)
        file.writelines(records(size_bytes // _PAGE, zero_share))
        file.write(ram.tail + end_of_stream())


def seconds(*command: str) -> tuple[float, float]:
    """Run a command of ours; return how long it took, and its CPU time."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "postcopy", *command], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspecting", description=__doc__)
    parser.add_argument("--mib", type=int, default=2048, help="of RAM")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, zero_share in (("solid", 0.0), ("mixed", 0.4)):
            path = Path(folder) / name
            write_stream(path, options.mib << 20, zero_share)
            size = path.stat().st_size
            for extra in ((), ("--records",)):
                taken = [seconds("inspect", str(path), *extra) for _ in range(options.rounds)]
                rate, of_cpu = (size / statistics.median(each) for each in zip(*taken, strict=True))
                shown = " ".join(("inspect", *extra))
                met = "" if extra else f", the goal is {GOAL_BYTES_PER_S / 1e9:g}"
                rates = f"{rate / 1e9:.2f} GB/s, {of_cpu / 1e9:.2f} GB for each second of CPU time"
                print(f"{name}, {size / 1e9:.2f} GB: {shown}: {rates}{met}")
            path.unlink()


if __name__ == "__main__":
    main()
