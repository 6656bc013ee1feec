"""Every state that the hand-over can get into: one owner, or a user who is told what to do."""

from collections import deque
from dataclasses import replace

import pytest

from model import handover
from model.handover import COMPLETED, FAILED, LOADED, OWNS, PAUSED, State, moves
from postcopy.status import MOVES, Status


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


@pytest.fixture(scope="module", params=["precopy", "postcopy"])
def ways(request):
    return explore(State(postcopy=request.param == "postcopy", breaks=3, deaths=3))


def ends(ways):
    return {state: way for state, way in ways.items() if not any(True for _ in moves(state))}


def test_it_is_worth_exploring(ways):
    postcopy = next(iter(ways)).postcopy
    assert len(ways) > (400 if postcopy else 50)
    steps = {state.source.step for state in ways}
    assert steps >= {FAILED, COMPLETED}
    assert (PAUSED in steps) is postcopy


@pytest.mark.parametrize("wrong", ["_source_dies", "_source_breaks"])
@pytest.mark.parametrize("postcopy", [False, True])
def test_it_would_find_a_source_that_takes_its_guest_back_too_soon(monkeypatch, postcopy, wrong):
    monkeypatch.setattr(handover, wrong, handover._back)
    assert any(state.running == 2 for state in explore(State(postcopy)))


def test_never_two_run_it(ways):
    for state, way in ways.items():
        assert state.running <= 1, (way, state)


def test_where_a_user_may_take_it_back_nobody_who_was_told_so_runs_it(ways):
    """``cont`` works only while it may be needed: never once the source knows."""
    for state, way in ways.items():
        if state.source.knows:
            assert not state.held, way
            assert state.destination.owns, way


def test_none_runs_it_only_for_a_moment_or_recoverably_or_held(ways):
    for state, way in ends(ways).items():
        assert state.running == 1 or state.held, (way, state)
        if state.running == 0:
            # Then the destination has failed, which a user can see.
            assert state.destination.step == FAILED, (way, state)


def test_in_the_end_both_sides_know_or_are_told(ways):
    """Nobody waits for a recovery that cannot come: a destination that has completed hears nothing."""
    for state, way in ends(ways).items():
        if state.destination.step == COMPLETED:
            assert state.source.step == COMPLETED or not state.postcopy, (way, state)
    for state, way in ways.items():
        if state.source.done:
            assert state.destination.whole, way


def test_a_source_that_has_heard_so_needs_nobody(ways):
    for state, way in ways.items():
        if state.source.done:
            assert state.source.step != PAUSED, way


def test_from_everywhere_it_can_end_well(ways):
    """Whatever has broken: without more harm, somebody runs it in the end, or the user can."""
    for state, way in ways.items():
        calm = explore(replace(state, breaks=0, deaths=0))
        assert any(last.running == 1 or last.held for last in calm), (way, state)


def test_a_destination_that_owns_it_is_never_let_down(ways):
    """From owning on there is a way on that ends with the guest running there."""
    for state, way in ways.items():
        if state.destination.owns:
            assert not state.source.runs, way
            assert state.destination.step not in {FAILED, LOADED}, way
        if state.destination.step == OWNS:
            assert not state.destination.runs


def test_the_models_steps_are_moves_of_the_real_status():
    assert Status.POSTCOPY_PAUSED in MOVES[Status.POSTCOPY_ACTIVE]
    assert Status.FAILED in MOVES[Status.POSTCOPY_ACTIVE]
    assert Status.FAILED not in MOVES[Status.POSTCOPY_RECOVER]
