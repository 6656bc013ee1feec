"""Write-protection of a guest's memory, and the faults of writes to it.

Protecting one page is cheap; the time for all of them grows with the memory.  So the memory is protected
*before* the guest is stopped.  A write before the stop goes on at once, and its page is noted.  At the
stop only the noted pages are protected again: the length of the stop depends on how much a guest writes in
a few milliseconds, and not on its memory size.

After the stop a page is copied, with its neighbours, before its first write (copy-before-write).

The guest's process has registered the userfaultfd and keeps it, so that it can end the protection when
this process dies.  The thread ``snapshot-faults`` runs :meth:`FaultLoop.run`.
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
from postcopy.snapshot.bitmap import SnapshotBitmap
from postcopy.snapshot.cow_buffer import CowBuffer

RUN_BYTES = 64 << 10
"""Memory around a faulting page that is copied, or unprotected, with it: writes are local."""

_STEP_BYTES = 16 << 20
"""Memory that is protected in one call: KVM holds up the faults of vCPUs meanwhile."""

_FEW_RUNS = 16  # protected again in a tenth of a millisecond
_ROUNDS = 4

_Run = tuple[RamBlock, int, int]  # first and end page


class WriteProtectHandler:
    """Copies each unsaved page before the guest writes to it.

    :param userfaultfd: every block is registered with it; the handler owns it from now on.
    :param cow_buffer: takes the copies.
    :param on_error: called when faults cannot be served any more; the guest's process must end the
        protection then.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        bitmap: SnapshotBitmap,
        cow_buffer: CowBuffer,
        on_error: Callable[[PostcopyError], None],
    ) -> None:
        self._userfaultfd = userfaultfd
        self._bitmap = bitmap
        self._cow_buffer = cow_buffer
        self._on_error = on_error
        self.stalls = LatencyHistogram()
        # Under the bitmap's lock: the runs that were written to before the stop, and whether the guest
        # has been stopped.  Runs and not pages, since the guest is stopped while they are protected.
        self._written: set[_Run] = set()
        self._frozen = False
        self._loop = FaultLoop(userfaultfd, self)
        self._thread = threading.Thread(target=self._serve, name="snapshot-faults", daemon=True)

    def start(self) -> None:
        """Begin to serve faults.

        :raises HostCannot: the host can start no more threads.
        """
        threads.start(self._thread)

    def arm(self) -> None:
        """Protect all memory of a running guest, in rounds, until the guest writes little in a round."""
        self._bitmap.scan_for_data()
        for block in self._bitmap.blocks:
            step = max(1, _STEP_BYTES // block.page_size_bytes)
            for first in range(0, block.page_count, step):
                self._protect(block, first, min(first + step, block.page_count))
        for _ in range(_ROUNDS):
            with self._bitmap.lock:
                written, self._written = self._written, set()
            self._protect_again(written)
            if len(written) <= _FEW_RUNS:
                break

    def freeze(self) -> None:
        """Take the guest, which is stopped, as it is now: its pages are copied before each first write."""
        with self._bitmap.lock:
            self._protect_again(self._written)
            self._frozen = True

    def unprotect(self, block: RamBlock, first: int, end: int) -> None:
        """Allow writes to pages that have been copied; vCPUs that wait for them go on."""
        size = block.page_size_bytes
        address = block.host_address + first * size
        self._userfaultfd.write_protect(address, (end - first) * size, protect=False)

    def stop(self) -> None:
        """Serve no more faults.  The guest's process ends the protection, and so every wait."""
        self._userfaultfd.end_waits()
        self._cow_buffer.close()
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
        except Exception as error:  # a bug must not leave vCPUs waiting either
            traceback.print_exc()
            self._on_error(PostcopyError(f"the snapshot's fault handler failed: {error!r}"))

    def serve(self, faults: Sequence[Fault], since_ns: int, space: object = None) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`; of the guest's process alone."""
        del space
        for _, _, address, _ in faults:
            if not self._fault(address, since_ns):
                self._loop.stop()
                return

    def removed(self, start: int, end: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`.

        :raises GuestError: memory that the snapshot has to save has been discarded.
        """
        for block in self._bitmap.blocks:
            first, last = block.within(start, end)
            if any(self._bitmap.is_unsaved(block, page) for page in range(first, last)):
                raise GuestError(
                    f"the guest's process has discarded memory of RAM block '{block.name}' that the "
                    "snapshot has not saved yet; take it again while no balloon is inflated"
                )

    def moved(self, source: int, destination: int, length_bytes: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        for block in self._bitmap.blocks:
            block.move(source, destination, length_bytes)

    def _fault(self, address: int, since_ns: int) -> bool:
        """Serve the fault of a write; return False when the buffer is closed."""
        block, page = self._bitmap.find(address)
        first, end = self._neighbours(block, page)
        # It never becomes false again.  Few Python steps here: each may wait for the other thread.
        if not self._frozen and self._note(block, first, end):
            return True
        if not self._bitmap.is_unsaved(block, page):
            self.unprotect(block, page, page + 1)  # again: the fault may be newer than the call
        elif not self._keep(block, first, end):
            return False
        self.stalls.add(time.monotonic_ns() - since_ns)
        return True

    def _note(self, block: RamBlock, first: int, end: int) -> bool:
        """Before the stop, note a run and unprotect it; return whether it is before the stop."""
        with self._bitmap.lock:
            if not self._frozen:
                self._written.add((block, first, end))
                self.unprotect(block, first, end)
            return not self._frozen

    def _keep(self, block: RamBlock, first: int, end: int) -> bool:
        needed_bytes = (end - first) * block.page_size_bytes
        if not self._cow_buffer.reserve(needed_bytes):
            return False
        copies = self._bitmap.save(block, first, end)
        self.unprotect(block, first, end)
        self._cow_buffer.put(copies, needed_bytes)
        return True

    def _neighbours(self, block: RamBlock, page: int) -> tuple[int, int]:
        """The run that is served with a page: the page alone while the buffer is nearly full."""
        count = max(1, RUN_BYTES // block.page_size_bytes)
        if not self._cow_buffer.is_roomy:
            return page, page + 1
        first = page - page % count
        return first, min(first + count, block.page_count)
