"""Device state formats, declared instead of coded.

A device's section holds its fields one after another, big endian, with no tags between them; behind
them come the *subsections* that the device needed this time, each with a name of its own.  So a
reader must know every field of every device that it accepts.  QEMU declares them as VMState
(``docs/devel/migration/main.rst``); here a :class:`Format` does::

    CPU_COMMON = Format("cpu_common", 1, (Field("halted", U32), Field("interrupt_request", U32)))
    CPU_COMMON.encode({"halted": 0, "interrupt_request": 0})    # 8 bytes

Values are plain: an ``int`` for a number, ``bytes`` for a buffer, a ``dict`` for a structure, a
tuple of those where ``count`` is not 1.  A subsection's values are a ``dict`` under its name, which
is absent when the subsection is.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from postcopy.errors import StreamCut, StreamError

Values = Mapping[str, Any]

SUBSECTION = 0x05
"""The byte that leads a subsection; a section's footer (0x7e) or the next element ends the list."""


class _NeedMore(Exception):
    """The data end inside a field; never leaves this module."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one element is written: QEMU's name of the type, the code of :mod:`struct`, its size."""

    type_name: str
    code: str
    size_bytes: int


U8 = Kind("uint8", "B", 1)
U16 = Kind("uint16", "H", 2)
U32 = Kind("uint32", "I", 4)
U64 = Kind("uint64", "Q", 8)
I32 = Kind("int32", "i", 4)
I64 = Kind("int64", "q", 8)
BOOL = Kind("bool", "?", 1)


def buffer(size_bytes: int) -> Kind:
    """Raw bytes; shorter values are filled up with zeros."""
    return Kind("buffer", f"{size_bytes}s", size_bytes)


def pad(size_bytes: int) -> Kind:
    """Bytes that mean nothing: written as zeros, skipped when read, absent from the values."""
    return Kind("unused_buffer", f"{size_bytes}x", size_bytes)


@dataclass(frozen=True, slots=True)
class Structure:
    """Fields that belong together, used as the kind of a :class:`Field`."""

    name: str
    fields: tuple["Field", ...]
    version: int = 1

    @property
    def type_name(self) -> str:
        """What a description calls it."""
        return "struct"

    @property
    def size_bytes(self) -> int:
        """Bytes of one such structure."""
        return sum(field.size_bytes for field in self.fields)


@dataclass(frozen=True, slots=True)
class Field:
    """One field, or an array of ``count`` of them."""

    name: str
    kind: Kind | Structure
    count: int = 1

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole field."""
        return self.kind.size_bytes * self.count

    def write(self, values: Values, out: bytearray) -> None:
        """Append this field's value out of ``values``."""
        kind = self.kind
        if isinstance(kind, Kind) and kind.code.endswith("x"):
            out += bytes(self.size_bytes)
            return
        value = values[self.name]
        elements = (value,) if self.count == 1 else tuple(value)
        if len(elements) != self.count:
            raise ValueError(f"{self.name} has {len(elements)} elements instead of {self.count}")
        if isinstance(kind, Structure):
            for element in elements:
                _write_fields(kind.fields, element, out)
        else:
            out += struct.pack(f">{kind.code * self.count}", *elements)

    def read(self, data: memoryview, at: int, values: dict[str, Any]) -> int:
        """Put this field's value into ``values``; return where the next one begins."""
        end = at + self.size_bytes
        if end > len(data):
            raise _NeedMore
        kind = self.kind
        elements: tuple[Any, ...]
        if isinstance(kind, Structure):
            size = kind.size_bytes
            starts = range(at, end, size)
            elements = tuple(_read_fields(kind.fields, data, start)[0] for start in starts)
        elif kind.code.endswith("x"):
            return end
        else:
            elements = struct.unpack_from(f">{kind.code * self.count}", data, at)
        values[self.name] = elements[0] if self.count == 1 else elements
        return end

    def describe(self) -> dict[str, Any]:
        """The field as a stream's description names it."""
        kind = self.kind
        entry: dict[str, Any] = {"name": self.name}
        if self.count != 1:
            entry["array_len"] = self.count
        entry |= {"type": kind.type_name, "size": kind.size_bytes}
        if isinstance(kind, Structure):
            entry["struct"] = {
                "vmsd_name": kind.name,
                "version": kind.version,
                "fields": [field.describe() for field in kind.fields],
            }
        return entry


def _write_fields(fields: tuple[Field, ...], values: Values, out: bytearray) -> None:
    for field in fields:
        field.write(values, out)


def _read_fields(
    fields: tuple[Field, ...], data: memoryview, at: int
) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    for field in fields:
        at = field.read(data, at, values)
    return values, at


def _always(_: Values) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Format:
    """The format of a device's section, or of a subsection (which is the same thing, named).

    :param version: what is written, and the newest that can be read.
    :param minimum_version: the oldest that can be read; all between have the same fields.
    :param needed: given the values of this subsection, whether it is worth sending.  A receiver
        that does not know a subsection refuses the stream, so one that holds defaults is not sent.
    :param prefix: how the names of its subsections begin, where that is not its own name.
    """

    name: str
    version: int
    fields: tuple[Field, ...]
    subsections: tuple["Format", ...] = ()
    minimum_version: int = 0
    needed: Callable[[Values], bool] = _always
    prefix: str = ""

    @property
    def length(self) -> int:
        """Bytes of a payload without subsections."""
        return sum(field.size_bytes for field in self.fields)

    def encode(self, values: Values) -> bytes:
        """The payload of a section.

        :raises ValueError: a value is missing or does not fit its field.
        """
        out = bytearray()
        try:
            self._write(values, out)
        except (KeyError, struct.error, OverflowError) as error:
            raise ValueError(f"{self.name}: cannot be written: {error}") from error
        return bytes(out)

    def decode(
        self, data: memoryview, *, version: int | None = None, whole: bool = False
    ) -> tuple[dict[str, Any], int] | None:
        """The values at the start of ``data``, and how many bytes they took.

        :param version: as the section's header says; the newest when left out.
        :param whole: ``data`` is all there is, so that its end ends the list of subsections too.
        :return: ``None`` if more bytes are needed to tell (never when ``whole``).
        :raises StreamError: a version or a subsection that is not known here.
        :raises StreamCut: ``whole``, and the data end too early.
        """
        self.check_version(self.version if version is None else version)
        try:
            return self._read(data, 0, whole=whole)
        except _NeedMore:
            if whole:
                raise StreamCut(f"{self.name}: {len(data)} bytes are too few") from None
            return None

    def check_version(self, version: int) -> None:
        """Refuse what this end cannot read, in QEMU's words.

        :raises StreamError: too old or too new.
        """
        if version > self.version:
            raise StreamError(
                f"savevm: unsupported version {version} for '{self.name}' v{self.version}"
            )
        if version < self.minimum_version:
            raise StreamError(
                f"{self.name}: incoming version_id {version} is too old for local minimum "
                f"version_id  {self.minimum_version}"
            )

    def describe(self, values: Values) -> dict[str, Any]:
        """What a stream's JSON description says of a payload that was encoded from ``values``."""
        entry: dict[str, Any] = {"vmsd_name": self.name, "version": self.version}
        entry["fields"] = [field.describe() for field in self.fields]
        if sent := self._sent(values):
            entry["subsections"] = [child.describe(values[child.name]) for child in sent]
        return entry

    def _sent(self, values: Values) -> list["Format"]:
        return [c for c in self.subsections if c.name in values and c.needed(values[c.name])]

    def _write(self, values: Values, out: bytearray) -> None:
        _write_fields(self.fields, values, out)
        for child in self._sent(values):
            name = child.name.encode()
            out += struct.pack(f">BB{len(name)}sI", SUBSECTION, len(name), name, child.version)
            child._write(values[child.name], out)  # noqa: SLF001 - the same class

    def _read(self, data: memoryview, at: int, *, whole: bool) -> tuple[dict[str, Any], int]:
        values, at = _read_fields(self.fields, data, at)
        while (header := self._peek_subsection(data, at, whole=whole)) is not None:
            child, version, at = header
            child.check_version(version)
            values[child.name], at = child._read(data, at, whole=whole)  # noqa: SLF001 - same class
        return values, at

    def _peek_subsection(
        self, data: memoryview, at: int, *, whole: bool
    ) -> tuple["Format", int, int] | None:
        """The subsection of ours that begins at ``at``: its format, version, and first field."""
        if at == len(data) and not whole:
            raise _NeedMore
        if data[at : at + 1] != bytes([SUBSECTION]):
            return None
        if at + 2 > len(data) or at + 6 + data[at + 1] > len(data):
            raise _NeedMore
        end = at + 2 + data[at + 1]
        name = bytes(data[at + 2 : end]).decode("ascii", "backslashreplace")
        # A subsection of an outer format also follows an inner one's fields: the prefix tells.
        if not name.startswith(self.prefix or self.name):
            return None
        for child in self.subsections:
            if child.name == name:
                return child, int.from_bytes(data[end : end + 4], "big"), end + 4
        raise StreamError(f"{self.name}: unknown subsection '{name}'")
