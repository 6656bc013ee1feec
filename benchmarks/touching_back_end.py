"""A back end that touches pages of guest memory when it is told to, and notes how long each took.

``python -m benchmarks.touching_back_end``: a vhost-user disk, as ``postcopy vhost-user-blk`` is.  At each
``SIGUSR1`` the process that serves the front end touches pages in random order for some time, and writes a
:class:`Burst`.  :mod:`benchmarks.back_ends` uses it.
"""

import argparse
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.clock import rdtsc
from benchmarks.demand_faults import loaded
from postcopy.vhost_user import serve
from postcopy.vhost_user.device import BlockDevice
from postcopy.virtio.disk import Disk

_PAGE: Final = 4096
_AT_ONCE: Final = 32
"""Pages that are touched before the clock is looked at."""

Nanoseconds = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Burst:
    """What was touched at one signal.

    :ivar began: host TSC, as ``ended``.
    :ivar took: nanoseconds of each access, in order.
    """

    began: int
    ended: int
    took: Nanoseconds

    def write(self, path: Path) -> None:
        """Write it; the file is whole when it has its name."""
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            np.save(file, np.concatenate(([self.began, self.ended], self.took)).astype(np.uint64))
        unfinished.rename(path)

    @classmethod
    def read(cls, path: Path) -> "Burst":
        """What :meth:`write` has written."""
        words = np.load(path)
        return cls(int(words[0]), int(words[1]), words[2:])


@dataclass(frozen=True)
class Area:
    """The pages to touch, by guest address; of a guest whose memory ends below 3 GiB."""

    address: int
    pages: int


class TouchingDisk(BlockDevice):
    """The disk; see the module.

    :param results: a folder; the bursts are ``0.npy``, ``1.npy`` and so on.
    :param seconds: how long a burst lasts.
    """

    def __init__(
        self, disk: Disk, library: ctypes.CDLL, area: Area, results: Path, seconds: float
    ) -> None:
        super().__init__(disk)
        self._library, self._area = library, area
        self._results, self._seconds = results, seconds
        self._order = np.random.default_rng(1).permutation(area.pages).astype(np.int64)
        self._next = 0
        self._bursts = 0

    def reload(self) -> bool:
        """Touch, in the process that has a front end; the one that listens has no guest memory."""
        memory = guest_memory()
        if memory is not None:
            self._touch(memory + self._area.address).write(self._results / f"{self._bursts}.npy")
            self._bursts += 1
        return False

    def _touch(self, address: int) -> Burst:
        took: list[Nanoseconds] = []
        began, until = rdtsc(), time.monotonic() + self._seconds
        while time.monotonic() < until and self._next < len(self._order):
            pages = self._order[self._next : self._next + _AT_ONCE]
            self._next += len(pages)
            took.append(np.zeros(len(pages), np.uint64))
            self._library.touch(address, pages.ctypes.data, len(pages), took[-1].ctypes.data)
        return Burst(began, rdtsc(), np.concatenate([np.zeros(0, np.uint64), *took]))


def guest_memory(maps: Path = Path("/proc/self/maps")) -> int | None:
    """Where this process has the beginning of guest memory mapped; None: it has none."""
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if fields[1].endswith("s") and int(fields[2], 16) == 0:
            begin, end = (int(word, 16) for word in fields[0].split("-"))
            if end - begin >= 1 << 20:  # the dirty log is smaller
                return begin
    return None


def main() -> None:
    """Serve until ``SIGTERM``."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("disk", "socket", "library", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("address", "pages"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    area = Area(given.address, given.pages)
    disk = Disk(given.disk, read_only=False, say=print, cure="give a file")
    library = loaded(given.library)
    serve(given.socket, TouchingDisk(disk, library, area, given.results, given.seconds), say=print)


if __name__ == "__main__":
    main()
