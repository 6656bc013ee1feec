"""Why an order was refused, for programs: of machines of ours and of a stock QEMU."""

import pytest

import postcopy
from fakes.commands import need_kvm
from fakes.qemu_machine import QemuMachine
from postcopy import Reason, Refused
from postcopy.sync import Machine

NOWHERE = "tcp:127.0.0.1:1"


@pytest.fixture(scope="module")
def machine():
    need_kvm()
    with Machine.start(workload="idle", memory="64M") as source:
        yield source


@pytest.fixture(scope="module")
def waiting():
    need_kvm()
    with Machine.start(incoming="defer", memory="64M") as destination:
        yield destination


def reason(order, *arguments, **options):
    with pytest.raises(Refused) as said:
        order(*arguments, **options)
    return said.value.reason


def test_a_machine_of_ours_says_why(machine, waiting):
    assert reason(machine.execute, "x-reset") is Reason.STATE
    assert reason(machine.execute, "no-such-command") is Reason.COMMAND
    assert reason(machine.set_parameters, {"no-such": 1}) is Reason.SETTINGS
    assert reason(waiting.execute, "migrate", {"uri": NOWHERE}) is Reason.OWNER


def test_one_order_at_a_time(machine, tmp_path):
    with Machine.start(incoming="defer", memory="64M") as destination:
        migration = machine.migrate(to=destination, bandwidth=4096)
        assert reason(machine.execute, "migrate", {"uri": NOWHERE}) is Reason.BUSY
        migration.cancel()


@pytest.mark.qemu("10.0", "11.1")
def test_a_stock_qemu_tells_its_user_only(tmp_path):
    with (
        QemuMachine("none", "tcg", tmp_path, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"),
        Machine.connect(f"unix:{tmp_path}/qmp") as machine,
    ):
        assert reason(machine.set_parameters, {"no-such": 1}) is Reason.UNKNOWN
        assert reason(machine.execute, "x-reset") is Reason.COMMAND


def test_a_refusal_of_this_client_is_one_of_settings():
    assert reason(Machine.connect, "carrier-pigeon:1") is Reason.SETTINGS


def test_the_version_is_that_of_the_package():
    assert postcopy.__version__.count(".") == 2
