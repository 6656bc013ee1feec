"""How long each vCPU has waited for what, as the destination says it again and again."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from postcopy.statistics import WaitCause
from postcopy.watch.sample import Sample

Waits = dict[str, tuple[int, ...]]
"""By cause: microseconds of each vCPU."""


class Waited:
    """Adds up what engines say one after the other: the successor of a dead one begins at zero."""

    def __init__(self) -> None:
        self._before: Waits = {}
        self._last: Waits = {}

    def take(self, info: Mapping[str, Any]) -> Waits:
        """Process one answer to ``query-migrate``; one that says nothing of this changes nothing.

        A QEMU says at the end how long its vCPUs have waited for pages, and knows no other cause.
        """
        found = _said(info)
        if not found:
            return _added(self._before, self._last)
        if _began_anew(self._last, found):
            self._before = _added(self._before, self._last)
        self._last = found
        return _added(self._before, found)


def _said(info: Mapping[str, Any]) -> Waits:
    ours = info.get("x-postcopy", {})
    if causes := ours.get("blocktime-causes-us"):
        return {name: tuple(each) for name, each in causes.items()}
    if waited_us := ours.get("blocktime-us"):
        return {WaitCause.PAGE.value: tuple(waited_us)}
    waited_ms = info.get("postcopy-vcpu-blocktime", ())
    return {WaitCause.PAGE.value: tuple(ms * 1000 for ms in waited_ms)} if waited_ms else {}


def _began_anew(before: Waits, now: Waits) -> bool:
    """What one engine says never decreases, and no cause is forgotten."""
    return any(
        any(a > b for a, b in zip(waited_us, now.get(name, itertools.repeat(0)), strict=False))
        for name, waited_us in before.items()
    )


def _added(a: Waits, b: Waits) -> Waits:
    return {
        name: tuple(map(sum, zip(a.get(name, zeros), b.get(name, zeros), strict=False)))
        for name in (*a, *(each for each in b if each not in a))
        for zeros in [(0,) * len(a.get(name) or b[name])]
    }


def _sums(waits: Waits) -> tuple[int, ...]:
    return tuple(map(sum, zip(*waits.values(), strict=False)))


def total(waits: Waits) -> tuple[int, ...]:
    """Of all causes together."""
    return _sums(waits)


def shares(before: Sample, after: Sample, vcpu: int) -> dict[str, float]:
    """What a vCPU waited for between two samples: the share of the time, 0 to 1, by cause."""
    span_us = max(1, after.t_ms - before.t_ms) * 1000
    then = before.blocktime_causes_us or {}
    return {
        name: min(1.0, (waited_us[vcpu] - _of(then, name, vcpu)) / span_us)
        for name, waited_us in (after.blocktime_causes_us or {}).items()
        if vcpu < len(waited_us) and waited_us[vcpu] > _of(then, name, vcpu)
    }


def _of(waits: Mapping[str, tuple[int, ...]], name: str, vcpu: int) -> int:
    of_all = waits.get(name, ())
    return of_all[vcpu] if vcpu < len(of_all) else 0


def stopped(before: Sample, after: Sample) -> bool:
    """Whether the stop of the switch-over has become known between two samples."""
    return before.downtime_ms is None and after.downtime_ms is not None


def causes(sample: Sample, vcpu: int) -> Iterator[tuple[str, float]]:
    """What a vCPU has waited for until now: the cause, and milliseconds."""
    for name, waited_us in (sample.blocktime_causes_us or {}).items():
        if vcpu < len(waited_us) and waited_us[vcpu]:
            yield name, waited_us[vcpu] / 1000
