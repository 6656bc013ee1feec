"""QEMU's command line with overlays in place of an image's disks."""

import json
import shlex
from pathlib import Path

import pytest

from postcopy.errors import ImageError, Refused
from postcopy.image.disks import Disk
from postcopy.serve.clone_disks import check_disks, names_any, plan

DISK = Disk("d0", "/disks/root.raw", "raw", 1 << 20, below=("/disks/older.raw",))
OVERLAY = "/clones/image.d0.3.qcow2"


def planned(*words):
    command, overlays = plan(
        shlex.join(["qemu", *words]), [DISK], Path("/clones"), Path("/images/image"), 3
    )
    assert [str(each.path) for each in overlays] == [OVERLAY]
    return shlex.split(command)[1:]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-hda", "/disks/root.raw"], ["-hda", OVERLAY]),
        (["/disks/root.raw", "-m", "1G"], [OVERLAY, "-m", "1G"]),
        (["-nographic", "/disks/root.raw"], ["-nographic", OVERLAY]),
        (
            ["-drive", "file=/disks/root.raw,format=raw,if=virtio"],
            ["-drive", f"file={OVERLAY},format=qcow2,if=virtio"],
        ),
        (["-drive", "file=/disks/older.raw"], ["-drive", f"file={OVERLAY},format=qcow2"]),
        (
            ["-blockdev", "driver=raw,node-name=d,file.driver=file,file.filename=/disks/root.raw"],
            ["-blockdev", f"driver=qcow2,node-name=d,file.driver=file,file.filename={OVERLAY}"],
        ),
        (
            ["-blockdev", "driver=file,filename=/disks/root.raw,node-name=f",
             "-blockdev", "driver=raw,node-name=d,file=f"],
            ["-blockdev", f"driver=file,filename={OVERLAY},node-name=f",
             "-blockdev", "driver=qcow2,node-name=d,file=f"],
        ),
        (
            ["-device", "virtio-blk,drive=d", "-drive", "if=none,id=d,file=/disks/./root.raw"],
            ["-device", "virtio-blk,drive=d", "-drive", f"if=none,id=d,file={OVERLAY},format=qcow2"],
        ),
    ],
)  # fmt: skip
def test_each_way_to_name_a_disk(words, expected):
    assert planned(*words) == expected
    assert names_any(shlex.join(["qemu", *words]), [DISK])


def test_a_node_in_json():
    node = {
        "driver": "raw",
        "node-name": "d",
        "file": {"driver": "file", "filename": "/disks/root.raw"},
    }
    _, word = planned("-blockdev", json.dumps(node))
    assert json.loads(word) == {
        "driver": "qcow2", "node-name": "d", "file.driver": "file", "file.filename": OVERLAY,
    }  # fmt: skip


def test_commas_in_names():
    disk = Disk("d0", "/a,b", "raw", 1)
    command, _ = plan("qemu -drive file=/a,,b,format=raw", [disk], Path("/c,d"), Path("/image"), 0)
    assert command.endswith("file=/c,,d/image.d0.0.qcow2,format=qcow2")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "the image's disk d0 is /disks/root.raw, which --qemu does not name"),
        (["-drive", "file=/disks/other.raw"], "does not name"),
        (["-blockdev", "{"], "is no JSON"),
        (["-blockdev", "{}x"], "is no JSON"),
        (
            ["-blockdev", "driver=raw,offset=512,file.driver=file,file.filename=/disks/root.raw"],
            "a part of a disk",
        ),
    ],
)
def test_what_cannot_be_replaced_is_refused(words, why):
    with pytest.raises(Refused, match=why):
        planned(*words)


@pytest.mark.parametrize(
    "word",
    ["file:/disks/root.raw", "x=/disks/../disks/older.raw", '{"a": ["/disks/root.raw"]}'],
)
def test_a_disk_is_seen_wherever_it_is_named(word):
    assert names_any(shlex.join(["qemu", "-new-option", word]), [DISK])


def test_other_files_are_not_disks():
    line = "qemu -hda /disks/other.raw -hdb /disks/root.raw.mine -drive file=/disks/root.raw2,if=virtio"
    assert not names_any(line, [DISK])


def test_a_disk_that_has_gone(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(b"data")
    disk = Disk("d0", str(file), "raw", 4).as_it_is()
    check_disks([disk], tmp_path / "image")
    file.write_bytes(b"longer")
    with pytest.raises(ImageError, match="6 bytes, and was of 4 when"):
        check_disks([disk], tmp_path / "image")
    file.unlink()
    with pytest.raises(ImageError, match="No such file"):
        check_disks([disk], tmp_path / "image")
