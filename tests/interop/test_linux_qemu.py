"""Linux guests that are saved while they work, and wake in stock QEMUs; they check their memory and disk.

In TCG: where KVM runs in a virtual machine, as here, Linux does not boot in it within a minute.  A guest of
another moment than its disk finds blocks there that it has not written, or misses some that it has.
"""

import contextlib
import os
import random
import shutil
import time

import pytest

from fakes.commands import postcopy
from fakes.qemu_versions import ALL, NEWEST, USUAL
from fakes.real_qemu import QemuGone, QemuProcess, QmpRefused
from fakes.waiting import wait_until
from faults.fault_channel import FaultChannel
from interop.linux_guest import TIMEOUT_S, Console, check_disk
from interop.saved_linux import Clones, check_overlay
from interop.test_serve_qemu import kill_at

KILLS = int(os.environ.get("POSTCOPY_FAULTS", "4"))
SEED = int(os.environ.get("POSTCOPY_SEED", "1"))


@pytest.mark.qemu(*ALL)
def test_memory_and_disk_agree_where_a_linux_wakes(linux, tmp_path):
    """And its clocks go on from where they were, but for the PC's own."""
    options = ["--lazy", "--overlay-dir", str(tmp_path)]
    with Clones(linux, tmp_path, linux.image, (linux.disk, "raw"), *options) as clone:
        said = clone.consoles[0].wait_memory(linux.left.writes)
        passed_ms = (time.monotonic() - linux.left_at_s) * 1000
        lay_ms = (clone.began_at_s - linux.saved_at_s) * 1000
        assert (
            linux.left.monotonic_ms
            < said.monotonic_ms
            < linux.left.monotonic_ms + passed_ms - lay_ms + 100
        )
        assert said.pc_ms - said.realtime_ms > lay_ms - 1000
        (counts,) = clone.stop()
    (overlay,) = tmp_path.glob("image.*.qcow2")
    check_overlay(overlay, counts, tmp_path)
    assert postcopy("verify", str(linux.image)).returncode == 0


@pytest.mark.qemu
def test_three_clones_of_a_linux(linux, tmp_path):
    options = ["--lazy", "--overlay-dir", str(tmp_path)]
    with Clones(linux, tmp_path, linux.image, (linux.disk, "raw"), *options, count=3) as clones:
        counts = clones.stop()
    for number, each in enumerate(counts):
        (overlay,) = tmp_path.glob(f"image.*.{number}.qcow2")
        check_overlay(overlay, each, tmp_path)
    assert postcopy("verify", str(linux.image)).returncode == 0


@pytest.mark.qemu(USUAL, NEWEST)
def test_a_linux_that_was_received(linux, tmp_path):
    """Its memory is what QEMU says it was; it wakes with all of it."""
    outcome = postcopy("extract", str(linux.received), "--ram", str(tmp_path / "ram"))
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "ram").read_bytes() == linux.memory.read_bytes()
    disk = tmp_path / "disk.qcow2"
    shutil.copy(linux.received_disk, disk)
    with Clones(linux, tmp_path, linux.received, (disk, "qcow2")) as clone:
        (counts,) = clone.stop()
    check_overlay(disk, counts, tmp_path)


@pytest.mark.qemu(USUAL)
def test_a_server_that_is_killed_loses_nothing_of_a_linux(linux, tmp_path):
    """At random bytes of what it sends; ``POSTCOPY_FAULTS`` says how often."""
    chosen, left, resumed = random.Random(SEED), KILLS, 0
    while left or not resumed:
        folder = tmp_path / str(left)
        disk = folder / "disk"
        with contextlib.closing(Console(folder)) as console:
            shutil.copy(linux.disk, disk)
            line = [*linux.line(folder, disk, "raw"), "-incoming", "defer"]
            with QemuProcess(folder, line, oob=True) as qemu:
                uri = f"unix:{folder}/way"
                qemu.capabilities("events", "postcopy-ram")
                qemu("migrate-incoming", uri=uri)
                left, times = serve_killed(qemu, linux.image, uri, chosen, left)
                resumed += times
                if qemu.is_running():
                    qemu("cont")  # it was stopped for its disks
                    console.wait_writes(1)
                    console.wait_writes(20, since=console.writes())
                    counts = console.stop()
                    qemu.wait_end()
                    check_disk(disk, counts)
                else:
                    assert not times, qemu.log  # its guest never ran


def serve_killed(qemu, image, uri, chosen, left):
    """Serve by servers that are killed, and by one that is not if QEMU has come so far.

    :return: how many kills are left, and how often a server has gone on.
    """
    first, resume = uri, []
    for times in range(left):
        at = chosen.randrange(1, chosen.choice([2_000, 300_000, 64 << 20]))
        with FaultChannel(f"{first}-channel-{times}", uri) as channel:
            kill_at(at, channel, str(image), channel.uri, *resume)
        uri, resume = f"{first}-{times}", ["--resume"]
        if not listens_again(qemu, uri):
            return left - times - 1, times
    outcome = postcopy("serve", str(image), uri, *resume)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    qemu.wait_migration("completed")
    return 0, left


def listens_again(qemu, uri):
    """Have it wait for another server; False: it needs none, or has ended.

    A device may wait for a page, and QEMU's main loop with it.
    """
    answers = []

    def knows():
        try:
            qemu.oob("migrate-recover", uri=uri)
        except QmpRefused:
            seen = {event["data"].get("status") for event in qemu.events if "data" in event}
            answers.extend([False] * bool(seen & {"completed", "failed"}))
        except QemuGone:
            answers.append(False)
        else:
            answers.append(True)
        return answers

    wait_until(knows, TIMEOUT_S, "the end of the server")
    return answers[0]
