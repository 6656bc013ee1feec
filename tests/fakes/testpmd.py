"""DPDK's testpmd as back end: a network device by vhost-user, with no code in common with QEMU's."""

import os
import subprocess

from fakes.unpacked import peer
from fakes.vhost_back_end import TIMEOUT_S, Served
from fakes.waiting import wait_until
from machine.networks import MEMORY_BYTES, net_workload


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
        self._do("start")

    def stop(self):
        """Have it serve its rings no more; harmless if it does not."""
        self._do("stop")

    def _do(self, command):
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()


class NetworkOfJourney:
    """A testpmd for each side; one that serves keeps a CPU busy, so only that of the guest's side does."""

    drive = None

    def __init__(self, stack, folder):
        self._stack = stack
        self._folders = [folder / name for name in ("one", "other")]
        self.back_ends = [self._start(number) for number in range(2)]
        self.serve(0)

    def workload(self, memory_bytes=MEMORY_BYTES):
        return net_workload(memory_bytes=memory_bytes, delay_cycles=0)

    def serve(self, number):
        """Only this one from now on."""
        self.back_ends[not number].stop()
        self.back_ends[number].start()

    def kill(self, number):
        """Have another one in its place, which serves."""
        self.back_ends[number].__exit__()
        (self._folders[number] / "vhost.sock").unlink()
        self.back_ends[number] = self._start(number)
        self.back_ends[number].start()

    def back_to_the_image(self):
        pass

    def _start(self, number):
        return self._stack.enter_context(Testpmd(self._folders[number], "--no-mlockall"))
