"""The one table by which a migration goes on, and the one object that keeps to it."""

import importlib.util
import threading
from pathlib import Path

import pytest

from postcopy.errors import WrongState
from postcopy.status import AFTER_SWITCHOVER, ENDED, GIVEN_UP, MOVES, Status, StatusMachine, table

S = Status


def reachable(*begin):
    seen, ahead = set(), set(begin)
    while ahead:
        seen |= ahead
        ahead = {to for status in ahead for to in MOVES[status]} - seen
    return seen


def test_qemu_has_seventeen_statuses():
    assert len(Status) == 17
    assert set(MOVES) == set(Status)


def test_every_status_but_three_can_be_reached():
    assert reachable(S.NONE) == set(Status) - {S.FAILING, S.COLO, S.WAIT_UNPLUG}


def test_after_switchover_there_is_no_way_back():
    """Only by completing or by losing the guest; never to cancelled or to running it here again."""
    for status in AFTER_SWITCHOVER:
        assert MOVES[status] <= AFTER_SWITCHOVER | {S.COMPLETED, S.FAILED}


def test_a_guest_that_is_given_up_never_comes_back_by_a_cancel():
    """A destination that loads the devices may refuse them; a source that hears nothing pauses."""
    for status in GIVEN_UP:
        assert MOVES[status] <= GIVEN_UP | {S.COMPLETED, S.FAILED}
    assert MOVES[S.POSTCOPY_DEVICE] == {S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.FAILED}


def test_every_end_allows_a_new_beginning_and_nothing_else():
    for status in ENDED:
        assert MOVES[status] == {S.SETUP}


def test_everything_before_switchover_can_be_cancelled():
    for status in (S.SETUP, S.ACTIVE, S.PRE_SWITCHOVER, S.DEVICE):
        assert S.CANCELLING in MOVES[status]
        assert S.FAILED in MOVES[status]


@pytest.mark.parametrize("origin", Status)
def test_only_moves_of_the_table(origin):
    for to in Status:
        told = []
        progress = StatusMachine(told.append, origin)
        if to in MOVES[origin]:
            assert progress.move(to)
            assert progress.status is to
            assert told == [to]
        else:
            with pytest.raises(WrongState, match=f"^cannot go from {origin.value} to {to.value}$"):
                progress.move(to)
            assert progress.status is origin
            assert told == []


def test_a_move_that_races_with_another_changes_nothing():
    told = []
    progress = StatusMachine(told.append, S.ACTIVE)
    assert not progress.move(S.CANCELLED, only_from=frozenset({S.CANCELLING}))
    assert progress.move(S.CANCELLING, only_from=frozenset({S.ACTIVE}))
    assert told == [S.CANCELLING]


def test_of_two_who_race_one_wins():
    progress = StatusMachine(begin=S.ACTIVE)
    gate = threading.Barrier(8)
    won = []

    def race():
        gate.wait(10)
        if progress.move(S.CANCELLING, only_from=frozenset({S.ACTIVE})):
            won.append(threading.get_ident())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(won) == 1


def test_wait_wakes_at_the_status_and_not_before():
    progress = StatusMachine()
    found = []
    waiter = threading.Thread(target=lambda: found.append(progress.wait(S.ACTIVE, timeout=10)))
    waiter.start()
    progress.move(S.SETUP)
    progress.move(S.ACTIVE)
    waiter.join(10)
    assert found == [S.ACTIVE]
    with pytest.raises(TimeoutError, match="still active"):
        progress.wait(S.COMPLETED, timeout=0)


def test_the_table_shows_every_move():
    rows = dict(line.strip("| ").split(" | ") for line in table().splitlines())
    for origin, targets in MOVES.items():
        named = rows.get(f"`{origin.value}`", "").split(", ")
        assert {f"`{to.value}`" for to in targets} == set(filter(None, named))


def test_the_page_in_the_docs_is_current():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("draw", root / "scripts" / "draw_status.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert table() in (root / "docs" / "status.md").read_text()
