"""A restore as the guest's process sees it: what every engine of it must know, and who takes over.

An engine that dies loses nothing: the pages that are in place are in memory, and the others in the
image.  So the next one is started unasked, and goes on.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from postcopy.errors import EngineDied, PostcopyError, WrongState
from postcopy.link.engines import Engines, Succession
from postcopy.link.guest_service import OwnedGuest
from postcopy.link.rpc import Link
from postcopy.status import ENDED, Progress, Status

_FILE: Final = "file:"


class Restoring:
    """The restore of one guest, from the order to its end.

    :param settings: what engines are told of capabilities and parameters.
    :param given_up: told the reason when one engine after the other has died, or none can go on.
    """

    def __init__(
        self,
        engines: Engines,
        guest: OwnedGuest,
        progress: Callable[[], Progress],
        settings: Callable[[], Mapping[str, Any]],
        given_up: Callable[[str], None],
    ) -> None:
        self._engines = engines
        self._guest = guest
        self._progress = progress
        self._settings = settings
        self._given_up = given_up
        self._wishes: dict[str, Any] | None = None
        self._succession = Succession(
            self._is_orphaned, self._adopt, self._no_successor, engines.prepare
        )

    @property
    def active(self) -> bool:
        """Whether a restore is under way, running guest or not."""
        return self._wishes is not None

    def begin(self, link: Link, path: str, **wishes: Any) -> None:
        """Have an engine open the image; nothing of the guest is touched yet.

        :raises PostcopyError: it is no image, or none for this guest.
        """
        wishes.setdefault("began_ns", time.monotonic_ns())
        asked = wishes | {"path": os.path.abspath(path)}  # noqa: PTH100 - keeps what a link is called
        identity = link.call("start_restore", wishes=asked, **self._settings())
        self._wishes = asked | {"identity": identity}

    def end(self) -> None:
        """It has completed or failed."""
        self._wishes = None

    def engine_died(self) -> None:
        """Put another engine in its place."""
        self._engines.end()
        self._succession.begin()

    def engine_works(self) -> None:
        """An engine has placed a page: should it die, that is no reason to give up."""
        self._succession.worked()

    def complete_first(self) -> None:
        """Whoever wants the guest whole waits here, while it is completed at full speed."""
        if self.active and self._guest.owned:
            self._engines.tell("hurry")
            self._progress().wait(*ENDED, Status.POSTCOPY_PAUSED)

    def refuse_pause(self) -> None:
        """Refuse to break what cannot be broken.

        :raises WrongState: a restore is under way.
        """
        if self.active:
            raise WrongState("a restore has no connection that could be broken; use 'stop'")

    def recover(self, uri: str) -> None:
        """Go on with a restore that no engine could go on with.

        :param uri: ``file:PATH``, where the image is now.
        :raises PostcopyError: it is not there, or is not the same.
        """
        if not uri.startswith(_FILE):
            raise WrongState(f"a restore is recovered from its image; give {_FILE}PATH, not {uri}")
        with self._succession.lock:
            assert self._wishes is not None
            before = self._wishes
            path = os.path.abspath(uri.removeprefix(_FILE))  # noqa: PTH100
            self._wishes = before | {"path": path}
            try:
                self._engines.end()
                self._adopt()
            except PostcopyError:
                self._wishes = before
                raise
            self._succession.worked()

    def _is_orphaned(self) -> bool:
        busy = self._progress().status not in ENDED
        return self.active and busy and self._engines.current is None

    def _adopt(self) -> None:
        status = self._progress().status.value
        wishes, settings = self._wishes, self._settings()
        self._engines.adopt("adopt_restore", status=status, wishes=wishes, **settings)

    def _no_successor(self, error: PostcopyError) -> None:
        if isinstance(error, EngineDied) and self._succession.tries_left:
            self._succession.begin()
        else:
            self._give_up(f"the engine process died, and no other could take its place: {error}")

    def _give_up(self, reason: str) -> None:
        self._given_up(reason)
        progress = self._progress()
        if self._guest.owned and progress.status is not Status.POSTCOPY_PAUSED:
            progress.move(Status.POSTCOPY_ACTIVE, only_from=frozenset({Status.ACTIVE}))
            progress.move(Status.POSTCOPY_PAUSED)
