"""What a guest's process does with its standard input and output."""

import contextlib
import os
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Final

from postcopy.cli.notices import notice
from postcopy.cli.run_settings import NONE, STDIO
from postcopy.image.file_kinds import check_no_image
from postcopy.machine.serial_output import SerialOutput

_STDOUT: Final = 1


def serial_output(place: str, cleanup: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Where the guest's serial port goes.

    :param place: ``stdio``, ``none`` or ``file:PATH``.
    :param cleanup: writes what is still to be written, says what was lost, and closes the file.
    :raises OSError: the file cannot be opened.
    :raises Refused: it belongs to an image.
    """
    if place == NONE:
        return lambda _data: None
    fd, name = _STDOUT, "standard output"
    if place != STDIO:
        name = place.removeprefix("file:")
        check_no_image(Path(name))
        # Not closed again: a write that does not come back may be under way until the process ends.
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def tell(reason: str) -> None:
        notice(f"{name}: {reason}; the guest goes on, and its serial output is lost meanwhile")

    output = SerialOutput(fd, tell)

    def close() -> None:
        output.close()
        if output.dropped_bytes:
            notice(f"{name}: {output.dropped_bytes} bytes of the guest's serial output were lost")

    cleanup.callback(close)
    return output.write


def restorer() -> Callable[[], None]:
    """Make a call that puts the terminal back as it is now.

    A console's thread may be editing a line when the process leaves, with the terminal in raw mode.
    """
    if not sys.stdin.isatty():
        return lambda: None
    settings = termios.tcgetattr(sys.stdin)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
