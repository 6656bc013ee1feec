"""``postcopy demo``: migrates a busy guest, and checks its memory."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from postcopy.cli.failures import CommandFailed

if TYPE_CHECKING:
    from postcopy.cli.demo_guest import DemoGuest
    from postcopy.client import Machine, Migration, Result

_ROUNDS = 2
_DOWNTIME_LIMIT_MS = 30  # with 300 ms precopy would converge on a busy host
_SOFTWARE_BANDWIDTH = 16 << 20  # a software CPU writes slowly: precopy would converge
_SOFTWARE = "no KVM here: a software CPU runs a smaller guest (see 'postcopy doctor')"


@click.command(short_help="Migrate a busy guest, and check its memory.")
@click.option("--watch", is_flag=True, help="Show it as a page in a browser, until Ctrl-C.")
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Write the run to a file, for 'postcopy watch' and 'postcopy report'.",
)
def demo(watch: bool, record: Path | None) -> None:
    """Migrate a guest that never stops writing from one process to another.

    Precopy cannot converge, so after two rounds postcopy begins.  At the end every page is checked.
    """
    from postcopy.cli import interrupts

    interrupts.run(_demo(record, with_page=watch))


async def _demo(record: Path | None, *, with_page: bool) -> None:
    import tempfile

    from postcopy.cli.demo_guest import DemoGuest
    from postcopy.machine import workload

    memory, vcpus, bandwidth = _size()
    guest = DemoGuest(workload.load("hammer", memory << 20, vcpus))
    async with contextlib.AsyncExitStack() as stack:
        source, destination = await stack.enter_async_context(_machines(memory, vcpus))
        click.echo("the guest fills its memory ...")
        await guest.wait_until_running(source)
        await guest.calibrate(source)
        watching = None
        if with_page or record is not None:
            from postcopy.cli.watch_command import WatchBeside

            sides = source.address, destination.address
            watching = await stack.enter_async_context(
                WatchBeside(*sides, record, with_page=with_page)
            )
        result = await _move(source, destination, bandwidth)
        stops = await guest.longest_stops_ms(destination)
        await destination.stop()
        _report(result, stops)
        with tempfile.TemporaryDirectory(prefix="postcopy-demo-") as folder:
            await _check(guest, destination, source, Path(folder))
        if watching is not None:
            await watching.until_end()


def _size() -> tuple[int, int, int | None]:
    """MiB of memory, vCPUs, and the bandwidth limit in bytes a second (None: the default)."""
    import os

    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return 512, 2, None
    click.echo(_SOFTWARE)
    return 64, 2, _SOFTWARE_BANDWIDTH


@contextlib.asynccontextmanager
async def _machines(memory: int, vcpus: int) -> AsyncIterator[tuple["Machine", "Machine"]]:
    import asyncio

    from postcopy.client import Machine

    click.echo(
        f"starting two machines of {vcpus} vCPUs and {memory} MiB: 'postcopy run --workload hammer' "
        "and 'postcopy run --incoming defer'"
    )
    size = f"{memory}M"
    async with contextlib.AsyncExitStack() as machines:
        begun = await asyncio.gather(
            Machine.start(workload="hammer", memory=size, smp=vcpus, name="demo-source"),
            Machine.start(incoming="defer", memory=size, smp=vcpus, name="demo-target"),
            return_exceptions=True,
        )
        for machine in begun:
            if isinstance(machine, Machine):
                machines.push_async_callback(machine.close)
        for machine in begun:
            if isinstance(machine, BaseException):
                raise machine
        source, destination = begun
        assert isinstance(source, Machine)
        assert isinstance(destination, Machine)
        yield source, destination


async def _move(source: "Machine", destination: "Machine", bandwidth: int | None) -> "Result":
    import asyncio

    from postcopy.cli import progress_view
    from postcopy.cli.watch import MigrationWatch

    migration = await source.migrate(
        to=destination, postcopy="manual", bandwidth=bandwidth, downtime_limit_ms=_DOWNTIME_LIMIT_MS
    )
    view = progress_view.choose(as_json=False)
    switch = asyncio.create_task(_switch_after_rounds(migration))
    with view:
        result = await MigrationWatch(migration, view).until_end()
    if not await switch:
        click.echo("precopy converged on this host: postcopy was not needed")
    return result


async def _switch_after_rounds(migration: "Migration") -> bool:
    """Switch to postcopy after two rounds; return whether that was necessary."""
    from postcopy.client import Phase

    async for progress in migration.events():
        if progress.phase is Phase.PRECOPY and progress.round > _ROUNDS:
            await migration.start_postcopy()
            return True
    return False


def _report(result: "Result", stops: tuple[float, float]) -> None:
    from postcopy.cli.progress_view import as_table, result_rows

    rows = list(result_rows(result))
    before, since = stops
    longest = f"{since:.1f} ms: the longest stop of any vCPU"
    if since <= before:
        longest = f"less than {before:.1f} ms, its longest stop of all, before the migration"
    rows.insert(1, ("downtime, by the guest", longest))
    click.echo()
    click.echo(as_table(rows))


async def _check(
    guest: "DemoGuest", destination: "Machine", source: "Machine", folder: Path
) -> None:
    found = await guest.check(destination, source, folder)
    if not found.ok:
        raise CommandFailed(f"the memory is NOT what the guest wrote: {found.fault()}")
    click.echo(f"memory verified: {found.pages} pages")
