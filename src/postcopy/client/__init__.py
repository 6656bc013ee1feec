"""Drive machines and their migrations over QMP, from asyncio.

:mod:`postcopy.sync` has the same names for scripts without an event loop.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from postcopy.client.machine import Machine, RunOptions
    from postcopy.client.migration import Migration, Postcopy
    from postcopy.client.migration_model import Estimate
    from postcopy.client.migration_order import MigrateOptions
    from postcopy.client.progress import Phase, Progress
    from postcopy.client.reset_point import Reset, ResetPoint
    from postcopy.client.restored_machine import (
        Restored,
        RestoredMachine,
        RestoreOptions,
        restore,
    )
    from postcopy.client.result import FaultLatency, Result
    from postcopy.client.snapshot import SnapshotJob, SnapshotOptions
    from postcopy.client.snapshot_result import Snapshot

__all__ = [
    "Machine",
    "Migration",
    "Progress",
    "Phase",
    "Result",
    "FaultLatency",
    "Postcopy",
    "Snapshot",
    "SnapshotJob",
    "SnapshotOptions",
    "restore",
    "Restored",
    "RestoredMachine",
    "RestoreOptions",
    "ResetPoint",
    "Reset",
    "RunOptions",
    "MigrateOptions",
    "Estimate",
]

_WHERE: Final = {
    "Estimate": "migration_model",
    "Machine": "machine",
    "RunOptions": "machine",
    "Migration": "migration",
    "Postcopy": "migration",
    "MigrateOptions": "migration_order",
    "Phase": "progress",
    "Progress": "progress",
    "Reset": "reset_point",
    "ResetPoint": "reset_point",
    "Restored": "restored_machine",
    "RestoredMachine": "restored_machine",
    "RestoreOptions": "restored_machine",
    "restore": "restored_machine",
    "FaultLatency": "result",
    "Result": "result",
    "SnapshotJob": "snapshot",
    "SnapshotOptions": "snapshot",
    "Snapshot": "snapshot_result",
}
"""The module of each name, imported when it is asked for: most commands need few of them."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
