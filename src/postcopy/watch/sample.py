"""One look at a migration: all that a view draws, and one line of a recorded run.

``docs/watch.md`` lists the members.  A line of a file is hostile: each member has its type and its bound.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

from postcopy.statistics import LATENCY_BUCKETS, MAP_CELLS, MAP_STATES, WAIT_CAUSES

_MOST: Final = (1 << 63) - 1
_MOST_TEXT: Final = 2000
_MOST_VCPUS: Final = 4096
_MOST_NOTES: Final = 16

Check = Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value) and 0 <= value <= _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT and value.isprintable()


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and value <= 1


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, most: int) -> Check:
    return lambda value: (
        isinstance(value, list | tuple) and len(value) <= most and all(map(check, value))
    )


def _is_map(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"side", "cells", "pages"}
        and value["side"] in ("source", "destination")
        and isinstance(value["cells"], str)
        and len(value["cells"]) <= MAP_CELLS
        and set(value["cells"]) <= set(MAP_STATES)
        and isinstance(value["pages"], Mapping)
        and set(value["pages"]) <= set(MAP_STATES.values())
        and all(map(_is_integer, value["pages"].values()))
    )


def _is_causes(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) <= set(WAIT_CAUSES)
        and all(map(_list_of(_is_integer, _MOST_VCPUS), value.values()))
    )


def _member(check: Check, meaning: str, **default: Any) -> Any:
    return field(metadata={"check": check, "meaning": meaning}, **default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is known at one moment; the metadata of each member say what it is."""

    t_ms: int = _member(_is_integer, "milliseconds since the watch began; never decreases")
    phase: str = _member(_is_text, "setup, precopy, switchover, postcopy, paused, completed, ...")
    status: str = _member(_is_text, "QEMU's name of the status, as the source says it")
    fraction: float = _member(_is_fraction, "progress from 0 to 1; never decreases", default=0.0)
    round: int = _member(_is_integer, "the precopy round under way, from 1 on", default=0)
    elapsed_ms: int = _member(_is_integer, "`total-time` of the migration", default=0)
    transferred_bytes: int = _member(_is_integer, "`ram.transferred`", default=0)
    remaining_bytes: int = _member(_is_integer, "`ram.remaining`", default=0)
    total_bytes: int = _member(_is_integer, "`ram.total`", default=0)
    rate_bytes: int = _member(_is_integer, "sent in the last second", default=0)
    dirty_rate_bytes: int = _member(
        _is_integer, "what the guest wrote per second in the last round", default=0
    )
    faults: int = _member(_is_integer, "`ram.postcopy-requests`", default=0)
    faults_per_s: int = _member(_is_integer, "of these, in the last second", default=0)
    latency: tuple[int, ...] = _member(
        _list_of(_is_integer, LATENCY_BUCKETS),
        "page faults until now that took [1, 2) us, [2, 4) us, ...",
        default=(),
    )
    p50_us: int | None = _member(_or_none(_is_integer), "half of them took no longer", default=None)
    p99_us: int | None = _member(_or_none(_is_integer), "99 of 100 took no longer", default=None)
    max_us: int | None = _member(_or_none(_is_integer), "the longest", default=None)
    blocktime_us: tuple[int, ...] = _member(
        _list_of(_is_integer, _MOST_VCPUS), "how long each vCPU has waited for pages", default=()
    )
    blocktime_causes_us: Mapping[str, tuple[int, ...]] | None = _member(
        _or_none(_is_causes),
        "of that, how long each vCPU has waited for what; null: nothing, or not known",
        default=None,
    )
    downtime_ms: float | None = _member(
        _or_none(_is_number), "how long no vCPU ran, once that is known", default=None
    )
    expected_downtime_ms: float | None = _member(
        _or_none(_is_number), "how long that would be now", default=None
    )
    source: str = _member(_is_text, "what the source's status means, in words", default="")
    destination: str = _member(_is_text, "the same of the destination", default="")
    waits_for: str = _member(_is_text, "what has to happen next, in words", default="")
    notes: tuple[str, ...] = _member(
        _list_of(_is_text, _MOST_NOTES), "what is missing here, and why", default=()
    )
    map: Mapping[str, Any] | None = _member(
        _or_none(_is_map),
        "`side`, `cells` and `pages` of `x-query-memory-map`; null: not known",
        default=None,
    )

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {each.name: _as_json(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Make one of a line that may be hostile.

        :raises ValueError: a member is missing, unknown, or not what it must be; the text names it.
        """
        if not isinstance(value, dict):
            raise ValueError("a sample is an object")  # noqa: TRY004 - one error for all that is wrong
        known = {each.name: each for each in fields(cls)}
        for name in value:
            if name not in known:
                raise ValueError(f"a sample has no member {name[:40]!r}")
        for name in ("t_ms", "phase", "status"):
            if name not in value:
                raise ValueError(f"a sample has no {name!r}")
        for name, given in value.items():
            if not known[name].metadata["check"](given):
                raise ValueError(f"{name!r} of a sample is not what it must be")
        return cls(**{name: _as_member(given) for name, given in value.items()})


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _as_member(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_member(each) for name, each in value.items()}
    return tuple(value) if isinstance(value, list) else value
