"""Drive machines and their migrations over QMP, from asyncio.

:mod:`postcopy.sync` has the same names for scripts without an event loop.
"""

from postcopy.client.estimate import Estimate
from postcopy.client.machine import Machine, RunOptions
from postcopy.client.migration import Migration, Postcopy
from postcopy.client.migration_order import MigrateOptions
from postcopy.client.progress import Phase, Progress
from postcopy.client.reset_point import Reset, ResetPoint
from postcopy.client.restored_machine import Restored, RestoredMachine, RestoreOptions, restore
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
