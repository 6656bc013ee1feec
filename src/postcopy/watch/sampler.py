"""Asks the machines of a migration again and again, and makes samples of the answers.

It only asks: ``query-status``, ``query-migrate``, and of a machine of ours ``x-query-memory-map``.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from postcopy.client.explain import explain
from postcopy.client.machine import Machine
from postcopy.client.progress import STOPPED, Phase, Progress, ProgressTracker, name_of
from postcopy.client.status_help import StatusHelp
from postcopy.errors import CannotConnect, ChannelBroken, Reason, Refused
from postcopy.watch.sample import Sample
from postcopy.watch.waits import Waited, total

INTERVAL_S: Final = 0.25
_AGAIN_S: Final = 1.0
_STALL_S: Final = 2.5
_MOVING: Final = frozenset({Phase.PRECOPY, Phase.SWITCHOVER, Phase.POSTCOPY, Phase.SAVING})
_AFTER: Final = frozenset({Phase.POSTCOPY, Phase.PAUSED, Phase.RECOVERY})
_NO_MAP: Final = "no map of the memory: a stock QEMU does not tell where its pages are"
_NO_LATENCY: Final = (
    "no latencies and no blocktime: the capability postcopy-blocktime is off at the destination"
)


@dataclass(slots=True)
class _Answers:
    """What one side said last."""

    state: Mapping[str, Any]
    info: Mapping[str, Any]
    map: Mapping[str, Any] | None = None


class WatchedSide:
    """One machine, which may end and come back.

    :param name: ``source`` or ``destination``.
    :param address: of its QMP monitor.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.answers: _Answers | None = None
        self.is_there = False
        self.has_map = True
        self.incoming_blocktime: bool | None = None
        self._machine: Machine | None = None
        self._try_again_s = 0.0

    async def connect(self) -> None:
        """Connect for the first time.

        :raises PostcopyError: no machine is there.
        """
        self._machine = await Machine.connect(self.address)
        self.is_there = True

    async def look(self) -> None:
        """Ask it, if it is there, or is there again."""
        try:
            if self._machine is None:
                if time.monotonic() < self._try_again_s:
                    return
                await self.connect()
            await self._ask()
        except (CannotConnect, ChannelBroken):
            await self.close()
            self._try_again_s = time.monotonic() + _AGAIN_S

    async def _ask(self) -> None:
        machine = self._machine
        assert machine is not None
        state = await machine.execute("query-status")
        info = await machine.migration_info()
        before = self.answers.map if self.answers is not None else None
        self.answers = _Answers(state, info, await self._map(machine) or before)

    async def _map(self, machine: Machine) -> Mapping[str, Any] | None:
        if not self.has_map:
            return None
        try:
            found = await machine.execute("x-query-memory-map")
        except Refused as refused:
            self.has_map = refused.reason is not Reason.COMMAND
            return None
        return {name: found[name] for name in ("side", "cells", "pages")}

    @property
    def help(self) -> StatusHelp | None:
        """What its status means."""
        if self.answers is None:
            return None
        return explain(self.answers.state, self.answers.info)

    @property
    def info(self) -> Mapping[str, Any]:
        """Its last answer to ``query-migrate``; empty before the first."""
        return self.answers.info if self.answers is not None else {}

    @property
    def is_saving(self) -> bool:
        """Whether its last order was a snapshot; a QEMU does not tell."""
        state = self.answers.state if self.answers is not None else {}
        return bool(state.get("x-last-order", {}).get("name") == "snapshot")

    async def close(self) -> None:
        """Disconnect; harmless when done."""
        machine, self._machine, self.is_there = self._machine, None, False
        if machine is not None:
            await machine.close()


@dataclass(slots=True)
class _Standstill:
    """For how long nothing has changed."""

    since_s: float = 0.0
    figures: tuple[Any, ...] = field(default=())

    def seconds(self, progress: Progress) -> float:
        now = time.monotonic()
        found = (
            progress.status,
            progress.transferred_bytes,
            progress.remaining_bytes,
            progress.faults,
            progress.round,
        )
        if found != self.figures:
            self.figures, self.since_s = found, now
        return now - self.since_s


class Sampler:
    """Makes the samples of one migration.

    :param source: the QMP address of the source; None: only the destination is watched, as of a restore.
    """

    def __init__(
        self, source: str | None, destination: str | None, *, interval_s: float = INTERVAL_S
    ) -> None:
        self.source = WatchedSide("source", source) if source is not None else None
        self.destination = (
            WatchedSide("destination", destination) if destination is not None else None
        )
        self._sides = [side for side in (self.source, self.destination) if side is not None]
        self._interval_s = interval_s
        self._tracker = ProgressTracker()
        self._progress: Progress | None = None
        self._standstill = _Standstill()
        self._waited = Waited()
        self._was_busy = False
        self._began_s = time.monotonic()

    async def connect(self) -> None:
        """Connect to each side.

        :raises PostcopyError: one of them is not there.
        """
        for side in self._sides:
            await side.connect()
        if self.source is not None:
            machine = self.source._machine  # noqa: SLF001 - of this module
            assert machine is not None
            switched = await machine.execute("query-migrate-capabilities")
            planned = any(
                each["state"] for each in switched if each["capability"] == "postcopy-ram"
            )
            self._tracker = ProgressTracker(postcopy_planned=planned)

    async def samples(self) -> AsyncIterator[Sample]:
        """Give one after the other, until the migration has ended or every machine has."""
        while True:
            begin_s = time.monotonic()
            await asyncio.gather(*(side.look() for side in self._sides))
            sample = self._make()
            yield sample
            if self._has_ended():
                return
            await asyncio.sleep(max(0.0, self._interval_s - (time.monotonic() - begin_s)))

    async def close(self) -> None:
        """Disconnect."""
        for side in self._sides:
            await side.close()

    def _has_ended(self) -> bool:
        if not any(side.is_there for side in self._sides):
            return True
        progress = self._progress
        if progress is None or not self._was_busy:
            return False
        if progress.phase not in STOPPED - {Phase.PAUSED}:
            return False
        there = self.destination
        return (
            there is None or not there.is_there or there.info.get("status") in {
                "completed", "failed", "cancelled", None,
            }
        )  # fmt: skip

    def _make(self) -> Sample:
        progress = self._take()
        if progress.phase in _MOVING:
            self._was_busy = True
        here, there = self.source, self.destination
        source_help = here.help if here is not None else None
        destination_help = there.help if there is not None else None
        found = Sample(
            t_ms=round((time.monotonic() - self._began_s) * 1000),
            phase=progress.phase.value,
            status=name_of(progress.status),
            fraction=round(progress.fraction, 4),
            round=progress.round,
            elapsed_ms=progress.elapsed_ms,
            transferred_bytes=progress.transferred_bytes,
            remaining_bytes=progress.remaining_bytes,
            total_bytes=progress.total_bytes,
            rate_bytes=progress.rate_bytes,
            dirty_rate_bytes=progress.dirty_rate_bytes,
            faults=progress.faults,
            faults_per_s=progress.faults_per_s,
            source=source_help.meaning if source_help else "",
            destination=destination_help.meaning if destination_help else "",
            waits_for=self._waits_for(progress, source_help, destination_help),
            notes=tuple(self._notes(progress)),
            map=self._map(progress),
            **_downtime(here.info if here is not None else {}),
        )
        info = there.info if there is not None else {}
        return replace(found, **_latencies(info), **self._blocktime(info))

    def _blocktime(self, info: Mapping[str, Any]) -> dict[str, Any]:
        waits = self._waited.take(info)
        if not waits:
            return {}
        return {"blocktime_us": total(waits), "blocktime_causes_us": waits}

    def _take(self) -> Progress:
        """The progress: as the source says it, or the destination when there is no source any more."""
        side = self.source
        there = self.destination
        if side is None or (not side.is_there and there is not None and there.is_there):
            side = there
        assert side is not None
        before = self._progress
        if side.info.get("ram") or before is None:
            found = self._tracker.take(side.info)
        elif "status" in side.info:
            found = replace(
                self._tracker.take(side.info),
                remaining_bytes=before.remaining_bytes,
                total_bytes=before.total_bytes,
                faults=before.faults,
                dirty_rate_bytes=before.dirty_rate_bytes,
            )
        else:
            found = before
        if found.phase is Phase.COMPLETED:
            found = replace(found, remaining_bytes=0)
        if found.phase is Phase.PRECOPY and side.is_saving:
            found = replace(found, phase=Phase.SAVING)
        self._progress = found
        return found

    def _waits_for(
        self, progress: Progress, source: StatusHelp | None, destination: StatusHelp | None
    ) -> str:
        """The words of the side that has the guest, or of the other."""
        first, second = source, destination
        if progress.phase in _AFTER and destination is not None:
            first, second = destination, source
        words = next((each.waits_for for each in (first, second) if each and each.waits_for), "")
        still_s = self._standstill.seconds(progress)
        if progress.phase in _MOVING and still_s >= _STALL_S:
            return f"{words}; nothing has been sent for {still_s:.0f} s"
        return words

    def _notes(self, progress: Progress) -> list[str]:
        notes = [
            f"the {side.name} at {side.address} does not answer any more; what it said last is shown"
            for side in self._sides
            if not side.is_there
        ]
        if not any(side.has_map for side in self._sides):
            notes.append(_NO_MAP)
        there = self.destination
        if (
            there is not None
            and progress.phase is Phase.POSTCOPY
            and not (_latencies(there.info) or there.info.get("x-postcopy", {}).get("blocktime-us"))
        ):
            notes.append(_NO_LATENCY)
        return notes

    def _map(self, progress: Progress) -> Mapping[str, Any] | None:
        """After the switchover the destination knows best, as long as it answers."""
        order = [self.source, self.destination]
        if progress.phase in _AFTER:
            order.reverse()
        known = [side for side in order if side is not None and side.answers is not None]
        known.sort(key=lambda side: not side.is_there)
        return next((side.answers.map for side in known if side.answers and side.answers.map), None)


def _downtime(info: Mapping[str, Any]) -> dict[str, Any]:
    measured_us = info.get("x-postcopy", {}).get("guest-downtime-us")
    downtime = info.get("downtime") if measured_us is None else measured_us / 1000
    return {"downtime_ms": downtime, "expected_downtime_ms": info.get("expected-downtime")}


def _latencies(info: Mapping[str, Any]) -> dict[str, Any]:
    """Ours are told as they grow, a QEMU's at the end."""
    ours = info.get("x-postcopy", {})
    found: dict[str, Any] = {}
    distribution = ours.get("fault-latency-dist") or info.get("postcopy-latency-dist")
    if distribution:
        found["latency"] = tuple(distribution)
    for name in ("p50", "p99", "max"):
        if (value := ours.get(f"fault-latency-{name}-us")) is not None:
            found[f"{name}_us"] = value
    return found
