"""What is tried with each QEMU that the suite has as a peer: the table behind ``docs/peers.md``.

A test's mark ``proves`` says what its success with a QEMU shows.  ``tests/conftest.py`` runs a test with
each QEMU of its mark ``qemu`` that has all of that, and ``scripts/draw_peers.py`` gathers the marks.
"""

from collections.abc import Iterable, Mapping, Set
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from fakes.qemu_versions import ALL, OLDEST

PAGE: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "peers.md"
_MARK: Final = "<!-- the table; written by scripts/draw_peers.py -->\n"


class Way(StrEnum):
    """Which side is the QEMU."""

    TO = "to"
    FROM = "from"


class Feature(StrEnum):
    """A row of the table."""

    PRECOPY = "precopy"
    ANSWERED = "precopy with `return-path`"
    XBZRLE = "precopy with `xbzrle`"
    POSTCOPY = "postcopy"
    PREEMPT = "postcopy with `postcopy-preempt`"
    RECOVERY = "recovery"
    PREEMPT_RECOVERY = "recovery with `postcopy-preempt`"
    SWITCHOVER_ACK = "precopy and postcopy with `switchover-ack`"
    TLS = "precopy with `tls-creds`"
    MULTIFD = "precopy with `multifd`"
    ZERO_COPY = "precopy with `multifd` and `zero-copy-send`"
    MULTIFD_TLS = "precopy with `multifd` and `tls-creds`"
    MULTIFD_POSTCOPY = "postcopy with `multifd`, `postcopy-preempt` and `tls-creds`"
    TLS_RECOVERY = "postcopy with `tls-creds`, and its recovery"
    SNAPSHOT = "background snapshot, loaded at the other side"
    SAVED = "saved as a stream, loaded later"
    MAPPED = "saved with `mapped-ram`, loaded later"
    DIRECT = "the same with `multifd` and `direct-io`"
    TCP = "`tcp:HOST:PORT`"
    TCP6 = "`tcp:[IPv6]:PORT`"
    UNIX = "`unix:PATH`"
    EXEC = "`exec:COMMAND`"
    FILE = "`file:PATH,offset=N`"
    KVM = "the guest runs in KVM there"
    TCG = "the guest runs in TCG there"
    DRIVE = "with a drive, `virtio-blk` on virtio-mmio"
    VHOST_USER = "with a drive by vhost-user, each side with a back end of its own"
    VHOST_USER_NET = "with a network by vhost-user, each side with a back end of its own"
    LARGE = "memory above 4 GiB"
    REFUSED = "refused there, and the guest runs on here"
    BLOCKTIME = "`postcopy-blocktime`"
    LAZY = "`postcopy restore`: runs at once, and its memory comes later"
    IMAGES = "`postcopy inspect` and `verify` of what it saved"
    TAKEN = "`postcopy snapshot` of it"
    RECEIVED = "`postcopy receive`: it migrates into an image"
    MOVED = "`postcopy migrate` from one to another of it"
    RECOVERED = "`postcopy recover`"
    RESTORED = "`postcopy restore --qemu`"
    SERVED = "`postcopy serve`: runs at once, and its memory comes later"
    SERVED_AGAIN = "`postcopy serve --resume`, after a server that was killed"


T, F = Way.TO, Way.FROM
ONE_WAY: Final[Mapping[Feature, Way]] = {
    Feature.REFUSED: T,
    Feature.LAZY: F,
    Feature.IMAGES: F,
    Feature.TAKEN: F,
    Feature.RECEIVED: F,
    Feature.MOVED: F,
    Feature.RECOVERED: T,
    Feature.RESTORED: T,
    Feature.SERVED: T,
    Feature.SERVED_AGAIN: T,
}
"""Features that exist in this direction only."""


class Lack(NamedTuple):
    """Why a QEMU is not tried with a feature: ``n/a``, it has no such thing, or ``no``."""

    word: str
    note: str


_ACK = Lack("n/a", "it has no `switchover-ack`")
_MAPPED = Lack("n/a", "it has no `mapped-ram`")
_FILE = Lack("n/a", "it has no `file:`; images are saved and loaded through `exec:cat` there")
_TCG = Lack(
    "no",
    "it does not see all that a guest in TCG writes while it sends: pages arrive as they were before, at "
    "another QEMU 7.2 as well",
)
_FLUSH = Lack("no", "it knows no flush of `multifd` on the main channel, with which our rounds end")
_PRECOPY_ONLY = Lack("n/a", "it permits `multifd` and `postcopy-ram` not together")
LACKS: Final[Mapping[tuple[str, Way, Feature], Lack]] = {
    (OLDEST, T, Feature.MAPPED): _MAPPED,
    (OLDEST, F, Feature.MAPPED): _MAPPED,
    (OLDEST, T, Feature.SWITCHOVER_ACK): _ACK,
    (OLDEST, F, Feature.SWITCHOVER_ACK): _ACK,
    (OLDEST, T, Feature.DIRECT): _MAPPED,
    (OLDEST, F, Feature.DIRECT): _MAPPED,
    (OLDEST, T, Feature.FILE): _FILE,
    (OLDEST, F, Feature.FILE): _FILE,
    (OLDEST, F, Feature.TCG): _TCG,
    (OLDEST, T, Feature.MULTIFD): _FLUSH,
    (OLDEST, T, Feature.MULTIFD_TLS): _FLUSH,
    (OLDEST, T, Feature.ZERO_COPY): _FLUSH,
    **{
        (version, way, Feature.MULTIFD_POSTCOPY): _PRECOPY_ONLY
        for version in (OLDEST, "10.0")
        for way in Way
    },
}

Proof = tuple[str, Way, Feature]
"""Version, direction and feature."""


def proofs_of(item: pytest.Item) -> Set[Proof]:
    """What the success of a test shows."""
    version = getattr(item, "callspec", None) and item.callspec.params.get("qemu_version")
    if version is None:
        return set()
    return {
        (version, mark.args[0], feature)
        for mark in item.iter_markers("proves")
        for feature in mark.args[1:]
    }


def can_prove(item: pytest.Item) -> bool:
    """Whether the test's QEMU has all that it is tried with."""
    return proofs_of(item).isdisjoint(LACKS)


def table(proofs: Set[Proof]) -> str:
    """The table of the manual, and its notes.

    :raises ValueError: a feature that a QEMU has is not tried with it.
    """
    notes: list[str] = []
    columns = [(version, way) for version in ALL for way in Way]
    lines = [
        "| | " + " | ".join(f"{way} {version}" for version, way in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for feature in Feature:
        cells = (_cell((version, way, feature), proofs, notes) for version, way in columns)
        lines.append(f"| {feature.value} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def _cell(proof: Proof, proofs: Set[Proof], notes: list[str]) -> str:
    _, way, feature = proof
    if proof in proofs:
        return "yes"
    if lack := LACKS.get(proof):
        if lack.note not in notes:
            notes.append(lack.note)
        return f"{lack.word} ({notes.index(lack.note) + 1})"
    if ONE_WAY.get(feature, way) is not way:
        return ""
    raise ValueError(
        f"no test tries {feature.value!r} {way} QEMU {proof[0]}, and it is not in LACKS"
    )


def page(text: str, proofs: Iterable[Proof]) -> str:
    """The page with the table as it is now."""
    before, mark, rest = text.partition(_MARK)
    if not mark:
        raise ValueError("the page has lost the mark before its table")
    _, heading, after = rest.partition("\n## ")
    return f"{before}{mark}{table(set(proofs))}{heading}{after}"
