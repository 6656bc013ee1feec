"""Mutates what readers of hostile bytes read: ``python -m fuzzing``, a process with little memory.

Each failure says with which words its case alone is run again.
"""

import argparse
import ctypes
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fuzzing import of_images, of_streams, of_texts
from fuzzing.readers import Reader

SPARE_BYTES = 192 << 20
MOST_CPU_S = 10.0
MOST_S = 100.0
ROUND_CASES = 100_000
M_ARENA_MAX = -8  # of malloc.h


def main(words: Sequence[str]) -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(prog="python -m fuzzing")
    parser.add_argument("--mutations", type=int, default=ROUND_CASES, help="0: until stopped")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("readers", nargs="*", help="their names; all without any")
    asked = parser.parse_args(words)
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as folder:
        chosen = _chosen(Path(folder), asked.readers)
        if asked.only is not None:
            _bound_memory()
            for reader in chosen:
                _one(reader, asked.seed, asked.only)
            return
        _run(chosen, asked.seed, asked.mutations)


def _chosen(folder: Path, names: Sequence[str]) -> list[Reader]:
    found = [
        reader for kind in (of_streams, of_images, of_texts) for reader in kind.readers(folder)
    ]
    if unknown := set(names) - {reader.name for reader in found}:
        raise SystemExit(f"no such reader: {', '.join(unknown)}")
    return [reader for reader in found if not names or reader.name in names]


def _run(chosen: Sequence[Reader], seed: int, mutations: int) -> None:
    for reader in chosen:
        for number in range(20):  # imports, caches and buffers are made before memory is bounded
            _one(reader, seed, number)
    _bound_memory()
    whole = sum(reader.share for reader in chosen)
    done = 0
    while not mutations or done < mutations:
        size = min(ROUND_CASES, mutations - done) if mutations else ROUND_CASES
        for reader in chosen:
            _report(reader, seed, -(-size * reader.share // whole))
        done += size
        if not mutations or mutations > ROUND_CASES:
            seed += 1


def _report(reader: Reader, seed: int, count: int) -> None:
    began = time.process_time()
    taken = sum(_one(reader, seed, number) for number in range(count))
    used = time.process_time() - began
    sys.stdout.write(f"{reader.name} {count} {taken} {used:.1f} s, seed {seed}\n")
    sys.stdout.flush()


def _one(reader: Reader, seed: int, number: int) -> bool:
    signal.setitimer(
        signal.ITIMER_VIRTUAL, MOST_CPU_S
    )  # SIGVTALRM ends a process that takes too long,
    signal.setitimer(signal.ITIMER_REAL, MOST_S)  # and SIGALRM one that waits for ever
    raw = b""
    try:
        raw = reader.case(seed, number)
        return reader.run(raw)
    except BaseException:
        sys.stderr.write(
            f"{reader.name}: {len(raw)} bytes; again by: "
            f"python -m fuzzing {reader.name} --seed {seed} --only {number}\n"
        )
        raise


def _bound_memory() -> None:
    # Else each thread may reserve 128 MiB of addresses, and one that gets none is waited for for ever.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1:])
