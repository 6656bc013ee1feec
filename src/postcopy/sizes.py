"""Sizes as people type them, ``1.5G`` or ``0x1000``: what QEMU 11.1 takes for one."""

import re

MOST_DIGITS = 4000
"""Python converts not many more decimal digits than that, and a number of 64 bits needs fewer."""

_SIZE = re.compile(
    r"\s*\+?(?:(?P<hex>0[xX][0-9a-fA-F]+)|(?P<whole>[0-9]+)(?P<fraction>\.[0-9]*)?"
    r"(?P<unit>[bBkKmMgGtTpPeE]?))"
)
_SHIFTS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


class OutOfRange(ValueError):
    """A number, but negative or too large."""


def parse_size(text: str, *, default_unit: str = "b", most: int = (1 << 64) - 1) -> int:
    """Bytes from a number with an optional suffix; fractions are allowed with one (``1.5k``).

    :param default_unit: what a bare number counts.
    :raises ValueError: no such number; :class:`OutOfRange` when it is negative or over ``most``.
    """
    found = _SIZE.fullmatch(text)
    if found is not None and len(text) > MOST_DIGITS:
        raise OutOfRange(text)
    if found is None:
        if re.fullmatch(r"\s*-[0-9]+[a-zA-Z]?", text):
            raise OutOfRange(text)
        raise ValueError(text)
    unit = (found["unit"] or default_unit).lower()
    shift = _SHIFTS[unit]
    if found["hex"]:
        value = int(found["hex"], 16) << shift
    else:
        value = int(found["whole"]) << shift
        digits = (found["fraction"] or ".")[1:]
        if digits.strip("0") and not shift:
            raise ValueError(text)
        value += (int(digits or "0") << shift) // 10 ** len(digits)
    if value > most:
        raise OutOfRange(text)
    return value
