"""What is measured, of whom, and what is to be reached: data, no action."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.engines import Engine, Postcopy, Qemu
from benchmarks.workload import MIB, Workload


@dataclass(frozen=True)
class Contender:
    """An engine with some capabilities switched on; one column of a table.

    :param options: of the command line that wakes a guest.
    """

    name: str
    title: str
    engine: type[Engine]
    capabilities: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


QEMU: Final = Contender("qemu", "QEMU", Qemu)
OURS: Final = Contender("postcopy", "postcopy", Postcopy)
QEMU_PREEMPT: Final = Contender("qemu-preempt", "QEMU, preempt", Qemu, ("postcopy-preempt",))
OURS_PREEMPT: Final = Contender(
    "postcopy-preempt", "postcopy, preempt", Postcopy, ("postcopy-preempt",)
)
CONTENDERS: Final = (QEMU, OURS, QEMU_PREEMPT, OURS_PREEMPT)


CAPPED_S: Final = 5.0
"""Of postcopy under a cap: thousands of faults, and at 50 MB/s by far not all pages yet."""


@dataclass(frozen=True)
class Target:
    """A bound of the ratio ours / QEMU: at least or at most that."""

    ratio: float
    at_least: bool = False

    def reached(self, ratio: float) -> bool:
        """Whether a ratio is within the bound."""
        return ratio >= self.ratio if self.at_least else ratio <= self.ratio

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.ratio:.3g}"


@dataclass(frozen=True)
class Figure:
    """One line of a table: the key of a run's figures, and what to call it.

    :param compared: whether a ratio of two engines says anything.
    """

    key: str
    title: str
    compared: bool = True


@dataclass(frozen=True)
class Case:
    """One thing to do to a guest.

    :param switch_after_passes: None is precopy to the end; otherwise migrate-start-postcopy when
        the bitmap has been synchronised so many times more than at the start; 0 is at once.
    :param stop_first: the guest is stopped before: the stream alone.
    :param memory_mib: of the guest; None is what the command line says.
    :param compared: names of contenders: ratios are of each of them by the last.
    :param push_limit: ``max-postcopy-bandwidth``, bytes a second, for :data:`CAPPED_S` of postcopy;
        figures are of that time alone, and then the cap is lifted so that the run ends; 0: no cap.
    :param huge_pages: the guest's memory is of 2 MiB pages from the host's pool.
    :param channels: of multifd, on both sides; 0: it is off.
    :param encrypted: with TLS, as the users of both have it: TLS 1.3, each checks the other's certificate.
    """

    name: str
    title: str
    workload: Workload
    figures: tuple[Figure, ...]
    contenders: tuple[Contender, ...]
    targets: Mapping[str, Target]
    switch_after_passes: int | None = None
    stop_first: bool = False
    memory_mib: int | None = None
    compared: tuple[str, ...] = (OURS.name, QEMU.name)
    push_limit: int = 0
    huge_pages: bool = False
    channels: int = 0
    encrypted: bool = False

    @property
    def is_postcopy(self) -> bool:
        """Whether it switches to postcopy."""
        return self.switch_after_passes is not None


_STREAM: Final = (
    Figure("mib_s", "sent / total time, MiB/s"),
    Figure("total_ms", "total time, ms"),
    Figure("sent_mib", "sent, MiB"),
)
_LINK_USE: Final = Figure("link_use", "bytes on the wire / what the link can carry")
_LOAD: Final = (
    Figure("syncs", "bitmap synchronisations"),
    Figure("source_cpu_s", "CPU time of the source, s"),
    Figure("destination_cpu_s", "CPU time of the destination, s"),
    Figure("others_cpus", "CPUs busy with others", compared=False),
)
_CPU_OF_DATA: Final = (
    Figure("source_cpu_s_gib", "CPU time of the source for each GiB sent, s"),
    Figure("destination_cpu_s_gib", "CPU time of the destination for each GiB sent, s"),
)
_PRECOPY: Final = (
    *_STREAM,
    Figure("guest_downtime_ms", "downtime the guest saw, ms"),
    Figure("reported_downtime_ms", "downtime the engine reports, ms"),
    Figure("longest_gap_ms", "longest gap the guest saw, ms"),
    Figure("rate_kept", "guest's rate while migrating / before"),
    Figure("rate_before", "guest's rate before, M/s"),
    Figure("rate_source", "guest's rate while migrating, M/s"),
    Figure("rate_destination", "guest's rate after, M/s"),
    *_LOAD,
)
_POSTCOPY: Final = (
    Figure("guest_downtime_ms", "longest stop of the guest at the switch, ms"),
    Figure("fault_p50_us", "fault latency the guest saw, p50, µs"),
    Figure("fault_p90_us", "fault latency the guest saw, p90, µs"),
    Figure("fault_p99_us", "fault latency the guest saw, p99, µs"),
    Figure("fault_max_us", "fault latency the guest saw, max, µs"),
    Figure("total_ms", "total time, ms"),
    Figure("faults", "faults the guest saw"),
    Figure("requests", "page requests the source got"),
    Figure("blocked_ms", "guest blocked in postcopy, ms"),
    Figure("to_stop_ms", "from migrate to the stop, ms"),
    Figure("command_to_stop_ms", "from migrate-start-postcopy to the stop, ms"),
    Figure("postcopy_ms", "from the stop to the end, ms"),
    Figure("reported_downtime_ms", "downtime the engine reports, ms"),
    Figure("sent_mib", "sent, MiB"),
    Figure("rate_before", "guest's rate before, M/s"),
    Figure("rate_source", "guest's rate until the stop, M/s"),
    Figure("rate_postcopy", "guest's rate in postcopy, M/s"),
    Figure("rate_settled", "guest's rate after, M/s"),
    Figure("recovery_ms", "from the stop to half of that rate, ms"),
    *_LOAD,
)
_FASTER_STREAM: Final = {"mib_s": Target(1.5, at_least=True)}
_PRECOPY_TARGETS: Final = {
    **_FASTER_STREAM,
    "guest_downtime_ms": Target(1.0),
    "rate_kept": Target(1.0, at_least=True),
}
_POSTCOPY_TARGETS: Final = {
    "guest_downtime_ms": Target(0.5),
    "fault_p50_us": Target(0.25),
    "fault_p99_us": Target(0.25),
    "total_ms": Target(1.2),
}
_CAPPED: Final = tuple(
    figure
    for figure in _POSTCOPY
    if figure.key not in {"total_ms", "postcopy_ms", "recovery_ms", "rate_settled", "sent_mib"}
)
_UNCAPPED_PREEMPT_TARGETS: Final = {
    "fault_p50_us": Target(1 / 3),
    "fault_p99_us": Target(1 / 3),
    "postcopy_ms": Target(1.2),
}
_LINK_TARGETS: Final = {
    "guest_downtime_ms": Target(1.0),
    "fault_p50_us": Target(1.0),
    "fault_p99_us": Target(1.0),
    "total_ms": Target(1.0),
}
_HUGE_TARGETS: Final = {
    "fault_p50_us": Target(1.0),
    "fault_p99_us": Target(1.0),
    "total_ms": Target(1.0),
}
_TWO: Final = (QEMU, OURS)
_ONE_CHANNEL: Final = (QEMU, OURS, QEMU_PREEMPT)
_TWO_CHANNELS: Final = (QEMU_PREEMPT, OURS_PREEMPT)

USUAL_CASES: Final = ("precopy", "idle", "stopped", "postcopy", "now")
"""Those that are run when none are named; the others are about the requested pages alone."""


def cases(scale: float = 1.0) -> dict[str, Case]:
    """All cases by name, in the order in which they run.

    :param scale: of the guest's hot sets and fill; 1 is what the targets are about.
    """

    def mib(amount: int) -> int:
        return max(1, int(amount * scale)) * MIB

    walker = Workload(mib(64), mib(512), random=False)
    reader = Workload(mib(64), mib(512), random=False, write_fraction=0.0)
    hammer = Workload(mib(256), mib(512), random=True)
    found = (
        Case("precopy", "precopy, hot set written at full speed", walker, _PRECOPY, _TWO,
             _PRECOPY_TARGETS),
        Case("idle", "precopy, guest only reads", reader, _PRECOPY, _TWO,
             {**_FASTER_STREAM, "guest_downtime_ms": Target(1.0)}),
        Case("stopped", "precopy, guest stopped before: the stream alone", walker,
             (*_STREAM, *_CPU_OF_DATA, *_LOAD), _TWO, _FASTER_STREAM, stop_first=True),
        Case("postcopy", "postcopy after the first pass, hot set written at random", hammer,
             _POSTCOPY, _ONE_CHANNEL, _POSTCOPY_TARGETS, switch_after_passes=1),
        Case("now", "postcopy at once, hot set written at random", hammer, _POSTCOPY, _ONE_CHANNEL,
             _POSTCOPY_TARGETS, switch_after_passes=0),
        *(_capped(mb_s, hammer) for mb_s in (20, 50)),
        *(case for channels in (2, 4) for case in _multifd(channels, walker)),
        *(_encrypted(channels, walker) for channels in (0, 4)),
        Case("uncapped-preempt", "postcopy at once, hot set written at random, both with preempt",
             hammer, _POSTCOPY, _TWO_CHANNELS, _UNCAPPED_PREEMPT_TARGETS, switch_after_passes=0,
             compared=(OURS_PREEMPT.name, QEMU_PREEMPT.name)),
        Case("huge-precopy", "precopy, 2 MiB pages, guest stopped before: the stream alone", walker,
             (*_STREAM, *_LOAD), _TWO, {"mib_s": Target(1.0, at_least=True)}, stop_first=True,
             huge_pages=True),
        Case("huge", "postcopy at once, 2 MiB pages, hot set written at random", hammer, _POSTCOPY,
             (QEMU, OURS), _HUGE_TARGETS, switch_after_passes=0, huge_pages=True),
        Case("huge-preempt", "as huge, both with preempt", hammer, _POSTCOPY, _TWO_CHANNELS,
             _HUGE_TARGETS, switch_after_passes=0, huge_pages=True,
             compared=(OURS_PREEMPT.name, QEMU_PREEMPT.name)),
    )  # fmt: skip
    return {case.name: case for case in found}


def link_cases() -> dict[str, Case]:
    """The cases over a link that is slower than loopback, by name."""
    hammer = Workload(128 * MIB, 384 * MIB, random=True)
    walker = Workload(32 * MIB, 384 * MIB, random=False)
    figures = (_LINK_USE, *_POSTCOPY)
    found = (
        Case("preempt", "postcopy at once, hot set written at random, both with preempt", hammer,
             figures, _TWO_CHANNELS, _LINK_TARGETS, switch_after_passes=0,
             compared=(OURS_PREEMPT.name, QEMU_PREEMPT.name)),
        Case("one", "postcopy at once, hot set written at random, one channel", hammer, figures, _TWO,
             _LINK_TARGETS, switch_after_passes=0),
        Case("precopy", "precopy, hot set written at full speed", walker, (_LINK_USE, *_PRECOPY), _TWO,
             {"total_ms": Target(1.0)}),
    )  # fmt: skip
    return {case.name: case for case in found}


def _multifd(channels: int, workload: Workload) -> tuple[Case, Case]:
    faster = {"mib_s": Target(1.0, at_least=True)}
    kept = {"rate_kept": Target(1.0, at_least=True)}
    figures = (*_STREAM, *_CPU_OF_DATA, *_LOAD)
    return (
        Case(f"multifd-{channels}-stopped", f"as stopped, {channels} channels of multifd", workload,
             figures, _TWO, faster, stop_first=True, channels=channels),
        Case(f"multifd-{channels}", f"as precopy, {channels} channels of multifd", workload,
             (*_PRECOPY, *_CPU_OF_DATA), _TWO, faster | kept, channels=channels),
    )  # fmt: skip


def _encrypted(channels: int, workload: Workload) -> Case:
    name, title = "stopped", "as stopped"
    if channels:
        name, title = f"multifd-{channels}-stopped", f"as multifd-{channels}-stopped"
    return Case(f"tls-{name}", f"{title}, encrypted", workload, (*_STREAM, *_CPU_OF_DATA, *_LOAD), _TWO,
                {"mib_s": Target(1.0, at_least=True)}, stop_first=True, channels=channels,
                encrypted=True)  # fmt: skip


def _capped(mb_s: int, workload: Workload) -> Case:
    return Case(
        f"capped-{mb_s}",
        f"postcopy at once, hot set written at random, the push capped at {mb_s} MB/s",
        workload,
        _CAPPED,
        (QEMU_PREEMPT, OURS, OURS_PREEMPT),
        {"fault_p99_us": Target(1.0)},
        switch_after_passes=0,
        push_limit=mb_s * 10**6,
        compared=(OURS.name, OURS_PREEMPT.name, QEMU_PREEMPT.name),
    )
