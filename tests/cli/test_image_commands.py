"""``postcopy verify``, ``inspect``, ``diff``, ``extract`` and ``prune``."""

import json
import resource
import stat

import numpy as np
import pytest

from fakes.bad_sectors import BadSector
from fakes.commands import one_line, postcopy
from image.images import PAGE, flip, memory, take_image, write_image, write_manifest
from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import partial_name
from postcopy.image import working_set
from postcopy.image.manifest import beside
from postcopy.image.working_set import WorkingSet


@pytest.fixture(params=["stream", "mapped-ram"])
def path(request, tmp_path):
    return write_image(tmp_path / "image", request.param, memory())


class TestVerify:
    def test_a_whole_image(self, path):
        identity = write_manifest(path).identity
        outcome = postcopy("verify", str(path))
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert outcome.stdout == f"{path}: whole; identity {identity}\n"

    def test_a_damaged_image_is_told_place_by_place(self, path):
        write_manifest(path)
        raw = path.read_bytes()
        pages = memory()["ram"]
        at = raw.index(pages[np.flatnonzero(pages.any(axis=1))[0]].tobytes())
        flip(path, at * 8)
        outcome = postcopy("verify", str(path))
        assert outcome.returncode == 1
        assert "do not agree with their digest: block ram from offset" in outcome.stdout
        assert one_line(outcome) == f"{path} is damaged in one place; take it from a copy"
        found = json.loads(postcopy("verify", "--json", str(path)).stdout)
        assert not found["whole"]
        (damage,) = found["damages"]
        assert damage["block"] == "ram"
        assert damage["offset"] <= at < damage["offset"] + damage["length_bytes"]

    def test_a_damaged_manifest(self, path):
        write_manifest(path)
        flip(beside(path), 1000)
        outcome = postcopy("verify", str(path))
        assert outcome.returncode == 1
        assert "the manifest is damaged" in one_line(outcome)

    def test_an_image_without_a_manifest_can_be_adopted_once(self, path):
        outcome = postcopy("verify", str(path))
        assert outcome.returncode == 3
        assert f"'postcopy verify --adopt {path}'" in one_line(outcome)
        assert postcopy("verify", "--adopt", str(path)).returncode == 0
        assert postcopy("verify", str(path)).returncode == 0
        assert postcopy("verify", "--adopt", str(path)).returncode == 3

    def test_nothing_there(self, tmp_path):
        outcome = postcopy("verify", str(tmp_path / "image"))
        assert outcome.returncode == 1
        assert "image: cannot be opened: No such file" in one_line(outcome)


class TestInspect:
    def test_for_a_person(self, path):
        outcome = postcopy("inspect", str(path))
        assert (outcome.returncode, outcome.stderr) == (0, "")
        for text in ("microvm", "block ram", "device timer 0", "cannot be detected"):
            assert text in outcome.stdout
        write_manifest(path)
        told = postcopy("inspect", str(path)).stdout.splitlines()
        assert ["pause", "0.90", "ms"] in [line.split() for line in told]

    def test_record_by_record(self, path):
        lines = postcopy("inspect", "--records", str(path)).stdout.splitlines()
        kinds = [line.split()[1] for line in lines]
        assert [kinds[0], *kinds[-2:]] == ["configuration", "eof", "description"]
        assert {"block", "end", "section"} <= set(kinds)
        objects = postcopy("inspect", "--records", "--json", str(path)).stdout.splitlines()
        offsets = [json.loads(each)["offset"] for each in objects]
        assert offsets == [int(line.split()[0], 16) for line in lines] == sorted(offsets)
        state = next(each for each in map(json.loads, objects) if each["kind"] == "section")
        assert state["name"] == "timer"
        assert "cpu_clock_offset" in state["fields"]

    def test_devices_by_their_fields(self, path):
        text = postcopy("inspect", "--fields", str(path)).stdout
        assert "timer 0: cpu_clock_offset = " in text
        (timer, _) = json.loads(postcopy("inspect", "--fields", "--json", str(path)).stdout)[
            "devices"
        ]
        assert (timer["name"], timer["instance"]) == ("timer", 0)

    def test_for_a_program(self, path):
        identity = write_manifest(path).identity
        found = json.loads(postcopy("inspect", "--json", str(path)).stdout)
        data = int(memory()["ram"].any(axis=1).sum())
        assert found["machine"] == "microvm"
        assert found["blocks"][0] == {
            "name": "ram",
            "size_bytes": 48 * PAGE,
            "data_pages": data,
            "zero_pages": 48 - data,
        }
        assert [each["name"] for each in found["devices"]] == ["timer", "globalstate"]
        assert found["manifest"]["identity"] == identity
        assert found["manifest"]["times"]["pause_us"] == 900

    def test_a_recorded_working_set(self, path):
        assert json.loads(postcopy("inspect", "--json", str(path)).stdout)["working_set"] is None
        pages = {name: np.ones(len(rows), np.bool_) for name, rows in memory().items()}
        working_set.record(working_set.beside(path), WorkingSet("ab" * 32, pages))
        found = json.loads(postcopy("inspect", "--json", str(path)).stdout)
        assert found["working_set"] == str(working_set.beside(path))
        told = postcopy("inspect", str(path)).stdout.splitlines()
        assert ["working", "set", str(working_set.beside(path))] in [line.split() for line in told]


class TestUnreadable:
    """A sector of the image cannot be read: a command says where, and is not ended by a signal."""

    @pytest.fixture
    def unreadable(self, path, tmp_path, monkeypatch):
        write_manifest(path)
        raw = path.read_bytes()
        pages = memory()["ram"]
        at = raw.index(pages[np.flatnonzero(pages.any(axis=1))[3]].tobytes())
        BadSector(tmp_path, monkeypatch).put(path, at, at + PAGE)
        return path

    def test_verify(self, unreadable):
        outcome = postcopy("verify", str(unreadable))
        assert outcome.returncode == 1
        assert "bytes cannot be read: Input/output error" in outcome.stdout
        assert one_line(outcome) == f"{unreadable} is damaged in one place; take it from a copy"

    def test_others(self, unreadable, tmp_path):
        out = tmp_path / "out"
        for command in (
            ("extract", str(unreadable), "--ram", str(out)),
            ("diff", str(unreadable), str(unreadable)),
        ):
            outcome = postcopy(*command)
            assert outcome.returncode == 1
            assert str(unreadable) in one_line(outcome)
            assert "cannot be read: Input/output error" in one_line(outcome)
        assert not out.exists()

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_head_and_manifest(self, path, tmp_path, monkeypatch, command):
        write_manifest(path)
        sector = BadSector(tmp_path, monkeypatch)
        for victim in (path, beside(path)):
            sector.put(victim, 0, PAGE)
            outcome = postcopy(command, str(path))
            assert outcome.returncode == 1
            told = outcome.stdout + outcome.stderr
            assert f"{victim}" in told
            assert "cannot be read: Input/output error" in told


class TestDiff:
    def test_equal_images_of_two_formats(self, tmp_path):
        a = write_image(tmp_path / "a", "stream", memory())
        b = write_image(tmp_path / "b", "mapped-ram", memory())
        outcome = postcopy("diff", str(a), str(b))
        assert (outcome.returncode, outcome.stdout) == (0, "the images are equal\n")

    def test_pages_that_differ_are_told_in_runs(self, path, tmp_path):
        other = memory()
        for page in (3, 4, 5, 47):
            other["ram"][page, 100] ^= 1
        del other["rom"]
        b = write_image(tmp_path / "b", "stream", other)
        found = json.loads(postcopy("diff", "--json", str(path), str(b)).stdout)
        assert not found["equal"]
        ram, rom = found["blocks"]
        assert (ram["pages"], ram["runs"]) == (4, [[3, 6], [47, 48]])
        assert rom["only_in"] == "a"
        text = postcopy("diff", str(path), str(b)).stdout
        assert "block ram: 4 pages in 2 runs" in text
        assert "block rom: only in A" in text


class TestExtract:
    def test_the_largest_block_and_one_by_name(self, path, tmp_path):
        out = tmp_path / "out"
        for arguments, name in (([], "ram"), (["--block", "rom"], "rom")):
            outcome = postcopy("extract", str(path), "--ram", str(out), *arguments)
            assert (outcome.returncode, outcome.stderr) == (0, "")
            assert out.read_bytes() == memory()[name].tobytes()
            assert stat.S_IMODE(out.stat().st_mode) == 0o600

    def test_zeros_are_holes(self, tmp_path):
        blocks = {"ram": np.zeros((4096, PAGE), np.uint8)}
        blocks["ram"][77] = 1
        path = write_image(tmp_path / "image", "mapped-ram", blocks)
        postcopy("extract", str(path), "--ram", str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == blocks["ram"].tobytes()
        assert (tmp_path / "out").stat().st_blocks * 512 < 100 * PAGE

    def test_a_damaged_image_is_not_extracted(self, path, tmp_path):
        write_manifest(path)
        flip(path, 8 * (path.stat().st_size - 5))
        outcome = postcopy("extract", str(path), "--ram", str(tmp_path / "out"))
        assert outcome.returncode == 1
        assert "do not agree" in one_line(outcome)
        assert not (tmp_path / "out").exists()

    def test_not_over_the_image_itself(self, path, tmp_path):
        before = path.read_bytes()
        (tmp_path / "link").symlink_to(path)
        for out in (path, tmp_path / "link"):
            outcome = postcopy("extract", str(path), "--ram", str(out))
            assert outcome.returncode == 3
            assert one_line(outcome).startswith(f"{out} is the image itself")
        assert path.read_bytes() == before

    def test_not_where_another_is_writing(self, path, tmp_path):
        out, half = tmp_path / "out", partial_name(tmp_path / "out")
        half.write_text("half of another's")
        with path_locked(out):
            outcome = postcopy("extract", str(path), "--ram", str(out))
            assert outcome.returncode == 3
            assert one_line(outcome).startswith(f"another process is writing {out};")
            assert half.read_text() == "half of another's"
        assert postcopy("extract", str(path), "--ram", str(out)).returncode == 0
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, "out"])

    def test_what_cannot_be_written_is_named_as_it_was_given(self, path, tmp_path):
        for out, why in (
            (tmp_path / "nowhere" / "out", "No such file or directory"),
            (path / "out", "Not a directory"),
        ):
            outcome = postcopy("extract", str(path), "--ram", str(out))
            assert outcome.returncode == 1
            assert one_line(outcome).startswith(f"{out}: {why}")

    def test_what_the_disk_does_not_take(self, path, tmp_path):
        out = tmp_path / "out"
        limit = resource.RLIMIT_FSIZE
        before = resource.getrlimit(limit)
        resource.setrlimit(limit, (4096, before[1]))  # its child has it, too
        try:
            outcome = postcopy("extract", str(path), "--ram", str(out))
        finally:
            resource.setrlimit(limit, before)
        assert outcome.returncode == 1
        assert one_line(outcome).startswith(f"{out}: File too large")
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_a_block_that_is_not_there(self, path, tmp_path):
        outcome = postcopy("extract", str(path), "--ram", str(tmp_path / "out"), "--block", "vga")
        assert outcome.returncode == 3
        assert one_line(outcome) == f"{path} has no block 'vga'; it has ram, rom"


class TestPrune:
    @pytest.fixture
    def image(self, tmp_path):
        path = tmp_path / "image"
        take_image(path, "mapped-ram", memory(), compressed=True)
        return path

    def test_an_image_or_its_store(self, image):
        outcome = postcopy("prune", str(image))
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert "0.0 MiB freed, " in outcome.stdout
        assert outcome.stdout.endswith("MiB kept for 1 images\n")
        store = image.parent / "postcopy-chunks"
        found = json.loads(postcopy("prune", "--json", str(store)).stdout)
        assert (found["store"], found["images"]) == (str(store), [str(image)])
        assert found["kept_bytes"] > found["freed_bytes"] == 0

    def test_what_would_be_freed_is_freed(self, image):
        store = image.parent / "postcopy-chunks"
        image.unlink()
        beside(image).unlink()
        would = postcopy("prune", "--dry-run", str(store)).stdout
        assert "MiB would be freed" in would
        assert postcopy("prune", str(store)).stdout == would.replace(" would be", "")
        assert "0.0 MiB freed" in postcopy("prune", str(store)).stdout

    def test_an_image_without_a_store(self, path):
        write_manifest(path)
        outcome = postcopy("prune", str(path))
        assert outcome.returncode == 3
        assert "no store to prune" in one_line(outcome)
