"""Every error of this package, and whose doing it is.

::

    PostcopyError
    ├── WrongState           you: not possible now; the status stays as it is
    ├── Refused              you: not possible at all with these settings, said before anything moved
    │   └── HostCannot       this host lacks something; ``cure`` is what to do about it
    ├── KernelError          a kernel call failed: its name, errno and the cure
    │   └── PageExists       harmless: another thread placed the page before us
    ├── ChannelError         the way to the peer
    │   ├── CannotConnect    no listener, or no such address: nothing was sent
    │   ├── CannotListen     the address is taken or not ours
    │   └── ChannelBroken    it worked and then broke: pause and recover, or fail before switchover
    ├── StreamError          the peer's (or a file's) bytes are wrong; ``offset`` says where
    │   └── StreamCut        they end too early
    ├── ImageError           a file is not what it must be: which file, what, and where
    ├── RingError            what a driver wrote into a virtqueue is wrong: which, and where
    ├── VhostUserError       a vhost-user peer's message is wrong: which, and where
    ├── GuestError           the guest itself cannot go on: a vCPU failed, a device refused its state
    ├── EngineDied           the engine process is gone; the guest's process decides what that means
    └── MigrationFailed      what a caller of the Python API gets for a migration that did not happen
        ├── MigrationCancelled
        └── NeedsRecovery    after switchover: both sides hold all they have and wait for ``recover``

A message is one line: what, why, and (after a semicolon) what to do.
"""

import errno as _errno
import os
from enum import StrEnum


class Reason(StrEnum):
    """Why an order was refused, for a program; the text is for its user."""

    SETTINGS = "settings"
    """The order, or its options, cannot work; another order may."""
    STATE = "state"
    """The machine's present state does not allow it."""
    BUSY = "busy"
    """A migration, a snapshot or a restore is under way; it may be possible after its end."""
    OWNER = "owner"
    """The guest is not this machine's: it has not arrived, or has moved away."""
    HOST = "host"
    """The machine's host lacks something; the text says the cure."""
    COMMAND = "command"
    """The machine has no such command."""
    UNKNOWN = "unknown"
    """The machine does not say: a stock QEMU tells its user only."""


class PostcopyError(Exception):
    """The root; never raised itself."""

    reason: Reason | None = None
    """Why an order was refused; None: it is no refusal."""


class WrongState(PostcopyError):
    """You asked for something that the present state does not allow; nothing has changed."""

    def __init__(self, text: str, reason: Reason = Reason.STATE) -> None:
        super().__init__(text)
        self.reason = reason


class Refused(PostcopyError):
    """The settings cannot work; refused before any state changed.

    :ivar reason: for a program; what a machine of ours says in ``x-reason`` of its answer.
    """

    def __init__(self, text: str, reason: Reason = Reason.SETTINGS) -> None:
        super().__init__(text)
        self.reason = reason


class HostCannot(Refused):
    """What was asked for is lacking on this host.

    :param what: what is missing, and why it is needed.
    :param cure: the one command or action that mends it.
    """

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}; {cure}", Reason.HOST)
        self.what = what
        self.cure = cure

    def because(self, why: str) -> "HostCannot":
        """Say what it is needed for: the same lack, and its cure, behind other words."""
        return HostCannot(f"{why}: {self.what}", self.cure)


_CURES = {
    _errno.ENOMEM: "free some of the host's memory",
    _errno.ENOBUFS: "free some of the host's memory",
    _errno.ENOSPC: "make room on the disk",
    _errno.EMFILE: "raise the limit of open files (ulimit -n)",
    _errno.ENFILE: "raise the host's limit of open files (sysctl fs.file-max)",
    _errno.EIO: "see what the kernel says of it (dmesg)",
}


class KernelError(PostcopyError):
    """A kernel call failed.

    :param call: the call or ioctl by its kernel name.
    :param errno: as the kernel gave it.
    :param detail: what it was about (an address, a path), and the cure where there is a better one than
        the errno tells of.
    """

    def __init__(self, call: str, errno: int, detail: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{call} failed: {os.strerror(errno)} ({name})"
        if detail:
            text = f"{text}: {detail}"
        if "; " not in text and errno in _CURES:
            text = f"{text}; {_CURES[errno]}"
        super().__init__(text)
        self.call = call
        self.errno = errno
        self.detail = detail


class PageExists(KernelError):
    """Another thread placed this page before us; what is there is at least as new."""


class ChannelError(PostcopyError):
    """Something about the way to the peer."""


class CannotConnect(ChannelError):
    """The peer could not be reached; nothing has been sent."""


class CannotListen(ChannelError):
    """The address cannot be listened on."""


class ChannelBroken(ChannelError):
    """The channel worked and then broke, or the peer closed it too early."""


_MOST_CHARACTERS = 400


def on_one_line(text: str) -> str:
    """Make a text of others, or with one in it, fit for a message.

    What cannot be printed, such as the end of a line or the beginning of an order to a terminal, is
    escaped as Python writes it; a long text is cut.
    """
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}..."
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class _WrongBytes(PostcopyError):
    """What others have written is wrong, and where.

    :param message: what is wrong.
    :param offset: bytes from the beginning, where there is such a place.
    """

    def __init__(self, message: str, offset: int | None = None) -> None:
        self.message = on_one_line(message)
        where = "" if offset is None else f" (at byte {offset:#x})"
        super().__init__(f"{self.message}{where}")
        self.offset = offset


class StreamError(_WrongBytes):
    """The bytes of a peer or a file are not a migration stream that we can take.

    ``message`` is in QEMU's words where QEMU has any; ``offset`` counts from the start of the stream (or
    package) to the element at fault.
    """


class StreamCut(StreamError):
    """The stream ended in the middle of an element."""


class ImageError(PostcopyError):
    """An image, manifest, chunk, working set or recorded run is not what it must be.

    :param path: the file.
    :param message: what is wrong.
    :param offset: bytes from the start of the file to what is wrong, where there is such a place.
    """

    def __init__(
        self, path: str | os.PathLike[str], message: str, offset: int | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.message = on_one_line(message)
        where = "" if offset is None else f" (at byte {offset:#x})"
        super().__init__(f"{self.path}: {self.message}{where}")
        self.offset = offset


class RingError(_WrongBytes):
    """What a driver wrote into a virtqueue, or a request in it, is not what it must be.

    ``offset`` counts from the start of the ring, or of its descriptor table.
    """


class VhostUserError(_WrongBytes):
    """A vhost-user peer's message cannot be, or not at this moment.

    ``message`` begins with the name of the peer's; ``offset`` counts from its start, the header included.
    """


class GuestError(PostcopyError):
    """The guest cannot go on, or cannot take what it was given."""


class EngineDied(PostcopyError):
    """The engine process ended without having finished."""


class MigrationFailed(PostcopyError):
    """The migration did not happen; the source's guest is where it was."""


class MigrationCancelled(MigrationFailed):
    """It was cancelled; the source's guest runs on."""


class NeedsRecovery(MigrationFailed):
    """Broken after switchover: nothing is lost; both sides wait to be recovered."""
