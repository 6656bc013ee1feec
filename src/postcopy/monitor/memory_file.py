"""``pmemsave``: guest memory into a file."""

import os
from pathlib import Path

from postcopy.errors import Refused
from postcopy.image.file_kinds import check_no_image
from postcopy.monitor.backend import MachineControl

_CHUNK_BYTES = 1 << 20


def save(machine: MachineControl, address: int, length_bytes: int, path: str) -> None:
    """Write ``length_bytes`` of guest RAM from physical ``address`` on to ``path``.

    Waits for pages that are still missing.  Unlike QEMU, which writes what it pleases for
    addresses without RAM, this refuses them: no zeros that nobody wrote.

    :raises Refused: the file cannot be written, belongs to an image, or there is no RAM at some address.
    """
    try:
        check_no_image(Path(path))
        with Path(path).open("wb") as file:
            for offset in range(0, length_bytes, _CHUNK_BYTES):
                chunk_bytes = min(_CHUNK_BYTES, length_bytes - offset)
                file.write(machine.read_physical(address + offset, chunk_bytes))
    except (OSError, ValueError) as error:
        known = isinstance(error, OSError) and error.errno
        reason = os.strerror(known) if known else str(error)  # a zero byte in the name
        raise Refused(f"Could not open '{path}': {reason}") from error
