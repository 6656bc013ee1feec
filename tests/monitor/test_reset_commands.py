"""``x-reset-point``, ``x-reset`` and ``x-reset-end`` as both monitors take them."""

import pytest

from fakes.monitor_backend import make_backend
from postcopy.errors import Refused, WrongState
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.qmp_session import COMMANDS


def qmp(name, **arguments):
    backend = make_backend()
    command = COMMANDS[name]
    return command.run(backend, command.arguments(arguments, "")), backend.migration.calls


def test_qmp():
    set_now = {"pause-us": 2000, "copied-bytes": 8 << 20}
    assert qmp("x-reset-point") == (set_now, [("set_point", None)])
    assert qmp("x-reset-point", path="/a/b")[1] == [("set_point", "/a/b")]
    assert qmp("x-reset") == ({"pages": 12, "us": 900, "whole": False}, [("reset",)])
    with pytest.raises(WrongState, match="there is no reset point"):
        qmp("x-reset-end")


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("x-reset-point", {"path": 1}, "Invalid parameter type for 'path', expected: string"),
        ("x-reset", {"path": "a"}, "Parameter 'path' is unexpected"),
    ],
)
def test_qmp_refuses(name, arguments, why):
    with pytest.raises(Refused, match=why):
        qmp(name, **arguments)


@pytest.mark.parametrize(
    ("line", "answer", "calls"),
    [
        ("x_reset_point", "copied: 8192 kbytes, paused: 2000 us\n", [("set_point", None)]),
        ("x_reset_point /a b", "copied: 8192 kbytes, paused: 2000 us\n", [("set_point", "/a b")]),
        ("x_reset", "pages: 12, paused: 900 us\n", [("reset",)]),
        ("x_reset_end", "Error: there is no reset point\n", []),
    ],
)
def test_hmp(line, answer, calls):
    backend = make_backend()
    assert Hmp(backend, interactive=False).run(line) == answer
    assert backend.migration.calls == calls
