"""What options take beyond click's own types."""

from typing import Any, Final

import click

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Size(click.ParamType[int]):
    """Bytes with QEMU's suffixes K, M, G and T (powers of 1024).

    :param default_unit: what a bare number counts.
    """

    name = "size"

    def __init__(self, default_unit: str = "") -> None:
        self._default_unit = default_unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("IB").removesuffix("B")
        number, unit = (text[:-1], text[-1:]) if text[-1:] in "KMGT" else (text, self._default_unit)
        try:
            return int(float(number) * (1 << _UNITS[unit]))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no size; write a number with K, M or G", param, ctx)


class Number(click.ParamType[int]):
    """An integer, decimal or with 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The integer."""
        try:
            return value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is no number; write it in decimal or with 0x", param, ctx)


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
        try:
            return float(text.removesuffix("s"))
        except ValueError:
            self.fail(f"{value!r} is no time; give now, after=first-round or after=5s", param, ctx)
