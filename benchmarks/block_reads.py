"""Random reads of 4 KiB from a disk by vhost-user: our back end beside qemu-storage-daemon.

``python -m benchmarks.block_reads``: the same driver, in C, reads from both in turns, at queue depth 1 and
32; what is read is in the host's page cache.  Needs a C compiler, and qemu-storage-daemon
(``.ci/install-qemu``; ``make bench-block_reads`` finds it there).  The goal is half of its rate.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from postcopy.kernel import memfd
from postcopy.kernel.mapping import Mapping
from postcopy.vhost_user.connection import Connection
from postcopy.vhost_user.messages import (
    FEATURE_PROTOCOL_FEATURES,
    FRONT_END,
    ProtocolFeature,
    Request,
)
from postcopy.vhost_user.payloads import (
    MemoryTable,
    Number,
    Payload,
    Region,
    RingAddresses,
    RingDescriptor,
    RingState,
)
from postcopy.virtio.ring import Feature

DEPTHS: Final = (1, 32)
GOAL: Final = 0.5
_BLOCK: Final = 4096
_RING: Final = 256
_MEMORY_BYTES: Final = 4 << 20
_SAMPLES: Final = 1 << 20
_CONNECT_S: Final = 10.0
_PLACES: Final = (0x10000, 0x12000, 0x14000, 0x20000, 0x30000, 0x100000)
"""Descriptors, available ring, used ring, headers, statuses, data."""


class _Places(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("descriptors", "available", "used")),
        *((name, ctypes.c_uint64) for name in ("headers", "statuses", "data")),
        ("size", ctypes.c_uint32),
    )


def build(folder: Path) -> ctypes.CDLL:
    """Compile the driver."""
    library, source = folder / "block_reader.so", Path(__file__).with_name("block_reader.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    made = ctypes.CDLL(str(library))
    made.read_blocks.restype = ctypes.c_int64
    made.read_blocks.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint32),
        *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64),
    )
    return made


class Driver:
    """A front end with one ring."""

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self._library = library
        self._connection = Connection(_connected(path), FRONT_END)
        self._fd = memfd.create("guest", _MEMORY_BYTES)
        self._memory = Mapping.shared(self._fd, _MEMORY_BYTES)
        self._kick, self._call = os.eventfd(0), os.eventfd(0)
        self._places = _Places(*_PLACES, _RING)
        self._set_up()

    def read(self, depth: int, blocks: int, seconds: float) -> dict[str, float]:
        """Read; return reads a second, and the latencies of one in µs."""
        samples = np.zeros(_SAMPLES, np.uint32)
        count = self._library.read_blocks(
            self._memory.address, ctypes.byref(self._places), self._kick, self._call, depth,
            blocks, int(seconds * 1e9), samples.ctypes.data, _SAMPLES,
        )  # fmt: skip
        if count < 0:
            raise RuntimeError(f"a read failed: {count}")
        p50, p99 = np.percentile(samples[: min(count, _SAMPLES)], [50, 99]) / 1000
        return {"reads_s": count / seconds, "p50_us": float(p50), "p99_us": float(p99)}

    def close(self) -> None:
        """Let go of everything."""
        self._connection.close()
        self._memory.close()
        for fd in (self._fd, self._kick, self._call):
            os.close(fd)

    def _set_up(self) -> None:
        address, send = self._memory.address, self._send
        protocol = ProtocolFeature.CONFIG | ProtocolFeature.MQ
        send(Request.SET_PROTOCOL_FEATURES, Number(int(protocol)))
        send(Request.SET_OWNER)
        send(Request.SET_FEATURES, Number(int(Feature.VERSION_1) | FEATURE_PROTOCOL_FEATURES))
        send(Request.SET_MEM_TABLE, MemoryTable((Region(0, _MEMORY_BYTES, address, 0),)), self._fd)
        descriptors, available, used = (address + at for at in _PLACES[:3])
        send(Request.SET_VRING_NUM, RingState(0, _RING))
        send(Request.SET_VRING_BASE, RingState(0, 0))
        send(Request.SET_VRING_ADDR, RingAddresses(0, 0, descriptors, used, available, 0))
        send(Request.SET_VRING_CALL, RingDescriptor(0), self._call)
        send(Request.SET_VRING_KICK, RingDescriptor(0), self._kick)
        send(Request.SET_VRING_ENABLE, RingState(0, 1))

    def _send(self, number: Request, payload: Payload | None = None, *fds: int) -> None:
        self._connection.send(FRONT_END[number], payload, fds)


def _connected(path: Path) -> socket.socket:
    connected, until = socket.socket(socket.AF_UNIX), time.monotonic() + _CONNECT_S
    while connected.connect_ex(str(path)):
        if time.monotonic() > until:
            raise RuntimeError(f"no back end at {path}")
        time.sleep(0.01)
    return connected


@contextlib.contextmanager
def running(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A back end while the context lasts."""
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def commands(disk: Path, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """The back ends: where each listens, and its command."""
    ours, theirs = folder / "ours.sock", folder / "qsd.sock"
    storage_daemon = shutil.which("qemu-storage-daemon")
    if storage_daemon is None:
        sys.exit("needs qemu-storage-daemon: run .ci/install-qemu, and make bench-WHAT")
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={theirs},writable=on"
    blockdev = f"driver=file,node-name=d,filename={disk},locking=off"
    return {
        "postcopy": (
            ours,
            [sys.executable, "-m", "postcopy", "vhost-user-blk", "--socket", str(ours), str(disk)],
        ),
        "qemu-storage-daemon": (
            theirs,
            [storage_daemon, "--blockdev", blockdev, "--export", export],
        ),
    }


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All runs, by turns."""
    library, disk = build(folder), folder / "disk.raw"
    disk.write_bytes(os.urandom(options.mib << 20))
    results = []
    for repeat in range(options.repeat):
        for name, (path, command) in commands(disk, folder).items():
            with running(command), contextlib.closing(Driver(path, library)) as driver:
                for depth in options.depths:
                    driver.read(depth, 64, 0.1)  # warm
                    found = driver.read(depth, (options.mib << 20) // _BLOCK, options.seconds)
                    results.append({"back_end": name, "depth": depth, "repeat": repeat} | found)
                    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def table(results: list[dict[str, Any]], depths: tuple[int, ...]) -> str:
    """Medians as Markdown, with the ratio of the rates."""
    lines = [f"| queue depth | back end | reads/s | p50, µs | p99, µs | ratio (goal {GOAL}) |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for depth in depths:
        rates = {}
        for name in dict.fromkeys(result["back_end"] for result in results):
            runs = [one for one in results if (one["back_end"], one["depth"]) == (name, depth)]
            rates[name] = statistics.median(one["reads_s"] for one in runs)
            p50, p99 = (statistics.median(one[key] for one in runs) for key in ("p50_us", "p99_us"))
            lines.append(f"| {depth} | {name} | {rates[name]:.0f} | {p50:.1f} | {p99:.1f} | |")
        ours, theirs = rates["postcopy"], rates["qemu-storage-daemon"]
        lines[-1] = lines[-1][:-2] + f" {ours / theirs:.2f} |"
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_reads", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run")
    parser.add_argument("--mib", type=int, default=256, help="size of the disk")
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help="up to 85")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        results = measure(options, Path(folder))
    print(table(results, tuple(options.depths)))


if __name__ == "__main__":
    main()
