"""Machines and their engines with next to no room for open files do their work, or say why not."""

import re
import resource
from pathlib import Path

import pytest

from fakes.commands import DEADLINE_S, POSTCOPY, Running, postcopy
from fakes.pair import engines
from fakes.waiting import wait_until

pytestmark = pytest.mark.kvm


class Limited(Running):
    """A machine that cannot have more than so many files open."""

    def __init__(self, most, *arguments):
        super().__init__(*arguments)
        self.command = ["prlimit", f"--nofile={most}", *POSTCOPY]


@pytest.mark.parametrize("most", [64, 16])
def test_a_guest_moves(tmp_path, most):
    with (
        Limited(most, tmp_path, "source", "--workload", "hammer") as source,
        Limited(most, tmp_path, "target", "--incoming", "tcp:127.0.0.1:0") as target,
    ):
        where = target.ask("query-migrate")["return"]["socket-address"][0]
        uri = f"tcp:127.0.0.1:{where['port']}"
        options = ["--from", source.qmp, "--to", target.qmp, "--postcopy", "now"]
        moved = postcopy("migrate", *options, uri)
        assert (moved.returncode, moved.stderr) == (0, "")
        assert target.ask("query-status")["return"]["running"]


def test_an_engine_without_room_says_so_and_the_guest_runs_on(tmp_path):
    with Running(tmp_path, "source", "--workload", "hammer") as source:
        wait_until(lambda: engines(source.process.pid), DEADLINE_S, "its engine")
        (engine,) = engines(source.process.pid)
        tasks = Path(f"/proc/{engine}/task")
        wait_until(lambda: len(list(tasks.iterdir())) > 2, DEADLINE_S, "its link")
        resource.prlimit(engine, resource.RLIMIT_NOFILE, (0, 0))
        moved = postcopy("migrate", "--from", source.qmp, f"file:{tmp_path}/image")
        assert moved.returncode != 0
        assert re.search("Too many open files|file descriptors arrived", moved.stderr)
        assert source.ask("query-status")["return"]["running"]
