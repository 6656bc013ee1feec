"""The QEMUs that the suite has as peers; ``.ci/install-qemu`` brings them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fakes.unpacked import folder

BINARY = "qemu-system-x86_64"
OLDEST, USUAL, NEWEST = ALL = ("7.2", "10.0", "11.1")
"""Debian 12 has the oldest; most tests are for the usual one alone."""


def folder_of(version: str) -> Path:
    """Where its program is, for ``PATH``; skips where it is neither unpacked nor installed."""
    unpacked = folder("qemu") / version / "bin"
    if (unpacked / BINARY).is_file():
        return unpacked
    installed = shutil.which(BINARY)
    if installed is None or not _is(installed, version):
        pytest.skip(f"needs QEMU {version}: run .ci/install-qemu")
    return Path(installed).parent


def _is(program: str, version: str) -> bool:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return said.stdout.startswith(f"QEMU emulator version {version}.")
