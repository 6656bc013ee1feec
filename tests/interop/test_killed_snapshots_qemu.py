"""A snapshot with disks that is killed at any step: the next command puts back what it has left."""

import signal
import subprocess
import sys

import pytest

from fakes.commands import DEADLINE_S, postcopy
from fakes.waiting import wait_until
from interop.test_snapshot_disks_qemu import (
    at_work,
    check_all,
    check_goes_on,
    disks_of,
    nodes_of,
    qmp,
)

__all__ = ["at_work", "qmp"]
pytestmark = [pytest.mark.qemu("11.1"), pytest.mark.kvm]

KILLED = """
import asyncio, os, signal, sys
from postcopy import Machine
from postcopy.client import snapshot

async def main(step, address, folder):
    async with Machine.connect(address) as machine:
        execute = machine._connection.execute
        when, command, count = step.split()
        left = int(count)

        async def executes(name, arguments=None):
            nonlocal left
            left -= name == command
            if name == command and not left and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            answer = await execute(name, arguments)
            if name == command and not left and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        machine._connection.execute = executes
        if command == "publish":
            snapshot.SnapshotJob._finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        await machine.snapshot(f"{folder}/image", disks=folder)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""
STEPS = {
    "an empty file": "after blockdev-create 1",
    "an overlay": "after blockdev-add 2",
    "the guest has stopped": "after stop 1",
    "its disks have overlays": "after transaction 1",
    "the order has been given": "after migrate 1",
    "the guest will go on": "before cont 1",
    "the guest goes on": "after cont 1",
    "all is written": "before publish 1",
}


def killed(step, address, folder):
    line = [sys.executable, "-c", KILLED, step, address, str(folder)]
    outcome = subprocess.run(line, timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr


@pytest.fixture
def folder(tmp_path):
    """Of overlays and of the image."""
    made = tmp_path / "overlays"
    made.mkdir()
    return made


def overlays_in(folder):
    return list(folder.glob("*.qcow2"))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_status_puts_it_back(qmp, at_work, folder, step):
    qemu, workload, path = at_work
    before, nodes = disks_of(qemu), nodes_of(qemu)
    killed(step, qmp, folder)
    assert overlays_in(folder)
    told = postcopy("status", "--from", qmp)
    assert told.returncode == 0, told.stderr
    assert "a killed snapshot had left overlays" in told.stdout
    assert "the machine is running" in told.stdout
    assert (disks_of(qemu), nodes_of(qemu)) == (before, nodes)
    assert not overlays_in(folder)
    check_goes_on(qemu, workload)
    check_all(qemu, workload, path)
    assert "killed" not in postcopy("status", "--from", qmp).stdout


@pytest.mark.qemu("7.2", "10.0")
def test_the_next_snapshot_puts_it_back_and_is_taken(qmp, at_work, folder, qemu_version):
    qemu, workload, _ = at_work
    killed(STEPS["the guest will go on"], qmp, folder)
    if qemu_version != "7.2":  # which lets its guest go on by itself
        assert qemu("query-status")["status"] == "paused"
    line = ["snapshot", "--from", qmp, "--disks", str(folder), str(folder / "image")]
    if qemu_version == "7.2":  # it cannot be cancelled, but its guest goes on
        while (taken := postcopy(*line)).returncode:
            assert "still writes the image; try again when it has ended" in taken.stderr
            assert qemu("query-status")["status"] == "running"
            wait_until(lambda: qemu("query-migrate")["status"] == "completed", "it has ended")
    else:
        taken = postcopy(*line)
    assert taken.returncode == 0, taken.stderr
    assert postcopy("verify", str(folder / "image")).returncode == 0
    check_goes_on(qemu, workload)


def test_what_is_below_the_disks_stays_as_it_is(qmp, at_work, folder):
    """An overlay is put into the file that it came over, and not into the deepest."""
    qemu, workload, _ = at_work
    first = folder / "first"
    first.mkdir()
    line = ["snapshot", "--from", qmp, "--disks", str(first), str(first / "image")]
    assert postcopy(*line).returncode == 0
    check_goes_on(qemu, workload)
    killed(STEPS["the guest goes on"], qmp, folder)
    check_goes_on(qemu, workload)
    assert "a killed snapshot had left" in postcopy("status", "--from", qmp).stdout
    assert not overlays_in(folder)
    verified = postcopy("verify", str(first / "image"))
    assert verified.returncode == 0, verified.stdout
    check_goes_on(qemu, workload)


def test_a_snapshot_that_is_whole_keeps_its_overlays(qmp, at_work, folder):
    """It is killed when it has been published, and nothing but its note is left."""
    qemu, workload, _ = at_work
    killed("after nothing 1", qmp, folder)
    assert "killed" not in postcopy("status", "--from", qmp).stdout
    ((_, file),) = disks_of(qemu).values()
    assert str(folder) in file
    assert postcopy("verify", str(folder / "image")).returncode == 0
    check_goes_on(qemu, workload)
