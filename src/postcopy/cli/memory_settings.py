"""The options that say what RAM blocks a machine has, checked against each other and an image's blocks."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from postcopy.errors import Refused
from postcopy.machine.memory_blocks import HUGE_PAGE_BYTES, MemoryBlock
from postcopy.stream.numbers import IGNORED_BLOCKS

_MEMORY_BYTES: Final = 512 << 20

Given = Mapping[str, Any]
"""One ``--memory-block``: its keys and values."""


def blocks_of(options: Mapping[str, Any], ram_name: str) -> tuple[MemoryBlock, ...]:
    """Make the blocks of the options of ``postcopy run``.

    :param ram_name: of the block of a machine that has one.
    :raises Refused: the options exclude each other, or a memory path has no memory.
    """
    given: list[Given] = options["memory_blocks"]
    if not given:
        memory = options["memory"]
        return (_only(ram_name, _MEMORY_BYTES if memory is None else memory, options),)
    for block in given:
        if "size" not in block:
            raise Refused(f"--memory-block name={block['name']} has no size; give size=SIZE")
    total = sum(block["size"] for block in given)
    if options["memory"] not in {None, total}:
        raise Refused(
            f"--memory says {options['memory'] >> 20} MiB, and the blocks of --memory-block have "
            f"{total >> 20} MiB together; leave --memory out"
        )
    return tuple(_made(each, each["size"], options) for each in given)


def blocks_of_image(
    options: Mapping[str, Any], path: object, sizes: Mapping[str, int], ram_name: str
) -> tuple[MemoryBlock, ...]:
    """Make the blocks of an image, in its order, which is that of their guest addresses.

    :param sizes: in bytes, by name.
    :raises Refused: ``--memory-block`` is of a block that the image lacks, or has with another size.
    """
    found = {name: size for name, size in sizes.items() if name not in IGNORED_BLOCKS}
    given: dict[str, Given] = {each["name"]: each for each in options["memory_blocks"]}
    for name, each in given.items():
        if name not in found:
            raise Refused(f"{path}: it has no RAM block '{name}'; it has {_listed(found)}")
        if each.get("size", found[name]) != found[name]:
            raise Refused(
                f"{path}: its RAM block '{name}' has {found[name] >> 20} MiB, and --memory-block says "
                f"{each['size'] >> 20} MiB; leave the size out"
            )
    if not found:
        raise Refused(f"{path}: it has no RAM block '{ram_name}'")
    if given:
        return tuple(
            _made(given.get(name, {"name": name}), size, options) for name, size in found.items()
        )
    return tuple(_only(name, size, options) for name, size in found.items())


def _only(name: str, size_bytes: int, options: Mapping[str, Any]) -> MemoryBlock:
    page_size = HUGE_PAGE_BYTES if options["huge_pages"] else None
    return MemoryBlock.of(name, size_bytes, page_size, options["mem_path"])


def _made(given: Given, size_bytes: int, options: Mapping[str, Any]) -> MemoryBlock:
    if options["huge_pages"]:
        raise Refused("--huge-pages excludes --memory-block; give a block page-size=2M")
    directory = given.get("path", options["mem_path"])
    return MemoryBlock.of(given["name"], size_bytes, given.get("page-size"), directory)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
