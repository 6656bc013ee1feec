"""The yardstick of demand faults runs: it builds the restore's pager from parts that may change."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sleepless
from postcopy.errors import HostCannot
from postcopy.kernel.userfaultfd import MISSING_FEATURES, Userfaultfd

ROOT = Path(__file__).parents[2]


def test_both_handlers_serve_every_page():
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
    try:
        Userfaultfd.open(MISSING_FEATURES).close()
    except HostCannot as error:
        pytest.skip(f"needs userfaultfd: {error}")
    command = [sys.executable, "-m", "benchmarks.demand_faults", "--mib", "1", "--rounds", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) - {"c, awake"} == {"c", "postcopy", "p50"}


class TestSomebodyKeepsTheCpusAwake:
    def test_who_wants_them_asleep_waits_for_the_end(self, tmp_path, monkeypatch):
        device = tmp_path / "cpu_dma_latency"
        device.write_bytes(struct.pack("=i", 0))
        waits = []

        def wait(seconds):
            waits.append(seconds)
            device.write_bytes(struct.pack("=i", 2_000_000_000))

        monkeypatch.setattr(sleepless.time, "sleep", wait)
        sleepless.wait_until_cpus_may_sleep(device=device)
        assert len(waits) == 1

    def test_but_not_for_ever(self, tmp_path):
        device = tmp_path / "cpu_dma_latency"
        device.write_bytes(struct.pack("=i", 20))
        with pytest.raises(TimeoutError, match="CPUs that wake within 20 us; 'fuser"):
            sleepless.wait_until_cpus_may_sleep(0, device)

    def test_where_nobody_can_nobody_does(self, tmp_path):
        sleepless.wait_until_cpus_may_sleep(0, tmp_path / "nothing")

    def test_it_is_asked_for(self, tmp_path):
        device = tmp_path / "cpu_dma_latency"
        device.touch()
        with sleepless.cpus_awake(device):
            assert device.read_bytes() == bytes(4)
