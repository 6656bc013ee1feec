"""A postcopy that broke goes on: told to from Python, or unasked."""

import asyncio
import contextlib

import pytest

from fakes.commands import pair
from fakes.waiting import wait_until
from postcopy import Machine, NeedsRecovery, Phase, Refused, Status
from postcopy.errors import WrongState

pytestmark = pytest.mark.kvm


@contextlib.asynccontextmanager
async def begun(folder, **options):
    """A postcopy under way that takes long, and both its machines."""
    with pair(folder, "hammer") as (source, target):
        async with (
            await Machine.connect(source.qmp) as ours,
            await Machine.connect(target.qmp) as theirs,
        ):
            await ours.set_parameters({"max-postcopy-bandwidth": 256 << 10})
            migration = await ours.migrate(to=theirs, postcopy="now", bandwidth=1 << 30, **options)
            async for look in migration.events():
                if look.phase is Phase.POSTCOPY:
                    break
            await asyncio.to_thread(
                wait_until, lambda: target.migration_status() == "postcopy-active", 20, "postcopy"
            )
            yield ours, theirs, migration


async def hurry(machine):
    await machine.set_parameters({"max-postcopy-bandwidth": 0})


def test_a_broken_postcopy_is_recovered_by_its_migration(tmp_path):
    async def go():
        async with begun(tmp_path) as (ours, theirs, migration):
            with pytest.raises(WrongState, match="nothing to recover"):
                await migration.recover()
            await ours.execute("migrate-pause")
            with pytest.raises(NeedsRecovery) as broken:
                await migration.result()
            assert f"'postcopy recover --from {ours.address} --to {theirs.address}'" in str(
                broken.value
            )
            await hurry(ours)
            with pytest.raises(Refused, match="give tcp:HOST:PORT or unix:PATH"):
                await migration.recover("exec:cat")
            await migration.recover(f"unix:{tmp_path}/again")
            phases = {look.phase async for look in migration.events()}
            assert (await migration.result()).postcopy_bytes > 0
            assert phases <= {Phase.PAUSED, Phase.RECOVERY, Phase.POSTCOPY, Phase.COMPLETED}
            assert await theirs.run_state() == "running"

    asyncio.run(go())


def test_a_side_that_has_not_noticed_is_told_and_a_free_port_is_found(tmp_path):
    """The second machine object knows nothing of the migration that another one began."""

    async def go():
        async with begun(tmp_path) as (ours, theirs, migration):
            await theirs.execute("migrate-pause")
            with pytest.raises(NeedsRecovery):
                await migration.result()
            await hurry(ours)
            again = await ours.recover(to=theirs)
            await again.result()
            assert again.status is Status.COMPLETED
            with pytest.raises(Refused, match="the source is completed: the guest has moved away"):
                await ours.recover(to=theirs)

    asyncio.run(go())


def test_it_recovers_unasked_as_often_as_it_breaks(tmp_path):
    async def go():
        async with begun(tmp_path, auto_recover=20) as (ours, _, migration):
            breaks = 0
            async for look in migration.events():
                if look.phase is Phase.POSTCOPY and breaks < 2:
                    await ours.execute("migrate-pause")
                    breaks += 1
                elif look.phase is Phase.POSTCOPY:
                    await hurry(ours)
            await migration.result()
            assert breaks == 2

    asyncio.run(go())


def test_unasked_recovery_gives_up_in_the_end(tmp_path):
    async def go():
        async with begun(tmp_path, auto_recover=0.2) as (ours, theirs, migration):
            with_socket = tmp_path / "no" / "such"
            migration._uri = f"unix:{with_socket}"
            await ours.execute("migrate-pause")
            with pytest.raises(NeedsRecovery, match=r"nothing is lost.*last tried.*No such file"):
                await migration.result()
            assert (await theirs.migration_info())["status"] == "postcopy-paused"

    asyncio.run(go())
