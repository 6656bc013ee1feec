"""The manual's table of QEMUs says what the tests here try."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_it_is_current():
    drawn = subprocess.run(
        [sys.executable, "scripts/draw_peers.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
