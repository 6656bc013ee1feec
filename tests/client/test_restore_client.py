"""``restore(path)`` in both flavours, and the command behind it."""

import asyncio
import re
import subprocess
import sys

import pytest

from fakes.commands import need_kvm
from postcopy import Machine, MigrationFailed, Refused, restore, sync
from postcopy.image.formats import open_image

TIMES = re.compile(
    r"postcopy: running after (\S+) s, ready after (\S+) s, complete after (\S+) s; (\d+) demand"
)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    need_kvm()
    path = tmp_path_factory.mktemp("images") / "image"
    with sync.Machine.start(workload="hammer", memory="64M", smp=2) as guest:
        guest.snapshot(path)
    return path


@pytest.mark.parametrize("lazy", [True, False])
def test_it_wakes(image, lazy):
    async def go():
        async with restore(image, lazy=lazy) as guest:
            times = await guest.restored()
            assert 0 < times.running_ms <= times.ready_ms <= times.complete_ms
            assert await guest.run_state() == "running"
            assert len(await guest.execute("query-cpus-fast")) == 2
            return times

    times = asyncio.run(go())
    assert times.source["ram"]["remaining"] == 0
    assert lazy or times.demand_faults == 0


def test_without_async(image):
    with sync.restore(image, lazy=True, paused=True) as guest:
        times = guest.restored()
        assert guest.run_state() == "paused"
        assert times.working_set_pages is None


def test_a_working_set_over_two_restores(image):
    with sync.restore(image, lazy=True, record_working_set=True) as guest:
        guest.restored()
    with sync.restore(image, lazy=True) as guest:
        assert guest.restored().working_set_pages > 0


def test_a_woken_guest_moves_on(image):
    async def go():
        async with (
            restore(image, lazy=True) as guest,
            Machine.start(incoming="defer", memory="64M", smp=2) as destination,
        ):
            await guest.restored()
            await (await guest.migrate(to=destination, postcopy="now")).result()
            assert await destination.run_state() == "running"

    asyncio.run(go())


def test_a_flipped_bit_is_told_by_name(image, tmp_path):
    copy = tmp_path / "copy"
    copy.write_bytes(image.read_bytes())
    (tmp_path / "copy.manifest.json").write_bytes(
        (image.parent / "image.manifest.json").read_bytes()
    )
    with open_image(copy) as opened:
        block = opened.blocks[0].name
        page = int(opened.has_data(block).nonzero()[0][-1])
        offset = opened.place(block).pages_offset + page * 4096
    with copy.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([file.read(1)[0] ^ 1]))  # the byte behind
    with sync.restore(copy, lazy=True, paused=True) as guest:
        with pytest.raises(MigrationFailed, match=f"{copy}: .*block {block}.*are lost"):
            guest.restored()
        assert guest.run_state() == "paused"


@pytest.mark.parametrize("what", ["none", "short", "other"])
def test_what_is_no_image_is_refused(image, tmp_path, what):
    path = tmp_path / "it"
    if what == "short":
        path.write_bytes(image.read_bytes()[:5000])
    elif what == "other":
        path.write_bytes(b"#!/bin/sh\n" * 100)
    with pytest.raises(Refused, match=str(path)):
        sync.restore(path, lazy=True)


def test_recording_without_lazy_is_refused(image):
    with pytest.raises(Refused, match="give --lazy too"):
        sync.restore(image, record_working_set=True)


def test_the_command_reports_all_three_times(image):
    process = subprocess.Popen(
        [sys.executable, "-m", "postcopy", "restore", "--lazy", "--monitor", "stdio", str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        line = process.stderr.readline()
        found = TIMES.match(line)
        assert found, line
        running, ready, complete = (float(found[number]) for number in (1, 2, 3))
        assert 0 < running <= ready <= complete
        process.communicate("quit\n", timeout=30)
    assert process.returncode == 0
