"""A migration that is to have ended in a given time, and what is done if it will not."""

import asyncio
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.commands import pair, postcopy
from postcopy import Machine, MigrationCancelled
from postcopy.client.deadline import Deadline, DeadlineJudge, needed_s
from postcopy.client.progress import Phase, Progress
from postcopy.status import Status

MIB = 1 << 20


def at(round_, elapsed_s, left, *, rate=100, dirty=10, phase=Phase.PRECOPY):
    """A moment of a migration; sizes in MiB."""
    return Progress(
        phase=phase,
        status=Status.ACTIVE,
        elapsed_ms=round(elapsed_s * 1000),
        fraction=0.0,
        round=round_,
        transferred_bytes=0,
        remaining_bytes=left * MIB,
        total_bytes=1 << 40,
        rate_bytes=rate * MIB,
        dirty_rate_bytes=dirty * MIB,
        faults=0,
        faults_per_s=0,
    )


class TestWhatIsNeeded:
    def test_nothing_if_the_rest_fits_into_the_stop(self):
        assert needed_s(at(2, 1, 30), 300) == 0

    def test_one_round_more_for_each_time_that_the_rest_shrinks(self):
        # 1000 MiB take 10 s, in which 100 MiB are written; they take 1 s; 10 MiB are left: 0.1 s.
        assert needed_s(at(2, 1, 1000), 100) == pytest.approx(11)

    def test_no_end_if_the_guest_writes_faster_than_its_memory_is_sent(self):
        assert needed_s(at(2, 1, 1000, dirty=100), 300) == math.inf
        assert needed_s(at(2, 1, 1000, rate=0), 300) == math.inf

    @given(
        st.integers(1, 1 << 20), st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000)
    )
    def test_it_ends(self, left, rate, dirty, stop_ms):
        assert needed_s(at(2, 1, left, rate=rate, dirty=dirty), stop_ms) >= 0


class TestJudge:
    def judge(self, *moments, within_s=60.0):
        judge = DeadlineJudge(Deadline(within_s, 300, "cancel"))
        return [judge.judge(moment) for moment in moments]

    def test_one_that_ends_in_time_is_left_alone(self):
        assert self.judge(*(at(n, n, 1000 >> n) for n in range(1, 9))) == [None] * 8

    def test_the_first_pass_is_not_judged_nor_the_midst_of_a_round(self):
        late = {"dirty": 500}
        found = self.judge(
            at(1, 1, 9000, **late), at(1, 9, 1000, **late), at(2, 10, 5000, **late),
            at(2, 11, 4000, **late), at(2, 12, 3000, **late),
        )  # fmt: skip
        assert found == [None] * 5

    def test_two_rounds_in_a_row_are_enough_and_it_is_said_once(self):
        late = {"dirty": 500}
        found = self.judge(*(at(n, 10 * n, 5000, **late) for n in (2, 3, 4)))
        assert [each is not None for each in found] == [False, True, False]
        assert (
            "5000 MiB are left after 30.0 of 60 s, the guest writes 500 MiB/s, and 100 MiB/s"
            in (found[1].why)
        )
        assert found[1].stop_ms == 300 + 2 * 50_000

    def test_a_round_that_was_disturbed_is_forgiven(self):
        late, well = {"dirty": 500}, {"dirty": 1}
        moments = [at(n, n, 500, **(late if n % 2 else well)) for n in range(2, 9)]
        assert self.judge(*moments) == [None] * 7

    def test_at_the_deadline_it_is_over_whatever_the_round(self):
        assert self.judge(at(1, 61, 100))[0] is not None
        assert self.judge(at(5, 61, 100, phase=Phase.POSTCOPY)) == [None]


async def move(source, target, then, **more):
    """Migrate a guest that writes faster than its memory is sent."""
    async with Machine.connect(source.qmp) as ours, Machine.connect(target.qmp) as theirs:
        before = await ours.execute("query-migrate-parameters")
        migration = await ours.migrate(
            to=theirs, bandwidth=64 * MIB, deadline=Deadline(60.0, 1, then), **more
        )
        try:
            return await migration.result()
        finally:
            assert await ours.execute("query-migrate-parameters") == before


@pytest.mark.kvm
class TestBetweenMachines:
    def test_postcopy(self, tmp_path):
        with pair(tmp_path, "hammer") as (source, target):
            result = asyncio.run(move(source, target, "postcopy"))
            assert result.postcopy_bytes > 0
            assert target.ask("query-status")["return"]["status"] == "running"

    def test_cancel(self, tmp_path):
        with pair(tmp_path, "hammer") as (source, target):
            with pytest.raises(
                MigrationCancelled, match=r"since it would not end in time: .*MiB are left"
            ):
                asyncio.run(move(source, target, "cancel"))
            assert source.ask("query-status")["return"]["status"] == "running"

    def test_force(self, tmp_path):
        with pair(tmp_path, "hammer") as (source, target):
            result = asyncio.run(move(source, target, "force"))
            assert result.postcopy_bytes == 0
            assert target.ask("query-status")["return"]["status"] == "running"
            assert source.ask("query-status")["return"]["status"] != "running"

    def test_the_command(self, tmp_path):
        with pair(tmp_path, "hammer") as (source, target):
            line = ["migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way"]
            line += ["--bandwidth", "64M", "--within", "60s", "--max-downtime", "1ms"]
            outcome = postcopy(*line, "--then", "cancel")
            assert outcome.returncode == 1
            assert "since it would not end in time" in outcome.stderr.splitlines()[-1]
            outcome = postcopy(*line, "--json")
            assert outcome.returncode == 0, outcome.stderr
            assert json.loads(outcome.stdout.splitlines()[-1])["postcopy_bytes"] > 0

    @pytest.mark.parametrize("value", ["60", "0s", "-1s", "xs", "1e400s"])
    def test_a_time_without_a_unit_or_sense(self, value):
        outcome = postcopy("migrate", "--from", "unix:/none", "tcp:h:1", "--within", value)
        assert outcome.returncode == 2
        assert "give it with its unit, such as 300ms, 60s or 5min" in outcome.stderr
