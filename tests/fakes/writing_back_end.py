"""A back end that writes to a guest's memory all the time while the guest runs, and logs what it writes.

It fills pages of an area that the guest leaves alone, in a random order.  A ledger, which outlives it, has
what it has written where.  The page that it was at when it was killed is written anew by its successor, as
a front end has a request done again that was in flight.
"""

import contextlib
import mmap
import os
import queue
import random
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from fakes.back_end import ANSWER_S, BackEnd, _Process
from fakes.stopping import stop_process
from fakes.waiting import wait_until
from postcopy.errors import GuestError
from postcopy.events import Event
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.machine.workload import PAGE_BYTES
from postcopy.vhost_user.dirty_log import DirtyLog

_DOING, _SEQUENCE, _FIRST = 0, 1, 2  # words of the ledger
_PAUSE_S = 0.0002  # a guest, and others on this host, need a CPU too


def contents(page: int, sequence: int) -> bytes:
    """What is written to a page of the area: each word tells which page, and when."""
    return struct.pack("<Q", sequence << 24 | page) * (PAGE_BYTES // 8)


class Area:
    """The pages that a back end, or one after another, writes to.

    :param first: page of 4 KiB, counted through all RAM.
    """

    def __init__(self, regions: Sequence[Region], first: int, count: int) -> None:
        self.regions = regions
        self.first, self.count = first, count
        self.fd = memfd.create("ledger", (_FIRST + count) * 8)
        self._map = mmap.mmap(self.fd, 0)
        self._words = np.frombuffer(self._map, np.uint64)

    @property
    def written(self) -> int:
        """How many pages have been written so far."""
        return int(self._words[_SEQUENCE])

    def wait_for_writes(self, count: int = 200) -> None:
        """Until so many more have been."""
        until = self.written + count
        wait_until(lambda: self.written >= until, ANSWER_S, "it writes")

    def wrong(self, memory: np.ndarray) -> list[int]:
        """Which pages of it are not as they have been written last.

        :param memory: all RAM, page by page.
        """
        assert not self._words[_DOING], "a page was never finished"
        return [
            page
            for page in range(self.count)
            if memory[self.first + page].tobytes() != self._expected(page)
        ]

    def _expected(self, page: int) -> bytes:
        sequence = int(self._words[_FIRST + page])
        return contents(page, sequence) if sequence else bytes(PAGE_BYTES)

    def places(self) -> list[tuple[int, int, int]]:
        """Of each page: number of its block, offset there, and guest-physical address."""
        found = []
        for block, region in enumerate(self.regions):
            for part in region.physical_ranges:
                found += [
                    (block, part.offset + at, part.address + at)
                    for at in range(0, part.length_bytes, PAGE_BYTES)
                ]
        return found[self.first : self.first + self.count]

    def close(self) -> None:
        self._words = np.zeros(0, np.uint64)
        self._map.close()
        os.close(self.fd)


class WritingBackEnd(BackEnd):
    """The front end of one; its rings are served while the guest runs and it is not held.

    :param area: what it writes to.
    """

    program = "fakes.writing_back_end"
    logs_writes = True

    def __init__(self, area: Area) -> None:
        super().__init__(area.regions, random.getrandbits(31))
        self.answer_s = ANSWER_S
        """How long an answer is waited for."""
        self._state = threading.Lock()
        self._held = self._serves = False
        self.runs = False
        """Whether the guest does."""
        self.logs = 0
        """How often it has been given another log."""
        self.is_asked = False
        """It is just being given one."""
        sizes = [region.size_bytes for region in area.regions]
        fds = [*(region.fd for region in area.regions), area.fd]
        self._ask({"do": "map", "sizes": sizes, "places": area.places()}, fds)

    def on_event(self, event: Event) -> None:
        """Subscribe this to the events of its machine."""
        if event.name in {"STOP", "RESUME"}:
            self.guest_runs(runs=event.name == "RESUME")

    def guest_runs(self, *, runs: bool) -> None:
        """The guest runs from now on, or has just been stopped."""
        with self._state:
            self.runs = runs
        self._serve()

    def hold(self) -> None:
        with self._state:
            self._held = True

    def release(self) -> None:
        with self._state:
            self._held = False
        self._serve()

    def _serve(self) -> None:
        with self._state:
            serves = self.runs and not (self._held and not self._serves)
            if serves == self._serves:
                return
            self._serves = serves
        self._ask({"do": "start" if serves else "stop"})

    def log_writes(self, log: int | None, size_bytes: int = 0) -> None:
        self.logs += 1
        self.is_asked = True
        self._ask({"do": "log", "size": size_bytes}, [] if log is None else [log])
        self.is_asked = False

    def scribble(self) -> None:
        """Set every bit of each log, again and again."""
        self._ask({"do": "scribble"})

    def freeze(self) -> None:
        """Hang, and answer nothing."""
        stop_process(self.process_id)

    def thaw(self) -> None:
        os.kill(self.process_id, signal.SIGCONT)

    def _ask(self, order: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            self._order(order, fds).result(self.answer_s)
        except (OSError, queue.Empty) as error:
            raise GuestError(f"{self.name} does not answer: {error!r}") from error


class _Writer(_Process):
    """The process: one thread writes, and takes orders between two pages."""

    def __init__(self, control: socket.socket, seed: int) -> None:
        super().__init__(control, seed)
        self._random = random.Random(seed)
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._log: DirtyLog | None = None
        self._scribbling = memoryview(b"")
        self._places: list[Any] = []
        self._writes = self._scribbles = False
        threading.Thread(target=self._work, daemon=True).start()

    def _take(self, number: int, do: str, order: dict[str, Any], fds: Sequence[int]) -> None:
        if do in {"map", "log", "start", "stop", "scribble"}:
            self._orders.put((number, do, order, fds))
        else:
            super()._take(number, do, order, fds)

    def _work(self) -> None:
        while True:
            try:
                pause_s = _PAUSE_S if self._writes else None
                number, do, order, fds = self._orders.get(timeout=pause_s)
            except queue.Empty:
                self._write_one(self._random.randrange(len(self._places)))
            else:
                getattr(self, f"_do_{do}")(*fds, **order)
                self._say(number, None)

    def _do_map(self, *fds: int, sizes: Sequence[int], places: list[Any]) -> None:
        *blocks, ledger = fds
        self._memory = [Mapping.shared(fd, size) for fd, size in zip(blocks, sizes, strict=True)]
        self._places = places
        self._ledger = np.frombuffer(mmap.mmap(ledger, 0), np.uint64)

    def _do_log(self, *fds: int, size: int) -> None:
        if self._log is not None:
            self._log.close()
        self._log = DirtyLog(size, 0, fds[0]) if fds else None
        self._scribbling = memoryview(mmap.mmap(fds[0], size) if fds else b"")
        for fd in fds:
            if self._scribbles:
                with contextlib.suppress(OSError):  # what comes of a log that cannot be read
                    os.ftruncate(fd, 0)
            os.close(fd)

    def _do_start(self) -> None:
        self._writes = True
        if self._ledger[_DOING]:  # its predecessor was killed
            self._write_one(int(self._ledger[_DOING]) - 1)

    def _do_stop(self) -> None:
        self._writes = False

    def _do_scribble(self) -> None:
        self._scribbles = True

    def _write_one(self, page: int) -> None:
        block, offset, address = self._places[page]
        sequence = int(self._ledger[_SEQUENCE]) + 1
        self._ledger[_DOING] = page + 1
        self._memory[block].write(offset, contents(page, sequence))
        if self._log is not None:
            self._log.mark(address, PAGE_BYTES)
        if self._scribbles and sequence % 64 == 0 and self._log is not None:
            self._scribbling[:] = b"\xff" * len(self._scribbling)
        self._ledger[_FIRST + page] = sequence
        self._ledger[_SEQUENCE] = sequence
        self._ledger[_DOING] = 0


if __name__ == "__main__":
    _Writer(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()
