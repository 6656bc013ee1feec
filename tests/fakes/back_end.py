"""A process that has a guest's memory mapped, as a back end of its devices has, and checks what is in it.

Run as a program, this is the process; :class:`BackEnd` is its front end, in the guest's process.  Its
userfaultfd has no features, and its memory is registered for missing pages alone, as libvhost-user does it.
"""

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import GuestError, KernelError
from postcopy.guest import AddressSpace, MappedRange, Region
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import NO_FEATURES, Userfaultfd
from postcopy.machine.oracle import mix
from postcopy.machine.workload import PAGE_BYTES

ANSWER_S = 30.0


class BackEnd:
    """See :class:`postcopy.guest.SharingProcess`.  It writes nothing unasked, and has no log.

    :param memory: the guest's RAM blocks.
    :param seed: of the guest's workload; its pages are checked for what the guest has filled them with.
    :param features: what its userfaultfd is opened with.
    :param populate: it maps all memory at once, as a process does that locks its memory.
    """

    program = "fakes.back_end"
    logs_writes = False

    def __init__(
        self,
        memory: Sequence[Region],
        seed: int = 0,
        features: Feature = NO_FEATURES,
        *,
        populate: bool = False,
    ) -> None:
        self._regions = memory
        self._features = features
        self._populate = populate
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.program, str(theirs.fileno()), str(seed)],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
            )
        self.watched = 0
        """How often it has been watched, and not let go of."""
        self._orders = itertools.count()
        self._lock = threading.Lock()
        self._has_ended = False
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()

    @property
    def name(self) -> str:
        return f"back end (process {self._process.pid})"

    @property
    def process_id(self) -> int:
        return self._process.pid

    def watch_missing(self) -> AddressSpace:
        fds = [region.fd for region in self._regions]
        sizes = [(region.size_bytes, region.page_size_bytes) for region in self._regions]
        order = {"do": "watch", "sizes": sizes, "features": int(self._features)}
        addresses, watch = self._order(order | {"populate": self._populate}, fds).result()
        self.watched += 1
        ranges = [
            MappedRange(region.name, 0, region.size_bytes, address)
            for region, address in zip(self._regions, addresses, strict=True)
        ]
        return AddressSpace(self._process.pid, ranges, watch)

    def unwatch_missing(self) -> None:
        try:
            self._order({"do": "unwatch"}).result()
        except OSError as error:
            raise GuestError(f"{self.name} does not answer: {error}") from error
        finally:
            self.watched -= 1

    def log_writes(self, log: int | None, size_bytes: int = 0) -> None:
        raise GuestError(f"{self.name} has no log")

    def hold(self) -> None:
        pass

    def release(self) -> None:
        pass

    def check(self, pages: Sequence[int]) -> "Answer":
        """Begin to compare pages, in this order, with what the guest has filled them with.

        The answer is those that are different.

        :param pages: of 4 KiB, by the guest's own addresses.
        """
        return self._order({"do": "check", "pages": list(map(int, pages))})

    def read(self, pages: Sequence[int], block: int = 0) -> "Answer":
        """Begin to read pages; the answer is the first byte of each, or None: it could not be read."""
        return self._order({"do": "read", "pages": list(map(int, pages)), "block": block})

    def write(self, page: int, value: int, block: int = 0) -> None:
        """Fill a page with a byte."""
        self._order({"do": "write", "page": page, "value": value, "block": block}).result()

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._hearing.join()
        self._socket.close()

    def _order(self, order: dict[str, Any], fds: Sequence[int] = ()) -> "Answer":
        number = next(self._orders)
        with self._lock:
            if self._has_ended:
                raise ConnectionResetError("it has ended")
            self._answers[number] = answer = queue.SimpleQueue()
        socket.send_fds(self._socket, [json.dumps(order | {"number": number}).encode()], fds)
        return Answer(answer)

    def _hear(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # it has ended with an order unread
            while (heard := socket.recv_fds(self._socket, 1 << 20, 1))[0]:
                said, fds, _, _ = heard
                number, answer = json.loads(said)
                self._answers.pop(number).put((answer, *fds) if fds else answer)
        with self._lock:
            self._has_ended = True
            for left in self._answers.values():
                left.put(ConnectionResetError("it has ended"))


class Answer:
    """What a back end will say."""

    def __init__(self, answers: "queue.SimpleQueue[Any]") -> None:
        self._answers = answers

    def result(self, timeout_s: float = ANSWER_S) -> Any:
        """Wait for it; see the method that asked."""
        found = self._answers.get(timeout=timeout_s)
        if isinstance(found, OSError):
            raise found
        return found


class _Process:
    """The process itself.

    A thread reads pages, and waits for them without the interpreter lock.
    """

    def __init__(self, control: socket.socket, seed: int) -> None:
        self._control = control
        self._seed = np.uint64(seed)
        self._in_page = mix(np.arange(0, PAGE_BYTES, 8, dtype=np.uint64))
        self._memory: list[Mapping] = []
        self._sizes: list[int] = []
        self._userfaultfd: Userfaultfd | None = None

    def run(self) -> None:
        while True:
            said, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 8)
            if not said:
                return
            order = json.loads(said)
            self._take(order.pop("number"), order.pop("do"), order, fds)

    def _take(self, number: int, do: str, order: dict[str, Any], fds: Sequence[int]) -> None:
        if do == "watch":
            self._say(number, *self._watch(fds, **order))
        elif do == "unwatch":
            self._unwatch()
            self._say(number, None)
        else:
            arguments = (number, getattr(self, f"_{do}"), order)
            threading.Thread(target=self._touch, args=arguments, daemon=True).start()

    def _touch(self, number: int, touch: Any, order: dict[str, Any]) -> None:
        self._say(number, touch(**order))

    def _say(self, number: int, answer: Any, *fds: int) -> None:
        socket.send_fds(self._control, [json.dumps([number, answer]).encode()], fds)

    def _watch(
        self, fds: Sequence[int], sizes: Sequence[Any], features: int, *, populate: bool
    ) -> tuple[Any, int]:
        for mapping in self._memory:
            mapping.close()
        self._userfaultfd = watch = Userfaultfd.open(Feature(features))
        self._memory = [Mapping.shared(fd, size) for fd, (size, _) in zip(fds, sizes, strict=True)]
        self._sizes = [page_size for _, page_size in sizes]
        for mapping, fd in zip(self._memory, fds, strict=True):
            if populate:
                mapping.populate(0, mapping.length)
            watch.register(mapping.address, mapping.length, RegisterMode.MISSING)
            os.close(fd)
        return [mapping.address for mapping in self._memory], watch.fd

    def _unwatch(self) -> None:
        assert self._userfaultfd is not None
        for mapping in self._memory:
            self._userfaultfd.unregister(mapping.address, mapping.length)
        self._userfaultfd.close()

    def _check(self, pages: Sequence[int]) -> list[int]:
        return [page for page in pages if not self._is_right(page)]

    def _is_right(self, page: int) -> bool:
        offset = page * PAGE_BYTES
        for memory in self._memory:  # the blocks follow one another
            if offset < memory.length:
                break
            offset -= memory.length
        found = np.frombuffer(memory.read(offset, PAGE_BYTES), np.uint64)
        number = np.array([page * PAGE_BYTES], np.uint64)
        expected = mix(number + self._seed) ^ self._in_page
        return bool((found[1:] == expected[1:]).all())  # the first counts the guest's writes

    def _read(self, pages: Sequence[int], block: int) -> list[int | None]:
        return [self._first_byte(block, page) for page in pages]

    def _first_byte(self, block: int, page: int) -> int | None:
        try:
            return self._memory[block].read(page * self._sizes[block], 1)[0]
        except KernelError:
            return None

    def _write(self, page: int, value: int, block: int) -> None:
        size = self._sizes[block]
        self._memory[block].write(page * size, bytes([value]) * size)


if __name__ == "__main__":
    _Process(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()
