"""Every message between a guest's process and its engine, declared once.

A message is a method of one of these protocols: its name, its arguments and its answer.  The sender
names the method (``link.call(OutgoingCommands.start_source, uri, ...)``), the receiver implements the
protocol, and mypy checks both.  What engines ask of a guest are :mod:`postcopy.guest`'s protocols.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from postcopy.guest import (
    AddressSpace,
    Description,
    DeviceState,
    Keeper,
    MappedRange,
    Ownership,
    Region,
    RunControl,
    VcpuThread,
)
from postcopy.link.values import Codec, Fd
from postcopy.ownership import Move
from postcopy.parameters import Capabilities, Capability, Parameters, Settings
from postcopy.restore_options import RestoreOptions
from postcopy.statistics import Measured, MemoryMap, MigrationInfo, RamStatistics, XbzrleStatistics
from postcopy.status import Status
from postcopy.tls_options import Authorization, AuthorizationRule, TlsOptions

BEAT_S: Final = 0.5
"""How often an engine says that it lives."""

Addresses = Sequence[Mapping[str, object]]
"""Where an engine listens, as QAPI has it."""

_Message = TypeVar("_Message", bound=Callable[..., None])


def note(message: _Message) -> _Message:
    """Declare a message that has no answer; notes keep their order."""
    message.is_note = True  # type: ignore[attr-defined]
    return message


def is_note(message: Callable[..., Any]) -> bool:
    """Whether it has no answer."""
    return getattr(message, "is_note", False)


def messages(interface: type[Any]) -> dict[str, Callable[..., Any]]:
    """What an interface declares, by name."""
    declared = vars(interface).items()
    return {name: each for name, each in declared if callable(each) and not name.startswith("_")}


GUEST_COMMANDS: Final = (RunControl, Ownership, Keeper)
"""What an engine asks of the guest's process."""


class EngineReports(Protocol):
    """What an engine tells of itself."""

    @note
    def status(self, status: Status, error: str | None, info: MigrationInfo) -> None:
        """Its job has got somewhere."""

    @note
    def fault(self, reason: str) -> None:
        """What it is about to end of."""

    @note
    def passed(self, number: int) -> None:
        """A source begins to go over all memory, for the first time, the second, and so on."""

    @note
    def progressed(self) -> None:
        """A restore has placed a page."""


class Beats(Protocol):
    """How an engine says that it does not hang."""

    @note
    def alive(self) -> None:
        """It lives."""


class WatchCommands(Protocol):
    """How it is asked to."""

    @note
    def say_alive(self) -> None:
        """Say so again and again, from a thread that does nothing else."""


class JobCommands(Protocol):
    """What every engine understands."""

    @note
    def set_parameters(self, parameters: Parameters) -> None:
        """Take over what the user has set meanwhile; a job that is still to come gets it then."""

    @note
    def set_capabilities(self, capabilities: Capabilities) -> None:
        """Take over what the user has switched meanwhile."""

    def share(self, space: AddressSpace) -> None:
        """Serve the faults of one more process that has the guest's memory mapped."""

    @note
    def pause(self) -> None:
        """Break the job's connection."""

    def info(self) -> MigrationInfo:
        """The job's figures.

        :raises WrongState: there is no job yet.
        """


class OutgoingCommands(Protocol):
    """About a guest that leaves, by migration or into an image.

    ``fds`` is the descriptor that the address means, if it means one.
    """

    def start_source(self, uri: str, settings: Settings, fds: Sequence[Fd] = ()) -> None:
        """Begin to send the guest, or to write the image of it."""

    def resume_source(self, uri: str, fds: Sequence[Fd] = ()) -> None:
        """Leave ``postcopy-paused``; nothing is said to the peer before :meth:`go_on`."""

    @note
    def go_on(self) -> None:
        """Go on with the postcopy that :meth:`resume_source` has prepared."""

    def adopt_source(self, settings: Settings) -> None:
        """Stand in for an engine that has died after switchover."""

    # Orders of a user come at any time: one that means nothing to the job does no harm.

    @note
    def start_postcopy(self) -> None:
        """Switch over as soon as possible."""

    @note
    def proceed(self) -> None:
        """Leave ``pre-switchover``."""

    @note
    def cancel(self) -> None:
        """Give up."""

    def memory_map(self) -> MemoryMap:
        """Where the memory is, for a watcher.

        :raises WrongState: no migration has begun.
        """

    def end_command(self) -> bool:
        """End a command (``exec:``) that goes on although it has been sent the whole guest.

        :return: whether there is one.
        """


class IncomingCommands(Protocol):
    """About a guest that arrives."""

    def prepare_destination(self) -> None:
        """Have memory ready before anything is sent."""

    def listen(self, uri: str, settings: Settings, fds: Sequence[Fd] = ()) -> Addresses:
        """Wait for a source; return where."""

    @note
    def accept(self) -> None:
        """Take the source that comes."""

    def recover_destination(self, uri: str, fds: Sequence[Fd] = ()) -> Addresses:
        """Listen anew for the source of a paused postcopy."""

    def adopt_destination(self, uri: str, settings: Settings, fds: Sequence[Fd] = ()) -> Addresses:
        """Stand in for an engine that has died while the guest ran; wait where it was reached."""


@dataclass(frozen=True, slots=True)
class ImageMachine:
    """What the machine of an image must be like.

    :ivar blocks: sizes in bytes, by name.
    """

    machine: str
    blocks: Mapping[str, int]
    vcpus: int


class RestoreCommands(Protocol):
    """About a guest that wakes from its image."""

    def look_at_image(self, path: str) -> ImageMachine:
        """Open an image for which there is no machine yet; return what its machine must be like."""

    def start_restore(self, options: RestoreOptions, parameters: Parameters) -> str:
        """Open the image; return what tells it from others."""

    @note
    def restore(self) -> None:
        """Wake the guest."""

    def adopt_restore(
        self, status: Status, options: RestoreOptions, parameters: Parameters
    ) -> None:
        """Stand in for an engine that has died, wherever it was."""

    @note
    def hurry(self, *, wanted: bool) -> None:
        """Something waits for the guest to be whole, or does no longer."""


@dataclass(frozen=True, slots=True)
class ImagePoint:
    """What the guest's process must keep of an image that is a reset point.

    :ivar needs_file: whether pages are read from the image still.
    """

    identity: str
    needs_file: bool
    states: Sequence[DeviceState]


class ResetCommands(Protocol):
    """About a reset point: see :mod:`postcopy.reset.reset`.

    ``copies`` are memfds, one a region; ``path`` and ``identity`` are those of the image, if it is one.
    """

    def reset_to_image(self, copies: Sequence[Fd], path: str) -> ImagePoint:
        """The point is an image; return what the guest's process must keep of it."""

    def reset_to_now(self, copies: Sequence[Fd]) -> int:
        """The point is close: return how many bytes have been copied."""

    def keep_rest(self) -> int:
        """The guest stands still, at its point: return how many bytes have been copied."""

    def put_back(self, *, everything: bool) -> int:
        """Put the memory back: what was written since, or everything; return how many pages, of 4 KiB."""

    def adopt_reset(
        self, copies: Sequence[Fd], path: str | None = None, identity: str = ""
    ) -> None:
        """Stand in for an engine that has died."""


CODEC: Final = Codec(
    (
        AddressSpace,
        Authorization,
        AuthorizationRule,
        Capabilities,
        Capability,
        Description,
        DeviceState,
        ImageMachine,
        ImagePoint,
        MappedRange,
        Measured,
        MemoryMap,
        MigrationInfo,
        Move,
        Parameters,
        RamStatistics,
        XbzrleStatistics,
        Region,
        RestoreOptions,
        Settings,
        Status,
        TlsOptions,
        VcpuThread,
    )
)
"""Of all that the messages carry."""
