"""What we say we are.

Clients ask for the version to know which commands and members to expect; ours are QEMU 11.1's, so
that is the version, and the package tells the truth.
"""

from typing import Any

QEMU_VERSION = {"major": 11, "minor": 1, "micro": 3}


def package() -> str:
    """Our own name and version."""
    from importlib.metadata import PackageNotFoundError, version  # takes long to import

    try:
        return f"postcopy {version('postcopy')}"
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "postcopy"


def query_version() -> dict[str, Any]:
    """The answer to ``query-version``, and part of QMP's greeting."""
    return {"qemu": dict(QEMU_VERSION), "package": package()}
