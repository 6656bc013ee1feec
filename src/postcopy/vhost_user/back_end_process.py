"""A vhost-user back end as the guest's process knows it: a process that has the guest's memory mapped.

Messages go out on several threads: the front end's own starts and stops rings, a keeper's prepares for
missing pages.  One exchange at a time, under a lock.  Every exchange is bounded in time, but one: in a
postcopy the back end may touch a missing page while it starts or stops a ring, and answers nothing before
that has come.  Only the front end's own thread waits for that; no pager and no monitor does.
"""

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from postcopy.errors import CannotConnect, GuestError, KernelError, VhostUserError
from postcopy.guest import AddressSpace, MappedRange
from postcopy.kernel import processes
from postcopy.vhost_user.connection import Connection
from postcopy.vhost_user.front_end import FrontEnd, MemoryPart, Ring
from postcopy.vhost_user.messages import FEATURE_LOG_ALL, ProtocolFeature

ANSWER_S: Final = 10.0
"""A back end that has not answered then is given up; it has touched no memory that can be missing."""


class BackEndProcess:
    """:class:`postcopy.guest.SharingProcess`, from its connection until one end is gone.

    A failure of any exchange ends the connection: :attr:`failure` says why, and each later call fails.

    :ivar failure: why it cannot be used any more.
    :ivar connection: for ``poll``: ``POLLRDHUP`` is its end.  None while it is being made anew.
    :param path: of the socket at which it listens.
    :param parts: the guest's memory.
    :param timeout_s: for the connection, with what is agreed on first.
    :param changed: called after the connection has been made anew, or has failed; on any thread.
    :raises CannotConnect: it does not listen there.
    :raises GuestError: it does not answer, or not as a back end does.
    """

    def __init__(
        self,
        path: str,
        parts: Sequence[MemoryPart],
        changed: Callable[[], None] = lambda: None,
        timeout_s: float = ANSWER_S,
    ) -> None:
        self.path = path
        self._parts = parts
        self._changed = changed
        self._lock = threading.Lock()
        self._has_memory = False
        self._rings: Sequence[Ring] = ()
        self._features = 0
        self._logs = False
        self.failure: GuestError | None = None
        self._front_end = self._connect(timeout_s)
        self.connection: Connection | None = self._front_end.connection

    def _connect(self, timeout_s: float) -> FrontEnd:
        try:
            return FrontEnd.connect(self.path, timeout_s)
        except (OSError, VhostUserError) as error:
            raise GuestError(f"vhost-user back end {self.path}: {_why(error)}") from error

    @property
    def name(self) -> str:
        """See :class:`~postcopy.guest.SharingProcess`."""
        return f"vhost-user back end {self.path} (process {self._front_end.process_id})"

    @property
    def features(self) -> int:
        """The virtio features that it offers."""
        return self._front_end.features

    @property
    def offered(self) -> ProtocolFeature:
        """The features of the protocol that it offers; some tell of which kind of device it is."""
        return self._front_end.offered

    def configuration(self, length_bytes: int) -> bytes:
        """The beginning of the device's configuration space.

        :raises GuestError: it does not say.
        """
        with self._exchange(ANSWER_S):
            return self._front_end.configuration(length_bytes)

    def announce(self, address: bytes) -> None:
        """Have it tell its network where the guest with this address is, if it can.

        Any thread: nothing is answered.

        :raises GuestError: it has ended, or waits for a page.
        """
        if ProtocolFeature.RARP in self._front_end.protocol:
            with self._exchange(ANSWER_S):
                self._front_end.announce(address)

    # --- rings, on the front end's own thread

    def start_rings(self, rings: Sequence[Ring], features: int) -> None:
        """Have it do the requests of all its rings.

        It may touch missing pages, and answers when they have come.

        :raises GuestError: it cannot, or has ended.
        """
        with self._exchange(None):
            self._features = features
            self._front_end.set_features(features, log=self._logs)
            self._set_memory()
            self._rings = tuple(rings)
            for ring in rings:
                self._front_end.start_ring(ring, log=self._logs)

    def stop_rings(self) -> list[int]:
        """Have it do no more requests; return the index of the next one of each ring.

        :raises GuestError: it cannot, or has ended.
        """
        with self._exchange(None):
            bases = [self._front_end.stop_ring(ring.number) for ring in self._rings]
            self._rings = ()
        return bases

    def _set_memory(self) -> None:
        if not self._has_memory:
            self._front_end.set_memory(self._parts)
            self._has_memory = True

    # --- postcopy.guest.SharingProcess

    def watch_missing(self) -> AddressSpace:
        """See :class:`~postcopy.guest.SharingProcess`.

        :raises GuestError: it cannot do that; the message says what it lacks.
        """
        with self._exchange(ANSWER_S):
            if ProtocolFeature.PAGEFAULT not in self._front_end.protocol:
                raise GuestError(
                    f"{self.name} cannot wait for missing pages: it does not offer PAGEFAULT; give it the "
                    "right to a userfaultfd (root, or /dev/userfaultfd), or migrate without postcopy"
                )
            if self._has_memory:
                self._connect_anew()
            self._where(self._parts[0])  # before it has begun: whether that can be seen
            watch = self._front_end.advise()
            try:
                self._front_end.listen(self._parts)
                self._has_memory = True
                ranges = [each for part in self._parts for each in self._where(part, mapped=True)]
            except BaseException:
                os.close(watch)
                raise
        return AddressSpace(self._front_end.process_id, ranges, watch)

    def _connect_anew(self) -> None:
        """Have it forget memory that it has mapped: it can only be registered before."""
        if self._rings:
            raise GuestError(f"{self.name} has touched the guest's memory; it can wait for no page")
        self.connection = None  # before its end, which would be taken for that of the process
        self._front_end.connection.shut_down()  # a poll would keep it open
        self._front_end.close()
        try:
            self._front_end = self._connect(ANSWER_S)
            self.connection = self._front_end.connection
        except GuestError as error:
            self.failure = error
            raise
        finally:
            self._has_memory = self._logs = False
            self._changed()

    def _where(self, part: MemoryPart, *, mapped: bool = False) -> list[MappedRange]:
        """Where it has a part of memory mapped.

        Its own answer is not believed: libvhost-user says where we have that, as if it were its own.

        :param mapped: it must have all of it.
        :raises GuestError: it has not, or that cannot be seen.
        """
        process_id = self._front_end.process_id
        try:
            found = processes.mapped_parts(process_id, part.fd)
        except KernelError as error:
            raise GuestError(
                f"{self.name} cannot be served missing pages: where it has memory mapped cannot be seen "
                f"({error}); run both as the same user, or migrate without postcopy"
            ) from error
        end = part.file_offset + part.size_bytes
        ranges, reached = [], part.file_offset
        for each in sorted(found, key=lambda each: each.offset):
            first = max(each.offset, part.file_offset)
            last = min(each.offset + each.length_bytes, end)
            if first >= last:
                continue
            if first <= reached:
                reached = max(reached, last)
            offset = part.offset + first - part.file_offset
            address = each.address + first - each.offset
            ranges.append(MappedRange(part.block, offset, last - first, address))
        if mapped and reached < end:
            raise GuestError(
                f"{self.name} has not mapped all of '{part.block}', which it was given"
            )
        return ranges

    def unwatch_missing(self) -> None:
        """See :class:`~postcopy.guest.SharingProcess`."""
        with self._exchange(ANSWER_S):
            self._front_end.end()

    @property
    def logs_writes(self) -> bool:
        """Whether it can log its writes."""
        has_file = ProtocolFeature.LOG_SHMFD in self._front_end.protocol
        return has_file and bool(self._front_end.features & FEATURE_LOG_ALL)

    def log_writes(self, log: int | None, size_bytes: int = 0) -> None:
        """Have it mark its writes in this log, and in no other; None: in none.

        :param log: descriptor of the log's file, a bit for each 4096 bytes of guest-physical addresses;
            not needed after the return.
        :raises GuestError: it does not answer, or has ended: it may then mark in either log.
        """
        with self._exchange(ANSWER_S):
            if log is not None:
                self._front_end.set_log(log, size_bytes)
            logs = log is not None
            if logs is not self._logs:
                self._logs = logs
                if self._rings:  # else it is told when they are started
                    self._front_end.set_features(self._features, log=logs)
                for ring in self._rings:
                    self._front_end.set_addresses(ring, log=logs)

    # --- the end

    def fail(self, why: str) -> None:
        """Give it up; whoever waits for an answer of it waits no more."""
        if self.failure is None:
            self.failure = GuestError(f"{self.name}: {why}")
        self._front_end.connection.shut_down()
        self._changed()

    def close(self) -> None:
        """Let go of the connection."""
        self.fail("it has been let go of")
        with self._lock:
            self._front_end.close()

    def wait_for_end(self, timeout_s: float) -> None:
        """Wait until the process has ended, but not longer; one that serves us no more may live on."""
        process_id = self._front_end.process_id
        if process_id in {0, os.getpid()}:
            return
        with contextlib.suppress(OSError):  # it has ended
            descriptor = os.pidfd_open(process_id)
            try:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(timeout_s * 1000)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _exchange(self, timeout_s: float | None) -> Iterator[None]:
        """Have the connection for some messages with their answers.

        :param timeout_s: for all of them.
        """
        if not self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise GuestError(f"{self.name} does not answer: it may wait for a page of memory")
        try:
            if self.failure is not None:
                raise self.failure
            self._front_end.connection.bound(timeout_s)
            yield
        except CannotConnect as error:
            self.fail(str(error))
            raise GuestError(str(error)) from error
        except (OSError, VhostUserError) as error:
            self.fail(_why(error))
            raise self.failure or GuestError(_why(error)) from error
        finally:
            self._lock.release()


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer; it may have another front end, or hang"
    if isinstance(error, ConnectionError):
        return "it has closed the connection"
    return str(error)
