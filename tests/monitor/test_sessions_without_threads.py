"""Monitors of a process that can have no more threads: clients are turned away, and come back later."""

import socket

import pytest


@pytest.mark.parametrize("name", ["monitor-client", "qmp-writer", "qmp-worker"])
def test_a_client_is_turned_away(server, connect, no_threads, name):
    no_threads.refuse(name)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(server.address.removeprefix("unix:"))
        with client.makefile("rb") as answers:
            said = answers.read()  # up to the end of the connection
    assert (b"QMP" in said) == (name == "qmp-worker")
    no_threads.allow()
    assert "QMP" in connect().greeting


def test_what_is_asked_out_of_band_is_refused(ours, no_threads):
    ours.negotiate("oob")
    no_threads.refuse("qmp-out-of-band")
    refused = ours.ask({"exec-oob": "migrate-recover", "arguments": {"uri": "tcp:127.0.0.1:0"}})
    assert "raise the limit of threads" in refused["error"]["desc"]
