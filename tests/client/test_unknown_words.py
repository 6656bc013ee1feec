"""A machine may be newer than its client: what the client does not know never ends it."""

import asyncio
import contextlib

import pytest

from postcopy.cli.status import as_object, lines, side_of, what_next
from postcopy.client import migration
from postcopy.client.migration import Migration
from postcopy.client.progress import Phase, ProgressTracker
from postcopy.client.reconnect import address_of, bring_together
from postcopy.errors import MigrationFailed, Refused
from postcopy.status import Status

NEW = "postcopy-moonwalk"
ACTIVE = {"status": "active", "total-time": 5, "ram": {"dirty-sync-count": 1}}
COMPLETED = {"status": "completed", "total-time": 9, "ram": {}, "postcopy-news": [{}]}


class Scripted:
    """Gives one answer to query-migrate after the other, with an event that nobody knows between."""

    address = "/run/machine"

    def __init__(self, *answers):
        self._answers = list(answers)
        self._asked = asyncio.Event()

    async def execute(self, command, arguments=None):
        assert command in {"query-migrate", "query-status"}
        if command == "query-status":
            return {"status": "moonwalking"}
        self._asked.set()
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def listen(self):
        return contextlib.nullcontext(self._events())

    async def _events(self):
        while True:
            await self._asked.wait()
            self._asked.clear()
            yield {"event": "MIGRATION_MOONWALK", "data": {"phase": "waning"}}


def watch(source, destination=None):
    async def to_the_end():
        watched = Migration(source(), destination and destination(), None)
        looks = [look async for look in watched.events()]
        return looks, await watched.result()

    return asyncio.run(to_the_end())


def test_a_status_that_nobody_knows_goes_on_being_watched(monkeypatch):
    monkeypatch.setattr(migration, "_INTERVAL_S", 0.001)
    looks, result = watch(lambda: Scripted(ACTIVE, {"status": NEW}, COMPLETED))
    told = [(look.status, look.phase) for look in looks[-3:]]
    assert told == [
        (Status.ACTIVE, Phase.PRECOPY),
        (NEW, Phase.PRECOPY),
        (Status.COMPLETED, Phase.COMPLETED),
    ]
    assert looks[-2].to_json()["status"] == NEW
    assert result.total_ms == 9


def test_a_destination_in_a_status_that_nobody_knows_has_not_failed(monkeypatch):
    monkeypatch.setattr(migration, "_INTERVAL_S", 0.001)
    monkeypatch.setattr(migration, "_DESTINATION_TIMEOUT_S", 0.01)
    _, result = watch(lambda: Scripted(COMPLETED), lambda: Scripted({"status": NEW}))
    assert result.destination == {"status": NEW}


def test_a_failure_after_it_is_told(monkeypatch):
    monkeypatch.setattr(migration, "_INTERVAL_S", 0.001)
    failed = {"status": "failed", "error-desc": "out of moonlight"}
    with pytest.raises(MigrationFailed, match="out of moonlight"):
        watch(lambda: Scripted(ACTIVE, {"status": NEW}, failed))


@pytest.mark.parametrize(
    ("before", "phase"),
    [
        ("none", Phase.SETUP),
        ("device", Phase.SWITCHOVER),
        ("postcopy-active", Phase.POSTCOPY),
        ("postcopy-paused", Phase.RECOVERY),  # it goes on: nothing is being waited for any more
        ("cancelled", Phase.SETUP),
    ],
)
def test_what_is_not_known_is_part_of_what_went_before(before, phase):
    tracker = ProgressTracker()
    tracker.take({"status": before})
    for _ in range(2):
        assert tracker.take({"status": NEW}).phase is phase


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("restore", [{}, {"x-postcopy": {"demand-faults": 3}}])
def test_it_is_told_in_words(side, restore):
    told = side_of(side, "unix:/a", {"status": NEW} | restore, {"status": "moonwalking"})
    text = "\n".join(lines(told))
    assert f"{NEW}; the machine is moonwalking" in text
    assert "does not know" in text
    assert as_object([told], "")[side]["status"] == NEW
    assert what_next([told], "unix:/a", "unix:/b").startswith("postcopy status --from unix:/a")


def test_a_recovery_refuses_it_by_name():
    both = [Scripted({"status": "postcopy-paused"}), Scripted({"status": NEW})]
    with pytest.raises(Refused, match=f"the destination is {NEW}: a status that"):
        asyncio.run(bring_together(*both))


@pytest.mark.parametrize(
    "address", [{"type": "moon", "crater": "Tycho"}, {"type": "fd", "str": "7"}]
)
def test_an_address_of_another_kind_is_not_taken_apart(address):
    assert address_of({"socket-address": [address]}, "unix:/run/a:0") == "unix:/run/a:0"
