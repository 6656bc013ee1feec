"""What an engine asks of a guest, whatever the guest is.

A guest is its regions, the address spaces that have them mapped, and a keeper: what holds descriptors and
page maps past an engine's death.  Its own process has all of its memory mapped; others, such as back ends
of its devices, may have parts of it (:class:`SharingProcess`).  It is our own small machine, and one day a
process with arrays or a foreign monitor; engines know no more of it than this file says.  The guest lives
in a process of its own: :mod:`postcopy.link` makes both ends of the link from the protocols here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from postcopy.ownership import Move


@dataclass(frozen=True, slots=True)
class MappedRange:
    """A part of a RAM block, as something has it mapped: a process, or the guest.

    :ivar block: the block's name.
    :ivar offset: where the part begins in the block.
    :ivar address: where it begins in the process, or among the guest-physical addresses.
    """

    block: str
    offset: int
    length_bytes: int
    address: int


@dataclass(frozen=True, slots=True)
class Region:
    """One RAM block as its owner sees it.

    ``fd`` is a memfd (or hugetlb memfd) whose bytes ``[fd_offset, fd_offset + size_bytes)`` are the
    block; ``host_address`` is where the guest's process has it mapped, which is what userfaultfd
    speaks of.

    :ivar parts: the parts of a block that is not in one piece from ``guest_address`` on.
    """

    name: str
    size_bytes: int
    page_size_bytes: int
    guest_address: int
    host_address: int
    fd: int
    fd_offset: int = 0
    parts: tuple[MappedRange, ...] = ()

    @property
    def physical_ranges(self) -> tuple[MappedRange, ...]:
        """Where the block stands among the guest-physical addresses."""
        return self.parts or (MappedRange(self.name, 0, self.size_bytes, self.guest_address),)


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device as a FULL section of the stream carries it; ``payload`` is opaque to engines."""

    name: str
    instance: int
    version: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class VcpuThread:
    """Which thread of the guest's process runs a vCPU: faults name threads, users name vCPUs."""

    index: int
    thread_id: int


@dataclass(frozen=True, slots=True)
class AddressSpace:
    """A process that has a guest's memory mapped.

    :ivar ranges: what of it, and where.
    :ivar userfaultfd: a descriptor of our own, which we close, of the userfaultfd that its memory is
        registered with; -1: with none.
    """

    process_id: int
    ranges: Sequence[MappedRange]
    userfaultfd: int = -1


class SharingProcess(Protocol):
    """Another process that has a guest's memory mapped, such as a vhost-user back end.

    The guest's process has the list of them (``OwnedGuest.shared_with``).  Each call returns within a
    bounded time, whatever the process does.
    """

    @property
    def name(self) -> str:
        """What it is, for messages: ``vhost-user back end /run/disk.sock (process 4711)``."""

    def watch_missing(self) -> AddressSpace:
        """Have the process register its mappings, for missing pages, with a userfaultfd of its own.

        It must have touched nothing of them, and its userfaultfd must not tell of changes of the address
        space (``UFFD_FEATURE_EVENT_*``).  From the return on its faults are served.

        :raises PostcopyError: it cannot do that, or does not answer.
        """

    def unwatch_missing(self) -> None:
        """Every page is in place, and its mappings have been unregistered.

        :raises PostcopyError: it does not answer; it is left alone then.
        """

    @property
    def logs_writes(self) -> bool:
        """Whether it can: else the guest can neither be migrated nor have a reset point."""

    def log_writes(self, log: int | None, size_bytes: int = 0) -> None:
        """Have the process mark its writes in this log, and in no other.

        The layout is vhost-user's: one bit for each 4096 bytes of guest-physical addresses from 0 on (byte
        ``address / 32768``, bit ``address / 4096 % 8``), set behind the write.  After the return, each
        write is marked here, and the log of the call before does not change any more.  One thread at a
        time calls this, whether the guest runs or not.  Of a process that has ended nothing is asked.

        :param log: a memfd, whose size is sealed; the caller's, and not needed afterwards.  None: no log.
        :raises PostcopyError: it does not answer; it may mark in either log.
        """

    def hold(self) -> None:
        """Let the process write nothing from the guest's next stop on, until :meth:`release`.

        If it writes nothing now, as while the guest is stopped, it does not begin to.  Does not wait.
        """

    def release(self) -> None:
        """Let it write again while the guest runs.  Does not wait; harmless unless it is held.

        A process that joins while none is held is released, too.
        """


@dataclass(frozen=True, slots=True)
class Description:
    """What does not change in a guest's life.

    :ivar machine_name: what the configuration section says, such as ``microvm``.
    :ivar kvm: whether KVM can keep a dirty log of it.
    """

    machine_name: str
    kvm: bool
    vcpu_threads: Sequence[VcpuThread]


class RunControl(Protocol):
    """Stopping and resuming a guest, and the states of its devices."""

    def describe(self) -> Description:
        """What does not change."""

    def pause(self, *, to_move: bool = False) -> int:
        """Stop every vCPU; on return none of them writes to memory.  Harmless when stopped.

        :param to_move: for the switchover of a migration.
        :return: when it began to stop them, in nanoseconds of the monotonic clock, which the host's
            processes share.
        :raises WrongState: ``to_move``, and the migration has been cancelled.
        """

    def resume(self) -> None:
        """Let the vCPUs run, unless the guest or its user wants it stopped.

        :raises GuestError: the guest is not in a state to run.
        """

    def pause_and_save(self, *, to_move: bool = False) -> Sequence[DeviceState]:
        """Stop every vCPU and return the state of all devices, ``globalstate`` last."""

    def load_devices(self, states: Sequence[DeviceState]) -> None:
        """Give the devices their state; may touch guest memory that is still missing.

        :raises GuestError: a device refuses its state; nothing runs.
        """

    def wake(self, states: Sequence[DeviceState]) -> None:
        """Give the devices their state and let the guest run, unless an engine before us has done it."""

    def throttle(self, percent: int) -> None:
        """Hold the vCPUs for so much of the time, until 0 is asked for or the engine has ended."""

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        """Hold each vCPU to so many MiB a second, until 0 is asked for or the engine has ended.

        :raises Refused: the guest has no dirty log.
        """


class Ownership(Protocol):
    """What an engine knows of where the guest runs: see :mod:`postcopy.ownership`."""

    def move(self, move: Move) -> None:
        """Say what is so, or is about to be: one of :data:`postcopy.ownership.MOVES_OF_ENGINES`.

        ``ABANDON`` also lets go of what waits for the guest's pages; it does nothing if the guest runs.

        :raises WrongState: the table has no such move now, as ``GIVE_UP`` after a cancel.
        """


class Keeper(Protocol):
    """Holds what must outlive an engine: memory, userfaultfds, page maps.

    Each descriptor that it returns is the caller's to close.
    """

    def regions(self) -> Sequence[Region]:
        """The RAM blocks, in the order of their guest addresses; the same for the guest's whole life."""

    def address_spaces(self) -> Sequence[AddressSpace]:
        """Where they are mapped: by the guest's own process."""

    def page_maps(self) -> Sequence[int]:
        """Descriptors of the page maps, one a region."""

    def keep_stream(self, section: int, sizes_bytes: Mapping[str, int]) -> None:
        """Keep what another engine cannot know: RAM's section, and blocks that are none of ours."""

    def kept_stream(self) -> tuple[int, Mapping[str, int]]:
        """What was kept so; section 0 when nothing was."""

    def lost_pages(self, block: str, pages: int) -> None:
        """So many pages of a block are lost by now."""

    def populate(self, block: str, offset: int, length_bytes: int) -> None:
        """Map memory in the guest's process too, so that a first touch there costs nothing."""

    def watch_writes(self) -> None:
        """Arm asynchronous write-protection over all RAM."""

    def unwatch_writes(self) -> None:
        """Take it off again, and stop the log of other processes."""

    def watch_snapshot(self) -> Sequence[AddressSpace]:
        """Register all RAM for a snapshot: what is protected then waits at a write.

        Nothing is protected by that alone.  Other processes that have the memory mapped write nothing from
        the guest's next stop on: their writes would not wait.
        """

    def unwatch_snapshot(self) -> None:
        """Take the registration off, and with it every protection and every wait for it."""

    def unmap_missing(self) -> None:
        """Take the pages that have not been received out of the guest's sight: a touch is a fault."""

    def watch_missing(self, *, only_still: bool = False) -> Sequence[AddressSpace]:
        """Register all RAM for faults.

        :param only_still: for an engine that takes over from another.
        :return: the guest's own process, and then each other one that has its memory mapped.
        :raises WrongState: ``only_still``, and nothing is missing any more.
        :raises GuestError: another process cannot be served so; the message names it.
        """

    def unwatch_missing(self) -> None:
        """All pages are in place: take the registrations off, and with them every waiting fault."""

    def start_dirty_log(self) -> None:
        """Have KVM note the writes of the vCPUs."""

    def stop_dirty_log(self) -> None:
        """Stop noting."""

    def fetch_dirty_log(self, block: str) -> bytes:
        """Fetch and clear the log of one RAM block: packed bits, one a 4 KiB page."""

    def start_shared_log(self) -> bool:
        """Have the other processes that have its memory mapped log their writes, unless they do.

        :return: whether there is a log; False: no other process has had the memory, and none is given it
            before :meth:`stop_shared_log`.
        :raises PostcopyError: a process cannot; the message names it, and none logs.
        """

    def fetch_shared_log(self) -> bytes:
        """Fetch and clear their log, up to its last bit: see :meth:`SharingProcess.log_writes`.

        Every write that had ended before the call is in it, or was in one fetched before.

        :raises PostcopyError: a process does not answer; the message names it.
        """

    def stop_shared_log(self) -> None:
        """They need not log any more.  Does not wait for them."""


class Saving(Protocol):
    """The devices of a stopped guest are being saved.

    :ivar began_ns: when its vCPUs began to be stopped: see :meth:`RunControl.pause`.
    """

    began_ns: int

    def states(self) -> Sequence[DeviceState]:
        """Wait for their states."""

    def settle(self) -> None:
        """Wait until nothing of it is under way: a guest that is let run then is not stopped again."""


class Resuming(Protocol):
    """The vCPUs are being let run."""

    def wait(self) -> None:
        """Wait until they run; see :meth:`RunControl.resume`."""


class LeavingGuest(Ownership, Protocol):
    """What a source asks of a guest, but for its memory."""

    @property
    def machine_name(self) -> str:
        """See :class:`Description`."""

    def pause_to_save(self) -> Saving:
        """Stop every vCPU, and have the devices saved while the caller does something else.

        :raises WrongState: the migration has been cancelled.
        """

    def resume(self) -> None:
        """See :meth:`RunControl.resume`."""

    def throttle(self, percent: int) -> None:
        """See :meth:`RunControl.throttle`."""

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        """See :meth:`RunControl.limit_dirty_rate`."""


class Guest(RunControl, LeavingGuest, Keeper, Protocol):
    """A guest as engines use it.  Every method may be called from any thread."""

    @property
    def kvm(self) -> bool:
        """See :class:`Description`."""

    def vcpu_threads(self) -> Sequence[VcpuThread]:
        """The threads that run vCPUs, in order of the vCPUs' numbers."""

    def begin_to_resume(self) -> Resuming:
        """As :meth:`RunControl.resume`, while the caller does something else."""
