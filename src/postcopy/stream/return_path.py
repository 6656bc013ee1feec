"""The return path, destination to source: bytes from and to messages.

A message is type, length, payload.  RECV_BITMAP alone goes on behind its counted payload, with a
bitmap whose size both sides know from the block.
"""

import struct
from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt

from postcopy.stream.configuration import encode_name
from postcopy.stream.layout import BlockLayout, Layout
from postcopy.stream.numbers import (
    BITMAP_END,
    LONGEST_RETURN_PAYLOAD,
    RESUME_ACK_VALUE,
    TARGET_PAGE_BYTES,
    TLS_ALERT,
    TLS_HANDSHAKE,
    ReturnPathType,
)
from postcopy.stream.reader import DecoderInput, Incomplete
from postcopy.stream.records import (
    Pong,
    RecvBitmapReply,
    RequestPages,
    ResumeAck,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
)

_CAPACITY_BYTES = 64 << 10
_HEAD_BYTES = 4
_LAST_TYPE = max(ReturnPathType)
_REQUEST_BYTES = 12
_WORD_BITS = 64


# Section: encoding


def encode_message(message: ReturnPathMessage) -> bytes:
    """Write a message.

    :raises struct.error: a number does not fit.
    """
    return _ENCODERS[type(message)](message)


def _message(kind: ReturnPathType, payload: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, len(payload)) + payload


def _encode_value(message: ReturnPathMessage) -> bytes:
    kinds = {Shut: ReturnPathType.SHUT, Pong: ReturnPathType.PONG}
    kind = kinds.get(type(message), ReturnPathType.RESUME_ACK)
    return _message(kind, struct.pack(">I", cast("Shut", message).value))


def _encode_request(message: ReturnPathMessage) -> bytes:
    request = cast("RequestPages", message)
    payload = struct.pack(">QI", request.start, request.length_bytes)
    if request.block is None:
        return _message(ReturnPathType.REQ_PAGES, payload)
    return _message(ReturnPathType.REQ_PAGES_ID, payload + encode_name(request.block))


def _encode_bitmap(message: ReturnPathMessage) -> bytes:
    reply = cast("RecvBitmapReply", message)
    bits = np.packbits(reply.bitmap, bitorder="little").tobytes()
    bits = bits.ljust(_bitmap_bytes(len(reply.bitmap)), b"\0")
    head = _message(ReturnPathType.RECV_BITMAP, encode_name(reply.block))
    return b"".join((head, struct.pack(">Q", len(bits)), bits, struct.pack(">Q", BITMAP_END)))


def _encode_switchover(_: ReturnPathMessage) -> bytes:
    return _message(ReturnPathType.SWITCHOVER_ACK)


_ENCODERS: dict[type[ReturnPathMessage], Callable[[ReturnPathMessage], bytes]] = {
    Shut: _encode_value,
    Pong: _encode_value,
    ResumeAck: _encode_value,
    RequestPages: _encode_request,
    RecvBitmapReply: _encode_bitmap,
    SwitchoverAck: _encode_switchover,
}


def _bitmap_bytes(pages: int) -> int:
    return -(-pages // _WORD_BITS) * (_WORD_BITS // 8)


# Section: decoding

_FIXED_LENGTHS = {
    ReturnPathType.SHUT: 4,
    ReturnPathType.PONG: 4,
    ReturnPathType.REQ_PAGES: _REQUEST_BYTES,
    ReturnPathType.RESUME_ACK: 4,
    ReturnPathType.SWITCHOVER_ACK: 0,
}


class ReturnPathDecoder(DecoderInput):
    """Decodes what a destination says.  One thread only.

    :param layout: the source's blocks: requests and bitmaps are checked against them.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(_CAPACITY_BYTES)
        self._layout = layout
        self._block: str | None = None  # asked for last

    def next_message(self) -> ReturnPathMessage | None:
        """Decode the next message; ``None``: it needs more bytes.

        :class:`RequestPages` always names its block here.

        :raises StreamError: the message is wrong, or about what we do not have.
        """
        try:
            message = self._read()
        except Incomplete:
            self._reader.rollback()
            return None
        self._reader.commit()
        return message

    def _read(self) -> ReturnPathMessage:
        kind, length = self._read_head()
        self._reader.need(length)
        match kind:
            case ReturnPathType.SHUT:
                return Shut(self._reader.u32())
            case ReturnPathType.PONG:
                return Pong(self._reader.u32())
            case ReturnPathType.REQ_PAGES | ReturnPathType.REQ_PAGES_ID:
                return self._read_request(kind, length)
            case ReturnPathType.RECV_BITMAP:
                return self._read_bitmap(length)
            case ReturnPathType.RESUME_ACK:
                return self._read_resume_ack()
        return SwitchoverAck()

    def _read_head(self) -> tuple[ReturnPathType, int]:
        reader = self._reader
        number, length = divmod(reader.u32(), 1 << 16)
        if number in {TLS_ALERT, TLS_HANDSHAKE}:
            reader.fail(
                "RP: the destination speaks TLS; set tls-creds here too, or clear it there",
                _HEAD_BYTES,
            )
        if number == ReturnPathType.INVALID or number > _LAST_TYPE:
            reader.fail(
                f"RP: Received invalid message {number:#06x} length {length:#06x}", _HEAD_BYTES
            )
        kind = ReturnPathType(number)
        wanted = _FIXED_LENGTHS.get(kind, length)
        if length != wanted or length > LONGEST_RETURN_PAYLOAD:
            reader.fail(
                f"RP: Received '{kind.name}' message ({number:#06x}) with incorrect length "
                f"{length} expecting {wanted if wanted != length else LONGEST_RETURN_PAYLOAD}",
                _HEAD_BYTES,
            )
        return kind, length

    def _read_resume_ack(self) -> ResumeAck:
        value = self._reader.u32()
        if value != RESUME_ACK_VALUE:
            self._reader.fail(f"migrate_handle_rp_resume_ack: illegal resume_ack value {value}", 4)
        return ResumeAck(value)

    def _read_name(self, kind: ReturnPathType, counted: int) -> tuple[str, BlockLayout]:
        # The name fills the rest of the payload exactly, its length byte included.
        reader = self._reader
        length = reader.u8() if counted else 0
        if not counted or length != counted - 1:
            reader.fail(
                f"RP: Received '{kind.name}' message ({kind:#06x}) whose block name of {length} "
                f"bytes does not fill the payload"
            )
        name = reader.text(length)
        block = self._layout.get(name)
        if block is None:
            reader.fail(f"RP: no block '{name}'", length)
        return name, block

    def _read_request(self, kind: ReturnPathType, length: int) -> RequestPages:
        reader = self._reader
        if kind is ReturnPathType.REQ_PAGES_ID and length <= _REQUEST_BYTES:
            reader.fail(
                f"RP: Received 'REQ_PAGES_ID' message (0x0003) with incorrect length {length} "
                f"expecting more than {_REQUEST_BYTES}",
                _HEAD_BYTES,
            )
        start, wanted = reader.u64(), reader.u32()
        name = self._block
        if kind is ReturnPathType.REQ_PAGES_ID:
            name, _ = self._read_name(kind, length - _REQUEST_BYTES)
        if name is None:
            reader.fail("RP: request for the same block as before, with none before", length)
        self._check_request(name, start, wanted)
        self._block = name
        return RequestPages(name, start, wanted)

    def _check_request(self, name: str, start: int, length: int) -> None:
        block = self._layout[name]
        what = f"block '{name}' start: {start:#x} len: {length}"
        if not length or start % block.page_size_bytes or length % block.page_size_bytes:
            self._reader.fail(f"migrate_handle_rp_req_pages: Misaligned page request, {what}")
        if start + length > block.size_bytes:
            self._reader.fail(
                f"ram_save_queue_pages: request overrun, {what} blocklen={block.size_bytes:#x}"
            )

    def _read_bitmap(self, length: int) -> RecvBitmapReply:
        reader = self._reader
        name, block = self._read_name(ReturnPathType.RECV_BITMAP, length)
        pages = block.size_bytes // TARGET_PAGE_BYTES
        size, wanted = reader.u64(), _bitmap_bytes(pages)
        if size != wanted:
            reader.fail(f"ramblock '{name}' bitmap size mismatch ({size:#x} != {wanted:#x})", 8)
        raw = np.frombuffer(reader.take(size), np.uint8)
        if (mark := reader.u64()) != BITMAP_END:
            reader.fail(f"ramblock '{name}' end mark incorrect: {mark:#018x}", 8)
        bits: npt.NDArray[np.bool_] = np.unpackbits(raw, count=pages, bitorder="little").view(bool)
        return RecvBitmapReply(name, bits)
