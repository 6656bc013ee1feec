"""A restore as the guest's process sees it: what every engine of it must know, and what takes over.

An engine that dies loses nothing: the pages that are in place are in memory, and the others in the
image.  So the next one is started unasked, and goes on.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from postcopy.errors import EngineDied, PostcopyError, Reason, WrongState
from postcopy.link.guest.engine_slot import EngineSlot, EngineSupervisor
from postcopy.link.guest.job import Job
from postcopy.link.guest.keeper import OwnedGuest
from postcopy.link.protocol import JobCommands, RestoreCommands
from postcopy.link.rpc import Link
from postcopy.restore_options import RestoreOptions
from postcopy.status import ENDED, Status

_FILE: Final = "file:"
_LOOK_S: Final = 0.2


class Restoring:
    """The restore of one guest, from the order to its end.

    :param given_up: told the reason when one engine after the other has died, or none can go on.
    """

    def __init__(
        self,
        engines: EngineSlot,
        guest: OwnedGuest,
        given_up: Callable[[str], None],
    ) -> None:
        self._engines = engines
        self._guest = guest
        self._given_up = given_up
        self._options = RestoreOptions("", began_ns=0)
        self._hurried = False
        self._closed = False
        self.job: Job | None = None
        """The restore that is under way, running guest or not."""
        self._supervisor = EngineSupervisor(
            self._is_orphaned, self._adopt, self._no_successor, engines.prepare
        )

    @staticmethod
    def open(job: Job, link: Link, path: str, **options: Any) -> RestoreOptions:
        """Have an engine open the image; nothing of the guest is touched yet.

        :return: what :meth:`begin` takes.
        :raises PostcopyError: it is no image, or none for this guest.
        """
        options.setdefault("began_ns", time.monotonic_ns())
        asked = RestoreOptions(os.path.abspath(path), **options)  # noqa: PTH100 - keeps a link's name
        identity = link.call(RestoreCommands.start_restore, asked, job.settings.parameters)
        return replace(asked, identity=identity)

    def begin(self, job: Job, opened: RestoreOptions) -> None:
        """An engine is about to restore what it has opened."""
        self._options = opened
        self._hurried = False
        self.job = job

    def end(self) -> None:
        """It has completed or failed."""
        self.job = None

    def engine_died(self) -> None:
        """Put another engine in its place."""
        self._engines.end()
        self._supervisor.begin()

    def engine_works(self) -> None:
        """An engine has placed a page: should it die, that is no reason to give up."""
        self._supervisor.worked()

    def hurry(self, *, wanted: bool = True) -> None:
        """Something waits for the end of it, or no longer does."""
        self._hurried = wanted
        self._engines.tell(RestoreCommands.hurry, wanted=wanted)

    def complete_first(self) -> None:
        """Wait until the guest is whole, while it is completed at full speed."""
        job = self.job
        if job is None or not self._guest.owned:
            return
        self.hurry()
        while not self._closed:
            with suppress(TimeoutError):
                job.progress.wait(*ENDED, Status.POSTCOPY_PAUSED, timeout=_LOOK_S)
                return
        raise WrongState("this process is leaving")

    def close(self) -> None:
        """Let go of those that wait for the end of it."""
        self._closed = True

    def refuse_to_leave(self) -> None:
        """Refuse to move a guest that may never be whole.

        :raises WrongState: it does not run yet, or its restore is paused.
        """
        if self.job is None:
            return
        if not self._guest.owned:
            raise WrongState("There's a migration process in progress", Reason.BUSY)
        if self.job.status is Status.POSTCOPY_PAUSED:
            raise WrongState(
                f"pages of this guest are missing, and its restore is paused ({self.job.error}): recover "
                "it first ('migrate_recover file:PATH')"
            )

    def refuse_pause(self) -> None:
        """Refuse to break what cannot be broken.

        :raises WrongState: a restore is under way.
        """
        if self.job is not None:
            raise WrongState("a restore has no connection that could be broken; use 'stop'")

    def recover(self, uri: str) -> None:
        """Go on with a restore that no engine could go on with.

        :param uri: ``file:PATH``, where the image is now.
        :raises PostcopyError: it is not there, or is not the same.
        """
        if not uri.startswith(_FILE):
            raise WrongState(f"a restore is recovered from its image; give {_FILE}PATH, not {uri}")
        with self._supervisor.lock:
            before = self._options
            path = os.path.abspath(uri.removeprefix(_FILE))  # noqa: PTH100
            self._options = replace(before, path=path)
            try:
                self._engines.end()
                self._adopt()
            except PostcopyError:
                self._options = before
                raise
            self._supervisor.count_anew()

    def _is_orphaned(self) -> bool:
        return self.job is not None and self.job.busy and self._engines.current is None

    def _adopt(self) -> None:
        job = self.job
        assert job is not None
        parameters = job.settings.parameters
        self._engines.adopt(RestoreCommands.adopt_restore, job.status, self._options, parameters)
        # What the user has said meanwhile may have reached no engine.
        self._engines.tell(JobCommands.set_parameters, job.settings.parameters)
        if self._hurried:
            self._engines.tell(RestoreCommands.hurry, wanted=True)

    def _no_successor(self, error: PostcopyError) -> None:
        if isinstance(error, EngineDied) and self._supervisor.tries_left:
            self._supervisor.begin()
        else:
            self._give_up(f"the engine process died, and no other could take its place: {error}")

    def _give_up(self, reason: str) -> None:
        job = self.job
        self._given_up(reason)
        if job is not None and self._guest.owned and job.status is not Status.POSTCOPY_PAUSED:
            job.progress.move(Status.POSTCOPY_ACTIVE, only_from=frozenset({Status.ACTIVE}))
            job.progress.move(Status.POSTCOPY_PAUSED)
