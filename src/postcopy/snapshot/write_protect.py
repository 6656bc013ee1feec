"""Write-protection of a guest's memory, and what happens when the guest writes all the same.

Protecting a page is cheap, and protecting all of them takes longer the more there are; so the guest is
protected *before* it is stopped.  Whoever writes then goes on at once, and the page is noted.  At the stop
only those pages are protected again: what the stop costs depends on how much a guest writes in a few
milliseconds, and not on how much memory it has.

From the stop on a page that somebody writes to is first copied aside, with its neighbours.

All of it goes through a userfaultfd that the guest's process has registered and keeps, so that it can end
the protection when this process dies.  The thread ``snapshot-faults`` runs :meth:`FaultLoop.run`.
"""

import threading
import time
import traceback
from collections.abc import Callable, Sequence

from postcopy.errors import GuestError, PostcopyError
from postcopy.kernel import threads
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.memory.ram_block import RamBlock
from postcopy.paging.fault_loop import Fault, FaultLoop
from postcopy.paging.latencies import LatencyHistogram
from postcopy.snapshot.bitmap import UnsavedPages
from postcopy.snapshot.cow_buffer import Aside

RUN_BYTES = 64 << 10
"""What is copied, or let go, around a page that somebody writes to: who writes there writes nearby."""

_STEP_BYTES = 16 << 20
"""What is protected in one call: KVM lets no vCPU fault in memory that is being protected."""

_FEW_RUNS = 16  # that are protected again in a tenth of a millisecond
_ROUNDS = 4

_Run = tuple[RamBlock, int, int]  # first and end page


class WriteProtectHandler:
    """Keeps what the guest overwrites.

    :param userfaultfd: every block is registered with it; it is ours from now on.
    :param aside: takes the copies.
    :param on_error: told when faults cannot be served any more; the guest's process must end the
        protection then.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        unsaved: UnsavedPages,
        aside: Aside,
        on_error: Callable[[PostcopyError], None],
    ) -> None:
        self._userfaultfd = userfaultfd
        self._unsaved = unsaved
        self._aside = aside
        self._on_error = on_error
        self.stalls = LatencyHistogram()
        # Under the lock of the unsaved pages: what was written to before the stop, and whether it was.
        # In runs, for the guest stands still while they are gone through.
        self._written: set[_Run] = set()
        self._frozen = False
        self._loop = FaultLoop(userfaultfd, self)
        self._thread = threading.Thread(target=self._serve, name="snapshot-faults", daemon=True)

    def start(self) -> None:
        """Begin to serve faults.

        :raises HostCannot: there can be no more threads.
        """
        threads.start(self._thread)

    def arm(self) -> None:
        """Protect all memory of a guest that runs, until little of it is written to meanwhile."""
        self._unsaved.look_for_data()
        for block in self._unsaved.blocks:
            step = max(1, _STEP_BYTES // block.page_size_bytes)
            for first in range(0, block.page_count, step):
                self._protect(block, first, min(first + step, block.page_count))
        for _ in range(_ROUNDS):
            with self._unsaved.lock:
                written, self._written = self._written, set()
            self._protect_again(written)
            if len(written) <= _FEW_RUNS:
                break

    def freeze(self) -> None:
        """The guest stands still: from now on every page is kept as it is at this moment."""
        with self._unsaved.lock:
            self._protect_again(self._written)
            self._frozen = True

    def let_go(self, block: RamBlock, first: int, end: int) -> None:
        """Allow writes to pages that have been copied, and wake who waits."""
        size = block.page_size_bytes
        address = block.host_address + first * size
        self._userfaultfd.write_protect(address, (end - first) * size, protect=False)

    def stop(self) -> None:
        """Serve no more faults.  Who may still wait then is woken by the guest's process."""
        self._userfaultfd.end_waits()
        self._aside.close()
        self._loop.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._loop.close()
        self._userfaultfd.close()

    def _protect(self, block: RamBlock, first: int, end: int) -> None:
        size = block.page_size_bytes
        address = block.host_address + first * size
        self._userfaultfd.write_protect(address, (end - first) * size, protect=True)

    def _protect_again(self, written: set[_Run]) -> None:
        for block, first, end in written:
            self._protect(block, first, end)

    # --- the thread of the faults

    def _serve(self) -> None:
        try:
            self._loop.run()
        except PostcopyError as error:
            self._on_error(error)
        except Exception as error:  # a fault of ours must not leave the guest waiting either
            traceback.print_exc()
            self._on_error(PostcopyError(f"the snapshot's fault handler failed: {error!r}"))

    def serve(self, faults: Sequence[Fault], since_ns: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        for _, _, address, _ in faults:
            if not self._fault(address, since_ns):
                self._loop.stop()
                return

    def removed(self, start: int, end: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`.

        :raises GuestError: what is to be in the picture is not there any more.
        """
        for block in self._unsaved.blocks:
            first, last = block.within(start, end)
            if any(self._unsaved.is_unsaved(block, page) for page in range(first, last)):
                raise GuestError(
                    f"the guest's process has given up memory of RAM block '{block.name}' that the "
                    "snapshot has not saved yet; take it again while no balloon is being filled"
                )

    def moved(self, source: int, destination: int, length_bytes: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        for block in self._unsaved.blocks:
            block.move(source, destination, length_bytes)

    def _fault(self, address: int, since_ns: int) -> bool:
        """Let a writer go on; return False when nobody takes copies any more."""
        block, page = self._unsaved.find(address)
        first, end = self._neighbours(block, page)
        # Never again false once it is true; few steps, for each may have to wait for the other thread.
        if not self._frozen and self._note(block, first, end):
            return True
        if not self._unsaved.is_unsaved(block, page):
            self.let_go(block, page, page + 1)  # again: who waits may have come when it was let go
        elif not self._keep(block, first, end):
            return False
        self.stalls.add(time.monotonic_ns() - since_ns)
        return True

    def _note(self, block: RamBlock, first: int, end: int) -> bool:
        """Before the stop a page is let go at once; return whether it is before the stop."""
        with self._unsaved.lock:
            if not self._frozen:
                self._written.add((block, first, end))
                self.let_go(block, first, end)
            return not self._frozen

    def _keep(self, block: RamBlock, first: int, end: int) -> bool:
        needed_bytes = (end - first) * block.page_size_bytes
        if not self._aside.reserve(needed_bytes):
            return False
        copies = self._unsaved.save(block, first, end)
        self.let_go(block, first, end)
        self._aside.put(copies, needed_bytes)
        return True

    def _neighbours(self, block: RamBlock, page: int) -> tuple[int, int]:
        """What to treat with a page: a run, or the page alone while the sink is slow."""
        count = max(1, RUN_BYTES // block.page_size_bytes)
        if not self._aside.is_roomy:
            return page, page + 1
        first = page - page % count
        return first, min(first + count, block.page_count)
