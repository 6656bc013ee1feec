"""``x-restore`` as both monitors take it."""

import pytest

from fakes.monitor_backend import make_backend
from postcopy.errors import Refused
from postcopy.monitor.hmp import Hmp
from postcopy.monitor.qmp_session import COMMANDS
from postcopy.restore_options import RestoreOptions


def restores(calls, **options):
    """Whether it is the one call, for that image, with these options and no others."""
    ((name, found),) = calls
    return name == "restore" and found == RestoreOptions("/a/b", found.began_ns, **options)


def qmp(**arguments):
    backend = make_backend()
    command = COMMANDS["x-restore"]
    command.run(backend, command.arguments(arguments, ""))
    return backend.migration.calls


@pytest.mark.parametrize(
    ("arguments", "wishes"),
    [
        ({}, {}),
        ({"lazy": True}, {"lazy": True}),
        (
            {"lazy": True, "prefetch": "off", "record-working-set": True},
            {"lazy": True, "prefetch": "off", "record": True},
        ),
    ],
)
def test_qmp(arguments, wishes):
    assert restores(qmp(path="/a/b", **arguments), **wishes)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "Parameter 'path' is missing"),
        ({"path": 1}, "Invalid parameter type for 'path', expected: string"),
        ({"path": "a", "lazy": 1}, "expected: boolean"),
        ({"path": "a", "prefetch": "some"}, "Parameter 'prefetch' does not accept value 'some'"),
        ({"path": "a", "speed": 1}, "Parameter 'speed' is unexpected"),
    ],
)
def test_qmp_refuses(arguments, why):
    with pytest.raises(Refused, match=why):
        qmp(**arguments)


@pytest.mark.parametrize(
    ("line", "wishes"),
    [
        ("x_restore /a/b", {}),
        ("x_restore -l /a/b", {"lazy": True}),
        ("x_restore -l -n -r /a/b", {"lazy": True, "prefetch": "off", "record": True}),
    ],
)
def test_hmp(line, wishes):
    backend = make_backend()
    assert Hmp(backend, interactive=False).run(line) == ""
    assert restores(backend.migration.calls, **wishes)
