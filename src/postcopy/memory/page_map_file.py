"""The memory of a page map, for the guest's process, which makes it and does not import numpy."""

from postcopy.kernel import memfd

_UNIT_BYTES = 4096


def create(pages: int) -> int:
    """Make the memory of a page map for ``pages`` pages, all missing; return its descriptor."""
    return memfd.create("postcopy-page-map", size_bytes(pages))


def size_bytes(pages: int) -> int:
    """How long it is: two bytes a page, each half in whole pages of the host."""
    return 2 * max(_UNIT_BYTES, -(-pages // _UNIT_BYTES) * _UNIT_BYTES)
