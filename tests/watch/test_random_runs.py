"""In a thousand migrations at random nothing that is shown ever runs backwards."""

import asyncio
import contextlib
import itertools
import json
import secrets

import pytest

from fakes.random_migrations import RandomMigration
from postcopy.errors import CannotConnect, ChannelBroken
from postcopy.watch import sampler as sampling
from postcopy.watch.sample import Sample
from postcopy.watch.sampler import Sampler

NEVER_LESS = ("t_ms", "fraction", "round", "elapsed_ms", "transferred_bytes")


class Side:
    """One machine: says what it is told to; None: it is gone, until it says something again."""

    def __init__(self):
        self.answer = {}

    async def execute(self, command):
        if self.answer is None:
            raise ChannelBroken("gone")
        if command == "query-migrate-capabilities":
            return [{"capability": "postcopy-ram", "state": True}]
        if command == "query-status":
            return {"status": "running", "x-owner": "ours"}
        return {"side": "source", "cells": "s", "pages": {"at-source": 1}}

    async def migration_info(self):
        return self.answer

    async def close(self):
        pass


async def samples_of(migration, monkeypatch):
    """All samples of one migration."""
    sides = {"unix:a": Side(), "unix:b": Side()}

    async def connect(address):
        if sides[address].answer is None:
            raise CannotConnect("gone")
        return sides[address]

    monkeypatch.setattr(sampling.Machine, "connect", connect)
    now = itertools.count(0.0, 0.4)
    monkeypatch.setattr(sampling.time, "monotonic", now.__next__)
    sampler = Sampler("unix:a", "unix:b", interval_s=0)
    await sampler.connect()
    found = []
    async with contextlib.aclosing(sampler.samples()) as samples:
        for sides["unix:a"].answer, sides["unix:b"].answer in migration.answers():
            try:
                found.append(await anext(samples))
            except StopAsyncIteration:
                break
    return found


def check(samples):
    for before, after in itertools.pairwise(samples):
        for name in NEVER_LESS:
            assert getattr(after, name) >= getattr(before, name), name
        now = after.blocktime_causes_us or {}
        for cause, waited_us in (before.blocktime_causes_us or {}).items():
            assert all(a <= b for a, b in zip(waited_us, now[cause], strict=True)), cause
    for sample in samples:
        assert 0 <= sample.fraction <= 1
        assert (sample.fraction == 1) is (sample.phase == "completed")
        assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


@pytest.mark.parametrize("part", range(10))
def test_nothing_runs_backwards_in_a_thousand_runs(part, monkeypatch):
    del part
    for seed in (secrets.randbits(64) for _ in range(100)):
        try:
            samples = asyncio.run(samples_of(RandomMigration(seed), monkeypatch))
            check(samples)
        except AssertionError as error:
            raise AssertionError(f"with the seed {seed}: {error}") from error
        assert samples
