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

    A guest stands still while some of the messages are on their way: most values are plain, and cost
    no call.

    :param types: the dataclasses and enumerations that may go over.
    """

    def __init__(self, types: Iterable[type] = ()) -> None:
        declared = list(types)
        self._encoders: dict[type, Callable[[Any, list[int]], Any]] = {
            list: self._encode_items,
            tuple: lambda value, fds: {_TYPE: "tuple", "items": self._encode_items(value, fds)},
            frozenset: lambda value, fds: {
                _TYPE: "frozenset",
                "items": self._encode_items(value, fds),
            },
            bytes: lambda value, _: {_TYPE: "bytes", "base64": base64.b64encode(value).decode()},
            Fd: _encode_descriptor,
        }
        for each in declared:
            self._encoders[each] = (
                _encode_enumeration if issubclass(each, Enum) else self._members_encoder(each)
            )
        self._types: dict[str, type[Any]] = {each.__name__: each for each in declared}
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
        if (encoder := self._encoders.get(kind)) is not None:
            return encoder(value, fds)
        if isinstance(value, Mapping):
            return self._encode_mapping(value, fds)
        raise TypeError(f"{kind.__name__} is not declared as a type of the link")

    def _members_encoder(self, kind: type[Any]) -> Callable[[Any, list[int]], Any]:
        names = tuple(member.name for member in fields(kind))

        def encode(value: Any, fds: list[int]) -> Any:
            items = self._encode_items([getattr(value, name) for name in names], fds)
            return {_TYPE: kind.__name__, **dict(zip(names, items, strict=True))}

        return encode

    def _encode_items(self, items: Iterable[Any], fds: list[int]) -> list[Any]:
        return [each if type(each) in _PLAIN else self.encode(each, fds) for each in items]

    def _encode_mapping(self, value: Mapping[Any, Any], fds: list[int]) -> dict[str, Any]:
        # A name may come from a peer, and may be that of the member that names a type.
        if _TYPE not in value and all(type(name) is str for name in value):
            return dict(zip(value, self._encode_items(value.values(), fds), strict=True))
        return {_TYPE: "mapping", "items": self._encode_items(list(value.items()), fds)}

    def decode(self, value: Any, fds: list[int]) -> Any:
        """What :meth:`encode` was given at the other end.

        :param fds: the descriptors that have come along.
        """
        kind = type(value)
        if kind is list:
            return [each if type(each) in _PLAIN else self.decode(each, fds) for each in value]
        if kind is not dict:
            return value
        name = value.get(_TYPE)
        if name in self._decoders:
            return self._decoders[name](value, fds)
        members = {
            key: each if type(each) in _PLAIN else self.decode(each, fds)
            for key, each in value.items()
            if key != _TYPE
        }
        return members if name is None else self._types[name](**members)


def _encode_enumeration(value: Enum, _: list[int]) -> Any:
    return {_TYPE: type(value).__name__, "value": value.value}


def _encode_descriptor(value: Fd, fds: list[int]) -> Any:
    fds.append(value)
    return {_TYPE: "Fd", "at": len(fds) - 1}
