"""``python -m benchmarks.working_sets``: lazy restores with and without a recorded working set."""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from benchmarks import campaign
from benchmarks.clock import Clock
from benchmarks.engines import Postcopy
from benchmarks.images import Images, Woken, data_mib, times, wake
from benchmarks.scenario import Case, Contender, Figure, Target
from benchmarks.woken import Life
from benchmarks.woken import figures as guest_figures
from benchmarks.workload import MIB, Workload, of_size
from postcopy.image.working_set import SUFFIX

_WITHOUT: Final = Contender(
    "without", "without a working set", Postcopy, options=("--prefetch", "off")
)
_WITH: Final = Contender("with", "with it", Postcopy, options=("--prefetch", "auto"))
_RECORDING: Final = Contender(
    "recording", "recording", Postcopy, options=("--record-working-set", "--prefetch", "off")
)
_CONTENDERS: Final = (_WITHOUT, _WITH)
_FIGURES: Final = (
    Figure("demand_faults", "demand faults"),
    Figure("ready_ms", "process start to ready, as the engine says, ms"),
    Figure("working_ms", "process start to half the settled rate, as the guest saw it, ms"),
    Figure("reported_fault_p50_us", "demand fault, p50, as the engine says, µs"),
    Figure("reported_fault_p99_us", "demand fault, p99, as the engine says, µs"),
    Figure("reported_fault_max_us", "demand fault, max, as the engine says, µs"),
    Figure("waits", "accesses over 10 µs the guest saw until all was there"),
    Figure("wait_p50_us", "such an access, p50, µs"),
    Figure("wait_p99_us", "such an access, p99, µs"),
    Figure("long_waits", "accesses over 100 µs"),
    Figure("long_wait_p99_us", "such an access, p99, µs"),
    Figure("blocked_ms", "guest blocked until all was there, ms"),
    Figure("first_ms", "process start to the guest's first access, ms"),
    Figure("after_running_ms", "from running to ready, ms"),
    Figure("complete_ms", "process start to all memory there, ms"),
    Figure("working_set_pages", "pages of the working set", compared=False),
    Figure("engine_cpu_s", "CPU time of the process and its children, s"),
    Figure("others_cpus", "CPUs busy with others", compared=False),
)
_TARGETS: Final = {
    "demand_faults": Target(0.1),
    "ready_ms": Target(0.5),
    "reported_fault_p99_us": Target(1.2),
}
_SCATTERED_BYTES: Final = 8 * 4096
_LOOK_S: Final = 1.0


def cases(sizes_mib: Sequence[int]) -> list[Case]:
    """Two cases for each size of the guest; ratios are with / without."""
    return [
        Case(
            f"{layout}-{size}",
            f"a guest of {size} MiB wakes from {data_mib(work)} MiB of data and writes at random to "
            f"{work.hot_bytes // work.stride_bytes * 4096 // MIB} of them, {told}; "
            "ratio is with / without",
            work, _FIGURES, _CONTENDERS, _TARGETS,
            memory_mib=size, compared=(_WITH.name, _WITHOUT.name),
        )
        for size in sizes_mib
        for layout, told, work in _layouts(size)
    ]  # fmt: skip


def _layouts(memory_mib: int) -> list[tuple[str, str, Workload]]:
    """Where the pages lie that the guest touches.

    Not in front of all others: what is pushed in order of address would bring them first by chance.
    """
    behind = replace(of_size(memory_mib, random=True, most_mib=2048), fill_first=True)
    data = behind.hot_bytes + behind.fill_bytes
    span = data // MIB * 8 // 9 * MIB
    scattered = Workload(span, data - span, random=True, stride_bytes=_SCATTERED_BYTES)
    return [
        ("behind", "in one piece behind all others", behind),
        ("scattered", "each eighth page of 8/9 of them", scattered),
    ]


def look(woken: Woken) -> dict[str, Any]:
    """The figures of one restore; lets the guest work for a second more, to see its rate."""
    clock = woken.setup.clock
    said = times(woken.info)
    whole = woken.engine.began + clock.cycles((said["complete_ms"] or 0.0) / 1e3)
    time.sleep(_LOOK_S)
    life = Life(woken.engine.began, woken.first, whole, woken.offset)
    seen = guest_figures(woken.records.events(), woken.records.series(), life, clock)
    figures = {"first_ms": woken.ms(woken.first)} | said | seen | woken.load
    if said["ready_ms"] is not None and said["running_ms"] is not None:
        figures["after_running_ms"] = said["ready_ms"] - said["running_ms"]
    return {"figures": figures, "destination": woken.info}


def measure(
    images: Images, case: Case, contender: Contender, timeout_s: float, *, verify: bool
) -> dict[str, Any]:
    """One restore; before the first of an image its working set is recorded."""
    image = images.image(case, Postcopy)
    if not image.path.with_name(image.path.name + SUFFIX).exists():
        wake(images, case, _RECORDING, timeout_s, lambda _: {}, verify=False)
    return wake(images, case, contender, timeout_s, look, verify=verify)


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    options = campaign.parser("working_sets", __doc__ or "", "1024").parse_args()
    if missing := campaign.missing(_CONTENDERS):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock, wanted = Clock.measured(), cases(options.sizes)
    with Images(clock, options.timeout) as images:
        return campaign.Campaign(
            title="lazy restores with and without a working set",
            head=campaign.head(clock, _CONTENDERS, {"repeat": options.repeat}),
            cases=wanted,
            path=options.json,
            quiet_s=options.quiet,
        ).run(
            campaign.alternating(wanted, options.repeat, by_case=True, wanted=options.engines),
            lambda case, contender: measure(
                images, case, contender, options.timeout, verify=options.verify
            ),
        )


if __name__ == "__main__":
    sys.exit(main())
