"""The yardstick of demand faults runs: it builds the restore's pager from parts that may change."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy.errors import HostCannot
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.link.guest_service import MISSING_FEATURES

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
    assert set(json.loads(done.stdout)) == {"c", "postcopy", "p50 ratio"}
