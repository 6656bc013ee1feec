"""Transports at which nothing moves: whatever a migration waits for, cancel and quit end the wait."""

import contextlib
import os
import socket
import subprocess

import pytest

from fakes import carry
from fakes.pair import POSTCOPY, TRICKLE, hammer
from postcopy.parameters import NO_OVERRIDES, Capability, Overrides
from postcopy.status import Status

SNAPSHOT = (Capability.BACKGROUND_SNAPSHOT,)
A_SNAPSHOT = Overrides.for_snapshot(mapped=False)
ANSWERED = (Capability.RETURN_PATH,)


def full_listener(stack, family, address):
    """A listener that takes no connection any more, so that the next one waits to connect."""
    door = stack.enter_context(socket.socket(family))
    door.bind(address)
    door.listen(0)
    first = stack.enter_context(socket.socket(family))
    first.connect(door.getsockname())  # as many as may wait
    return door.getsockname()


def unix_that_never_accepts(stack, folder):
    return f"unix:{full_listener(stack, socket.AF_UNIX, str(folder / 'door'))}"


def tcp_that_never_accepts(stack, _folder):
    host, port = full_listener(stack, socket.AF_INET, ("127.0.0.1", 0))
    return f"tcp:{host}:{port}"


def unix_that_never_reads(stack, folder):
    door = stack.enter_context(socket.socket(socket.AF_UNIX))
    door.bind(str(folder / "door"))
    door.listen()
    return f"unix:{folder}/door"


def command_that_never_reads(_stack, _folder):
    return "exec:sleep 1000"


def command_that_is_deaf_to_signals(_stack, _folder):
    return "exec:trap '' TERM; sleep 1000; sleep 1000"


def fifo_without_a_reader(_stack, folder):
    os.mkfifo(folder / "fifo")
    return f"file:{folder}/fifo"


def fifo_that_is_never_read(stack, folder):
    os.mkfifo(folder / "fifo")
    stack.callback(os.close, os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK))
    return f"file:{folder}/fifo"


def pipe_that_is_never_read(stack, _folder):
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return f"fd:{ends[1]}"


STUCK = {
    unix_that_never_accepts: Status.SETUP,
    tcp_that_never_accepts: Status.SETUP,
    fifo_without_a_reader: Status.SETUP,
    unix_that_never_reads: Status.ACTIVE,
    command_that_never_reads: Status.ACTIVE,
    command_that_is_deaf_to_signals: Status.ACTIVE,
    fifo_that_is_never_read: Status.ACTIVE,
    pipe_that_is_never_read: Status.ACTIVE,
}
"""Where the migration stands when nothing moves any more."""


@pytest.fixture(params=STUCK, ids=lambda made: made.__name__)
def stuck(request, tmp_path):
    with contextlib.ExitStack() as stack:
        yield request.param(stack, tmp_path), STUCK[request.param]


@pytest.mark.parametrize("order", [NO_OVERRIDES, A_SNAPSHOT], ids=["migration", "snapshot"])
def test_cancel(journey, stuck, order):
    uri, status = stuck
    trip = journey(hammer())
    trip.source.control.migrate(uri, overrides=order)
    trip.source.wait(status)
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    trip.verify_source()


@pytest.mark.parametrize("order", [NO_OVERRIDES, A_SNAPSHOT], ids=["migration", "snapshot"])
def test_quit(journey, stuck, order):
    """The fixture of all journeys looks that the engine has ended."""
    uri, status = stuck
    trip = journey(hammer())
    trip.source.control.migrate(uri, overrides=order)
    trip.source.wait(status)
    trip.source.control.close()


def test_a_command_that_never_answers_is_cancelled_while_the_guest_stands(journey):
    trip = journey(hammer(), capabilities=ANSWERED)
    trip.source.set(parameters={"x-link-timeout": 0})
    trip.source.control.migrate("exec:cat > /dev/null")
    trip.source.wait(Status.DEVICE)
    trip.source.control.cancel()
    trip.source.wait(Status.CANCELLED)
    trip.verify_source()


def test_a_command_that_never_answers_is_given_up_in_time(journey):
    trip = journey(hammer(), capabilities=ANSWERED)
    trip.source.set(parameters={"x-link-timeout": 500})
    trip.source.control.migrate("exec:cat > /dev/null")
    trip.source.wait(Status.FAILED)
    assert "no sign of life from the destination for 0.5 s" in trip.source.error
    trip.verify_source()


def fifo_without_a_writer(folder):
    os.mkfifo(folder / "fifo")
    return f"file:{folder}/fifo"


@pytest.mark.parametrize(
    "uri", [fifo_without_a_writer, lambda _: "exec:sleep 1000"], ids=["fifo", "command"]
)
def test_a_destination_that_nothing_comes_to_quits(journey, tmp_path, uri):
    trip = journey(hammer())
    trip.destination.listen(uri(tmp_path))
    trip.destination.wait(Status.ACTIVE)
    trip.destination.control.close()


def test_a_guest_comes_through_a_fifo_that_was_opened_first_to_read(journey, tmp_path):
    trip = journey(hammer())
    uri = fifo_without_a_writer(tmp_path)
    trip.destination.listen(uri)
    trip.destination.wait(Status.ACTIVE)
    trip.source.control.migrate(uri)
    trip.finish()


def test_a_recovery_that_cannot_connect_is_paused_again(journey, tmp_path):
    trip = journey(hammer(), capabilities=POSTCOPY, parameters=TRICKLE)
    trip.migrate()
    trip.source.control.start_postcopy()
    for side in (trip.source, trip.destination):
        side.wait(Status.POSTCOPY_ACTIVE)
    trip.source.control.pause()
    for side in (trip.source, trip.destination):
        side.wait(Status.POSTCOPY_PAUSED)
    with contextlib.ExitStack() as stack:
        trip.source.control.migrate(unix_that_never_accepts(stack, tmp_path), resume=True)
        trip.source.wait(Status.POSTCOPY_RECOVER_SETUP)
        trip.source.control.pause()
        trip.source.wait(Status.POSTCOPY_PAUSED)
        assert trip.source.error == "Postcopy migration is paused by the user"
    trip.destination.control.recover(f"unix:{tmp_path}/again")
    trip.source.set(parameters={"max-postcopy-bandwidth": 0})
    trip.source.control.migrate(carry.command(f"unix:{tmp_path}/again"), resume=True)
    trip.finish()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one mebibyte."""
    if os.geteuid():
        pytest.skip("needs root, to mount a tmpfs of its own")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("capabilities", "uri"),
    [
        ((), "file:{}/saved"),
        ((), "exec:cat > {}/saved"),
        ((Capability.MAPPED_RAM,), "file:{}/saved"),
        (SNAPSHOT, "file:{}/saved"),
        (SNAPSHOT, "exec:cat > {}/saved"),
        ((*SNAPSHOT, Capability.MAPPED_RAM), "file:{}/saved"),
    ],
)
def test_a_disk_that_is_full_leaves_the_guest_here(journey, small_disk, capabilities, uri):
    trip = journey(hammer(), capabilities=capabilities)
    uri = uri.format(small_disk)
    trip.source.control.migrate(uri)
    trip.source.wait(Status.FAILED)
    said = (
        "No space left on device" if uri.startswith("file") else "the command ended with status 1"
    )
    assert trip.source.error == f"{uri}: {said}"
    trip.verify_source()
