"""A machine and a migration subsystem for monitors, with no guest and no engine behind them.

They refuse what a QEMU without ``-incoming`` refuses before any migration, in the same words.
"""

import threading

from postcopy.errors import Refused, WrongState
from postcopy.events import EventBus
from postcopy.guest import Region
from postcopy.link.guest.user_objects import UserObjects
from postcopy.machine.announcing import Announcer
from postcopy.machine.dirty_rate import DirtyRate
from postcopy.machine.vcpu_throttle import DirtyLimit, VcpuThrottle
from postcopy.monitor.controls import Backend
from postcopy.ownership import Ownership
from postcopy.parameters import NO_OVERRIDES, Capabilities, Capability, Parameters
from postcopy.statistics import MemoryMap, MigrationInfo
from postcopy.status import Status


class FakeMachine:
    """Its RAM is there; ``page_is_there`` cleared makes a reader wait, as a missing page does."""

    vcpus = ()

    def __init__(self, events, memory_bytes):
        self.memory_bytes = memory_bytes
        self._events = events
        self.ownership = Ownership()
        self.dirty_rate = DirtyRate(self)
        self.announcer = Announcer()
        self.dirty_limit = DirtyLimit(self, VcpuThrottle(()), ())
        self.run_state = "running"
        self.ram = bytearray(self.memory_bytes)
        self.page_is_there = threading.Event()
        self.page_is_there.set()
        self.reader_waits = threading.Event()
        self.has_quit = threading.Event()

    @property
    def running(self):
        return self.run_state == "running"

    def stop(self):
        if self.running:
            self.run_state = "paused"
            self._events.emit("STOP")

    def cont(self):
        if not self.running:
            self.run_state = "running"
            self._events.emit("RESUME")

    def quit(self):
        self.has_quit.set()

    def host_address(self, guest_address):
        if guest_address >= self.memory_bytes:
            raise Refused("no RAM there")
        return 0x7F0000000000 + guest_address

    def block_at(self, guest_address):
        return "ram"

    def regions(self):
        return (Region("ram", self.memory_bytes, 4096, 0, 0x7F0000000000, -1),)

    def read_physical(self, address, length):
        if address + length > self.memory_bytes:
            raise Refused(f"no RAM at {address:#x}")
        self.reader_waits.set()
        assert self.page_is_there.wait(30)
        return bytes(self.ram[address : address + length])


class FakeMigration:
    """Keeps settings and calls; :attr:`now` is what ``info`` answers."""

    def __init__(self):
        self.capabilities = Capabilities()
        self.parameters = Parameters()
        self.calls = []
        self.now = MigrationInfo()
        self.breaks = False
        self.engine_restarts = 0
        self.recovers = threading.Event()
        self.recovers.set()
        self.objects = UserObjects()

    def set_capabilities(self, changes):
        self.capabilities = self.capabilities.with_changes(changes)

    def set_parameters(self, changes):
        self.parameters = self.parameters.with_changes(changes)

    def migrate(self, uri, *, resume=False, overrides=NO_OVERRIDES):
        if self.breaks:
            raise ZeroDivisionError("a mistake of ours")
        if resume:
            raise WrongState("Cannot resume if there is no paused migration")
        if not uri or uri.startswith("bad:"):
            raise Refused(f"unknown migration protocol: {uri}")
        self.calls.append(("migrate", uri, overrides) if overrides else ("migrate", uri))

    def incoming(self, uri, *, exit_on_error=True, overrides=NO_OVERRIDES):
        raise WrongState("'-incoming' was not specified on the command line")

    def restore(self, options, *, exit_on_error=True):
        self.calls.append(("restore", options))

    @property
    def resetting(self):
        return self

    def set_point(self, path=None):
        self.calls.append(("set_point", path))
        return {"pause-us": 2000, "copied-bytes": 8 << 20}

    def reset(self):
        self.calls.append(("reset",))
        return {"pages": 12, "us": 900, "whole": False}

    def end(self):
        raise WrongState("there is no reset point")

    def start_postcopy(self):
        if not self.capabilities.enabled(Capability.POSTCOPY_RAM):
            raise WrongState(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )

    def cancel(self):
        self.calls.append(("cancel",))

    def continue_(self, state):
        if self.now.status is not state or state is not Status.PRE_SWITCHOVER:
            raise WrongState(f"Migration not in expected state: {self.now.status.value}")

    def pause(self):
        raise WrongState(
            "migrate-pause is currently only supported during postcopy-active or"
            " postcopy-recover state"
        )

    def recover(self, uri):
        assert self.recovers.wait(30)
        raise WrongState("Migrate recover can only be run when postcopy is paused.")

    def arrived(self):
        raise WrongState("x-migrate-arrived can only be run when an outgoing postcopy is paused")

    def lost(self):
        raise WrongState("x-migrate-lost can only be run when an incoming postcopy is paused")

    def info(self):
        return self.now

    def memory_map(self):
        return MemoryMap(False, "si", {"at-source": 3, "in-place": 1}, (("ram", 2, 4),))


def make_backend(memory_bytes=64 << 20):
    events = EventBus()
    return Backend(FakeMachine(events, memory_bytes), FakeMigration(), events)
