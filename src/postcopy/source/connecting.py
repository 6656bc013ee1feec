"""Reach the destination, for as long as the user wants it.

The kernel may try for minutes to reach a host that does not answer; a user who cancels does not wait.
"""

import threading
from concurrent.futures import Future

from postcopy.channel.address import Address
from postcopy.channel.channel import Channel
from postcopy.channel.connect import connect
from postcopy.errors import MigrationCancelled
from postcopy.source.orders import Orders


def connect_unless_cancelled(address: Address, orders: Orders) -> Channel:
    """Open a channel; the thread ``connect`` does it, so that this one can be told to stop.

    :raises CannotConnect: nobody is there.
    :raises MigrationCancelled: the user has given up; what may still come of it is closed.
    """
    made: Future[Channel] = Future()
    made.add_done_callback(lambda _: orders.interrupt.set())
    threading.Thread(target=_connect, args=(address, made), name="connect", daemon=True).start()
    while not made.done():
        orders.interrupt.wait()
        orders.interrupt.clear()
        if orders.cancelled:
            made.add_done_callback(_close)
            raise MigrationCancelled("cancelled by the user")
    return made.result()


def _connect(address: Address, made: "Future[Channel]") -> None:
    try:
        made.set_result(connect(address))
    except BaseException as error:
        made.set_exception(error)


def _close(made: "Future[Channel]") -> None:
    if made.exception() is None:
        made.result().close()
