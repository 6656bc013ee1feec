"""The task that watches a migration; the machine is a script."""

import asyncio
import contextlib

from postcopy.client import migration
from postcopy.client.migration import Migration
from postcopy.status import Status

BEGUN = {"status": "completed", "total-time": 1, "ram": {}}


class Turn:
    """Awaited: everything else that is ready has its turn."""

    def __await__(self):
        yield


class Machine:
    """Has not begun yet; tells of its one event when it is told to."""

    address = "/run/machine"

    def __init__(self):
        self.begins = asyncio.Event()
        self.asked = 0

    async def execute(self, command, arguments=None):
        assert command == "query-migrate"
        self.asked += 1
        await Turn()
        return BEGUN if self.begins.is_set() else {}

    def listen(self):
        return contextlib.nullcontext(self._events())

    async def _events(self):
        await self.begins.wait()
        yield {"event": "MIGRATION"}


def test_a_machine_that_has_not_begun_is_not_asked_without_end(monkeypatch):
    monkeypatch.setattr(migration, "_INTERVAL_S", 3600.0)

    async def watch():
        machine = Machine()
        watched = Migration(machine, None, None)
        for _ in range(100):
            await Turn()
        asked = machine.asked
        machine.begins.set()
        async with asyncio.timeout(30):
            await watched.result()
        return asked, machine.asked, watched.status

    assert asyncio.run(watch()) == (1, 2, Status.COMPLETED)
