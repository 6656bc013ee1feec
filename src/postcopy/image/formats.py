"""Open an image of any format."""

from pathlib import Path

from postcopy.errors import ImageError, StreamError
from postcopy.image.base import Image, ImageBlock
from postcopy.image.file import ImageFile
from postcopy.image.file_kinds import CHUNK_IMAGE_MAGIC
from postcopy.image.mapped_ram import MappedImage
from postcopy.image.parser import read_start
from postcopy.stream.mapped_ram import CAPABILITY
from postcopy.stream.reader import FileBuffer, Incomplete

__all__ = ("Image", "ImageBlock", "open_image")


def open_image(path: str | Path) -> Image:
    """Open an image that our machine, or QEMU, has written.

    Opening checks all but the contents of pages, which a manifest beside the file covers.

    :raises ImageError: there is no such file, or it is no valid image; the error has the offset.
    """
    path = Path(path)
    file = ImageFile(path)
    try:
        return _parse(path, file)
    except BaseException:
        file.close()
        raise


def _parse(path: Path, file: ImageFile) -> Image:
    reader = FileBuffer(file.read, file.size_bytes)
    try:
        if file.read(0, len(CHUNK_IMAGE_MAGIC)).tobytes() == CHUNK_IMAGE_MAGIC:
            from postcopy.image.chunked import ChunkImage

            return ChunkImage(path, file, reader)
        capabilities = read_start(reader).capabilities
        reader.seek(0)
        if CAPABILITY in capabilities:
            return MappedImage(path, file, reader)
        from postcopy.image.stream import StreamImage

        return StreamImage(path, file, reader)
    except Incomplete:
        raise ImageError(path, "the file is cut off here", reader.consumed) from None
    except StreamError as error:
        raise ImageError(path, error.message, error.offset) from error
