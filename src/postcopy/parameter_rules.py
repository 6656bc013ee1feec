"""What a parameter's value may be, and QEMU's complaints about one that it may not be."""

import enum
from dataclasses import dataclass, field
from typing import Any

from postcopy.errors import Refused


class Kind(enum.Enum):
    """What values a parameter takes; the value is QEMU's name for it in a complaint."""

    SIZE = "uint64"
    UINT32 = "uint32_t"
    UINT8 = "uint8_t"
    BOOLEAN = "boolean"
    STRING = "StrOrNull"
    STRINGS = "array"
    CHOICE = "enum"


_LARGEST = {Kind.UINT32: 2**32 - 1, Kind.UINT8: 255}


@dataclass(frozen=True, slots=True)
class Rule:
    """What is allowed for one parameter."""

    kind: Kind
    least: int = 0
    most: int = 2**64 - 1
    power_of_two: bool = False
    complaint: str = "Option {name} expects a value between {least} and {most}"
    """About a number out of range."""
    choices: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    """Valid in QEMU, but of those we implement only these."""
    mebibytes: bool = False
    """A bare number means MiB in HMP."""
    ours: bool = False
    help: str = ""
    """What it does here; empty: it is kept for QEMU's clients, and changes nothing."""

    def accept(self, name: str, value: object) -> object:
        """``value`` if its type is right, in the form in which it is kept.

        :raises Refused: in QEMU's words.
        """
        match self.kind:
            case Kind.BOOLEAN if not isinstance(value, bool):
                raise Refused(f"Invalid parameter type for '{name}', expected: boolean")
            case Kind.STRING if not isinstance(value, str | None):
                raise Refused(f"Invalid parameter type for '{name}', expected: StrOrNull")
            case Kind.CHOICE if not isinstance(value, str):
                raise Refused(f"Invalid parameter type for '{name}', expected: string")
            case Kind.STRINGS:
                return _strings(name, value)
            case Kind.SIZE | Kind.UINT32 | Kind.UINT8:
                return self._accept_number(name, value)
        return "" if value is None else value

    def _accept_number(self, name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**64:
            raise Refused(f"Parameter '{name}' expects {Kind.SIZE.value}")
        if self.kind is Kind.SIZE:
            return value % 2**64  # as QEMU: JSON's -1 is the largest size
        if not 0 <= value <= _LARGEST[self.kind]:
            raise Refused(f"Parameter '{name}' expects {self.kind.value}")
        return value

    def check(self, name: str, value: object) -> None:
        """Whether we can work with ``value``.

        :raises Refused: out of range, or not implemented.
        """
        if isinstance(value, int) and not (
            self.least <= value <= self.most and (not self.power_of_two or value.bit_count() == 1)
        ):
            complaint = self.complaint.format(name=name, least=self.least, most=self.most)
            raise Refused(complaint)
        if self.choices and value not in self.choices:
            raise Refused(f"Parameter '{name}' does not accept value '{value}'")
        if self.only is not None and value not in self.only:
            raise Refused(f"Value '{value}' of parameter '{name}' is not implemented by postcopy")


def _strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise Refused(f"Invalid parameter type for '{name}', expected: array")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise Refused(f"Invalid parameter type for '{name}[{index}]', expected: string")
    return tuple(value)


# --- the fields of `Parameters`


def parameter(kind: Kind, default: object, **rule: Any) -> Any:
    """A parameter of this kind; ``rule`` as for :class:`Rule`."""
    return field(default=default, metadata={"rule": Rule(kind, **rule)})


def size(default: int, **rule: Any) -> Any:
    """Bytes, or another large number."""
    return parameter(Kind.SIZE, default, **rule)


def percent(default: int, most: int, meaning: str) -> Any:
    """A share in percent, 1 to ``most``."""
    return parameter(
        Kind.UINT8,
        default,
        least=1,
        most=most,
        help=meaning,
        complaint="Option {name} expects an integer in the range of {least} to {most}",
    )


def uint8(default: int, least: int, most: int, **rule: Any) -> Any:
    """A small number."""
    return parameter(Kind.UINT8, default, least=least, most=most, **rule)


def choice(*choices: str, default: str, **rule: Any) -> Any:
    """One of these words."""
    return parameter(Kind.CHOICE, default, choices=choices, **rule)
