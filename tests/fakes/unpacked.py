"""Where the scripts in ``.ci`` unpack what the suite needs beside the system's own."""

import os
from pathlib import Path

import pytest


def folder(what: str) -> Path:
    """The folder of ``qemu``, ``peers`` or ``headers``.

    That is ``POSTCOPY_QEMU`` and so on, else a folder of the user's cache.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = os.environ.get(f"POSTCOPY_{what.upper()}")
    return Path(chosen or Path(caches) / "postcopy" / what)


def peer(name: str) -> Path:
    """A file of those that ``.ci/install-peers`` brings; skips where it is not there."""
    path = folder("peers") / "debian" / name
    if not path.is_file():
        pytest.skip(f"needs {path.name}: run .ci/install-peers")
    return path
