"""Wait for encrypted channels: a peer that stalls in its handshake, or fails in it, holds up no other."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from postcopy.channel.address import Address
from postcopy.channel.channel import Channel
from postcopy.channel.listen import Listener
from postcopy.channel.tls_channel import TlsChannel, secure
from postcopy.channel.tls_session import context_for
from postcopy.errors import ChannelBroken, PostcopyError
from postcopy.kernel import threads
from postcopy.tls_options import TlsOptions

MOST_HANDSHAKES: Final = 32
"""At the same time; a connection that comes then is closed."""


def _to_standard_error(text: str) -> None:
    sys.stderr.write(f"postcopy: {text}\n")


class TlsListener(Listener):
    """Gives the channels whose handshakes have succeeded, in the order in which they have connected.

    A connection that has begun its handshake holds up those after it, until its end or its deadline.  QEMU
    7.2 opens its second connection while the handshake of the first ends here, and only the order tells
    the two apart.  A connection that has said nothing holds up no other.

    A peer that is refused is named to ``note``, and the listener goes on.

    :param note: takes a line for the user; from any thread.
    :raises Refused: a certificate or key cannot be used.
    :raises HostCannot: there can be no more threads.
    """

    def __init__(
        self,
        address: Address,
        options: TlsOptions,
        note: Callable[[str], None] = _to_standard_error,
    ) -> None:
        context_for(options)  # what is wrong is said before any peer comes
        super().__init__(address)
        self._options = options
        self._note = note
        self._changed = threading.Condition()
        # Under `_changed`.
        self._connections = 0
        self._ready: dict[int, TlsChannel] = {}  # by the number of the connection, as the next
        self._shaking: dict[int, tuple[Channel, threading.Thread]] = {}
        self._over: PostcopyError | None = None
        self._ended = False
        self._acceptor = threading.Thread(target=self._accept_all, name="tls-accept", daemon=True)
        try:
            threads.start(self._acceptor)
        except PostcopyError:
            super().close()
            raise

    def accept(self, timeout_s: float | None = None) -> Channel:
        """See :meth:`Listener.accept`; the time counts while no handshake is under way."""
        with self._changed:
            while not self._changed.wait_for(self._has_news, timeout_s):
                if not self._shaking:
                    raise TimeoutError(f"no peer connected within {timeout_s} s")
                self._changed.wait_for(lambda: self._has_news() or not self._shaking)
            number = self._next()
            if number is not None and not self._ended:
                return self._ready.pop(number)
            raise self._over or ChannelBroken("no longer listened on")

    def _has_news(self) -> bool:
        return bool(self._next() is not None or self._over or self._ended)

    def _next(self) -> int | None:
        """The number of the connection to give next; None: there is none, or it has to wait."""
        number = min(self._ready, default=None)
        if number is None:
            return None
        begun = (each for each, (channel, _) in self._shaking.items() if channel.received_bytes)
        return None if any(each < number for each in begun) else number

    def close(self) -> None:
        """See :meth:`Listener.close`; handshakes that are under way end, too."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        super().close()
        with self._changed:
            running = [self._acceptor, *(thread for _, thread in self._shaking.values())]
            for channel, _ in self._shaking.values():
                channel.shutdown()
        for thread in running:
            if thread is not threading.current_thread():
                thread.join()
        with self._changed:
            unused, self._ready = list(self._ready.values()), {}
        for ready in unused:
            ready.close()

    # --- threads of its own

    def _accept_all(self) -> None:
        try:
            while True:
                self._begin(super().accept())
        except PostcopyError as error:
            with self._changed:
                self._over = error
                self._changed.notify_all()

    def _begin(self, channel: Channel) -> None:
        with self._changed:
            number = self._connections = self._connections + 1
            work = partial(self._shake_hands, number, channel)
            thread = threading.Thread(target=work, name="tls-handshake", daemon=True)
            if len(self._shaking) >= MOST_HANDSHAKES or self._ended:
                self._note(f"{channel.description}: too many TLS handshakes at once; ignored")
                channel.close()
                return
            self._shaking[number] = channel, thread
            try:
                threads.start(thread)
            except PostcopyError as error:
                del self._shaking[number]
                self._note(f"{channel.description}: {error}; ignored")
                channel.close()

    def _shake_hands(self, number: int, channel: Channel) -> None:
        secured, why = None, ""
        try:
            secured = secure(channel, self._options)
        except (PostcopyError, OSError) as error:
            why = str(error)
        with self._changed:
            del self._shaking[number]
            if secured is not None and not self._ended:
                self._ready[number] = secured
                secured = None
            elif why and not self._ended:
                self._note(f"{why}; the connection is ignored")
            self._changed.notify_all()
        if secured is not None:
            secured.close()
