"""The disks of a guest whose memory is in an image: files of their own, which the manifest names.

An image with disks is taken at one moment: from then on the guest writes to overlays, and the files named
here are the disks as they were.  They belong to the image, and must not be changed.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports numpy, which the client of a snapshot needs only at its end
    from postcopy.image.manifest_file import Fields


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk.

    :ivar name: of the device, or its path in QEMU's object tree.
    :ivar path: the file, or the name by which QEMU opens something that is no file of this host.
    :ivar format: its driver in QEMU: ``raw``, ``qcow2``...
    :ivar size_bytes: of the disk, as the guest sees it.
    :ivar below: the files that it is an overlay of, the nearest first.
    :ivar file_bytes, modified_ns: of the file, at that moment; ``None``: it is no file of this host.
    """

    name: str
    path: str
    format: str
    size_bytes: int
    file_bytes: int | None = None
    modified_ns: int | None = None
    below: tuple[str, ...] = ()

    def as_it_is(self) -> "Disk":
        """Note the size and the time of the file, if it is one."""
        try:
            status = os.stat(self.path)  # noqa: PTH116 - it may be no path at all
        except (OSError, ValueError):
            return self
        return replace(self, file_bytes=status.st_size, modified_ns=status.st_mtime_ns)

    @property
    def file_name(self) -> str:
        """Its name as a part of the name of a file."""
        return file_name_of(self.name)

    def damage(self) -> str | None:
        """Return what shows that the file is not as it was; ``None``: nothing does."""
        if self.file_bytes is None:
            return None
        try:
            status = Path(self.path).stat()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            return f"disk {self.name}: {self.path}: {why}"
        if status.st_size != self.file_bytes:
            size = f"{status.st_size} bytes, and was of {self.file_bytes}"
            return f"disk {self.name}: {self.path} is of {size} when the image was taken"
        if status.st_mtime_ns != self.modified_ns:
            return f"disk {self.name}: {self.path} has been written since the image was taken"
        return None


def file_name_of(disk: str) -> str:
    """The name of a disk, which may be a path in QEMU's object tree, as a part of a file's name."""
    return disk.strip("/").replace("/", "-")


@dataclass(frozen=True, slots=True)
class FrozenDisks:
    """The disks of one moment.

    :ivar was_running: whether the guest ran before it was stopped for them.
    """

    disks: tuple[Disk, ...]
    was_running: bool


def decode_disks(fields: "Fields") -> tuple[Disk, ...]:
    """Read the member ``disks`` of a manifest, which older manifests do not have.

    :raises ImageError: it makes no sense.
    """
    return tuple(_decoded(fields)) if fields.optional("disks", list) is not None else ()


def encode_disks(disks: tuple[Disk, ...]) -> list[dict[str, Any]]:
    """Write it."""
    return [asdict(disk) for disk in disks]


def _decoded(fields: "Fields") -> Iterator[Disk]:
    for each in fields.objects("disks"):
        of_file = each.optional("file_bytes", int) is not None
        yield Disk(
            each.get("name", str),
            each.get("path", str),
            each.get("format", str),
            each.count("size_bytes"),
            each.count("file_bytes") if of_file else None,
            each.count("modified_ns") if of_file else None,
            tuple(each.texts("below")),
        )
