"""Recognises the files of an image by their magic and by their names."""

import os
from pathlib import Path
from typing import Final

from postcopy.channel.whole_file import Place, look_at
from postcopy.errors import Refused

MANIFEST_SUFFIX: Final = ".manifest.json"
WORKING_SET_SUFFIX: Final = ".working-set"

STREAM_MAGIC: Final = b"QEVM"
"""QEMU's magic of a stream and of a mapped-ram file."""
CHUNK_IMAGE_MAGIC: Final = b"PCCHUNKS"
"""The magic of the file of an image of chunks."""
PACK_MAGIC: Final = b"PCPACK01"
PAGE_COPIES_MAGIC: Final = b"PCPAGES1"

LIBVIRT_MAGIC: Final = b"LibvirtQemud"
"""What the magic of a file of ``virsh save`` begins with."""

_LONGEST: Final = 12
_BY_NAME: Final = {
    MANIFEST_SUFFIX: "the manifest of an image",
    WORKING_SET_SUFFIX: "the working set of an image",
}
_BY_MAGIC: Final = {
    STREAM_MAGIC: "an image of a guest",
    CHUNK_IMAGE_MAGIC: "an image of a guest",
    LIBVIRT_MAGIC: "an image of a guest",
    PAGE_COPIES_MAGIC: "the working set of an image",
    PACK_MAGIC: "a part of a store of chunks",
}


def look_at_target(path: Path) -> Place:
    """As :func:`postcopy.channel.whole_file.look_at`, for a name at which guest memory is to be written.

    :raises Refused: also for a file that belongs to an image.
    :raises OSError: the file cannot be read.
    """
    place = look_at(path)
    check_no_image(path)
    return place


def check_no_image(path: Path) -> None:
    """Refuse to write over a file that belongs to an image: a guest may be running from it.

    :raises Refused: the file belongs to an image.
    :raises OSError: the file cannot be read.
    """
    kind = _kind_of(path) if path.is_file() else None
    if kind is not None:
        raise Refused(f"{path} is {kind}; remove it, or give another path")


def _kind_of(path: Path) -> str | None:
    for suffix, kind in _BY_NAME.items():
        if path.name.endswith(suffix):
            return kind
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        begin = os.read(fd, _LONGEST)
    finally:
        os.close(fd)
    return next((kind for magic, kind in _BY_MAGIC.items() if begin.startswith(magic)), None)
