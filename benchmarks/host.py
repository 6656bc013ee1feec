"""The machine that measures: what it is, how busy it is, and how its memory is made warm."""

import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")

# Touched as huge pages, and given back: a hypervisor below may have taken free huge pages away,
# and the first touch of one that it must bring back costs twenty times as much.
_WARM = """
import mmap
memory = mmap.mmap(-1, {0} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, {0} << 20, 1 << 21):
    memory[at] = 1
"""


def warm_memory(mib: int) -> None:
    """Touch so much memory as huge pages and free it; what is allocated next is fast for 2 s."""
    if mib:
        subprocess.run([sys.executable, "-c", _WARM.format(mib)], check=True)


def wait_until_quiet(busy_limit: float, timeout_s: float = 15) -> float:
    """Wait until less than so many CPUs are busy, but no longer than that; how many are."""
    end = time.monotonic() + timeout_s
    while True:
        before, started = _busy_seconds(), time.monotonic()
        time.sleep(0.5)
        busy = (_busy_seconds() - before) / (time.monotonic() - started)
        if busy <= busy_limit or time.monotonic() > end:
            return round(busy, 2)


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class CpuMeter:
    """CPU seconds of some process trees, and of everybody else, from its making on."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self._started = time.monotonic()
        self._before = self._now()

    def follow(self, name: str, pid: int) -> None:
        """Count a process that was started after this meter, from its start on."""
        self._pids[name] = pid
        self._before[name] = 0.0

    def _now(self) -> dict[str, float]:
        ours = {name: tree_cpu_seconds(pid) for name, pid in self._pids.items()}
        return {**ours, "harness": time.process_time(), "all": _busy_seconds()}

    def stop(self) -> dict[str, float]:
        """``NAME_cpu_s`` for each tree, and ``others_cpus``: how many CPUs others kept busy."""
        passed_s = time.monotonic() - self._started
        now = self._now()
        used = {name: now[name] - self._before[name] for name in now}
        others = used.pop("all") - sum(used.values())
        figures = {f"{name}_cpu_s": round(used_s, 2) for name, used_s in used.items()}
        return {**figures, "others_cpus": round(max(0.0, others) / passed_s, 2)}


def tree_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process, those it has waited for, and those below it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = [child for task in tasks for child in task.read_text().split()]
    except OSError:
        return 0.0  # gone; its parent has its time
    fields = text.rsplit(")", 1)[1].split()
    own = sum(int(field) for field in fields[11:15]) / _TICKS
    return own + sum(tree_cpu_seconds(int(child)) for child in children)


def _busy_seconds() -> float:
    """CPU seconds used by anyone since the machine started; idle, I/O wait and guests excepted."""
    line = Path("/proc/stat").read_text().split("\n", 1)[0]
    fields = [int(field) for field in line.split()[1:9]]
    return (sum(fields[:3]) + sum(fields[5:8])) / _TICKS


def facts(tsc_hz: float) -> dict[str, Any]:
    """The host, for the head of a report."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "tsc_mhz": round(tsc_hz / 1e6, 3),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def available_mib() -> int:
    """How much memory the host can still give, in MiB."""
    text = Path("/proc/meminfo").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) >> 10
