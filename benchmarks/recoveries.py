"""``python -m benchmarks.recoveries``: how long a guest waits when a link or an engine is replaced."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock, rdtsc
from benchmarks.engines import Engine, Postcopy, Setup
from benchmarks.images import Images
from benchmarks.report import Finding, Results
from benchmarks.scenario import OURS, Case, Figure
from benchmarks.standstill import Gaps, judged
from benchmarks.workload import MIB, Records, Workload

_PUSH_LIMIT: Final = 20 * 10**6
"""Bytes a second, until what is measured is over: most pages are still missing then."""
_UNLIMITED: Final = 1 << 40
_SETTLE_S: Final = 0.5
_BREAK_AFTER_S: Final = 0.5
_SERVED_S: Final = 0.3
_STANDS_STILL_S: Final = 0.05
_POLL_S: Final = 0.005

RECOVER: Final = "recover"
RESPAWN: Final = "respawn"
LIMITS_MS: Final = {RECOVER: 250.0, RESPAWN: 400.0}

_COMMON: Final = (
    Figure("missing_mib", "memory not there yet, MiB", compared=False),
    Figure("others_cpus", "CPUs busy with others", compared=False),
)
_FIGURES: Final = {
    RECOVER: (
        Figure("served_ms", "from `migrate` with `resume` to the first page served, ms"),
        Figure("recover_ms", "from there to the source's status postcopy-recover, ms"),
        Figure("active_ms", "from there to the source's status postcopy-active, ms"),
        Figure("paused_ms", "from `migrate-pause` until both sides are paused, ms"),
        *_COMMON,
    ),
    RESPAWN: (
        Figure("served_ms", "from the kill to the next page served, ms"),
        Figure("gap_ms", "longest gap the guest saw, ms"),
        *_COMMON,
    ),
}
_TITLES: Final = {
    RECOVER: "a postcopy of a guest of {} MiB is broken and recovered",
    RESPAWN: "the engine of a lazy restore of a guest of {} MiB is killed",
}


def cases(names: Sequence[str], memory_mib: int) -> list[Case]:
    """What is done to a guest of that size that writes to an eighth of its memory at random."""
    hot_mib = memory_mib // 8
    work = Workload(hot_mib * MIB, (memory_mib - 64 - hot_mib) * MIB, random=True)
    return [
        Case(name, _TITLES[name].format(memory_mib), work, _FIGURES[name], (OURS,), {},
             memory_mib=memory_mib)
        for name in names
    ]  # fmt: skip


class Recoveries:
    """Runs the cases, each time with processes of its own."""

    def __init__(self, images: Images, timeout_s: float, *, verify: bool) -> None:
        self._images, self._timeout_s, self._verify = images, timeout_s, verify

    def measure(self, case: Case, *_: object) -> dict[str, Any]:
        """One break of one guest; figures, and whether its memory is intact at the end."""
        with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as folder, ExitStack() as stack:
            setup = self._images.setup(case, Path(folder))
            if case.name == RECOVER:
                broken: _Broken = _BrokenLink(setup, self._timeout_s, stack)
            else:
                image = self._images.image(case, Postcopy).path
                broken = _KilledEngine(setup, self._timeout_s, stack, image)
            figures = broken.measure()
            result: dict[str, Any] = {"figures": figures, "destination": broken.destination.info()}
            if self._verify:
                broken.destination.qmp.execute("stop")
                result["verified"] = broken.records.verify().to_json()
            return result


class _Broken:
    """What both have in common: a destination whose guest lacks pages, and then has them all."""

    def __init__(self, setup: Setup, timeout_s: float, stack: ExitStack) -> None:
        self._setup, self._timeout_s, self._clock = setup, timeout_s, setup.clock
        self._stack = stack

    def started(self, role: str) -> Engine:
        """One of our machines, ended with the run."""
        return self._stack.enter_context(closing(Postcopy(role, self._setup)))

    @property
    def destination(self) -> Engine:
        """Where the guest is."""
        raise NotImplementedError

    def measure(self) -> dict[str, float | None]:
        """Break it, have it go on, wait for its end."""
        raise NotImplementedError

    @property
    def records(self) -> Records:
        """What the guest has noted."""
        return Records(self.destination.memory, self._setup.workload)

    def ms(self, cycles: int | None) -> float | None:
        """So many cycles in milliseconds."""
        return None if cycles is None else self._clock.ms(cycles)

    def gaps(self, *sides: Engine) -> Gaps:
        """The guest's gaps, read when all of its memory is there."""
        for side in sides:
            self._completed(side)
        records = self.records
        records.wait_progress(self._timeout_s)
        return Gaps(records.events(), records.tsc_offset())

    def _completed(self, side: Engine) -> None:
        for status in self._statuses(side):
            if status == "completed":
                return
            if status in {"failed", "postcopy-paused"}:
                raise RuntimeError(f"{side.role}: {status}; {side.info()}; {side.log_tail()}")

    def _statuses(self, side: Engine) -> Iterator[str]:
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            yield side.info().get("status", "none")
            time.sleep(_POLL_S)
        raise RuntimeError(f"{side.role} did not end in time: {side.info()}")

    def wait_standstill(self) -> None:
        """Wait until the guest waits for a page.

        :raises RuntimeError: it does not.
        """
        end = time.monotonic() + self._timeout_s
        before = None
        while time.monotonic() < end:
            now = self.records.state().iterations
            if now == before:
                return
            before = now
            time.sleep(_STANDS_STILL_S)
        raise RuntimeError("the guest never touched a page that was missing")


class _BrokenLink(_Broken):
    """A postcopy whose link is broken, and that is recovered."""

    def __init__(self, setup: Setup, timeout_s: float, stack: ExitStack) -> None:
        super().__init__(setup, timeout_s, stack)
        self._source = self.started("source")
        Records(self._source.memory, setup.workload).wait_running(timeout_s)
        time.sleep(_SETTLE_S)
        self._destination = self.started("destination")

    @property
    def destination(self) -> Engine:
        """See :class:`_Broken`."""
        return self._destination

    def measure(self) -> dict[str, float | None]:
        """See :class:`_Broken`."""
        self._begin()
        with _load(source=self._source, destination=self._destination) as load:
            time.sleep(_BREAK_AFTER_S)
            paused_ms = self._break()
            missing = self._source.info()["ram"]["remaining"] / MIB
            uri = f"tcp:127.0.0.1:{host.free_port()}"
            self._destination.qmp.execute("migrate-recover", uri=uri)
            seen = len(self._source.qmp.events)
            command = rdtsc()
            self._source.qmp.execute("migrate", uri=uri, resume=True)
            self._wait_gone_on()
        self._source.qmp.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        served = self.gaps(self._source, self._destination).end_of_gap_at(command)
        if served is None:
            raise RuntimeError("the guest was not waiting for a page when the link came back")
        return {
            "served_ms": self.ms(served - command),
            "recover_ms": self._until("postcopy-recover", seen, command),
            "active_ms": self._until("postcopy-active", seen, command),
            "paused_ms": paused_ms,
            "missing_mib": missing,
            **load,
        }

    def _begin(self) -> None:
        """Into postcopy, with a guest that works there."""
        source, uri = self._source, f"tcp:127.0.0.1:{host.free_port()}"
        for side in (source, self._destination):
            side.set_capabilities("postcopy-ram")
        source.qmp.execute(
            "migrate-set-parameters",
            max_bandwidth=_UNLIMITED,
            max_postcopy_bandwidth=_PUSH_LIMIT,
            downtime_limit=1,
        )
        self._destination.qmp.execute("migrate-incoming", uri=uri)
        host.warm_memory(self._setup.memory_mib * 5 // 4)
        source.qmp.execute("migrate", uri=uri)
        source.qmp.wait_event("MIGRATION", "active")
        source.qmp.execute("migrate-start-postcopy")
        source.qmp.wait_event("MIGRATION", "postcopy-active")
        self.records.wait_progress(self._timeout_s)

    def _break(self) -> float | None:
        """Until both sides have noticed and the guest waits; how long the former took, ms."""
        began = rdtsc()
        self._source.qmp.execute("migrate-pause")
        for side in (self._source, self._destination):
            side.qmp.wait_event("MIGRATION", "postcopy-paused")
        paused = rdtsc()
        self.wait_standstill()
        return self.ms(paused - began)

    def _wait_gone_on(self) -> None:
        stood = self.records.state().iterations
        end = time.monotonic() + self._timeout_s
        while self.records.state().iterations == stood:
            if time.monotonic() > end:
                raise RuntimeError(f"the guest does not go on: {self._source.info()}")
            time.sleep(_POLL_S)

    def _until(self, status: str, seen: int, command: int) -> float | None:
        """From the command to an event after it, by the engine's own timestamp."""
        for event in self._source.qmp.events[seen:]:
            if event["event"] == "MIGRATION" and event["data"]["status"] == status:
                stamp = event["timestamp"]
                at = self._clock.from_wall_clock(stamp["seconds"], stamp["microseconds"])
                return self.ms(at - command)
        return None


class _KilledEngine(_Broken):
    """A lazy restore whose engine is killed while the guest touches what is missing."""

    def __init__(self, setup: Setup, timeout_s: float, stack: ExitStack, image: Path) -> None:
        super().__init__(setup, timeout_s, stack)
        self._image = image
        self._destination = self.started("destination")

    @property
    def destination(self) -> Engine:
        """See :class:`_Broken`."""
        return self._destination

    def measure(self) -> dict[str, float | None]:
        """See :class:`_Broken`."""
        side = self._destination
        side.qmp.execute("migrate-set-parameters", max_postcopy_bandwidth=_PUSH_LIMIT)
        host.warm_memory(self._setup.memory_mib * 5 // 4)
        side.qmp.execute("x-restore", path=str(self._image), lazy=True)
        # Not before: to read memory that nobody watches yet is to fill it with zeros.
        side.qmp.wait_event("MIGRATION", "postcopy-active")
        self.records.wait_progress(self._timeout_s)
        with _load(destination=side) as load:
            time.sleep(_BREAK_AFTER_S)
            missing = side.info()["ram"]["remaining"] / MIB
            victim = engine_at_work(side.process.pid, self._image)
            if victim is None:
                raise RuntimeError(f"no engine has the image mapped: {side.info()}")
            killed = rdtsc()
            os.kill(victim, signal.SIGKILL)
            self._wait_successor(victim)
            lifted = rdtsc()
        side.qmp.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        gap = self.gaps(side).longest(killed, lifted)
        if gap is None:
            raise RuntimeError("the guest never waited for a page of the new engine")
        return {
            "served_ms": self.ms(gap.ended - killed),
            "gap_ms": self.ms(gap.length),
            "missing_mib": missing,
            **load,
        }

    def _wait_successor(self, victim: int) -> None:
        """Wait until another engine is at work, and has been for a while."""
        end = time.monotonic() + self._timeout_s
        while engine_at_work(self._destination.process.pid, self._image) in {None, victim}:
            if time.monotonic() > end:
                raise RuntimeError(f"no other engine in time: {self._destination.info()}")
            time.sleep(_POLL_S)
        self.records.wait_progress(self._timeout_s)
        time.sleep(_SERVED_S)


def engine_at_work(guest_process: int, image: Path) -> int | None:
    """The child process that has this image mapped; None while none has."""
    tasks = Path(f"/proc/{guest_process}/task").glob("*/children")
    for child in (int(child) for task in tasks for child in task.read_text().split()):
        try:
            if f" {image}\n" in Path(f"/proc/{child}/maps").read_text():
                return child
        except OSError:
            continue  # it has just died
    return None


@contextmanager
def _load(**engines: Engine) -> Iterator[dict[str, float]]:
    """Filled at the end with what the processes and others used of the CPUs.

    Over half a second or more: the kernel counts in hundredths.
    """
    meter = host.CpuMeter(**{name: engine.process.pid for name, engine in engines.items()})
    found: dict[str, float] = {}
    yield found
    found.update(meter.stop())


def findings(wanted: Sequence[Case], results: Results) -> list[Finding]:
    """Whether the longest waits are as short as they should be."""
    found = []
    for case in wanted:
        times_ms = [
            result["figures"]["served_ms"]
            for result in results
            if result["case"] == case.name and "figures" in result
        ]
        found.append(judged(case.figures[0].title, times_ms, LIMITS_MS[case.name]))
    return found


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    options = _options()
    if missing := campaign.missing((OURS,)):
        print(missing, file=sys.stderr)
        return 3
    # Ends with all processes ended, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock, wanted = Clock.measured(), cases(options.cases, options.ram)
    asked = {"guest_mib": options.ram, "repeat": options.repeat, "push_mb_s": _PUSH_LIMIT // 10**6}
    with Images(clock, options.timeout) as images:
        return campaign.Campaign(
            title="a link and an engine are replaced while the guest waits",
            head=campaign.head(clock, (OURS,), asked),
            cases=wanted,
            path=options.json,
            across=lambda results: findings(wanted, results),
            quiet_s=options.quiet,
        ).run(
            campaign.alternating(wanted, options.repeat, by_case=True),
            Recoveries(images, options.timeout, verify=options.verify).measure,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recoveries", description=__doc__)
    add = parser.add_argument
    add("--cases", type=_names, default=tuple(LIMITS_MS), help=f"of {','.join(LIMITS_MS)}")
    add("--repeat", type=int, default=20, help="runs of each; default 20")
    add("--ram", type=int, default=2048, help="MiB of guest memory; default 2048")
    add("--json", type=Path, default=campaign.default_path("recoveries"),
        help="default: benchmarks/results/DATE-recoveries.json; .md beside it")  # fmt: skip
    add("--no-verify", dest="verify", action="store_false", help="do not check guest memory")
    add("--timeout", type=float, default=120, help="seconds one step may take")
    add("--quiet", type=float, default=15,
        help="seconds to wait before each run for others to be quiet")  # fmt: skip
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in LIMITS_MS]:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there is {','.join(LIMITS_MS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
