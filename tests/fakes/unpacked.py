"""Where the scripts in ``.ci`` unpack what the suite needs beside the system's own."""

import os
from pathlib import Path


def folder(what: str) -> Path:
    """The folder of ``qemu`` or ``headers``: ``POSTCOPY_QEMU`` and so on, else the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = os.environ.get(f"POSTCOPY_{what.upper()}")
    return Path(chosen or Path(caches) / "postcopy" / what)
