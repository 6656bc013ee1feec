"""Drive machines and their migrations over QMP, from asyncio.

:mod:`postcopy.client.sync` has the same names for scripts without an event loop.
"""

from postcopy.client.machine import Machine, MigrateOptions, RunOptions
from postcopy.client.migration import Migration, Postcopy
from postcopy.client.progress import Phase, Progress
from postcopy.client.result import FaultLatency, Result

__all__ = [
    "Machine",
    "Migration",
    "Progress",
    "Phase",
    "Result",
    "FaultLatency",
    "Postcopy",
    "RunOptions",
    "MigrateOptions",
]
