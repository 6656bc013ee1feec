"""A guest that wakes from its image: what every engine of it must know, and what takes over.

An engine that dies loses nothing: the pages that are in place are in memory, and the others in the
image.  So the next one is started unasked, and goes on.
"""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Final

from postcopy.errors import EngineDied, PostcopyError, WrongState
from postcopy.link.guest.engine_process import EngineProcess
from postcopy.link.guest.incoming import IncomingJob
from postcopy.link.guest.job import MigrationState, refuse_busy
from postcopy.link.protocol import RestoreCommands
from postcopy.link.rpc import Link
from postcopy.ownership import Owner
from postcopy.parameters import Settings
from postcopy.restore_options import RestoreOptions
from postcopy.status import ENDED, Status

_FILE: Final = "file:"
_LOOK_S: Final = 0.2


class IncomingRestore(IncomingJob):
    """A guest that comes from an image."""

    def __init__(self, state: MigrationState, settings: Settings, options: RestoreOptions) -> None:
        super().__init__(state, settings)
        self._options = replace(options, path=_absolute(options.path))
        self._hurried = False

    def prepare(self, link: Link) -> None:
        order, parameters = RestoreCommands.start_restore, self.settings.parameters
        identity = link.call(order, self._options, parameters)
        self._options = replace(self._options, identity=identity)

    def begin(self, link: Link) -> None:
        super().begin(link)
        self.state.restore = self

    def start(self, link: Link) -> None:
        link.note(RestoreCommands.restore)

    # --- what waits for the end of it

    def hurry(self, *, wanted: bool = True) -> None:
        """Something waits for the end of it, or no longer does."""
        self._hurried = wanted
        self.state.engines.tell(RestoreCommands.hurry, wanted=wanted)

    def complete_first(self) -> None:
        """Wait until the guest, if it runs, is whole, while it is completed at full speed.

        :raises WrongState: the process is leaving.
        """
        if not self.state.guest.owned:
            return
        self.hurry()
        while not self.state.closed:
            with suppress(TimeoutError):
                self.progress.wait(*ENDED, Status.POSTCOPY_PAUSED, timeout=_LOOK_S)
                return
        raise WrongState("this process is leaving")

    def check_leaves(self) -> None:
        """Refuse to move a guest that may never be whole.

        :raises WrongState: it does not run yet, or its restore is paused.
        """
        if not self.busy:
            return
        if not self.state.guest.owned:
            refuse_busy()
        if self.status is Status.POSTCOPY_PAUSED:
            raise WrongState(
                f"pages of this guest are missing, and its restore is paused ({self.error}): recover "
                "it first ('migrate_recover file:PATH')"
            )

    def pause(self) -> None:
        if self.busy:
            raise WrongState("a restore has no connection that could be broken; use 'stop'")
        super().pause()

    # --- the end of an engine

    def outlives_failure(self) -> bool:
        # With no page missing any more those that are lost are the result.
        if not (self.state.guest.owned and self.state.keeper.watches_missing):
            return False
        self._replace_engine()  # it goes on with the guest's pages
        return True

    def engine_lost(self, engine: EngineProcess) -> None:
        if self.state.ownership.owner is Owner.ABANDONED:
            super().engine_lost(engine)
        else:
            self._replace_engine()

    def _replace_engine(self) -> None:
        self.state.engines.end()
        self.supervisor.begin()

    def needs_successor(self) -> bool:
        return self.busy and self.state.engines.current is None

    def adopt(self) -> None:
        engines = self.state.engines
        order, parameters = RestoreCommands.adopt_restore, self.settings.parameters
        engines.adopt(order, self.status, self._options, parameters)
        self.tell_parameters()
        if self._hurried:
            engines.tell(RestoreCommands.hurry, wanted=True)

    def no_successor(self, error: PostcopyError) -> None:
        if isinstance(error, EngineDied) and self.supervisor.tries_left:
            self.supervisor.begin()
            return
        self.error = f"the engine process died, and no other could take its place: {error}"
        if self.state.keeper.abandon():
            self.settle(Status.FAILED)
        elif self.state.guest.owned and self.status is not Status.POSTCOPY_PAUSED:
            self.progress.move(Status.POSTCOPY_ACTIVE, only_from=frozenset({Status.ACTIVE}))
            self.progress.move(Status.POSTCOPY_PAUSED)

    def recover_at(self, uri: str) -> None:
        if not uri.startswith(_FILE):
            raise WrongState(f"a restore is recovered from its image; give {_FILE}PATH, not {uri}")
        with self.supervisor.lock:
            before = self._options
            self._options = replace(before, path=_absolute(uri.removeprefix(_FILE)))
            try:
                self.state.engines.end()
                self.adopt()
            except PostcopyError:
                self._options = before
                raise
            self.supervisor.count_anew()


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - keeps what a link is called
