"""The switchover: the guest stops here and runs there.

Ownership: until :meth:`Switchover._commit` has been called the guest is ours, and any failure lets it
run on here.  From then on only the destination's own word that it does not run the guest
(``SHUT`` with an error) or the certainty that it never got the last byte gives it back.  Where nothing
answers the second alone does, and a file, from which no machine starts by itself.
"""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from postcopy.errors import ChannelBroken, MigrationCancelled, WrongState
from postcopy.guest import DeviceState, LeavingGuest, Saving
from postcopy.memory.runs import Mask, runs
from postcopy.ownership import Move
from postcopy.parameters import Capabilities, Capability
from postcopy.source.connection import Connection
from postcopy.source.counters import Counters, StageTimes
from postcopy.source.dirty_pages import DirtyPages
from postcopy.source.user_requests import UserRequests
from postcopy.status import Status, StatusMachine
from postcopy.stream import encoder
from postcopy.stream.commands import DISCARD_VERSION, command, encode_command
from postcopy.stream.configuration import encode_name
from postcopy.stream.numbers import Command
from postcopy.stream.pings import (
    AFTER_PACKAGE_PING,
    BEFORE_END_PING,
    BEFORE_PACKAGE_PING,
    DISCARD_PINGS,
    PACKAGE_PING,
)
from postcopy.stream.records import (
    DeviceSection,
    Package,
    Ping,
    PostcopyListen,
    PostcopyRun,
)
from postcopy.trace import trace

OURS_ONLY = frozenset({"serial"})
"""Device sections of our machine that the same machine of a real QEMU does not know."""

FIRST_DEVICE_ID = 10
_RANGES_PER_COMMAND = 4000  # 64 KiB, less the name
_FEW_PAGES = 1000
_LARGE_PAGE_BYTES = 1 << 30
_REST_BYTES = 1 << 20
"""Sent at a time: the watch for silence counts what has gone out, batch by batch."""

_log = logging.getLogger(__name__)


class Switchover:
    """Stops the guest and hands it over, by precopy or by postcopy."""

    def __init__(
        self,
        guest: LeavingGuest,
        connection: Connection,
        dirty: DirtyPages,
        requests: UserRequests,
        progress: StatusMachine,
        capabilities: Capabilities,
        counters: Counters,
        clock: StageTimes,
        describe: Callable[[Sequence[DeviceState]], str],
        ours_only: frozenset[str] = OURS_ONLY,
    ) -> None:
        self._guest = guest
        self._connection = connection
        self._channel = connection.channel
        self._return_path = connection.return_path
        self._sender = connection.sender
        self._dirty = dirty
        self._requests = requests
        self._progress = progress
        self._capabilities = capabilities
        self._counters = counters
        self._clock = clock
        self._describe = describe
        self._ours_only = ours_only
        self._discarded: dict[str, Mask] = {}
        self._saving: Saving | None = None
        self.stopped = False
        self.committed = False

    def discard_ahead(self) -> None:
        """Send most of the discards while the guest still runs.

        The destination answers when it has discarded the pages and read all that was sent before: neither
        is left for the downtime.
        """
        assert self._return_path is not None
        self._sender.end_of_precopy()
        self._connection.begin_watch()  # the destination may not even read the package
        self._connection.push.expect()
        # The guest writes meanwhile: less with each pass, since each is shorter.
        for ping in DISCARD_PINGS:
            self._dirty.sync()
            sent_pages = self._send_discards()
            self._channel.send(encode_command(Ping(ping)))
            self._return_path.wait_pong(ping)
            if sent_pages < _FEW_PAGES:
                return

    def stop_guest(self) -> None:
        """Stop the vCPUs and find out what is left to send; the devices are being saved meanwhile."""
        self._clock.stopped = time.monotonic()
        self.stopped = True
        self._saving = self._pause_to_save()
        # Not before: a busy host may take milliseconds to bring the order to the guest's process.
        self._clock.stopped = self._saving.began_ns / 1e9
        if self._capabilities.enabled(Capability.PAUSE_BEFORE_SWITCHOVER):
            self._progress.move(Status.PRE_SWITCHOVER)
            self._requests.wait_to_proceed()
            self._check_cancelled()
        self._progress.move(Status.DEVICE)
        self._dirty.collect_all()
        self._counters.syncs = self._dirty.syncs

    def complete_precopy(self) -> None:
        """Send the rest while the guest stands still, and hand it over."""
        if self._return_path is not None:
            self._connection.begin_watch()  # the guest must not stand still for a peer that does nothing
        self._send_rest()
        states = self._devices()
        self._channel.send_many([self._sender.end_of_ram(), device_sections(states)])
        trace("source.rest-sent")
        if self._return_path is not None:
            # Before the last byte: only when it answers has the destination taken all that it needs.
            self._channel.send(encode_command(Ping(BEFORE_END_PING)))
            self._return_path.wait_pong(BEFORE_END_PING)
            self._connection.watch_without_pings()
        else:
            self._channel.wait_for_room()  # here a cancel ends the wait: from the commit on none does
        trace("source.all-taken")
        self._check_cancelled()
        self._commit()
        trace("source.given-up")
        try:
            # It is the last byte that the destination needs: a send that fails has not delivered it.
            self._channel.send(encoder.end_of_stream())
        except ChannelBroken:
            self.committed = False
            raise
        trace("source.end-sent")
        self._clock.handed_over = time.monotonic()
        description = encoder.description(self._describe(states))
        if self._return_path is not None:
            self._channel.send(description)
            self._clock.confirmed = self._return_path.wait_shut()
        else:
            with self._connection.taking():
                self._channel.send(description)
            self._clock.confirmed = time.monotonic()

    def _send_rest(self) -> None:
        for pages in self._dirty.blocks:
            start, end = 0, pages.block.page_count
            limit = max(1, _REST_BYTES // pages.block.page_size_bytes)
            while len(batch := pages.next_batch(start, end, limit)):
                self._check_cancelled()
                pages.pending[batch] = False
                self._sender.send(pages, batch)
                start = int(batch[-1]) + 1

    def start_postcopy(self) -> None:
        """Send the discards and the package, which hands the guest over."""
        for block in (pages.block for pages in self._dirty.blocks):
            if block.page_size_bytes >= _LARGE_PAGE_BYTES:
                self._warn_of_stalls(block.name, block.page_size_bytes)
        self._send_discards()
        trace("source.discards-sent")
        states = self._devices()
        self._check_cancelled()
        package = encode_command(
            Package(
                encode_command(PostcopyListen())
                + device_sections(states)
                + encode_command(Ping(PACKAGE_PING))
                + encode_command(PostcopyRun())
            )
        )
        self._commit()
        # From here an engine that takes over from us must recover, whatever it finds.
        self._progress.move(Status.POSTCOPY_DEVICE)
        self._connection.push.begin()
        trace("source.before-package")
        try:
            # RUN is the last byte of it: a send that fails has not delivered it.
            self._channel.send_many([encode_command(Ping(BEFORE_PACKAGE_PING)), package])
        except ChannelBroken:
            self.committed = False
            raise
        trace("source.package-sent", bytes=len(package))
        self._clock.handed_over = time.monotonic()
        self._channel.send(encode_command(Ping(AFTER_PACKAGE_PING)))

    def _warn_of_stalls(self, name: str, page_size_bytes: int) -> None:
        text = stall_warning(name, page_size_bytes, self._sender.rate.bytes_per_second)
        if text is not None:
            _log.warning("%s", text)

    def settle(self) -> None:
        """Wait until the stop is done: then the guest may run again."""
        if self._saving is not None:
            self._saving.settle()

    def _pause_to_save(self) -> Saving:
        """Stop the vCPUs, unless a cancel was quicker.

        :raises MigrationCancelled: it was.
        """
        try:
            return self._guest.pause_to_save()
        except WrongState as error:
            raise MigrationCancelled("cancelled by the user") from error

    def _commit(self) -> None:
        """Hand the guest over, unless a cancel was quicker: the guest's process decides.

        :raises MigrationCancelled: it was.
        """
        try:
            self._guest.move(Move.GIVE_UP)
        except WrongState as error:
            raise MigrationCancelled("cancelled by the user") from error
        self.committed = True

    def _devices(self) -> list[DeviceState]:
        assert self._saving is not None
        states = list(self._saving.states())
        if self._return_path is not None and not self._return_path.peer_is_ours:
            return [state for state in states if state.name not in self._ours_only]
        return states

    def _send_discards(self) -> int:
        """Send which pages are stale and were not sent as such before; return how many."""
        sent_pages = 0
        if not any(pages.pending.any() for pages in self._dirty.blocks):
            # QEMU 10 never leaves its discard state when it gets no discard at all.
            self._dirty.blocks[0].pending[0] = True
        for pages in self._dirty.blocks:
            sent = self._discarded.get(pages.block.name)
            stale = pages.pending if sent is None else pages.pending & ~sent
            self._discarded[pages.block.name] = pages.pending.copy()
            sent_pages += int(np.count_nonzero(stale))
            ranges = runs(stale) * np.int64(pages.block.page_size_bytes)
            ranges[:, 1] -= ranges[:, 0]
            self._channel.send_many(_discards(pages.block.name, ranges))
        return sent_pages

    def _check_cancelled(self) -> None:
        if self._requests.cancelled:
            raise MigrationCancelled("cancelled by the user")


def stall_warning(block: str, page_size_bytes: int, bytes_per_second: float) -> str | None:
    """What to tell the user of a block of huge pages: how long a vCPU waits for one of them.

    :param bytes_per_second: measured in precopy; 0: nothing has been sent yet.
    """
    if not bytes_per_second:
        return None
    return (
        f"RAM block '{block}' has pages of {page_size_bytes >> 30} GiB: at the "
        f"{bytes_per_second / (1 << 20):.0f} MiB/s that were sent until now, a vCPU that touches one that "
        f"has not come stands still for {page_size_bytes / bytes_per_second:.1f} s"
    )


def device_sections(states: Sequence[DeviceState]) -> bytes:
    """Encode the FULL sections of all devices."""
    return b"".join(
        encoder.device_section(
            DeviceSection(number, state.name, state.instance, state.version, state.payload)
        )
        for number, state in enumerate(states, FIRST_DEVICE_ID)
    )


def _discards(name: str, ranges: npt.NDArray[np.int64]) -> list[bytes]:
    """Encode the commands that discard ranges of a block.

    :param ranges: start and length in bytes, shape ``(n, 2)``; there may be many.
    """
    head = bytes((DISCARD_VERSION,)) + encode_name(name) + b"\0"
    return [
        command(
            Command.POSTCOPY_RAM_DISCARD,
            head + ranges[first : first + _RANGES_PER_COMMAND].astype(">u8").tobytes(),
        )
        for first in range(0, len(ranges), _RANGES_PER_COMMAND)
    ]
