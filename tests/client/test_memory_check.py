"""Other RAM blocks at the other end are refused by name, with the cure, before anything is sent."""

import pytest

from fakes.commands import one_line, postcopy
from fakes.huge_pages import reserved
from fakes.memory_blocks import RunningBlocks

pytestmark = pytest.mark.kvm

A, B = "name=a,size=8M", "name=b,size=4M"
CURE = "start the destination with --memory-block name=a,size=8M,page-size=4K --memory-block name=b"


def migrate(source, target, uri, *options):
    return postcopy("migrate", "--from", source.qmp, "--to", target.qmp, *options, f"unix:{uri}")


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([A], "the destination has no RAM block 'b'; " + CURE),
        (
            [A, "name=b,size=8M"],
            "RAM block 'b' has 4 MiB in pages of 4 KiB at the source, and 8 MiB",
        ),
        ([A, B, "name=c,size=2M"], "the source has no RAM block 'c'; " + CURE),
        ([B, A], "the RAM blocks have another order at the destination; " + CURE),
    ],
    ids=["lacking", "size", "more", "order"],
)
def test_other_blocks(tmp_path, blocks, why):
    with (
        RunningBlocks(tmp_path, "source", "--workload", "idle", blocks=[A, B]) as source,
        RunningBlocks(tmp_path, "target", "--incoming", "defer", blocks=blocks) as target,
    ):
        outcome = migrate(source, target, tmp_path / "way")
        assert outcome.returncode == 3
        assert why in one_line(outcome)
        for side in (source, target):
            assert side.migration_status() is None  # neither was ordered anything
        assert source.ask("query-status")["return"]["running"] is True


def test_other_page_sizes_are_refused_for_postcopy_alone(tmp_path):
    huge = "name=b,size=4M,page-size=2M"
    with (
        reserved(2),
        RunningBlocks(tmp_path, "source", "--workload", "idle", blocks=[A, B]) as source,
        RunningBlocks(tmp_path, "target", "--incoming", "defer", blocks=[A, huge]) as target,
    ):
        outcome = migrate(source, target, tmp_path / "way", "--postcopy", "now")
        assert outcome.returncode == 3
        why = "RAM block 'b' has 4 MiB in pages of 4 KiB at the source, and 4 MiB in pages of 2048 KiB"
        assert why in one_line(outcome)
        outcome = migrate(source, target, tmp_path / "way")
        assert outcome.returncode == 0, outcome.stderr
        assert target.ask("query-status")["return"]["running"] is True


def test_both_monitors_tell_of_the_blocks(tmp_path):
    with RunningBlocks(tmp_path, "guest", "--workload", "idle", blocks=[A, B]) as guest:
        text = guest.ask("x-query-ramblock")["return"]["human-readable-text"]
        rows = [line.split() for line in text.splitlines()]
        assert rows[0] == ["Block", "Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"]
        assert [row[:6] for row in rows[1:]] == [
            ["a", "4", "KiB", f"{0:#018x}", f"{8 << 20:#018x}", f"{8 << 20:#018x}"],
            ["b", "4", "KiB", f"{8 << 20:#018x}", f"{4 << 20:#018x}", f"{4 << 20:#018x}"],
        ]
        asked = {"command-line": "info ramblock"}
        told = guest.ask("human-monitor-command", **asked)["return"]
        assert told.split() == text.split()
