"""Opens the channels of a source or a snapshot, so that a cancel ends the wait."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from postcopy.channel.address import Address, ExecAddress, TcpAddress
from postcopy.channel.channel import Channel
from postcopy.channel.connect import connect
from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken, MigrationCancelled, Refused
from postcopy.kernel import threads
from postcopy.parameters import Capabilities, Capability
from postcopy.source.user_requests import UserRequests
from postcopy.tls_options import TlsOptions


class Connector:
    """Opens channels, for one thread; :meth:`leave` is for any.

    :param requests: of the user.
    :param tls: encrypt each channel with this; None: none.
    """

    def __init__(self, requests: UserRequests, tls: TlsOptions | None = None) -> None:
        self._requests = requests
        self._tls = tls
        self._starting = threading.Lock()
        # Under the lock: the command that has been started last, and whether none may be any more.
        self._command: Channel | None = None
        self._left = False

    def connect(self, address: Address, in_vain: Callable[[], bool] = lambda: False) -> Channel:
        """Open a channel.

        :param in_vain: whether the channel is not needed any more; a change of it sets
            ``requests.interrupt``.
        :raises CannotConnect: the destination does not listen, or is refused, or refuses this side.
        :raises MigrationCancelled: by the user; a channel that is opened later is closed.
        :raises ChannelBroken: ``in_vain`` is true.
        :raises HostCannot: no thread can be started.
        """
        if isinstance(address, ExecAddress):
            with self._starting:
                if self._requests.cancelled:
                    raise MigrationCancelled("cancelled by the user")
                if self._left:
                    raise ChannelBroken(f"{address}: the engine ends")
                self._command = connect(address)  # which waits for nothing
                return self._command
        return self._wait(address, in_vain)

    def leave(self) -> None:
        """End a command that has been started, and start none any more: the engine ends."""
        with self._starting:
            self._left = True
            command = self._command
        if command is not None:
            command.leave()

    def _wait(self, address: Address, in_vain: Callable[[], bool]) -> Channel:
        """The thread ``connect`` opens it: the kernel may try for minutes to reach a host."""
        made: Future[Channel] = Future()
        made.add_done_callback(lambda _: self._requests.interrupt.set())
        arguments = (address, self._tls, made)
        threads.start(
            threading.Thread(target=_connect, args=arguments, name="connect", daemon=True)
        )
        while not made.done():
            if self._requests.cancelled or in_vain():
                made.add_done_callback(_close)
                if self._requests.cancelled:
                    raise MigrationCancelled("cancelled by the user")
                raise ChannelBroken(
                    f"{address}: the first connection broke before the second was there"
                )
            self._requests.interrupt.wait()
            self._requests.interrupt.clear()
        return made.result()


def is_answered(channel: Channel, capabilities: Capabilities) -> bool:
    """Whether there is a return path; a command (``gzip > file``) has one only if the user says so.

    :raises Refused: postcopy needs one; the channel has been closed.
    """
    if Capability.POSTCOPY_RAM in capabilities.on:
        check_answers(channel)
    told = {Capability.POSTCOPY_RAM, Capability.RETURN_PATH} & capabilities.on
    return channel.can_return and (bool(told) or isinstance(channel, SocketChannel))


def check_answers(channel: Channel) -> None:
    """Refuse a channel on which nothing comes back, and close it.

    :raises Refused: it is such a channel.
    """
    if not channel.can_return:
        channel.close()
        raise Refused(
            f"postcopy needs a channel that answers, which {channel.description} does not"
        )


def _connect(address: Address, tls: TlsOptions | None, made: "Future[Channel]") -> None:
    try:
        channel = connect(address)
        made.set_result(channel if tls is None else _secured(channel, address, tls))
    except BaseException as error:
        made.set_exception(error)


def _secured(channel: Channel, address: Address, tls: TlsOptions) -> Channel:
    from postcopy.channel.tls_channel import secure  # `ssl` takes long to import

    host = address.endpoint[0] if isinstance(address, TcpAddress) else ""
    return secure(channel, tls, host)


def _close(made: "Future[Channel]") -> None:
    if made.exception() is None:
        channel = made.result()
        channel.shutdown()
        channel.close()
