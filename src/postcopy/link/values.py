"""What a message can carry: JSON's values, bytes, descriptors, and types that are declared.

Each comes out at the other end as it went in, tuples as tuples.  What JSON has no form for is an object
whose member ``""`` names its type.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, Final

_TYPE: Final = ""
_PLAIN: Final = frozenset({type(None), bool, int, float, str})


class Fd(int):
    """A file descriptor: the other end gets one of its own, which it closes."""


def sent(fds: Iterable[int]) -> list[Fd]:
    """These descriptors, to go along with a message; they stay ours."""
    return [Fd(fd) for fd in fds]


class Codec:
    """Turns values into what JSON can carry, and back.

    :param types: the dataclasses and enumerations that may go over.
    """

    def __init__(self, types: Iterable[type] = ()) -> None:
        self._types: dict[str, type[Any]] = {each.__name__: each for each in types}
        self._decoders: dict[str, Callable[[Mapping[str, Any], list[int]], Any]] = {
            "Fd": lambda value, fds: Fd(fds[value["at"]]),
            "bytes": lambda value, _: base64.b64decode(value["base64"]),
            "tuple": lambda value, fds: tuple(self.decode(value["items"], fds)),
            "frozenset": lambda value, fds: frozenset(self.decode(value["items"], fds)),
            "mapping": lambda value, fds: dict(self.decode(value["items"], fds)),
        }

    def encode(self, value: Any, fds: list[int]) -> Any:
        """The value as JSON can carry it.

        :param fds: the descriptors in it are appended.
        :raises TypeError: it is of a type that is not declared.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is list:
            return [self.encode(each, fds) for each in value]
        if isinstance(value, Mapping):
            return self._encode_mapping(value, fds)
        return {_TYPE: kind.__name__, **self._members(value, fds)}

    def _encode_mapping(self, value: Mapping[Any, Any], fds: list[int]) -> dict[str, Any]:
        # A name may come from a peer, and may be that of the member that names a type.
        if _TYPE not in value and all(type(name) is str for name in value):
            return {name: self.encode(each, fds) for name, each in value.items()}
        return {_TYPE: "mapping", "items": self.encode(list(value.items()), fds)}

    def _members(self, value: Any, fds: list[int]) -> dict[str, Any]:
        kind = type(value)
        if kind is Fd:
            fds.append(value)
            return {"at": len(fds) - 1}
        if kind is bytes:
            return {"base64": base64.b64encode(value).decode()}
        if kind in {tuple, frozenset}:
            return {"items": self.encode(list(value), fds)}
        if self._types.get(kind.__name__) is not kind:
            raise TypeError(f"{kind.__name__} is not declared as a type of the link")
        if isinstance(value, Enum):
            return {"value": value.value}
        return {each.name: self.encode(getattr(value, each.name), fds) for each in fields(value)}

    def decode(self, value: Any, fds: list[int]) -> Any:
        """What :meth:`encode` was given at the other end.

        :param fds: the descriptors that have come along.
        """
        if isinstance(value, list):
            return [self.decode(each, fds) for each in value]
        if not isinstance(value, dict):
            return value
        name = value.get(_TYPE)
        if name is None:
            return {name: self.decode(each, fds) for name, each in value.items()}
        if name in self._decoders:
            return self._decoders[name](value, fds)
        members = {key: self.decode(each, fds) for key, each in value.items() if key != _TYPE}
        return self._types[name](**members)
