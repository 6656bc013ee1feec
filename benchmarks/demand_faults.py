"""What a demand fault of a lazy restore takes, beside a minimal handler in C that does the same.

``python -m benchmarks.demand_faults``: both serve the same pages from a file's mapping, in turns, to a
thread of another process that touches them one by one in random order.  Needs a C compiler.

Ours asks for CPUs that stay awake, see :mod:`postcopy.kernel.cpu_latency`.  So the one in C is measured
twice: while nobody asks for them, and while they are asked for.

Who touches and who serves have a CPU each.  The scheduler may put both on one, and then nobody has to be
woken on another: a fault takes 5 us in one round and 70 in the next.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from benchmarks.sleepless import cpus_awake, wait_until_cpus_may_sleep
from postcopy.channel.rate_limit import RateLimiter
from postcopy.guest import Region
from postcopy.kernel import memfd
from postcopy.kernel.cpu_latency import DEVICE
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.userfaultfd import MISSING_FEATURES, MISSING_MODE, Userfaultfd
from postcopy.lazy_restore.block_restorer import BlockRestorer
from postcopy.lazy_restore.restore_pager import Pace, RestorePager
from postcopy.memory import page_map_file
from postcopy.paging.ram import IncomingRam

PAGE = 4096
Serve = Callable[[Userfaultfd, Mapping, int, Mapping], None]
Side = tuple[str, Serve, Callable[[], AbstractContextManager[None]]]


class _File:
    """A mapped image in which every page has data: an ``ImagePageSource`` of a restore."""

    def __init__(self, mapping: Mapping) -> None:
        self.base = mapping.address
        self.data = np.ones(mapping.length // PAGE, np.bool_)

    def has(self, _page: int) -> bool:
        return True

    def is_good(self, _page: int) -> bool:
        return True


def build(folder: Path) -> ctypes.CDLL:
    """Compile the yardstick."""
    library = folder / "minimal_pager.so"
    source = Path(__file__).with_name("minimal_pager.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return loaded(library)


def loaded(library: Path) -> ctypes.CDLL:
    """Load what :func:`build` has compiled."""
    found = ctypes.CDLL(str(library))
    found.serve.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)
    found.touch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p)
    return found


def serve_by_us(userfaultfd: Userfaultfd, memory: Mapping, fd: int, file: Mapping) -> None:
    """The pager of a restore that has nothing to push."""
    region = Region("ram", memory.length, PAGE, 0, memory.address, os.dup(fd))
    ram = IncomingRam([region], [page_map_file.create(memory.length // PAGE)])
    (paged,) = ram
    restorer = BlockRestorer(userfaultfd, paged, _File(file), lambda _: None)  # type: ignore[arg-type]
    restorer.missing = lambda *_: iter(())  # type: ignore[method-assign,assignment]
    RestorePager(userfaultfd, [restorer], {}, Pace(RateLimiter(0))).run()


def cpu_each() -> tuple[set[int], set[int]]:
    """A CPU for who touches and one for who serves; the same one if there is no other."""
    cpus = sorted(os.sched_getaffinity(0))
    return {cpus[0]}, {cpus[-1]}


def measure(library: ctypes.CDLL, serve: Serve, size_bytes: int, seed: int) -> list[int]:
    """Touch every page once while a child process serves; nanoseconds, in the order of touching."""
    pages = np.random.default_rng(seed).permutation(size_bytes // PAGE).astype(np.int64)
    took = np.zeros(len(pages), np.uint64)
    fd = memfd.create("ram", size_bytes)
    memory = Mapping.shared(fd, size_bytes)
    with tempfile.TemporaryFile() as image:
        image.truncate(size_bytes)
        file = Mapping.shared(image.fileno(), size_bytes)
        file.view()[:] = 7  # in the page cache
        userfaultfd = Userfaultfd.open(MISSING_FEATURES)
        userfaultfd.register(memory.address, size_bytes, MISSING_MODE)
        ours, theirs = cpu_each()
        child = os.fork()
        if not child:
            try:
                os.sched_setaffinity(0, theirs)
                serve(userfaultfd, memory, fd, file)
            except BaseException:
                traceback.print_exc()
                os.kill(os.getppid(), signal.SIGKILL)  # it would wait for its pages for ever
            finally:
                os._exit(1)
        anywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, ours)
        library.touch(memory.address, pages.ctypes.data, len(pages), took.ctypes.data)
        os.sched_setaffinity(0, anywhere)
        os.kill(child, 9)
        os.waitpid(child, 0)
        userfaultfd.close()
        assert (memory.view()[::PAGE] == 7).all()
        file.close()
    memory.close()
    os.close(fd)
    return [int(ns) for ns in took]


def main() -> None:
    """Measure all in turns, and print JSON: nanoseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))

        def serve_by_c(userfaultfd: Userfaultfd, memory: Mapping, _fd: int, file: Mapping) -> None:
            never = os.pipe()[0]
            library.serve(userfaultfd.fd, never, memory.address, file.address)

        sides: list[Side] = [("c", serve_by_c, nullcontext), ("postcopy", serve_by_us, nullcontext)]
        if os.access(DEVICE, os.W_OK):  # or ours goes without as well
            sides.insert(1, ("c, awake", serve_by_c, cpus_awake))
        times: dict[str, list[int]] = {name: [] for name, *_ in sides}
        for seed in range(arguments.rounds):
            for name, serve, surroundings in sides:
                wait_until_cpus_may_sleep()
                with surroundings():
                    times[name] += measure(library, serve, arguments.mib << 20, seed)
    answer = {
        name: {f"p{part}": int(np.percentile(each, part)) for part in (10, 50, 99)}
        for name, each in times.items()
    }
    ratios = {
        f"postcopy / {name}": round(answer["postcopy"]["p50"] / answer[name]["p50"], 2)
        for name in times
        if name != "postcopy"
    }
    print(json.dumps(answer | {"p50": ratios}))


if __name__ == "__main__":
    main()
