"""Names for images: one that is free is held while the image is made."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from postcopy.channel.claim import claimed
from postcopy.channel.whole_file import check_replaceable, partial_name, remove_leftovers
from postcopy.errors import Refused
from postcopy.image.file_kinds import MANIFEST_SUFFIX


def check_free(path: Path) -> None:
    """Refuse a name under which nothing can be published.

    :raises Refused: it, or that of its manifest, is taken, or there is no such folder.
    """
    for name in (path, path.with_name(path.name + MANIFEST_SUFFIX)) if path.name else (path,):
        check_replaceable(name)
        if os.path.lexists(name):
            raise Refused(f"{name} exists; remove it, or give another path")
    if not path.parent.is_dir():
        raise Refused(f"{path.parent} is no folder; make it, or give another path")


@contextlib.contextmanager
def reserved(path: Path) -> Iterator[Path]:
    """Hold a name that is free, for one image, and yield where to write what is to become it.

    Nothing half-written is there, first or last.

    :raises Refused: it is not free, or somebody is writing an image for it.
    :raises OSError: nothing can be written there.
    """
    check_free(path)
    with claimed(path):
        check_free(path)  # it may have been published meanwhile
        remove_leftovers(path)
        written = partial_name(path)
        try:
            yield written
        finally:
            with contextlib.suppress(OSError):
                written.unlink()
