"""A guest wakes from its image: at once, its memory behind it (lazy), or when all of it is here (eager).

It is postcopy with a file in the place of the source.  The guest's memory, empty as it is, goes under
userfaultfd; the pager (:mod:`postcopy.lazy_restore.restore_pager`) serves it from the image; the devices
are loaded and the guest runs.  Nothing before that takes longer for more memory.

Three threads: ``restore`` fills and then ends the restore; ``wake`` gives it a head start, loads the
devices and runs the guest, which may wait for pages that the first one brings; and up to then
``checking`` takes the digests of a working set, on the processor that the guest leaves idle.  All that
must outlive this process is elsewhere: the memory itself says which pages are in place, and the file
has the others.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from postcopy.channel.rate_limit import RateLimiter
from postcopy.errors import GuestError, HostCannot, PostcopyError
from postcopy.guest import AddressSpace, Guest
from postcopy.kernel import threads
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.lazy_restore.block_restorer import BlockRestorer, Lost, fill_block
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.lazy_restore.restore_pager import Pace, RestorePager
from postcopy.lazy_restore.restore_statistics import RestoreStatistics
from postcopy.ownership import Move
from postcopy.paging.ram import IncomingRam
from postcopy.paging.shared_space import SharedSpaces
from postcopy.parameters import Parameters
from postcopy.restore_options import RestoreOptions
from postcopy.statistics import MigrationInfo
from postcopy.status import ENDED, Status, StatusMachine
from postcopy.trace import trace

_RUNS: Final = frozenset({Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER})


class Restore:
    """One restore, or what is left of one whose engine has died.

    :param ram: the guest's memory; ours from now on.
    :param on_progress: called once, when the first page is in place.
    :param opened: the image, if it is open already; ours from now on.
    :raises ImageError: the image is damaged, is none, or does not fit the guest.
    """

    def __init__(
        self,
        guest: Guest,
        ram: IncomingRam,
        options: RestoreOptions,
        progress: StatusMachine,
        parameters: Parameters,
        on_progress: Callable[[], None] = lambda: None,
        opened: RestoreImage | None = None,
    ) -> None:
        self._guest = guest
        self._ram = ram
        self._options = options
        self._progress = progress
        self._on_progress = on_progress
        self._limiter = RateLimiter(parameters.max_postcopy_bandwidth)
        self._opened = opened or RestoreImage(Path(options.path))
        self._lost: list[Lost] = []
        self._failure: PostcopyError | None = None
        self._userfaultfd: Userfaultfd | None = None
        self._shared = SharedSpaces(ram)
        self._pager: RestorePager | None = None
        self._hurried = False
        self.statistics = RestoreStatistics(options.began_ns, lazy=options.lazy)
        self.error: PostcopyError | None = None
        try:
            self._check()
        except BaseException:
            self._opened.close()
            raise

    @property
    def identity(self) -> str:
        """Of the image: a successor must find the same."""
        return self._opened.identity

    def _check(self) -> None:
        self._opened.check_same(self._options.identity)
        sizes = {paged.block.name: paged.block.size_bytes for paged in self._ram}
        self._opened.check_fits(self._guest.machine_name, sizes)
        if self._options.lazy and not self._guest.kvm:
            # What is found wrong later could not be kept from a software CPU but with the process.
            self._opened.check_all(sizes)

    # --- called by the monitor, from other threads

    def info(self) -> MigrationInfo:
        """The figures as they are now."""
        lost = str(self._loss()) if self._lost else None
        return self.statistics.info(self._progress.status, lost)

    def set_parameters(self, parameters: Parameters) -> None:
        """Take over parameters that the user has changed meanwhile."""
        rate = parameters.max_postcopy_bandwidth
        if self._pager is not None:
            self._pager.new_rate(rate)
        else:
            self._limiter.set_rate(rate)

    def share(self, space: AddressSpace) -> None:
        """Serve the faults of one more process that has the guest's memory mapped."""
        self._shared.add(space)

    def hurry(self, *, wanted: bool) -> None:
        """Go on at full speed, since a command waits for the end; or as set, when none does any more."""
        self._hurried = wanted
        if self._pager is not None:
            self._pager.hurry(wanted=wanted)

    def pause(self) -> None:
        """There is no connection that could be broken."""

    # --- the thread of the restore

    def run(self) -> None:
        """Restore the guest of the image."""
        self._until_the_end(self._begin)

    def adopt(self) -> None:
        """Go on where a dead engine was, as far as it had come."""
        self._until_the_end(self._take_over)

    def _until_the_end(self, begin: Callable[[], RestorePager]) -> None:
        try:
            pager = self._begun_by(begin)
            if pager is None:
                self._fill_unwatched()
            elif self._options.lazy:
                self._wake_first(pager)
            else:
                self._fill_first(pager)
        except PostcopyError as error:
            self._fail(self._failure or error)
        finally:
            self._let_go()

    def _begun_by(self, begin: Callable[[], RestorePager]) -> RestorePager | None:
        """Return what fills the memory; None: nothing of this host's can, but nothing need wait for it."""
        try:
            return begin()
        except HostCannot:
            if self._options.lazy:
                raise
            return None

    def _begin(self) -> RestorePager:
        trace("restore.begun")
        for paged in self._ram:
            paged.block.empty()
        self._progress.move(Status.ACTIVE)
        return self._watch(adopt=False)

    def _take_over(self) -> RestorePager:
        # Under no userfaultfd an engine may have died before it began, or after all was in.
        if self._progress.status is Status.SETUP:
            return self._begin()
        if self._progress.status is Status.POSTCOPY_PAUSED:
            self._progress.move(Status.POSTCOPY_RECOVER)
            self._progress.move(Status.POSTCOPY_ACTIVE)
        return self._watch(adopt=True)

    def _watch(self, *, adopt: bool) -> RestorePager:
        own, *others = self._guest.watch_missing()
        self._userfaultfd = userfaultfd = Userfaultfd.from_fd(own.userfaultfd)
        for space in others:
            self._shared.add(space)
        trace("restore.watching")
        restorers = [
            BlockRestorer(userfaultfd, paged, self._opened.source(paged.block), self._on_lost)
            for paged in self._ram
        ]
        prefetch = self._options.lazy and self._options.prefetch == "auto"
        working_set = self._opened.working_set(self._ram) if prefetch else {}
        copies = self._opened.copies(self._ram) if working_set else None
        pace = Pace(self._limiter, holds_for_recording=self._options.record, copies=copies)
        self._pager = RestorePager(
            userfaultfd,
            restorers,
            working_set,
            pace,
            self._on_progress,
            self._shared,
            {vcpu.thread_id: vcpu.index for vcpu in self._guest.vcpu_threads()},
        )
        self.statistics.watch(restorers, self._pager, working_set)
        if self._hurried:
            self._pager.hurry()
        if adopt:
            for restorer in restorers:
                restorer.adopt(own.process_id)
            for paged in self._ram:  # a thread that waited for the dead engine faults once more
                userfaultfd.wake(paged.block.host_address, paged.block.size_bytes)
            self._shared.wake_all()
        return self._pager

    # --- lazy

    def _wake_first(self, pager: RestorePager) -> None:
        waking = threading.Thread(
            target=self._wake_guarded, args=(pager,), name="wake", daemon=True
        )
        checking = threading.Thread(target=pager.look_ahead, name="checking", daemon=True)
        threads.start(waking)
        threads.start_if_possible(checking)
        try:
            pager.run()
        except PostcopyError as error:
            # To load the devices may wait for a page that does not come any more.  The wait ends when only
            # the guest's process holds the descriptor.
            assert self._userfaultfd is not None
            self._userfaultfd.close()
            self._guest.move(Move.ABANDON)
            self._failure = error
        finally:
            if checking.is_alive():
                checking.join()
            waking.join()
        if self._failure is not None:
            raise self._failure
        self._finish()
        if self._lost:
            self.error = self._loss()
        self._progress.move(Status.FAILED if self._lost else Status.COMPLETED)

    def _wake_guarded(self, pager: RestorePager) -> None:
        try:
            if not pager.head_start.wait():
                return
            self._wake()
            self._progress.move(Status.POSTCOPY_ACTIVE, only_from=frozenset({Status.ACTIVE}))
            trace("restore.running")
        except PostcopyError as error:
            self._failure = self._failure or error
            pager.stop()
        else:
            pager.guest_runs()
            if self._options.record and pager.wait_all_in():
                self._record()
            pager.may_end()

    def _record(self) -> None:
        """Keep what has been touched, while faults are still served.

        Should this engine die, its successor does it again: nothing has been let go of.
        """
        if self._lost:
            return
        trace("restore.recording")
        try:
            self._opened.record(self.statistics.touched())
        except PostcopyError as error:
            self.error = error  # the guest has all of its memory all the same
        trace("restore.recorded")

    def _wake(self) -> None:
        self._guest.wake(self._opened.image.devices)
        self.statistics.running()
        trace("restore.woken")

    # --- eager

    def _fill_first(self, pager: RestorePager) -> None:
        pager.hurry()
        pager.may_end()
        pager.run()
        self._wake_whole()

    def _fill_unwatched(self) -> None:
        for paged in self._ram:
            lost = fill_block(paged, self._opened.source(paged.block))
            if lost is not None:
                self._on_lost(lost)
        self._wake_whole()

    def _wake_whole(self) -> None:
        if self._lost:
            raise GuestError(f"the guest does not run: {self._lost[0].reason}")
        self._finish()
        self._wake()
        self.statistics.complete()
        self._progress.move(Status.COMPLETED)

    # --- the end

    def _finish(self) -> None:
        """All pages with data are in place; the others are zero, as untouched memory is."""
        trace("restore.all-in")
        self._guest.unwatch_missing()
        if self._options.lazy:
            self.statistics.complete()  # else when the guest runs
        trace("restore.unwatched")

    def _on_lost(self, lost: Lost) -> None:
        self._lost.append(lost)
        total = sum(each.pages for each in self._lost if each.block_name == lost.block_name)
        if self._options.lazy:
            self._guest.lost_pages(lost.block_name, total)

    def _loss(self) -> PostcopyError:
        pages = sum(each.pages for each in self._lost)
        return GuestError(
            f"{self._lost[0].reason}; {pages} pages are lost, and a vCPU that touches one of them fails"
        )

    def _fail(self, error: PostcopyError) -> None:
        self.error = error
        if self._progress.status in _RUNS:
            self._progress.move(Status.POSTCOPY_PAUSED)
        elif self._progress.status not in ENDED:
            self._progress.move(Status.FAILED)

    def _let_go(self) -> None:
        if self._userfaultfd is not None:
            self._userfaultfd.close()
        self._shared.close()
        if self._pager is not None:
            self._pager.close()
        self._opened.close()
        self._ram.close()
