"""One end of a vhost-user connection: messages with their descriptors, checked against the table.

Each message that cannot be is a :class:`~postcopy.errors.VhostUserError`, and no descriptor of it stays
open.  Nothing can be read after one: where the next message begins is not known.
"""

import array
import contextlib
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final, Self

from postcopy.errors import VhostUserError
from postcopy.kernel.calls import close_all
from postcopy.kernel.patience import persist
from postcopy.vhost_user.messages import MOST_DESCRIPTORS, Flag, Kind, name_of
from postcopy.vhost_user.payloads import HEADER, Number, Payload

_VERSION_BITS: Final = 3
_KNOWN: Final = int(_VERSION_BITS | Flag.REPLY | Flag.NEED_REPLY)
_SIZE_AT: Final = 8
_CREDENTIALS: Final = struct.Struct("=iII")
"""``struct ucred``: process, user, group."""
_SPACE: Final = socket.CMSG_SPACE(4 * MOST_DESCRIPTORS) + socket.CMSG_SPACE(_CREDENTIALS.size)


class Message:
    """One message; as a context it closes the descriptors that were not taken.

    :ivar payload: what the table says of its kind, :class:`Number` for the acknowledgement of a table of
        memory, None where there is none.
    """

    __slots__ = ("_fds", "flags", "kind", "payload")

    def __init__(self, kind: Kind, flags: int, payload: Payload | None, fds: list[int]) -> None:
        self.kind = kind
        self.flags = flags
        self.payload = payload
        self._fds = fds

    @property
    def needs_reply(self) -> bool:
        """Whether its sender wants it acknowledged."""
        return bool(self.flags & Flag.NEED_REPLY)

    @property
    def descriptors(self) -> list[int]:
        """Those that have not been taken; closed with the message."""
        return self._fds

    def take_descriptor(self) -> int:
        """The next of its descriptors, the caller's from now on."""
        return self._fds.pop(0)

    def wrong(self, what: str, offset: int | None = None) -> VhostUserError:
        """The error for a message that cannot be at this moment."""
        return VhostUserError(f"{self.kind.name}: {what}", offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._fds)
        self._fds.clear()


class Connection:
    """One end; one thread at a time.

    :param connected: a Unix stream socket, blocking; this object's from now on.
    :param kinds: the messages that the other end may send.
    :ivar process_id: of the process that has sent the last message, if the socket has ``SO_PASSCRED``; 0
        while it is not known.
    """

    def __init__(self, connected: socket.socket, kinds: Mapping[int, Kind]) -> None:
        self._socket = connected
        self._kinds = kinds
        self._until_s: float | None = None
        self.process_id = 0

    def fileno(self) -> int:
        """For ``poll``."""
        return self._socket.fileno()

    def bound(self, timeout_s: float | None) -> None:
        """Bound all that is sent and received from now on, together; None: not at all.

        What is late is a ``TimeoutError``.
        """
        self._until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)

    def shut_down(self) -> None:
        """End every wait for the other end, on any thread; harmless when it is gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> Message | None:
        """Wait for the next message; None: the other end has closed.

        :raises VhostUserError: it cannot be.
        """
        return self._receive(is_reply=False)

    def receive_answer(self, kind: Kind, form: type[Payload] | None = None) -> Message:
        """Wait for the answer to a message of that kind.

        :param form: its payload, if it is another than the table says.
        :return: :attr:`Kind.answer` in its payload, or :class:`Number` for an acknowledgement.
        :raises VhostUserError: the other end has closed, or something else has come.
        """
        message = self._receive(is_reply=True, form=form)
        if message is None:
            raise VhostUserError(f"{kind.name}: no answer, the other end has closed")
        if message.kind is not kind:
            with message:
                raise message.wrong(f"it answers {kind.name}", 0)
        return message

    def send(
        self,
        kind: Kind,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        """Send a message; the descriptors stay the caller's.

        :raises OSError: the other end is gone.
        """
        flags = Flag.VERSION | (Flag.NEED_REPLY if need_reply else 0)
        self._send(kind, int(flags), payload, fds)

    def answer(self, message: Message, payload: Payload | None, fds: Sequence[int] = ()) -> None:
        """Answer a message; the descriptors stay the caller's.

        :raises OSError: the other end is gone.
        """
        self._send(message.kind, int(Flag.VERSION | Flag.REPLY), payload, fds)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, kind: Kind, flags: int, payload: Payload | None, fds: Sequence[int]) -> None:
        body = b"" if payload is None else payload.pack()
        data = HEADER.pack(kind.number, flags, len(body)) + body
        sent = persist(socket.send_fds, self._socket, [data], fds)
        if sent < len(
            data
        ):  # to send nothing fails, too, where the other end has answered and closed
            self._socket.sendall(data[sent:])

    def _receive(self, *, is_reply: bool, form: type[Payload] | None = None) -> Message | None:
        fds: list[int] = []
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(close_all, fds)
            header = self._read(HEADER.size, fds, "a message's header")
            if not header:
                return None
            if len(header) < HEADER.size:
                raise VhostUserError(f"{len(header)} bytes of a header of {HEADER.size}", 0)
            number, flags, size = HEADER.unpack(header)
            kind = self._kind(number, flags, is_reply=is_reply)
            forms = [form] if form else _forms(kind, is_reply=is_reply)
            _check_size(kind, size, forms)
            body = self._read(size, fds, kind.name)
            if len(body) < size:
                raise VhostUserError(f"{kind.name}: {len(body)} bytes of its payload of {size}", 8)
            message = Message(kind, flags, _payload(kind, body, forms, is_reply=is_reply), fds)
            _check_descriptors(message, len(fds), is_reply=is_reply)
            on_failure.pop_all()
        return message

    def _kind(self, number: int, flags: int, *, is_reply: bool) -> Kind:
        """The kind that a header says, if there can be such a message."""
        kind = self._kinds.get(number)
        if kind is None:
            raise VhostUserError(f"{name_of(number)} is not taken here", 0)
        if flags & _VERSION_BITS != Flag.VERSION or flags & ~_KNOWN:
            raise VhostUserError(f"{kind.name}: flags {flags:#x}", 4)
        if bool(flags & Flag.REPLY) != is_reply:
            what = "an answer is due" if is_reply else "an answer to no message"
            raise VhostUserError(f"{kind.name}: {what}", 4)
        return kind

    def _read(self, size: int, fds: list[int], what: str) -> bytes:
        """Read so many bytes, fewer at the end of the connection; descriptors are added to ``fds``.

        :raises VhostUserError: more descriptors than any message has, or some were lost.
        """
        data = bytearray()
        while len(data) < size:
            if self._until_s is not None:
                self._socket.settimeout(max(0.001, self._until_s - time.monotonic()))
            try:
                # Not socket.recv_fds: it drops the flags, and a descriptor would be inherited.
                part, ancillary, flags, _ = self._socket.recvmsg(
                    size - len(data), _SPACE, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionError:
                part, ancillary, flags = b"", [], 0
            for level, form, payload in ancillary:
                if level == socket.SOL_SOCKET and form == socket.SCM_RIGHTS:
                    come = array.array("i")
                    come.frombytes(payload[: len(payload) // come.itemsize * come.itemsize])
                    fds.extend(come)
                elif form == socket.SCM_CREDENTIALS and len(payload) == _CREDENTIALS.size:
                    self.process_id = _CREDENTIALS.unpack(payload)[0]
            if flags & socket.MSG_CTRUNC or len(fds) > MOST_DESCRIPTORS:
                raise VhostUserError(
                    f"{what}: more than {MOST_DESCRIPTORS} descriptors, or this process has too many "
                    "files open to take them",
                    0,
                )
            if not part:
                break
            data += part
        return bytes(data)


def _forms(kind: Kind, *, is_reply: bool) -> list[type[Payload]]:
    """The payloads that a message of that kind can have."""
    if is_reply:
        return [kind.answer] if kind.answer else [] if kind.has_answer else [Number]
    forms = [kind.payload] if kind.payload else []
    return [*forms, Number] if kind.is_acknowledged else forms


def _check_size(kind: Kind, size: int, forms: Sequence[type[Payload]]) -> None:
    most = max((form.MOST_BYTES for form in forms), default=0)
    if size > most:
        what = f"{size} bytes of payload, and at most {most} are possible"
        raise VhostUserError(f"{kind.name}: {what}", _SIZE_AT)


def _payload(
    kind: Kind, body: bytes, forms: Sequence[type[Payload]], *, is_reply: bool
) -> Payload | None:
    try:
        if not forms or (is_reply and kind.answer_may_be_empty and not body):
            return None
        if not is_reply and kind.is_acknowledged and len(body) == Number.MOST_BYTES:
            return Number.unpack(body)
        return forms[0].unpack(body)
    except VhostUserError as error:
        raise VhostUserError(f"{kind.name}: {error.message}", error.offset) from error


def _check_descriptors(message: Message, count: int, *, is_reply: bool) -> None:
    kind = message.kind
    if is_reply:
        least = most = kind.answer_descriptors
    elif kind.is_acknowledged and isinstance(message.payload, Number):
        least = most = 0
    else:
        least, most = kind.descriptors(message.payload)
    if not least <= count <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        raise message.wrong(f"{count} descriptors, and it has {wanted}", 0)
