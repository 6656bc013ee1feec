"""Every state that the hand-over can get into: one owner, or a user who is told what to do."""

from collections import deque
from dataclasses import replace

import pytest

from model import handover
from model.handover import (
    COMPLETED,
    FAILED,
    FILE,
    PAUSED,
    PIPE,
    POSTCOPY,
    PRECOPY,
    SNAPSHOT,
    State,
    moves,
)
from postcopy.ownership import HERE, MEANINGS, MOVES, RUNS, Move, Owner, Ownership
from postcopy.status import MOVES as STATUS_MOVES
from postcopy.status import Status


def explore(first):
    """All states, each with one way to it."""
    ways = {first: ()}
    left = deque([first])
    while left:
        state = left.popleft()
        for name, after in moves(state):
            if after not in ways:
                ways[after] = (*ways[state], name)
                left.append(after)
    return ways


@pytest.fixture(scope="module", params=[PRECOPY, POSTCOPY, PIPE, FILE, SNAPSHOT])
def ways(request):
    return explore(State(request.param))


def ends(ways):
    return {state: way for state, way in ways.items() if not any(True for _ in moves(state))}


def runs_unowned(state):
    return any(side.runs and side.owner not in RUNS for side in (state.source, state.destination))


def quit_ordered(state):
    return state.source.ended or state.destination.ended


def test_it_is_worth_exploring(ways):
    kind = next(iter(ways)).kind
    assert len(ways) > {PRECOPY: 1000, POSTCOPY: 5000, PIPE: 500, FILE: 100, SNAPSHOT: 10}[kind]
    steps = {state.source.step for state in ways}
    assert COMPLETED in steps
    assert (PAUSED in steps) is (kind == POSTCOPY)


def test_every_owner_and_every_move_is_come_to():
    found = {
        side.owner
        for kind in (PRECOPY, POSTCOPY, FILE)
        for state in explore(State(kind))
        for side in (state.source, state.destination)
    }
    assert found == set(Owner)


@pytest.mark.parametrize(
    ("move", "owner"),
    [
        (Move.CANCEL, Owner.GIVEN_UP),  # the cancel that comes too late
        (Move.GIVE_UP, Owner.OURS),  # the hand-over of a guest whose migration was cancelled
        (Move.END, Owner.GIVEN_UP),  # a death that takes the guest back too soon
        (Move.CONT, Owner.TAKEN),  # a user who takes back what runs elsewhere
        (Move.ARRIVE, Owner.ABANDONED),  # a destination that runs what it has refused
    ],
    ids=lambda value: value.value,
)
def test_it_would_find_a_wrong_table(monkeypatch, move, owner):
    """Each of these moves, were it in the table, would let two sides run the guest, or the wrong one."""
    assert owner not in MOVES[move]
    to = Owner.GIVEN_UP if move is Move.GIVE_UP else Owner.OURS
    monkeypatch.setattr(handover, "MOVES", {**MOVES, move: {**MOVES[move], owner: to}})
    states = [state for kind in (PRECOPY, POSTCOPY, PIPE) for state in explore(State(kind))]
    assert any(state.running == 2 or state.owned == 2 or runs_unowned(state) for state in states)


def test_never_two_run_it_and_never_two_own_it(ways):
    for state, way in ways.items():
        assert state.running <= 1, (way, state)
        assert state.owned <= 1, (way, state)


def test_only_an_owner_runs_it(ways):
    for state, way in ways.items():
        assert not runs_unowned(state), (way, state)


def test_none_runs_on_memory_that_is_not_there(ways):
    """A destination that runs has all of its pages, or a watch over those that are missing."""
    for state, way in ways.items():
        side = state.destination
        assert not side.runs or side.whole or side.watched, (way, state)


def test_where_a_user_may_take_it_back_nobody_who_was_told_so_runs_it(ways):
    """``cont`` works only while it may be needed: never once the source knows."""
    for state, way in ways.items():
        if state.source.owner in {Owner.TAKEN, Owner.MOVED}:
            assert state.destination.owner in {*HERE, Owner.ARRIVING}, way


def test_none_owns_it_only_for_a_moment_or_recoverably_or_held(ways):
    """Unless a user has ended the process that had it."""
    for state, way in ends(ways).items():
        assert state.owned == 1 or state.held or quit_ordered(state), (way, state)


def test_in_the_end_both_sides_know_or_are_told(ways):
    """Nobody waits for a recovery that cannot come: a destination that has completed hears nothing."""
    for state, way in ends(ways).items():
        if state.destination.step == COMPLETED and not state.source.ended:
            silent = set() if state.answered else {Owner.SAVED}
            assert state.source.owner in {Owner.MOVED, Owner.TAKEN} | silent, (way, state)
    for state, way in ways.items():
        if state.source.done:
            assert state.destination.whole, way


def test_from_everywhere_it_can_end_well(ways):
    """Whatever has broken: without more harm, one side owns it in the end, or its user can."""
    calm_ends = {}
    for state, way in ways.items():
        if quit_ordered(state):
            continue
        calm = replace(state, breaks=0, deaths=0, orders=0)
        if calm not in calm_ends:
            calm_ends[calm] = any(last.owned == 1 or last.held for last in ends(explore(calm)))
        assert calm_ends[calm], (way, state)


def test_a_destination_that_owns_it_is_never_let_down(ways):
    """From owning on there is a way on that ends with the guest running there."""
    for state, way in ways.items():
        if state.destination.ended:
            continue
        if state.destination.owner in {Owner.OURS, Owner.ARRIVING}:
            assert not state.source.runs, way
            assert state.destination.step != FAILED, way
        if state.destination.owner is Owner.ARRIVING:
            assert not state.destination.runs


def test_a_snapshot_leaves_the_guest_where_it_is():
    for state in explore(State(SNAPSHOT)):
        assert state.source.owner is Owner.OURS


@pytest.mark.parametrize(
    "owner", [Owner.GIVEN_UP, Owner.UNKNOWN, Owner.SAVED], ids=lambda o: o.value
)
def test_a_cancel_too_late_for_a_pipe_would_be_found(monkeypatch, owner):
    """Nothing answers, so only the table can refuse it once the last byte may have been read."""
    cancel = {**MOVES[Move.CANCEL], owner: Owner.OURS}
    monkeypatch.setattr(handover, "MOVES", {**MOVES, Move.CANCEL: cancel})
    # An engine may have yet to say that it is over.
    monkeypatch.setattr(handover, "ENDS", handover.ENDS - {COMPLETED, FAILED})
    assert any(state.owned == 2 for state in explore(State(PIPE)))


def test_what_was_saved_runs_on_only_if_its_user_says_so():
    saved = [s for s in explore(State(FILE)) if s.source.owner is Owner.SAVED]
    assert saved
    assert not any(state.source.runs for state in saved)


def test_each_owner_has_a_meaning_and_each_refusal_a_text():
    ownership = Ownership()
    assert set(MEANINGS) == set(Owner)
    assert ownership.owner is Owner.OURS
    assert not ownership.try_move(Move.GIVE_UP)
    assert ownership.owner is Owner.OURS


def test_the_models_steps_are_moves_of_the_real_status():
    assert Status.POSTCOPY_PAUSED in STATUS_MOVES[Status.POSTCOPY_ACTIVE]
    assert Status.FAILED in STATUS_MOVES[Status.POSTCOPY_ACTIVE]
    assert Status.FAILED not in STATUS_MOVES[Status.POSTCOPY_RECOVER]
