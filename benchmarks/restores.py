"""``python -m benchmarks.restores``: from a process's start to its guest's first access."""

import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from benchmarks import campaign, host
from benchmarks.clock import Clock
from benchmarks.engines import Postcopy, Qemu
from benchmarks.images import Images, Woken, data_mib, times, wake
from benchmarks.report import Finding, Results, median, number
from benchmarks.scenario import OURS, QEMU, Case, Contender, Figure, Target
from benchmarks.workload import of_size

_CONTENDERS: Final = (
    Contender(QEMU.name, "QEMU, mapped-ram", Qemu),
    Contender(OURS.name, "postcopy, lazy", Postcopy),
)
_FIGURES: Final = (
    Figure("first_ms", "process start to the guest's first access, ms"),
    Figure("running_ms", "process start to running, as the engine says, ms"),
    Figure("complete_ms", "process start to all memory there, as the engine says, ms"),
    Figure("demand_faults", "demand faults"),
    Figure("reported_fault_p50_us", "demand fault, p50, as the engine says, µs"),
    Figure("reported_fault_p99_us", "demand fault, p99, as the engine says, µs"),
    Figure("engine_cpu_s", "CPU time of the process and its children, s"),
    Figure("others_cpus", "CPUs busy with others", compared=False),
)
_MOST_DATA_MIB: Final = 3008
"""The fill ends below 3 GiB, where a PC has its hole."""
_HELD_TIMES: Final = 4
"""How often the host must have room for the data: two images, a guest, and what :func:`wake` warms."""
_FLAT: Final = 1.2
_SOONER: Final = Target(0.2)


def cases(sizes_mib: Sequence[int], most_mib: int = _MOST_DATA_MIB) -> list[Case]:
    """One case for each size of the guest; what is to be reached is about the largest.

    :param most_mib: no guest has more data.
    """
    return [
        Case(
            f"restore-{size}",
            f"a guest of {size} MiB wakes from {data_mib(work)} MiB of data",
            work, _FIGURES, _CONTENDERS,
            {"first_ms": _SOONER} if size == max(sizes_mib) else {},
            memory_mib=size,
        )
        for size in sizes_mib
        for work in [of_size(size, random=True, most_mib=most_mib)]
    ]  # fmt: skip


def look(woken: Woken) -> dict[str, Any]:
    """The figures of one restore."""
    figures = {"first_ms": woken.ms(woken.first)} | times(woken.info) | woken.load
    return {"figures": figures, "destination": woken.info}


def flatness(cases: Sequence[Case], results: Results) -> list[Finding]:
    """How much the time to the first access varies with the guest's size."""
    found = []
    for contender in _CONTENDERS:
        medians = [median(case, contender.name, "first_ms", results) for case in cases]
        known = [value for value in medians if value is not None]
        if len(known) < max(2, len(cases)):
            continue
        ratio = max(known) / min(known)
        ours = contender.name == OURS.name
        sizes = f"{cases[0].memory_mib} to {cases[-1].memory_mib} MiB"
        found.append(
            Finding(
                f"{contender.title}: longest by shortest of all sizes, {sizes}",
                number(ratio),
                f"≤ {_FLAT:g}" if ours else "",
                ratio <= _FLAT if ours else None,
            )
        )
    return found


def most_data_mib() -> int:
    """How much data the host has room for, up to the most that a guest can have."""
    return min(_MOST_DATA_MIB, host.available_mib() // (_HELD_TIMES + 1))


def main() -> int:
    """Run what the command line asks for; exit code as of ``python -m benchmarks``."""
    parser = campaign.parser("restores", __doc__ or "", "256,1024,8192")
    parser.add_argument("--most-data", type=int, default=most_data_mib(),
        help="MiB of data in the largest guests, up to 3008; default here: %(default)s")  # fmt: skip
    options = parser.parse_args()
    chosen = [one for one in _CONTENDERS if not options.engines or one.name in options.engines]
    if missing := campaign.missing(chosen):
        print(missing, file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock, wanted = Clock.measured(), cases(options.sizes, options.most_data)
    with Images(clock, options.timeout) as images:
        return campaign.Campaign(
            title="a guest wakes: postcopy and QEMU, side by side",
            head=campaign.head(
                clock, chosen, {"repeat": options.repeat, "most_data_mib": options.most_data}
            ),
            cases=wanted,
            path=options.json,
            across=lambda results: flatness(wanted, results),
            quiet_s=options.quiet,
        ).run(
            campaign.alternating(wanted, options.repeat, by_case=True, wanted=options.engines),
            lambda case, contender: wake(
                images, case, contender, options.timeout, look, verify=options.verify
            ),
        )


if __name__ == "__main__":
    sys.exit(main())
