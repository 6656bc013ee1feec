"""The events of a userfaultfd as objects; the pagers read the kernel's messages themselves."""

from collections.abc import Callable
from typing import NamedTuple

from postcopy.abi.userfaultfd import EventCode, PagefaultFlag
from postcopy.kernel.userfaultfd import MESSAGE, Userfaultfd


def read_events(userfaultfd: Userfaultfd, limit: int = 32) -> "list[Event]":
    """Take up to ``limit`` pending events, oldest first; none pending is an empty list.

    :raises KernelError: ``EINVAL`` if the descriptor has not been through its handshake.
    """
    return parse(userfaultfd.read_messages(limit))


class Pagefault(NamedTuple):
    """A thread waits for a page, or to write to one.

    ``address`` is rounded down to the page unless ``Feature.EXACT_ADDRESS`` was asked for.
    ``thread_id`` is 0 without ``Feature.THREAD_ID``.
    """

    address: int
    flags: PagefaultFlag
    thread_id: int


class Fork(NamedTuple):
    """The process forked; ``fd`` is a new userfaultfd (ours to close) for the child's memory."""

    fd: int


class Remap(NamedTuple):
    """``mremap`` moved a range."""

    source: int
    destination: int
    length_bytes: int


class Remove(NamedTuple):
    """``[start, end)`` was given up by ``madvise`` and is missing again."""

    start: int
    end: int


class Unmap(NamedTuple):
    """``[start, end)`` was unmapped."""

    start: int
    end: int


Event = Pagefault | Fork | Remap | Remove | Unmap

_FLAGS = tuple(PagefaultFlag(bits) for bits in range(8))  # making one takes longer than a look-up
_WORD = 0xFFFFFFFF


def _pagefault(flags: int, address: int, thread_id: int) -> Pagefault:
    known = _FLAGS[flags] if flags < 8 else PagefaultFlag(flags)
    return Pagefault(address, known, thread_id & _WORD)


_PARSERS: dict[int, Callable[[int, int, int], Event]] = {
    EventCode.PAGEFAULT: _pagefault,
    EventCode.FORK: lambda fd, _b, _c: Fork(fd & _WORD),
    EventCode.REMAP: Remap,
    EventCode.REMOVE: lambda start, end, _c: Remove(start, end),
    EventCode.UNMAP: lambda start, end, _c: Unmap(start, end),
}


def parse(messages: bytes) -> list[Event]:
    """Read whole ``uffd_msg`` records, oldest first; codes that we do not know are passed over."""
    return [
        _PARSERS[code](a, b, c)
        for code, a, b, c in MESSAGE.iter_unpack(messages)
        if code in _PARSERS
    ]
