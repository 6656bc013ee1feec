"""The JSON behind a precopy stream: which device sections there were, and of what fields.

FULL sections do not say how long they are.  A reader of the description can cut them: a device's
payload is the sum of its fields and, for each subsection, that one's head and payload.

Source: QEMU's ``migration/savevm.c`` and ``scripts/analyze-migration.py``; ``wire.md``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from postcopy.errors import StreamError
from postcopy.stream.configuration import CAPABILITIES, encode_name
from postcopy.stream.file_records import Configuration
from postcopy.stream.numbers import TARGET_PAGE_BYTES, SectionType
from postcopy.stream.reader import BytesLike

Device: TypeAlias = Mapping[str, Any]
"""One device of a description: ``name``, ``instance_id``, ``fields``, and so on."""

DESCRIPTION_HEAD_BYTES = 5
"""What stands before the JSON in a stream: type and length."""

_SUBSECTION_HEAD_BYTES = 6  # type byte, the name's length, version; the name comes on top
_DEEPEST = 64


def build_description(
    configuration: Configuration, devices: Iterable[Device], *, page_size: int = TARGET_PAGE_BYTES
) -> str:
    """Write the description of a stream.

    :param devices: what to say of each FULL section, in the order of the stream.
    """
    return json.dumps(
        {
            "configuration": _describe_configuration(configuration),
            "page_size": page_size,
            "devices": list(devices),
        }
    )


def _describe_configuration(configuration: Configuration) -> dict[str, Any]:
    length = len(configuration.machine.encode())
    described: dict[str, Any] = {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": length},
        ],
    }
    if configuration.capabilities:
        names: list[dict[str, Any]] = [
            {"name": "capabilities", "type": "capability", "size": len(encode_name(name))}
            for name in configuration.capabilities
        ]
        counted = {"name": "caps_count", "type": "uint32", "size": 4}
        described["subsections"] = [
            {"vmsd_name": CAPABILITIES, "version": 1, "fields": [counted, *names]}
        ]
    return described


def parse_description(text: str) -> Mapping[str, Any]:
    """Read a description.

    :raises StreamError: it is not JSON, or does not list devices.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"description is not JSON: {error}") from error
    devices = parsed.get("devices") if isinstance(parsed, dict) else None
    if not isinstance(devices, list) or not all(map(_has_identity, devices)):
        raise StreamError("description lists no devices by name and instance")
    return cast("Mapping[str, Any]", parsed)


def description_at_end(tail: BytesLike, end: int) -> str | None:
    """Find the description with which a stream ends.

    :param tail: the last bytes of the stream, or of what has come of it.
    :param end: where the last of them ends, for errors.
    :return: its text; ``None``: no description ends there.
    :raises StreamError: it is not UTF-8.
    """
    # JSON has no such byte; its length may have one, and then the byte before is the right one.
    view = bytes(tail)
    at = len(view)
    for _ in range(DESCRIPTION_HEAD_BYTES):
        at = view.rfind(SectionType.DESCRIPTION, 0, at)
        if at < 0:
            break
        length = len(view) - at - DESCRIPTION_HEAD_BYTES
        if (
            length < 0
            or int.from_bytes(view[at + 1 : at + DESCRIPTION_HEAD_BYTES], "big") != length
        ):
            continue
        try:
            return view[at + DESCRIPTION_HEAD_BYTES :].decode()
        except UnicodeDecodeError as error:
            raise StreamError("description is not UTF-8", end - length) from error
    return None


def _has_identity(device: object) -> bool:
    return (
        isinstance(device, dict)
        and isinstance(device.get("name"), str)
        and isinstance(device.get("instance_id"), int)
    )


def described_bytes(device: Device, *, depth: int = 0) -> int:
    """Add up the length of a device's payload.

    :raises StreamError: the description makes no sense.
    """
    if depth > _DEEPEST:
        raise StreamError("description is nested too deep")
    try:
        size = sum(int(entry["size"]) * int(entry.get("array_len", 1)) for entry in _fields(device))
        for child in device.get("subsections", ()):
            size += _SUBSECTION_HEAD_BYTES + len(child["vmsd_name"].encode())
            size += described_bytes(child, depth=depth + 1)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StreamError(f"description makes no sense: {error!r}") from error
    if size < 0:
        raise StreamError("description makes no sense: a negative size")
    return size


def _fields(device: Device) -> Sequence[Mapping[str, Any]]:
    fields: Sequence[Mapping[str, Any]] = device.get("fields", ())
    return fields


class DescribedFormats:
    """Device formats as a description tells them: for reading a stream whose end is known."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._lengths = {
            (str(device["name"]), int(device["instance_id"])): described_bytes(device)
            for device in description["devices"]
        }

    def has(self, name: str, instance: int) -> bool:
        """Tell whether the description names this section."""
        return (name, instance) in self._lengths

    def payload_length(
        self,
        name: str,
        instance: int,
        version: int,  # noqa: ARG002 - a description has one version of each
        data: memoryview,  # noqa: ARG002 - the length does not depend on it
    ) -> int | None:
        """See :class:`postcopy.stream.layout.DeviceFormats`."""
        length = self._lengths.get((name, instance))
        if length is None:
            raise StreamError(f"section '{name}' {instance} is not in the description")
        return length
