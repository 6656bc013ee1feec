"""The JSON behind a precopy stream: which device sections there were, and of what fields.

FULL sections do not say how long they are.  A reader of the description can cut them: a device's
payload is the sum of its fields and, for each subsection, that one's head and payload.

Source: QEMU's ``migration/savevm.c`` and ``scripts/analyze-migration.py``; ``wire.md``.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from postcopy.errors import StreamError
from postcopy.stream.configuration import CAPABILITIES, encode_name
from postcopy.stream.file_records import Configuration, DeviceSection
from postcopy.stream.numbers import TARGET_PAGE_BYTES, SectionType

Device: TypeAlias = Mapping[str, Any]
"""One device of a description: ``name``, ``instance_id``, ``fields``, and so on."""

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


def plain_device(section: DeviceSection) -> Device:
    """Describe a section whose fields are not known: one field, as QEMU does for old devices."""
    size = len(section.payload)
    return {
        "name": section.name,
        "instance_id": section.instance,
        "version": section.version,
        "size": size,
        "fields": [{"name": "data", "type": "buffer", "size": size}],
    }


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


def split_sections(data: bytes, description: Mapping[str, Any]) -> list[DeviceSection]:
    """Cut FULL sections, one behind the other, by their description.

    :raises StreamError: the bytes are not what the description says.
    """
    sections, at = [], 0
    for device in description["devices"]:
        section, at = _split_one(data, at, device)
        sections.append(section)
    if at != len(data):
        raise StreamError(f"{len(data) - at} bytes behind the last described section", at)
    return sections


def _split_one(data: bytes, at: int, device: Device) -> tuple[DeviceSection, int]:
    size = described_bytes(device)
    try:
        kind, section_id, length = struct.unpack_from(">BIB", data, at)
        head = at + 6 + length
        instance, version = struct.unpack_from(">II", data, head)
        end = head + 8 + size
        footer = struct.unpack_from(">BI", data, end)
    except struct.error as error:
        raise StreamError(f"section '{device['name']}' is cut short", at) from error
    name = data[at + 6 : head].decode(errors="replace")
    if (kind, name, instance) != (SectionType.FULL, device["name"], device["instance_id"]):
        raise StreamError(f"expected section '{device['name']}', found '{name}'", at)
    if footer != (SectionType.FOOTER, section_id):
        raise StreamError(f"Missing section footer for {name}", end)
    return DeviceSection(section_id, name, instance, version, data[head + 8 : end]), end + 5
