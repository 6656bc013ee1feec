"""Commands, source to destination: number, length, payload.

A package is a command whose payload is a length; that many bytes follow *behind* the command.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt

from postcopy.errors import StreamError
from postcopy.stream.configuration import encode_name
from postcopy.stream.layout import BlockLayout, Receiver
from postcopy.stream.numbers import Command, SectionType
from postcopy.stream.reader import StreamBuffer
from postcopy.stream.records import (
    CommandRecord,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    RecvBitmap,
    SwitchoverStart,
)

HEAD_BYTES = 5
DISCARD_VERSION = 0
_RANGE_BYTES = 16
_SHORTEST_DISCARD = 1 + 1 + 1 + 1 + _RANGE_BYTES

FIXED_LENGTHS = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.PACKAGED: 4,
    Command.ENABLE_COLO: 0,
    Command.POSTCOPY_RESUME: 0,
    Command.SWITCHOVER_START: 0,
}

_BARE: dict[Command, CommandRecord] = {
    Command.OPEN_RETURN_PATH: OpenReturnPath(),
    Command.POSTCOPY_LISTEN: PostcopyListen(),
    Command.POSTCOPY_RUN: PostcopyRun(),
    Command.POSTCOPY_RESUME: PostcopyResume(),
    Command.SWITCHOVER_START: SwitchoverStart(),
}


# Section: encoding


def command(number: Command, payload: bytes = b"") -> bytes:
    """Write any command.

    :raises struct.error: the payload is longer than 65535 bytes.
    """
    return struct.pack(">BHH", SectionType.COMMAND, number, len(payload)) + payload


def encode_command(record: CommandRecord) -> bytes:
    """Write a command as a record says."""
    for number, bare in _BARE.items():
        if record == bare:
            return command(number)
    return _ENCODERS[type(record)](record)


def _encode_ping(record: CommandRecord) -> bytes:
    return command(Command.PING, struct.pack(">I", cast("Ping", record).value))


def _encode_advise(record: CommandRecord) -> bytes:
    advise = cast("PostcopyAdvise", record)
    if advise.page_sizes is None or advise.target_page_bytes is None:
        return command(Command.POSTCOPY_ADVISE)
    payload = struct.pack(">QQ", advise.page_sizes, advise.target_page_bytes)
    return command(Command.POSTCOPY_ADVISE, payload)


def _encode_discard(record: CommandRecord) -> bytes:
    discard = cast("RamDiscard", record)
    payload = bytes((DISCARD_VERSION,)) + encode_name(discard.block) + b"\0"
    payload += np.asarray(discard.ranges).astype(">u8").tobytes()
    return command(Command.POSTCOPY_RAM_DISCARD, payload)


def _encode_package(record: CommandRecord) -> bytes:
    data = cast("Package", record).data
    return command(Command.PACKAGED, struct.pack(">I", len(data))) + data


def _encode_recv_bitmap(record: CommandRecord) -> bytes:
    return command(Command.RECV_BITMAP, encode_name(cast("RecvBitmap", record).block))


_ENCODERS: dict[type[CommandRecord], Callable[[CommandRecord], bytes]] = {
    Ping: _encode_ping,
    PostcopyAdvise: _encode_advise,
    RamDiscard: _encode_discard,
    Package: _encode_package,
    RecvBitmap: _encode_recv_bitmap,
}


# Section: decoding


@dataclass(frozen=True, slots=True)
class CommandContext:
    """What a command is checked against; packages do not nest."""

    receiver: Receiver
    package_limit_bytes: int
    nested: bool = False


def read_command(reader: StreamBuffer, context: CommandContext) -> CommandRecord | None:
    """Read a command behind its type byte, a package with all its bytes.

    :return: ``None`` for a discard in a block that we ignore.
    :raises StreamError: it is unknown, malformed, or about a block that we do not have.
    """
    number, length = reader.u16(), reader.u16()
    known = _known(reader, number, length)
    reader.need(length)
    payload = _Payload(reader, known, length)
    if (bare := _BARE.get(known)) is not None:
        return bare
    return _DECODERS[known](payload, context)


def name_command(reader: StreamBuffer) -> str:
    """Say which command stands behind the cursor, as far as it is there; for messages."""
    number = int.from_bytes(reader.rest()[:2], "big") if reader.available >= 2 else 0
    return f"command {Command(number).name}" if 0 < number <= max(Command) else "a command"


def _known(reader: StreamBuffer, number: int, length: int) -> Command:
    if number == Command.INVALID or number > max(Command):
        reader.fail(f"MIG_CMD {number:#x} unknown (len {length:#x})", HEAD_BYTES)
    known = Command(number)
    wanted = FIXED_LENGTHS.get(known, length)
    if length != wanted:
        reader.fail(
            f"{known.name} received with bad length - expecting {wanted}, got {length}", HEAD_BYTES
        )
    if known is Command.ENABLE_COLO:
        reader.fail(
            "ENABLE_COLO command come in migration stream, but x-colo capability is not set",
            HEAD_BYTES,
        )
    return known


class _Payload:
    # The payload of one command: whole in the buffer, so running out of it is the peer's fault.

    def __init__(self, reader: StreamBuffer, number: Command, length: int) -> None:
        self.reader = reader
        self.number = number
        self.length = length
        self._offset = reader.position - HEAD_BYTES
        self._left = length

    def fail(self, message: str) -> NoReturn:
        raise StreamError(message, self._offset)

    def count(self, wanted: int) -> None:
        if self._left < wanted:
            self.fail(f"CMD_{self.number.name} invalid length ({self.length})")
        self._left -= wanted

    def u8(self) -> int:
        self.count(1)
        return self.reader.u8()

    def name(self) -> str:
        length = self.u8()
        self.count(length)
        return self.reader.text(length)

    def ranges(self) -> npt.NDArray[np.uint64]:
        if not self._left or self._left % _RANGE_BYTES:
            self.fail(f"CMD_{self.number.name} invalid length ({self.length})")
        found = np.frombuffer(self.reader.take(self._left), ">u8").reshape(-1, 2)
        return found.astype(np.uint64)

    def end(self) -> None:
        if self._left:
            self.fail(f"CMD_{self.number.name} invalid length ({self.length})")


def _read_ping(payload: _Payload, context: CommandContext) -> Ping:  # noqa: ARG001 - see table
    return Ping(payload.reader.u32())


def _read_advise(
    payload: _Payload,
    context: CommandContext,  # noqa: ARG001 - see table
) -> PostcopyAdvise:
    if not payload.length:
        return PostcopyAdvise()
    if payload.length != _RANGE_BYTES:
        payload.fail(f"CMD_POSTCOPY_ADVISE invalid length ({payload.length})")
    return PostcopyAdvise(payload.reader.u64(), payload.reader.u64())


def _read_package(payload: _Payload, context: CommandContext) -> Package:
    length = payload.reader.u32()
    if context.nested:
        payload.fail("CMD_PACKAGED within a package")
    if length > context.package_limit_bytes:
        payload.fail(
            f"CMD_PACKAGED: Unreasonably large packaged state: {length}; "
            f"at most {context.package_limit_bytes} bytes are taken"
        )
    return Package(payload.reader.take(length))


def _read_recv_bitmap(payload: _Payload, context: CommandContext) -> RecvBitmap:
    block = payload.name()
    payload.end()
    receiver = context.receiver
    if block not in receiver.layout and block not in receiver.ignored_blocks:
        payload.fail(f"loadvm_handle_recv_bitmap: block '{block}' not found")
    return RecvBitmap(block)


def _read_discard(payload: _Payload, context: CommandContext) -> RamDiscard | None:
    if payload.length < _SHORTEST_DISCARD:
        payload.fail(f"CMD_POSTCOPY_RAM_DISCARD invalid length ({payload.length})")
    if version := payload.u8():
        payload.fail(f"CMD_POSTCOPY_RAM_DISCARD invalid version ({version})")
    block = payload.name()
    if nil := payload.u8():
        payload.fail(f"CMD_POSTCOPY_RAM_DISCARD missing nil ({nil})")
    ranges = payload.ranges()
    if block in context.receiver.ignored_blocks:
        return None
    local = context.receiver.layout.get(block)
    if local is None:
        payload.fail(f"ram_discard_range: Failed to find block '{block}'")
    if (wrong := _first_wrong(ranges, local)) is not None:
        start, length = ranges[wrong].tolist()
        payload.fail(f"ram_block_discard_range: {_complaint(block, local, start, length)}")
    return RamDiscard(block, ranges)


def _first_wrong(ranges: npt.NDArray[np.uint64], local: BlockLayout) -> int | None:
    """Which range is the first that is not of whole pages inside the block."""
    starts, lengths = ranges[:, 0], ranges[:, 1]
    size, page = np.uint64(local.size_bytes), np.uint64(local.page_size_bytes)
    # Each is bounded before they are added up: the sum cannot wrap round.
    outside = (starts > size) | (lengths > size) | (starts + lengths > size)
    wrong = outside | (starts % page != 0) | (lengths % page != 0)
    return int(wrong.argmax()) if wrong.any() else None


def _complaint(block: str, local: BlockLayout, start: int, length: int) -> str:
    if start % local.page_size_bytes:
        return f"Unaligned start address: {start:#x}"
    if length % local.page_size_bytes:
        return f"Unaligned length: {length:x}"
    return f"Overrun block '{block}' ({start}/{length:x}/{local.size_bytes:x})"


_DECODERS: dict[Command, Callable[[_Payload, CommandContext], CommandRecord | None]] = {
    Command.PING: _read_ping,
    Command.POSTCOPY_ADVISE: _read_advise,
    Command.POSTCOPY_RAM_DISCARD: _read_discard,
    Command.PACKAGED: _read_package,
    Command.RECV_BITMAP: _read_recv_bitmap,
}
