"""Running memory that moves: live migration of a guest, by precopy and postcopy.

The public names, most important first; each is imported when it is first used.  ``docs/api.md``
tells of them::

    from postcopy import Machine

    async with await Machine.start(workload="hammer") as source:
        migration = await source.migrate("tcp:there:4444", postcopy="first-round")
        async for progress in migration.events():
            ...
        result = await migration.result()

``postcopy.sync`` has the same names for scripts without ``async``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.bench.link_bench import LinkBench, measure_link
    from postcopy.client import (
        Estimate,
        FaultLatency,
        Machine,
        MigrateOptions,
        Migration,
        Phase,
        Postcopy,
        Progress,
        Reset,
        ResetPoint,
        Restored,
        RestoredMachine,
        RestoreOptions,
        Result,
        RunOptions,
        Snapshot,
        SnapshotJob,
        SnapshotOptions,
        restore,
    )
    from postcopy.errors import (
        CannotConnect,
        ChannelBroken,
        ImageError,
        MigrationCancelled,
        MigrationFailed,
        NeedsRecovery,
        PostcopyError,
        Reason,
        Refused,
    )
    from postcopy.status import Status

    __version__: str

__all__ = [
    "Machine",
    "Migration",
    "Progress",
    "Phase",
    "Status",
    "Result",
    "FaultLatency",
    "Postcopy",
    "Snapshot",
    "SnapshotJob",
    "restore",
    "RestoredMachine",
    "Restored",
    "ResetPoint",
    "Reset",
    "RunOptions",
    "Estimate",
    "measure_link",
    "LinkBench",
    "MigrateOptions",
    "SnapshotOptions",
    "RestoreOptions",
    "PostcopyError",
    "Refused",
    "Reason",
    "MigrationFailed",
    "MigrationCancelled",
    "NeedsRecovery",
    "CannotConnect",
    "ChannelBroken",
    "ImageError",
]

_ELSEWHERE = {
    "postcopy.errors": {
        "PostcopyError",
        "Refused",
        "Reason",
        "MigrationFailed",
        "MigrationCancelled",
        "NeedsRecovery",
        "CannotConnect",
        "ChannelBroken",
        "ImageError",
    },
    "postcopy.status": {"Status"},
    "postcopy.bench.link_bench": {"measure_link", "LinkBench"},
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # seldom asked for, and slow to import

        return version("postcopy")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module, names in _ELSEWHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    return getattr(importlib.import_module("postcopy.client"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
