"""Pictures of guests that go on: each page of them is as it was at one moment."""

import stat

import pytest

from fakes.pair import MIB, hammer, idle, tiny
from fakes.sink import Sink
from fakes.snapshots import Portrait
from fakes.waiting import wait_until
from machine.machines import wait_for_progress
from postcopy.machine.workload import load
from postcopy.parameters import Capability
from postcopy.snapshot.cow_buffer import COW_BUFFER_BYTES
from postcopy.status import Status

pytestmark = pytest.mark.kvm

STORY = ["setup", "active", "STOP", "RESUME", "completed"]
FULL = load("hammer", 64 * MIB, 1, hot_bytes=48 * MIB)


@pytest.mark.parametrize(
    "workload",
    [hammer(), hammer(vcpus=2), FULL, load("hammer", 64 * MIB, 2), load("sweep", 64 * MIB)],
    ids=["sparse", "sparse, 2 vCPUs", "full", "full, 2 vCPUs", "sweep"],
)
def test_the_picture_is_of_one_moment(tmp_path, workload):
    image = tmp_path / "image"
    with Portrait(workload) as portrait:
        portrait.take(f"file:{image}")
        assert portrait.side.story()[-5:] == STORY
        portrait.check_goes_on()
        portrait.check_image(f"file:{image}")
        portrait.check_memory()
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["image"]


def test_a_gibibyte(tmp_path):
    workload = load("hammer", 1024 * MIB, 1, fill_bytes=96 * MIB, hot_bytes=64 * MIB)
    with Portrait(workload) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        assert (tmp_path / "image").stat().st_size < 110 * MIB
        portrait.check_image(f"file:{tmp_path}/image")


def test_huge_pages(huge_pages, tmp_path):
    huge_pages(32)
    with Portrait(load("hammer", 32 * MIB, 1), huge_pages=True) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        portrait.check_image(f"file:{tmp_path}/image")


def test_a_software_cpu(tmp_path):
    with Portrait(tiny("unicorn"), accelerator="unicorn") as portrait:
        portrait.take(f"file:{tmp_path}/image")
        portrait.check_goes_on()
        portrait.check_image(f"file:{tmp_path}/image")


def test_one_after_another_to_the_same_file(tmp_path):
    """The second takes the place of the first, also when that was readable by all."""
    image = tmp_path / "image"
    image.write_text("something else")
    image.chmod(0o644)
    with Portrait(hammer()) as portrait:
        for _ in range(2):
            portrait.take(f"file:{image}")
        portrait.check_image(f"file:{image}")
    assert stat.S_IMODE(image.stat().st_mode) == 0o600


def test_a_stopped_guest_stays_stopped(tmp_path):
    with Portrait(hammer(), paused=True) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        assert portrait.machine.run_state.value == "paused"
        assert "RESUME" not in portrait.side.story()[2:]
        other = portrait.load(f"file:{tmp_path}/image", paused=False)
        assert other.machine.run_state.value == "paused"


def test_through_a_command(tmp_path):
    with Portrait(hammer()) as portrait:
        portrait.take(f"exec:gzip -1 > {tmp_path}/image.gz")
        portrait.check_image(f"exec:gzip -dc {tmp_path}/image.gz")


def test_behind_what_others_have_written(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"header" * 100)
    with Portrait(hammer()) as portrait:
        portrait.take(f"file:{image},offset=4096")
        assert image.read_bytes()[:600] == b"header" * 100
        portrait.check_image(f"file:{image},offset=4096")


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:{}/socket"], ids=["tcp", "unix"])
def test_straight_into_another_machine(tmp_path, uri):
    """A twin from a snapshot: both go on, each for itself."""
    with Portrait(hammer()) as portrait:
        other = portrait.side.__class__(portrait.machine.config, incoming=True)
        portrait.sides.append(other)
        other.set((Capability.BACKGROUND_SNAPSHOT,))
        portrait.take(other.listen(uri.format(tmp_path)))
        other.wait(Status.COMPLETED)
        wait_for_progress(other.machine, portrait.workload)
        portrait.check_memory()


def test_to_a_descriptor(tmp_path):
    with Portrait(idle()) as portrait, (tmp_path / "image").open("wb") as file:
        portrait.take(f"fd:{file.fileno()}")
        portrait.check_image(f"file:{tmp_path}/image")


def test_mapped_ram(tmp_path):
    with Portrait(hammer(), capabilities=(Capability.MAPPED_RAM,)) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        portrait.check_image(f"file:{tmp_path}/image")


def test_the_guest_runs_while_nobody_reads(tmp_path):
    """What it overwrites is put aside, so the sink may take its time."""
    with Sink(tmp_path).stall() as sink, Portrait(hammer(vcpus=2)) as portrait:
        portrait.begin(sink.uri)
        wait_until(lambda: "RESUME" in portrait.side.story()[1:], 20, "the stop is over")
        for _ in range(3):
            wait_for_progress(portrait.machine, portrait.workload)
        assert portrait.side.status is Status.ACTIVE
        assert portrait.measured().write_faults > 0
        sink.flow()
        portrait.side.wait(Status.COMPLETED)
        sink.wait_end()
        portrait.check_image(f"file:{sink.path}")


def test_a_slow_sink_costs_bounded_memory(tmp_path):
    """The guest overwrites more than may be put aside: it waits for the sink, and is never wrong."""
    with (
        Sink(tmp_path).stall() as sink,
        Portrait(load("hammer", 128 * MIB, 2, fill_bytes=96 * MIB, hot_bytes=96 * MIB)) as portrait,
    ):
        portrait.begin(sink.uri)

        def is_full():
            assert portrait.side.status in {Status.SETUP, Status.ACTIVE}
            measured = portrait.measured()
            return (
                measured is not None and (measured.aside_most_bytes or 0) >= COW_BUFFER_BYTES - MIB
            )

        wait_until(is_full, 30, "as much put aside as may be")
        sink.flow()
        portrait.side.wait(Status.COMPLETED)
        assert portrait.measured().aside_most_bytes <= COW_BUFFER_BYTES
        sink.wait_end()
        portrait.check_image(f"file:{sink.path}")
        portrait.check_memory()


def test_twenty_megabytes_a_second(tmp_path):
    with (
        Sink(tmp_path, bytes_per_second=20_000_000) as sink,
        Portrait(load("hammer", 64 * MIB, 1, fill_bytes=40 * MIB)) as portrait,
    ):
        portrait.begin(sink.uri)
        for part in (1, 2, 3):
            wait_until(lambda part=part: sink.received_bytes > part * 10 * MIB, 20, "more comes")
            wait_for_progress(portrait.machine, portrait.workload)
        portrait.side.wait(Status.COMPLETED)
        sink.wait_end()
        portrait.check_image(f"file:{sink.path}")


def test_then_it_moves(tmp_path):
    """A guest that has been photographed can be migrated as ever."""
    with Portrait(hammer()) as portrait:
        portrait.take(f"file:{tmp_path}/image")
        portrait.side.control.set_capabilities({Capability.BACKGROUND_SNAPSHOT: False})
        portrait.side.set((Capability.POSTCOPY_RAM,), {"max-bandwidth": 1 << 40})
        other = portrait.side.__class__(portrait.machine.config, incoming=True)
        portrait.sides.append(other)
        other.set((Capability.POSTCOPY_RAM,))
        portrait.side.control.migrate(other.listen())
        portrait.side.wait(Status.COMPLETED)
        other.wait(Status.COMPLETED)
        assert not portrait.machine.owned
        wait_for_progress(other.machine, portrait.workload)


def test_the_figures(tmp_path):
    with Sink(tmp_path).stall() as sink, Portrait(hammer()) as portrait:
        portrait.begin(sink.uri)
        wait_until(lambda: (told := portrait.measured()) and told.write_faults, 20, "a write")
        sink.flow()
        portrait.side.wait(Status.COMPLETED)
        sink.wait_end()
        info = portrait.side.control.info()
        told = info.to_qapi()
        assert told["status"] == "completed"
        assert told["ram"]["total"] == 64 * MIB
        assert told["ram"]["remaining"] == 0
        assert told["ram"]["normal"] + told["ram"]["duplicate"] == 64 * MIB // 4096
        assert told["ram"]["transferred"] == sink.received_bytes
        ours = told["x-postcopy"]
        assert ours["pause-us"] > 0
        assert ours["write-faults"] > 0
        p50, p99, most = (ours[f"write-stall-{which}-us"] for which in ("p50", "p99", "max"))
        assert 0 < p50 <= p99 <= most
        assert 0 < ours["aside-most-bytes"] <= ours["aside-bytes"] <= 64 * MIB
        assert ours["device-bytes"] > 1000
        assert told["downtime"] == round(ours["pause-us"] / 1000)
