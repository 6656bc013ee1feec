"""What a guest's process does for its engines: the other end of :class:`postcopy.guest.Guest`.

It keeps what must outlive an engine: the memory, the userfaultfds, the page maps.  While any page is
missing, the descriptor kept here is what makes a thread that touches it wait instead of reading zeros.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from postcopy.abi import linux
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import KernelError, WrongState
from postcopy.guest import (
    AddressSpace,
    Description,
    DeviceState,
    Keeper,
    MappedRange,
    Ownership,
    Region,
    RunControl,
    SharingProcess,
)
from postcopy.kernel import calls, memfd, patience
from postcopy.kernel.calls import close_all, open_all
from postcopy.kernel.userfaultfd import (
    MISSING_FEATURES,
    MISSING_MODE,
    SNAPSHOT_FEATURES,
    WRITE_FEATURES,
    Userfaultfd,
)
from postcopy.link.guest.owned_guest import OwnedGuest
from postcopy.link.guest.shared_log import SharedLog
from postcopy.link.guest.sharing import STEP_BYTES, WatchedProcesses
from postcopy.link.rpc import Handler, handlers
from postcopy.link.values import Fd, sent
from postcopy.memory import page_map_file
from postcopy.ownership import MOVES_OF_ENGINES, Move, Owner

_REST_S = 50e-6
"""Between two such calls, for a guest that runs on as before: KVM begins a fault anew when anything has
been let go of meanwhile, wherever that was."""

MAY_WAIT_FOR_PAGES = frozenset({RunControl.load_devices.__name__, RunControl.wake.__name__})
"""Calls that may touch a missing page: should their engine die, only its successor can end them."""


class GuestKeeper:
    """The keeper of one guest, which answers its engines' calls.

    Its methods without a docstring are those of :class:`postcopy.guest.Keeper`.

    :param joined: see :class:`postcopy.link.guest.sharing.WatchedProcesses`.

    Invariant: ``_missing`` is open exactly while some page may be missing; it is closed only
    when none is.  So are the userfaultfds of ``shared``.
    """

    def __init__(
        self, guest: OwnedGuest, joined: Callable[[AddressSpace], None] = lambda _: None
    ) -> None:
        self._guest = guest
        self._lock = threading.Lock()
        self._writes: Userfaultfd | None = None
        self._missing: Userfaultfd | None = None
        self._snapshot: Userfaultfd | None = None
        self._page_maps: list[int] = []
        self.shared = WatchedProcesses(guest, lambda: self._page_maps, joined)
        """Other processes that wait for missing pages."""
        self._shared_log = log = SharedLog(guest)
        self.start_shared_log, self.fetch_shared_log = log.start, log.fetch
        self.stop_shared_log = log.stop
        guest.tell_of_sharing(self._join)
        self.waking = threading.Lock()
        """Held while a guest is loaded and let run."""
        self._kept_stream: tuple[int, Mapping[str, int]] = (0, {})
        self.lost: Mapping[str, int] = {}
        """How many pages of each block are lost."""
        # What has been poisoned of a guest whose missing pages are being given up.
        self._poisoned: dict[str, int] | None = None
        self.arrived: Callable[[], None] = lambda: None
        """Called when a guest has begun to be ours, by its engine's word."""
        self.slowed = False
        """Whether an engine may have had the vCPUs held."""
        self.reset_point = False
        """Whether the writes are being tracked so that the guest can go back to a point."""

    @staticmethod
    def prepare() -> None:
        """Import what needs numpy: a guest that wakes does not wait for it, one that moves would later."""
        from postcopy.link.guest import missing_pages  # noqa: F401

    def _join(self, process: SharingProcess) -> None:
        self._shared_log.join(process)
        self.shared.join(process)

    @property
    def watches_missing(self) -> bool:
        """Whether some page may be missing."""
        with self._lock:
            return self._missing is not None

    def handlers(self) -> dict[str, Handler]:
        """The calls of an engine, by name; one that is late about an arrival is refused."""
        calls = _EngineCalls(self._guest, self)
        return handlers(RunControl, calls) | handlers(Ownership, calls) | handlers(Keeper, self)

    def regions(self) -> Sequence[Region]:
        return [replace(region, fd=Fd(region.fd)) for region in self._guest.regions()]

    def address_spaces(self) -> Sequence[AddressSpace]:
        return self._spaces(None)

    def _spaces(self, watch: Userfaultfd | None) -> Sequence[AddressSpace]:
        ranges = [
            MappedRange(region.name, 0, region.size_bytes, region.host_address)
            for region in self._guest.regions()
        ]
        return [AddressSpace(os.getpid(), ranges, -1 if watch is None else Fd(watch.fd))]

    def keep_stream(self, section: int, sizes_bytes: Mapping[str, int]) -> None:
        self._kept_stream = section, sizes_bytes

    def kept_stream(self) -> tuple[int, Mapping[str, int]]:
        return self._kept_stream

    def page_maps(self) -> Sequence[int]:
        with self._lock:
            if not self._page_maps:
                self._empty_memory()
                self._page_maps = open_all(
                    lambda region: page_map_file.create(
                        region.size_bytes // region.page_size_bytes
                    ),
                    self._guest.regions(),
                )
            return sent(self._page_maps)

    def _empty_memory(self) -> None:
        """Nothing has come yet: memory must be as zero as the pages that will never be sent.

        An attempt that failed may have left some.
        """
        if not self._guest.owned:
            for region in self._guest.regions():
                memfd.empty(region.fd, region.fd_offset, region.size_bytes)

    def run_freely(self) -> None:
        """Let the vCPUs run all the time: the engine that had them held has ended."""
        if self.slowed:
            self.slowed = False
            self._guest.throttle(0)
            self._guest.limit_dirty_rate(0, 0)

    def abandon(self) -> bool:
        """No guest comes: it is never let run, and only then its memory is watched no more.

        :return: whether that is so; False: it runs here already, and its memory is watched on.
        """
        ownership = self._guest.ownership
        if not ownership.try_move(Move.ABANDON) and ownership.owner is not Owner.ABANDONED:
            return False
        self.unwatch_missing()
        return True

    def lost_pages(self, block: str, pages: int) -> None:
        known = self.lost.get(block, 0)
        self.lost = {**self.lost, block: max(known, pages)}

    def start_dirty_log(self) -> None:
        self._guest.start_dirty_log()

    def stop_dirty_log(self) -> None:
        self._guest.stop_dirty_log()

    def fetch_dirty_log(self, block: str) -> bytes:
        return self._guest.fetch_dirty_log(block).tobytes()

    # --- userfaultfds

    def watch_writes(self) -> None:
        with self._lock:
            if self._writes is None:
                # The kernel answers these faults itself, its own too: no privilege is needed.
                self._writes = self._watch(WRITE_FEATURES, RegisterMode.WP, user_mode_only=True)

    def unwatch_writes(self) -> None:
        """Nothing tracks writes any more: neither write-protection nor other processes, if they did."""
        with self._lock:
            self._unwatch(self._writes)
            self._writes = None
        self._shared_log.stop()

    def watch_snapshot(self) -> Sequence[AddressSpace]:
        with self._lock:
            if self._snapshot is None:
                self._snapshot = self._watch(SNAPSHOT_FEATURES, RegisterMode.WP)
                self._shared_log.hold()  # their own writes do not wait
            return self._spaces(self._snapshot)

    def unwatch_snapshot(self) -> None:
        """No page is kept for a snapshot any more: every waiting write goes on."""
        with self._lock:
            self._unwatch(self._snapshot, rest_s=_REST_S)
            self._snapshot = None
        self._shared_log.release()

    def populate(self, block: str, offset: int, length_bytes: int) -> None:
        for region in self._guest.regions():
            if region.name == block:
                advice = linux.MADV_POPULATE_WRITE
                address = region.host_address + offset
                calls.madvise(address, length_bytes, advice, passes=patience.SIGNALS)

    def unmap_missing(self) -> None:
        """Unmap, here alone, what the page maps do not have as received; the memory stays."""
        from postcopy.link.guest import missing_pages

        missing_pages.unmap_missing(*self.paged())

    def paged(self) -> tuple[Sequence[Region], Sequence[int]]:
        """The RAM blocks, and their page maps while a guest arrives."""
        with self._lock:
            return self._guest.regions(), list(self._page_maps)

    def watch_missing(self, *, only_still: bool = False) -> Sequence[AddressSpace]:
        with self._lock:
            if self._missing is None and only_still:
                raise WrongState("every page is in place: nothing is left to recover")
            if self._poisoned is not None:
                raise WrongState(
                    "some of the missing pages have been given up; x-migrate-lost gives up the others"
                )
            if self._missing is None:
                # No UFFD_FEATURE_EVENT_*: this process frees, moves and unmaps none of the memory while it
                # is watched, and its children only execute other programs (EVENT_FORK takes CAP_SYS_PTRACE,
                # too).  The one call that would be reported is unmap_missing(): its pages are still to come
                # and must not count as removed, and it would wait for a reader that does not run yet.
                self._missing = self._watch(MISSING_FEATURES, MISSING_MODE)
            own = self._spaces(self._missing)
        return [*own, *self.shared.watch()]

    def unwatch_missing(self) -> None:
        """Every page is in place: let go of the userfaultfds and of the page maps."""
        with self._lock:
            self._unwatch(self._missing)
            self._missing = None
            page_maps, self._page_maps = self._page_maps, []
        self.shared.unwatch()
        close_all(page_maps)

    def poison_missing(self) -> Mapping[str, int]:
        """Nothing more will come: make each touch of a missing page fail, and stop watching.

        :return: how many pages of each block are lost.
        :raises KernelError: some pages are not poisoned; the memory is watched on, and to do this again
            is all that is left: what has been poisoned cannot come any more.
        """
        with self._lock:
            watch, page_maps = self._missing, list(self._page_maps)
        if watch is None:
            raise WrongState("no page is missing")
        from postcopy.link.guest import missing_pages

        self._poisoned = lost = self._poisoned or {}
        missing_pages.poison(watch, self._guest.regions(), page_maps, lost)
        self.shared.poison(page_maps)
        self.lost, self._poisoned = lost, None
        self.unwatch_missing()
        return lost

    def _watch(
        self, features: Feature, mode: RegisterMode, *, user_mode_only: bool = False
    ) -> Userfaultfd:
        watch = Userfaultfd.open(features, user_mode_only=user_mode_only)
        try:
            for region in self._guest.regions():
                watch.register(region.host_address, region.size_bytes, mode)
        except BaseException:
            watch.close()
            raise
        return watch

    def _unwatch(self, watch: Userfaultfd | None, rest_s: float = 0.0) -> None:
        """Let go of all memory: in steps, and if one of them fails, with the last descriptor.

        An engine's descriptor closes with its job, at the latest with its process.
        """
        if watch is not None:
            with watch, suppress(KernelError):
                for region in self._guest.regions():
                    step = max(STEP_BYTES, region.page_size_bytes)
                    address, length = region.host_address, region.size_bytes
                    watch.unregister_in_steps(address, length, step, rest_s)


class _EngineCalls(RunControl, Ownership):
    """What one engine may do with the guest besides; see these two for each method."""

    def __init__(self, guest: OwnedGuest, keeper: GuestKeeper) -> None:
        self._guest = guest
        self._keeper = keeper
        self._ownership = guest.ownership
        self._arrival = self._ownership.arrival

    def describe(self) -> Description:
        threads = tuple(self._guest.vcpu_threads())
        return Description(self._guest.machine_name, self._guest.accelerator_name == "kvm", threads)

    def pause(self, *, to_move: bool = False) -> int:
        began_ns = time.monotonic_ns()
        self._guest.pause(to_move=to_move)
        return began_ns

    def resume(self) -> None:
        was_ours = self._guest.owned
        self._guest.resume(self._arrival)
        if not was_ours:
            self._keeper.arrived()

    def pause_and_save(self, *, to_move: bool = False) -> Sequence[DeviceState]:
        self._guest.pause(to_move=to_move)
        return self._guest.save_devices()

    def load_devices(self, states: Sequence[DeviceState]) -> None:
        self._guest.load_devices(states)

    def wake(self, states: Sequence[DeviceState]) -> None:
        # One engine may have died in the midst of this, and the next asks for it again.
        with self._keeper.waking:
            if not self._guest.owned:
                self._ownership.check(Move.ARRIVE)  # an arrival given up loads nothing
                self._guest.load_devices(states)
                self.resume()

    def throttle(self, percent: int) -> None:
        self._keeper.slowed = True
        self._guest.throttle(percent)

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        self._keeper.slowed = True
        self._guest.limit_dirty_rate(mebibytes, period_ms)

    def move(self, move: Move) -> None:
        if move not in MOVES_OF_ENGINES:
            raise WrongState(f"an engine cannot order the move '{move.value}'")
        if move is Move.ABANDON:
            self._keeper.abandon()
        else:
            self._ownership.move(move)
