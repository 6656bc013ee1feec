"""A destination that does not even read the package, while no other side may run the guest."""

import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from postcopy.channel.sockets import SocketChannel
from postcopy.errors import ChannelBroken
from postcopy.guest import DeviceState
from postcopy.link.engine.guest_proxy import Saving
from postcopy.link.rpc import Answer
from postcopy.parameters import Capabilities
from postcopy.source.connection import Connection
from postcopy.source.counters import Counters, StageTimes
from postcopy.source.flow_control import PushPolicy
from postcopy.source.switchover import Switchover
from postcopy.source.user_requests import UserRequests
from postcopy.status import Status, StatusMachine
from postcopy.stream.pings import PACKAGE_PING

FAR_TOO_MUCH_BYTES = 8 << 20
"""For what the kernel takes of a package that nobody reads."""


def saved(states):
    answer = Answer()
    answer.give(states)
    return Saving(answer, began_ns=0)


def hand_over(switchover, connection):
    connection.begin_watch()  # as discard_ahead() has done, while the guest ran
    switchover.start_postcopy()
    connection.answers.wait_pong(PACKAGE_PING)


@pytest.mark.parametrize("more_bytes", [0, FAR_TOO_MUCH_BYTES])
def test_it_is_noticed_whether_or_not_the_kernel_takes_all_of_it(more_bytes):
    near, far = socket.socketpair()
    given_up = threading.Event()
    pages = SimpleNamespace(
        block=SimpleNamespace(name="ram", size_bytes=4096, page_size_bytes=4096),
        pending=np.ones(1, np.bool_),
    )
    dirty = SimpleNamespace(blocks=[pages], syncs=1, collect_all=lambda: 4096)
    requests, counters = UserRequests(), Counters()
    states = [DeviceState("cpu", 0, 1, bytes(more_bytes))]
    connection = Connection(
        SocketChannel(near, "unread"),
        dirty,
        SimpleNamespace(sent_bytes=0, abandon=lambda: None, end_of_precopy=lambda: None),
        counters,
        PushPolicy(),
        requests.interrupt,
        lambda: 200,
        answered=True,
    )
    switchover = Switchover(
        SimpleNamespace(pause_to_save=lambda: saved(states), move=lambda _: given_up.set()),
        connection,
        dirty,
        requests,
        StatusMachine(begin=Status.ACTIVE),
        Capabilities(),
        counters,
        StageTimes(),
        lambda _: "",
    )
    switchover.stop_guest()
    with far:
        with pytest.raises(ChannelBroken) as broken:
            hand_over(switchover, connection)
        assert "no sign of life from the destination" in str(connection.explain(broken.value))
        assert given_up.is_set()
        assert switchover.committed is (more_bytes == 0)  # what was not taken whole cannot run
    connection.abandon()
