"""Two stock QEMUs, a guest that writes faster than its memory is sent, and a time to be ended in."""

import json

import pytest

from fakes.commands import postcopy
from interop.arrival import check_memory, iterations, send_to_qemu, wait_until_beyond
from interop.qemu_guest import QemuGuest
from machine.machines import MIB
from postcopy.machine.workload import load

WORKLOAD = load("hammer", 64 * MIB, 1, hot_bytes=32 * MIB)


def qemu(folder, name):
    monitor = ["-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"]
    return QemuGuest(folder / name, "microvm", "kvm", WORKLOAD.memory_bytes, 1, monitor)


@pytest.mark.kvm
@pytest.mark.qemu
@pytest.mark.parametrize("then", ["postcopy", "force", "cancel"])
def test_it_is_done_as_was_said(tmp_path, then):
    with qemu(tmp_path, "a") as source, qemu(tmp_path, "b") as target:
        send_to_qemu(WORKLOAD, source)
        before = source("query-migrate-parameters")
        sides = ["--from", f"unix:{tmp_path}/a.qmp", "--to", f"unix:{tmp_path}/b.qmp"]
        limits = ["--bandwidth", "32M", "--within", "60s", "--max-downtime", "1ms", "--then", then]
        outcome = postcopy("migrate", *sides, *limits, f"unix:{tmp_path}/way")
        moved = then != "cancel"
        assert outcome.returncode == (0 if moved else 1), outcome.stderr
        assert ("since it would not end in time: " in outcome.stderr) is not moved
        owner, other = (target, source) if moved else (source, target)
        assert owner("query-status")["running"]
        assert not other("query-status")["running"]
        assert source("query-migrate-parameters") == before
        if moved:
            by_postcopy = source("query-migrate")["ram"]["postcopy-bytes"] > 0
            assert by_postcopy is (then == "postcopy")
        wait_until_beyond(owner.read_memory, WORKLOAD, iterations(owner.read_memory, WORKLOAD))
        owner("stop")
        check_memory(owner.read_memory, WORKLOAD)


@pytest.mark.kvm
@pytest.mark.qemu("7.2", "10.0", "11.1")
def test_what_it_would_take_is_told_before(tmp_path):
    with qemu(tmp_path, "a") as source:
        before = source("query-migrate-parameters")
        line = [
            "migrate",
            "--from",
            f"unix:{tmp_path}/a.qmp",
            "--estimate",
            "--max-downtime",
            "10ms",
        ]
        still = json.loads(postcopy(*line, "--json").stdout)
        assert (still["converges"], still["rounds"]) == (True, 1)
        assert still["ram_bytes"] >= WORKLOAD.memory_bytes
        assert still["bandwidth_from"] == "max-bandwidth"
        send_to_qemu(WORKLOAD, source)
        told = json.loads(postcopy(*line, "--json", "--bandwidth", "8M").stdout)
        assert not told["converges"]  # 32 MiB are written again and again
        assert told["writes"]["mode"] == "dirty-bitmap"
        assert source("query-migrate-parameters") == before
