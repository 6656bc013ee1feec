"""Trace points: the named steps of a migration, snapshot, restore or reset.

``postcopy run --trace FILE`` has each process of a machine append a line of JSON to FILE for each step::

    {"time_ns": 1764486000123456789, "pid": 4711, "point": "source.package-sent", "bytes": 5120}

Two environment variables, which a machine's engines inherit, name the subscribers:

* ``POSTCOPY_TRACE_FILE``: the path of such a file.
* ``POSTCOPY_TRACE_CALL``: ``module:function``, imported and called as ``function(point, fields)`` in the
  thread that takes the step, before it goes on.  Tests kill and stall engines so.

Without either, a trace point costs two look-ups of the environment.  ``docs/tracing.md`` is made from the
tables below by ``scripts/draw_tracing.py``.
"""

import contextlib
import functools
import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

FILE_VARIABLE: Final = "POSTCOPY_TRACE_FILE"
CALL_VARIABLE: Final = "POSTCOPY_TRACE_CALL"

Subscriber = Callable[[str, Mapping[str, Any]], None]

SOURCE: Final = {
    "source.connected": "the main channel is open",
    "source.active": "tracking of writes is on, and pages are sent",
    "source.guest-stopped": "the guest stands still",
}
SOURCE_PRECOPY: Final = {
    "source.rest-sent": "the last pages and the devices have been sent",
    "source.all-taken": "the destination has acknowledged all of it",
    "source.given-up": "the guest is not the source's any more",
    "source.end-sent": "the end of the stream has been sent",
}
SOURCE_POSTCOPY: Final = {
    "source.discards-sent": "the destination knows which pages are out of date",
    "source.before-package": "the devices are saved, and the guest is given up",
    "source.package-sent": "the packaged devices have been sent",
    "source.package-taken": "the destination has loaded the package",
    "source.pushing": "pages are pushed in the background",
    "source.all-pushed": "no page is left to push",
    "source.pages-ended": "the end of the pages has been sent",
    "source.arrived": "the destination has everything",
}
SOURCE_RECOVERY: Final = {
    "source.adopted": "this engine takes the place of one that died",
    "source.recovery-connected": "a new channel is open",
    "source.bitmap-asked": "the destination has been asked which pages it has",
    "source.bitmap-taken": "its answer has come",
    "source.resume-sent": "the order to resume has been sent",
    "source.resume-acknowledged": "the destination resumes",
}
SNAPSHOT: Final = {
    "snapshot.connected": "the file is open",
    "snapshot.active": "the snapshot has begun",
    "snapshot.armed": "memory can be write-protected",
    "snapshot.guest-stopped": "the guest stands still",
    "snapshot.frozen": "memory is write-protected",
    "snapshot.guest-resumed": "the guest runs on",
    "snapshot.writing": "a batch of pages is written",
    "snapshot.all-saved": "every page has been read",
    "snapshot.unwatched": "memory is not watched any more",
    "snapshot.all-sent": "all bytes have been written",
    "snapshot.synced": "the disk has all of it, or the command has ended; it can still be cancelled",
    "snapshot.published": "the file has its name",
}
DESTINATION: Final = {
    "destination.connected": "the source has connected",
}
DESTINATION_PRECOPY: Final = {
    "destination.all-received": "the stream has come to its end",
    "destination.devices-loaded": "the devices are loaded",
    "destination.resumed": "the guest runs here",
    "destination.shut-sent": "the source has been told",
}
DESTINATION_POSTCOPY: Final = {
    "destination.advised": "postcopy may come",
    "destination.package-received": "the packaged devices have come",
    "destination.listening": "faults are served",
    "destination.package-loaded": "the devices are loaded",
    "destination.owning": "the guest is this side's",
    "destination.package-taken": "the source has been told",
    "destination.running": "the guest runs here",
    "destination.nothing-missing": "every page has come",
    "destination.pages-ended": "the source has ended the pages",
    "destination.unwatched": "memory is not watched any more",
    "destination.postcopy-shut-sent": "the source has been told",
}
DESTINATION_RECOVERY: Final = {
    "destination.adopted": "this engine takes the place of one that died",
    "destination.recovery-connected": "the source has connected again",
    "destination.bitmap-asked": "the source asks which pages are here",
    "destination.bitmap-sent": "the answer has been sent",
    "destination.resume-received": "the source resumes",
    "destination.resume-acknowledged": "it has been told that this side does",
}
RESTORE_LAZY: Final = {
    "restore.begun": "the image is open",
    "restore.watching": "memory is watched",
    "restore.serving": "faults are served",
    "restore.working-set-in": "the recorded working set has been placed",
    "restore.woken": "the guest may run",
    "restore.running": "the guest runs",
    "restore.all-in": "all memory is here",
    "restore.unwatched": "memory is not watched any more",
}
RESTORE_RECORDING: Final = {
    "restore.recording": "the working set is being recorded",
    "restore.recorded": "the working set has been written",
    "restore.all-in": "all memory is here",
    "restore.unwatched": "memory is not watched any more",
}
RESTORE_EAGER: Final = {
    "restore.begun": "the image is open",
    "restore.watching": "memory is watched",
    "restore.all-in": "all memory is here",
    "restore.unwatched": "memory is not watched any more",
    "restore.woken": "the guest may run",
}
RESET_POINT: Final = {
    "reset.watching": "writes are tracked",
    "reset.kept": "the point is set",
}
RESET: Final = {
    "reset.scanned": "the pages written since are known",
    "reset.put-back": "they are put back",
}
GUEST: Final = {
    "guest.order": "an order has been accepted: its name, direction and URI",
    "guest.owner": "the guest has another owner: see docs/ownership.md",
    "guest.status": "a migration, snapshot or restore has another status",
    "guest.engine-started": "an engine has been put to work: its process",
    "guest.engine-ended": "the link to it has ended: its process",
}
"""Those of the guest's process; all others are of its engines."""


def trace(point: str, /, **fields: Any) -> None:
    """Tell the subscribers that the step ``point`` has been taken.

    :param fields: what JSON has: numbers, strings, lists of them.
    """
    file, call = os.environ.get(FILE_VARIABLE), os.environ.get(CALL_VARIABLE)
    if file is not None:
        _append(file, point, fields)
    if call is not None:
        _subscriber(call)(point, fields)


def _append(file: str, point: str, fields: Mapping[str, Any]) -> None:
    import json  # most processes are not traced

    said = {"time_ns": time.time_ns(), "pid": os.getpid(), "point": point, **fields}
    line = json.dumps(said).encode() + b"\n"
    with contextlib.suppress(OSError):  # a full disk must not end a migration
        fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, line)  # one call: the lines of several processes do not mix
        finally:
            os.close(fd)


@functools.cache
def _subscriber(call: str) -> Subscriber:
    module, _, name = call.partition(":")
    found: Subscriber = getattr(importlib.import_module(module), name)
    return found
