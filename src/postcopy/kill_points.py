"""Points, by name, at which a test lets an engine die or stand still.

An engine that is killed from outside dies wherever it happens to be.  To prove that nothing is lost
at a certain step, it has to die at that very step: so the code names its steps, and the engine kills
itself with SIGKILL at the one that ``POSTCOPY_KILL_POINT`` names.  Without that variable nothing is
ever done here.

``POSTCOPY_KILL_POINT=name@/a/file`` kills only while the file is there, and removes it first: the
engine that takes over does not die in its turn.

``POSTCOPY_STALL_POINT=name@/a/socket`` makes the step wait for as long as a test keeps the connection
to that Unix socket open.  An engine that finds no listener there goes on.
"""

import os
import signal
import socket
from pathlib import Path

VARIABLE = "POSTCOPY_KILL_POINT"
STALL_VARIABLE = "POSTCOPY_STALL_POINT"

SOURCE = (
    "source.connected",
    "source.active",
    "source.guest-stopped",
)
"""Before either way of handing over."""

SOURCE_PRECOPY = (
    "source.rest-sent",
    "source.all-taken",
    "source.given-up",
    "source.end-sent",
)
SOURCE_POSTCOPY = (
    "source.discards-sent",
    "source.before-package",
    "source.package-sent",
    "source.package-taken",
    "source.pushing",
    "source.all-pushed",
    "source.pages-ended",
    "source.arrived",
)
SOURCE_RECOVERY = (
    "source.adopted",
    "source.recovery-connected",
    "source.bitmap-asked",
    "source.bitmap-taken",
    "source.resume-sent",
    "source.resume-acknowledged",
)
SNAPSHOT = (
    "snapshot.connected",
    "snapshot.active",
    "snapshot.armed",
    "snapshot.guest-stopped",
    "snapshot.frozen",
    "snapshot.guest-resumed",
    "snapshot.writing",
    "snapshot.all-saved",
    "snapshot.unwatched",
    "snapshot.all-sent",
    "snapshot.published",
)
DESTINATION = ("destination.connected",)
DESTINATION_PRECOPY = (
    "destination.all-received",
    "destination.devices-loaded",
    "destination.resumed",
    "destination.shut-sent",
)
DESTINATION_POSTCOPY = (
    "destination.advised",
    "destination.package-received",
    "destination.listening",
    "destination.package-loaded",
    "destination.owning",
    "destination.package-taken",
    "destination.running",
    "destination.nothing-missing",
    "destination.pages-ended",
    "destination.unwatched",
    "destination.postcopy-shut-sent",
)
DESTINATION_RECOVERY = (
    "destination.adopted",
    "destination.recovery-connected",
    "destination.bitmap-asked",
    "destination.bitmap-sent",
    "destination.resume-received",
    "destination.resume-acknowledged",
)
RESTORE_LAZY = (
    "restore.begun",
    "restore.watching",
    "restore.serving",
    "restore.working-set-in",
    "restore.woken",
    "restore.running",
    "restore.all-in",
    "restore.unwatched",
)
RESTORE_RECORDING = (
    "restore.recording",
    "restore.recorded",
    "restore.all-in",
    "restore.unwatched",
)
RESTORE_EAGER = (
    "restore.begun",
    "restore.watching",
    "restore.all-in",
    "restore.unwatched",
    "restore.woken",
)
RESET_POINT = (
    "reset.watching",
    "reset.kept",
)
RESET = (
    "reset.scanned",
    "reset.put-back",
)


def reached(name: str) -> None:
    """Say that the engine has come to the point ``name``: it may be its last word."""
    stall = os.environ.get(STALL_VARIABLE)
    if stall is not None:
        _stall(name, *stall.split("@", 1))
    wish = os.environ.get(VARIABLE)
    if wish is None:
        return
    wanted, _, marker = wish.partition("@")
    if wanted != name:
        return
    if marker:
        try:
            Path(marker).unlink()
        except FileNotFoundError:
            return  # it has done its work
    os.kill(os.getpid(), signal.SIGKILL)


def _stall(name: str, wanted: str, path: str) -> None:
    if name != wanted:
        return
    with socket.socket(socket.AF_UNIX) as waiting:
        try:
            waiting.connect(path)
        except OSError:
            return  # the test lets no other engine wait
        waiting.recv(1)
