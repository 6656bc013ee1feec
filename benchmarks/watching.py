"""What ten watchers cost a migration: the goal is less than 3 % of its throughput.

``python -m benchmarks.watching`` (``make bench-watching``): a guest that never stops writing moves by
precopy and postcopy over a Unix socket, as fast as it goes, again and again: unwatched, with ten
``postcopy watch``, and with one that serves its page to ten readers.  The watchers run on the same CPUs,
and each of the ten commands takes its own share of these.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from postcopy.client import Machine, Result

GOAL_PERCENT: Final = 3.0
WATCHERS: Final = 10
_UNBOUNDED: Final = 100 << 30
_COMMAND: Final = [sys.executable, "-m", "postcopy", "watch"]


@contextlib.contextmanager
def unwatched(_source: str, _destination: str) -> Iterator[None]:
    """No watcher."""
    yield


@contextlib.contextmanager
def commands(source: str, destination: str, count: int = WATCHERS, *more: str) -> Iterator[str]:
    """So many commands; each has said its first line, which the last one's is."""
    line = [*_COMMAND, "--from", source, "--to", destination, *more]
    with contextlib.ExitStack() as stack:
        started = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        for each in started:
            stack.callback(each.communicate)
            stack.callback(each.kill)
        said = ""
        for each in started:
            assert each.stdout is not None
            said = each.stdout.readline()
        yield said


@contextlib.contextmanager
def browsers(source: str, destination: str) -> Iterator[None]:
    """One command, and ten readers of its page's events, in a process each."""
    with (
        commands(source, destination, 1, "--serve", "127.0.0.1:0") as said,
        contextlib.ExitStack() as stack,
    ):
        url = next(word for word in said.split() if word.startswith("http")).rstrip(";") + "events"
        with urllib.request.urlopen(url) as events:
            events.readline()
        read = "import sys, urllib.request as u\nfor _ in u.urlopen(sys.argv[1]): print(flush=True)"
        readers = [
            subprocess.Popen([sys.executable, "-c", read, url], stdout=subprocess.PIPE)
            for _ in range(WATCHERS)
        ]
        for reader in readers:
            stack.callback(reader.communicate)
            stack.callback(reader.kill)
        for reader in readers:  # to start an interpreter takes more than to read
            assert reader.stdout is not None
            reader.stdout.readline()
        yield


KINDS: Final = {"unwatched": unwatched, "10 commands": commands, "10 browsers": browsers}


async def move(kind: str, mib: int) -> Result:
    """One migration."""
    async with contextlib.AsyncExitStack() as stack:
        size = f"{mib}M"
        source = await stack.enter_async_context(
            Machine.start(workload="hammer", memory=size, smp=1)
        )
        destination = await stack.enter_async_context(
            Machine.start(incoming="defer", memory=size, smp=1)
        )
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        await asyncio.sleep(mib / 200)  # the guest fills its memory
        with KINDS[kind](source.address, destination.address):
            migration = await source.migrate(
                f"unix:{Path(folder) / 'way'}",
                to=destination,
                postcopy="first-round",
                bandwidth=_UNBOUNDED,
            )
            return await migration.result()


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="of RAM")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[Result]] = {kind: [] for kind in KINDS}
    began = time.monotonic()
    for _ in range(options.rounds):
        for kind, results in found.items():
            results.append(asyncio.run(move(kind, options.mib)))
    base = None
    for kind, results in found.items():
        rates = [r.transferred_bytes / (1 << 20) / (r.total_ms / 1000) for r in results]
        p99 = [r.fault_latency.p99_us / 1000 for r in results if r.fault_latency is not None]
        rate = statistics.median(rates)
        base = rate if base is None else base
        print(
            f"{kind:<12} {rate:7.0f} MiB/s ({rate / base - 1:+.1%}; {min(rates):.0f} to {max(rates):.0f}), "
            f"fault p99 {statistics.median(p99):.2f} ms ({min(p99):.2f} to {max(p99):.2f})"
        )
    print(f"{options.rounds} rounds of {options.mib} MiB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
