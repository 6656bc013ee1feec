"""Snapshots from Python, of real processes."""

import asyncio
import os
import resource

import pytest

from fakes.pair import MIB, engines
from fakes.waiting import wait_until
from postcopy import (
    ImageError,
    Machine,
    MigrationCancelled,
    MigrationFailed,
    Phase,
    Refused,
    Snapshot,
    sync,
)
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest, beside
from postcopy.image.verify import find_damages

pytestmark = pytest.mark.kvm


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.glob("image*"))


def test_a_snapshot_is_taken_while_the_guest_goes_on(guest, tmp_path):
    async def take():
        async with Machine.connect(guest.qmp) as machine:
            snapshot = await machine.snapshot(tmp_path / "image")
            assert await machine.run_state() == "running"
        return snapshot

    snapshot = asyncio.run(take())
    assert isinstance(snapshot, Snapshot)
    manifest = Manifest.load(snapshot.path)
    assert snapshot.identity == manifest.identity
    assert (manifest.times.pause_us, manifest.machine) == (snapshot.pause_us, "microvm")
    assert snapshot.write_faults is not None
    assert snapshot.total_ms >= snapshot.saving_ms
    assert list(find_damages(snapshot.path, manifest)) == []


def test_it_can_be_watched(guest, tmp_path):
    async def watch():
        async with Machine.connect(guest.qmp) as machine:
            job = await machine.start_snapshot(tmp_path / "image", form="stream")
            looks = [look async for look in job.events()]
            late = [look async for look in job.events()]
            return looks, late, await job.result()

    looks, late, snapshot = asyncio.run(watch())
    assert snapshot.format == "stream"
    phases = [look.phase for look in looks]
    assert phases[-1] is Phase.COMPLETED
    assert set(phases) <= {Phase.SETUP, Phase.SAVING, Phase.DIGESTS, Phase.COMPLETED}
    assert [look.phase for look in late] == [Phase.COMPLETED]
    for name in ("fraction", "elapsed_ms"):
        values = [getattr(look, name) for look in looks]
        assert values == sorted(values)


def test_scripts_do_without_async(guest, tmp_path):
    with sync.Machine.connect(guest.qmp) as machine:
        snapshot = machine.snapshot(tmp_path / "a", compress="zstd")
        job = machine.start_snapshot(tmp_path / "b", parent=tmp_path / "a")
        assert [look.phase for look in job.events()][-1] is Phase.COMPLETED
        assert job.result().parent == "a"
    assert snapshot.format == "chunks"
    with open_image(tmp_path / "b") as image:
        assert image.read("microvm.ram", 0, 16).shape == (16, 4096)


def test_of_two_at_a_time_for_one_name_the_second_is_refused(guest, tmp_path):
    """The first is not disturbed by it, whenever it comes."""
    path = tmp_path / "image"

    async def take():
        async with Machine.connect(guest.qmp) as machine:
            first = await machine.start_snapshot(path)
            refused = []
            async for _ in first.events():
                try:
                    second = await machine.snapshot(path)
                except Refused as error:
                    refused.append(str(error))
                else:
                    raise AssertionError(second)
            return await first.result(), refused

    snapshot, refused = asyncio.run(take())
    assert f"another process is writing {path}; wait until that is done" in refused[0]
    assert list(find_damages(path, Manifest.load(snapshot.path))) == []
    assert left_behind(tmp_path) == ["image", "image.manifest.json"]


def test_a_full_disk_is_told_by_the_name_that_was_asked_for(guest, tmp_path):
    """As far as a process sees it: so many bytes, and no more."""
    path = tmp_path / "image"
    wait_until(lambda: engines(guest.process.pid), 30, "an engine")
    for engine in engines(guest.process.pid):
        resource.prlimit(engine, resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
    with sync.Machine.connect(guest.qmp) as machine:
        with pytest.raises(MigrationFailed) as failed:
            machine.snapshot(path)
        assert machine.run_state() == "running"
    assert str(failed.value) == (
        f"the snapshot failed: file:{path}: File too large; the guest runs on"
    )
    assert left_behind(tmp_path) == []


def test_a_cancel_leaves_nothing_and_the_guest_runs_on(guest, tmp_path):
    async def cancel():
        async with Machine.connect(guest.qmp) as machine:
            job = await machine.start_snapshot(tmp_path / "image")
            looks = job.events()
            async for look in looks:
                if look.phase is not Phase.SETUP:
                    break
            await looks.aclose()
            await job.cancel()
            (outcome,) = await asyncio.gather(job.result(), return_exceptions=True)
            assert await machine.run_state() == "running"
            return outcome

    outcome = asyncio.run(cancel())
    if isinstance(outcome, Snapshot):  # it was quicker
        assert left_behind(tmp_path) == ["image", "image.manifest.json"]
    else:
        assert isinstance(outcome, MigrationCancelled)
        assert "the guest runs on" in str(outcome)
        assert left_behind(tmp_path) == []


def test_an_event_loop_that_ends_takes_the_snapshot_with_it(guest, tmp_path):
    async def leave():
        async with Machine.connect(guest.qmp) as machine:
            await machine.start_snapshot(tmp_path / "image")

    asyncio.run(leave())
    wait_until(lambda: guest.migration_status() != "active", 30, "the machine has come to an end")
    assert guest.ask("query-status")["return"]["status"] == "running"


def test_a_damaged_parent_is_refused_by_name(guest, tmp_path):
    with sync.Machine.connect(guest.qmp) as machine:
        machine.snapshot(tmp_path / "a", compress="zstd")
        os.truncate(beside(tmp_path / "a"), 1000)
        with pytest.raises(ImageError, match=r"a\.manifest\.json: the manifest is damaged"):
            machine.snapshot(tmp_path / "b", parent=tmp_path / "a")
        with pytest.raises(Refused, match="exists; remove it"):
            machine.snapshot(tmp_path / "a")
