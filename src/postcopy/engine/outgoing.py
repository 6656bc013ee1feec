"""An engine's orders about a guest that leaves: by migration, or into an image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postcopy.engine.context import EngineContext
from postcopy.engine.places import uri_of
from postcopy.errors import WrongState
from postcopy.guest import DeviceState
from postcopy.machine import sections
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.snapshot.background import BackgroundSnapshot
from postcopy.source.opening import configuration
from postcopy.source.source import MigrationOptions, Source
from postcopy.status import Status
from postcopy.stream.description import build_description


class Outgoing:
    """Runs one source, or one background snapshot."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._resume_at = ""
        self._cancelled = False  # which may be said before there is anything to cancel

    def start_source(
        self,
        uri: str,
        capabilities: Sequence[str],
        parameters: Mapping[str, Any],
        fds: Sequence[int] = (),
    ) -> None:
        """Begin to send the guest, or to write the image of it."""
        if Capability.BACKGROUND_SNAPSHOT in Capabilities.of(capabilities).on:
            snapshot = self._make_snapshot(uri_of(uri, fds), capabilities, parameters)
            self._context.set_job(snapshot)
            self._context.on_exit = snapshot.leave
            run = snapshot.run
        else:
            self._make_source(uri_of(uri, fds), capabilities, parameters)
            run = self._source.run
        if self._cancelled:
            self.cancel()
        self._context.start("source", run)

    def _make_snapshot(
        self, uri: str, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> BackgroundSnapshot:
        return BackgroundSnapshot(
            self._context.guest(),
            uri,
            Capabilities.of(capabilities),
            Parameters().with_changes(parameters),
            self._context.progress,
            self._describing(capabilities),
        )

    def _make_source(
        self, uri: str, capabilities: Sequence[str], parameters: Mapping[str, Any]
    ) -> None:
        source = Source(
            self._context.guest(),
            MigrationOptions(uri, Capabilities.of(capabilities)),
            Parameters().with_changes(parameters),
            self._context.progress,
            self._describing(capabilities),
            lambda number: self._context.link.note("passed", number=number),
        )
        self._context.set_job(source)
        self._context.end_commands = source.leave

    def resume_source(self, uri: str, fds: Sequence[int] = ()) -> None:
        """Leave ``postcopy-paused``.  Nothing is said to anybody yet: whoever asked is answered first."""
        self._context.check_paused()
        self._context.join()
        self._source.begin_recovery()
        self._resume_at = uri_of(uri, fds)

    def go_on(self) -> None:
        """Go on with the postcopy that :meth:`resume_source` has prepared."""
        self._context.start("source", lambda: self._source.recover(self._resume_at))

    def adopt_source(self, capabilities: Sequence[str], parameters: Mapping[str, Any]) -> None:
        """Stand in for an engine that has died after switchover."""
        self._context.take_over(Status.POSTCOPY_PAUSED)
        self._make_source("", capabilities, parameters)
        self._source.adopt()

    def _describing(self, capabilities: Sequence[str]) -> Callable[[Sequence[DeviceState]], str]:
        """What writes the description of a stream, once there are devices to describe."""
        begin = configuration(self._context.guest().machine_name, Capabilities.of(capabilities))
        return lambda states: build_description(begin, sections.descriptions(states))

    @property
    def _source(self) -> Source:
        if not isinstance(self._context.job, Source):
            raise WrongState("this engine runs no outgoing migration")
        return self._context.job

    # Orders come as notes, at any time: to whom they mean nothing they must not do harm.

    def start_postcopy(self) -> None:
        """Switch over as soon as possible."""
        if isinstance(self._context.job, Source):
            self._context.job.orders.postcopy()

    def proceed(self) -> None:
        """Leave ``pre-switchover``."""
        if isinstance(self._context.job, Source):
            self._context.job.orders.proceed()

    def cancel(self) -> None:
        """Give up."""
        self._cancelled = True
        if isinstance(self._context.job, Source | BackgroundSnapshot):
            self._context.job.cancel()
