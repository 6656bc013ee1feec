"""What one command needs is gone when it has ended, however it ends, and changes no other's."""

import asyncio
import signal
import subprocess
import threading

import pytest

from fakes.commands import POSTCOPY, Running, pair, postcopy
from fakes.waiting import wait_until
from postcopy import Machine, MigrationCancelled, Refused
from postcopy.client.snapshot import SnapshotJob
from postcopy.image.file import ImageFile

pytestmark = pytest.mark.kvm


async def on(machine):
    listed = await machine.execute("query-migrate-capabilities")
    return {each["capability"] for each in listed if each["state"]}


def test_nothing_stays_of_a_migration_that_was_cancelled(tmp_path):
    """And the next one, without postcopy, at the bandwidth that is set, succeeds."""

    async def move():
        async with (
            Machine.connect(source.qmp) as ours,
            Machine.connect(target.qmp) as first,
            Machine.connect(other.qmp) as second,
        ):
            before = await ours.execute("query-migrate-parameters")
            migration = await ours.migrate(
                to=first, postcopy=60.0, bandwidth=256 << 10, downtime_limit_ms=7
            )
            await migration.cancel()
            with pytest.raises(MigrationCancelled):
                await migration.result()
            assert await ours.execute("query-migrate-parameters") == before
            assert await on(ours) == await on(first) == set()
            await (await ours.migrate(to=second)).result()
            assert await second.run_state() == "running"

    with (
        pair(tmp_path) as (source, target),
        Running(tmp_path, "other", "--incoming", "defer") as other,
    ):
        asyncio.run(move())


@pytest.mark.parametrize("left", ["background-snapshot", "mapped-ram", "pause-before-switchover"])
def test_what_was_left_on_does_not_count(tmp_path, left):
    with pair(tmp_path) as (source, target):
        state = {"capability": left, "state": True}
        source.ask("migrate-set-capabilities", capabilities=[state])
        outcome = postcopy(
            "migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way"
        )
        assert outcome.returncode == 0, outcome.stderr
        assert f"{left} is on at {source.qmp}, and does not apply to this order" in outcome.stdout
        assert source.ask("query-status")["return"]["running"] is False
        assert target.ask("query-status")["return"]["running"] is True


def test_a_destination_that_listens_already_keeps_nothing_either(tmp_path):
    async def move():
        async with Machine.connect(source.qmp) as ours, Machine.connect(target.qmp) as theirs:
            await theirs.incoming(f"unix:{tmp_path}/way")
            migration = await ours.migrate(f"unix:{tmp_path}/way", to=theirs, postcopy="now")
            assert (await migration.result()).postcopy_bytes > 0
            assert await on(ours) == await on(theirs) == set()

    with pair(tmp_path, "hammer") as (source, target):
        asyncio.run(move())


def test_options_of_the_users_own(tmp_path):
    async def move():
        async with Machine.connect(source.qmp) as ours, Machine.connect(target.qmp) as theirs:
            migration = await ours.migrate(
                to=theirs, postcopy="now", capabilities={"postcopy-preempt": True}
            )
            await migration.result()
            assert await on(ours) == set()

    with pair(tmp_path, "hammer") as (source, target):
        asyncio.run(move())


def test_a_snapshot_that_is_killed_leaves_a_machine_that_migrates(tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        killed = subprocess.Popen(
            [*POSTCOPY, "snapshot", "--from", source.qmp, f"{tmp_path}/image"]
        )
        wait_until(lambda: source.migration_status() is not None, 20, "it has been ordered")
        killed.kill()
        killed.wait()
        wait_until(lambda: source.migration_status() == "completed", 20, "the machine is done")
        outcome = postcopy(
            "migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way",
            "--bandwidth", "4G",
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
        assert source.ask("query-status")["return"]["running"] is False
        assert target.ask("query-status")["return"]["running"] is True


def test_a_snapshot_that_is_given_up_publishes_nothing_later(tmp_path):
    async def give_up():
        async with Machine.connect(guest.qmp) as machine:
            loop, there = asyncio.get_running_loop(), {}
            for delay_s in (0.0, 0.02, 0.05, 0.1, 0.2):
                path = tmp_path / f"image-{delay_s}"
                taking = asyncio.create_task(machine.snapshot(path))
                loop.call_later(delay_s, taking.cancel)
                await asyncio.wait({taking})
                there[path] = path.exists()
                others = asyncio.all_tasks() - {asyncio.current_task()}
                assert not [task for task in others if task.get_name() == "snapshot"]
                assert (await machine.migration_info()).get("status") not in {"setup", "active"}
            assert await machine.run_state() == "running"
            assert {path: path.exists() for path in there} == there
            assert not all(there.values())

    with Running(tmp_path, "guest", "--workload", "hammer") as guest:
        asyncio.run(give_up())


@pytest.mark.parametrize("give_up", [SnapshotJob.cancel, SnapshotJob.give_up])
@pytest.mark.parametrize("options", [{}, {"compress": "zstd"}], ids=["plain", "compressed"])
def test_a_snapshot_that_is_given_up_is_not_read_to_its_end(
    tmp_path, monkeypatch, give_up, options
):
    """The machine has written all of it, and its digests, or chunks, are being made."""
    gate, begun, reads = threading.Event(), threading.Event(), []

    def gated(read):
        def wait_at_the_gate(file, start, what):
            if threading.current_thread().name.startswith(("digests", "chunks")):
                reads.append(start)
                begun.set()
                gate.wait(30)
            return read(file, start, what)

        return wait_at_the_gate

    async def begin_and_give_up():
        async with Machine.connect(guest.qmp) as machine:
            job = await machine.start_snapshot(folder / "image", **options)
            assert await asyncio.to_thread(begun.wait, 30)
            giving = asyncio.create_task(give_up(job))
            await asyncio.wait({giving}, timeout=0)  # it has been told
            gate.set()
            await giving
            with pytest.raises((MigrationCancelled, asyncio.CancelledError)):
                await job.result()
            assert await machine.run_state() == "running"

    folder = tmp_path / "images"
    folder.mkdir()
    with Running(tmp_path, "guest", "--workload", "hammer") as guest:
        for name in ("read", "read_into"):
            monkeypatch.setattr(ImageFile, name, gated(getattr(ImageFile, name)))
        asyncio.run(begin_and_give_up())
    assert len(reads) <= 4  # one under way on each thread
    assert not [each for each in folder.iterdir() if each.is_file()]


def test_a_cancel_that_comes_too_late_is_refused(tmp_path):
    async def cancel():
        async with Machine.connect(guest.qmp) as machine:
            job = await machine.start_snapshot(tmp_path / "image")
            await job.result()
            with pytest.raises(Refused, match=f"is complete; remove {tmp_path}/image if"):
                await job.cancel()
            assert (tmp_path / "image").exists()

    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        asyncio.run(cancel())


def test_two_snapshots_at_the_same_time(tmp_path):
    """Either one is refused, or both are images; the guest runs on in any case."""

    async def take():
        async with Machine.connect(guest.qmp) as one, Machine.connect(guest.qmp) as other:
            for round_ in range(3):
                await asyncio.gather(
                    one.snapshot(tmp_path / f"a{round_}"),
                    other.snapshot(tmp_path / f"b{round_}"),
                    return_exceptions=True,
                )
                assert await one.run_state() == "running"
                assert await on(one) == set()

    with Running(tmp_path, "guest", "--workload", "hammer") as guest:
        asyncio.run(take())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
def test_a_snapshot_that_is_told_to_end_gives_up_first(tmp_path, number):
    folder = tmp_path / "images"
    folder.mkdir()
    with Running(tmp_path, "guest", "--workload", "hammer") as guest:
        line = [*POSTCOPY, "snapshot", "--from", guest.qmp, str(folder / "image")]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
            wait_until(lambda: guest.migration_status() is not None, 20, "it has been ordered")
            command.send_signal(number)
            command.communicate(timeout=30)
        left = sorted(path.name for path in folder.iterdir())
        assert command.returncode in {0, 1}  # it may have been quicker
        assert left == ([] if command.returncode else ["image", "image.manifest.json"])
        assert guest.migration_status() in {"cancelled", "completed"}
        assert guest.ask("query-status")["return"]["running"] is True
