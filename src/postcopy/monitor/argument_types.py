"""The types of a command's arguments, with QEMU's complaints about a value of another type.

A check returns the value; ``path`` is the place of the value as QEMU writes it, such as
``channels[0].addr.type``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from postcopy.errors import Refused

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Type:
    """A type of arguments; ``name`` is what the manual calls it."""

    name: str
    accept: Callable[[Any, str], Any]

    def __call__(self, value: Any, path: str) -> Any:
        """``value`` if it is of this type.

        :raises Refused: it is not; in QEMU's words.
        """
        return self.accept(value, path)


def _expected(kind: str, path: str) -> Refused:
    return Refused(f"Invalid parameter type for '{path}', expected: {kind}")


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _expected("string", path)
    return value


def _boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise _expected("boolean", path)
    return value


def _integer(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value >= 2**63:
        raise _expected("integer", path)
    return value


def _size(value: Any, path: str) -> int:
    # As QEMU: a negative one is taken as its two's complement.
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"Parameter '{path}' expects uint64")
    return value % 2**64


string = Type("string", _string)
boolean = Type("boolean", _boolean)
integer = Type("integer", _integer)
"""A signed number of 64 bits."""
size = Type("size", _size)
"""An unsigned number of 64 bits."""
anything = Type("any", lambda value, _path: value)
"""What uses the value checks it."""


def array(item: "Check") -> Type:
    """A list of ``item``."""

    def check(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _expected("array", path)
        return [item(one, f"{path}[{index}]") for index, one in enumerate(value)]

    return Type(f"[{item.name}]", check)


def enumeration(*values: str, name: str = "") -> Type:
    """One of ``values``.

    :param name: QAPI's, where there are too many to list.
    """

    def check(value: Any, path: str) -> str:
        text = _string(value, path)
        if text not in values:
            # QEMU names an enum by its last part, and an array's element "null".
            member = "null" if path.endswith("]") else path.rpartition(".")[2]
            raise Refused(f"Parameter '{member}' does not accept value '{text}'")
        return text

    return Type(name or " or ".join(values), check)


@dataclass(frozen=True, slots=True)
class Struct:
    """An object with these members.

    ``branches``: by the value of the member ``tag`` there are more members.
    """

    required: Mapping[str, "Check"] = field(default_factory=dict)
    optional: Mapping[str, "Check"] = field(default_factory=dict)
    name: str = "object"
    tag: str = ""
    branches: Mapping[str, "Struct"] = field(default_factory=dict)

    def __call__(self, value: Any, path: str) -> dict[str, Any]:
        """Check ``value`` and return a copy of it."""
        if not isinstance(value, dict):
            raise _expected("object", path)
        checked = self.members(value, path)
        for name in value:
            if name not in checked:
                raise Refused(f"Parameter '{_join(path, name)}' is unexpected")
        return checked

    def members(self, value: dict[str, Any], path: str) -> dict[str, Any]:
        """Check the members that we know; ``value`` may have others."""
        checked: dict[str, Any] = {}
        for name, check in self.required.items():
            if name not in value:
                raise Refused(f"Parameter '{_join(path, name)}' is missing")
            checked[name] = check(value[name], _join(path, name))
        for name, check in self.optional.items():
            if name in value:
                checked[name] = check(value[name], _join(path, name))
        if self.tag:
            checked |= self.branches[checked[self.tag]].members(value, path)
        return checked


Check = Type | Struct


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def union(tag: str, branches: Mapping[str, Struct]) -> Struct:
    """An object whose member ``tag`` says which further members it has."""
    return Struct({tag: enumeration(*branches)}, tag=tag, branches=branches)


NOTHING = Struct()
"""A command without arguments."""
