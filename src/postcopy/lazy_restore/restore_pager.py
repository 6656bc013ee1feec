"""The pager of a restore: serves faults from the image, and prefetches the rest between them.

One thread does both.  So a demand never waits for a lock, for the interpreter, or for more than the one
step of the prefetch that is under way; and between two steps it always looks for faults.
What comes unasked comes in two phases: the working set of earlier restores, at once; and everything else
when the guest runs.  The guest is let run when the first has had a head start.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from postcopy.abi.userfaultfd import PagefaultFlag
from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import KernelError, PostcopyError
from postcopy.image.page_copies import PageCopies
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.lazy_restore.block_restorer import BlockRestorer
from postcopy.lazy_restore.prefetch import PrefetchWork, from_copies, from_image
from postcopy.lazy_restore.prefetch_budget import HeadStart
from postcopy.memory.page_map import RECEIVED
from postcopy.memory.runs import Mask
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_loop import LOW_WORD, Fault, FaultLoop
from postcopy.paging.shared_space import SharedSpace, SharedSpaces
from postcopy.statistics import WaitCause
from postcopy.trace import trace

_SHORT_STEP_BYTES: Final = 128 << 10
_LONG_STEP_BYTES: Final = 1 << 20
_QUIET_NS: Final = 5_000_000
_STEPS_A_SECOND: Final = 10
_SETTLED_NS: Final = 200_000_000
_LONGEST_RECORDING_NS: Final = 10_000_000_000
_MINOR: Final = int(PagefaultFlag.MINOR)


@dataclass(frozen=True, slots=True)
class Pace:
    """How the prefetch behaves.

    :ivar holds_for_recording: bring nothing unasked before the faults have settled: a page
        that has come is not seen to be touched.
    :ivar copies: of pages of the working set, if there are any: these come first.
    """

    limiter: RateLimiter
    holds_for_recording: bool = False
    copies: PageCopies | None = None


class RestorePager:
    """Fills all blocks; :meth:`run` is the thread ``pager``.

    :param working_set: what to bring first, in pages of each block's own size.
    :param on_progress: called once, when anything has been placed.
    :param shared: the other processes that have the guest's memory mapped.
    :param vcpu_of_thread: see :class:`postcopy.paging.blocktime.Blocktime`.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        restorers: Sequence[BlockRestorer],
        working_set: Mapping[str, Mask],
        pace: Pace,
        on_progress: Callable[[], None] = lambda: None,
        shared: SharedSpaces | None = None,
        vcpu_of_thread: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._userfaultfd = userfaultfd
        self._restorers = restorers
        self._restorer_of = {each.block.name: each for each in restorers}
        self._working_set = working_set
        self._limiter = pace.limiter
        self._on_progress: Callable[[], None] | None = on_progress
        self._loop = FaultLoop(userfaultfd, self, self, shared)
        self._hurry = False
        self._runs_ns: int | None = None  # since when the guest runs
        self._may_end = False
        self._exhausted = False
        self._copies = pace.copies
        self._awake = CpusAwake()
        self._todo = self._plan()
        self._all_in = threading.Event()
        self._rest: PrefetchWork | None = None
        self._not_before_ns = 0
        self._last_fault_ns = time.monotonic_ns()
        self._recording = pace.holds_for_recording
        # A recording sees only pages that have not come unasked.
        self.head_start = HeadStart(wanted=bool(working_set) and not pace.holds_for_recording)
        self.blocktime = Blocktime(vcpu_of_thread, WaitCause.IMAGE)
        self.ready_ns: int | None = None
        """When the working set was in, or, recording, when the faults had settled; monotonic."""

    # --- from other threads

    @property
    def faults(self) -> int:
        """How many faults have been served."""
        return self.blocktime.latencies.count

    def hurry(self, *, wanted: bool = True) -> None:
        """Go on at full speed, since a user waits for the end; or no longer."""
        self._hurry = wanted
        self._loop.wake()

    def new_rate(self, bytes_per_second: int) -> None:
        """Bring no more a second than this unasked, from now on; 0: as fast as it goes."""
        self._limiter.set_rate(bytes_per_second)
        self._not_before_ns = 0
        self._loop.wake()

    def guest_runs(self) -> None:
        """The guest runs: bring the rest."""
        if self._runs_ns is None:
            self._runs_ns = time.monotonic_ns()
        self._loop.wake()

    def wait_all_in(self) -> bool:
        """Wait until nothing is left to bring; return False if :meth:`run` has ended before."""
        self._all_in.wait()
        return self._exhausted

    def may_end(self) -> None:
        """The guest runs: bring the rest, and let :meth:`run` end with the last page."""
        self._may_end = True
        self.guest_runs()
        self._end_if_done()

    def stop(self) -> None:
        """Make :meth:`run` return; faults that come later wait."""
        self._userfaultfd.end_waits()
        self._loop.stop()

    def close(self) -> None:
        """Let go of the loop's descriptors, when :meth:`run` has returned; later calls do no harm."""
        self._loop.close()

    # --- a thread that helps it

    def look_ahead(self) -> None:
        """Check what the replay will bring, up to the end of its head start.

        What cannot be read now is checked when it is brought.
        """
        with suppress(PostcopyError):
            self._look_ahead()

    def _look_ahead(self) -> None:
        if self._copies is not None:
            self._copies.look_ahead(lambda: self.head_start.ended)
            return
        for restorer in self._restorers:
            wanted = self._working_set.get(restorer.paged.block.name)
            if wanted is not None:
                restorer.source.look_ahead(wanted, lambda: self.head_start.ended)

    # --- the thread

    def run(self) -> None:
        """Serve and prefetch until every page is in place, and it :meth:`may_end`; or told to stop."""
        try:
            self._loop.run()
        finally:
            self._awake.close()
            self.head_start.give_up()  # without effect if the guest runs
            self._all_in.set()

    # --- as postcopy.paging.fault_loop.FaultHandler

    def serve(
        self, faults: Sequence[Fault], since_ns: int, space: SharedSpace | None = None
    ) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        since_ns = time.monotonic_ns()
        self._awake.a_while()
        for _, _, _, thread in faults:
            self.blocktime.begin(thread & LOW_WORD, since_ns)
        for _, flags, address, thread in faults:
            if space is not None:
                self._serve_shared(space, address)
            else:
                restorer = self._find(address)
                page = (address - restorer.block.host_address) >> restorer.shift
                if flags & _MINOR:
                    restorer.placer.map(page)
                else:
                    restorer.bring(page)
            self._last_fault_ns = now_ns = time.monotonic_ns()
            self.blocktime.end(thread & LOW_WORD, since_ns, now_ns)
        self._note_progress()

    def _serve_shared(self, space: SharedSpace, address: int) -> None:
        """Bring a page that a thread of another process waits for: to the guest, and then to it."""
        found = space.find(address)
        if found is None:
            return
        paged, page = found
        states = paged.pages.states
        if states[page] != RECEIVED:
            self._restorer_of[paged.block.name].bring(page)
        if space.map(paged, page):
            return
        if states[page] == RECEIVED:
            space.poison(paged, page)  # it is lost
        else:
            space.wake(paged, page)  # the guest's address space was changing

    def removed(self, start: int, end: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        for restorer in self._restorers:
            restorer.remove(*restorer.block.within(start, end))

    def moved(self, source: int, destination: int, length_bytes: int) -> None:
        """See :class:`postcopy.paging.fault_loop.FaultHandler`."""
        for restorer in self._restorers:
            restorer.block.move(source, destination, length_bytes)

    def _find(self, address: int) -> BlockRestorer:
        for restorer in self._restorers:
            if 0 <= address - restorer.block.host_address < restorer.block.size_bytes:
                return restorer
        raise KernelError(
            "read", 0, f"of a userfaultfd: a fault at {address:#x}, where no block is"
        )

    def _note_progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress()
            self._on_progress = None
            trace("restore.serving")

    # --- as postcopy.paging.fault_loop.Background: the prefetch

    def due_in_ms(self) -> float | None:
        """See :class:`postcopy.paging.fault_loop.Background`."""
        if self._exhausted:
            return None
        if self._hurry:
            return 0
        runs_ns = self._runs_ns
        if runs_ns is None:
            # A guest asks for what it needs up to then, and has yet to touch what is to be recorded.
            return None if self._recording or self.ready_ns is not None else 0
        now_ns = time.monotonic_ns()
        if self._recording:
            settled_ns = max(self._last_fault_ns, runs_ns) + _SETTLED_NS
            until_ns = min(settled_ns, runs_ns + _LONGEST_RECORDING_NS)
            if until_ns > now_ns:
                return (until_ns - now_ns) // 1_000_000 + 1
            self._recording = False
        if self.ready_ns is None or self._not_before_ns <= now_ns:
            return 0
        return (self._not_before_ns - now_ns) // 1_000_000 + 1

    def step(self) -> None:
        """See :class:`postcopy.paging.fault_loop.Background`."""
        if not self._prefetch():
            self._exhausted = True
            self._all_in.set()
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._exhausted and self._may_end:
            self._loop.stop()

    def _prefetch(self) -> bool:
        """Take one step; return whether there was anything left to do."""
        if self._rest is None:
            try:
                self._rest = next(self._todo)
            except StopIteration:
                return False
            if self._rest is None:
                return True
        placed_bytes = self._rest.step(self._step_bytes())
        if self._rest.done:
            self._rest = None
        if self.ready_ns is None:
            self.head_start.brought(placed_bytes)
        elif not self._hurry:
            self._pace(placed_bytes)
        self._note_progress()
        return True

    def _step_bytes(self) -> int:
        quiet = time.monotonic_ns() - self._last_fault_ns > _QUIET_NS
        step_bytes = _LONG_STEP_BYTES if quiet else _SHORT_STEP_BYTES
        if self._limiter.bytes_per_second and self.ready_ns is not None and not self._hurry:
            step_bytes = min(step_bytes, self._limiter.bytes_per_second // _STEPS_A_SECOND)
        return step_bytes

    def _pace(self, placed_bytes: int) -> None:
        wait_s = self._limiter.spend(placed_bytes)
        self._not_before_ns = time.monotonic_ns() + int(wait_s * 1e9)

    def _plan(self) -> Iterator[PrefetchWork | None]:
        """What comes unasked, in order; None: nothing yet, but a thread may wait by now."""
        if self._copies is not None:
            yield from from_copies(self._restorers, self._copies)
        for restorer in self._restorers:
            wanted = self._working_set.get(restorer.paged.block.name)
            if wanted is not None:
                yield from restorer.count()
                yield from from_image(restorer, wanted)
        self.ready_ns = time.monotonic_ns()
        self.head_start.end()
        trace("restore.working-set-in")
        yield None
        for restorer in self._restorers:
            yield from restorer.count()
            yield from from_image(restorer)
            while restorer.skipped:
                restorer.skipped = False
                yield None
                yield from from_image(restorer)
