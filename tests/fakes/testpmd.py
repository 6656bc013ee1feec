"""DPDK's testpmd as back end: a network device by vhost-user, with no code in common with QEMU's."""

import os
import subprocess

from fakes.unpacked import peer
from fakes.vhost_back_end import TIMEOUT_S, Served
from fakes.waiting import wait_until


class Testpmd(Served):
    """One testpmd, which sends each packet back where it came from.

    :param options: of testpmd; ``--no-mlockall``: it does not fill memory that it maps.
    """

    __test__ = False  # for pytest

    def __init__(self, folder, *options):
        # On any CPU: by itself each of its threads stays on one, which others may keep busy.
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        device = f"net_vhost0,iface={folder / 'vhost.sock'},postcopy-support=1"
        command = [
            peer("bin/dpdk-testpmd"),
            "--lcores",
            f"(0,1)@({cpus})",
            "--no-huge",
            "-m",
            "128",
        ]
        command += ["--no-pci", "--no-shconf", "--no-telemetry", "--vdev", device]
        command += ["--", "-i", "--total-num-mbufs=2048", "--no-flush-rx"]
        command += ["--forward-mode=io", "--port-topology=loop", *options]
        super().__init__(folder, command, subprocess.PIPE)
        # Before its prompt it may still lock its memory, and answers nothing meanwhile.
        wait_until(lambda: "testpmd> " in self.said, TIMEOUT_S, lambda: f"the prompt: {self.said}")

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def start(self):
        """Have it serve its rings from now on; that keeps a CPU busy."""
        self.process.stdin.write(b"start\n")
        self.process.stdin.flush()
