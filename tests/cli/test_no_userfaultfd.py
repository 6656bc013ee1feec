"""A host without userfaultfd, as these processes see it: what is refused, and what goes all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

import fakes.without_userfaultfd
from fakes.commands import DEADLINE_S, POSTCOPY, Running, need_kvm
from fakes.waiting import wait_until

WITHOUT = [sys.executable, fakes.without_userfaultfd.__file__]


class Deprived(Running):
    """A ``postcopy run`` that can have no userfaultfd."""

    command = (*WITHOUT, *POSTCOPY)


def test_the_doctor_sees_it():
    line = [*WITHOUT, *POSTCOPY, "doctor"]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert shown.returncode != 0
    assert "userfaultfd: by device" in shown.stdout
    assert "Traceback" not in shown.stdout + shown.stderr


def test_postcopy_is_refused_beforehand(tmp_path):
    with Deprived(tmp_path, "qmp", "--incoming", "defer", "--accel", "unicorn") as deprived:
        wish = [{"capability": "postcopy-ram", "state": True}]
        error = deprived.ask("migrate-set-capabilities", capabilities=wish)["error"]["desc"]
    assert error.startswith("Postcopy is not supported: ")
    assert "\n" not in error


@pytest.mark.kvm
def test_precopy_goes_by_kvms_own_log(tmp_path: Path):
    need_kvm()
    with (
        Deprived(tmp_path, "source", "--workload", "hammer") as source,
        Deprived(
            tmp_path, "destination", "-S", "--incoming", f"unix:{tmp_path}/door"
        ) as destination,
    ):
        limits = {"max-bandwidth": 0, "downtime-limit": 10_000}
        assert "error" not in source.ask("migrate-set-parameters", **limits)
        assert "error" not in source.ask("migrate", uri=f"unix:{tmp_path}/door")
        ended = {"completed", "failed"}
        wait_until(lambda: source.migration_status() in ended, DEADLINE_S, "the end")
        assert source.migration_status() == "completed", source.ask("query-migrate")
        saved = []
        for side in (source, destination):
            saved.append(tmp_path / f"{side.path.name}.memory")
            order = {"val": 0, "size": 64 << 20, "filename": str(saved[-1])}
            assert "error" not in side.ask("pmemsave", **order)
        assert saved[0].read_bytes() == saved[1].read_bytes()
