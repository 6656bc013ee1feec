"""A snapshot that breaks at any step: the guest goes on, no write waits for ever, no half of it stays."""

import os
import resource
import signal
import socket

import pytest

from fakes.pair import MIB, engines, hammer
from fakes.sink import Sink
from fakes.snapshots import Portrait
from fakes.waiting import wait_until
from postcopy import trace
from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import partial_name
from postcopy.machine.workload import load
from postcopy.snapshot.cow_buffer import COW_BUFFER_BYTES
from postcopy.status import Status

pytestmark = pytest.mark.kvm

DEADLINE_S = 20.0
OLD = b"the image before"


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def check_survived(portrait, folder, status=Status.FAILED):
    """The guest is well, and the next snapshot succeeds."""
    portrait.side.wait(status)
    assert (portrait.side.error is None) == (status is Status.CANCELLED)
    portrait.check_memory()
    portrait.take(f"file:{folder}/next")
    portrait.check_image(f"file:{folder}/next")


@pytest.fixture
def portrait():
    with Portrait(hammer()) as made:
        yield made


@pytest.fixture
def image(tmp_path):
    """Where an image goes that takes the place of another."""
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "image"
    path.write_bytes(OLD)
    return path


def begin_stalled(portrait, sink):
    """A snapshot that stands still in the midst of writing, its guest running."""
    portrait.begin(sink.stall().uri)
    wait_until(lambda: "RESUME" in portrait.side.story()[1:], DEADLINE_S, "the stop is over")
    wait_until(lambda: portrait.measured().write_faults, DEADLINE_S, "a write")
    assert portrait.side.status is Status.ACTIVE


def begin_crowded(portrait, sink):
    """A snapshot for which no more can be kept aside: the guest waits to write."""
    begin_stalled(portrait, sink)

    def crowded():
        return portrait.measured().aside_most_bytes >= COW_BUFFER_BYTES - MIB

    wait_until(crowded, DEADLINE_S, "no more room aside")


class TestEngineKilled:
    @pytest.mark.parametrize("point", trace.SNAPSHOT)
    def test_at_each_step(self, tmp_path, image, kill_at, point):
        waits = kill_at(point)
        with Portrait(hammer(fill_kib=2048)) as portrait:
            portrait.begin(f"file:{image}")
            portrait.side.wait(Status.FAILED)
            assert not waits(), f"nobody came to {point}"
            assert "engine process died" in portrait.side.error
            assert names_in(image.parent) == ["image"]
            if point == "snapshot.published":
                portrait.check_image(f"file:{image}")
            else:
                assert image.read_bytes() == OLD
            check_survived(portrait, tmp_path)

    def test_while_the_guest_waits_for_the_sink(self, tmp_path):
        workload = load("hammer", 128 * MIB, 2, fill_bytes=96 * MIB, hot_bytes=96 * MIB)
        with Sink(tmp_path) as sink, Portrait(workload) as portrait:
            begin_crowded(portrait, sink)
            os.kill(portrait.side.engine_process_id(), signal.SIGKILL)
            check_survived(portrait, tmp_path)


class TestSinkThatFails:
    def test_hangs_up(self, tmp_path, portrait):
        with Sink(tmp_path) as sink:
            begin_stalled(portrait, sink)
            sink.break_off()
            portrait.side.wait(Status.FAILED)
            assert portrait.side.error == f"{sink.uri}: Broken pipe"
        check_survived(portrait, tmp_path)

    def test_nobody_is_there(self, tmp_path, portrait):
        portrait.begin(f"unix:{tmp_path}/nobody")
        check_survived(portrait, tmp_path)

    def test_full_device(self, tmp_path, portrait):
        portrait.begin("file:/dev/full")
        portrait.side.wait(Status.FAILED)
        assert portrait.side.error == "file:/dev/full: No space left on device"
        check_survived(portrait, tmp_path)

    def test_full_disk(self, tmp_path, portrait, image):
        """As far as a process sees it: so many bytes, and no more."""
        (engine,) = engines()
        resource.prlimit(engine, resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
        portrait.begin(f"file:{image}")
        portrait.side.wait(Status.FAILED)
        assert portrait.side.error == f"file:{image}: File too large"
        assert names_in(image.parent) == ["image"]
        assert image.read_bytes() == OLD
        check_survived(portrait, tmp_path)

    def test_another_is_being_written_there(self, tmp_path, portrait, image):
        half = partial_name(image)
        with path_locked(image):
            half.write_bytes(b"half")
            portrait.begin(f"file:{image}")
            portrait.side.wait(Status.FAILED)
            assert f"another process is writing {image};" in portrait.side.error
            assert half.read_bytes() == b"half"
        check_survived(portrait, tmp_path)

    def test_no_such_folder(self, tmp_path, portrait):
        portrait.begin(f"file:{tmp_path}/nowhere/image")
        portrait.side.wait(Status.FAILED)
        assert "No such file or directory" in portrait.side.error
        check_survived(portrait, tmp_path)

    def test_a_folder_of_that_name(self, tmp_path, portrait):
        portrait.begin(f"file:{tmp_path}")
        portrait.side.wait(Status.FAILED)
        assert portrait.side.error == f"Could not open '{tmp_path}': Is a directory"
        check_survived(portrait, tmp_path)

    def test_command_that_fails(self, tmp_path, portrait):
        portrait.begin("exec:cat > /dev/null; exit 3")
        check_survived(portrait, tmp_path)


class TestCancelled:
    def test_right_after_migrate(self, tmp_path, portrait, image):
        portrait.begin(f"file:{image}")
        portrait.side.control.cancel()
        ends = (Status.CANCELLED, Status.COMPLETED)
        if portrait.side.wait(*ends) is Status.CANCELLED:
            assert image.read_bytes() == OLD
        assert names_in(image.parent) == ["image"]
        portrait.check_memory()

    def test_in_setup(self, tmp_path, portrait):
        """Nobody accepts the connection, so that setup does not end."""
        with socket.socket(socket.AF_UNIX) as door, socket.socket(socket.AF_UNIX) as first:
            door.bind(f"{tmp_path}/door")
            door.listen(0)
            first.connect(f"{tmp_path}/door")  # as many as may wait
            portrait.begin(f"unix:{tmp_path}/door")
            assert portrait.side.status is Status.SETUP
            portrait.side.control.cancel()
            check_survived(portrait, tmp_path, Status.CANCELLED)

    def test_while_it_is_written(self, tmp_path, portrait):
        with Sink(tmp_path) as sink:
            begin_stalled(portrait, sink)
            portrait.side.control.cancel()
            check_survived(portrait, tmp_path, Status.CANCELLED)

    def test_while_the_guest_waits_for_the_sink(self, tmp_path):
        workload = load("hammer", 128 * MIB, 1, fill_bytes=96 * MIB, hot_bytes=96 * MIB)
        with Sink(tmp_path) as sink, Portrait(workload) as portrait:
            begin_crowded(portrait, sink)
            portrait.side.control.cancel()
            check_survived(portrait, tmp_path, Status.CANCELLED)

    def test_when_the_disk_has_all_of_it(self, tmp_path, image, stalled):
        stall = stalled("snapshot.synced")
        with Portrait(hammer(fill_kib=2048)) as portrait:
            portrait.begin(f"file:{image}")
            stall.wait()
            portrait.side.control.cancel()
            portrait.side.wait(Status.CANCELLING)
            stall.go_on()
            check_survived(portrait, tmp_path, Status.CANCELLED)
            assert image.read_bytes() == OLD
            assert names_in(image.parent) == ["image"]

    def test_once_the_file_has_its_name(self, image, stalled):
        """Too late: it completes, and does not say that it was cancelled."""
        stall = stalled("snapshot.published")
        with Portrait(hammer(fill_kib=2048)) as portrait:
            portrait.begin(f"file:{image}")
            stall.wait()
            portrait.side.control.cancel()
            assert portrait.side.control.info().status is Status.ACTIVE
            stall.go_on()
            portrait.side.wait(Status.COMPLETED)
            assert names_in(image.parent) == ["image"]
            portrait.check_image(f"file:{image}")

    def test_while_a_command_has_not_ended(self, tmp_path, portrait):
        """Its status would tell whether it has taken the image, and is not waited for."""
        portrait.begin(f"exec:cat >/dev/null; echo > {tmp_path}/read; sleep 600")
        wait_until((tmp_path / "read").exists, DEADLINE_S, "the command has read all of it")
        portrait.side.control.cancel()
        check_survived(portrait, tmp_path, Status.CANCELLED)

    def test_afterwards(self, tmp_path, portrait):
        portrait.take(f"file:{tmp_path}/image")
        portrait.side.control.cancel()
        assert portrait.side.status is Status.COMPLETED
        portrait.check_image(f"file:{tmp_path}/image")


def test_the_guests_process_leaves(tmp_path):
    """In the midst of it all: what is half-written goes with it."""
    with Portrait(load("hammer", 64 * MIB, 1)) as portrait:
        portrait.begin(f"file:{tmp_path}/image")
        portrait.side.wait(Status.ACTIVE)
    wait_until(lambda: not engines(), DEADLINE_S, "the engines are gone")
    assert set(names_in(tmp_path)) <= {"image"}
