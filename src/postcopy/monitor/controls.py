"""What a monitor needs: protocols of the machine, its reset point and its migration, and the event bus.

The guest's process implements them; tests use ``tests/fakes/monitor_backend.py``.  All methods may
be called from any thread, several at a time.  Each refusal is a :class:`~postcopy.errors.PostcopyError`,
whose text the client gets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from postcopy.events import EventBus
from postcopy.guest import Region, VcpuThread
from postcopy.machine.announcing import Announcer
from postcopy.machine.dirty_rate import DirtyRate
from postcopy.machine.vcpu_throttle import DirtyLimit
from postcopy.ownership import Ownership
from postcopy.parameters import NO_OVERRIDES, Capabilities, Capability, Overrides, Parameters
from postcopy.restore_options import RestoreOptions
from postcopy.statistics import MemoryMap, MigrationInfo
from postcopy.status import Status


class MachineControl(Protocol):
    """The guest as a user controls it.

    :ivar dirty_rate: measures how fast it writes to its memory; ``dirty_limit`` limits that.
    :ivar announcer: tells its network where it is.
    """

    dirty_rate: DirtyRate
    dirty_limit: DirtyLimit
    announcer: Announcer

    @property
    def run_state(self) -> str:
        """QEMU's ``RunState``: running, paused, inmigrate, finish-migrate, postmigrate..."""

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""

    @property
    def ownership(self) -> Ownership:
        """Which side owns the guest, and which command was given last."""

    @property
    def memory_bytes(self) -> int:
        """How much RAM the guest has."""

    @property
    def vcpus(self) -> Sequence[VcpuThread]:
        """The vCPUs and their threads, in order of their numbers."""

    def stop(self) -> None:
        """Stop the vCPUs and emit ``STOP``; harmless when stopped."""

    def cont(self) -> None:
        """Let them run and emit ``RESUME``; harmless when running.

        :raises WrongState: a migration owns the guest just now.
        """

    def quit(self) -> None:
        """Ask the process to end; returns at once, so that the client gets its answer."""

    def host_address(self, guest_address: int) -> int:
        """Where this process has that byte of guest RAM, by its physical address.

        :raises Refused: there is no RAM at ``guest_address``.
        """

    def regions(self) -> Sequence[Region]:
        """The RAM blocks, in the order of their guest addresses."""

    def block_at(self, guest_address: int) -> str:
        """The name of the RAM block that has that byte, such as ``microvm.ram``.

        :raises Refused: there is no RAM at ``guest_address``.
        """

    def read_physical(self, address: int, length: int) -> bytes:
        """Guest RAM by physical address; waits, without the interpreter lock, for a missing page.

        :raises Refused: some of it is not RAM.
        """


class ResetControl(Protocol):
    """The point to which one guest can go back."""

    def set_point(self, path: str | None = None) -> Mapping[str, Any]:
        """Make this moment, or an image, the point; return what it cost.

        :raises WrongState: a migration is under way, or the guest is not here.
        :raises ImageError: there is no such image, it is damaged, or of another machine.
        """

    def reset(self) -> Mapping[str, Any]:
        """Take the guest back; return what it cost.

        :raises WrongState: there is no point.
        """

    def end(self) -> None:
        """Give the point up.

        :raises WrongState: there is none.
        """


class ObjectControl(Protocol):
    """What ``object-add`` has made."""

    def add(self, kind: str, name: str, properties: Mapping[str, Any]) -> None:
        """Make an object.

        :raises Refused: it cannot be made, or the name is taken.
        """

    def remove(self, name: str) -> None:
        """Forget one.

        :raises Refused: there is none of this name.
        """


class MigrationControl(Protocol):
    """The migration subsystem of one guest, in both directions."""

    @property
    def resetting(self) -> ResetControl:
        """Its reset point."""

    @property
    def objects(self) -> ObjectControl:
        """The objects of its user."""

    @property
    def capabilities(self) -> Capabilities:
        """What is on."""

    @property
    def parameters(self) -> Parameters:
        """What is set."""

    def set_capabilities(self, changes: Mapping[Capability, bool]) -> None:
        """Switch capabilities, all of them or none.

        :raises Refused: see :meth:`~postcopy.parameters.Capabilities.with_changes`.
        :raises WrongState: a migration is in progress.
        """

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Set parameters by QEMU's names, all of them or none; works during a migration too.

        :raises Refused: see :meth:`~postcopy.parameters.Parameters.with_changes`.
        """

    def migrate(
        self, uri: str, *, resume: bool = False, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        """Begin to send the guest to ``uri``, or with ``resume`` go on with a paused postcopy.

        Returns as soon as it has begun.

        :param overrides: what this order sets for itself alone.
        :raises Refused: not such a URI, or not with these capabilities.
        :raises WrongState: not now.
        """

    def incoming(
        self, uri: str, *, exit_on_error: bool = True, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        """Listen at ``uri`` for a guest.

        :param exit_on_error: end the process when the migration fails.
        :param overrides: what this order sets for itself alone.
        :raises WrongState: not started to wait for one, or already listening.
        """

    def restore(self, options: RestoreOptions, *, exit_on_error: bool = True) -> None:
        """Restore the guest of an image here.  Returns when the image is known to fit this machine.

        :raises ImageError: the image is damaged, none, or of another machine; nothing has changed.
        :raises WrongState: not started to wait for a guest, or one has come.
        """

    def start_postcopy(self) -> None:
        """Switch over as soon as possible; harmless before ``migrate`` and after the switchover.

        :raises WrongState: the capability ``postcopy-ram`` is off.
        """

    def cancel(self) -> None:
        """Give up the outgoing migration; harmless when there is none.

        :raises WrongState: after the switchover there is no way back.
        """

    def continue_(self, state: Status) -> None:
        """Leave ``pre-switchover``.

        :raises WrongState: the status is not ``state``.
        """

    def pause(self) -> None:
        """Break a postcopy on purpose; ``migrate-pause``.  Must return without waiting.

        :raises WrongState: no postcopy is active.
        """

    def recover(self, uri: str) -> None:
        """Listen anew for the source of a paused postcopy, or go on with a paused restore.

        Returns when that is done, or, after a few seconds, while it is being done: then ``socket-address``
        tells when it listens, and the error, if it comes to one, why it does not.

        :raises WrongState: no incoming postcopy is paused.
        """

    def arrived(self) -> None:
        """The user reports that the destination has completed: nothing here is needed any more.

        :raises WrongState: no outgoing postcopy is paused.
        """

    def lost(self) -> None:
        """Give up on the source of a paused postcopy, as the parameter ``x-on-loss`` says.

        :raises WrongState: no incoming postcopy is paused, or the parameter says ``hold``.
        :raises HostCannot: this host, or this guest's accelerator, cannot poison pages.
        """

    @property
    def engine_restarts(self) -> int:
        """Engines that were put in place of one that had died, since the process began."""

    def info(self) -> MigrationInfo:
        """How it stands."""

    def memory_map(self) -> MemoryMap:
        """Where the memory is, for a watcher; a moment old at most, and shared by all that ask.

        :raises WrongState: it is not known.
        """


@dataclass(frozen=True, slots=True)
class Backend:
    """All that a monitor works on."""

    machine: MachineControl
    migration: MigrationControl
    events: EventBus
