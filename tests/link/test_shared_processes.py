"""The guest's process keeps the userfaultfds of other processes that have its memory mapped."""

import os
import signal

import pytest

from fakes.back_end import BackEnd
from fakes.guest import FakeGuest
from fakes.stopping import stop_process
from fakes.uffd_events import read_events
from fakes.waiting import wait_until
from machine.machines import MIB
from postcopy.abi.userfaultfd import Feature, PagefaultFlag
from postcopy.errors import GuestError
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.link.guest.keeper import GuestKeeper
from postcopy.memory.page_map import PageMap

pytestmark = pytest.mark.userfaultfd

PAGE = 4096


class Scene:
    """A guest's memory, processes that have it mapped, and its keeper."""

    def __init__(self):
        self.guest = FakeGuest(MIB)
        self.back_ends = self.guest.sharing
        self.guest.owned = False
        self.joined = []
        self.keeper = GuestKeeper(self.guest, self.joined.append)

    def add(self, **more):
        self.back_ends.append(BackEnd(self.guest.regions(), **more))
        return self.back_ends[-1]

    def watch(self):
        """What an engine has of it: the userfaultfds, the guest's own first."""
        return [
            Userfaultfd.from_fd(os.dup(space.userfaultfd)) for space in self.keeper.watch_missing()
        ]

    def close(self):
        self.keeper.unwatch_missing()
        for each in self.back_ends:
            each.close()
        self.guest.close()


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.close()


def faults(watch, count=1):
    """Wait for the messages of so many faults."""
    told = []
    wait_until(lambda: told.extend(read_events(watch)) or len(told) >= count, what="a fault")
    return told


def test_each_process_is_watched_for_missing_and_for_minor_faults(scene):
    first, second = scene.add(), scene.add()
    spaces = scene.keeper.watch_missing()
    assert [space.process_id for space in spaces] == [
        os.getpid(), first.process_id, second.process_id,
    ]  # fmt: skip
    (region,) = scene.guest.regions()
    for back_end, space in zip((first, second), spaces[1:], strict=True):
        watch = Userfaultfd.from_fd(os.dup(space.userfaultfd))
        reading = back_end.read([3])
        (fault,) = faults(watch)
        assert fault.address == space.ranges[0].address + 3 * PAGE
        os.pwrite(region.fd, b"\x07" * PAGE, 3 * PAGE)
        watch.wake(fault.address, PAGE)
        if back_end is first:
            assert faults(watch)[0].flags == PagefaultFlag.MINOR
        watch.map_existing(fault.address, PAGE)
        assert reading.result() == [7]
        watch.close()


def test_they_are_watched_once_and_an_engine_after_another_gets_the_same(scene):
    back_end = scene.add()
    scene.keeper.watch_missing()
    again = scene.keeper.watch_missing(only_still=True)
    assert len(again) == 2
    assert back_end.watched == 1


def test_the_death_of_an_engine_leaves_no_process_hanging_or_reading_zeros(scene):
    back_end = scene.add()
    _, watch = scene.watch()
    reading = back_end.read([3])
    faults(watch)
    watch.close()  # with its engine, which had read the fault
    _, watch = scene.watch()
    space = scene.keeper.watch_missing()[1]
    watch.wake(space.ranges[0].address, space.ranges[0].length_bytes)
    (fault,) = faults(watch)
    (region,) = scene.guest.regions()
    os.pwrite(region.fd, b"\x07" * PAGE, 3 * PAGE)
    watch.map_existing(fault.address, PAGE)
    assert reading.result() == [7]
    watch.close()


def test_at_the_end_every_wait_ends_and_the_process_is_told(scene):
    first, second = scene.add(), scene.add()
    watches = scene.watch()
    reading = [each.read([3, 200]) for each in (first, second)]
    for watch in watches[1:]:
        faults(watch)
    (region,) = scene.guest.regions()
    os.pwrite(region.fd, b"\x07" * PAGE, 3 * PAGE)
    scene.keeper.unwatch_missing()
    assert [each.result() for each in reading] == [[7, 0]] * 2
    wait_until(lambda: first.watched == second.watched == 0, what="they are told")
    for watch in watches:
        watch.close()


def test_one_that_hangs_holds_up_nothing(scene):
    """Its pages are let go of without it; what it is told it hears when it goes on."""
    back_end = scene.add()
    _, watch = scene.watch()
    stop_process(back_end.process_id)
    scene.keeper.unwatch_missing()
    assert back_end.watched == 1
    assert not scene.keeper.watches_missing
    os.kill(back_end.process_id, signal.SIGCONT)
    assert len(scene.keeper.watch_missing()) == 2  # the end of one watch comes before the next
    assert back_end.watched == 1
    watch.close()


def test_one_that_has_ended_holds_up_no_other(scene):
    first, second = scene.add(), scene.add()
    _, _, watch = scene.watch()
    reading = second.read([3])
    faults(watch)
    first.kill()
    scene.keeper.unwatch_missing()
    assert reading.result() == [0]
    watch.close()


@pytest.mark.parametrize("feature", [Feature.EVENT_REMOVE, Feature.EVENT_FORK, Feature.SIGBUS])
def test_a_userfaultfd_that_cannot_be_served_is_refused_by_name(scene, feature):
    good, bad = scene.add(), scene.add(features=feature)
    with pytest.raises(
        GuestError, match=rf"process {bad.process_id}\) cannot be .*; open it without"
    ):
        scene.keeper.watch_missing()
    wait_until(lambda: good.watched == bad.watched == 0, what="they are told")
    scene.back_ends.remove(bad)
    bad.close()
    assert len(scene.keeper.watch_missing()) == 2


def test_what_is_no_userfaultfd_is_refused(scene, monkeypatch):
    back_end = scene.add()
    watch = BackEnd.watch_missing

    def wrong(self):
        space = watch(self)
        reader, writer = os.pipe()
        os.close(writer)
        os.dup2(reader, space.userfaultfd)
        os.close(reader)
        return space

    monkeypatch.setattr(BackEnd, "watch_missing", wrong)
    with pytest.raises(GuestError, match="this is no userfaultfd"):
        scene.keeper.watch_missing()
    wait_until(lambda: back_end.watched == 0, what="it is told")


def test_missing_pages_that_are_given_up_fail_there_too(scene):
    back_end = scene.add()
    scene.keeper.page_maps()
    _, watch = scene.watch()
    reading = back_end.read([3, 200])
    faults(watch)
    assert scene.keeper.poison_missing() == {"microvm.ram": 256}
    assert reading.result() == [None, None]
    watch.close()


class TestMappedBefore:
    """mlockall(2): each page is taken, as zero, when memory is mapped, and no fault tells of it."""

    def test_is_refused(self, scene):
        back_end = scene.add(populate=True)
        scene.keeper.page_maps()
        with pytest.raises(GuestError, match=r"has mapped 256 pages .* neither populate nor lock"):
            scene.keeper.watch_missing()
        wait_until(lambda: back_end.watched == 0, what="it is told")

    def test_is_no_harm_of_pages_that_have_come(self, scene):
        scene.add(populate=True)
        (fd,) = scene.keeper.page_maps()
        pages = PageMap(os.dup(fd), 256)
        pages.receive(slice(0, 255))
        with pytest.raises(GuestError, match="has mapped 1 pages"):
            scene.keeper.watch_missing()
        pages.receive(slice(255, 256))
        assert len(scene.keeper.watch_missing()) == 2
        pages.close()


class TestJoining:
    """A back end that has ended is started anew while pages are missing."""

    def test_it_is_watched_and_the_engine_is_told(self, scene):
        first = scene.add()
        scene.keeper.page_maps()
        scene.keeper.watch_missing()
        first.kill()
        scene.back_ends.remove(first)
        second = scene.add()
        scene.guest.joined(second)
        assert [space.process_id for space in scene.joined] == [second.process_id]
        spaces = scene.keeper.watch_missing(only_still=True)
        assert [space.process_id for space in spaces] == [os.getpid(), second.process_id]
        scene.guest.joined(second)  # again
        assert second.watched == len(scene.joined) == 1
        first.close()

    def test_one_that_cannot_be_served_is_refused_and_the_others_are_served_on(self, scene):
        first = scene.add()
        scene.keeper.page_maps()
        _, watch = scene.watch()
        reading = first.read([3])
        faults(watch)
        for more in ({"populate": True}, {"features": Feature.SIGBUS}):
            bad = scene.add(**more)
            with pytest.raises(GuestError, match=rf"process {bad.process_id}\)"):
                scene.guest.joined(bad)
            scene.back_ends.remove(bad)
            bad.close()
        assert scene.joined == []
        assert len(scene.keeper.watch_missing()) == 2
        scene.keeper.unwatch_missing()
        assert reading.result() == [0]
        watch.close()

    def test_nothing_is_watched_while_nothing_is_missing(self, scene):
        back_end = scene.add()
        scene.guest.joined(back_end)
        assert back_end.watched == 0
        assert scene.joined == []
