"""Guest memory as numbers or characters (``xp``), and into a file (``pmemsave``)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from postcopy.errors import Refused
from postcopy.image.file_kinds import check_no_image
from postcopy.monitor.controls import MachineControl

_CHUNK_BYTES = 1 << 20

MOST_BYTES = 256 << 10
"""So much of the memory is shown at a time: the text of it all is made before any of it is sent."""

_WIDTHS: dict[str, Callable[[int], int]] = {
    "o": lambda size_bytes: (size_bytes * 8 + 2) // 3,
    "x": lambda size_bytes: size_bytes * 2,
    "u": lambda size_bytes: (size_bytes * 8 * 10 + 32) // 33,
    "d": lambda size_bytes: (size_bytes * 8 * 10 + 32) // 33,
    "c": lambda _: 0,
}


def dump(
    read: Callable[[int, int], bytes], address: int, count: int, form: str, size_bytes: int
) -> Iterator[str]:
    """The lines that show ``count`` items from ``address`` on.

    They stop where there is no RAM, and after :data:`MOST_BYTES`, with a line that says so.

    :param form: one of ``x d u o c``; ``c`` shows every byte whatever the size.
    """
    line_bytes = 8 if size_bytes == 1 else 16
    total_bytes = count * size_bytes
    item_bytes = 1 if form == "c" else size_bytes
    for offset in range(0, total_bytes, line_bytes):
        start = f"{address + offset:08x}:"
        if offset >= MOST_BYTES:
            yield f"{start} {MOST_BYTES >> 10} KiB are shown at a time; pmemsave saves any number"
            return
        try:
            data = read(address + offset, min(line_bytes, total_bytes - offset))
        except Refused:
            yield f"{start} Cannot access memory"
            return
        items = (data[i : i + item_bytes] for i in range(0, len(data), item_bytes))
        yield " ".join([start, *(_item(item, form) for item in items)])


def _item(item: bytes, form: str) -> str:
    width = _WIDTHS[form](len(item))
    # As in QEMU, only the widest numbers have a sign.
    value = int.from_bytes(item, "little", signed=form == "d" and len(item) == 8)
    match form:
        case "x":
            return f"0x{value:0{width}x}"
        case "o":
            return (f"0{value:o}" if value else "0").rjust(width)
        case "c":
            return f"'{_character(value)}'"
    return f"{value:{width}d}"


def _character(code: int) -> str:
    named = {0x0A: "\\n", 0x0D: "\\r", 0x27: "\\'", 0x5C: "\\\\"}
    if code in named:
        return named[code]
    return chr(code) if 32 <= code < 127 else f"\\x{code:02x}"


def save(machine: MachineControl, address: int, length_bytes: int, path: str) -> None:
    """Write ``length_bytes`` of guest RAM from physical ``address`` on to ``path``.

    Waits for pages that are still missing.  Addresses without RAM are refused: QEMU writes bytes for them
    that are in no memory.

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
