"""Read faults, ask for the pages, and keep the time.

One thread, ``pager``, runs :meth:`Pager.run`.  It serves the guest's own process, and every other that has
the guest's memory mapped.

A page is asked for once, however many threads of however many processes fault on it.  A fault that is read
although its page has just been placed (the message was queued before) only wakes its thread again.
"""

import time
from collections.abc import Sequence
from typing import Protocol

from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.paging.fault_loop import LOW_WORD, Fault, FaultLoop
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.minor_faults import resolve_minor_fault
from postcopy.paging.placer import BlockPlacer
from postcopy.paging.ram import IncomingRam
from postcopy.paging.shared_space import SharedSpace, SharedSpaces

Request = tuple[RamBlock, int]
"""A block, and the number of the page that is wanted."""


class PageSource(Protocol):
    """Where missing pages come from: over the wire, some time after they have been asked for."""

    def request(self, pages: Sequence[Request]) -> None:
        """Ask for the pages of one batch of faults."""


class Pager:
    """Serves the userfaultfds of all address spaces until :meth:`stop`.

    :param userfaultfd: the guest's own.
    :param awake: keeps CPUs awake while there are faults; the caller closes it.
    :param shared: the other processes that have the guest's memory mapped.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        ram: IncomingRam,
        faults: FaultTable,
        source: PageSource,
        awake: CpusAwake,
        shared: SharedSpaces | None = None,
    ) -> None:
        self._ram = ram
        self._placers = {p.block.name: BlockPlacer(userfaultfd, p.block) for p in ram}
        self._table = faults
        self._source = source
        self._awake = awake
        locks = [paged.pages.lock for paged in ram]
        self._loop = FaultLoop(userfaultfd, self, shared=shared, locks=locks)
        self.faults = 0

    def run(self) -> None:
        """Serve faults until told to stop.

        :raises KernelError: no fault is served any more; threads that wait for a page wait on.
        """
        self._awake.a_while()  # the guest is about to begin
        try:
            self._loop.run()
        finally:
            self._loop.close()

    def stop(self) -> None:
        """Make :meth:`run` return; faults that come later wait."""
        self._loop.stop()

    def discard(self) -> None:
        """Let go of one that has never run."""
        self._loop.close()

    def ask_again(self) -> None:
        """Ask once more for everything asked for and not received: after a recovery."""
        for paged in self._ram:
            pages = paged.pages.requested()
            if len(pages):
                self._source.request([(paged.block, int(page)) for page in pages])

    def serve(
        self, faults: Sequence[Fault], since_ns: int, space: SharedSpace | None = None
    ) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        del since_ns
        wanted = [request for fault in faults if (request := self._note(fault, space)) is not None]
        if wanted:
            self._source.request(wanted)
        self._awake.a_while()  # it may have to start a thread: a vCPU does not wait for that

    def removed(self, start: int, end: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        now_ns = time.monotonic_ns()
        for paged in self._ram:
            first, last = paged.block.within(start, end)
            paged.remove(first, last)
            name = paged.block.name
            waits = [page for page in self._table.waiting(name) if first <= page < last]
            for space, page in self._table.waiting_elsewhere(name, waits):
                space.wake(paged, page)
            self._table.end(name, waits, now_ns)  # their threads fault again

    def moved(self, source: int, destination: int, length_bytes: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        for paged in self._ram:
            paged.block.move(source, destination, length_bytes)

    def _note(self, fault: Fault, space: SharedSpace | None) -> Request | None:
        """Note one fault; return the page to ask for, if it has not been asked for yet."""
        now_ns = time.monotonic_ns()
        self.faults += 1
        _, _, address, thread = fault
        found = self._ram.find(address) if space is None else space.find(address)
        if found is None:
            return None
        paged, page = found
        block, thread_id = paged.block, thread & LOW_WORD
        self._table.begin(block.name, page, thread_id, now_ns, space)
        if paged.pages.request(page):
            return block, page
        if paged.pages.is_settled(page):
            # It was received before the guest ran here, or between the fault and our reading of it.
            self._table.withdraw(block.name, page, thread_id, now_ns, space)
            if space is None:
                resolve_minor_fault(self._placers[block.name], paged, page)
            else:
                space.show(paged, page)
        return None
