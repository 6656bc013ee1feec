"""The words of RAM records that are not for us, refused by name."""

from typing import TYPE_CHECKING, NoReturn

from postcopy.stream.numbers import HEADER_BYTES, RamFlag

if TYPE_CHECKING:
    from postcopy.stream.reader import StreamBuffer

_REFUSED = {
    RamFlag.XBZRLE: "xbzrle is not supported; switch the capability off at the source",
    RamFlag.MULTIFD_FLUSH: "multifd is not supported; switch the capability off at the source",
    RamFlag.HOOK: "RDMA is not supported; migrate over a socket or into a file",
}


def refuse_flags(reader: "StreamBuffer", flags: int) -> NoReturn:
    """Raise the error for a record, whose word has just been read, that is not for us."""
    for flag, message in _REFUSED.items():
        if flags & ~RamFlag.CONTINUE == flag:
            reader.fail(message, HEADER_BYTES)
    reader.fail(f"Unknown combination of migration flags: {flags:#x}", HEADER_BYTES)
