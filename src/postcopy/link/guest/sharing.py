"""Other processes that have the guest's memory mapped, while pages of it are missing.

Each has a userfaultfd of its own.  The guest's process keeps a duplicate of its descriptor: should an
engine die, the process waits for its pages until the next engine has come.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Protocol

from postcopy.abi.userfaultfd import Feature
from postcopy.errors import GuestError, KernelError, PostcopyError
from postcopy.guest import AddressSpace, Region, SharingProcess
from postcopy.kernel import threads
from postcopy.kernel.userfaultfd import MISSING_MODE, Userfaultfd
from postcopy.kernel.userfaultfd_open import features_of
from postcopy.link.values import Fd

STEP_BYTES: Final = 16 << 20
"""What is let go of in one call: meanwhile its process can handle no fault, and 4 GiB take 20 ms."""

_REFUSED: Final = (
    Feature.EVENT_FORK
    | Feature.EVENT_REMAP
    | Feature.EVENT_REMOVE
    | Feature.EVENT_UNMAP
    | Feature.SIGBUS
)
"""While the event of a change has not been read, no page can be placed; and no wait is reported with
``SIGBUS``."""


class SharingGuest(Protocol):
    """What is asked of a guest: see :class:`postcopy.link.guest.keeper.OwnedGuest`."""

    def regions(self) -> Sequence[Region]:
        """Its RAM blocks."""

    def shared_with(self) -> Sequence[SharingProcess]:
        """The other processes that have its memory mapped now."""

    def tell_of_sharing(self, joined: Callable[[SharingProcess], None]) -> None:
        """Call this with each process that its memory is shared with from now on, before it runs."""


@dataclass(frozen=True, slots=True)
class _Watched:
    process: SharingProcess
    space: AddressSpace
    userfaultfd: Userfaultfd

    def register(self) -> None:
        """Register what the process has registered, and for minor faults, too.

        Else a thread of it would see a page that an engine is writing: one that is in the file already,
        and only half of it.

        :raises GuestError: that is not possible.
        """
        what = f"{self.process.name} cannot be served missing pages"
        try:
            if features_of(self.userfaultfd.fd) & _REFUSED:
                raise GuestError(
                    f"{what}: its userfaultfd reports more than page faults, or none; open it without "
                    "UFFD_FEATURE_EVENT_* and UFFD_FEATURE_SIGBUS"
                )
            for part in self.space.ranges:
                self.userfaultfd.register(part.address, part.length_bytes, MISSING_MODE)
        except KernelError as error:
            raise GuestError(f"{what}: {error}") from error

    def check_nothing_mapped(self, regions: Sequence[Region], page_maps: Sequence[int]) -> None:
        """Refuse a process that has pages mapped which are still to come.

        It would read what is in memory now, and no fault would tell of it.

        :raises GuestError: there are some, or it cannot be found out.
        """
        from postcopy.link.guest import missing_pages  # needs numpy

        name = self.process.name
        try:
            mapped = missing_pages.mapped(self.space, regions, page_maps)
        except KernelError as error:
            raise GuestError(f"{name}: what it has mapped cannot be seen: {error}") from error
        if mapped:
            raise GuestError(
                f"{name} has mapped {mapped} pages of the guest's memory before they have come; it must "
                "neither populate nor lock that memory (mlockall: dpdk-testpmd needs --no-mlockall)"
            )

    def poison(self, regions: Sequence[Region], page_maps: Sequence[int]) -> None:
        """Make each touch of a missing page fail."""
        from postcopy.link.guest import missing_pages

        with suppress(KernelError):  # it has ended
            missing_pages.poison_ranges(self.userfaultfd, self.space.ranges, regions, page_maps)

    def sent(self) -> AddressSpace:
        """What an engine gets of it."""
        return replace(self.space, userfaultfd=Fd(self.userfaultfd.fd))

    def unregister(self) -> None:
        """Let its threads go on, and let go of the descriptor."""
        with self.userfaultfd, suppress(KernelError):  # it has ended, or has let go of them itself
            for part in self.space.ranges:
                self.userfaultfd.unregister_in_steps(part.address, part.length_bytes, STEP_BYTES)


class WatchedProcesses:
    """The processes that wait for missing pages of one guest, besides its own.

    :param guest: whose memory it is; :meth:`join` is to be called with each process that joins.
    :param page_maps: descriptors of its page maps, one a region.
    :param joined: told of one that has been added while pages are missing; its descriptor is not its to
        close.
    """

    def __init__(
        self,
        guest: SharingGuest,
        page_maps: Callable[[], Sequence[int]],
        joined: Callable[[AddressSpace], None],
    ) -> None:
        self._guest = guest
        self._page_maps = page_maps
        self._joined = joined
        self._lock = threading.Lock()  # not the keeper's: a process may take its time to answer
        self._watched: dict[SharingProcess, _Watched] | None = None
        self._telling: threading.Thread | None = None  # of the end of the watch before

    def watch(self) -> Sequence[AddressSpace]:
        """Have each of them register its mappings, unless they have; all of them or none.

        :raises PostcopyError: one of them cannot.
        """
        with self._lock:
            if self._watched is None:
                self._watched = {}
                try:
                    for process in self._guest.shared_with():
                        self._watch(process)
                except BaseException:
                    self._unwatch()
                    raise
            return [each.sent() for each in self._watched.values()]

    def join(self, process: SharingProcess) -> None:
        """Have one register its mappings that the memory is shared with from now on, if pages are missing.

        The descriptors of those that have ended are let go of.

        :raises PostcopyError: it cannot.
        """
        space = self._join(process)
        if space is None:
            return
        try:
            self._joined(space)  # not under the lock: an engine may take its time
        finally:
            os.close(space.userfaultfd)

    def _join(self, process: SharingProcess) -> AddressSpace | None:
        """Have it watched, if that is still to be done."""
        with self._lock:
            if self._watched is None or process in self._watched:
                return None
            left = self._guest.shared_with()
            for other in [each for each in self._watched if each not in left]:
                self._watched.pop(other).userfaultfd.close()
            try:
                self._watch(process)
            except BaseException:
                if process in self._watched:
                    self._watched.pop(process).unregister()
                raise
            space = self._watched[process].space
            return replace(space, userfaultfd=Fd(os.dup(self._watched[process].userfaultfd.fd)))

    def _watch(self, process: SharingProcess) -> None:
        assert self._watched is not None
        if self._telling is not None:
            self._telling.join()  # one thing after the other
            self._telling = None
        space = process.watch_missing()
        self._watched[process] = watched = _Watched(
            process, space, Userfaultfd.from_fd(space.userfaultfd)
        )
        watched.register()
        if page_maps := self._page_maps():
            watched.check_nothing_mapped(self._guest.regions(), page_maps)

    def unwatch(self) -> None:
        """Every page is in place: take the registrations off, with every waiting fault."""
        with self._lock:
            self._unwatch()

    def _unwatch(self) -> None:
        watched, self._watched = self._watched or {}, None
        for each in watched.values():
            each.unregister()
        if watched:
            # A process that hangs is waited for by its own front end alone: no monitor, no vCPU does.
            thread = threading.Thread(
                target=_tell, args=(list(watched),), name="sharing", daemon=True
            )
            if threads.start_if_possible(thread):
                self._telling = thread
            else:
                _tell(list(watched))

    def poison(self, page_maps: Sequence[int]) -> None:
        """Make each touch of a missing page fail.

        :param page_maps: their descriptors, one a region.
        """
        with self._lock:
            for each in (self._watched or {}).values():
                each.poison(self._guest.regions(), page_maps)


def _tell(processes: Sequence[SharingProcess]) -> None:
    """Tell each of them that its memory is not watched any more."""
    for process in processes:
        with suppress(PostcopyError):
            process.unwatch_missing()
