"""The reset point of a guest, as its own process keeps it.

A guest with a point can go back to it, time after time, at the price of what it has written since.  An
engine keeps the pages (:mod:`postcopy.reset.reset`); here is what outlives it: the states of the
devices, the memfds of the copy, and the userfaultfd by which the kernel tracks writes.  So an engine that
dies while the guest runs is replaced at the next reset, and nothing is lost.  One that dies in the midst
of a reset leaves memory of two times: its successor puts all of it back, and the guest stands still until
then.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from postcopy.errors import (
    EngineDied,
    GuestError,
    HostCannot,
    ImageError,
    PostcopyError,
    WrongState,
)
from postcopy.kernel import memfd
from postcopy.kernel.calls import close_all, open_all
from postcopy.kernel.userfaultfd import WRITE_FEATURES, Userfaultfd
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.engine_slot import EnginePool, EngineSlot
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.link.guest.outgoing import check_logged
from postcopy.link.guest.owned_guest import OwnedGuest
from postcopy.link.protocol import ResetCommands
from postcopy.link.rpc import Link
from postcopy.link.values import sent

_TRIES: Final = 3
_CLOSE_S: Final = 2.0
_DIED: Final = "the engine process died while the reset point was set; set it again"


@dataclass(slots=True)
class _Point:
    """Where the guest can go back to.

    :ivar file: which file the image is; None: the point is a moment of the guest itself.
    :ivar copies: memfds, one a region.
    :ivar path: of an image that every engine needs; None: the copies are all.
    :ivar identity: of that image, once it has been opened.
    :ivar devices: takes them back.
    :ivar whole: all memory is to be put back next time, since it is not known what was written.
    :ivar torn: a reset was begun and has not been finished.
    """

    file: tuple[Any, ...] | None
    copies: list[int]
    path: str | None
    identity: str = ""
    devices: Callable[[], None] = lambda: None
    whole: bool = True
    torn: bool = False


class Resetting:
    """The reset point of one guest; any thread may call any method.

    :param check: raises what speaks against a point now: a migration, or a guest that is not here.
        Called under ``lock``, as the check for a point is when a migration begins.
    :param complete: waits until a guest that is being restored is whole.
    """

    def __init__(
        self,
        guest: OwnedGuest,
        keeper: GuestKeeper,
        pool: EnginePool,
        lock: AbstractContextManager[object],
        check: Callable[[], None],
        complete: Callable[[], None],
    ) -> None:
        self._guest = guest
        self._keeper = keeper
        self._engines = EngineSlot(lambda _: keeper.handlers(), self._engine_ended, pool)
        self._movable = lock
        self._check = check
        self._complete = complete
        self._lock = threading.Lock()  # of all below; one order at a time
        self._point: _Point | None = None

    # --- orders

    def set_point(self, path: str | None = None) -> dict[str, int]:
        """Make the present moment the point, or an image that was taken before.

        The point that there was is given up, unless it is the same image.  The first reset to an image
        puts all memory back, since what was written before has not been tracked.

        :return: ``pause-us``: how long the guest stood still; ``copied-bytes``.
        :raises WrongState: a migration is under way, or the guest is not here, or another process writes to
            its memory without a log.
        :raises ImageError: there is no such image, it is damaged, or of another machine.
        :raises HostCannot: writes cannot be tracked here, or there is no memory for a copy.
        """
        with self._lock:
            file = _identify(path)
            point = self._point
            if point is not None and file is not None and point.file == file:
                return {"pause-us": 0, "copied-bytes": 0}
            if point is not None and point.torn:
                raise WrongState("the last reset was not finished: 'x-reset' tries again")
            _check_reset(self._guest)
            check_logged(self._guest)
            self._complete()
            self._end()
            return self._begin(file)

    def reset(self) -> dict[str, Any]:
        """Take the guest back to its point.

        :return: ``pages``: of 4 KiB that were put back; ``us``: how long the guest stood still;
            ``whole``: all memory was looked at, as after the death of an engine.
        :raises WrongState: there is no point.
        :raises GuestError: it could not be finished; the guest stands still, and may be reset again.
        """
        with self._lock:
            point = self._point
            if point is None:
                raise WrongState(
                    "there is no reset point; set one (x-reset-point, 'postcopy reset --point')"
                )
            begun_ns = time.monotonic_ns()
            self._guest.pause()
            try:
                point.torn, whole, point.whole = True, point.whole, True
                pages, whole = self._put_back(point, whole=whole)
                point.devices()
            except PostcopyError as error:
                raise GuestError(
                    f"the reset could not be finished, and the guest stays stopped: {error}; 'x-reset' "
                    "tries again"
                ) from error
            point.torn = point.whole = False
            self._guest.resume()
            us = (time.monotonic_ns() - begun_ns) // 1000
            return {"pages": pages, "us": us, "whole": whole}

    def end(self) -> None:
        """Give the point up: nothing is tracked any more, and the guest runs on as it is.

        :raises WrongState: there is none, or memory is half put back.
        """
        with self._lock:
            if self._point is None:
                raise WrongState("there is no reset point")
            if self._point.torn:
                raise WrongState(
                    "the last reset was not finished, and the guest cannot run so: 'x-reset' tries again"
                )
            self._end()

    def close(self) -> None:
        """The guest's process is leaving: an order that is at work fails."""
        self._engines.close()
        if self._lock.acquire(timeout=_CLOSE_S):
            try:
                self._end()
            finally:
                self._lock.release()

    # --- under the lock

    def _begin(self, file: tuple[Any, ...] | None) -> dict[str, int]:
        with self._movable:
            self._check()
            self._keeper.reset_point = True
        try:
            copies = open_all(
                lambda region: memfd.create(f"reset-{region.name}", region.size_bytes),
                self._guest.regions(),
            )
            self._point = point = _Point(file, copies, None if file is None else file[0])
            link = self._engines.start()
            figures = self._to_now(link, point) if file is None else self._to_image(link, point)
        except BaseException as error:
            self._end()
            if isinstance(error, EngineDied):
                raise EngineDied(_DIED) from error
            raise
        self._engines.prepare()
        return figures

    def _to_image(self, link: Link, point: _Point) -> dict[str, int]:
        assert point.path is not None
        image = link.call(ResetCommands.reset_to_image, sent(point.copies), point.path)
        point.devices = self._guest.way_back(image.states)
        point.identity = image.identity
        if not image.needs_file:
            point.path, point.identity = None, ""
        return {"pause-us": 0, "copied-bytes": 0}

    def _to_now(self, link: Link, point: _Point) -> dict[str, int]:
        copied = link.call(ResetCommands.reset_to_now, sent(point.copies))
        begun_ns = time.monotonic_ns()
        self._guest.pause()
        try:
            states = self._guest.save_devices()
            copied += link.call(ResetCommands.keep_rest)
        finally:
            self._guest.resume()
        pause_us = (time.monotonic_ns() - begun_ns) // 1000
        point.devices = self._guest.way_back(states)
        point.whole = False
        return {"pause-us": pause_us, "copied-bytes": copied}

    def _put_back(self, point: _Point, *, whole: bool) -> tuple[int, bool]:
        died: EngineDied | None = None
        for _ in range(_TRIES):
            try:
                pages = self._engine(point).call(ResetCommands.put_back, everything=whole)
            except EngineDied as error:
                died, whole = error, True  # what it has done is not known
                self._engines.end()
            else:
                return pages, whole
        raise EngineDied("engine processes die one after the other") from died

    def _engine(self, point: _Point) -> Link:
        engine = self._engines.current
        if engine is not None and engine.link is not None and not engine.is_dead:
            return engine.link
        self._engines.end()  # its end may not have been noticed yet; it has put nothing back
        copies, order = sent(point.copies), ResetCommands.adopt_reset
        link, _ = self._engines.adopt(order, copies, point.path, point.identity)
        self._engines.prepare()
        return link

    def _end(self) -> None:
        """Nothing is tracked, and nothing is kept, any more."""
        point, self._point = self._point, None
        self._engines.end()
        if self._keeper.reset_point:
            self._keeper.unwatch_writes()
        close_all(point.copies if point is not None else ())
        self._keeper.reset_point = False

    def _engine_ended(self, engine: EngineProcess) -> None:
        self._engines.drop(engine)  # the next order puts another in its place


def _identify(path: str | None) -> tuple[Any, ...] | None:
    """Tell one image from another without reading it: its path first."""
    if path is None:
        return None
    absolute = os.path.abspath(path)  # noqa: PTH100 - keeps what a link is called
    try:
        found = Path(absolute).stat()
    except OSError as error:
        raise ImageError(absolute, f"cannot be opened: {error.strerror}") from error
    return absolute, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_reset(guest: OwnedGuest) -> None:
    """Refuse a reset point on a host that cannot track writes, or for a guest with a virtio device.

    :raises WrongState: the guest has one.
    """
    if guest.has_drive:
        raise WrongState(
            "the guest has a drive or a network device, which a reset does not take back: it would find "
            "what it is still to write; take a snapshot, and a copy of the disk, instead"
        )
    try:
        Userfaultfd.open(WRITE_FEATURES, user_mode_only=True).close()
    except HostCannot as error:
        raise error.because("the writes of a guest cannot be tracked") from error
