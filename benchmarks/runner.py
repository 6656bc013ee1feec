"""One run: a guest is started, moved by one engine, looked at and checked."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import host
from benchmarks.clock import Clock, rdtsc
from benchmarks.engines import CERTIFIED_HOST, Engine, Setup
from benchmarks.scenario import CAPPED_S, Case, Contender
from benchmarks.shaped_link import ShapedLink
from benchmarks.timings import Figures, Moments, Observation, Offsets
from benchmarks.workload import MIB, Records
from postcopy.channel.certificates import write_hosts

_UNLIMITED: Final = 1 << 40  # bytes per second
_NO_DOWNTIME_MS: Final = 1
_SETTLE_S: Final = 1.0
_SETTLE_AFTER_POSTCOPY_S: Final = 2.0
_ENDED: Final = ("completed", "failed", "cancelled", "postcopy-paused")


class RunFailed(RuntimeError):
    """The migration did not do what the case asks for; says what it did."""


@dataclass(frozen=True)
class Settings:
    """What is the same in all runs.

    :param warm_mib: memory to touch as huge pages, and free, just before the measured phase.
    :param link: what joins source and destination; None: loopback.
    """

    clock: Clock
    accelerator: str
    memory_mib: int
    warm_mib: int
    timeout_s: float
    link: ShapedLink | None = None


class Run:
    """One case with one contender.  :meth:`measure` once, then :meth:`verify` if wanted."""

    def __init__(self, case: Case, contender: Contender, setup: Setup, settings: Settings) -> None:
        self._case, self._contender, self._settings = case, contender, settings
        self._clock = setup.clock
        self._directory = setup.directory
        self._closing = ExitStack()
        self._source = self._start("source", setup)
        records = Records(self._source.memory, case.workload)
        records.wait_running()
        time.sleep(_SETTLE_S)
        self._source_offset = records.tsc_offset()
        self._destination = self._start("destination", setup)
        self._link = settings.link
        address = self._link.address if self._link else "127.0.0.1"
        self._uri = f"tcp:{address}:{host.free_port()}"

    def _start(self, role: str, setup: Setup) -> Engine:
        engine = self._contender.engine(role, setup)
        self._closing.callback(engine.close)
        return engine

    def close(self) -> None:
        """End both processes."""
        self._closing.close()

    def measure(self) -> dict[str, Any]:
        """Move the guest; figures, timeline, and what the engine says itself."""
        self._prepare()
        host.warm_memory(self._settings.warm_mib)
        time.sleep(0.1)
        meter = host.CpuMeter(
            source=self._source.process.pid, destination=self._destination.process.pid
        )
        if self._case.stop_first:
            self._source.qmp.execute("stop")
        command, switch = self._migrate()
        began, sent_before = self._link_so_far(command)
        lifted = self._lift_cap()
        info = self._wait_ended()
        sent_bytes = self._link.sent_bytes() - sent_before if self._link else 0
        load = meter.stop()
        figures = _reported(info) | load
        result: dict[str, Any] = {
            "source": info,
            "destination": self._destination.info(),
            "figures": figures,
        }
        moments = self._moments(command, lifted)
        if lifted:
            figures["requests"] = lifted[1]
        figures["total_ms"] = self._clock.ms(moments.completed - command)
        figures["mib_s"] = _rate(figures["sent_mib"], figures["total_ms"])
        if self._link:
            seconds = self._clock.ms(moments.completed - began) / 1e3
            figures["link_use"] = self._link.use(sent_bytes, seconds)
        for side in ("source", "destination"):
            figures[f"{side}_cpu_s_gib"] = _each_gib(figures[f"{side}_cpu_s"], figures["sent_mib"])
        if not self._case.stop_first:
            observation = self._observe(moments)
            asked_for = lifted[1] if lifted else 0
            figures |= self._seen(observation, moments, switch, asked_for)
            result["timeline"] = observation.steps()
        return result

    def _prepare(self) -> None:
        """Capabilities and parameters on both sides; the destination listens."""
        if self._case.channels:
            for engine in (self._source, self._destination):
                engine.set_capabilities("multifd")
                engine.qmp.execute("migrate-set-parameters", multifd_channels=self._case.channels)
        if self._case.encrypted:
            hosts = {CERTIFIED_HOST: CERTIFIED_HOST}
            (certificates,) = write_hosts(self._directory / "certificates", hosts)
            for engine in (self._source, self._destination):
                engine.encrypt(certificates)
        if self._case.is_postcopy:
            names = ("postcopy-ram", *self._contender.capabilities)
            self._source.set_capabilities(*names)
            self._destination.set_capabilities(*names, "postcopy-blocktime")
            # With 300 ms, and no bandwidth limit, precopy may end before the command to switch comes.
            self._source.qmp.execute("migrate-set-parameters", downtime_limit=_NO_DOWNTIME_MS)
            self._limit_push(self._case.push_limit)
        self._source.qmp.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)
        self._destination.qmp.execute("migrate-incoming", uri=self._uri)

    def _migrate(self) -> tuple[int, int | None]:
        """Begin, and switch when it is time; host TSC of both commands."""
        command = rdtsc()
        self._source.qmp.execute("migrate", uri=self._uri)
        if not self._case.is_postcopy:
            return command, None
        self._source.qmp.wait_event("MIGRATION", "active")
        if self._case.switch_after_passes:
            self._wait_passes(1 + self._case.switch_after_passes)
        switch = rdtsc()
        self._source.qmp.execute("migrate-start-postcopy")
        return command, switch

    def _link_so_far(self, command: int) -> tuple[int, int]:
        """Host TSC from which the use of the link is measured, and the bytes that it had carried by then.

        In postcopy that is as soon as it has begun, in precopy the command.
        """
        if self._link is None:
            return command, 0
        if self._case.is_postcopy:
            self._source.qmp.wait_event("MIGRATION", "postcopy-active")
            command = rdtsc()
        return command, self._link.sent_bytes()

    def _limit_push(self, bytes_per_second: int) -> None:
        self._source.qmp.execute("migrate-set-parameters", max_postcopy_bandwidth=bytes_per_second)

    def _lift_cap(self) -> tuple[int, int] | None:
        """Let the guest run under the cap for its time, and then the run end.

        :return: host TSC when it was lifted, and how many pages had been asked for by then; None: no cap.
        :raises RunFailed: there was none any more to lift.
        """
        if not self._case.push_limit:
            return None
        self._source.qmp.wait_event("MIGRATION", "postcopy-active")
        time.sleep(CAPPED_S)
        info = self._source.info()
        if info["status"] != "postcopy-active":
            raise RunFailed(f"no longer in postcopy at the end of the capped time: {_brief(info)}")
        lifted = rdtsc()
        self._limit_push(0)
        return lifted, info.get("ram", {}).get("postcopy-requests", 0)

    def _wait_passes(self, syncs: int) -> None:
        end = time.monotonic() + self._settings.timeout_s
        while (info := self._source.info())["status"] not in _ENDED:
            if info.get("ram", {}).get("dirty-sync-count", 0) >= syncs:
                return
            if time.monotonic() > end:
                raise RunFailed(f"no {syncs} bitmap synchronisations in time: {info}")
            time.sleep(0.01)
        raise RunFailed(f"ended before the switch to postcopy: {_brief(info)}")

    def _wait_ended(self) -> dict[str, Any]:
        """The source's last word.

        :raises RunFailed: it is not that all went well, on either side.
        """
        end = time.monotonic() + self._settings.timeout_s
        for engine in (self._source, self._destination):
            while (info := engine.info()).get("status") not in _ENDED:
                if time.monotonic() > end:
                    raise RunFailed(f"{engine.role} did not end in time: {_brief(info)}")
                time.sleep(0.05)
            if info["status"] != "completed":
                said = self._destination.log_tail()
                raise RunFailed(f"{engine.role}: {_brief(info)}; destination said: {said}")
        if self._case.is_postcopy and not self._source.qmp.find_event(
            "MIGRATION", "postcopy-active"
        ):
            raise RunFailed("ended before the switch to postcopy took place")
        return self._source.info()

    def _moments(self, command: int, lifted: tuple[int, int] | None) -> Moments:
        stopped = self._source.event_tsc("STOP")
        completed = self._source.event_tsc("MIGRATION", "completed")
        if stopped is None or completed is None:
            names = [event["event"] for event in self._source.qmp.events]
            raise RunFailed(f"no STOP, or no MIGRATION 'completed', among the events {names}")
        return Moments(command, stopped, completed, lifted[0] if lifted else None)

    def _observe(self, moments: Moments) -> Observation:
        """Read the guest's records where it is now."""
        self._arrived = Records(self._destination.memory, self._case.workload)
        self._arrived.wait_progress()
        time.sleep(_SETTLE_AFTER_POSTCOPY_S if self._case.is_postcopy else _SETTLE_S)
        offsets = Offsets(self._source_offset, self._arrived.tsc_offset())
        events, series = self._arrived.events(), self._arrived.series()
        return Observation(events, series, offsets, moments, self._clock)

    def _seen(
        self, observation: Observation, moments: Moments, switch: int | None, requests: int
    ) -> Figures:
        figures = observation.common_figures()
        if switch is None:
            later = moments.completed + self._clock.cycles(_SETTLE_S)
            figures["rate_destination"] = observation.rate(observation.resumed, later)
            return figures
        return {
            **figures,
            **observation.postcopy_figures(requests),
            "to_stop_ms": self._clock.ms(moments.stopped - moments.command),
            "command_to_stop_ms": self._clock.ms(moments.stopped - switch),
            "postcopy_ms": self._clock.ms(moments.completed - moments.stopped),
        }

    def verify(self) -> dict[str, Any]:
        """Stop the guest where it is now, and compare every word of its memory."""
        self._destination.qmp.execute("stop")
        return Records(self._destination.memory, self._case.workload).verify().to_json()


@contextmanager
def started(case: Case, contender: Contender, settings: Settings) -> Iterator[Run]:
    """A run whose guest is at work on the source; ends its processes."""
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as directory:
        setup = Setup(
            directory=Path(directory),
            accelerator=settings.accelerator,
            memory_mib=settings.memory_mib,
            workload=case.workload,
            clock=settings.clock.anchored(),
            huge_pages=case.huge_pages,
            link=settings.link,
        )
        run = Run(case, contender, setup, settings)
        try:
            yield run
        finally:
            run.close()


def _reported(info: dict[str, Any]) -> Figures:
    """What the source's ``query-migrate`` says, under our names."""
    ram = info.get("ram", {})
    return {
        "sent_mib": ram.get("transferred", 0) / MIB,
        "syncs": ram.get("dirty-sync-count"),
        "requests": ram.get("postcopy-requests"),
        "reported_downtime_ms": info.get("downtime"),
        "reported_total_ms": info.get("total-time"),
    }


def _rate(mib: float | None, ms: float | None) -> float | None:
    return mib / ms * 1e3 if mib is not None and ms else None


def _each_gib(seconds: float | None, mib: float | None) -> float | None:
    return seconds * 1024 / mib if seconds is not None and mib else None


def _brief(info: dict[str, Any]) -> str:
    return f"{info.get('status')} {info.get('error-desc', '')}".strip()
