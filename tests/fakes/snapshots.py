"""A guest that has its picture taken, and the memory that the picture must show."""

from collections.abc import Sequence

import numpy as np

from fakes.pair import Side, ram_of
from machine.machines import config_for, need, wait_for_progress, wait_for_work
from postcopy.guest import DeviceState
from postcopy.machine import oracle
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.workload import Workload
from postcopy.parameters import Capability, Overrides
from postcopy.status import Status


class Remembering(Machine):
    """Copies all its memory whenever its devices are saved: nothing runs then."""

    then: np.ndarray | None = None

    def save_devices(self) -> Sequence[DeviceState]:
        states = super().save_devices()
        self.then = ram_of(self)
        return states


AS_A_SNAPSHOT = Overrides({Capability.BACKGROUND_SNAPSHOT: True})
"""Says itself what it is: only then it may go to what may be another machine."""


class Portrait:
    """A guest that works, with ``background-snapshot`` on."""

    def __init__(
        self,
        workload: Workload,
        *,
        capabilities: Sequence[Capability] = (),
        accelerator: str = "kvm",
        paused: bool = False,
        kind: type[Remembering] = Remembering,
        **more: object,
    ) -> None:
        need(accelerator)
        self.workload = workload
        self.accelerator = accelerator
        self.more = more
        self.capabilities = capabilities
        self.sides = [Side(config_for(workload, accelerator, **more), kind=kind)]
        try:
            wait_for_work(self.machine, workload)
            if paused:
                self.machine.stop()
            self.side.set((Capability.BACKGROUND_SNAPSHOT, *capabilities))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Portrait":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for side in self.sides:
            side.close()

    @property
    def side(self) -> Side:
        return self.sides[0]

    @property
    def machine(self) -> Remembering:
        return self.side.machine

    def begin(self, uri: str) -> None:
        self.side.control.migrate(uri, overrides=AS_A_SNAPSHOT)

    def take(self, uri: str) -> None:
        """A whole snapshot."""
        self.begin(uri)
        self.side.wait(Status.COMPLETED)

    def measured(self):
        return self.side.control.info().measured

    def check_goes_on(self) -> None:
        """The guest is here, works, and nothing watches its writes any more."""
        assert self.machine.owned
        assert self.machine.running
        assert self.side.keeper._snapshot is None
        wait_for_progress(self.machine, self.workload)

    def check_memory(self) -> None:
        """Every page is what the guest has made of it."""
        self.check_goes_on()
        self.machine.stop()
        found = oracle.verify(self.machine.read_memory, self.workload)
        assert found.ok, found
        self.machine.cont()

    def load(self, uri: str, *, paused: bool = True) -> Side:
        """Another machine, from the image."""
        config = MachineConfig(
            self.workload.memory_bytes,
            vcpus=self.workload.vcpus,
            accel=self.accelerator,
            **self.more,
        )
        other = Side(config, incoming=True, paused=paused)
        self.sides.append(other)
        other.set(self.capabilities)
        other.control.incoming(uri, exit_on_error=False)
        other.wait(Status.COMPLETED)
        return other

    def check_image(self, uri: str) -> Side:
        """The image shows the memory as it was at the instant of the stop, word for word."""
        other = self.load(uri)
        words, then = (each.view(np.uint64) for each in (ram_of(other.machine), self.machine.then))
        wrong = np.flatnonzero([not np.array_equal(a, b) for a, b in zip(words, then, strict=True)])
        assert not len(wrong), f"{len(wrong)} pages are wrong: {wrong[:8]}"
        # And that is a moment of the guest's life: it goes on from there.
        found = oracle.verify(other.machine.read_memory, self.workload)
        assert found.ok, found
        other.machine.cont()
        wait_for_progress(other.machine, self.workload)
        return other
