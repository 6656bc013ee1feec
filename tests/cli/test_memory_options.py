"""``--memory-block`` and ``--mem-path``: what they make, and what they refuse before anything is made."""

import contextlib

import pytest

from fakes.commands import Running, one_line, postcopy
from fakes.huge_pages import reserved

FAST, BIG = "name=fast,size=8M,page-size=2M", "name=big,size=24M"


class RunningBlocks(Running):
    """A ``postcopy run`` without ``--memory``."""

    def _run_line(self):
        return [*self.command, "run", "--qmp", self.qmp, *self._options]


@pytest.fixture
def fast_and_big(tmp_path):
    """Starts machines with two blocks: ``fast_and_big(NAME, option...)``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(reserved(8))

        def start(name, *options, blocks=(FAST, BIG)):
            given = [part for block in blocks for part in ("--memory-block", block)]
            return stack.enter_context(RunningBlocks(tmp_path, name, *given, *options))

        yield start


@pytest.mark.kvm
def test_a_guest_with_two_blocks_moves(fast_and_big, tmp_path):
    source = fast_and_big("source", "--workload", "hammer", "--smp", "2")
    target = fast_and_big("target", "--incoming", "defer", "--smp", "2")
    uri = f"unix:{tmp_path}/way"
    moved = postcopy("migrate", "--from", source.qmp, "--to", target.qmp, "--postcopy", "now", uri)
    assert moved.returncode == 0, moved.stderr
    assert target.ask("query-status")["return"]["running"] is True


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
