"""Read faults, ask for the pages, and keep the time.

One thread, ``pager``, runs :meth:`Pager.run`.  It lives in the engine's process, never in the guest's:
whoever can fault on guest memory must not be the one who mends the fault.

A page is asked for once, however many threads fault on it.  A fault that is read although its page
has just been placed (the message was queued before) only wakes its thread again.
"""

import os
import select
import time
from collections.abc import Callable, Sequence

from postcopy.kernel import calls
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.kernel.faults import Pagefault
from postcopy.kernel.scheduling import run_soon
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.minor_faults import resolve_minor_fault
from postcopy.paging.ram import IncomingRam

Request = tuple[RamBlock, int]
"""A block, and the number of the page that is wanted."""


class Pager:
    """Serves one userfaultfd until :meth:`stop`.

    :param ask: how a page is asked for; gets all requests of one batch of faults.
    :param awake: keeps CPUs awake while there are faults; closed by who has made it.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        ram: IncomingRam,
        blocktime: Blocktime,
        ask: Callable[[Sequence[Request]], None],
        awake: CpusAwake,
    ) -> None:
        self._userfaultfd = userfaultfd
        self._ram = ram
        self._blocktime = blocktime
        self._ask = ask
        ends = calls.of_python("pipe2", "", os.pipe2, os.O_CLOEXEC)
        self._stop_reader, self._stop_writer = ends
        self._awake = awake
        self.faults = 0

    def run(self) -> None:
        """Serve faults until told to stop.

        :raises KernelError: no fault is served any more; who waits for a page waits on.
        """
        try:
            self._run()
        finally:
            os.close(self._stop_reader)

    def _run(self) -> None:
        run_soon()
        self._awake.a_while()  # the guest is about to begin
        poll = select.poll()
        poll.register(self._userfaultfd.fd, select.POLLIN)
        poll.register(self._stop_reader, select.POLLIN)
        while all(fd != self._stop_reader for fd, _ in calls.of_python("poll", "", poll.poll)):
            self._awake.a_while()
            faults = [e for e in self._userfaultfd.read_events() if isinstance(e, Pagefault)]
            wanted = [request for fault in faults if (request := self._note(fault)) is not None]
            if wanted:
                self._ask(wanted)

    def stop(self) -> None:
        """Make :meth:`run` return; faults that come later wait."""
        os.close(self._stop_writer)  # its reader sees the end of the pipe

    def discard(self) -> None:
        """Let go of one that has never run."""
        self.stop()
        os.close(self._stop_reader)

    def ask_again(self) -> None:
        """Ask once more for everything asked for and not received: after a recovery."""
        for paged in self._ram:
            pages = paged.pages.requested()
            if len(pages):
                self._ask([(paged.block, int(page)) for page in pages])

    def _note(self, fault: Pagefault) -> Request | None:
        """Take one fault into the books; return the page to ask for, if nobody has yet."""
        now_ns = time.monotonic_ns()
        self.faults += 1
        found = self._ram.find(fault.address)
        if found is None:
            return None
        paged, page = found
        block = paged.block
        key = (block.name, page)
        self._blocktime.fault(key, fault.thread_id, now_ns)
        if paged.pages.request(page):
            return block, page
        if paged.pages.is_received(page):
            # Received before the guest ran here, or between the fault and our reading of it.
            self._blocktime.withdraw(key, fault.thread_id, now_ns)
            resolve_minor_fault(self._userfaultfd, paged, page)
        return None
