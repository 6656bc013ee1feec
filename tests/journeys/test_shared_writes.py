"""Guests whose memory another process writes to, all the time: no write of it is lost on a journey."""

import contextlib
import re

import numpy as np
import pytest

from fakes.back_end import ANSWER_S
from fakes.huge_pages import reserved
from fakes.pair import NEVER_ENDS, POSTCOPY, QUICK, Side
from fakes.snapshots import Portrait
from fakes.vhost_back_end import BackEnd as VhostBackEnd
from fakes.vhost_back_end import StorageDaemon
from fakes.waiting import wait_until
from fakes.writing_back_end import Area, WritingBackEnd
from journeys.test_memory_kinds import HUGE_PAGES, KINDS, MEMORY_BYTES
from machine.drives import check_disk, disk_workload, make_disk, writes_and_reads
from machine.machines import MIB, need, wait_for_progress
from postcopy.errors import GuestError, WrongState
from postcopy.machine.workload import BASE_ADDRESS, PAGE_BYTES, load
from postcopy.parameters import Capability
from postcopy.status import Status

pytestmark = pytest.mark.userfaultfd

SLOW = NEVER_ENDS | {"max-bandwidth": 64 << 20, "max-postcopy-bandwidth": 0}
FIRST, COUNT = 7 * MIB // PAGE_BYTES, 2 * MIB // PAGE_BYTES
"""Where back ends write: pages of both blocks, where there are two."""


def writer():
    """Writes behind the area and up to the end of memory."""
    base = (FIRST + COUNT) * PAGE_BYTES
    fill = MEMORY_BYTES - base
    return load("hammer", MEMORY_BYTES, 1, fill_bytes=fill, hot_bytes=fill, base_address=base)


class Writing:
    """A guest's machine, and the back end that writes to its memory; another when that has been killed."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.area = Area(side.machine.regions(), FIRST, COUNT)
        self.back_end = None
        self.begin()

    def begin(self) -> None:
        self.back_end = back_end = WritingBackEnd(self.area)
        self.side.machine.share(back_end)
        self.side.bus.subscribe(
            lambda event: back_end is self.back_end and back_end.on_event(event)
        )
        back_end.guest_runs(runs=self.side.machine.running)
        self.area.wait_for_writes()

    def kill(self) -> None:
        dead, self.back_end = self.back_end, None
        dead.close()
        self.side.machine.unshare(dead)

    def close(self) -> None:
        if self.back_end is not None:
            self.back_end.close()
        self.area.close()


@pytest.fixture
def writing():
    with contextlib.ExitStack() as stack:

        def begin(side):
            made = Writing(side)
            stack.callback(made.close)
            return made

        yield begin


@contextlib.contextmanager
def memory_of(name, machines=2):
    """The settings of machines with such memory."""
    need("kvm")
    pages = machines * HUGE_PAGES.get(name, 0)
    with reserved(pages) if pages else contextlib.nullcontext():
        yield KINDS[name]


@pytest.fixture
def kind(request):
    with memory_of(request.param) as settings:
        yield settings


def arrive(trip, others):
    """The guest is there: each page of it is as the guest, or the back end, has written it last."""
    trip.source.wait(Status.COMPLETED)
    trip.destination.wait(Status.COMPLETED)
    check(trip.destination, trip, others)
    assert others.area.wrong(trip.source.ram()) == []  # it has written nothing since


def check(side, trip, others):
    machine = side.machine
    assert machine.owned
    wait_for_progress(machine, trip.workload)
    machine.stop()
    trip.check_memory(machine.read_memory)
    memory = side.ram()
    assert others.area.wrong(memory) == []
    assert not memory[BASE_ADDRESS // PAGE_BYTES : FIRST].any(), (
        "what was never written is not zero"
    )
    machine.cont()


@pytest.mark.parametrize(
    ("kind", "tracking"),
    [("memfd", "pagemap"), ("memfd", "kvm"), ("hugetlb", "kvm"), ("mixed", "pagemap")],
    indirect=["kind"],
)
def test_precopy(journey, kind, writing, tracking):
    trip = journey(writer(), parameters=SLOW | {"x-dirty-tracking": tracking}, **kind)
    others = writing(trip.source)
    trip.migrate()
    trip.source.wait_rounds(2)
    trip.source.set(parameters=QUICK)
    arrive(trip, others)
    assert others.back_end.logs > 4


@pytest.mark.parametrize("kind", ["memfd", "mixed"], indirect=True)
def test_postcopy(journey, kind, writing):
    trip = journey(writer(), capabilities=POSTCOPY, parameters=SLOW, **kind)
    others = writing(trip.source)
    trip.migrate()
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    arrive(trip, others)
    assert "postcopy-active" in trip.destination.story()


class TestDeaths:
    """Of an engine, or of the back end, in the midst of a migration."""

    @pytest.mark.parametrize("kind", ["mixed"], indirect=True)
    def test_an_engine(self, journey, kind, writing):
        trip = journey(writer(), parameters=SLOW, **kind)
        others = writing(trip.source)
        trip.migrate()
        trip.source.wait_rounds(1)
        trip.source.engine.kill()
        trip.source.wait(Status.FAILED)
        others.area.wait_for_writes()
        trip.source.set(parameters=QUICK)
        trip.destination.wait(Status.FAILED)
        trip.destination.close()
        trip.new_destination()
        trip.migrate()
        arrive(trip, others)

    @pytest.mark.parametrize("kind", ["memfd", "hugetlb"], indirect=True)
    def test_the_back_end(self, journey, kind, writing):
        trip = journey(writer(), parameters=SLOW, **kind)
        others = writing(trip.source)
        trip.migrate()
        for _ in range(2):
            logs = others.back_end.logs
            wait_until(lambda back_end=others.back_end, n=logs: back_end.logs > n, what="a look")
            others.kill()
            others.begin()
        trip.source.set(parameters=QUICK)
        arrive(trip, others)

    def test_the_back_end_is_gone_for_good(self, journey, writing):
        trip = journey(writer(), parameters=SLOW)
        others = writing(trip.source)
        trip.migrate()
        trip.source.wait_rounds(1)
        others.back_end.guest_runs(runs=False)  # else a page may be half written
        others.kill()
        trip.source.set(parameters=QUICK)
        arrive(trip, others)

    def test_while_one_hangs_neither_a_monitor_nor_the_guest_waits(self, journey, writing):
        trip = journey(writer(), parameters=SLOW)
        others = writing(trip.source)
        trip.migrate()
        trip.source.wait_rounds(1)
        hanging = others.back_end
        hanging.freeze()
        wait_until(lambda: hanging.is_asked, what="it is asked")
        wait_for_progress(trip.source.machine, trip.workload)
        assert trip.source.control.info().status is Status.ACTIVE
        trip.source.control.set_parameters(QUICK)
        trip.source.control.cancel()
        hanging.thaw()  # all that came before it has answered
        trip.source.wait(Status.CANCELLED)
        trip.new_destination()
        trip.migrate()
        arrive(trip, others)

    @pytest.mark.parametrize("capabilities", [(), POSTCOPY], ids=["precopy", "postcopy"])
    def test_one_that_does_not_answer_at_the_last_look(
        self, journey, writing, monkeypatch, capabilities
    ):
        trip = journey(writer(), capabilities=capabilities, parameters=SLOW)
        others = writing(trip.source)
        log_writes = WritingBackEnd.log_writes

        def answer(back_end, log, size_bytes=0):
            if log is not None and not back_end.runs:
                raise GuestError(f"{back_end.name} does not answer")
            log_writes(back_end, log, size_bytes)

        monkeypatch.setattr(WritingBackEnd, "log_writes", answer)
        trip.migrate()
        trip.source.wait_rounds(1)
        trip.source.control.start_postcopy() if capabilities else trip.source.set(parameters=QUICK)
        trip.source.wait(Status.FAILED)
        assert trip.source.error == f"{others.back_end.name} does not answer"
        monkeypatch.undo()
        others.area.wait_for_writes()
        check(trip.source, trip, others)

    def test_one_that_hangs_makes_the_migration_fail_by_name(self, journey, writing):
        trip = journey(writer(), parameters=SLOW)
        others = writing(trip.source)
        hanging = others.back_end
        hanging.answer_s = 0.5
        trip.migrate()
        hanging.freeze()
        trip.source.wait(Status.FAILED)
        assert trip.source.error.startswith(f"{hanging.name} does not answer")
        assert trip.source.machine.running
        wait_for_progress(trip.source.machine, trip.workload)
        hanging.thaw()
        hanging.answer_s = ANSWER_S
        others.area.wait_for_writes()
        trip.source.set(parameters=QUICK)
        trip.new_destination()
        trip.migrate()
        arrive(trip, others)


def test_a_log_that_is_scribbled_over_says_that_all_is_written(journey, writing):
    trip = journey(writer(), parameters=SLOW)
    others = writing(trip.source)
    others.back_end.scribble()
    trip.migrate()
    trip.source.wait_rounds(2)
    trip.source.set(parameters=QUICK)
    arrive(trip, others)


@pytest.mark.parametrize("kind", ["memfd", "mixed"], indirect=True)
def test_a_background_snapshot(kind, writing, tmp_path):
    with Portrait(writer(), **kind) as portrait:
        others = writing(portrait.side)
        portrait.take(f"file:{tmp_path}/image")
        others.area.wait_for_writes()
        portrait.check_image(f"file:{tmp_path}/image")
        portrait.check_memory()


@pytest.mark.parametrize("kind", [VhostBackEnd, StorageDaemon], ids=["ours", "qemu"])
def test_a_background_snapshot_of_a_guest_with_a_disk(tmp_path, kind):
    """A disk writes its ring, and what it reads, to the guest's memory."""
    disk = make_disk(tmp_path / "disk")
    workload = disk_workload(vcpus=2, delay_cycles=0)
    with (
        kind(tmp_path / "one", disk) as one,
        kind(tmp_path / "other", disk) as other,
        Portrait(workload, vhost_user_blk=str(one.path)) as portrait,
    ):
        portrait.take(f"file:{tmp_path}/image")
        read = portrait.machine.read_memory
        before = writes_and_reads(read, workload)
        wait_until(lambda: writes_and_reads(read, workload) > before, what="the disk goes on")
        portrait.machine.stop()
        check_disk(read, workload, disk)
        portrait.more["vhost_user_blk"] = str(other.path)
        image = portrait.load(f"file:{tmp_path}/image")
        assert np.array_equal(image.ram(), portrait.machine.then)


def test_a_background_snapshot_whose_engine_dies_lets_the_process_write_again(writing, tmp_path):
    with Portrait(writer()) as portrait:
        others = writing(portrait.side)
        portrait.begin(f"exec:sleep 60; cat > {tmp_path}/image")
        wait_until(lambda: "RESUME" in portrait.side.story()[1:], what="the point in time")
        written = others.area.written
        wait_for_progress(portrait.machine, portrait.workload)
        assert others.area.written == written
        portrait.side.engine.kill()
        portrait.side.wait(Status.FAILED)
        others.area.wait_for_writes()
        portrait.check_goes_on()


@pytest.mark.parametrize("kind", ["memfd", "mixed"], indirect=True)
def test_reset(kind, writing):
    with Portrait(writer(), **kind) as portrait:
        side = portrait.side
        others = writing(side)
        resetting = side.control.resetting
        resetting.set_point()
        for number in range(3):
            others.area.wait_for_writes()
            if number == 1:
                side.reset_engine.kill()
            if number == 2:
                others.kill()
                others.begin()
            side.machine.stop()
            result = resetting.reset()
            assert np.array_equal(side.ram(), side.machine.then)
            assert not result["whole"]
            side.machine.cont()
        resetting.end()
        others.area.wait_for_writes()
        portrait.check_memory()


def test_one_without_a_log_is_refused_by_name(journey, tmp_path, monkeypatch, writing):
    trip = journey(writer())
    others = writing(trip.source)
    monkeypatch.setattr(WritingBackEnd, "logs_writes", False)
    for order in (trip.migrate, trip.source.control.resetting.set_point):
        with pytest.raises(
            WrongState, match=rf"{re.escape(others.back_end.name)}, which cannot log"
        ):
            order()
    assert trip.source.status is Status.NONE
    trip.source.set([Capability.BACKGROUND_SNAPSHOT])
    trip.source.control.migrate(f"file:{tmp_path}/image")
    trip.source.wait(Status.COMPLETED)


def test_memory_that_had_not_been_shared_is_not_while_it_moves(journey, writing):
    trip = journey(writer(), parameters=SLOW)
    trip.migrate()
    trip.source.wait_rounds(1)
    with pytest.raises(GuestError, match="share it when that has ended"):
        writing(trip.source)
    trip.source.set(parameters=QUICK)
    trip.finish()
