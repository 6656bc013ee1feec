"""A real QEMU that takes in and runs a guest of ours, and whose memory the oracle can read."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fakes.real_qemu import MACHINES, QemuProcess, bios
from machine.machines import MIB, need


class QemuGuest(QemuProcess):
    """One QEMU, waiting for a guest (``-incoming defer``).

    :param machine: ``microvm`` or ``none``: what it is called on the wire.
    :param accelerator: ``kvm`` or ``tcg``.
    """

    def __init__(
        self,
        folder: Path,
        machine: str,
        accelerator: str,
        memory_bytes: int,
        vcpus: int = 1,
        more: Sequence[str] = (),
    ) -> None:
        if accelerator == "kvm":
            need("kvm")
        option, _ = MACHINES[machine]
        command = ["-M", option, "-accel", accelerator, "-incoming", "defer"]
        command += ["-m", f"{memory_bytes // MIB}M", "-smp", str(vcpus)]
        # The empty machine leaves to the user what a real one says to its CPU.
        command += ["-cpu", "qemu64,apic-id=0"] if machine == "none" else bios(folder)
        super().__init__(folder, [*command, *more])
        self.machine = machine
        self.accelerator = accelerator

    def listen(self, uri: str, *, exit_on_error: bool = True) -> str:
        """Wait for a guest there.

        :return: where to send it: a TCP port of 0 has become a real one.
        """
        # Before QEMU 9.1 one that fails always ends.
        stays = {} if exit_on_error or self.version < (9, 1) else {"exit-on-error": False}
        self("migrate-incoming", uri=uri, **stays)
        if not uri.startswith("tcp:"):
            return uri
        address = self("query-migrate")["socket-address"][0]
        host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
        return f"tcp:{host}:{address['port']}"

    def parameters(self, **values: int) -> None:
        """Set migration parameters; ``_`` stands for ``-`` in names."""
        self("migrate-set-parameters", **{k.replace("_", "-"): v for k, v in values.items()})

    def send_by_postcopy(self, uri: str, **parameters: int) -> None:
        """Send the guest there, by postcopy from the start.

        So slowly until then that precopy cannot end before QEMU has taken the second command, however
        late that comes: most of these guests' memory is zero, and few of their pages are written.
        """
        # QEMU takes a limit of 0 for "now".
        self.parameters(max_bandwidth=1 << 10, downtime_limit=1, **parameters)
        self("migrate", uri=uri)
        self("migrate-start-postcopy")

    def monitor(self, line: str) -> str:
        """Do one HMP command."""
        return self("human-monitor-command", **{"command-line": line})

    def event_names(self) -> list[str]:
        """What it has told so far, statuses included."""
        self("query-status")  # whatever was told before its answer has been read now
        return [e["data"]["status"] if e["event"] == "MIGRATION" else e["event"]
                for e in self.events]  # fmt: skip

    def statuses(self) -> list[str]:
        """Those of its migration, as it has told them."""
        return [name for name in self.event_names() if name not in {"RESUME", "STOP"}]

    def read_memory(self, address: int, length: int) -> bytes:
        """Read guest memory out of QEMU's, which may be running."""
        answer = self.monitor("gpa2hva 0")
        found = re.search(r"is (0x[0-9a-f]+)", answer)
        assert found, answer
        with Path(f"/proc/{self._process.pid}/mem").open("rb", buffering=0) as memory:
            data = os.pread(memory.fileno(), length, int(found[1], 16) + address)
        assert len(data) == length
        return data
