"""The loop that every userfaultfd is read in: wait, read, hand on, stop.

It reads the userfaultfd of the guest's process, and those of other processes that have the guest's memory
mapped; these tell of faults alone (:mod:`postcopy.link.guest.sharing`).

The pagers of a postcopy and of a restore and the write-fault handler of a snapshot run it, each on a
thread of the engine's process: a process that can fault on guest memory must not serve the faults.

The kernel tells of faults, and, through a userfaultfd that was opened for them, of changes of the address
space: the guest's process has removed pages, has unmapped or moved a range, or has forked.  What the
kernel does then (measured on Linux 6.18):

* The process waits until the event has been read, and goes on at once: before anything is done about it.
* From the system call to that moment nothing can be placed (``EAGAIN``).
* One ``read`` gives faults before the events that are older than they.  So the events of a batch are
  handled first.  A fault that is really older than the removal of its page may get zeros, too.

From the first of these follows that nothing may be placed between the reading of an event and its handling:
the memory may have been removed already, and what came for it before would stay in it.  The locks under
which pages are claimed and completed are held meanwhile.
"""

import os
import select
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Final, Protocol

from postcopy.abi.userfaultfd import EventCode
from postcopy.kernel import calls
from postcopy.kernel.threads import run_soon
from postcopy.kernel.userfaultfd import MESSAGE, Userfaultfd
from postcopy.paging.shared_space import SharedSpace, SharedSpaces

Fault = tuple[int, int, int, int]
"""A message of a fault, as the kernel writes it: the event, ``PagefaultFlag``, the address, and in the
low half of the last word the thread."""

LOW_WORD: Final = 0xFFFFFFFF
_MOST_MESSAGES: Final = 64
_PAGEFAULT: Final = int(EventCode.PAGEFAULT)


class FaultHandler(Protocol):
    """Serves faults, and is told of changes of the watched address space."""

    def serve(
        self, faults: Sequence[Fault], since_ns: int, space: SharedSpace | None = None
    ) -> None:
        """Serve all that one look has found.

        :param since_ns: no thread has waited for longer than since this moment (monotonic clock).
        :param space: of which other process; None: of the guest's.
        """

    def removed(self, start: int, end: int) -> None:
        """What was at these addresses has been removed or unmapped: nothing is to be placed there.

        If it is touched again, it reads as zeros.
        """

    def moved(self, source: int, destination: int, length_bytes: int) -> None:
        """What was at ``source`` is at ``destination`` now.

        :raises PostcopyError: that cannot be served.
        """


class Background(Protocol):
    """Work that is done while no fault waits."""

    def due_in_ms(self) -> float | None:
        """How long to wait for faults before the next step: 0 = it is due; None = there is none."""

    def step(self) -> None:
        """Do a step so short that a fault may wait for its end."""


class FaultLoop:
    """Reads userfaultfds until :meth:`stop`.

    A child of the guest's process has a userfaultfd of its own.  It is held open up to the end, so that
    what touches a missing page in the child waits until then, and does not read zeros in place of data.

    :param userfaultfd: of the guest's process.
    :param shared: other processes that have its memory mapped; one may be added at any time.
    :param locks: under which other threads place pages; held while events are read and handled.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        handler: FaultHandler,
        background: Background | None = None,
        shared: SharedSpaces | None = None,
        locks: Sequence[AbstractContextManager[object]] = (),
    ) -> None:
        self._userfaultfd = userfaultfd
        self._locks = locks if userfaultfd.tells_of_changes else ()
        self._handler = handler
        self._background = background
        self._shared = shared
        self._spaces: dict[int, SharedSpace] = {}  # by descriptor; the thread's alone
        self._children: list[int] = []
        ends = calls.of_python("pipe2", "", os.pipe2, os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake_reader, self._wake_writer = ends
        self._waking = (
            threading.Lock()
        )  # the descriptors' numbers may be reused once they are closed
        self._stopped = False

    # --- from any thread

    def wake(self) -> None:
        """Have the loop look at its background work again.  Harmless when closed."""
        with self._waking:
            if self._wake_writer < 0:
                return
            try:
                os.write(self._wake_writer, b"\0")
            except BlockingIOError:
                pass  # full: then it wakes anyway

    def stop(self) -> None:
        """Make :meth:`run` return; faults that come later wait."""
        self._stopped = True
        self.wake()

    def close(self) -> None:
        """Close the pipe and the children's descriptors, when no thread runs it.  Harmless when closed."""
        with self._waking:
            for fd in (self._wake_reader, self._wake_writer, *self._children):
                if fd >= 0:
                    os.close(fd)
            self._wake_reader = self._wake_writer = -1
            self._children.clear()

    # --- the thread

    def run(self) -> None:
        """Serve faults until told to stop.

        :raises KernelError: no fault is served any more; threads that wait for a page wait on.
        """
        run_soon()
        poll = select.poll()
        poll.register(self._userfaultfd.fd, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        if self._shared is not None:
            self._shared.on_added = self.wake
        self._take_added(poll)
        looked_ns = time.monotonic_ns()
        while not self._stopped:
            since_ns = looked_ns
            ready = calls.of_python("poll", "", poll.poll, 0)
            if not ready:
                timeout_ms = self._background.due_in_ms() if self._background is not None else None
                if timeout_ms != 0:
                    ready = calls.of_python("poll", "", poll.poll, timeout_ms)
                    since_ns = time.monotonic_ns()
            looked_ns = time.monotonic_ns()
            for fd, _ in ready:
                if fd == self._wake_reader:
                    os.read(fd, 64)
                    self._take_added(poll)
                elif (space := self._spaces.get(fd)) is None:
                    self._read(since_ns)
                else:
                    self._read_shared(space, since_ns)
            if not ready and self._background is not None:
                self._background.step()

    def _read(self, since_ns: int) -> None:
        faults: list[Fault] = []
        with ExitStack() as held:
            for lock in self._locks:
                held.enter_context(lock)
            for message in MESSAGE.iter_unpack(self._userfaultfd.read_messages(_MOST_MESSAGES)):
                if message[0] == _PAGEFAULT:
                    faults.append(message)
                else:
                    self._change(*message)
        if faults:
            self._handler.serve(faults, since_ns)

    def _take_added(self, poll: select.poll) -> None:
        """Read the userfaultfds of all other processes that there are by now."""
        for space in self._shared.all() if self._shared is not None else ():
            self._spaces[space.userfaultfd.fd] = space
            poll.register(space.userfaultfd.fd, select.POLLIN)

    def _read_shared(self, space: SharedSpace, since_ns: int) -> None:
        messages = space.userfaultfd.read_messages(_MOST_MESSAGES)
        faults = [each for each in MESSAGE.iter_unpack(messages) if each[0] == _PAGEFAULT]
        if faults:
            self._handler.serve(faults, since_ns, space)

    def _change(self, event: int, first: int, second: int, third: int) -> None:
        if event in {EventCode.REMOVE, EventCode.UNMAP}:
            self._handler.removed(first, second)
            # Threads that wait for one of these pages fault again.
            self._userfaultfd.wake(first, second - first)
        elif event == EventCode.REMAP:
            self._handler.moved(first, second, third)
        elif event == EventCode.FORK:
            self._children.append(first & LOW_WORD)
