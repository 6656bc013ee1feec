"""The devices of an image, field by field.

The description of the stream names the fields; sections that it does not name are those of our own machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from postcopy.errors import StreamError
from postcopy.image.base import Image
from postcopy.image.parser import parsed_description
from postcopy.stream.described_state import Values, decode_state
from postcopy.stream.description import Device
from postcopy.stream.file_records import DeviceSection


@dataclass(frozen=True, slots=True)
class DeviceFields:
    """One device.

    :ivar fields: see :data:`postcopy.stream.described_state.Values`.
    """

    section: DeviceSection
    fields: Values

    @property
    def name(self) -> str:
        """Name and instance, such as ``cpu 0``."""
        return f"{self.section.name} {self.section.instance}"


class FieldDecoder:
    """Decodes the sections of one stream.

    :param description: the text at its end, or ``None``.
    :raises StreamError: the description makes no sense.
    """

    def __init__(self, description: str | None) -> None:
        parsed = parsed_description(description)
        self._devices: Mapping[tuple[str, int], Device] = {
            (device["name"], device["instance_id"]): device
            for device in (() if parsed is None else parsed["devices"])
        }

    def decode(self, section: DeviceSection) -> Values:
        """Decode one section.

        :raises StreamError: it is not as described; the offset is in the payload.
        """
        described = self._devices.get((section.name, section.instance))
        if described is not None:
            return decode_state(described, section.payload)
        from postcopy.machine.device_formats import FORMATS  # few images need them

        values = FORMATS.decode(section.name, section.instance, section.version, section.payload)
        plain: Values = _plain(values)
        return plain


def device_fields(image: Image) -> Iterator[DeviceFields]:
    """Decode the devices of an image.

    :raises ImageError: one of them is not as the description says.
    """
    try:
        decoder = FieldDecoder(image.description)
    except StreamError as error:
        raise image.fail(error.message) from error
    for section in image.sections:
        try:
            fields = decoder.decode(section)
        except StreamError as error:
            message = f"device {section.name} {section.instance}: {error.message}"
            raise image.fail(f"{message}, at byte {error.offset or 0} of its state") from error
        yield DeviceFields(section, fields)


def _plain(value: Any) -> Any:
    """As JSON can carry it."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.hex() if isinstance(value, bytes) else value
