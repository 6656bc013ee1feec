"""Ways to carry a guest other than a connection: descriptors, commands, files."""

import os
import socket
from pathlib import Path

import pytest

from fakes import carry
from fakes.pair import DEADLINE_S, NEVER_ENDS, POSTCOPY, TRICKLE, hammer
from fakes.waiting import wait_until
from postcopy.errors import Refused
from postcopy.ownership import Owner
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
    trip = journey(hammer(fill_kib=2048))  # a command on a busy host must keep up with it
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


def check_taken_back(trip):
    """What the command has done with the guest is not known: it is stopped here until its user says."""
    trip.source.wait(Status.FAILED)
    assert trip.source.machine.ownership.owner is Owner.UNKNOWN
    assert not trip.source.machine.running
    assert "'cont' takes it back" in trip.source.error
    trip.source.machine.cont()
    trip.verify_source()


def test_a_command_that_fails_after_all_has_been_sent(journey):
    trip = journey(hammer())
    trip.source.control.migrate("exec:cat > /dev/null; exit 3")
    check_taken_back(trip)
    assert "exit 3" in trip.source.error


def lingering(folder, *, prologue=""):
    """A command that takes the stream and goes on for ever then; where it says its process's number."""
    pid = folder / "pid"
    return (
        f"exec:{prologue} cat > {folder}/saved; echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 1000 & wait",
        pid,
    )


def wait_until_gone(pid_file):
    pid = pid_file.read_text().strip()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, "the command has ended")


@pytest.mark.parametrize("prologue", ["", "trap '' TERM;"], ids=["polite", "stubborn"])
def test_a_command_that_goes_on_behind_the_end_is_cancelled(journey, tmp_path, prologue):
    trip = journey(hammer())
    uri, pid = lingering(tmp_path, prologue=prologue)
    trip.source.control.migrate(uri)
    wait_until(pid.exists, DEADLINE_S, "the command has all")
    assert trip.source.status is Status.DEVICE
    assert not trip.source.machine.running
    trip.source.control.cancel()
    wait_until_gone(pid)
    check_taken_back(trip)


def test_a_snapshots_command_that_goes_on_behind_the_end_is_cancelled(journey, tmp_path):
    trip = journey(hammer(), capabilities=(Capability.BACKGROUND_SNAPSHOT,))
    uri, pid = lingering(tmp_path)
    trip.source.control.migrate(uri)
    wait_until(pid.exists, DEADLINE_S, "the command has all")
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    wait_until_gone(pid)
    trip.verify_source()


@pytest.mark.parametrize("prologue", ["", "trap '' TERM;"], ids=["polite", "stubborn"])
def test_a_command_ends_with_the_process_that_quits(journey, tmp_path, prologue):
    trip = journey(hammer())
    uri, pid = lingering(tmp_path, prologue=prologue)
    trip.source.control.migrate(uri)
    wait_until(pid.exists, DEADLINE_S, "the command has all")
    trip.source.control.close()
    wait_until_gone(pid)


def test_a_command_that_a_guest_comes_from_ends_with_the_process_that_quits(journey, tmp_path):
    trip = journey(hammer())
    uri, pid = lingering(tmp_path)
    trip.destination.listen(uri.replace("cat >", "echo >"))
    wait_until(pid.exists, DEADLINE_S, "the command has begun")
    trip.destination.control.close()
    wait_until_gone(pid)


def test_a_command_that_fails_brings_no_guest(journey):
    trip = journey(hammer())
    trip.destination.listen("exec:exit 7")
    trip.destination.wait(Status.FAILED)
    assert trip.destination.error == "exec:exit 7: the command ended with status 7"
    trip.destination.listen()  # it waits for another


def test_a_command_that_goes_on_behind_the_guest_keeps_nobody(journey, tmp_path):
    trip = journey(hammer())
    trip.source.control.migrate(f"file:{tmp_path}/saved")
    trip.source.wait(Status.COMPLETED)
    trip.destination.listen(f"exec:cat {tmp_path}/saved; exec >&-; exec sleep 1000")
    trip.finish()


def test_a_full_disk_leaves_the_guest_here(journey):
    trip = journey(hammer())
    trip.source.control.migrate("file:/dev/full")
    trip.source.wait(Status.FAILED)
    assert trip.source.error == "file:/dev/full: No space left on device"
    trip.verify_source()


@pytest.mark.parametrize("capability", [Capability.RETURN_PATH, Capability.POSTCOPY_RAM])
def test_what_needs_answers_is_refused_where_none_come(journey, tmp_path, capability):
    names = {Capability.RETURN_PATH: "return-path", Capability.POSTCOPY_RAM: "postcopy"}
    trip = journey(hammer(), capabilities=(capability,))
    with pytest.raises(Refused) as refused:
        trip.source.control.migrate(f"file:{tmp_path}/saved")
    assert str(refused.value).startswith(
        f"{names[capability]} needs a channel that answers, which file:{tmp_path}/saved does not"
    )
    assert trip.source.status is Status.NONE
    assert not (tmp_path / "saved").exists()
    trip.verify_source()


def test_a_descriptor_that_is_none_is_refused(journey):
    trip = journey(hammer())
    text = "^File descriptor named '999999' has not been found$"
    with pytest.raises(Refused, match=text):
        trip.source.control.migrate("fd:999999")
    assert trip.source.status is Status.NONE
    with pytest.raises(Refused, match=text):
        trip.destination.listen("fd:999999")
    trip.migrate()
    trip.finish()


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
