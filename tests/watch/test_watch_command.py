"""Watching real machines: the figures are query-migrate's, and a machine may end at any time."""

import asyncio
import contextlib
import dataclasses
import itertools
import subprocess
import urllib.request
from pathlib import Path

import pytest

from fakes.commands import POSTCOPY, Running, one_line, pair, postcopy
from fakes.pair import NEVER_ENDS
from fakes.real_qemu import QemuProcess
from fakes.waiting import wait_until
from postcopy.cli.watch_command import WatchBeside
from postcopy.statistics import MAP_STATES, WAIT_CAUSES
from postcopy.watch import sampler as sampling
from postcopy.watch.recording import read
from postcopy.watch.sample import Sample
from postcopy.watch.sampler import Sampler

ROOT = Path(__file__).resolve().parents[2]
PAGES = (64 << 20) >> 12


def watch(source, destination, on_sample, **options):
    """All samples, ``on_sample(its number)`` called after each, until it returns true."""

    async def run():
        sampler = Sampler(source, destination, interval_s=0.02, **options)
        found = []
        async with asyncio.timeout(60):
            try:
                await sampler.connect()
                async with contextlib.aclosing(sampler.samples()) as samples:
                    async for sample in samples:
                        found.append(sample)
                        if await asyncio.to_thread(on_sample, len(found) - 1):
                            return found
            finally:
                await sampler.close()
        return found

    return asyncio.run(run())


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_the_samples_of_a_postcopy(tmp_path):
    with pair(tmp_path, "hammer") as (source, target):
        capabilities = ["postcopy-ram", "postcopy-blocktime"]
        switched = [{"capability": name, "state": True} for name in capabilities]
        for side in (source, target):
            side.ask("migrate-set-capabilities", capabilities=switched)
        limits = {**NEVER_ENDS, "max-postcopy-bandwidth": 16 << 20}
        source.ask("migrate-set-parameters", **limits)

        def act(count):
            if count == 1:
                target.ask("migrate-incoming", uri=f"unix:{tmp_path}/way")
                source.ask("migrate", uri=f"unix:{tmp_path}/way")
            if count == 11:
                source.ask("migrate-start-postcopy")

        found = watch(source.qmp, target.qmp, act)
        info = source.ask("query-migrate")["return"]
        there = target.ask("query-migrate")["return"]
    last = found[-1]
    assert last.status == "completed"
    assert last.fraction == 1
    assert last.transferred_bytes == info["ram"]["transferred"]
    assert last.total_bytes == info["ram"]["total"]
    assert last.faults == info["ram"]["postcopy-requests"]
    assert last.downtime_ms == info["x-postcopy"]["guest-downtime-us"] / 1000
    assert list(last.latency) == there["postcopy-latency-dist"]
    assert list(last.blocktime_us) == there["x-postcopy"]["blocktime-us"]
    assert last.blocktime_causes_us == {"page": last.blocktime_us}
    assert last.map["pages"] == {"in-place": PAGES}
    fractions = [sample.fraction for sample in found]
    assert fractions == sorted(fractions)
    assert all(sum(sample.map["pages"].values()) == PAGES for sample in found)
    sides = {sample.map["side"] for sample in found if sample.phase == "postcopy"}
    assert sides == {"destination"}
    words = [sample.waits_for for sample in found if sample.phase == "postcopy"]
    assert any("the last page" in each for each in words)


@pytest.mark.kvm
def test_it_survives_the_end_of_either_machine(tmp_path):
    with pair(tmp_path) as (source, target):

        def act(count):
            if count == 1:
                source.process.kill()
                source.process.wait()
            if count == 29:
                target.process.kill()
                target.process.wait()

        found = watch(source.qmp, target.qmp, act)
    assert found[1].notes == ()
    assert any("the source at" in note for note in found[20].notes)
    assert not any("the destination at" in note for note in found[20].notes)
    assert found[20].source == found[1].source
    assert len(found[-1].notes) == 2


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_the_samples_of_a_snapshot(tmp_path):
    """How much of it a sample meets is a matter of time: the end is not."""
    with Running(tmp_path, "guest", "--workload", "hammer") as guest:

        def act(count):
            if count == 1:
                guest.ask("x-snapshot", uri=f"file:{tmp_path}/image")
            return guest.migration_status() == "completed" and count > 2

        found = watch(guest.qmp, None, act)
        last = watch(guest.qmp, None, [True].__getitem__)[0]
    assert {sample.phase for sample in found} <= {"setup", "saving", "completed"}
    assert last.status == "completed"
    assert "a snapshot has been taken" in last.source
    assert all(sum(sample.map["pages"].values()) == PAGES for sample in found)


@pytest.mark.qemu("7.2", "11.1")
def test_a_stock_qemu_has_no_map(tmp_path):
    arguments = ["-machine", "none", "-qmp", f"unix:{tmp_path}/q,server=on,wait=off"]
    with QemuProcess(tmp_path, arguments):
        found = watch(f"unix:{tmp_path}/q", None, [False, False, True].__getitem__)
    assert [sample.map for sample in found] == [None] * 3
    assert any("a stock QEMU does not tell where its pages are" in n for n in found[-1].notes)
    assert found[-1].phase == "setup"


@pytest.mark.kvm
def test_the_command_records_and_ends_when_no_machine_answers(tmp_path):
    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        line = [*POSTCOPY, "watch", "--from", guest.qmp, "--record", str(tmp_path / "run")]
        watching = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        wait_until((tmp_path / "run").exists, 20, "a record")
        wait_until(lambda: (tmp_path / "run").read_text().count("\n") > 3, 20, "samples")
        guest.process.kill()
        guest.process.wait()
        out, _ = watching.communicate(timeout=20)
    assert watching.returncode == 0
    assert "nothing has been ordered" not in out
    assert "does not answer any more" in out
    found = read(tmp_path / "run")
    assert found.cut_at is None
    assert found.samples[0].map["pages"] == {"at-source": PAGES}


@pytest.mark.kvm
def test_a_watch_beside_a_command_opens_its_page_and_records(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    async def run(qmp):
        async with WatchBeside(qmp, qmp, tmp_path / "run", with_page=True):
            lines = (tmp_path / "run").read_text
            await asyncio.to_thread(wait_until, lambda: lines().count("\n") > 3, 20, "samples")
            return await asyncio.to_thread(page_at, opened[0])

    with Running(tmp_path, "guest", "--workload", "idle") as guest:
        assert "<h1>Migration</h1>" in asyncio.run(run(guest.qmp))
    assert len(read(tmp_path / "run").samples) >= 3


def page_at(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


def test_a_machine_that_is_not_there_is_refused(tmp_path):
    outcome = postcopy("watch", "--from", f"unix:{tmp_path}/none")
    assert outcome.returncode == 1
    assert "cannot reach QMP" in one_line(outcome)


class Machine:
    """A machine that says the same again and again."""

    def __init__(self, sent):
        self.sent = sent

    async def execute(self, command):
        if command == "query-status":
            return {"status": "running", "x-owner": "ours"}
        return {"side": "source", "cells": "s", "pages": {"at-source": 1}}

    async def migration_info(self):
        ram = {"transferred": next(self.sent), "remaining": 1 << 20, "total": 1 << 30}
        return {"status": "active", "total-time": 5, "ram": ram}

    async def close(self):
        pass


@pytest.mark.parametrize(("grows", "named"), [(0, True), (1, False)])
def test_a_standstill_is_named_and_a_slow_link_is_not(monkeypatch, grows, named):
    now = itertools.count(0.0)
    monkeypatch.setattr(sampling.time, "monotonic", now.__next__)

    async def run():
        sampler = Sampler("unix:a", None, interval_s=0.001)
        sampler.source._machine = Machine(itertools.count(7, grows))
        sampler.source.is_there = True
        found = []
        async for sample in sampler.samples():
            found.append(sample)
            if len(found) == 5:
                return found
        return found

    found = asyncio.run(run())
    assert ("nothing has been sent for" in found[-1].waits_for) is named


def test_the_page_of_the_manual_has_each_member_and_each_state():
    page = (ROOT / "docs/watch.md").read_text()
    for each in dataclasses.fields(Sample):
        assert f"| `{each.name}` | {each.metadata['meaning']} |" in page
    for name, meaning in WAIT_CAUSES.items():
        assert f"| `{name}` | {meaning} |" in page
    for letter, name in MAP_STATES.items():
        assert f"| {name} | `{letter}` |" in page
