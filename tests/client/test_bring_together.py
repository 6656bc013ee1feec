"""Both sides are brought together although something happens in between; the sides are scripts."""

import asyncio

import pytest

from postcopy.client.reconnect import bring_together
from postcopy.errors import Refused

PAUSED, ACTIVE, RECOVER = "postcopy-paused", "postcopy-active", "postcopy-recover"


class Side:
    """Answers with one status after the other, and refuses what it is told to."""

    def __init__(self, *statuses, refuses=()):
        self.address = "/run/side"
        self.done = []
        self._statuses = list(statuses)
        self._refuses = list(refuses)

    async def execute(self, command, arguments=None):
        if command == "query-migrate":
            status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
            return {"status": status}
        if command in self._refuses:
            self._refuses.remove(command)
            raise Refused(f"{command} is refused")
        if command != "query-status":  # which changes nothing
            self.done.append(command)
        return {}


def bring(source, destination):
    asyncio.run(bring_together(source, destination, "unix:/run/meet"))
    return source.done, destination.done


def test_both_are_paused():
    assert bring(Side(PAUSED), Side(PAUSED)) == (["migrate"], ["migrate-recover"])


def test_one_that_breaks_by_itself_before_it_can_be_told_to():
    source = Side(ACTIVE, ACTIVE, ACTIVE, PAUSED, refuses=["migrate-pause"])
    assert bring(source, Side(PAUSED)) == (["migrate"], ["migrate-recover"])


def test_one_that_cannot_be_paused_says_why():
    with pytest.raises(Refused, match="migrate-pause is refused"):
        bring(Side(ACTIVE, refuses=["migrate-pause"]), Side(PAUSED))


def test_a_connection_that_comes_too_late_is_broken_again():
    destination = Side(PAUSED, PAUSED, PAUSED, PAUSED, RECOVER, RECOVER, PAUSED,
                       refuses=["migrate-recover"])  # fmt: skip
    assert bring(Side(PAUSED), destination) == (["migrate"], ["migrate-pause", "migrate-recover"])


def test_a_destination_that_cannot_listen_says_why():
    with pytest.raises(Refused, match="migrate-recover is refused"):
        bring(Side(PAUSED), Side(PAUSED, refuses=["migrate-recover"]))


def test_one_that_is_called_again_and_again_is_left_alone():
    statuses = [PAUSED] * 3 + [PAUSED, RECOVER] * 9
    with pytest.raises(Refused, match="again and again"):
        bring(Side(PAUSED), Side(*statuses, refuses=["migrate-recover"] * 9))
