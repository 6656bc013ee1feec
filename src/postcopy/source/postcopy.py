"""After switchover: bring the pages that the destination lacks.

Two threads send.  ``source`` pushes what is pending, from the page last asked for onwards; the thread
``return-path`` sends what a vCPU waits for, at once and past the bandwidth limit: over the urgent channel
if there is one, or else over the same channel, where an urgent page goes before the next batch.

Under a bandwidth limit, and without an urgent channel, the first does the work of the second: it has the
time, and so nobody waits for a CPU or for the interpreter that it holds.
"""

import threading
import time

from postcopy.errors import StreamError
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.memory.runs import Indices
from postcopy.source.batch_size import BatchSize
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages, DirtyPages
from postcopy.source.flight_window import FlightWindow
from postcopy.source.page_sink import PageSink
from postcopy.source.preempt_channel import PreemptChannel
from postcopy.source.push_waits import PushWaits
from postcopy.source.return_path import ReturnPath
from postcopy.stream.commands import encode_command
from postcopy.stream.records import Ping

MOST_PUSH_BYTES, LEAST_PUSH_BYTES = 2048 << 10, 256 << 10
"""Most and least data in a batch of the push, without a limit: what an urgent page may find itself behind
in the sender.  Each batch has its price in CPU time, and all CPUs may be busy; see docs/decisions."""

PUSH_S = 0.005
"""No more goes at once than takes so long."""

PREEMPTED_PUSH_BYTES, CALM_S = 1024 << 10, 0.02
"""Most data where urgent pages have a channel of their own, unless none has been asked for so long."""

FIRST_PUSH_BYTES = 64 << 10
"""The first batch goes while the guest is being started there, and keeps a CPU from that."""

LIMITED_PUSH_S, PREEMPTED_LIMITED_PUSH_S = 0.003, 0.06
"""Under a bandwidth limit no more goes at once than so much time's worth: a page that is asked for waits at
both ends for the batch that is being worked at.  With a channel of its own it seldom meets one, if these
are few."""

LEAST_LIMITED_BYTES = 32 << 10

BUSY_BYTES_PER_SECOND = 170 << 20
"""Who may push so much, or more, has no time to wait for what is asked."""

REQUEST_PAGES = 256
"""Of one request no more goes at once, whatever a peer asks for: others wait for the channel, too."""

WINDOW_BYTES = 6144 << 10
"""What it may find itself behind on the wire; see docs/decisions."""

PING_BYTES = 2048 << 10
"""How much is pushed between two pings: each costs both sides a wake-up."""

POSTCOPY_BUFFER_BYTES = 1024 << 10
"""What this side's kernel may hold of the push, if the way is short."""

BEGIN_S, QUIET_S = 0.05, 0.005
"""How long the guest may have the channel to itself at first, and when it is taken to have begun."""


class PostcopyPush:
    """The pages of one migration after switchover.

    Invariant, under ``_lock``: whoever takes a page from the pending ones sends it, over one channel.
    ``_sending`` is for the main channel: it is held while the kernel takes the bytes, ``_lock`` never is.
    """

    def __init__(self, dirty: DirtyPages, sender: PageSink, counters: Counters) -> None:
        self._dirty = dirty
        self._sender = sender
        self._counters = counters
        self._over = threading.Event()
        self._begun = False
        self._size = BatchSize(MOST_PUSH_BYTES, least_bytes=LEAST_PUSH_BYTES, moment_s=PUSH_S)
        self._awake = CpusAwake()
        self._by_name = {pages.block.name: pages for pages in dirty.blocks}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._served = threading.Condition()
        self._serving = 0
        self._last_request = 0.0
        self._position: tuple[int, int] = (0, 0)  # number of a block, page there
        self._preempt: PreemptChannel | None = None
        self.answers: ReturnPath | None = None
        self.window = FlightWindow(WINDOW_BYTES, PING_BYTES)

    def expect(self) -> None:
        """The guest is about to stop here: who works on that is not to wait until a CPU has woken."""
        self._awake.a_while()

    def begin(self) -> None:
        """Pages may be asked for from now on: the guest has stopped here."""
        self._begun = True
        self._awake.a_while()

    def use_preempt_channel(self, channel: PreemptChannel) -> None:
        """Send requested pages over this channel from now on."""
        self._preempt = channel

    def run(self) -> None:
        """Push until nothing is pending."""
        self._let_guest_begin()
        waits = PushWaits(self._over, self.answers)
        try:
            while self._push_batch():
                waits.read(here=self._preempt is None and self._has_time())
                waits.look()
                self._yield_to_requests()
                waits.wait_for(self.window)
                self._sender.pace(waits)
        finally:
            waits.read(here=False)
        self._yield_to_requests()  # what they have taken is not pending any more, but perhaps not yet sent

    def stop(self) -> None:
        """Wake a push that sleeps: the channel is gone, and sending will say so."""
        self._over.set()
        self.window.close()
        self._awake.close()

    def serve(self, name: str, start_bytes: int, length_bytes: int) -> None:
        """Send the pages of one request, unless they are on their way already.

        :raises StreamError: nothing has been handed over that could miss a page.
        """
        if not self._begun:
            raise StreamError(
                f"the destination asks for a page before it can miss one: block {name}, "
                f"offset {start_bytes:#x}"
            )
        self._awake.a_while()
        with self._served:
            self._serving += 1
        try:
            pages = self._by_name[name]
            size = pages.block.page_size_bytes
            first, end = start_bytes // size, -(-(start_bytes + length_bytes) // size)
            with self._lock:
                self._counters.requests += 1
                self._last_request = time.monotonic()
                wanted = pages.take(first, end)
                if len(wanted):
                    self._position = (self._dirty.blocks.index(pages), end)
            pages.scan_window(first)
            for start in range(0, len(wanted), REQUEST_PAGES):
                self._send_requested(pages, wanted[start : start + REQUEST_PAGES])
        finally:
            with self._served:
                self._serving -= 1
                self._served.notify_all()

    def _send_requested(self, pages: BlockPages, wanted: Indices) -> None:
        if self._preempt is not None:
            self._preempt.send(pages, wanted)
            return
        with self._sending:
            self._sender.send(pages, wanted)

    def _let_guest_begin(self) -> None:
        """Push a few pages, then hold back while the guest asks for its first ones.

        It needs them one after the other (page tables, code, stack), and until it has them it stands
        still: behind the push each would cost it milliseconds.  Many of them lie at the beginning of
        memory; and where KVM walks the guest's page tables itself, a vCPU that waits for one of these
        cannot even be stopped.
        """
        self._push_batch(FIRST_PUSH_BYTES)
        deadline = time.monotonic() + BEGIN_S
        with self._served:
            while (left_s := deadline - time.monotonic()) > 0:
                before = self._counters.requests
                self._served.wait(min(left_s, QUIET_S))
                if self._counters.requests == before:
                    return

    def _yield_to_requests(self) -> None:
        """A lock is not fair: without this, the push would take it back before anybody else."""
        with self._served:
            self._served.wait_for(lambda: not self._serving)

    def _push_batch(self, most_bytes: int | None = None) -> bool:
        """Send the next batch; return whether there was one."""
        with self._lock:
            batch = self._next_batch(most_bytes or self._batch_bytes())
        if batch is not None:
            self._send(*batch)
        return batch is not None

    def _send(self, pages: BlockPages, batch: Indices) -> None:
        with self._sending:
            self._size.begin()
            sent_bytes = self._sender.send(pages, batch)
            self._size.end(sent_bytes)
            ping = self.window.sent(sent_bytes)
            if ping is not None:
                self._sender.say(encode_command(Ping(ping)))

    def _batch_bytes(self) -> int:
        is_calm = time.monotonic() - self._last_request > CALM_S
        most = MOST_PUSH_BYTES if self._preempt is None or is_calm else PREEMPTED_PUSH_BYTES
        if limit := self._sender.limit:
            worth_s = LIMITED_PUSH_S if self._preempt is None else PREEMPTED_LIMITED_PUSH_S
            most = min(most, max(LEAST_LIMITED_BYTES, int(limit * worth_s)))
        return min(most, self._size.bytes)

    def _has_time(self) -> bool:
        """Whether the bandwidth limit makes the push sleep."""
        return 0 < self._sender.limit < BUSY_BYTES_PER_SECOND

    def _next_batch(self, batch_bytes: int) -> tuple[BlockPages, Indices] | None:
        """Take the next pages from the pending ones."""
        number, page = self._position
        count = len(self._dirty.blocks)
        # Once round all blocks, and once more over the part of the first that was skipped.
        for step in range(count + 1):
            pages = self._dirty.blocks[(number + step) % count]
            limit = max(1, batch_bytes // pages.block.page_size_bytes)
            batch = pages.next_batch_of_stopped(page if step == 0 else 0, limit)
            if len(batch):
                self._position = ((number + step) % count, int(batch[-1]) + 1)
                pages.pending[batch] = False
                return pages, batch
        return None
