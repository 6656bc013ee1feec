"""Two network namespaces joined by a veth pair whose ends let through so many bits a second."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

_PREFIX: Final = "postcopy-bench"
_BURST: Final = "256k"
_LATENCY: Final = "5ms"
_ADDRESSES: Final = {"source": "10.213.0.1", "destination": "10.213.0.2"}
ROLES: Final = tuple(_ADDRESSES)


class LinkFailed(RuntimeError):
    """The link cannot be made; says which command failed, and what it said."""


class ShapedLink:
    """A link between two namespaces, for source and destination; made on entry, removed on exit.

    Each end has a token bucket (``tc qdisc … tbf``, see tc-tbf(8)) of 256 KiB, which keeps what it cannot
    send at once for up to 5 ms.  The names have this process's number in them; :meth:`__enter__` also
    removes what a benchmark that has been killed has left.

    :param gbit_s: bits a second in each direction, in 10^9.
    """

    def __init__(self, gbit_s: float) -> None:
        self.gbit_s = gbit_s
        self._namespaces = {role: f"{_PREFIX}-{os.getpid()}-{role}" for role in ROLES}

    @property
    def address(self) -> str:
        """The destination's address, as the source reaches it."""
        return _ADDRESSES["destination"]

    def prefix(self, role: str) -> list[str]:
        """What goes before a command line that is to run at one end; the process keeps its number."""
        return ["ip", "netns", "exec", self._namespaces[role]]

    def sent_bytes(self) -> int:
        """All bytes that the source's end has sent, headers of Ethernet included."""
        (end,) = json.loads(
            _run("ip", "-n", self._namespaces["source"], "-s", "-j", "link", "show", "veth0")
        )
        statistics: dict[str, Any] = end["stats64"]["tx"]
        return int(statistics["bytes"])

    def use(self, n_bytes: int, seconds: float) -> float:
        """Which part of what the link can carry in that time these bytes are."""
        return n_bytes * 8 / (self.gbit_s * 1e9 * seconds)

    def __enter__(self) -> Self:
        remove_abandoned()
        source, destination = self._namespaces.values()
        try:
            for namespace in self._namespaces.values():
                _run("ip", "netns", "add", namespace)
            _run("ip", "-n", source, "link", "add", "veth0", "type", "veth",
                 "peer", "name", "veth0", "netns", destination)  # fmt: skip
            for role, namespace in self._namespaces.items():
                self._configure(namespace, _ADDRESSES[role])
        except BaseException:
            self._remove()
            raise
        return self

    def _configure(self, namespace: str, address: str) -> None:
        rate = f"{self.gbit_s * 1000:.0f}mbit"
        _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "veth0")
        for device in ("lo", "veth0"):
            _run("ip", "-n", namespace, "link", "set", device, "up")
        _run("tc", "-n", namespace, "qdisc", "add", "dev", "veth0", "root",
             "tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY)  # fmt: skip

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        existing = _namespaces()
        for namespace in self._namespaces.values():
            if namespace in existing:
                _remove_namespace(namespace)


def remove_abandoned() -> None:
    """Remove the namespaces of benchmarks that have ended, and end the processes in them."""
    for namespace in _namespaces():
        found = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", namespace)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove_namespace(namespace)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]


def _remove_namespace(namespace: str) -> None:
    """The veth pair goes with the first of the two."""
    for pid in _run("ip", "netns", "pids", namespace).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself
    _run("ip", "netns", "delete", namespace)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LinkFailed(f"no {command[0]}: install iproute2") from None
    if done.returncode:
        raise LinkFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
