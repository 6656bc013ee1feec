"""Guests whose memory other processes have mapped while they arrive: these read no page but a whole one."""

import random

import pytest

from fakes.awakening import AT_ONCE, FORMS, half_awake, put_to_sleep, wake, woken
from fakes.back_end import BackEnd
from fakes.pair import DEADLINE_S, NEVER_ENDS, POSTCOPY, hammer
from fakes.waiting import wait_until
from faults.recovering import Recovering, broken_journey
from journeys.test_memory_kinds import HUGE_PAGES, KINDS, writer
from machine.machines import wait_for_progress
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.userfaultfd

SLOW = NEVER_ENDS | {"max-postcopy-bandwidth": 0}
PAGE = 4096


class Shared:
    """Back ends of a journey's destination, and the pages that they look at, in a random order."""

    def __init__(self, trip, count=2):
        self.trip = trip
        self.back_ends = []
        for _ in range(count):
            self.add()
        workload = trip.workload
        first = workload.slice_address(0) // PAGE
        self.pages = list(range(first, first + workload.pages))
        random.Random(1).shuffle(self.pages)
        self.at = 0

    def begin(self, count):
        """Have each of them look at so many pages more; they wait for those that are missing."""
        pages = self.pages[self.at : self.at + count]
        self.at += count
        assert pages, "no page is left to look at"
        return [back_end.check(pages) for back_end in self.back_ends]

    def check(self, count):
        assert [each.result() for each in self.begin(count)] == [[]] * len(self.back_ends)

    def check_rest(self):
        """All that the guest has filled: what has been looked at before is no page less."""
        self.at = 0
        self.check(len(self.pages))

    def add(self, **more):
        machine = self.trip.destination.machine
        self.back_ends.append(BackEnd(machine.regions(), self.trip.workload.seed, **more))
        machine.share(self.back_ends[-1])

    def kill(self, number):
        dead = self.back_ends.pop(number)
        dead.close()
        self.trip.destination.machine.unshare(dead)

    def close(self):
        for back_end in self.back_ends:
            back_end.close()


@pytest.fixture
def shared():
    made = []

    def share(trip, **more):
        made.append(Shared(trip, **more))
        return made[-1]

    yield share
    for each in made:
        each.close()


@pytest.fixture
def broken(journey, tmp_path):
    """A postcopy that takes many seconds, through channels that can be cut."""
    with Recovering(broken_journey(journey), tmp_path) as recovering:
        yield recovering


def arrive(broken, others):
    """Let the rest come at once, and look at all of it from every process."""
    broken.hurry()
    broken.source.wait(Status.COMPLETED)
    broken.destination.wait(Status.COMPLETED)
    broken.verify(broken.destination)
    others.check_rest()


def resume(broken, waiting):
    """Recover; the threads that wait for pages meanwhile get them, and these are right."""
    broken.until_settled()
    broken.resume()
    broken.source.until(Status.POSTCOPY_ACTIVE)
    assert [each.result() for each in waiting] == [[], []]


@pytest.mark.parametrize("capabilities", [(), (Capability.POSTCOPY_PREEMPT,)], ids=["one", "two"])
def test_postcopy(journey, shared, capabilities):
    trip = journey(hammer(vcpus=2), capabilities=[*POSTCOPY, *capabilities], parameters=SLOW)
    others = shared(trip)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.destination.wait(Status.POSTCOPY_ACTIVE, Status.COMPLETED)
    others.check(256)
    trip.source.wait(Status.COMPLETED)
    trip.destination.wait(Status.COMPLETED)
    others.check_rest()
    wait_until(lambda: not any(each.watched for each in others.back_ends), what="they are told")
    trip.finish()


def test_one_that_cannot_be_served_is_refused_by_name_and_the_guest_stays_where_it_is(
    journey, shared
):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=SLOW)
    others = shared(trip, count=1)
    others.add(populate=True)
    trip.migrate()
    for side in (trip.destination, trip.source):
        side.wait(Status.FAILED)
    assert trip.destination.error.startswith(f"{others.back_ends[1].name} has mapped ")
    trip.verify_source()


def test_precopy_after_all(journey, shared):
    """Postcopy was possible, and there was no need for it."""
    trip = journey(hammer(), capabilities=POSTCOPY)
    others = shared(trip)
    trip.migrate()
    trip.finish()
    others.check_rest()


@pytest.mark.parametrize("kind", ["hugetlb", "mixed"])
def test_huge_pages(huge_pages, journey, shared, kind):
    huge_pages(2 * HUGE_PAGES[kind])
    trip = journey(writer(), capabilities=POSTCOPY, parameters=SLOW, **KINDS[kind])
    others = shared(trip)
    trip.migrate()
    trip.source.control.start_postcopy()
    trip.destination.wait(Status.POSTCOPY_ACTIVE, Status.COMPLETED)
    others.check(512)
    trip.finish()
    others.check_rest()


def test_a_link_that_breaks(broken, shared):
    others = shared(broken.trip)
    channel = broken.start()
    broken.until_postcopy()
    others.check(64)
    channel.break_all()
    waiting = others.begin(64)
    resume(broken, waiting)
    arrive(broken, others)


def test_engines_that_die(broken, shared):
    """The next one takes over what the last one was to serve, in every process."""
    others = shared(broken.trip)
    broken.start()
    broken.until_postcopy()
    for _ in range(3):
        others.check(32)
        waiting = others.begin(32)
        broken.destination.engine.kill()
        resume(broken, waiting)
    arrive(broken, others)


def test_a_process_that_dies_in_the_midst_and_is_started_anew(broken, shared):
    others = shared(broken.trip)
    broken.start()
    broken.until_postcopy()
    others.check(32)
    others.begin(64)
    others.kill(0)
    others.check(32)
    others.add()
    others.check(32)
    waiting = others.begin(32)
    broken.destination.engine.kill()
    resume(broken, waiting)
    wait_for_progress(broken.destination.machine, broken.trip.workload)
    arrive(broken, others)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_a_restore(journey, tmp_path, shared, form, lazy):
    trip = journey(hammer(vcpus=2))
    others = shared(trip)
    wake(trip.destination, put_to_sleep(trip, tmp_path / "image", form), lazy=lazy)
    trip.destination.wait(Status.POSTCOPY_ACTIVE, Status.COMPLETED)
    others.check(256)
    woken(trip)
    others.check_rest()


@pytest.mark.parametrize("form", FORMS)
def test_a_lazy_restore_whose_engines_die(journey, tmp_path, shared, form):
    trip = journey(hammer(vcpus=2))
    others = shared(trip)
    side = half_awake(trip, tmp_path / "image", form)
    for _ in range(3):
        waiting = others.begin(64)
        engine = side.engine
        engine.kill()
        wait_until(lambda old=engine: side.engine not in {None, old}, DEADLINE_S, "a successor")
        assert [each.result() for each in waiting] == [[], []]
        wait_for_progress(side.machine, trip.workload)
    side.set(parameters=AT_ONCE)
    woken(trip)
    others.check_rest()
