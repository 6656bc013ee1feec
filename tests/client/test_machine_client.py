"""Machines and migrations driven from Python, with real processes."""

import asyncio
import gc

import pytest

from fakes.commands import Running, pair
from postcopy import (
    CannotConnect,
    ChannelBroken,
    Machine,
    Migration,
    MigrationCancelled,
    Phase,
    Refused,
    Status,
    sync,
)
from postcopy.channel.address import parse_socket

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("unix:/run/a", "/run/a"),
        ("unix:/run/a,server=on,wait=off", "/run/a"),
        ("/run/a", "/run/a"),
        ("tcp:here:44", ("here", 44)),
        ("tcp:[::1]:44", ("::1", 44)),
        ("tcp::44", ("127.0.0.1", 44)),
    ],
)
def test_addresses(text, where):
    assert parse_socket(text, "QMP").endpoint == where


@pytest.mark.parametrize("text", ["", "a", "unix:", "tcp:44", "tcp:here:x", "http://here"])
def test_other_addresses_are_refused(text):
    with pytest.raises(Refused, match="is no QMP address"):
        parse_socket(text, "QMP")


def test_a_guest_moves_to_another_machine(tmp_path):
    async def move():
        async with (
            await Machine.connect(source.qmp) as ours,
            await Machine.connect(target.qmp) as theirs,
        ):
            migration = await ours.migrate(to=theirs, postcopy="now")
            looks = [look async for look in migration.events()]
            result = await migration.result()
            assert migration.status is Status.COMPLETED
            assert [look async for look in migration.events()] == looks[-1:]
            return looks, result, await ours.run_state(), await theirs.run_state()

    with pair(tmp_path, "hammer") as (source, target):
        looks, result, ours, theirs = asyncio.run(move())
    assert (ours, theirs) == ("postmigrate", "running")
    assert looks[-1].phase is Phase.COMPLETED
    assert result.postcopy_bytes > 0
    assert len(result.blocktime_ms) == 1
    assert result.total_ms >= result.downtime_ms > 0


def test_cancel_leaves_the_guest_where_it_was(tmp_path):
    async def cancel():
        async with (
            await Machine.connect(source.qmp) as ours,
            await Machine.connect(target.qmp) as theirs,
        ):
            migration = await ours.migrate(to=theirs, bandwidth=256 << 10)
            await migration.cancel()
            with pytest.raises(MigrationCancelled):
                await migration.result()
            return await ours.run_state()

    with pair(tmp_path) as (source, target):
        assert asyncio.run(cancel()) == "running"


def test_a_destination_of_another_size_is_named(tmp_path):
    async def move():
        async with (
            await Machine.start(workload="idle", memory="64M") as ours,
            await Machine.start(incoming="defer", memory="32M") as theirs,
        ):
            with pytest.raises(Refused, match=r"RAM block 'microvm.ram' has 64 MiB .* and 32 MiB"):
                await ours.migrate(to=theirs)
            return await ours.run_state()

    assert asyncio.run(move()) == "running"


def test_postcopy_must_be_planned(tmp_path):
    async def move():
        async with await Machine.connect(source.qmp) as ours:
            with pytest.raises(Refused, match="Enable postcopy"):
                await (await ours.migrate("exec:cat >/dev/null")).start_postcopy()

    with Running(tmp_path, "source", "--workload", "idle") as source:
        asyncio.run(move())


def test_no_destination_is_refused(tmp_path):
    async def move():
        async with await Machine.connect(source.qmp) as ours:
            with pytest.raises(Refused, match="no destination"):
                await ours.migrate()

    with Running(tmp_path, "source", "--workload", "idle") as source:
        asyncio.run(move())


def test_a_start_that_fails_says_why():
    async def start():
        with pytest.raises(Refused, match="not a multiple of 2 MiB"):
            await Machine.start(workload="idle", memory="63M")
        with pytest.raises(CannotConnect, match="Failed to bind"):
            await Machine.start(incoming="unix:/no/such/folder/x", memory="64M")

    asyncio.run(start())


def test_a_machine_that_went_away_is_a_broken_channel(tmp_path):
    async def ask():
        async with await Machine.connect(guest.qmp) as machine:
            guest.process.kill()
            guest.process.wait()
            with pytest.raises(ChannelBroken, match="ended"):
                await machine.run_state()

    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        asyncio.run(ask())
        gc.collect()  # nothing that nobody awaited may be left


def test_the_blocking_twin_has_the_same_names():
    for twin, original in ((sync.Machine, Machine), (sync.Migration, Migration)):
        public = {name for name in vars(original) if not name.startswith("_")}
        assert public <= set(vars(twin))


def test_the_blocking_twin_moves_a_guest(tmp_path):
    with (
        sync.Machine.start(workload="idle", memory="64M") as source,
        sync.Machine.start(incoming="defer", memory="64M") as target,
    ):
        migration = source.migrate(to=target)
        looks = list(migration.events())
        assert migration.result().normal_pages > 0
        assert looks[-1].fraction == 1
        assert (source.run_state(), target.run_state()) == ("postmigrate", "running")
        assert source.read_memory(0x10000, 64) == target.read_memory(0x10000, 64)
