"""``python -m benchmarks.snapshots``: images of a running guest, ours and QEMU's, side by side."""

import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock, rdtsc
from benchmarks.engines import Engine, Postcopy, Qemu, Setup
from benchmarks.images import verify_image
from benchmarks.protecting import protect_ms
from benchmarks.report import Finding, Results, median, number
from benchmarks.scenario import OURS, QEMU, Case, Contender, Figure, Target
from benchmarks.timings import Figures, Moments, Observation, Offsets
from benchmarks.workload import MIB, Records, of_size

_BACKGROUND: Final = "background-snapshot"
_THEIRS: Final = Contender(QEMU.name, "QEMU", Qemu, (_BACKGROUND,))
_OURS: Final = Contender(OURS.name, "postcopy", Postcopy, (_BACKGROUND,))
_OURS_MAPPED: Final = Contender(
    "postcopy-mapped", "postcopy, mapped-ram", Postcopy, (_BACKGROUND, "mapped-ram")
)
_STOPPED: Final = Contender("qemu-stopped", "QEMU, stop and save", Qemu)
_CONTENDERS: Final = (_THEIRS, _OURS, _OURS_MAPPED, _STOPPED)
_FIGURES: Final = (
    Figure("guest_downtime_ms", "longest stop of the guest at the stop, ms"),
    Figure("first_access_ms", "of which within an access, ms", compared=False),
    Figure("stall_p50_us", "stall of a guest write, p50, µs"),
    Figure("stall_p99_us", "stall of a guest write, p99, µs"),
    Figure("stall_max_us", "stall of a guest write, max, µs"),
    Figure("longest_after_ms", "longest gap after the stop, ms"),
    Figure("total_ms", "total time, ms"),
    Figure("stalls", "stalls the guest saw"),
    Figure("long_stalls", "stalls over 100 µs"),
    Figure("long_stall_p99_us", "stalls over 100 µs, p99, µs"),
    Figure("blocked_ms", "guest blocked after the stop, ms"),
    Figure("rate_kept", "guest's rate while the image is written / before", compared=False),
    Figure("reported_pause_us", "pause the engine reports, µs", compared=False),
    Figure("reported_stall_p99_us", "stall the engine reports, p99, µs", compared=False),
    Figure("reported_stall_max_us", "stall the engine reports, max, µs", compared=False),
    Figure("file_mib", "file on the disk, MiB"),
    Figure("engine_cpu_s", "CPU time of the process and its children, s"),
    Figure("others_cpus", "CPUs busy with others", compared=False),
)
_TARGETS: Final = {
    "guest_downtime_ms": Target(0.25),
    "stall_p99_us": Target(1.0),
    "longest_after_ms": Target(1.0),
    "total_ms": Target(1 / 3),
}
_UNLIMITED: Final = 1 << 40
_SETTLE_S: Final = 1.0
_IMAGE: Final = "image"


def cases(sizes_mib: Sequence[int]) -> list[Case]:
    """One case for each size of the guest."""
    return [
        Case(
            f"snapshot-{size}",
            f"image of a guest of {size} MiB that writes to {work.hot_bytes // MIB} MiB, "
            f"{(work.hot_bytes + work.fill_bytes) // MIB} MiB of data",
            work, _FIGURES, _CONTENDERS, _TARGETS, memory_mib=size,
        )
        for size in sizes_mib
        for work in [of_size(size, random=False)]
    ]  # fmt: skip


@dataclass(frozen=True)
class Snapshots:
    """Takes one image of one guest; the file is removed at once."""

    clock: Clock
    timeout_s: float
    verify: bool

    def measure(self, case: Case, contender: Contender) -> dict[str, Any]:
        """Start a guest, take an image of it; figures, and what the engine says itself."""
        with tempfile.TemporaryDirectory(
            prefix="postcopy-bench-", dir=campaign.SHARED_MEMORY
        ) as directory:
            assert case.memory_mib is not None
            folder, clock = Path(directory), self.clock.anchored()
            setup = Setup(folder, "kvm", case.memory_mib, case.workload, clock)
            with closing(contender.engine("source", setup)) as engine:
                result = _Taking(engine, case, contender, setup, self.timeout_s).measure()
            if self.verify:
                result["verified"] = verify_image(folder / _IMAGE, case.workload)
            return result


class _Taking:
    """One image being taken."""

    def __init__(
        self, engine: Engine, case: Case, contender: Contender, setup: Setup, timeout_s: float
    ) -> None:
        self._engine, self._clock = engine, setup.clock
        self._contender, self._timeout_s = contender, timeout_s
        self._image = setup.directory / _IMAGE
        self._data_mib = (case.workload.hot_bytes + case.workload.fill_bytes) // MIB
        self._records = Records(engine.memory, case.workload)

    def measure(self) -> dict[str, Any]:
        """See :meth:`Snapshots.measure`."""
        self._records.wait_running(self._timeout_s)
        time.sleep(_SETTLE_S)
        before = self._records.tsc_offset()
        self._engine.set_capabilities(*self._contender.capabilities)
        self._engine.qmp.execute("migrate-set-parameters", max_bandwidth=_UNLIMITED)
        host.warm_memory(self._data_mib * 5 // 4)
        time.sleep(0.1)
        meter = host.CpuMeter(engine=self._engine.process.pid)
        stopped_first = not self._contender.capabilities
        command = rdtsc()
        if stopped_first:
            self._engine.qmp.execute("stop")
        self._engine.qmp.execute("migrate", uri=f"file:{self._image}")
        self._engine.qmp.wait_event("MIGRATION", "completed", self._timeout_s)
        load = meter.stop()
        moments = self._moments(command)
        info = self._engine.info()
        figures: Figures = {"total_ms": self._clock.ms(moments.completed - command)}
        if not stopped_first:
            figures = self._seen(before, moments) | figures
        figures["file_mib"] = self._image.stat().st_blocks * 512 / MIB
        return {"figures": figures | reported(info) | load, "source": info}

    def _moments(self, command: int) -> Moments:
        stopped = self._engine.event_tsc("STOP")
        completed = self._engine.event_tsc("MIGRATION", "completed")
        assert completed is not None
        if stopped is None:
            raise RuntimeError("the engine sent no STOP: the guest was not stopped for its image")
        return Moments(command, stopped, completed)

    def _seen(self, before: int, moments: Moments) -> Figures:
        """What the guest has noted of it, read where it runs on."""
        self._records.wait_progress(self._timeout_s)
        time.sleep(_SETTLE_S)
        offsets = Offsets(before, self._records.tsc_offset())
        events, series = self._records.events(), self._records.series()
        return Observation(events, series, offsets, moments, self._clock).snapshot_figures()


def reported(info: Mapping[str, Any]) -> Figures:
    """What our ``query-migrate`` says of an image, under our names; a real QEMU says nothing."""
    measured = info.get("x-postcopy", {})
    return {
        "reported_pause_us": measured.get("pause-us"),
        "reported_stall_p99_us": measured.get("write-stall-p99-us"),
        "reported_stall_max_us": measured.get("write-stall-max-us"),
    }


def growth(cases: Sequence[Case], results: Results, ioctl_ms: Mapping[int, float]) -> list[Finding]:
    """By how much our stop grows from the smallest guest to the largest, beside the bare ioctl.

    :param ioctl_ms: what write-protecting so many MiB of guest takes, by MiB.
    """
    found = []
    for contender in (_OURS, _OURS_MAPPED):
        ends = [
            median(c, contender.name, "guest_downtime_ms", results) for c in (cases[0], cases[-1])
        ]
        if None in ends or len(cases) < 2:
            continue
        sizes = [case.memory_mib or 0 for case in (cases[0], cases[-1])]
        stop_ms = (ends[1] or 0.0) - (ends[0] or 0.0)
        ioctl = ioctl_ms[sizes[1]] - ioctl_ms[sizes[0]]
        title = f"longest stop, {contender.title}: from {sizes[0]} to {sizes[1]} MiB it grows by"
        limit = f"≤ {number(ioctl)} ms, what the write-protect ioctl grows by"
        found.append(Finding(title, f"{number(stop_ms)} ms", limit, stop_ms <= ioctl))
    return found


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    options = campaign.parser("snapshots", __doc__ or "", "256,1024,4096").parse_args()
    chosen = [one for one in _CONTENDERS if not options.engines or one.name in options.engines]
    if missing := campaign.missing(chosen):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock, wanted = Clock.measured(), cases(options.sizes)
    ioctl_ms = {
        case.memory_mib or 0: protect_ms(case.memory_mib or 0, case.workload) for case in wanted
    }
    asked = {"repeat": options.repeat, "protect_ioctl_ms": ioctl_ms}
    return campaign.Campaign(
        title="images of a running guest: postcopy and QEMU, side by side",
        head=campaign.head(clock, chosen, asked),
        cases=wanted,
        path=options.json,
        across=lambda results: growth(wanted, results, ioctl_ms),
        quiet_s=options.quiet,
    ).run(
        campaign.alternating(wanted, options.repeat, wanted=options.engines),
        Snapshots(clock, options.timeout, options.verify).measure,
    )


if __name__ == "__main__":
    sys.exit(main())
