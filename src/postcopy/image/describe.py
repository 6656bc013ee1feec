"""Make the manifest of an image, and publish both."""

import datetime as dt
from collections.abc import Callable

from postcopy.image.digests import take_digests
from postcopy.image.file import ImageFile
from postcopy.image.formats import Image
from postcopy.image.last_moment import go_on
from postcopy.image.manifest import Manifest, Times


def describe(image: Image, times: Times, check: Callable[[], None] = go_on) -> Manifest:
    """Read all of an image, and say what it is.

    :param check: called now and then; what it raises ends the work.
    :raises ImageError: the file has gone.
    """
    with ImageFile(image.path) as file:
        digests = take_digests(file, check)
    return Manifest(image.format, image.machine_name, tuple(image.blocks), digests, times)


def now() -> str:
    """The time of day in UTC, as manifests have it."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
