"""A channel to a shell command: ``exec:ssh host socat - ...`` or ``exec:gzip > file``."""

import contextlib
import os
import select
import signal
import subprocess
import threading

from postcopy.channel.address import ExecAddress
from postcopy.channel.descriptors import DescriptorChannel
from postcopy.errors import ChannelBroken, KernelError
from postcopy.kernel import calls
from postcopy.kernel.patience import persist
from postcopy.stacks import not_handed_down

CLOSE_PATIENCE_S = 60.0
"""How long a command may go on working after its input ended, before it is ended itself."""

DELIVERED_PATIENCE_S = 5.0
"""The same, once the peer behind it has said that everything has arrived."""

_TERM_PATIENCE_S = 1.0
"""How long a command has to end at SIGTERM, before SIGKILL."""

_EXIT_PATIENCE_S = 1.0
"""How long to wait for the exit status of a command that has closed its end of a pipe."""

_PIPE_STATUSES = frozenset({-signal.SIGPIPE, 128 + signal.SIGPIPE})


class CommandChannel(DescriptorChannel):
    """Starts the command; its input is what we send, its output what we receive.

    Pipes, not a socket pair: a command may open ``/dev/stdin`` anew, which a socket refuses.

    What is sent has arrived when the command has ended with status 0.  ``shutdown`` ends the command and
    its children: with SIGTERM at once, and with SIGKILL in ``close`` if it is needed.

    :param address: the command for ``/bin/sh -c``.
    :param patience_s: see :data:`CLOSE_PATIENCE_S`.
    :raises OSError: there is no shell, or no descriptors are left.
    """

    def __init__(self, address: ExecAddress, patience_s: float = CLOSE_PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._delivered = False
        self._ending_command = threading.Lock()
        # Under the lock: whether the process has been reaped, so that its number may be another's.
        self._is_reaped = False
        with contextlib.ExitStack() as cleanup:
            reading, its_output = _pipe(cleanup)
            its_input, writing = _pipe(cleanup)
            self._given_up = persist(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            cleanup.callback(os.close, self._given_up)
            super().__init__(str(address), reading=reading, writing=writing)
            cleanup.callback(os.close, self._woken)
            # A session of its own: the signal that ends the command must reach its children too.
            with not_handed_down():
                self._process = persist(
                    lambda: subprocess.Popen(
                        ["/bin/sh", "-c", address.command],
                        stdin=its_input,
                        stdout=its_output,
                        start_new_session=True,
                    )
                )
            cleanup.callback(self._process.wait)
            cleanup.callback(self._process.kill)
            self._exit = persist(os.pidfd_open, self._process.pid)
            cleanup.pop_all()
        os.close(its_input)
        os.close(its_output)

    def shutdown(self) -> None:
        """See :meth:`Channel.shutdown`; the command is told to end."""
        super().shutdown()
        with self._ending_command:
            if not self._is_reaped:
                os.eventfd_write(self._given_up, 1)
                self._signal(signal.SIGTERM)

    def delivered(self) -> None:
        """See :meth:`Channel.delivered`."""
        self._delivered = True

    def leave(self) -> bool:
        """See :meth:`Channel.leave`; on return the command has ended."""
        self.shutdown()
        try:
            self.close()
        except ChannelBroken:
            pass  # what it was to do is given up
        return True

    def _receive_some(self, view: memoryview) -> int:
        count = super()._receive_some(view)
        if not count and len(view):
            self._check_status()
        return count

    def _broken(self, failure: Exception | None) -> ChannelBroken:
        if isinstance(failure, BrokenPipeError):
            try:
                self._check_status()
            except ValueError as status:
                failure = status
        return super()._broken(failure)

    def _check_status(self) -> None:
        """The command has closed its end of a pipe: see whether it has failed.

        :raises ValueError: it has.
        """
        if self._has_ended(_EXIT_PATIENCE_S) and (failure := self._failure()):
            raise ValueError(failure)

    def _close(self) -> None:
        super()._close()
        try:
            patience_s = DELIVERED_PATIENCE_S if self._delivered else self._patience_s
            if self._aborted:
                self._end()
                failure = ""  # given up before
            elif self._has_ended(patience_s) and not self._aborted:
                failure = self._failure()
            else:
                self._end()
                failure = self._why_ended(patience_s)
        finally:
            self._reap()
        if failure and not self._delivered:
            raise ChannelBroken(f"{self.description}: {failure}")

    def _failure(self) -> str:
        """What is wrong with how the command has ended; empty if nothing is."""
        # Not reaped yet: until `_reap` its number belongs to it.
        ended = os.waitid(os.P_PIDFD, self._exit, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        is_signal = ended.si_code != os.CLD_EXITED
        status = -ended.si_status if is_signal else ended.si_status
        # A reader that ends early makes the command die of SIGPIPE.
        if not status or (self.received_bytes and status in _PIPE_STATUSES):
            return ""
        return f"the command ended with status {status}"

    def _why_ended(self, patience_s: float) -> str:
        if self._aborted:
            return "closed on this side"
        return f"still running {patience_s:g} s after its input ended"

    def _has_ended(self, timeout_s: float) -> bool:
        """Wait for the end of the command, or of the patience with it."""
        return self._exit in _ready(timeout_s, self._exit, self._given_up)

    def _end(self) -> None:
        """End the command and its children."""
        self._signal(signal.SIGTERM)
        _ready(_TERM_PATIENCE_S, self._exit)
        self._signal(signal.SIGKILL)  # a child may still be there

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # all of them have ended

    def _reap(self) -> None:
        with self._ending_command:
            self._is_reaped = True
            self._process.wait()
            os.close(self._exit)
            os.close(self._given_up)


def _pipe(cleanup: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's reading and writing end, closed by ``cleanup``."""
    ends = persist(os.pipe)
    for end in ends:
        cleanup.callback(os.close, end)
    return ends


def _ready(timeout_s: float, *fds: int) -> list[int]:
    """Wait until one can be read from; return those, none where the kernel cannot wait now."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    try:
        return [fd for fd, _ in calls.of_python("poll", "", poll.poll, timeout_s * 1000)]
    except KernelError:
        return []
