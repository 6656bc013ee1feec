"""An engine's orders about a guest that leaves: by migration, or into an image."""

import time
from collections.abc import Callable, Sequence

from postcopy.channel.descriptor_check import received_uri
from postcopy.engine.engine import Engine
from postcopy.errors import WrongState
from postcopy.guest import DeviceState
from postcopy.link.protocol import EngineReports, OutgoingCommands
from postcopy.link.values import Fd
from postcopy.machine import sections
from postcopy.memory import memory_map
from postcopy.memory.memory_map import PendingLook
from postcopy.memory.ram_block import PageBlock
from postcopy.memory.runs import Mask
from postcopy.parameters import Capabilities, Capability, Settings
from postcopy.snapshot.background import BackgroundSnapshot
from postcopy.source.dirty_pages import GuestMemory
from postcopy.source.source import MigrationOptions, Source
from postcopy.statistics import MemoryMap
from postcopy.status import Status
from postcopy.stream.description import build_description
from postcopy.stream.encoder import configuration


class Outgoing(OutgoingCommands):
    """Runs one source, or one background snapshot; see :class:`OutgoingCommands` for each order."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._resume_at = ""
        self._looks: list[PendingLook] = []
        self._cancelled = False  # which may be said before there is anything to cancel

    def start_source(self, uri: str, settings: Settings, fds: Sequence[Fd] = ()) -> None:
        if settings.enabled(Capability.BACKGROUND_SNAPSHOT):
            snapshot = self._make_snapshot(received_uri(uri, fds), settings)
            self._engine.set_job(snapshot)
            self._engine.on_exit = snapshot.leave
            run = snapshot.run
        else:
            self._make_source(received_uri(uri, fds), settings)
            run = self._source.run
        if self._cancelled:
            self.cancel()
        self._engine.start("source", run)

    def _make_snapshot(self, uri: str, settings: Settings) -> BackgroundSnapshot:
        return BackgroundSnapshot(
            self._engine.guest(),
            uri,
            settings.capabilities,
            settings.parameters,
            self._engine.progress,
            self._describing(settings.capabilities),
            settings.tls,
        )

    def _make_source(self, uri: str, settings: Settings) -> None:
        guest = self._engine.guest()
        source = Source(
            guest,
            GuestMemory(guest),
            MigrationOptions(uri, settings.capabilities, tls=settings.tls),
            settings.parameters,
            self._engine.progress,
            self._describing(settings.capabilities),
            lambda number: self._engine.link.note(EngineReports.passed, number),
        )
        self._engine.set_job(source)
        self._engine.end_commands = source.leave

    def resume_source(self, uri: str, fds: Sequence[Fd] = ()) -> None:
        self._engine.check_paused()
        self._engine.join()
        self._source.begin_recovery()
        self._resume_at = received_uri(uri, fds)

    def go_on(self) -> None:
        self._engine.start("source", lambda: self._source.recover(self._resume_at))

    def adopt_source(self, settings: Settings) -> None:
        self._engine.take_over(Status.POSTCOPY_PAUSED)
        self._make_source("", settings)
        self._source.adopt()

    def _describing(self, capabilities: Capabilities) -> Callable[[Sequence[DeviceState]], str]:
        """What writes the description of a stream, once there are devices to describe."""
        begin = configuration(self._engine.guest().machine_name, capabilities)
        return lambda states: build_description(begin, sections.descriptions(states))

    @property
    def _source(self) -> Source:
        if not isinstance(self._engine.job, Source):
            raise WrongState("this engine runs no outgoing migration")
        return self._engine.job

    def start_postcopy(self) -> None:
        if isinstance(self._engine.job, Source):
            self._engine.job.requests.postcopy()

    def proceed(self) -> None:
        if isinstance(self._engine.job, Source):
            self._engine.job.requests.proceed()

    def cancel(self) -> None:
        self._cancelled = True
        if isinstance(self._engine.job, Source | BackgroundSnapshot):
            self._engine.job.cancel()

    def memory_map(self) -> MemoryMap:
        begin_s, (masks, passed) = time.monotonic(), self._masks()
        if not masks:
            raise WrongState("no memory has been sent yet")
        if not self._looks:
            self._looks = [PendingLook() for _ in masks]
        blocks = [
            (block.name, block.target_pages_per_page, look.codes(pending, data, passed=passed))
            for look, (block, pending, data) in zip(self._looks, masks, strict=True)
        ]
        return memory_map.draw(blocks, incoming=False, begin_s=begin_s)

    def _masks(self) -> tuple[Sequence[tuple[PageBlock, Mask, Mask]], bool]:
        """Of each block the pages to be sent and those that have data; and whether each was sent once."""
        if isinstance(self._engine.job, BackgroundSnapshot):
            bitmap = self._engine.job.bitmap
            blocks = () if bitmap is None else bitmap.blocks
            return [(block, *bitmap.masks(block)) for block in blocks if bitmap is not None], False
        dirty = self._source.dirty
        if dirty is None:
            return (), False
        found = [(pages.block, pages.pending, pages.known_data) for pages in dirty.blocks]
        return found, dirty.passed

    def end_command(self) -> bool:
        return isinstance(self._engine.job, Source) and self._engine.job.end_command()
