"""No command replaces what is not a file of its own: what stands at the name is as it was before."""

import os
import stat
import subprocess
import threading

import pytest

from fakes.commands import POSTCOPY, one_line, postcopy
from image.images import memory, take_image, write_image, write_manifest
from postcopy.channel.path_lock import path_locked
from postcopy.image.manifest import beside

OTHERS = b"what somebody else keeps here"
REFUSED = 3


def state_of(folder):
    """Each name in a folder, with what is there."""
    found = {}
    for each in folder.iterdir():
        status = each.lstat()
        content = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(each.readlink())
        elif stat.S_ISREG(status.st_mode):
            content = each.read_bytes()
        found[each.name] = (status.st_ino, status.st_mode, content)
    return found


@pytest.fixture
def image(tmp_path):
    path = write_image(tmp_path / "image", "mapped-ram", memory())
    write_manifest(path)
    return path


@pytest.fixture
def outs(tmp_path):
    folder = tmp_path / "outs"
    folder.mkdir()
    return folder


def link(path):
    path.with_name("kept").write_bytes(OTHERS)
    path.symlink_to("kept")


IN_THE_WAY = {
    "a link": (link, "is a symbolic link; remove it, or give the path that it leads to"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "is a symbolic link; "),
    "a link to itself": (lambda path: path.symlink_to(path), "is a symbolic link; "),
    "a folder": (lambda path: path.mkdir(), "is a folder; give the path of a file"),
    "an image": (
        lambda path: write_image(path, "stream", memory()),
        "is an image of a guest; remove it, or give another path",
    ),
    "an image of chunks": (
        lambda path: take_image(path, "stream", memory(), compressed=True),
        "is an image of a guest; ",
    ),
}


class TestExtract:
    @pytest.mark.parametrize("what", IN_THE_WAY)
    def test_stays(self, image, outs, what):
        out = outs / "out"
        make, why = IN_THE_WAY[what]
        make(out)
        before = state_of(outs)
        outcome = postcopy("extract", str(image), "--ram", str(out))
        assert one_line(outcome).startswith(f"{out} {why}")
        assert outcome.returncode == REFUSED
        assert state_of(outs) == before

    def test_manifests_stay(self, image, outs, tmp_path):
        before = state_of(tmp_path)
        outcome = postcopy("extract", str(image), "--ram", str(beside(image)))
        assert outcome.returncode == REFUSED
        assert one_line(outcome) == (
            f"{beside(image)} is the manifest of an image; remove it, or give another path"
        )
        assert state_of(tmp_path) == before

    @pytest.mark.parametrize("out", ["", ".", "/", ".."])
    def test_no_name(self, image, out, tmp_path):
        outcome = postcopy("extract", str(image), "--ram", out, cwd=tmp_path)
        assert outcome.returncode == REFUSED
        assert one_line(outcome).endswith("; give the path of a file")

    def test_fifo(self, image, outs):
        out = outs / "out"
        os.mkfifo(out)
        before = state_of(outs)
        with subprocess.Popen(
            [*POSTCOPY, "extract", str(image), "--ram", str(out)], stderr=subprocess.PIPE
        ) as command:
            assert read_within(out, 30) == memory()["ram"].tobytes()
            _, said = command.communicate(timeout=30)
        assert (command.returncode, said) == (0, b"")
        assert state_of(outs) == before

    def test_device(self, image, outs):
        """By a link to it, which needs no rights and puts no device of the host at stake."""
        (outs / "null").symlink_to("/dev/null")
        (outs / "full").symlink_to("/dev/full")
        before = state_of(outs)
        assert postcopy("extract", str(image), "--ram", str(outs / "null")).returncode == 0
        outcome = postcopy("extract", str(image), "--ram", str(outs / "full"))
        assert outcome.returncode == 1
        assert one_line(outcome).startswith(f"{outs}/full: No space left on device")
        assert state_of(outs) == before

    def test_a_file_is_replaced_and_its_other_names_keep_the_old(self, image, outs):
        out = outs / "out"
        out.write_bytes(OTHERS)
        (outs / "other-name").hardlink_to(out)
        assert postcopy("extract", str(image), "--ram", str(out)).returncode == 0
        assert out.read_bytes() == memory()["ram"].tobytes()
        assert (outs / "other-name").read_bytes() == OTHERS

    def test_what_killed_commands_have_left_goes_and_the_rest_stays(self, image, outs):
        out = outs / "out"
        (outs / "out.0123456789abcdef.partial").write_bytes(b"half")
        for name in ("out.partial", "out.more.partial", "outer.0123456789abcdef.partial"):
            (outs / name).write_bytes(OTHERS)
        before = state_of(outs)
        assert postcopy("extract", str(image), "--ram", str(out)).returncode == 0
        assert state_of(outs).keys() - before.keys() == {"out"}
        assert before.keys() - state_of(outs).keys() == {"out.0123456789abcdef.partial"}


def read_within(fifo, timeout_s):
    """All that a FIFO gives; the reader is left behind if nobody comes to write."""
    found = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()), daemon=True)
    reader.start()
    reader.join(timeout_s)
    assert found, "nobody wrote into the FIFO"
    return found[0]


@pytest.mark.kvm
class TestSnapshot:
    @pytest.mark.parametrize("what", [*IN_THE_WAY, "a FIFO", "only the manifest", "a file"])
    def test_stays(self, guest, outs, what):
        make, why = {
            "a FIFO": (os.mkfifo, "is a device or a FIFO, which no file can replace; "),
            "only the manifest": (
                lambda path: beside(path).write_bytes(OTHERS),
                "exists; remove it, or give another path",
            ),
            "a file": (lambda path: path.write_bytes(OTHERS), "exists; "),
            **IN_THE_WAY,
        }[what]
        path = outs / "out"
        make(path)
        before = state_of(outs)
        outcome = postcopy("snapshot", "--from", guest.qmp, str(path), "--format", "stream")
        assert outcome.returncode == REFUSED
        named = beside(path) if what == "only the manifest" else path
        assert one_line(outcome).startswith(f"{named} ")
        if "image" not in what:  # of which this command says only that it exists
            assert one_line(outcome).startswith(f"{named} {why}")
        assert state_of(outs) == before
        assert guest.ask("query-migrate")["return"] == {}

    def test_a_link_in_the_place_of_the_manifest(self, guest, outs):
        path = outs / "out"
        beside(path).symlink_to("nothing")
        before = state_of(outs)
        outcome = postcopy("snapshot", "--from", guest.qmp, str(path), "--compress", "zstd")
        assert outcome.returncode == REFUSED
        assert one_line(outcome).startswith(f"{beside(path)} is a symbolic link; ")
        assert state_of(outs) == before

    @pytest.mark.parametrize("path", ["", "/", "."])
    def test_no_name(self, guest, path, outs):
        outcome = postcopy("snapshot", "--from", guest.qmp, path, cwd=outs)
        assert outcome.returncode == REFUSED
        assert one_line(outcome).endswith("; give the path of a file")

    def test_what_killed_commands_have_left_goes_and_the_rest_stays(self, guest, outs):
        left = {f"out.{digit * 16}.partial" for digit in "09af"}
        others = {"out.partial", "out.partial.partial", "out.anew.partial"}
        for name in left | others:
            (outs / name).write_bytes(OTHERS)
        (outs / "out.partial.lock").touch()
        outcome = postcopy("snapshot", "--from", guest.qmp, str(outs / "out"), "--compress", "zstd")
        assert (outcome.returncode, outcome.stderr) == (0, "")
        found = {each.name for each in outs.iterdir()}
        assert found == others | {"out", "out.manifest.json", "postcopy-chunks"}

    def test_two_for_one_name(self, guest, outs):
        with path_locked(outs / "out"):
            half = outs / "out.0123456789abcdef.partial"
            half.write_bytes(OTHERS)
            outcome = postcopy("snapshot", "--from", guest.qmp, str(outs / "out"))
            assert outcome.returncode == REFUSED
            assert one_line(outcome).startswith(f"another process is writing {outs}/out; ")
            assert half.read_bytes() == OTHERS


class TestAdopt:
    def test_a_link_in_the_place_of_the_manifest(self, image, tmp_path):
        beside(image).unlink()
        beside(image).symlink_to("nothing")
        before = state_of(tmp_path)
        outcome = postcopy("verify", "--adopt", str(image))
        assert outcome.returncode == REFUSED
        assert one_line(outcome).startswith(f"{beside(image)} is a symbolic link; ")
        assert state_of(tmp_path) == before


@pytest.mark.kvm
class TestWrittenInPlace:
    """What QEMU writes in place, through links too, is written in place here; but not over an image."""

    def test_pmemsave(self, guest, image, outs):
        order = {"val": 0, "size": 4096}
        before = image.read_bytes()
        for each in (image, beside(image)):
            answer = guest.ask("pmemsave", filename=str(each), **order)
            assert "remove it, or give another path" in answer["error"]["desc"]
        assert image.read_bytes() == before
        link(outs / "out")
        assert "error" not in guest.ask("pmemsave", filename=str(outs / "out"), **order)
        assert (outs / "out").is_symlink()
        assert (outs / "kept").stat().st_size == 4096

    def test_serial_output(self, image, outs):
        before = image.read_bytes()
        line = ["run", "--memory", "64M", "--workload", "idle", "--serial"]
        outcome = postcopy(*line, f"file:{image}")
        assert outcome.returncode == REFUSED
        assert one_line(outcome) == (
            f"{image} is an image of a guest; remove it, or give another path"
        )
        assert image.read_bytes() == before
