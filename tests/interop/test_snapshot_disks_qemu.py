"""Memory and disks of a real QEMU's guest at one moment, while the guest goes on (``--disks``)."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fakes.commands import one_line, postcopy
from fakes.qemu_versions import ALL, OLDEST
from fakes.waiting import wait_until
from interop.arrival import check_memory, iterations
from interop.our_guest import OurGuest
from interop.qemu_guest import QemuGuest
from interop.test_drive_qemu import check_works_on, drive_options, to_qemu
from interop.test_restore_in_qemu import Restoring
from machine.drives import MEMORY_BYTES, check_disk, disk_workload, make_disk, writes_and_reads
from postcopy import Machine, MigrationCancelled

pytestmark = [pytest.mark.qemu, pytest.mark.kvm]

MODERN = ["-global", "virtio-mmio.force-legacy=off"]


def qemu_with(folder, *options, qmp=None):
    monitor = [] if qmp is None else ["-qmp", f"{qmp},server=on,wait=off"]
    return QemuGuest(folder, "microvm", "kvm", MEMORY_BYTES, 1, [*MODERN, *options, *monitor])


def disks_of(qemu):
    """The node that the guest writes to, and its file, of each disk."""
    return {
        device["qdev"]: (device["inserted"]["node-name"], device["inserted"]["image"]["filename"])
        for device in qemu("query-block")
        if "inserted" in device
    }


def nodes_of(qemu):
    return {node["node-name"] for node in qemu("query-named-block-nodes")}


def commit(qemu):
    """Put what the guest has written to its overlay into the file below it."""
    ((node, _),) = disks_of(qemu).values()
    qemu("block-commit", **{"job-id": "commit", "device": node})
    while qemu("query-block-jobs"):
        qemu("query-block-jobs")[0]["ready"] and qemu("job-complete", id="commit")


@pytest.fixture
def qmp(tmp_path):
    return f"unix:{tmp_path}/qmp"


@pytest.fixture
def at_work(tmp_path, qmp):
    """A QEMU whose guest writes to its memory and to its disk; the workload; the disk's file."""
    path = make_disk(tmp_path / "disk")
    workload = disk_workload()
    named = os.path.relpath(path)  # as users name theirs
    with qemu_with(tmp_path / "qemu", *drive_options(named), qmp=qmp) as qemu:
        with OurGuest.running(workload, "kvm", drive=path) as ours:
            to_qemu(ours, qemu, postcopy=False)
        yield qemu, workload, path


def check_all(qemu, workload, path):
    """Stop it, and compare all of its memory and of its disk."""
    qemu("stop")
    check_memory(qemu.read_memory, workload)
    check_disk(qemu.read_memory, workload, path)


def check_goes_on(qemu, workload):
    read = qemu.read_memory
    check_works_on(read, workload, iterations(read, workload), writes_and_reads(read, workload))


@pytest.mark.qemu(*ALL)
def test_memory_and_disk_are_of_one_moment_and_the_guest_goes_on(tmp_path, qmp, at_work):
    qemu, workload, path = at_work
    image, folder = tmp_path / "image", tmp_path / "overlays"
    folder.mkdir()
    command = ["snapshot", "--from", qmp, "--format", "stream", "--disks", str(folder), "--json"]
    outcome = postcopy(*command, str(image))
    assert outcome.returncode == 0, outcome.stderr
    taken = json.loads(outcome.stdout.splitlines()[-1])
    ((name, overlay),) = taken["overlays"].items()
    assert [each["path"] for each in taken["disks"]] == [path]
    assert overlay in disks_of(qemu)[name][1]
    check_goes_on(qemu, workload)

    # What was taken: no word of memory and disk is of another moment.
    clone = str(shutil.copy(path, tmp_path / "clone"))
    with qemu_with(tmp_path / "other", *drive_options(clone)) as other:
        other.listen(other.loading(image))
        other.wait_migration("completed")
        check_all(other, workload, clone)
        other("cont")
        check_goes_on(other, workload)
        check_all(other, workload, clone)

    assert postcopy("verify", str(image)).returncode == 0
    assert path in postcopy("inspect", str(image)).stdout
    assert postcopy("convert", str(image), str(tmp_path / "anew")).returncode == 0
    assert path in postcopy("inspect", str(tmp_path / "anew")).stdout
    # And of the guest that went on nothing is missing.
    qemu("stop")
    commit(qemu)
    check_all(qemu, workload, path)
    changed = postcopy("verify", str(image))
    assert changed.returncode == 1
    assert f"{path} has been written since the image was taken" in changed.stdout


def test_a_second_snapshot_goes_on_from_the_overlay_of_the_first(tmp_path, qmp, at_work):
    qemu, workload, path = at_work
    taken = []
    for number in range(2):
        line = ["snapshot", "--from", qmp, "--format", "stream", "--disks", str(tmp_path), "--json"]
        outcome = postcopy(*line, str(tmp_path / f"image{number}"))
        assert outcome.returncode == 0, outcome.stderr
        taken.append(json.loads(outcome.stdout.splitlines()[-1]))
        check_goes_on(qemu, workload)
    for number in range(2):  # the second disk is a qcow2, which QEMU has closed for writing
        assert postcopy("verify", str(tmp_path / f"image{number}")).returncode == 0
    (first,), (second,) = (list(each["overlays"].values()) for each in taken)
    assert [each["disks"][0]["path"] for each in taken] == [path, first]
    ((_, file),) = disks_of(qemu).values()
    assert second in file


@pytest.mark.parametrize(
    ("disks", "when"),
    [(True, "at once"), (True, "while it is written"), (False, "while it is written")],
)
@pytest.mark.qemu("7.2", "11.1")
def test_a_snapshot_that_is_cancelled_leaves_the_guest_as_it_was(
    tmp_path, qmp, at_work, when, disks
):
    qemu, workload, path = at_work
    before, nodes = disks_of(qemu), nodes_of(qemu)
    options = {"disks": tmp_path} if disks else {}

    async def cancel():
        async with Machine.connect(qmp) as machine:
            job = await machine.start_snapshot(tmp_path / "image", **options)
            if when != "at once":
                events = job.events()
                while not job.written.exists():
                    await anext(events)
            await job.cancel()
            with pytest.raises(MigrationCancelled) as cancelled:
                await job.result()
            assert when == "at once" or ("disks are as before" in str(cancelled.value)) is disks

    asyncio.run(cancel())
    assert disks_of(qemu) == before
    assert nodes_of(qemu) == nodes
    assert not list(tmp_path.glob("image*"))
    check_goes_on(qemu, workload)
    check_all(qemu, workload, path)


@pytest.mark.qemu(*ALL)
def test_a_full_disk(tmp_path, qmp, at_work, qemu_version):
    """The guest goes on as it was; QEMU 7.2's would hang, and is refused before."""
    qemu, workload, path = at_work
    before, nodes = disks_of(qemu), nodes_of(qemu)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("needs to mount a tmpfs: run as root with CAP_SYS_ADMIN")
    try:
        line = ["snapshot", "--from", qmp, "--disks", str(tmp_path), str(small / "image")]
        why = one_line(outcome := postcopy(*line))
        if qemu_version == OLDEST:
            assert outcome.returncode == 3
            assert "would hang on a full disk; make room" in why
        else:
            assert outcome.returncode == 1
            assert "No space left on device; the guest runs on; its disks are as before" in why
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert (disks_of(qemu), nodes_of(qemu)) == (before, nodes)
    assert not list(tmp_path.glob("image*"))
    check_goes_on(qemu, workload)
    check_all(qemu, workload, path)


def test_nothing_is_touched_where_an_overlay_cannot_be_made(tmp_path, qmp, at_work):
    qemu, workload, path = at_work
    before, nodes = disks_of(qemu), nodes_of(qemu)
    (name,) = before
    line = ["snapshot", "--from", qmp, str(tmp_path / "image"), "--disks"]
    assert "is no folder" in one_line(postcopy(*line, str(tmp_path / "nowhere")))
    (tmp_path / f"image.{name.strip('/').replace('/', '-')}.qcow2").touch()
    assert "exists; remove it" in one_line(postcopy(*line, str(tmp_path)))
    assert (disks_of(qemu), nodes_of(qemu)) == (before, nodes)
    check_goes_on(qemu, workload)
    check_all(qemu, workload, path)


@pytest.fixture
def taken(tmp_path, qmp, at_work):
    """The image of a guest that goes on, and its disk's file."""
    _, _, path = at_work
    (tmp_path / "overlays").mkdir()
    line = ["snapshot", "--from", qmp, "--disks", str(tmp_path / "overlays")]
    outcome = postcopy(*line, str(tmp_path / "image"))
    assert outcome.returncode == 0, outcome.stderr
    return tmp_path / "image", path


def check_clone(restoring, workload, copy):
    """Let it do some work, and compare all of its memory and of its disk."""
    read = restoring.memory()
    before = iterations(read, workload), writes_and_reads(read, workload)
    restoring.ask(("cont", {}))

    def beyond():
        read = restoring.memory()
        after = iterations(read, workload), writes_and_reads(read, workload)
        restoring.ask(("cont", {}))
        return all(
            a > b for x, y in zip(after, before, strict=True) for a, b in zip(x, y, strict=True)
        )

    wait_until(beyond, 30, "the guest goes on, with its disk")
    read = restoring.memory()
    (disks,) = restoring.ask(("query-block", {}))
    (node,) = (each["inserted"]["node-name"] for each in disks if "inserted" in each)
    target = {"job-id": "copy", "device": node, "sync": "full", "format": "raw"}
    restoring.ask(("drive-backup", target | {"target": str(copy)}))
    wait_until(lambda: restoring.ask(("query-block-jobs", {})) == [[]], 30, "its disk is copied")
    check_memory(read, workload)
    check_disk(read, workload, copy)
    restoring.ask(("cont", {}))


def test_clones_have_overlays_of_their_own(tmp_path, at_work, taken):
    """All of them and the guest that was saved write to one disk, each for itself."""
    (qemu, workload, path), (image, _) = at_work, taken
    before = Path(path).read_bytes()
    (tmp_path / "clones").mkdir()
    options = ["--lazy", "--count", "2", "--overlay-dir", str(tmp_path / "clones")]
    with Restoring(tmp_path, image, *options, qmp="clone{n}.qmp", saved=True) as clones:
        for _ in range(2):
            clones.wait_line("has all memory")
        for number in range(2):
            clones.qmp = tmp_path / f"clone{number}.qmp"
            check_clone(clones, workload, tmp_path / f"copy{number}")
        assert len(list((tmp_path / "clones").iterdir())) == 2
        check_goes_on(qemu, workload)
    assert Path(path).read_bytes() == before
    assert len(list((tmp_path / "clones").iterdir())) == 2
    assert postcopy("verify", str(image)).returncode == 0


def test_a_clone_that_leaves_nothing_behind(tmp_path, at_work, taken):
    """And runs, though the guest was stopped for its disks; without ``--lazy`` too."""
    (_, workload, _), (image, _) = at_work, taken
    with Restoring(tmp_path, image, "--ephemeral", saved=True) as clone:
        clone.wait_line("has all memory")
        (status, disks) = clone.ask(("query-status", {}), ("query-block", {}))
        assert status["status"] == "running"
        check_clone(clone, workload, tmp_path / "copy")
        (node,) = (each["inserted"] for each in disks if "inserted" in each)
        assert Path(node["file"]).exists() or "overlays-" in node["file"]
        clone.ask(("quit", {}))
        assert clone.process.wait(30) == 0
    assert not list(Path(tempfile.gettempdir()).glob("postcopy-overlays-*/image.*"))
    assert postcopy("verify", str(image)).returncode == 0


def test_a_disk_of_an_image_is_never_written_to(tmp_path, taken):
    image, path = taken
    line = ["restore", str(image), "--lazy", "--qemu", "saved"]
    assert "which must stay as they are" in one_line_of(postcopy(*line))
    os.utime(path, ns=(0, 0))
    outcome = postcopy(*line, "--ephemeral")
    assert "has been written since the image was taken" in one_line_of(outcome)


def one_line_of(outcome):
    """The error, behind the line that tells the command."""
    assert outcome.returncode != 0
    return outcome.stderr.splitlines()[-1]
