"""What a guest's process does with its standard input and output."""

import contextlib
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from postcopy.cli.run_settings import NONE, STDIO


def serial_output(place: str, cleanup: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Where the guest's serial port goes.

    :param place: ``stdio``, ``none`` or ``file:PATH``.
    :param cleanup: closes the file.
    :raises OSError: the file cannot be written.
    """
    if place == NONE:
        return lambda _data: None
    file: BinaryIO = sys.stdout.buffer
    if place != STDIO:
        path = Path(place.removeprefix("file:"))
        file = cleanup.enter_context(path.open("wb"))

    def write(data: bytes) -> None:
        file.write(data)
        file.flush()

    return write


def restorer() -> Callable[[], None]:
    """Make a call that puts the terminal back as it is now.

    A console's thread may be editing a line when the process leaves, with the terminal in raw mode.
    """
    if not sys.stdin.isatty():
        return lambda: None
    settings = termios.tcgetattr(sys.stdin)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
