"""A channel to a shell command: ``exec:ssh host socat - ...`` or ``exec:gzip > file``."""

import os
import signal
import subprocess

from postcopy.channel.address import ExecAddress
from postcopy.channel.descriptors import DescriptorChannel
from postcopy.errors import ChannelBroken
from postcopy.stacks import not_handed_down

CLOSE_PATIENCE_S = 60.0
"""How long a command may go on working after its input ended, before it is ended itself."""

_PIPE_STATUSES = frozenset({-signal.SIGPIPE, 128 + signal.SIGPIPE})


class CommandChannel(DescriptorChannel):
    """Starts the command; its input is what we send, its output what we receive.

    Pipes, not a socket pair: a command may open ``/dev/stdin`` anew, which a socket refuses.

    :param address: the command for ``/bin/sh -c``.
    :param patience_s: see :data:`CLOSE_PATIENCE_S`.
    :raises OSError: there is no shell, or no descriptors are left.
    """

    def __init__(self, address: ExecAddress, patience_s: float = CLOSE_PATIENCE_S) -> None:
        # A session of its own: the signal that ends the command must reach its children too.
        with not_handed_down():
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", address.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        self._patience_s = patience_s
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The channel closes the descriptors itself, each in its time.
        reading, writing = (
            os.dup(stream.fileno()) for stream in (self._process.stdout, self._process.stdin)
        )
        self._process.stdin.close()
        self._process.stdout.close()
        super().__init__(str(address), reading=reading, writing=writing)

    def _close(self) -> None:
        super()._close()
        if self._aborted:
            self._end()
            return
        try:
            status = self._process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            self._end()
            raise ChannelBroken(
                f"{self.description}: still running {self._patience_s:g} s after its input ended"
            ) from None
        # Whoever stops listening early makes the command die of SIGPIPE: that is our doing.
        if status and not (self.received_bytes and status in _PIPE_STATUSES):
            raise ChannelBroken(f"{self.description}: the command ended with status {status}")

    def _end(self) -> None:
        """End the command and its children, and reap it."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signal_number)
                self._process.wait(1)
            except ProcessLookupError:
                self._process.wait()
            except subprocess.TimeoutExpired:
                continue
            return
        self._process.wait()
