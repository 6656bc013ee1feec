"""Compare the RAM blocks of two machines before the guest is ordered to move.

Both tell of them by ``x-query-ramblock``, whose text is that of HMP's ``info ramblock`` (QEMU 6.2).  A
block that the destination lacks, or has otherwise, would end the migration at the beginning of the stream.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from postcopy.client.qmp import QmpConnection
from postcopy.errors import Refused
from postcopy.stream.numbers import IGNORED_BLOCKS

_ROW: Final = re.compile(
    r"^\s*(\S+)\s+(\d+) ([KMG])iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s", re.MULTILINE
)
_SHIFTS: Final = {"K": 10, "M": 20, "G": 30}


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block as a machine tells of it; page size 0: not told."""

    size_bytes: int
    page_size_bytes: int

    def __str__(self) -> str:
        if not self.page_size_bytes:
            return f"{self.size_bytes >> 20} MiB"
        return f"{self.size_bytes >> 20} MiB in pages of {self.page_size_bytes >> 10} KiB"


async def check_same_memory(
    source: QmpConnection, destination: QmpConnection, *, postcopy: bool
) -> None:
    """Refuse a migration whose ends have different RAM blocks; nothing is sent.

    Between two QEMUs nothing is compared: they tell of blocks that change their sizes.

    :param postcopy: page sizes must be the same, too.
    :raises Refused: which block is different, how, and the options that the destination needs.
    """
    both_ours = await source.is_ours() and await destination.is_ours()
    if not both_ours and not (await source.is_ours() or await destination.is_ours()):
        return
    theirs, ours = await blocks_of(source), await blocks_of(destination)
    if not theirs or not ours:
        return  # a machine that does not tell
    for name, block in theirs.items():
        other = ours.get(name)
        if other is None:
            raise _refused(f"the destination has no RAM block '{name}'", theirs)
        if other.size_bytes != block.size_bytes or (
            postcopy and other.page_size_bytes != block.page_size_bytes
        ):
            what = f"RAM block '{name}' has {block} at the source, and {other} at the destination"
            raise _refused(what, theirs)
    for name in ours.keys() - theirs.keys():
        raise _refused(f"the source has no RAM block '{name}'", theirs)
    if both_ours and list(theirs) != list(ours):
        raise _refused("the RAM blocks have another order at the destination", theirs)


async def ram_bytes(machine: QmpConnection) -> int:
    """How much RAM the guest of a machine has, in all blocks.

    :raises Refused: the machine does not tell.
    """
    blocks = await blocks_of(machine)
    if not blocks:
        raise Refused(
            "the machine does not tell its RAM blocks (x-query-ramblock); use QEMU 6.2 on"
        )
    return sum(block.size_bytes for block in blocks.values())


async def blocks_of(machine: QmpConnection) -> dict[str, Block]:
    """The blocks of a machine by name, in their order; none if it does not tell."""
    try:
        answer = await machine.execute("x-query-ramblock")
    except Refused:
        return {}
    return {
        name: Block(int(used, 16), int(number) << _SHIFTS[unit])
        for name, number, unit, used in _ROW.findall(answer.get("human-readable-text", ""))
        if name not in IGNORED_BLOCKS
    }


def _refused(what: str, blocks: Mapping[str, Block]) -> Refused:
    options = " ".join(
        f"--memory-block name={name},size={block.size_bytes >> 20}M,"
        f"page-size={block.page_size_bytes >> 10}K"
        for name, block in blocks.items()
    )
    return Refused(f"{what}; start the destination with {options}")
