"""What a snapshot has cost, and what it has made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from postcopy.image.disks import Disk


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The figures of a snapshot.  Times that the machine has not measured are ``None``.

    :ivar pause_us: how long the guest was stopped.
    :ivar longest_stall_us, stall_p99_us: how long single writes of the guest waited afterwards;
        ``write_faults`` is their number.
    :ivar saving_ms: until the machine had written its memory.
    :ivar total_ms: until the image was published.
    :ivar data_bytes, zero_bytes: of the ``ram_bytes``, counted in pages.
    :ivar device_bytes: the size of the devices' state.
    :ivar file_bytes: the space of the file on the disk.
    :ivar new_bytes, reused_bytes, stored_bytes: of a store of chunks: memory that was new to it, memory
        that it had, and the space of the new chunks.
    :ivar disks: those that were taken at the same moment.
    :ivar overlays: the file that the guest goes on with, for each of them by its name.
    :ivar source: the last answer to ``query-migrate``, whole.
    """

    path: Path
    format: str
    identity: str
    pause_us: int | None
    longest_stall_us: int | None
    stall_p99_us: int | None
    write_faults: int | None
    saving_ms: int
    total_ms: int
    ram_bytes: int
    data_bytes: int
    zero_bytes: int
    device_bytes: int | None
    file_bytes: int
    new_bytes: int | None = None
    reused_bytes: int | None = None
    stored_bytes: int | None = None
    parent: str | None = None
    disks: tuple[Disk, ...] = ()
    overlays: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it, without the raw answer."""
        figures = asdict(self) | {"path": str(self.path)}
        del figures["source"]
        return figures


@dataclass(frozen=True, slots=True)
class Measured:
    """The machine's own measurements of a snapshot."""

    pause_us: int | None
    longest_stall_us: int | None
    stall_p99_us: int | None
    write_faults: int | None
    device_bytes: int | None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Measured":
        """Take them from the last answer to ``query-migrate``."""
        figures = answer.get("x-postcopy", {})
        downtime_ms = answer.get(
            "downtime"
        )  # the only figure of a real QEMU, in whole milliseconds
        return cls(
            figures.get("pause-us", None if downtime_ms is None else downtime_ms * 1000),
            figures.get("write-stall-max-us"),
            figures.get("write-stall-p99-us"),
            figures.get("write-faults"),
            figures.get("device-bytes"),
        )
