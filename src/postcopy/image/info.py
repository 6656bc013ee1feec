"""What is in an image, as ``postcopy inspect`` shows it (compare ``qemu-img info``)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from postcopy.image import working_set
from postcopy.image.chunked import ChunkImage
from postcopy.image.digests import CHUNK_BYTES
from postcopy.image.disks import encode_disks
from postcopy.image.formats import Image
from postcopy.image.manifest import Manifest, beside


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block; pages are of 4 KiB."""

    name: str
    size_bytes: int
    data_pages: int
    zero_pages: int


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device."""

    name: str
    instance: int
    version: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image without the contents of its pages.

    :ivar file_bytes, disk_bytes: the file's length, and its space on the disk.
    :ivar store: the folder of its chunks, of which it uses ``stored_chunks``.
    :ivar working_set: the file of the recorded working set, if there is one.
    :ivar manifest: further members of the manifest; ``None`` without a manifest.
    :ivar libvirt: the header of ``virsh save``, with the domain's XML; ``None`` without one.
    """

    path: str
    format: str
    machine: str
    uuid: str | None
    file_bytes: int
    disk_bytes: int
    blocks: tuple[BlockInfo, ...]
    devices: tuple[DeviceInfo, ...]
    store: str | None
    stored_chunks: int | None
    working_set: str | None
    manifest: dict[str, Any] | None
    libvirt: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return asdict(self)


def image_info(image: Image) -> ImageInfo:
    """Read all of an image but its pages.

    :raises ImageError: its manifest is damaged.
    """
    status = image.path.stat()
    manifest = Manifest.load(image.path) if beside(image.path).exists() else None
    recorded = working_set.beside(image.path)
    chunked = isinstance(image, ChunkImage)
    return ImageInfo(
        path=str(image.path),
        format=image.format,
        machine=image.machine_name,
        uuid=None if image.uuid is None else image.uuid.hex(),
        file_bytes=status.st_size,
        disk_bytes=status.st_blocks * 512,
        blocks=tuple(_blocks(image)),
        devices=tuple(
            DeviceInfo(each.name, each.instance, each.version, len(each.payload))
            for each in image.devices
        ),
        store=str(_folder(image)) if chunked else None,
        stored_chunks=_stored_chunks(manifest) if chunked else None,
        working_set=str(recorded) if recorded.exists() else None,
        manifest=None if manifest is None else _told(manifest),
        libvirt=None if image.libvirt is None else image.libvirt.to_json(),
    )


def _blocks(image: Image) -> list[BlockInfo]:
    found = []
    for block in image.blocks:
        data = int(image.has_data(block.name).sum())
        found.append(BlockInfo(block.name, block.size_bytes, data, block.pages - data))
    return found


def _folder(image: Image) -> Path | None:
    return image.store.folder if isinstance(image, ChunkImage) else None


def _stored_chunks(manifest: Manifest | None) -> int:
    stored = None if manifest is None else manifest.stored
    return 0 if stored is None else sum(int(e.present.sum()) for e in stored.blocks.values())


def _told(manifest: Manifest) -> dict[str, Any]:
    return {
        "identity": manifest.identity,
        "times": asdict(manifest.times),
        "parent": None if manifest.parent is None else asdict(manifest.parent),
        "command": manifest.command,
        "disks": encode_disks(manifest.disks),
        "chunk_bytes": CHUNK_BYTES,
        "chunks_with_data": int(manifest.digests.present.sum()),
    }
