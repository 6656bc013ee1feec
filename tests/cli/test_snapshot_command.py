"""``postcopy snapshot`` of a machine that runs."""

import json
import stat

import pytest

from fakes.commands import one_line, postcopy
from postcopy.channel.path_lock import path_locked
from postcopy.channel.whole_file import partial_name
from postcopy.image.formats import open_image
from postcopy.image.manifest import Manifest
from postcopy.image.verify import find_damages

pytestmark = pytest.mark.kvm


def assert_runs_on(guest):
    assert guest.ask("query-status")["return"]["status"] == "running"
    states = guest.ask("query-migrate-capabilities")["return"]
    assert [each["capability"] for each in states if each["state"]] == []


@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
def test_an_image_is_taken_and_what_it_cost_is_told(guest, tmp_path, form):
    path = tmp_path / "image"
    outcome = postcopy("snapshot", "--from", guest.qmp, str(path), "--format", form)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    for text in ("pause of the guest", "longest write stall", "total time", "with data", form):
        assert text in outcome.stdout
    assert_runs_on(guest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(find_damages(path, Manifest.load(path))) == []
    with open_image(path) as image:
        assert image.format == form
        assert {each.name for each in image.devices} >= {"cpu", "timer", "globalstate"}
    assert sorted(each.name for each in tmp_path.glob("image*")) == ["image", "image.manifest.json"]


def test_json_is_an_object_a_line_and_never_runs_backwards(guest, tmp_path):
    outcome = postcopy("snapshot", "--json", "--from", guest.qmp, str(tmp_path / "image"))
    *looks, result = map(json.loads, outcome.stdout.splitlines())
    assert {look["event"] for look in looks} == {"progress"}
    for name in ("fraction", "elapsed_ms"):
        values = [look[name] for look in looks]
        assert values == sorted(values)
    assert (result["event"], result["status"]) == ("result", "completed")
    assert result["pause_us"] > 0
    assert result["data_bytes"] + result["zero_bytes"] == result["ram_bytes"] == 64 << 20


def test_a_child_shares_what_has_not_changed(guest, tmp_path):
    arguments = ["snapshot", "--json", "--from", guest.qmp]
    postcopy(*arguments, str(tmp_path / "a"), "--compress", "zstd")
    guest.ask("stop")
    postcopy(*arguments, str(tmp_path / "b"), "--parent", str(tmp_path / "a"))
    (tmp_path / "deeper").mkdir()
    outcome = postcopy(*arguments, str(tmp_path / "deeper/c"), "--parent", str(tmp_path / "b"))
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert (result["new_bytes"], result["parent"]) == (0, "../b")
    assert result["reused_bytes"] > 0
    found = json.loads(
        postcopy("diff", "--json", str(tmp_path / "b"), str(tmp_path / "deeper/c")).stdout
    )
    assert found["pages"] == 0


def test_a_name_that_is_taken_is_refused_beforehand(guest, tmp_path):
    (tmp_path / "image").write_text("mine")
    outcome = postcopy("snapshot", "--from", guest.qmp, str(tmp_path / "image"))
    assert outcome.returncode == 3
    assert "exists; remove it, or give another path" in one_line(outcome)
    assert (tmp_path / "image").read_text() == "mine"


def test_a_name_that_is_being_written_is_refused_beforehand(guest, tmp_path):
    half = partial_name(tmp_path / "image")
    with path_locked(tmp_path / "image"):
        half.write_text("half of another's")
        outcome = postcopy("snapshot", "--from", guest.qmp, str(tmp_path / "image"))
        assert outcome.returncode == 3
        assert one_line(outcome) == (
            f"another process is writing {tmp_path}/image; wait until that is done, or give "
            "another path"
        )
        assert half.read_text() == "half of another's"
    assert_runs_on(guest)


def test_a_parent_without_a_store_is_refused_beforehand(guest, tmp_path):
    postcopy("snapshot", "--from", guest.qmp, str(tmp_path / "a"))
    outcome = postcopy(
        "snapshot", "--from", guest.qmp, str(tmp_path / "b"), "--parent", str(tmp_path / "a")
    )
    assert outcome.returncode == 3
    assert "has no store of chunks to share" in one_line(outcome)


def test_a_folder_that_is_not_there_is_refused_beforehand(guest, tmp_path):
    outcome = postcopy("snapshot", "--from", guest.qmp, str(tmp_path / "nowhere/image"))
    assert outcome.returncode == 3
    assert "is no folder" in one_line(outcome)
    assert_runs_on(guest)


def test_capabilities_are_put_back_as_they_were(guest, tmp_path):
    on = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]
    guest.ask("migrate-set-capabilities", capabilities=on)
    assert postcopy("snapshot", "--from", guest.qmp, str(tmp_path / "image")).returncode == 0
    states = guest.ask("query-migrate-capabilities")["return"]
    found = {each["capability"] for each in states if each["state"]}
    assert found == {"events", "postcopy-ram"}


def test_disks_are_those_of_a_real_qemu(guest, tmp_path):
    line = ["snapshot", "--from", guest.qmp, str(tmp_path / "image"), "--disks", str(tmp_path)]
    assert "leave --disks out" in one_line(postcopy(*line))
    assert not list(tmp_path.glob("image*"))
