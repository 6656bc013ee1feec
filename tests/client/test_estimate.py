"""What a migration would take, by reckoning, and beside real ones."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.commands import Running, one_line, pair, postcopy
from postcopy import Machine
from postcopy.client.estimate import estimate
from postcopy.client.migration_model import Writes, faults_of, reckon, rounds_of
from postcopy.errors import Refused, WrongState

MIB = 1 << 20


def writes(short, long):
    """MiB in 0.25 s and in 1 s."""
    return Writes(0.25, 1.0, round(short * MIB), round(long * MIB))


class TestWhatIsWritten:
    def test_always_other_pages(self):
        assert writes(25, 100).in_time(3) == pytest.approx(300 * MIB)

    def test_the_same_pages_again_and_again(self):
        assert writes(32, 32).in_time(0.01) <= 32 * MIB
        assert writes(32, 32).in_time(100) == pytest.approx(32 * MIB)

    def test_something_between(self):
        # 64 MiB that are written so that a quarter of a second leaves half of them out.
        found = writes(32, 60)
        assert found.in_time(0.25) == pytest.approx(32 * MIB)
        assert found.in_time(1) == pytest.approx(60 * MIB, rel=0.01)
        assert found.in_time(1000) == pytest.approx(64 * MIB, rel=0.01)

    def test_a_rate_that_is_told(self):
        found = Writes.at_rate(100 * MIB, 250 * MIB)
        assert found.in_time(2) == pytest.approx(200 * MIB)
        assert found.in_time(3) == 250 * MIB
        assert str(found) == "100 MiB/s, to 250 MiB"

    def test_nothing(self):
        assert writes(0, 0).in_time(5) == 0

    @given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.floats(0, 1e5), st.floats(0, 1e5))
    def test_a_longer_time_has_not_less(self, short, long, one, other):
        found = writes(short, long)
        low, high = sorted((one, other))
        assert 0 <= found.in_time(low) <= found.in_time(high) + 1


class TestRounds:
    def test_each_has_what_is_written_from_chunk_to_chunk(self):
        # One chunk, which is protected at the start of each round: 40 MiB take 0.4 s; 4 MiB are written
        # then, 0.04 s; 0.4 MiB are a stop of 4 ms.  Half a chunk's time of writes is held back.
        found = reckon(40 * MIB, writes(2.5, 10), 100 * MIB, max_downtime_ms=4)
        assert (found.converges, found.rounds, found.downtime_ms) == (True, 2, 4)
        assert found.precopy_s == pytest.approx(0.38 + 0.038 + 0.0038, rel=0.01)
        assert found.precopy_bytes == pytest.approx(42.2 * MIB, rel=0.01)
        assert found.postcopy_s == pytest.approx(0.4)
        assert found.postcopy_late_s == pytest.approx(0.418)
        assert found.postcopy_late_bytes == pytest.approx(3.8 * MIB, rel=0.01)

    def test_of_many_chunks_half_a_round_is_written_to(self):
        # Of 64 GiB a chunk is written to for half the first round, and for the other half of the next.
        found = rounds_of(64 << 30, Writes.at_rate(50 * MIB), 100 * MIB, 1 << 30)
        first_s = (64 << 10) / 100
        assert found.first_left_bytes == pytest.approx(50 * MIB * first_s / 2, rel=0.01)
        assert found.sent[1] == pytest.approx(found.sent[0] / 3, rel=0.01)
        assert found.converges

    def test_a_guest_that_writes_faster_has_no_end(self):
        found = reckon(1000 * MIB, writes(50, 200), 100 * MIB)
        assert (found.converges, found.in_time, found.precopy_s) == (False, False, None)
        assert found.downtime_ms == pytest.approx(10_000, rel=0.05)
        assert "does not converge" in found.lines()[0]

    def test_what_is_written_again_and_again_may_be_small_enough(self):
        found = reckon(1000 * MIB, writes(20, 20), 100 * MIB, max_downtime_ms=300)
        assert (found.converges, found.rounds, found.downtime_ms) == (True, 1, 200)
        assert not reckon(1000 * MIB, writes(20, 20), 100 * MIB, max_downtime_ms=100).converges
        faster = reckon(1000 * MIB, writes(20, 20), 100 * MIB, max_downtime_ms=100,
                        switchover_bandwidth=400 * MIB)  # fmt: skip
        assert (faster.converges, faster.downtime_ms) == (True, 50)

    def test_it_may_converge_too_late(self):
        found = reckon(1000 * MIB, writes(0, 0), 100 * MIB, within_s=5)
        assert (found.converges, found.in_time) == (True, False)
        assert "later than 5 s" in found.lines()[0]

    @given(
        st.integers(1, 1 << 20), st.integers(0, 1 << 14), st.integers(0, 1 << 14),
        st.integers(1, 1 << 14), st.integers(0, 5000),
    )  # fmt: skip
    def test_it_ends(self, memory, short, long, bandwidth, downtime):
        found = reckon(memory * MIB, writes(short, long), bandwidth * MIB, max_downtime_ms=downtime)
        assert found.converges is (found.precopy_s is not None)
        assert not found.converges or found.downtime_ms <= max(downtime, 1)


class TestFaults:
    def test_half_of_what_is_touched_has_come(self):
        # 100 MiB are touched while they come, in 1 s; a fault costs nothing, and so nothing is held up.
        found = faults_of(100 * MIB, Writes.at_rate(100 * MIB), 1.0, 0.0)
        assert (found.count, found.wait_s) == (100 * MIB // 4096 // 2, 0)

    def test_who_waits_touches_nothing(self):
        found = faults_of(100 * MIB, Writes.at_rate(1000 * MIB), 1.0, 0.01)
        assert found.count < 100
        assert found.wait_s < 1.0

    def test_nothing_is_missing(self):
        assert faults_of(0, Writes.at_rate(100 * MIB), 0.0, 0.001).count == 0


class Told:
    """A machine that answers what a test says."""

    def __init__(self, **answers):
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}

    async def execute(self, command, arguments=None):
        return self.answers[command]


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(WrongState, match=r"under way \(active\)"):
        asyncio.run(estimate(Told(query_migrate={"status": "active"})))
    idle = Told(query_migrate={}, query_migrate_parameters={"max-bandwidth": 0})
    with pytest.raises(Refused, match="give --bandwidth"):
        asyncio.run(estimate(idle))


@pytest.mark.kvm
class TestBesideRealOnes:
    async def told(self, source, **options):
        async with Machine.connect(source.qmp) as machine:
            before = await machine.execute("query-migrate-parameters")
            found = await machine.estimate(**options)
            assert await machine.execute("query-migrate-parameters") == before
            assert await machine.migration_info() == {}
            return found

    def test_a_guest_that_writes_too_fast(self, tmp_path):
        with pair(tmp_path, "hammer") as (source, target):
            limits = {"bandwidth": 8 * MIB, "max_downtime_ms": 10}
            assert not asyncio.run(self.told(source, **limits)).converges
            line = ["migrate", "--from", source.qmp, "--to", target.qmp, f"unix:{tmp_path}/way"]
            line += ["--bandwidth", "64M", "--within", "60s", "--max-downtime", "10ms"]
            outcome = postcopy(*line, "--then", "cancel")
            assert "since it would not end in time" in outcome.stderr

    def test_a_guest_that_stands_still(self, tmp_path):
        with pair(tmp_path) as (source, target):
            source.ask("stop")
            found = asyncio.run(self.told(source, max_downtime_ms=300))
            assert (found.converges, found.rounds, found.downtime_ms) == (True, 1, 0)
            outcome = postcopy("migrate", "--from", source.qmp, "--to", target.qmp, "--json")
            assert outcome.returncode == 3  # neither a URI nor --estimate
            assert "give its URI" in one_line(outcome)
            way = f"unix:{tmp_path}/way"
            assert (
                postcopy("migrate", "--from", source.qmp, "--to", target.qmp, way).returncode == 0
            )

    def test_the_command(self, tmp_path):
        with Running(tmp_path, "source", "--workload", "idle") as source:
            line = ["migrate", "--from", source.qmp, "--estimate", "--bandwidth", "1G"]
            outcome = postcopy(*line)
            assert outcome.returncode == 0, outcome.stderr
            assert outcome.stdout.startswith("precopy converges: 1 rounds, ")
            told = json.loads(postcopy(*line, "--json", "--within", "60s").stdout)
            assert (told["converges"], told["bandwidth"]) == (True, 1 << 30)
            assert told["writes"]["mode"] == "dirty-bitmap"
