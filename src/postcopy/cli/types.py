"""What options take beyond click's own types."""

import math
import re
from typing import Any, Final

import click

from postcopy.sizes import parse_size

_MOST: Final = (1 << 63) - 1
_MOST_SHOWN: Final = 80
_BYTES: Final = re.compile(r"(?i)([kmgtpe])i?b$")


class Size(click.ParamType[int]):
    """Bytes as QEMU reads them, with a suffix such as M, MB or MiB (powers of 1024).

    :param default_unit: what a bare number counts.
    """

    name = "size"

    def __init__(self, default_unit: str = "b") -> None:
        self._default_unit = default_unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        text = _BYTES.sub(r"\1", str(value).strip())
        try:
            return parse_size(text, default_unit=self._default_unit, most=_MOST)
        except ValueError:
            self.fail(f"{_short(value)} is no size; write a number with K, M or G", param, ctx)


class Number(click.ParamType[int]):
    """An integer, decimal or with 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The integer."""
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            number = -1
        if not 0 <= number <= _MOST:
            self.fail(f"{_short(value)} is no number; write it in decimal or with 0x", param, ctx)
        return number


class Seconds(click.ParamType[float]):
    """A time in seconds, more than none."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The time."""
        seconds = _seconds(value)
        if not seconds > 0:
            self.fail(f"{_short(value)} is no time; give seconds, such as 5 or 0.5", param, ctx)
        return seconds


class PostcopyTime(click.ParamType[str | float]):
    """When to switch to postcopy: ``now``, ``after=first-round`` or ``after=5s``."""

    name = "when"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | float:
        """As the client's ``postcopy`` takes it."""
        text = str(value).removeprefix("after=")
        if text in {"now", "first-round"}:
            return text
        seconds = _seconds(text.removesuffix("s"))
        if seconds < 0:
            hint = "give now, after=first-round or after=5s"
            self.fail(f"{_short(value)} is no time; {hint}", param, ctx)
        return seconds


def _seconds(value: Any) -> float:
    """A finite number of seconds; -1 for all else."""
    try:
        seconds = float(value)
    except ValueError:
        return -1.0
    return seconds if math.isfinite(seconds) else -1.0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
