"""``postcopy serve``: a saved guest wakes in a real QEMU, and a killed server loses nothing."""

import json
import os
import random
import subprocess

import numpy as np
import pytest

from fakes.commands import POSTCOPY as COMMAND
from fakes.commands import Running, one_line, postcopy
from fakes.peers import Feature, Way
from fakes.qemu_versions import ALL, NEWEST, USUAL
from fakes.real_qemu import QemuGone, QemuProcess
from fakes.waiting import wait_until
from faults.fault_channel import FaultChannel
from interop.arrival import check_memory
from interop.qemu_guest import QemuGuest
from interop.saved_in_qemu import flip
from machine.machines import MIB, need
from postcopy.image.compare import compare
from postcopy.image.formats import open_image
from postcopy.machine.workload import load
from postcopy.machine.workload_records import is_running

KILLS = int(os.environ.get("POSTCOPY_FAULTS", "2"))
SEED = int(os.environ.get("POSTCOPY_SEED", "1"))
TIMEOUT_S = 30.0
PAGE = 4096


def serve(*arguments):
    """Run the command to its end, which must be good."""
    outcome = postcopy("serve", *arguments)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return outcome.stdout


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.TO, Feature.SERVED)
def test_the_guest_goes_on_in_qemu(saved):
    with saved.target("kvm") as (qemu, uri):
        serve(str(saved.path), uri)
        qemu.wait_migration("completed")
        saved.check_goes_on(qemu)


@pytest.mark.qemu(USUAL, NEWEST)
def test_every_block_arrives_in_a_machine_with_firmware(tmp_path, qemu_version):
    """The guest does not run there: what QEMU saves then is the image again."""
    machine = "q35" if qemu_version == USUAL else "pc"
    loaded = np.random.default_rng(1).integers(0, 256, (1024, PAGE), dtype=np.uint8)
    loaded[np.random.default_rng(2).random(1024) < 0.4] = 0
    loaded.tofile(tmp_path / "loaded")
    loader = f"loader,file={tmp_path / 'loaded'},addr=0x1000000,force-raw=on"
    qmp = f"unix:{tmp_path / 'qmp'}"
    line = ["-M", machine, "-accel", "tcg", "-m", "64M", "-serial", "null"]
    first = [*line, "-device", loader, "-qmp", f"{qmp},server=on,wait=off"]
    with QemuProcess(tmp_path / "first", first):
        assert postcopy("snapshot", "--from", qmp, str(tmp_path / "image")).returncode == 0
    with QemuProcess(tmp_path / "second", [*line, "-S", "-incoming", "defer"]) as qemu:
        qemu.capabilities("postcopy-ram")
        qemu("migrate-incoming", uri=f"unix:{tmp_path}/way")
        serve(str(tmp_path / "image"), f"unix:{tmp_path}/way")
        qemu.wait_migration("completed")
        assert qemu("query-status")["status"] == "paused"
        qemu(
            "migrate-set-capabilities",
            capabilities=[{"capability": "postcopy-ram", "state": False}],
        )
        qemu.save(tmp_path / "again")
    with open_image(tmp_path / "image") as image, open_image(tmp_path / "again") as again:
        assert len(image.blocks) > 3
        assert [each for each in compare(image, again).blocks if each.pages or each.only_in] == []
        rows = again.read("pc.ram", 0x1000000 // PAGE, len(loaded))
        np.testing.assert_array_equal(rows, loaded)
        assert {"serial", "i8254"} <= {device.name for device in again.devices}


@pytest.mark.qemu(USUAL, NEWEST)
def test_zero_pages_come_on_request_until_the_very_end(tmp_path, qemu_version):
    """A guest that fills its memory all the while: pages that it does not ask for are zero there."""
    need("kvm")
    with Running(tmp_path, "ours", "--workload", "hammer", "-S") as ours:
        assert postcopy("snapshot", "--from", ours.qmp, str(tmp_path / "image")).returncode == 0
    workload = load("hammer", 64 * MIB)
    preempt = ["postcopy-preempt"] if qemu_version == USUAL else []
    with QemuGuest(tmp_path / "qemu", "microvm", "kvm", 64 * MIB) as qemu:
        qemu.capabilities("postcopy-ram", *preempt)
        uri = qemu.listen(f"unix:{tmp_path}/way")
        options = ["--json", *(["--preempt"] if preempt else [])]
        figures = json.loads(serve(str(tmp_path / "image"), uri, *options))
        assert figures["zero_pages"] < 64 * MIB // PAGE // 2
        qemu.wait_migration("completed")
        wait_until(lambda: is_running(qemu.read_memory, workload), TIMEOUT_S, "the guest's work")
        qemu("stop")
        check_memory(qemu.read_memory, workload)


@pytest.mark.qemu
def test_a_wrong_page_is_never_sent(saved, tmp_path):
    """The server ends, and goes on with a good image."""
    flip(path := saved.copy(tmp_path))
    with saved.target("kvm") as (qemu, uri):
        outcome = postcopy("serve", str(path), uri)
        assert outcome.returncode == 1
        assert "do not agree with their digest" in one_line(outcome)
        assert "block microvm.ram from offset" in outcome.stderr
        assert outcome.stderr.count(str(path)) == 1
        qemu.wait_migration("postcopy-paused")
        again = f"unix:{tmp_path}/again"
        qemu("migrate-recover", uri=again)
        flip(path)
        serve(str(path), again, "--resume")
        qemu.wait_migration("completed")
        saved.check_goes_on(qemu)


@pytest.mark.qemu(*ALL)
@pytest.mark.proves(Way.TO, Feature.SERVED_AGAIN)
def test_a_server_that_is_killed_loses_nothing(saved, tmp_path, qemu_version):
    """At random bytes of what it sends; ``POSTCOPY_FAULTS`` says how often."""
    preempt = qemu_version == NEWEST
    chosen = random.Random(SEED)
    wanted, options = (["postcopy-preempt"], ["--preempt"]) if preempt else ([], [])
    left = KILLS
    while True:
        with saved.target("kvm", *wanted) as (qemu, first):
            uri, resume, status = first, [], ""
            while left:
                left -= 1
                # Often in the first steps, of which there are many.
                at = chosen.randrange(1, chosen.choice([2_000, 300_000, 32 << 20]))
                with FaultChannel(f"unix:{tmp_path}/channel-{left}", uri) as channel:
                    kill_at(at, channel, str(saved.path), channel.uri, *options, *resume)
                status = settled(qemu)
                if status != "postcopy-paused":
                    break
                uri, resume = f"unix:{tmp_path}/again-{left}", ["--resume"]
                qemu("migrate-recover", uri=uri)
            if status != "gone":
                if status != "completed":
                    serve(str(saved.path), uri, *options, *resume)
                qemu.wait_migration("completed")
                saved.check_goes_on(qemu)
                if not left:
                    return
            assert status != "gone" or not resume, qemu.log  # its guest never ran


def kill_at(at, channel, *arguments):
    """Kill a server when so many bytes of it have passed, unless it has ended before."""
    stalled = channel.stall(at)
    with subprocess.Popen([*COMMAND, "serve", *arguments]) as process:
        wait_until(
            lambda: stalled.happened.is_set() or process.poll() is not None, TIMEOUT_S, "the place"
        )
        process.kill()


def settled(qemu):
    """Wait until QEMU knows of the end of its server; say how it is then, or that it has ended."""
    found = []

    def reached():
        found.append(qemu("query-migrate").get("status"))
        return found[-1] in {"postcopy-paused", "completed", "failed"}

    try:
        wait_until(reached, TIMEOUT_S, "the end of the server")
    except QemuGone:
        return "gone"
    return "gone" if found[-1] == "failed" else found[-1]
