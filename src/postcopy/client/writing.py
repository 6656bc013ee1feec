"""Where a machine is told to write a file."""

import os
from pathlib import Path
from typing import Final

from postcopy.client.connection import Connection
from postcopy.errors import Refused

_KNOWS_FILES: Final = (8, 2)
_NAME: Final = "postcopy"
_MODE: Final = 0o600  # guest memory holds keys and passwords


async def writing_to(machine: Connection, path: Path) -> str:
    """Return the URI by which a machine writes to a file.

    A QEMU before 8.2 has no ``file:``: it is given the file, opened by this process.

    :raises Refused: the file cannot be made, or not be given to the machine.
    """
    version = (await machine.version())["qemu"]
    if await machine.is_ours() or (version["major"], version["minor"]) >= _KNOWS_FILES:
        return f"file:{path}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise Refused(f"Failed to open {path}: {error.strerror}; give another path") from error
    try:
        await machine.give(_NAME, fd)
    finally:
        os.close(fd)
    return f"fd:{_NAME}"
