"""Memory under a userfaultfd, and threads that touch it: for the tests of kernel/."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fakes.uffd_events import read_events
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import HostCannot
from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import NO_FEATURES, Userfaultfd

PAGE = 4096
PATIENCE_S = 10.0


def open_or_skip(features: Feature = NO_FEATURES) -> Userfaultfd:
    try:
        return Userfaultfd.open(features)
    except HostCannot as error:
        pytest.skip(f"needs userfaultfd: {error}")


def memory_of(kind: str, pages: int) -> Mapping:
    """``anonymous`` or ``memfd`` memory that nobody has touched."""
    if kind == "anonymous":
        return Mapping.anonymous(pages * PAGE)
    fd = memfd.create("test", pages * PAGE)
    try:
        return Mapping.shared(fd, pages * PAGE)
    finally:
        os.close(fd)


class Toucher:
    """A thread that touches watched memory and keeps what it got."""

    def __init__(self, touch: Callable[[], Any]) -> None:
        self.result: Any = None
        self._touch = touch
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._touch()

    @property
    def thread_id(self) -> int | None:
        return self._thread.native_id

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def done(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the thread still waits for its page"
        return self.result


class Watched:
    """A mapping, the userfaultfd that watches all of it, and a filled page to place."""

    def __init__(self, kind: str, pages: int, features: Feature, mode: RegisterMode) -> None:
        self.watcher = open_or_skip(features)
        self.memory = memory_of(kind, pages)
        self.ioctls = self.watcher.register(self.memory.address, self.memory.length, mode)
        self.content = Mapping.anonymous(pages * PAGE)
        for page in range(pages):
            self.content.write(page * PAGE, bytes([page + 1]) * PAGE)
        self.touchers: list[Toucher] = []

    def at(self, page: int) -> int:
        return self.memory.address + page * PAGE

    def source(self, page: int) -> int:
        return self.content.address + page * PAGE

    def read_in_thread(self, page: int, length_bytes: int = 4) -> Toucher:
        return self.touch(lambda: self.memory.read(page * PAGE, length_bytes))

    def write_in_thread(self, page: int, data: bytes) -> Toucher:
        return self.touch(lambda: self.memory.write(page * PAGE, data))

    def touch(self, touch: Callable[[], Any]) -> Toucher:
        self.touchers.append(Toucher(touch))
        return self.touchers[-1]

    def event(self) -> Any:
        """The next event, waited for; there must be just one."""
        readable, _, _ = select.select([self.watcher], [], [], PATIENCE_S)
        assert readable, "no event came"
        events = read_events(self.watcher)
        assert len(events) == 1
        return events[0]

    def close(self) -> None:
        self.watcher.close()  # lets go of whoever still waits
        for toucher in self.touchers:
            toucher.done()
        self.memory.close()
        self.content.close()


@contextmanager
def watched(
    kind: str = "memfd",
    *,
    pages: int = 8,
    features: Feature = NO_FEATURES,
    mode: RegisterMode = RegisterMode.MISSING,
) -> Iterator[Watched]:
    made = Watched(kind, pages, features, mode)
    try:
        yield made
    finally:
        made.close()


def in_child(act: Callable[[], None], timeout_s: float = 20.0) -> int:
    """Run ``act`` in a forked child and return its exit code, or minus the signal it died of."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    descriptor = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([descriptor], [], [], timeout_s)
        if not ended:
            os.kill(pid, 9)
        _, status = os.waitpid(pid, 0)
        assert ended, "the child hung"
        return os.waitstatus_to_exitcode(status)
    finally:
        os.close(descriptor)
