"""``--memory-block`` and ``--mem-path``: what they make, and what they refuse before anything is made."""

import contextlib

import pytest

from fakes.commands import Running, one_line, postcopy
from fakes.huge_pages import mounted, reserved
from fakes.memory_blocks import RunningBlocks
from fakes.waiting import wait_until

FAST, BIG = "name=fast,size=8M,page-size=2M", "name=big,size=24M"


@pytest.fixture
def fast_and_big(tmp_path):
    """Starts machines with two blocks: ``fast_and_big(NAME, option...)``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(reserved(8))

        def start(name, *options, blocks=(FAST, BIG), image=None):
            made = RunningBlocks(tmp_path, name, *options, blocks=blocks, image=image)
            return stack.enter_context(made)

        yield start


@pytest.mark.kvm
def test_a_guest_with_two_blocks_moves(fast_and_big, tmp_path):
    source = fast_and_big("source", "--workload", "hammer", "--smp", "2")
    target = fast_and_big("target", "--incoming", "defer", "--smp", "2")
    uri = f"unix:{tmp_path}/way"
    moved = postcopy("migrate", "--from", source.qmp, "--to", target.qmp, "--postcopy", "now", uri)
    assert moved.returncode == 0, moved.stderr
    assert target.ask("query-status")["return"]["running"] is True


@pytest.mark.kvm
def test_a_guest_whose_memory_is_files_in_a_hugetlbfs_moves(huge_pages, tmp_path):
    huge_pages(2 * 32)
    with (
        mounted(tmp_path / "huge") as directory,
        Running(tmp_path, "source", "--workload", "hammer", "--mem-path", directory) as source,
        Running(tmp_path, "target", "--incoming", "defer", "--mem-path", directory) as target,
    ):
        way = ("--postcopy", "now", f"unix:{tmp_path}/way")
        moved = postcopy("migrate", "--from", source.qmp, "--to", target.qmp, *way)
        assert moved.returncode == 0, moved.stderr
        assert target.ask("query-status")["return"]["running"] is True
        text = target.ask("x-query-ramblock")["return"]["human-readable-text"]
        assert [line.split()[1:3] for line in text.splitlines()[1:]] == [["2", "MiB"]]


@pytest.mark.kvm
@pytest.mark.parametrize("lazy", [["--lazy"], []], ids=["lazy", "eager"])
def test_a_restore_takes_blocks_and_their_order_from_the_image(fast_and_big, tmp_path, lazy):
    image = tmp_path / "image"
    source = fast_and_big("source", "--workload", "hammer")
    assert "return" in source.ask("migrate", uri=f"file:{image}")
    wait_until(lambda: source.migration_status() == "completed", 30, "the image")
    restored = fast_and_big("restored", *lazy, blocks=["name=fast,page-size=2M"], image=image)
    wait_until(lambda: restored.migration_status() == "completed", 30, "the restore")
    assert restored.ask("query-status")["return"]["running"] is True
    text = restored.ask("x-query-ramblock")["return"]["human-readable-text"]
    told = [line.split()[:3] for line in text.splitlines()[1:]]
    assert told == [["fast", "2", "MiB"], ["big", "4", "KiB"]]
    for block, why in (
        ("name=other", "it has no RAM block 'other'; it has 'fast', 'big'"),
        (
            "name=big,size=8M",
            "its RAM block 'big' has 24 MiB, and --memory-block says 8 MiB; leave",
        ),
    ):
        outcome = postcopy("restore", str(image), "--memory-block", block)
        assert outcome.returncode == 3
        assert why in one_line(outcome)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--memory-block", "size=8M"], "gives the RAM block no name; add name=NAME"),
        (["--memory-block", "name=a,hue=red"], "'hue=red' is no property of a RAM block; write"),
        (["--memory-block", "name=a,name=b"], "'name=b' is no property of a RAM block"),
        (["--memory-block", "name=a,size=red"], "'red' is no size"),
    ],
)
def test_what_cannot_be_read(options, why):
    outcome = postcopy("run", "--workload", "idle", *options)
    assert outcome.returncode == 2
    assert why in outcome.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--memory-block", "name=a"], "--memory-block name=a has no size; give size=SIZE"),
        (
            ["--memory-block", "name=a,size=8M", "--memory", "64M"],
            "--memory says 64 MiB, and the blocks of --memory-block have 8 MiB together; leave",
        ),
        (
            ["--memory-block", "name=a,size=8M", "--huge-pages"],
            "--huge-pages excludes --memory-block; give a block page-size=2M",
        ),
        (["--mem-path", "/proc"], "the memory path /proc is in a file system 'proc'; give"),
        (
            ["--memory-block", "name=a,size=8M,path=/dev/shm,page-size=2M"],
            "RAM block 'a' has page size 2M, and the files in /dev/shm have pages of 4K; leave",
        ),
        (
            ["--memory-block", "name=a,size=60G,page-size=2M"],
            "not enough free huge pages of 2048 KiB: 30720 are needed",
        ),
    ],
)
def test_refusals(options, why):
    outcome = postcopy("run", "--workload", "idle", *options)
    assert outcome.returncode == 3
    assert why in one_line(outcome)
