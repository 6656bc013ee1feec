"""After switchover: send the pages that the destination lacks.

Two threads send.  ``source`` pushes what is pending, from the page last requested onwards; ``return-path``
sends requested pages, at once and past the bandwidth limit: over the preempt channel if there is one, or
else over the main channel, before the next batch.

Under a bandwidth limit, and without a preempt channel, ``source`` does the work of both: it would wait
anyway, and a request then does not wait for a CPU or for the interpreter (docs/decisions, 0022).
"""

import threading
import time
from collections.abc import Callable

from postcopy.errors import StreamError
from postcopy.kernel.cpu_latency import CpusAwake
from postcopy.memory.runs import Indices
from postcopy.source.counters import Counters
from postcopy.source.dirty_pages import BlockPages, DirtyPages
from postcopy.source.flow_control import BatchSize, FlightWindow, PushPolicy
from postcopy.source.page_sink import PageSink
from postcopy.source.preempt_channel import PreemptChannel
from postcopy.source.return_path import ReturnPath
from postcopy.stream.commands import encode_command
from postcopy.stream.records import Ping


class PushWaits:
    """The waits of one push; each ends when the push is over.

    Between them and during them the pushing thread reads the return path, if it has borrowed the turn.

    :param over: set when nothing can be sent any more.
    :param answers: the return path; None: there is none.
    """

    def __init__(self, over: threading.Event, answers: ReturnPath | None) -> None:
        self._over = over
        self._answers = answers

    def read(self, *, here: bool) -> None:
        """Choose whether this thread reads the return path from now on, or the return path's own."""
        if self._answers is None:
            return
        reader = self._answers.reader
        if here and not reader.is_borrowed:
            reader.borrow()
        elif not here and reader.is_borrowed:
            reader.give_back()

    def read_now(self) -> None:
        """Handle the messages that have come, if this thread reads them."""
        if self._answers is not None:
            self._answers.read_messages()

    def wait(self, timeout: float) -> bool:
        """Wait so many seconds, or until a message comes; return whether the push is over."""
        if self._answers is None or not self._answers.reader.is_borrowed:
            return self._over.wait(timeout)
        self._answers.read_messages(timeout)
        return self._over.is_set()

    def is_set(self) -> bool:
        """Whether the push is over."""
        return self._over.is_set()

    def wait_for(self, window: FlightWindow) -> None:
        """Wait until another batch may be sent."""
        while not window.is_open:
            if self._answers is None or not self._answers.read_messages(None):
                window.wait()


class PostcopyPush:
    """The pages of one migration after switchover.

    Invariant, under ``_lock``: the thread that takes a page from the pending ones sends it, once.
    ``_sending`` is for the main channel: it is held while the kernel takes the bytes, ``_lock`` never is.
    """

    def __init__(
        self,
        dirty: DirtyPages,
        sender: PageSink,
        counters: Counters,
        policy: PushPolicy,
    ) -> None:
        self._policy = policy
        self._dirty = dirty
        self._sender = sender
        self._counters = counters
        self._over = threading.Event()
        self._begun = False
        self._size = BatchSize(
            policy.most_batch_bytes,
            least_bytes=policy.least_batch_bytes,
            moment_s=policy.batch_s,
        )
        self._awake = CpusAwake()
        self._by_name = {pages.block.name: pages for pages in dirty.blocks}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._served = threading.Condition()
        self._serving = 0
        self._last_request = 0.0
        self._position: tuple[int, int] = (0, 0)  # number of a block, page there
        self._preempt: PreemptChannel | None = None
        self.window = FlightWindow(policy.window_bytes, policy.ping_bytes)

    def expect(self) -> None:
        """The guest is about to stop here: keep the CPUs awake for that."""
        self._awake.a_while()

    def begin(self) -> None:
        """Accept requests from now on: the guest has stopped here."""
        self._begun = True
        self._awake.a_while()

    def use_preempt_channel(self, channel: PreemptChannel) -> None:
        """Send requested pages over this channel from now on."""
        self._preempt = channel

    def run(self, answers: ReturnPath | None, *, leave_zeros_out: bool = False) -> None:
        """Push until nothing is pending.

        :param answers: the return path; None: there is none.
        :param leave_zeros_out: zero pages are sent only if they are requested meanwhile.  A real QEMU has
            emptied its memory, and takes what has not come at the end for zeros.
        """
        if leave_zeros_out:
            with self._lock:
                for pages in self._dirty.blocks:
                    pages.leave_zeros_out()
        self._let_guest_begin()
        waits = PushWaits(self._over, answers)
        try:
            while self._push_batch():
                waits.read(here=self._preempt is None and self._has_time())
                waits.read_now()
                self._yield_to_requests()
                waits.wait_for(self.window)
                self._sender.pace(waits)
        finally:
            waits.read(here=False)
        self._end_requests()
        self._yield_to_requests()  # pages that they took are not pending any more, but may not be sent yet

    def _end_requests(self) -> None:
        """Take what is left out for sent: the end of the stream lets all threads go on that wait there.

        With a preempt channel QEMU first waits for each page that it has requested.
        """
        if self._preempt is not None and not self._preempt.sends_end:
            return
        with self._lock:
            for pages in self._dirty.blocks:
                pages.end_requests()

    def stop(self) -> None:
        """End the waits of the push: the channel is gone, and the next send raises."""
        self._over.set()
        self.window.close()
        self._awake.close()

    def serve(self, name: str, start_bytes: int, length_bytes: int) -> None:
        """Send the pages of one request, unless they are on their way already.

        :raises StreamError: the guest has not been handed over.
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
            request_pages = self._policy.request_pages
            for start in range(0, len(wanted), request_pages):
                self._send_requested(pages, wanted[start : start + request_pages])
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
        """Push a few pages, then hold back while the guest requests its first ones.

        The guest needs them one after the other (page tables, code, stack) and stands still until then;
        behind the push each would take milliseconds.  Many of them lie at the beginning of memory.  Where
        KVM walks the guest's page tables itself, a vCPU that waits for one of these cannot be stopped.
        """
        policy = self._policy
        self._push_batch(policy.first_batch_bytes)
        deadline = time.monotonic() + policy.begin_s
        with self._served:
            while (left_s := deadline - time.monotonic()) > 0:
                before = self._counters.requests
                self._served.wait(min(left_s, policy.quiet_s))
                if self._counters.requests == before:
                    return

    def _yield_to_requests(self) -> None:
        """Wait for requests in progress: locks are not fair, and the push would take its own back first."""
        with self._served:
            self._served.wait_for(lambda: not self._serving)

    def _let_urgent_pages_pass(self) -> None:
        """A huge page is half sent: requested ones go out first, over the preempt channel."""
        if self._serving:
            began = time.monotonic()
            with self._served:
                self._served.wait_for(lambda: not self._serving, self._policy.interrupt_s)
            self._size.waited(time.monotonic() - began)

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
            sent_bytes = self._sender.send(pages, batch, self._between(pages))
            self._size.end(sent_bytes)
            ping = self.window.sent(sent_bytes)
            if ping is not None:
                self._sender.send_command(encode_command(Ping(ping)))

    def _between(self, pages: BlockPages) -> Callable[[], None] | None:
        """What to do between two pieces of a page; None: a page goes out so soon that it is not cut."""
        is_soon = pages.block.page_size_bytes <= 2 * self._size.bytes  # twice a batch's time
        if self._preempt is None or is_soon:
            return None
        return self._let_urgent_pages_pass

    def _batch_bytes(self) -> int:
        calm_s = time.monotonic() - self._last_request
        preempt = self._preempt is not None
        most = self._policy.batch_bytes(self._sender.limit, calm_s, preempt=preempt)
        return min(most, self._size.bytes)

    def _has_time(self) -> bool:
        """Whether the push waits for the bandwidth limit most of the time."""
        return 0 < self._sender.limit < self._policy.busy_bytes_per_second

    def _next_batch(self, batch_bytes: int) -> tuple[BlockPages, Indices] | None:
        """Take the next pages from the pending ones."""
        number, page = self._position
        count = len(self._dirty.blocks)
        # All blocks in turn, and the part of the first that was skipped.
        for step in range(count + 1):
            pages = self._dirty.blocks[(number + step) % count]
            limit = max(1, batch_bytes // pages.block.page_size_bytes)
            batch = pages.next_batch_of_stopped(page if step == 0 else 0, limit)
            if len(batch):
                self._position = ((number + step) % count, int(batch[-1]) + 1)
                pages.pending[batch] = False
                return pages, batch
        return None
