"""What a guest's process imports while it has nothing else to do."""

import importlib
from collections.abc import Callable
from typing import Final

_MODULES: Final = (
    "postcopy.monitor.backend",
    "postcopy.monitor.json_stream",
    "postcopy.monitor.schema",
    "postcopy.monitor.hmp_values",
    "postcopy.monitor.hmp",
    "postcopy.monitor.qmp_session",
    "postcopy.monitor.server",
)
"""Those of the monitors, which take 20 ms: while the engine reads the image there is time for them."""


def import_ahead(enough: Callable[[], bool]) -> None:
    """Import what will be needed later, a module at a time, until told that it is enough."""
    for name in _MODULES:
        if enough():
            return
        importlib.import_module(name)
