"""Open an image of any format."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from postcopy.errors import ImageError, StreamError
from postcopy.image.base import Image, ImageBlock
from postcopy.image.file import ImageFile
from postcopy.image.file_kinds import CHUNK_IMAGE_MAGIC, LIBVIRT_MAGIC
from postcopy.image.mapped_ram import MappedImage
from postcopy.image.parser import read_start
from postcopy.stream.mapped_ram import CAPABILITY
from postcopy.stream.reader import FileBuffer, Incomplete

if TYPE_CHECKING:
    from postcopy.image.libvirt import LibvirtHeader

__all__ = ("Image", "ImageBlock", "locate_stream", "naming", "open_image", "open_unpacked")


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where in a file the stream begins, and what stands in front of it.

    :ivar chunked: the memory is in a store of chunks.
    """

    offset: int
    libvirt: "LibvirtHeader | None" = None
    chunked: bool = False


def open_image(path: str | Path) -> Image:
    """Open an image that our machine, QEMU, or ``virsh save`` has written.

    Opening checks all but the contents of pages, which a manifest beside the file covers.

    :raises ImageError: there is no such file, or it is no valid image; the error has the offset.  Also
        a file that libvirt has compressed: see :func:`open_unpacked`.
    """
    path = Path(path)
    return _open(path, ImageFile(path))


def open_unpacked(path: str | Path, folder: Path) -> Image:
    """As :func:`open_image`; a file that libvirt has compressed is unpacked first.

    :param folder: where it is unpacked, to a file without a name that is gone when the image is closed; it
        needs about the size of the guest's memory.
    :raises ImageError: also for a stream that cannot be unpacked.
    :raises Refused: the program that unpacks it is missing.
    :raises OSError: the disk is full, or broken.
    """
    path = Path(path)
    with ImageFile(path) as file:
        header = locate_stream(file).libvirt
        if header is None or not header.packed:
            return open_image(path)
        import tempfile

        from postcopy.image.libvirt import unpack

        with tempfile.TemporaryFile(dir=folder) as unpacked:
            unpack(file, header, unpacked)
            return _open(path, ImageFile(path, os.dup(unpacked.fileno())), StreamPlace(0, header))


def locate_stream(file: ImageFile) -> StreamPlace:
    """Find the stream of a file.

    :raises ImageError: the header in front of it makes no sense.
    """
    begin = file.read(0, max(len(LIBVIRT_MAGIC), len(CHUNK_IMAGE_MAGIC))).tobytes()
    if begin.startswith(CHUNK_IMAGE_MAGIC):
        return StreamPlace(len(CHUNK_IMAGE_MAGIC), chunked=True)
    if not begin.startswith(LIBVIRT_MAGIC):
        return StreamPlace(0)
    from postcopy.image.libvirt import read_libvirt_header

    header = read_libvirt_header(file)
    return StreamPlace(0) if header is None else StreamPlace(header.stream_offset, header)


@contextlib.contextmanager
def naming(path: Path, reader: FileBuffer) -> Iterator[None]:
    """Make errors of the stream errors of the image.

    :raises ImageError: for each of them, with the offset in the file.
    """
    try:
        yield
    except Incomplete:
        raise ImageError(path, "the file is cut off here", reader.consumed) from None
    except StreamError as error:
        raise ImageError(path, error.message, error.offset) from error


def _open(path: Path, file: ImageFile, stream: StreamPlace | None = None) -> Image:
    try:
        if stream is None:
            stream = locate_stream(file)
            check_not_packed(path, stream)
        reader = FileBuffer(file.read, file.size_bytes)
        with naming(path, reader):
            image = _parse(path, file, reader, stream)
        image.libvirt = stream.libvirt
        return image
    except BaseException:
        file.close()
        raise


def check_not_packed(path: Path, stream: StreamPlace) -> None:
    """Refuse a stream that has to be unpacked first.

    :raises ImageError: libvirt has compressed it.
    """
    if stream.libvirt is not None and stream.libvirt.packed:
        raise ImageError(
            path,
            f"libvirt has compressed it with {stream.libvirt.stream_format}; "
            f"type 'postcopy convert {path} NEW', and use that",
            stream.offset,
        )


def _parse(path: Path, file: ImageFile, reader: FileBuffer, stream: StreamPlace) -> Image:
    reader.seek(stream.offset)
    if stream.chunked:
        from postcopy.image.chunked import ChunkImage

        return ChunkImage(path, file, reader)
    capabilities = read_start(reader).capabilities
    reader.seek(stream.offset)
    if CAPABILITY in capabilities:
        return MappedImage(path, file, reader)
    from postcopy.image.stream import StreamImage

    return StreamImage(path, file, reader)
