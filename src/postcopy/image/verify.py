"""Compares an image with its manifest, and locates damage.

``postcopy verify`` checks everything.  A restore checks all but memory before the guest runs, and each
chunk of memory before it serves a page of it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from postcopy.errors import ImageError
from postcopy.image.digests import CHUNK_BYTES, chunk_count, damaged_chunks
from postcopy.image.file import Damage, ImageFile
from postcopy.image.formats import Image, open_image
from postcopy.image.manifest import Manifest, beside
from postcopy.memory.runs import Mask


def find_damages(path: Path, manifest: Manifest) -> Iterator[Damage]:
    """Compare all of an image with its manifest.

    :raises ImageError: there is no image, it has another size, or it is not valid.
    """
    with ImageFile(path) as file, contextlib.ExitStack() as opened:
        check_size(file, manifest)
        image = _try_to_open(path, opened)
        whole = True
        for chunk, reason in damaged_chunks(file, manifest.digests):
            whole = False
            yield _damage(file, image, chunk, reason)
        if image is None and whole:
            open_image(path).close()  # raises: the image is unchanged, and not valid
        if image is not None:
            yield from image.damages()


def open_for_restore(path: Path) -> tuple[Image, Manifest | None]:
    """Open an image for a restore; with a manifest, all but its memory is checked.

    :class:`postcopy.image.chunk_verifier.ChunkVerifier` checks the memory of a mapped image, chunk by
    chunk; reads from a store check the memory of an image of chunks; the memory of a plain stream is
    checked here, since all of the stream has to be read.

    :raises ImageError: there is no image, or it is damaged.
    """
    if not beside(path).exists():
        return open_image(path), None
    manifest = Manifest.load(path)
    with ImageFile(path) as file, contextlib.ExitStack() as opened:
        check_size(file, manifest)
        image = _try_to_open(path, opened)
        only = None if image is None else ~memory_chunks(image, file.size_bytes)
        for chunk, reason in damaged_chunks(file, manifest.digests, only):
            raise _damage(file, image, chunk, reason).error()
        opened.pop_all()
    return image if image is not None else open_image(path), manifest


def check_size(file: ImageFile, manifest: Manifest) -> None:
    """Compare the length of a file with its manifest.

    :raises ImageError: the file has been truncated or extended.
    """
    size = manifest.digests.size_bytes
    if file.size_bytes < size:
        message = f"cut off: {file.size_bytes} bytes of {size} are there"
        raise ImageError(file.path, message, file.size_bytes)
    if file.size_bytes > size:
        message = f"{file.size_bytes - size} bytes too long"
        raise ImageError(file.path, message, size)


def memory_chunks(image: Image, file_bytes: int) -> Mask:
    """Return the chunks of the image's file that are pages and nothing else; they are checked later."""
    mask = np.zeros(chunk_count(file_bytes), np.bool_)
    for start, end in image.fixed_pages():
        mask[-(-start // CHUNK_BYTES) : end // CHUNK_BYTES] = True
    return mask


def _try_to_open(path: Path, opened: contextlib.ExitStack) -> Image | None:
    # If damage is the reason, the digests locate it more exactly.
    try:
        return opened.enter_context(open_image(path))
    except ImageError:
        return None


def _damage(file: ImageFile, image: Image | None, chunk: int, reason: str) -> Damage:
    start = chunk * CHUNK_BYTES
    end = min(start + CHUNK_BYTES, file.size_bytes)
    where = None if image is None else image.locate(start, end)
    block, offset = where or (None, None)
    return Damage(file.path, start, end - start, block, offset, reason)
