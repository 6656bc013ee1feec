"""Engines die in the midst of a restore; the next goes on at once, unasked, and nothing is lost."""

import random

import numpy as np
import pytest

from fakes.awakening import (
    AT_ONCE,
    FORMS,
    half_awake,
    measured,
    put_to_sleep,
    wake,
    woken,
    write_manifest,
)
from fakes.pair import DEADLINE_S, hammer
from fakes.waiting import wait_until
from faults import trace_hooks
from faults.conftest import subscribe, unsubscribe
from machine.machines import wait_for_progress
from postcopy import trace
from postcopy.errors import PostcopyError
from postcopy.image import page_copies, working_set
from postcopy.image.manifest import Manifest
from postcopy.image.page_copies import PageCopies
from postcopy.link.guest import incoming
from postcopy.status import ENDED, Status


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("point", trace.RESTORE_LAZY)
def test_lazy(journey, tmp_path, kill_at, point, form):
    trip = journey(hammer(vcpus=2))
    path = put_to_sleep(trip, tmp_path / "image", form)
    waits = kill_at(point)
    trip.new_destination()
    wake(trip.destination, path)
    wait_until(lambda: not waits(), DEADLINE_S, f"nobody came to {point}")
    trip.destination.until(*ENDED)
    woken(trip)


@pytest.mark.parametrize("form", FORMS)
def test_into_huge_pages(huge_pages, journey, tmp_path, form):
    """The kernel does not tell which pages a file of huge pages has."""
    huge_pages(32)
    trip = journey(hammer(64, fill_kib=16 << 10))
    trip.new_destination(huge_pages=True)
    side = half_awake(trip, tmp_path / "image", form)
    engine = side.engine
    engine.kill()
    wait_until(lambda: side.engine not in {None, engine}, DEADLINE_S, "a successor")
    side.set(parameters=AT_ONCE)
    woken(trip)


@pytest.mark.parametrize("point", trace.RESTORE_RECORDING)
def test_what_was_touched_is_recorded_whoever_dies(journey, tmp_path, kill_at, point):
    trip = journey(hammer())
    path = put_to_sleep(trip, tmp_path / "image")
    write_manifest(path)
    waits = kill_at(point)
    trip.new_destination()
    wake(trip.destination, path, record=True, prefetch="off")
    wait_until(lambda: not waits(), DEADLINE_S, f"nobody came to {point}")
    woken(trip)
    identity = Manifest.load(path).identity
    blocks = {"microvm.ram": trip.workload.memory_bytes // 4096}
    found = working_set.load(working_set.beside(path), identity, blocks)
    first = trip.workload.slice_address(0) // 4096
    assert found.pages["microvm.ram"][first : first + 16].all()
    copies = PageCopies(page_copies.beside(working_set.beside(path)), identity, blocks)
    copied = np.concatenate([part.pages for part in copies.parts])
    copies.close()
    assert set(range(first, first + 16)) <= set(copied.tolist())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("point", trace.RESTORE_EAGER)
def test_eager(journey, tmp_path, kill_at, point):
    trip = journey(hammer(vcpus=2))
    path = put_to_sleep(trip, tmp_path / "image")
    waits = kill_at(point)
    trip.new_destination()
    wake(trip.destination, path, lazy=False)
    wait_until(lambda: not waits(), DEADLINE_S, f"nobody came to {point}")
    trip.destination.until(*ENDED)
    woken(trip)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(6))
def test_at_random_moments(journey, tmp_path, seed, form):
    moments = random.Random(seed)
    trip = journey(hammer(vcpus=2))
    side = half_awake(trip, tmp_path / "image", form)
    for _ in range(4):
        _wait_for_faults_or_the_last(trip, side, moments.randrange(1, 60))
        before = side.engine_process_id()
        side.engine.kill()
        wait_until(lambda old=before: _engine_is_new(side, old), DEADLINE_S, "a successor")
        wait_for_progress(side.machine, trip.workload)
        assert side.status is Status.POSTCOPY_ACTIVE
    side.set(parameters=AT_ONCE)
    woken(trip)


def test_engines_that_all_die_leave_a_guest_that_waits(journey, tmp_path, monkeypatch):
    """Nothing is lost even then: it is recovered as soon as engines live again."""
    trip = journey(hammer())
    path = tmp_path / "image"
    side = half_awake(trip, path)
    subscribe(monkeypatch, trace_hooks.kill_at("restore.watching"))
    side.engine.kill()
    side.until(Status.POSTCOPY_PAUSED)
    assert "no other could take its place: they die one after the other" in side.error
    unsubscribe(monkeypatch)
    side.control.recover(f"file:{path}")
    wait_for_progress(side.machine, trip.workload)
    side.set(parameters=AT_ONCE)
    woken(trip)


def test_engines_that_die_of_their_first_page_are_not_started_for_ever(
    journey, tmp_path, monkeypatch
):
    """Each gets somewhere, and none far: a guest of many pages would go through thousands."""
    monkeypatch.setattr(incoming, "_MOST_A_MINUTE", 7)
    trip = journey(hammer())
    path = tmp_path / "image"
    side = half_awake(trip, path)
    subscribe(monkeypatch, trace_hooks.kill_at("restore.serving"))
    side.engine.kill()
    side.until(Status.POSTCOPY_PAUSED)
    assert "they die one after the other" in side.error
    unsubscribe(monkeypatch)
    side.control.recover(f"file:{path}")
    wait_for_progress(side.machine, trip.workload)
    side.set(parameters=AT_ONCE)
    woken(trip)


def test_an_image_that_has_gone_is_asked_for(journey, tmp_path):
    trip = journey(hammer())
    path = tmp_path / "image"
    side = half_awake(trip, path)
    path.rename(tmp_path / "elsewhere")
    side.engine.kill()
    side.until(Status.POSTCOPY_PAUSED)
    assert str(path) in side.error
    path.write_bytes((tmp_path / "elsewhere").read_bytes()[:-1] + b"?")
    with pytest.raises(PostcopyError):
        side.control.recover(f"file:{path}")
    assert side.status is Status.POSTCOPY_PAUSED
    side.control.recover(f"file:{tmp_path}/elsewhere")
    wait_for_progress(side.machine, trip.workload)
    assert measured(side).demand_faults > 0
    side.set(parameters=AT_ONCE)
    woken(trip)


def _wait_for_faults_or_the_last(trip, side, more):
    """As :func:`wait_for_faults`, unless the guest has all that it works on: then no more will come."""
    before = measured(side).demand_faults or 0
    first, end = (trip.workload.slice_address(vcpu) // 4096 for vcpu in (0, trip.workload.vcpus))

    def served():
        faults = measured(side).demand_faults or 0
        return faults >= before + more or side.received()[first:end].sum() >= (end - first) // 2

    wait_until(served, DEADLINE_S, f"{more} demand faults")


def test_what_is_set_while_nobody_is_at_work_counts(journey, tmp_path):
    trip = journey(hammer())
    side = half_awake(trip, tmp_path / "image")
    engines = side.control._engines
    adopt = engines.adopt

    def set_and_adopt(*arguments, **more):
        side.set(parameters=AT_ONCE)
        return adopt(*arguments, **more)

    engines.adopt = set_and_adopt
    engines.current.kill()
    woken(trip)


def _engine_is_new(side, old):
    engine = side.engine
    return engine is not None and engine.process_id != old
