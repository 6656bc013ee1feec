"""Reach the destination, for as long as the user wants it.

The kernel may try for minutes to reach a host that does not answer; a user who cancels does not wait.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from postcopy.channel.address import Address
from postcopy.channel.channel import Channel
from postcopy.channel.connect import connect
from postcopy.errors import ChannelBroken, MigrationCancelled
from postcopy.kernel import threads
from postcopy.source.user_requests import UserRequests


def connect_unless_cancelled(
    address: Address, requests: UserRequests, in_vain: Callable[[], bool] = lambda: False
) -> Channel:
    """Open a channel; the thread ``connect`` does it, so that this one can be told to stop.

    :param in_vain: whether nobody needs it any more; whoever makes it true sets ``requests.interrupt``.
    :raises CannotConnect: nobody is there.
    :raises MigrationCancelled: the user has given up; what may still come of it is closed.
    :raises ChannelBroken: it is in vain.
    :raises HostCannot: there can be no more threads.
    """
    made: Future[Channel] = Future()
    made.add_done_callback(lambda _: requests.interrupt.set())
    arguments = (address, made)
    threads.start(threading.Thread(target=_connect, args=arguments, name="connect", daemon=True))
    while not made.done():
        if requests.cancelled or in_vain():
            made.add_done_callback(_close)
            if requests.cancelled:
                raise MigrationCancelled("cancelled by the user")
            raise ChannelBroken(
                f"{address}: the first connection broke before the second was there"
            )
        requests.interrupt.wait()
        requests.interrupt.clear()
    return made.result()


def _connect(address: Address, made: "Future[Channel]") -> None:
    try:
        made.set_result(connect(address))
    except BaseException as error:
        made.set_exception(error)


def _close(made: "Future[Channel]") -> None:
    if made.exception() is None:
        channel = made.result()
        channel.shutdown()
        channel.close()
