"""A cancel while the source has given the guest up: it comes too late, and says so."""

import contextlib
import fcntl
import os
import select
import threading

import pytest

from fakes import carry
from fakes.pair import QUICK, idle
from fakes.transports import KINDS
from fakes.waiting import wait_until
from faults.fault_channel import LAST_PONG
from faults.recovering import DEADLINE_S, Recovering, broken_journey, small
from postcopy.errors import WrongState
from postcopy.ownership import Owner
from postcopy.status import Status

SILENT = ("fd: of a pipe", "exec:COMMAND")
"""Ways to a machine that is there, over which it does not answer."""


def cancel_too_late(side):
    with pytest.raises(WrongState, match=r"cannot be cancelled: .* has arrived; wait until"):
        side.control.cancel()
    with pytest.raises(WrongState, match="must not run here"):
        side.machine.cont()


def too_late(broken):
    """Cancel when the guest is given up, and the answer is held back; return what holds it."""
    channel = broken.channel(broken.destination.listen())
    fault = channel.stall(LAST_PONG)
    broken.source.control.migrate(channel.uri)
    fault.wait()
    ownership = broken.source.machine.ownership
    wait_until(lambda: ownership.owner is Owner.GIVEN_UP, DEADLINE_S, "the hand-over")
    cancel_too_late(broken.source)
    return channel


@pytest.fixture
def broken(journey, tmp_path):
    with Recovering(broken_journey(journey, parameters=QUICK, capabilities=()), tmp_path) as made:
        yield made


def test_the_end_of_the_stream_is_lost(broken):
    channel = too_late(broken)
    channel.break_all()  # with what it holds back
    broken.until_settled()
    assert (broken.source.status, broken.destination.status) == (Status.FAILED, Status.FAILED)
    assert "'cont' takes it back" in broken.source.error
    broken.source.machine.cont()
    broken.verify(broken.source)


def test_the_end_of_the_stream_arrives(broken):
    too_late(broken).flow()
    broken.source.wait(Status.COMPLETED)
    assert broken.source.machine.ownership.owner is Owner.MOVED
    broken.verify(broken.destination)


# --- where nothing answers


def given_up_through(journey, folder, kind, stall):
    """A guest goes to a live destination, and its source stands still at a step."""
    trip = journey(small())
    way = KINDS[kind](folder)
    way.listen(trip.destination.listen)
    way.send(trip.source.control.migrate)
    stall.wait()
    return trip


@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize("step", ["source.given-up", "source.end-sent"])
def test_it_is_too_late_where_nothing_answers(journey, tmp_path, stalled, kind, step):
    stall = stalled(step)
    trip = given_up_through(journey, tmp_path, kind, stall)
    if step == "source.end-sent":
        trip.destination.wait(Status.COMPLETED)  # it runs there already
    cancel_too_late(trip.source)
    stall.go_on()
    trip.finish()
    assert trip.source.machine.ownership.owner is Owner.SAVED


@pytest.mark.parametrize("kind", SILENT)
def test_just_before_the_end_it_is_in_time(journey, tmp_path, stalled, kind):
    stall = stalled("source.all-taken")
    trip = given_up_through(journey, tmp_path, kind, stall)
    trip.source.control.cancel()
    stall.go_on()
    trip.source.wait(Status.CANCELLED)
    trip.destination.wait(Status.FAILED)
    assert not trip.destination.machine.owned
    trip.verify_source()


def uncertain(trip):
    """The source has failed, cannot know, and leaves the guest stopped."""
    trip.source.wait(Status.FAILED)
    assert trip.source.machine.ownership.owner is Owner.UNKNOWN
    assert not trip.source.machine.running
    assert "'cont' takes it back" in trip.source.error


def test_a_command_that_has_carried_it_and_fails(journey, tmp_path):
    """Its status says nothing of what it has delivered."""
    trip = journey(small())
    where = trip.destination.listen(f"unix:{tmp_path}/there")
    trip.source.control.migrate(f"{carry.command(where).replace('exec ', '')}; exit 3")
    uncertain(trip)
    assert "the command ended with status 3" in trip.source.error
    trip.destination.wait(Status.COMPLETED)
    trip.verify(trip.destination)
    trip.source.control.arrived()  # a user has seen it there
    assert trip.source.machine.ownership.owner is Owner.MOVED


def test_an_engine_that_dies_with_the_end_sent(journey, tmp_path, stalled):
    trip = given_up_through(journey, tmp_path, "fd: of a pipe", stalled("source.end-sent"))
    trip.source.engine.kill()
    uncertain(trip)
    trip.destination.wait(Status.COMPLETED)
    trip.verify(trip.destination)


class Reader:
    """Reads a pipe until it is told to stop, and leaves the rest in it."""

    def __init__(self):
        self._reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        self._told, self._tell = os.pipe()
        self._thread = threading.Thread(target=self._read, name="reader")
        self._thread.start()

    def _read(self):
        poll = select.poll()
        for fd in (self._reading, self._told):
            poll.register(fd, select.POLLIN)
        while all(fd != self._told for fd, _ in poll.poll()):
            os.read(self._reading, 1 << 16)

    def stop(self):
        os.write(self._tell, b".")
        self._thread.join()

    def close(self):
        self.stop()
        for fd in (self._reading, self.writing, self._told, self._tell):
            os.close(fd)


def test_a_reader_that_stops_behind_the_end(journey, stalled):
    """Not for ever: nothing that is still to be written matters to the guest."""
    stall = stalled("source.end-sent")
    trip = journey(idle(fill_kib=256))  # the pipe is slow
    trip.source.set(parameters={"x-link-timeout": 500})
    with contextlib.closing(Reader()) as reader:
        trip.source.control.migrate(f"fd:{reader.writing}")
        stall.wait()
        reader.stop()
        stall.go_on()
        uncertain(trip)
    assert "no sign of life from the destination for 0.5 s" in trip.source.error
    trip.source.machine.cont()
    trip.verify_source()
