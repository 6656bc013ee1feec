"""Ways to carry a guest other than a connection: descriptors, commands, files."""

import os
import socket

import pytest

from fakes import carry
from fakes.pair import NEVER_ENDS, POSTCOPY, TRICKLE, hammer
from postcopy.parameters import Capability
from postcopy.status import Status

ANSWERED = (Capability.RETURN_PATH,)


def test_a_pair_of_descriptors(journey):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=NEVER_ENDS)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        trip.destination.listen(f"fd:{theirs.fileno()}")
        trip.source.control.migrate(f"fd:{ours.fileno()}")
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()


def test_a_file_saved_and_loaded(journey, tmp_path):
    trip = journey(hammer(), paused=True)
    uri = f"file:{tmp_path}/saved"
    trip.source.control.migrate(uri)
    trip.source.wait(Status.COMPLETED)
    trip.destination.listen(uri)
    trip.finish()
    assert (trip.destination.ram() == trip.source.ram()).all()


def test_a_file_of_a_running_guest_behind_an_offset(journey, tmp_path):
    trip = journey(hammer())
    saved = tmp_path / "saved"
    saved.write_bytes(b"X" * 8192)
    uri = f"file:{saved},offset=0x1000"
    trip.source.control.migrate(uri)
    trip.source.wait(Status.COMPLETED)
    assert saved.read_bytes()[:4100] == b"X" * 4096 + b"QEVM"
    trip.destination.listen(uri)
    trip.finish()


def test_a_file_can_be_loaded_twice(journey, tmp_path):
    trip = journey(hammer(), paused=True)
    uri = f"file:{tmp_path}/saved"
    trip.source.control.migrate(uri)
    trip.source.wait(Status.COMPLETED)
    for _ in range(2):
        trip.destination.listen(uri)
        trip.finish()
        trip.new_destination()


def test_commands(journey, tmp_path):
    trip = journey(hammer())
    trip.source.control.migrate(f"exec:gzip -1 > {tmp_path}/saved")
    trip.source.wait(Status.COMPLETED)
    trip.destination.listen(f"exec:gzip -dc {tmp_path}/saved")
    trip.finish()


def carried(trip, tmp_path, name="door"):
    """Begin over a command that carries both ways."""
    where = trip.destination.listen(f"unix:{tmp_path}/{name}")
    trip.source.control.migrate(carry.command(where))


def test_a_command_answers(journey, tmp_path):
    trip = journey(hammer(), capabilities=ANSWERED)
    carried(trip, tmp_path)
    trip.finish()


def test_postcopy_through_a_command(journey, tmp_path):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=NEVER_ENDS)
    carried(trip, tmp_path)
    trip.source.wait_rounds(1)
    trip.source.control.start_postcopy()
    trip.finish()


def test_a_recovery_through_a_command(journey, tmp_path):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=TRICKLE)
    carried(trip, tmp_path)
    trip.source.control.start_postcopy()
    trip.destination.wait(Status.POSTCOPY_ACTIVE)
    trip.source.wait(Status.POSTCOPY_ACTIVE)
    trip.source.control.pause()
    trip.source.wait(Status.POSTCOPY_PAUSED)
    trip.destination.wait(Status.POSTCOPY_PAUSED)
    trip.destination.control.recover(f"unix:{tmp_path}/again")
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.source.control.migrate(carry.command(f"unix:{tmp_path}/again"), resume=True)
    trip.finish()


@pytest.mark.parametrize("capabilities", [ANSWERED, POSTCOPY], ids=["answered", "postcopy"])
def test_a_command_that_answers_is_cancelled(journey, tmp_path, capabilities):
    trip = journey(hammer(), capabilities=capabilities, parameters=NEVER_ENDS)
    carried(trip, tmp_path)
    trip.destination.wait(Status.ACTIVE)  # the command has got there
    trip.source.wait(Status.ACTIVE)
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    trip.verify_source()
    trip.destination.wait(Status.FAILED)


def test_a_command_that_fails_leaves_the_guest_here(journey):
    trip = journey(hammer())
    trip.source.control.migrate("exec:cat > /dev/null; exit 3")
    trip.source.wait(Status.FAILED)
    assert "exit 3" in trip.source.error
    trip.verify_source()


def test_a_full_disk_leaves_the_guest_here(journey):
    trip = journey(hammer())
    trip.source.control.migrate("file:/dev/full")
    trip.source.wait(Status.FAILED)
    assert trip.source.error == "file:/dev/full: No space left on device"
    trip.verify_source()


def test_postcopy_into_a_file_is_refused(journey, tmp_path):
    trip = journey(hammer(), capabilities=POSTCOPY)
    trip.source.control.migrate(f"file:{tmp_path}/saved")
    trip.source.wait(Status.FAILED)
    assert trip.source.error == (
        f"postcopy needs a channel that answers, which file:{tmp_path}/saved does not"
    )
    trip.verify_source()


def test_a_file_that_ends_too_early_leaves_nothing_behind(journey, tmp_path):
    """What it has brought does not shine through where the next one has zeros."""
    trip = journey(hammer(), paused=True)
    more = journey(hammer(fill_kib=16384), paused=True)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for side, path in ((more.source, cut), (trip.source, whole)):
        side.control.migrate(f"file:{path}")
        side.wait(Status.COMPLETED)
    os.truncate(cut, cut.stat().st_size - (1 << 20))
    trip.destination.listen(f"file:{cut}")
    trip.destination.wait(Status.FAILED)
    assert trip.destination.ram().any(axis=1).sum() > 3000
    trip.destination.listen(f"file:{whole}")
    trip.finish()
    assert (trip.destination.ram() == trip.source.ram()).all()
