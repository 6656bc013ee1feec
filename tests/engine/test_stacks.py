"""What each thread does, said by a process that is asked for it, and in the text of a failure."""

import pytest

from cli.test_run import children
from fakes.commands import Running, need_kvm
from fakes.pair import TRICKLE, engines
from fakes.stacks import ask, catches
from fakes.waiting import wait_until
from faults import recovering
from faults.recovering import Recovering, broken_journey
from journeys.conftest import journey, nothing_left_behind

__all__ = ["journey", "nothing_left_behind"]


@pytest.mark.parametrize("option", ["--incoming=defer", "--workload=idle"])
def test_a_guests_process_and_its_engine_tell_when_asked_and_go_on(tmp_path, option):
    """The engine is a branch of the guest's process in one case, and a new interpreter in the other."""
    need_kvm()
    with Running(tmp_path, "guest", option) as running:
        guest = running.process.pid
        wait_until(lambda: [each for each in children(guest) if catches(int(each.name))], 20)
        (engine,) = (int(each.name) for each in children(guest))
        assert "guest_process.py" in ask(guest)
        assert "engine/engine.py" in ask(engine)
        assert running.ask("query-status")["return"]["status"]
        assert [int(each.name) for each in children(guest)] == [engine]


def test_a_wait_in_vain_shows_both_sides(journey, tmp_path, monkeypatch):
    trip = broken_journey(journey, parameters=TRICKLE)
    with Recovering(trip, tmp_path) as moving:
        moving.start()
        moving.until_postcopy()
        at_work = [side.engine_process_id() for side in (moving.source, moving.destination)]
        monkeypatch.setattr(recovering, "DEADLINE_S", 0.0)
        with pytest.raises(AssertionError) as failed:
            moving.until_settled()
        text = str(failed.value)
        assert "both settled: source postcopy-active" in text
        assert "source/source.py" in text
        assert "destination/destination.py" in text
        assert "in the kernel: " in text
        assert set(at_work) <= set(engines())
