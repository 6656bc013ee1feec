"""``python -m benchmarks.back_ends``: what a vhost-user back end adds to downtimes, and its page faults."""

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import campaign, host
from benchmarks.block_reads import commands, running
from benchmarks.clock import Clock, rdtsc
from benchmarks.demand_faults import build
from benchmarks.disk_guest import DISK_BYTES, DiskGuest, DiskWork, DriveSetup, WithDrive
from benchmarks.report import Finding, Results, median, number
from benchmarks.scenario import Case, Contender, Figure
from benchmarks.timings import Figures
from benchmarks.touching_back_end import Burst
from benchmarks.workload import MIB, Records, Workload

FAULTS: Final = "faults"
ADDED_MS: Final = 10.0
FAULT_RATIO: Final = 1.3

_NONE: Final = Contender("drive", "no back end (--drive)", WithDrive)
_OURS: Final = Contender("postcopy", "our back end", WithDrive)
_THEIRS: Final = Contender("qemu-storage-daemon", "qemu-storage-daemon", WithDrive)
_CONTENDERS: Final = (_NONE, _OURS, _THEIRS)
_OTHERS: Final = Figure("others_cpus", "CPUs busy with others", compared=False)
_DOWNTIMES: Final = (
    Figure("reported_downtime_ms", "downtime the engine reports, ms"),
    Figure("reported_silence_ms", "guest-downtime-us the engine reports, ms"),
    Figure("stop_to_resume_ms", "from the event STOP to the event RESUME, ms"),
    Figure("guest_stop_ms", "longest stop the guest saw, ms"),
    Figure("total_ms", "total time, ms"),
    _OTHERS,
)
_WHO: Final = {"vcpu": "a vCPU's", "back_end": "a back end's"}
_WHEN: Final = {"alone": "alone", "together": "both at once"}
_FAULTS: Final = (
    *(
        Figure(f"{who}_{when}_{key}", f"{whose} fault, {title}, {unit}")
        for when, title in _WHEN.items()
        for key, unit in (("p50_us", "p50, µs"), ("p99_us", "p99, µs"), ("count", "how many"))
        for who, whose in _WHO.items()
    ),
    _OTHERS,
)
_UNLIMITED: Final = 1 << 40
_PUSH_LIMIT: Final = 20 * 10**6
_REMOTE_S: Final = 100e-6
"""A page that came from the source; what is shorter was there, and is the hypervisor's own fault."""
_SETTLE_S: Final = 1.0
_BURST_S: Final = 2.0
_LISTENS: Final = "00010000"  # __SO_ACCEPTCON of Linux's include/linux/net.h
_LOOK_S: Final = 0.01


def cases(sizes_mib: Sequence[int]) -> list[Case]:
    """Two moves of a guest of each size, and the faults of a guest of the first."""
    moves = [
        Case(f"{how}-{size}", f"{how}, guest of {size} MiB that uses its drive", DiskWork.of_size(size),
             _DOWNTIMES, _CONTENDERS, {}, 0 if how == "postcopy" else None, memory_mib=size)
        for size in sizes_mib
        for how in ("precopy", "postcopy")
    ]  # fmt: skip
    size = sizes_mib[0]
    work = Workload(size // 4 * MIB, size // 2 * MIB, random=True)
    what = (
        f"a vCPU and a back end touch missing pages, the push capped at {_PUSH_LIMIT // 10**6} MB/s"
    )
    return [*moves, Case(FAULTS, what, work, _FAULTS, (_OURS,), {}, 0, memory_mib=size)]


class BackEnds:
    """Runs the cases, each time with processes of its own."""

    def __init__(self, clock: Clock, timeout_s: float, *, verify: bool) -> None:
        self._clock, self._timeout_s, self._verify = clock, timeout_s, verify

    def measure(self, case: Case, contender: Contender) -> dict[str, Any]:
        """One move of one guest; figures, and whether its memory and its drive are intact."""
        with (
            tempfile.TemporaryDirectory(
                prefix="postcopy-bench-", dir=campaign.SHARED_MEMORY
            ) as directory,
            ExitStack() as stack,
        ):
            run = _Run(case, self._clock.anchored(), self._timeout_s, Path(directory), stack)
            faults = case.name == FAULTS
            result = run.faults() if faults else run.move(contender.name)
            if self._verify:
                result["verified"] = run.verify()
            return result


class _Run:
    """A source and a destination, and their back ends, until the stack is closed."""

    def __init__(
        self, case: Case, clock: Clock, timeout_s: float, folder: Path, stack: ExitStack
    ) -> None:
        self._case, self._clock, self._timeout_s = case, clock, timeout_s
        self._folder, self._stack = folder, stack
        self._disk = folder / "disk.raw"
        with self._disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        for name in ("one", "other"):
            (folder / name).mkdir()

    def move(self, drive: str) -> dict[str, Any]:
        """Move a guest that uses its drive."""
        sides = (self._drive(drive, "one"), self._drive(drive, "other"))
        self._start(sides)
        guest = DiskGuest(self._source, self._setup)
        guest.wait_running(self._timeout_s)
        time.sleep(_SETTLE_S)
        self._start_destination()
        self._prepare(push_limit=0)
        host.warm_memory((self._case.memory_mib or 0) * 5 // 4)
        meter = self._meter()
        guest.forget()
        command = self._migrate()
        self._wait_completed()
        load = meter.stop()
        self._destination.qmp.execute("stop")
        guest = DiskGuest(self._destination, self._setup)
        info = self._source.info()
        figures = {
            "reported_downtime_ms": info.get("downtime"),
            "reported_silence_ms": _ms_of_us(info.get("x-postcopy", {}).get("guest-downtime-us")),
            "stop_to_resume_ms": self._between("STOP", "RESUME"),
            "guest_stop_ms": guest.longest_stop_ms(),
            "total_ms": self._clock.ms(self._completed() - command),
        }
        return {"figures": figures | load, "source": info, "destination": self._destination.info()}

    def faults(self) -> dict[str, Any]:
        """Have a vCPU touch missing pages, then a back end too, then the back end alone."""
        back_end, options = self._touching()
        self._start((self._drive(_OURS.name, "one"), options))
        records = Records(self._source.memory, self._case.workload)
        records.wait_running(self._timeout_s)
        time.sleep(_SETTLE_S)
        self._start_destination()
        self._destination.set_capabilities("postcopy-blocktime")
        self._prepare(push_limit=_PUSH_LIMIT)
        self._migrate()
        self._source.qmp.wait_event("MIGRATION", "postcopy-active")
        records = Records(self._destination.memory, self._case.workload)
        records.wait_progress(self._timeout_s)
        meter = self._meter()
        began = rdtsc()
        time.sleep(_BURST_S)
        together = self._burst(back_end, 0)
        self._destination.qmp.execute("stop")
        alone = self._burst(back_end, 1)
        load = meter.stop()
        if (status := self._source.info()["status"]) != "postcopy-active":
            raise RuntimeError(f"the source is {status} at the end of the capped time")
        self._destination.qmp.execute("cont")
        self._source.qmp.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        self._wait_completed()
        records.wait_progress(self._timeout_s)
        events, offset = records.events(), records.tsc_offset()
        ended = events[:, 0].astype(np.int64) - offset
        took_us = events[:, 2] / self._clock.hz * 1e6

        def of_vcpu(begin: int, end: int) -> np.ndarray[Any, Any]:
            return took_us[(ended > begin) & (ended <= end)]

        figures = {
            **remote("vcpu_alone", of_vcpu(began, together.began)),
            **remote("back_end_alone", alone.took / 1e3),
            **remote("vcpu_together", of_vcpu(together.began, together.ended)),
            **remote("back_end_together", together.took / 1e3),
        }
        return {"figures": figures | load, "destination": self._destination.info()}

    def verify(self) -> dict[str, Any]:
        """Stop the guest on the destination, and compare all that it has."""
        self._destination.qmp.execute("stop")
        if isinstance(self._case.workload, DiskWork):
            return DiskGuest(self._destination, self._setup).verify(self._disk)
        return Records(self._destination.memory, self._case.workload).verify().to_json()

    # --- processes

    def _start(self, drives: tuple[list[str], list[str]]) -> None:
        assert self._case.memory_mib is not None
        self._setup = DriveSetup(
            *(self._folder, "kvm", self._case.memory_mib, self._case.workload, self._clock),
            drives=drives,
        )
        self._source = self._stack.enter_context(closing(WithDrive("source", self._setup)))

    def _start_destination(self) -> None:
        self._destination = self._stack.enter_context(
            closing(WithDrive("destination", self._setup))
        )

    def _drive(self, kind: str, side: str) -> list[str]:
        """Options for a drive of that kind; starts its back end."""
        if kind == _NONE.name:
            return ["--drive", str(self._disk)]
        socket, command = commands(self._disk, self._folder / side)[kind]
        return self._back_end(socket, command)[1]

    def _touching(self) -> tuple[int, list[str]]:
        """The process of a back end that touches the fill, and options for its drive."""
        work, folder = self._case.workload, self._folder / "other"
        build(folder)
        socket = folder / "touching.sock"
        given = {
            "disk": self._disk,
            "socket": socket,
            "library": folder / "minimal_pager.so",
            "results": folder,
            "seconds": _BURST_S,
            "address": work.fill_at,
            "pages": work.fill_bytes // 4096,
        }
        command = [sys.executable, "-m", "benchmarks.touching_back_end"]
        command += [f"--{name}={value}" for name, value in given.items()]
        return self._back_end(socket, command)

    def _back_end(self, socket: Path, command: list[str]) -> tuple[int, list[str]]:
        process = self._stack.enter_context(running(command))
        end = time.monotonic() + self._timeout_s
        while not _is_listened_at(socket):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no back end at {socket}")
            time.sleep(_LOOK_S)
        return process.pid, ["--vhost-user-blk", str(socket)]

    def _burst(self, back_end: int, number: int) -> Burst:
        """Have the back end touch pages, and wait until it has."""
        path = self._folder / "other" / f"{number}.npy"
        os.kill(back_end, signal.SIGUSR1)
        end = time.monotonic() + self._timeout_s
        while not path.exists():
            if time.monotonic() > end:
                raise RuntimeError("the back end does not touch its pages")
            time.sleep(_LOOK_S)
        return Burst.read(path)

    def _meter(self) -> host.CpuMeter:
        pids = {"source": self._source.process.pid, "destination": self._destination.process.pid}
        return host.CpuMeter(**pids)

    # --- the move

    def _prepare(self, push_limit: int) -> None:
        self._uri = f"tcp:127.0.0.1:{host.free_port()}"
        source = self._source
        if self._case.is_postcopy:
            for side in (source, self._destination):
                side.set_capabilities("postcopy-ram")
            source.qmp.execute("migrate-set-parameters", downtime_limit=1)
        source.qmp.execute(
            "migrate-set-parameters", max_bandwidth=_UNLIMITED, max_postcopy_bandwidth=push_limit
        )
        self._destination.qmp.execute("migrate-incoming", uri=self._uri)

    def _migrate(self) -> int:
        """Begin, and switch to postcopy at once if it is one; host TSC of the beginning."""
        command = rdtsc()
        self._source.qmp.execute("migrate", uri=self._uri)
        if self._case.is_postcopy:
            self._source.qmp.wait_event("MIGRATION", "active")
            self._source.qmp.execute("migrate-start-postcopy")
        return command

    def _wait_completed(self) -> None:
        end = time.monotonic() + self._timeout_s
        for side in (self._source, self._destination):
            while (info := side.info()).get("status") != "completed":
                if info.get("status") in {"failed", "postcopy-paused"} or time.monotonic() > end:
                    raise RuntimeError(f"{side.role}: {info}; {side.log_tail()}")
                time.sleep(_LOOK_S)
        if self._case.is_postcopy and not self._source.qmp.find_event(
            "MIGRATION", "postcopy-active"
        ):
            raise RuntimeError("ended before the switch to postcopy took place")

    def _completed(self) -> int:
        found = self._source.event_tsc("MIGRATION", "completed")
        assert found is not None
        return found

    def _between(self, stop: str, resume: str) -> float | None:
        """From an event of the source to one of the destination, by their own timestamps."""
        began, ended = self._source.event_tsc(stop), self._destination.event_tsc(resume)
        return None if began is None or ended is None else self._clock.ms(ended - began)


def remote(name: str, took_us: np.ndarray[Any, Any]) -> Figures:
    """Percentiles of the accesses whose page came from the source, and how many they are."""
    surely = took_us[took_us > _REMOTE_S * 1e6]
    if not surely.size:
        return {f"{name}_count": 0.0}
    p50, p99 = (float(value) for value in np.percentile(surely, (50, 99)))
    return {f"{name}_p50_us": p50, f"{name}_p99_us": p99, f"{name}_count": float(surely.size)}


def findings(wanted: Sequence[Case], results: Results) -> list[Finding]:
    """What each back end adds to each move, and how its faults compare with a vCPU's."""
    found = []
    for case in wanted:
        found += _ratios(results) if case.name == FAULTS else _added(case, results)
    return found


def _added(case: Case, results: Results) -> list[Finding]:
    found = []
    for figure in case.figures[:4]:
        before = median(case, _NONE.name, figure.key, results)
        for contender in (_OURS, _THEIRS):
            after = median(case, contender.name, figure.key, results)
            if before is None or after is None:
                continue
            title = f"{case.name}: {contender.title} adds to the {figure.title}"
            told = f"{after - before:+.1f} ms"
            found.append(Finding(title, told, f"< {ADDED_MS:g} ms", after - before < ADDED_MS))
    return found


def _ratios(results: Results) -> list[Finding]:
    figures = [one["figures"] for one in results if one["case"] == FAULTS and "figures" in one]
    found = []
    for when, title in _WHEN.items():
        keys = f"back_end_{when}_p50_us", f"vcpu_{when}_p50_us"
        pairs = [tuple(run.get(key) for key in keys) for run in figures]
        ratios = sorted(ours / vcpu for ours, vcpu in pairs if ours and vcpu)
        if ratios:
            ratio = statistics.median(ratios)
            told = f"{ratio:.2f} [{ratios[0]:.2f} to {ratios[-1]:.2f}], n={len(ratios)}"
            what = f"a back end's fault / a vCPU's, p50, {title}"
            found.append(Finding(what, told, f"≤ {number(FAULT_RATIO)}", ratio <= FAULT_RATIO))
    return found


def _ms_of_us(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1e3


def _is_listened_at(path: Path) -> bool:
    """As the kernel's list says: a connection would be taken for a front end."""
    sockets = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(each[3] == _LISTENS and each[7:] == [str(path)] for each in sockets)


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    parser = campaign.parser("back_ends", __doc__ or "", "512")
    parser.add_argument("--cases", type=lambda text: tuple(text.split(",")), default=(),
        help="names of cases, as in the JSON; default: all")  # fmt: skip
    options = parser.parse_args()
    if missing := campaign.missing((_NONE,)):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock = Clock.measured()
    wanted = [one for one in cases(options.sizes) if one.name in options.cases or not options.cases]
    return campaign.Campaign(
        title="a guest moves with a vhost-user back end",
        head=campaign.head(clock, (_NONE,), {"repeat": options.repeat}),
        cases=wanted,
        path=options.json,
        across=lambda results: findings(wanted, results),
        quiet_s=options.quiet,
    ).run(
        campaign.alternating(wanted, options.repeat, wanted=options.engines),
        BackEnds(clock, options.timeout, verify=options.verify).measure,
    )


if __name__ == "__main__":
    sys.exit(main())
