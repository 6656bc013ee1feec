"""Files of which a part cannot be read, in processes that are started afterwards."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("unreadable.c")
_BAD = struct.Struct("<qq4096s")


class BadSector:
    """One bad part of one file; there is none yet.

    :param folder: for what has to be built.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if shutil.which("cc") is None:
            pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
        library = folder / "unreadable.so"
        command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, _SOURCE]
        subprocess.run(command, check=True)
        self._told = folder / "unreadable"
        self._told.write_bytes(bytes(_BAD.size))
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("UNREADABLE", str(self._told))

    def put(self, path: Path, start: int, end: int) -> None:
        """From now on these bytes of the file cannot be read."""
        with self._told.open("r+b") as file:
            file.write(_BAD.pack(start, end, str(path).encode()))
