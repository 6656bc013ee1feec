"""The device formats that one machine knows: the stream's decoder asks it where a section ends."""

from collections.abc import Iterable
from typing import Any, Protocol

from postcopy.errors import StreamError
from postcopy.stream.vmstate import Values


class SectionFormat(Protocol):
    """What the table knows of a format; :class:`postcopy.stream.vmstate.Format` says what each does."""

    @property
    def name(self) -> str:
        """Of the section."""

    @property
    def version(self) -> int:
        """The newest."""

    def check_version(self, version: int) -> None:
        """Refuse what cannot be read."""

    def encode(self, values: Values) -> bytes:
        """The payload."""

    def decode(
        self, data: memoryview, *, version: int | None = None, whole: bool = False
    ) -> tuple[dict[str, Any], int] | None:
        """The values, and how many bytes they took."""

    def describe(self, values: Values) -> dict[str, Any]:
        """The description."""


class FormatTable:
    """Formats by name.

    :param formats: those of which a machine has one (instance 0).
    :param per_cpu: those with one instance for each vCPU; any instance is accepted, since only
        the machine knows how many vCPUs it has.
    """

    def __init__(
        self, formats: Iterable[SectionFormat], per_cpu: Iterable[SectionFormat] = ()
    ) -> None:
        self._per_cpu = {each.name: each for each in per_cpu}
        self._formats = {each.name: each for each in formats} | self._per_cpu

    def payload_length(
        self, name: str, instance: int, version: int, data: memoryview
    ) -> int | None:
        """How many bytes of ``data`` are the payload of this section.

        :return: ``None`` when more bytes are needed to tell.
        :raises StreamError: the device, its version or one of its subsections is unknown.
        """
        found = self.find(name, instance, version).decode(data, version=version)
        return None if found is None else found[1]

    def decode(
        self, name: str, instance: int, version: int, payload: bytes | memoryview
    ) -> dict[str, Any]:
        """The values of a whole payload.

        :raises StreamError: unknown, or more bytes than the format has.
        :raises StreamCut: fewer bytes.
        """
        data = memoryview(payload)
        found = self.find(name, instance, version).decode(data, version=version, whole=True)
        if found is None or found[1] != len(data):
            raise StreamError(f"{name}: {len(data)} bytes are more than its format has")
        return found[0]

    def encode(self, name: str, values: Values) -> bytes:
        """The payload of a section; the counterpart of :meth:`decode`."""
        return self._formats[name].encode(values)

    def find(self, name: str, instance: int, version: int) -> SectionFormat:
        """The format of a section.

        :raises StreamError: there is no such device here, or not in this version.
        """
        format_ = self._formats.get(name)
        if format_ is None or (instance and name not in self._per_cpu):
            raise StreamError(
                f"Unknown savevm section or instance '{name}' {instance}. Make sure that your "
                "current VM setup matches your saved VM setup, including any hotplugged devices"
            )
        format_.check_version(version)
        return format_
