"""Our side of a migration: a machine, its migration subsystem, and what they told."""

from typing import Any

from machine.machines import config_for, wait_for_work
from postcopy.events import EventBus
from postcopy.link.guest.control import MigrationControl
from postcopy.machine.config import MachineConfig
from postcopy.machine.machine import Machine
from postcopy.machine.workload import Workload
from postcopy.parameters import Capability
from postcopy.status import Status

TIMEOUT_S = 30
UNLIMITED = 1 << 40


class OurGuest:
    """A machine that runs a workload, or waits for one to come."""

    def __init__(self, config: MachineConfig, *, incoming: bool = False) -> None:
        events = EventBus()
        self.events: list[str] = []
        events.subscribe(lambda e: self.events.append(e.data.get("status", e.name)))
        self.incoming_failure: str | None = None
        self.machine = Machine(config, on_event=events.emit)
        self.migration = MigrationControl(
            self.machine, events, incoming=incoming, on_incoming_failed=self._failed
        )
        self.machine.start(incoming=incoming)
        self.migration.prepare()
        self.migration.set_capabilities({Capability.EVENTS: True})
        self.migration.set_parameters({"max-bandwidth": UNLIMITED})

    @classmethod
    def running(cls, workload: Workload, accelerator: str, **more: Any) -> "OurGuest":
        """One whose workload has filled its memory and gone to work."""
        ours = cls(config_for(workload, accelerator, **more))
        wait_for_work(ours.machine, workload)
        return ours

    @classmethod
    def waiting(cls, workload: Workload, accelerator: str, **more: Any) -> "OurGuest":
        """One that waits for the workload of another."""
        config = MachineConfig(
            workload.memory_bytes, vcpus=workload.vcpus, accel=accelerator, **more
        )
        return cls(config, incoming=True)

    def __enter__(self) -> "OurGuest":
        return self

    def __exit__(self, *_: object) -> None:
        self.migration.close()
        self.machine.close()

    def _failed(self, reason: str) -> None:
        self.incoming_failure = reason

    def switch_on(self, *capabilities: Capability) -> None:
        self.migration.set_capabilities(dict.fromkeys(capabilities, True))

    def listen(self, uri: str) -> str:
        """Wait for a guest there, and say where to send it."""
        self.migration.incoming(uri)
        if not uri.startswith("tcp:"):
            return uri
        return f"tcp:127.0.0.1:{self.migration.info().socket_address[0]['port']}"

    def send_by_postcopy(self, uri: str, **parameters: int) -> None:
        """Send the guest there, by postcopy from the start: so slowly that precopy cannot end first."""
        limits = {"max-bandwidth": 8 << 20, "downtime-limit": 0}
        self.migration.set_parameters(
            limits | {k.replace("_", "-"): v for k, v in parameters.items()}
        )
        self.migration.migrate(uri)
        self.migration.start_postcopy()

    def wait_end(self) -> Status:
        """The status in which the migration ends, one way or another."""
        return self.migration.progress.wait(
            Status.COMPLETED, Status.FAILED, Status.POSTCOPY_PAUSED, timeout=TIMEOUT_S
        )

    @property
    def error(self) -> str:
        return self.migration.info().error_desc or ""
