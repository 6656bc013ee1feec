"""The bytes of a manifest: JSON that ends with its own digest, and fields with checked types.

The digest covers every byte before it, and its tail has only one valid form: so each flipped bit of the
file is found.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from blake3 import blake3

from postcopy.errors import ImageError
from postcopy.image.file import ImageFile
from postcopy.memory.runs import Mask

LARGEST_BYTES: Final = 1 << 30

_NAME_BYTES: Final = 255
_PATH_BYTES: Final = 2048  # the folder of the image comes before it

_TAIL: Final = ', "manifest_digest": "{}"}}\n'
_TAIL_BYTES: Final = len(_TAIL.format("0" * 64))

T = TypeVar("T")


def encode(body: Mapping[str, Any]) -> bytes:
    """Write a manifest."""
    text = json.dumps(body)[:-1].encode()
    return text + _TAIL.format(blake3(text).hexdigest()).encode()


def decode(path: Path) -> "Fields":
    """Read a manifest.

    :raises ImageError: there is none, or it is damaged.
    """
    with ImageFile(path) as file:
        if file.size_bytes > LARGEST_BYTES:
            raise ImageError(path, f"a manifest of {file.size_bytes} bytes; at most 1 GiB is taken")
        raw = file.read(0, file.size_bytes).tobytes()
    text = raw[:-_TAIL_BYTES]
    if raw[-_TAIL_BYTES:] != _TAIL.format(blake3(text).hexdigest()).encode():
        raise ImageError(path, "the manifest is damaged: it does not agree with its own digest")
    try:
        return Fields(path, json.loads(text + b"}"))
    except (ValueError, RecursionError) as error:
        raise ImageError(path, f"the manifest is no JSON: {error}") from error


class Fields:
    """The members of one JSON object of a manifest, with checked types.

    :raises ImageError: the value is no object.
    """

    def __init__(self, path: Path, value: Any) -> None:
        self._path = path
        if not isinstance(value, dict):
            raise self.wrong("an object is missing")
        self._members: dict[str, Any] = value

    def wrong(self, what: str) -> ImageError:
        """Make an error about this manifest."""
        return ImageError(self._path, f"the manifest makes no sense: {what}")

    def get(self, name: str, kind: type[T]) -> T:
        """Return a member that must be there.

        :raises ImageError: it is missing, or has another type.
        """
        value = self._members.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(f"'{name}' is no {kind.__name__}")
        return value

    def count(self, name: str) -> int:
        """Return a number of 0 or more."""
        if (value := self.get(name, int)) < 0:
            raise self.wrong(f"'{name}' is {value}")
        return value

    def optional(self, name: str, kind: type[T]) -> T | None:
        """Return a member that may be missing or null."""
        return None if self._members.get(name) is None else self.get(name, kind)

    def flag(self, name: str) -> bool | None:
        """Return a truth value that may be missing or null."""
        value = self._members.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(f"'{name}' is neither true nor false")
        return value

    def object(self, name: str) -> "Fields":
        """Return a member that is an object."""
        return Fields(self._path, self.get(name, dict))

    def objects(self, name: str) -> list["Fields"]:
        """Return a member that is a list of objects."""
        return [Fields(self._path, each) for each in self.get(name, list)]

    def texts(self, name: str) -> list[str]:
        """Return a member that is a list of strings."""
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(f"'{name}' is no list of strings")
        return values

    def path(self, name: str) -> str:
        """Return a string that can be the path of a file.

        :raises ImageError: no file system takes it.
        """
        value = self.get(name, str)
        try:
            raw = os.fsencode(value)
        except UnicodeEncodeError as error:
            raise self.wrong(f"'{name}' is no path") from error
        longest = max(map(len, raw.split(b"/")))
        if not raw or b"\0" in raw or len(raw) > _PATH_BYTES or longest > _NAME_BYTES:
            raise self.wrong(f"'{name}' is no path")
        return value

    def raw(self, name: str) -> bytes:
        """Return bytes that are in base64."""
        try:
            return binascii.a2b_base64(self.get(name, str), strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise self.wrong(f"'{name}' is no base64") from error

    def mask(self, name: str, count: int) -> Mask:
        """Return a bitmap of ``count`` bits."""
        packed = np.frombuffer(self.raw(name), np.uint8)
        if len(packed) != -(-count // 8):
            raise self.wrong(f"'{name}' has {len(packed)} bytes for {count} bits")
        bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
        if bits[count:].any():
            raise self.wrong(f"'{name}' has more bits than {count}")
        return bits[:count]


def text_of(data: bytes) -> str:
    """Encode for :meth:`Fields.raw`."""
    return base64.b64encode(data).decode()


def text_of_mask(mask: Mask) -> str:
    """Encode for :meth:`Fields.mask`."""
    return text_of(np.packbits(mask, bitorder="little").tobytes())
