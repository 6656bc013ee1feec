"""Every kind of URI, and what can be done over it: the table behind ``docs/transports.md``.

``PYTHONPATH=tests python -m fakes.transports`` writes the page.
"""

import itertools
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from fakes import carry
from fakes.pair import Side
from postcopy.parameters import NO_OVERRIDES, Capability, Overrides
from postcopy.status import Status

PAGE: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "transports.md"
_MARK: Final = "<!-- the table; written by tests/fakes/transports.py -->\n"


class Way:
    """One kind of URI, for one journey.

    :ivar live: both sides are there at the same time; else the stream is saved first and loaded then.
    """

    live = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def listen(self, order: Callable[[str], str]) -> None:
        """Have a side wait for the guest: ``order`` is called with the URI, and gives where that is."""
        self.where = order(self.incoming())

    def send(self, order: Callable[[str], object]) -> None:
        """Have a side send: ``order`` is called with the URI."""
        order(self.outgoing())

    def incoming(self) -> str:
        raise NotImplementedError

    def outgoing(self) -> str:
        return self.where

    def carry(self, source: Side, destination: Side, overrides: Overrides = NO_OVERRIDES) -> None:
        """Begin to migrate; of what is saved first the source has completed on return."""
        migrate = partial(source.control.migrate, overrides=overrides)
        if self.live:
            self.listen(destination.listen)
            self.send(migrate)
            return
        self.send(migrate)
        source.wait(Status.COMPLETED)
        self.listen(destination.listen)

    def recover(self, source: Side, destination: Side) -> None:
        """Go on with a paused postcopy, over another channel of the kind."""
        self.listen(lambda uri: recovered_at(destination, uri))
        self.send(lambda uri: source.control.migrate(uri, resume=True))

    def path(self) -> Path:
        """Another name for a file or socket."""
        return self.folder / f"way-{next(self._numbers)}"


def recovered_at(destination: Side, uri: str) -> str:
    """Wait for the source to come back; return where that can be reached."""
    destination.control.recover(uri)
    addresses = destination.control.info().socket_address
    if not uri.startswith("tcp:"):
        return uri
    host, port = addresses[0]["host"], addresses[0]["port"]
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


class Tcp(Way):
    def incoming(self) -> str:
        return "tcp:127.0.0.1:0"


class Tcp6(Way):
    def incoming(self) -> str:
        return "tcp:[::1]:0"


class Unix(Way):
    def incoming(self) -> str:
        return f"unix:{self.path()}"


class Exec(Way):
    """A command that carries to a listener, as socat or ssh do."""

    def incoming(self) -> str:
        return f"unix:{self.path()}"

    def outgoing(self) -> str:
        return carry.command(self.where)


class Descriptors(Way):
    """Two descriptors of this process, which are given away with the order."""

    def listen(self, order: Callable[[str], str]) -> None:
        theirs, self.ours = self.ends()
        try:
            order(f"fd:{theirs}")
        finally:
            os.close(theirs)

    def send(self, order: Callable[[str], object]) -> None:
        try:
            order(f"fd:{self.ours}")
        finally:
            os.close(self.ours)

    def ends(self) -> tuple[int, int]:
        raise NotImplementedError


class SocketPair(Descriptors):
    def ends(self) -> tuple[int, int]:
        theirs, ours = socket.socketpair()
        return theirs.detach(), ours.detach()


class Pipe(Descriptors):
    def ends(self) -> tuple[int, int]:
        return os.pipe()


class OpenFile(Way):
    live = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file = self.path()

    def send(self, order: Callable[[str], object]) -> None:
        self._with(os.O_RDWR | os.O_CREAT, order)

    def listen(self, order: Callable[[str], str]) -> None:
        self._with(os.O_RDONLY, order)

    def _with(self, flags: int, order: Callable[[str], object]) -> None:
        fd = os.open(self._file, flags)
        try:
            order(f"fd:{fd}")
        finally:
            os.close(fd)


class OffsetFile(Way):
    live = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = self.path()
        file.write_bytes(b"X" * 8192)
        self.where = f"file:{file},offset=0x1000"

    def incoming(self) -> str:
        return self.where


KINDS: Final[Mapping[str, type[Way]]] = {
    "tcp:HOST:PORT": Tcp,
    "tcp:[IPv6]:PORT": Tcp6,
    "unix:PATH": Unix,
    "fd: of a socket": SocketPair,
    "fd: of a pipe": Pipe,
    "fd: of a file": OpenFile,
    "exec:COMMAND": Exec,
    "file:PATH,offset=N": OffsetFile,
}

PRECOPY, ANSWERS, POSTCOPY, PREEMPT, RECOVERY, SNAPSHOT, PLACES, LATER, CANCEL, PAUSE = FEATURES = (
    "precopy",
    "return-path",
    "postcopy-ram",
    "postcopy-preempt",
    "recovery",
    "background-snapshot",
    "mapped-ram",
    "saved, loaded later",
    "cancel",
    "pause",
)
NEEDS: Final[Mapping[str, tuple[Capability, ...]]] = {
    PRECOPY: (),
    ANSWERS: (Capability.RETURN_PATH,),
    POSTCOPY: (Capability.POSTCOPY_RAM,),
    PREEMPT: (Capability.POSTCOPY_RAM, Capability.POSTCOPY_PREEMPT),
    RECOVERY: (Capability.POSTCOPY_RAM,),
    SNAPSHOT: (Capability.BACKGROUND_SNAPSHOT,),
    PLACES: (Capability.MAPPED_RAM,),
    LATER: (),
    CANCEL: (),
    PAUSE: (Capability.POSTCOPY_RAM,),
}
"""The capabilities that are on."""

SILENT: Final = frozenset({"fd: of a pipe", "fd: of a file", "file:PATH,offset=N"})
STORED: Final = frozenset({"fd: of a file", "file:PATH,offset=N", "exec:COMMAND"})
MULTI: Final = frozenset({"tcp:HOST:PORT", "tcp:[IPv6]:PORT", "unix:PATH"})
REFUSALS: Final = {
    POSTCOPY: "postcopy needs a channel that answers",
    RECOVERY: "postcopy needs a channel that answers",
    PAUSE: "postcopy needs a channel that answers",
    ANSWERS: "return-path needs a channel that answers",
    PREEMPT: "Migration requires multi-channel URIs (e.g. tcp)",
    PLACES: "Migration requires seekable transport (e.g. file)",
}


def refusal(kind: str, feature: str) -> str | None:
    """How the order is refused before anything moves, or None."""
    works = {
        ANSWERS: kind not in SILENT,
        POSTCOPY: kind not in SILENT,
        RECOVERY: kind not in SILENT,
        PAUSE: kind not in SILENT,
        PREEMPT: kind in MULTI,
        PLACES: kind.startswith("file:"),
    }
    return None if works.get(feature, True) else REFUSALS[feature]


def can(kind: str, feature: str) -> bool:
    """Whether a journey is made of it."""
    return refusal(kind, feature) is None and (feature != LATER or kind in STORED)


def table() -> str:
    """The table of the manual."""
    lines = [
        f"| | {' | '.join(f'`{kind}`' for kind in KINDS)} |",
        "| --- |" + " --- |" * len(KINDS),
    ]
    for feature in FEATURES:
        cells = ("yes" if can(kind, feature) else "no" for kind in KINDS)
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, mark, rest = text.partition(_MARK)
    assert mark, "the page has lost the mark before its table"
    _, _, after = rest.partition("\n\n")
    return f"{before}{mark}{table()}\n{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
