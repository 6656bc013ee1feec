"""The pager asks over a link that has just broken."""

import socket

from fakes.guest import FakeGuest
from postcopy.channel.sockets import SocketChannel
from postcopy.destination.return_path import ReturnPath


def test_a_request_over_a_broken_link_is_not_the_pagers_end():
    ours, theirs = socket.socketpair()
    theirs.close()
    guest = FakeGuest(1 << 20)
    ram = guest.incoming_ram()
    (paged,) = ram
    path = ReturnPath()
    with SocketChannel(ours, "broken") as channel:
        path.open(channel)
        for page in range(3):
            path.request([(paged.block, page)])
    ram.close()
    guest.close()
