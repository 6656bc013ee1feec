"""The state of a device, field by field, as the description of its stream names them.

A device's payload has neither names nor lengths; the description behind the stream has both, in the
order of the payload.  Of an array it describes each element (``index``), or one for all that are alike
(``array_len``).  Numbers are decoded; all else is hexadecimal text, as it lies in the payload.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from postcopy.errors import StreamError
from postcopy.stream.description import Device
from postcopy.stream.vmstate import SUBSECTION

Values = dict[str, Any]
"""Field: a number, a text, a structure (such a mapping), or a list of them."""

MOST_VALUES: Final = 1 << 20
"""A description may name so many fields for each byte that there is; only so many are decoded."""

_DEEPEST: Final = 64
_NUMBERS: Final = {
    f"{sign}int{bits}": (bits // 8, not sign) for sign in ("u", "") for bits in (8, 16, 32, 64)
} | {"timer": (8, False)}


def decode_state(device: Device, payload: bytes) -> Values:
    """Decode the payload of a device.

    :param device: what the description says of it.
    :raises StreamError: the description makes no sense, or does not fit the payload; the offset is in the
        payload.
    """
    state = _State(payload)
    try:
        values = state.structure(device, 0)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StreamError(f"description makes no sense: {error!r}", state.at) from error
    if state.at != len(payload):
        raise StreamError(f"{len(payload) - state.at} bytes are not described", state.at)
    return values


def flatten(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number and text of a decoded state with its path, such as ``regs[3]`` or ``dr.tmp``."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from flatten(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from flatten(value, f"{path}[{number}]")
    else:
        yield path, values


class _State:
    """A payload that is being decoded.

    :ivar at: the offset of the next field.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._left = MOST_VALUES
        self.at = 0

    def structure(self, described: Device, depth: int) -> Values:
        """Decode the fields of a structure, and its subsections."""
        if depth > _DEEPEST:
            raise StreamError("description is nested too deep", self.at)
        values: Values = {}
        for entry in described.get("fields", ()):
            self._field(entry, values, depth)
        for child in described.get("subsections", ()):
            name = str(child["vmsd_name"])
            self._subsection_head(name)
            values[name] = self.structure(child, depth + 1)
        return values

    def _field(self, entry: Mapping[str, Any], values: Values, depth: int) -> None:
        name, size = str(entry["name"]), int(entry["size"])
        count = int(entry.get("array_len", 1))
        # With an empty element any number of elements fits.
        if size < 0 or count < 0 or size * count > len(self._payload) - self.at:
            raise StreamError(f"field '{name}' of {size} bytes, {count} times", self.at)
        if not size:
            count = min(count, 1)
        found = [self._element(entry, size, depth) for _ in range(count)]
        if name in values or "array_len" in entry or "index" in entry:
            known = values.setdefault(name, [])
            if not isinstance(known, list):
                known = values[name] = [known]
            known += found
        elif found:
            values[name] = found[0]

    def _element(self, entry: Mapping[str, Any], size: int, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise StreamError(f"more than {MOST_VALUES} fields are described", self.at)
        start = self.at
        inner = entry.get("struct", entry if "fields" in entry else None)
        if inner is not None:
            values = self.structure(inner, depth + 1)
            if self.at != start + size:
                raise StreamError(f"'{entry['name']}' has other than {size} bytes", start)
            return values
        self.at = start + size
        return _value(str(entry["type"]), self._payload[start : self.at])

    def _subsection_head(self, name: str) -> None:
        raw = name.encode()
        head = bytes((SUBSECTION, len(raw) & 0xFF)) + raw
        if self._payload[self.at : self.at + len(head)] != head:
            raise StreamError(f"subsection '{name}' is described, but is not there", self.at)
        self.at += len(head) + 4  # its version is in the description, too


def _value(kind: str, raw: bytes) -> int | bool | str:
    if kind == "bool" and len(raw) == 1:
        return bool(raw[0])
    size, signed = _NUMBERS.get(kind.split(" ", maxsplit=1)[0], (0, False))
    if size and size == len(raw):
        return int.from_bytes(raw, "big", signed=signed)
    return raw.hex()
