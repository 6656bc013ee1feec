"""The destination of one migration.

The thread ``destination`` reads the main channel and does what comes on it, in order
(:mod:`postcopy.destination.loadvm`).  Precopy ends with the end of the stream.  Postcopy goes on while the
guest runs, with the threads of :mod:`postcopy.destination.postcopy`, and may break and be recovered any
number of times.
"""

import threading
from collections.abc import Callable

from postcopy.channel.channel import Channel
from postcopy.channel.files import check_seekable
from postcopy.channel.listen import Listener
from postcopy.channel.peer_timeout import AckedBytes, PeerTimeout
from postcopy.channel.sockets import SocketChannel
from postcopy.destination.incoming_channels import IncomingChannels, Surroundings
from postcopy.destination.incoming_ram import Populating
from postcopy.destination.loadvm import RECEIVE_BUFFER_BYTES, RecordLoader, layout_of
from postcopy.destination.multifd import IncomingMultifd
from postcopy.destination.postcopy import Postcopy
from postcopy.destination.preempt_channel import PreemptChannel
from postcopy.destination.return_path import ReturnPath
from postcopy.destination.whole_pages import PageReceiver
from postcopy.errors import ChannelBroken, PostcopyError, StreamError
from postcopy.guest import AddressSpace, Guest
from postcopy.paging.blocktime import Blocktime
from postcopy.paging.fault_table import FaultTable
from postcopy.paging.placement import Placement
from postcopy.paging.ram import IncomingRam
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.statistics import MigrationInfo, WaitCause
from postcopy.status import AFTER_SWITCHOVER, Status, StatusMachine
from postcopy.stream import records
from postcopy.stream.decoder import Decoder
from postcopy.stream.layout import DeviceFormats, Expected
from postcopy.stream.mapped_decoder import MappedDecoder
from postcopy.stream.mapped_ram import CAPABILITY
from postcopy.stream.numbers import IGNORED_BLOCKS, RAM_SECTION_ID
from postcopy.trace import trace

_LOOK_S = 0.05


class Destination:
    """One incoming migration."""

    def __init__(
        self,
        guest: Guest,
        formats: DeviceFormats,
        listener: Listener,
        ram: IncomingRam,
        populating: Populating,
        capabilities: Capabilities,
        progress: StatusMachine,
        parameters: Parameters | None = None,
    ) -> None:
        self._guest = guest
        self._incoming = IncomingChannels(listener, self._preempt)
        self._ram = ram
        self._populating = populating
        self._progress = progress
        self.error: PostcopyError | None = None
        self._parameters = parameters or Parameters()
        self._channel: Channel | None = None
        # Held while the source is waited for, until the channel is known.
        self._meeting = threading.Lock()
        self._peer_timeout: PeerTimeout | None = None
        self._silent: ChannelBroken | None = None
        self._paused_by_user = False
        vcpus = {t.thread_id: t.index for t in guest.vcpu_threads()}
        faults = FaultTable(Blocktime(vcpus))
        self._placement = Placement(ram, faults)
        self._return_path = ReturnPath()
        self._postcopy = Postcopy(guest, ram, faults, self._return_path, progress, self._break)
        self._layout = layout_of(ram)
        self._receiver = PageReceiver(ram, self._layout, self._placement)
        self._formats = formats
        surroundings = Surroundings(ram, faults, self._layout, self._link_timeout_ms, self._break)
        self._preempt_channel = PreemptChannel(surroundings, self._preempt)
        self._multifd = IncomingMultifd(surroundings, lambda: self._parameters)
        self._loader = RecordLoader(
            guest,
            formats,
            ram,
            self._placement,
            self._postcopy,
            self._preempt_channel,
            self._multifd,
            self._return_path,
            progress,
            lambda: self._capabilities,
        )
        self._decoder = self._new_decoder(multifd=False)
        self.set_capabilities(capabilities)

    def _new_decoder(self, *, multifd: bool) -> Decoder:
        expect, ignored = Expected(machine=self._guest.machine_name), IGNORED_BLOCKS
        layout, formats = self._layout, self._formats
        return Decoder(formats, layout, multifd=multifd, expect=expect, ignored_blocks=ignored)

    # --- called by the monitor, from other threads

    def info(self) -> MigrationInfo:
        """The figures as they are now."""
        return self._postcopy.info(self._progress.status, self._capabilities)

    def set_capabilities(self, capabilities: Capabilities) -> None:
        """Take over capabilities that were set before the source has connected."""
        self._capabilities = capabilities
        self._postcopy.waits_for(self._loader.page_cause)
        if capabilities.enabled(Capability.POSTCOPY_RAM):
            self._populating.hide()

    def set_parameters(self, parameters: Parameters) -> None:
        """Take over parameters that the user has changed meanwhile."""
        self._parameters = parameters

    def share(self, space: AddressSpace) -> None:
        """Serve the faults of one more process that has the guest's memory mapped."""
        self._postcopy.shared.add(space)

    def _preempt(self) -> bool:
        return self._capabilities.enabled(Capability.POSTCOPY_PREEMPT)

    def _link_timeout_ms(self) -> int:
        return self._parameters.x_link_timeout

    def pause(self) -> None:
        """Break the connection on purpose."""
        self._paused_by_user = True
        self._break()

    def stop_waiting(self) -> None:
        """Stop listening for a source that has not connected yet."""
        self._incoming.close()

    def leave(self) -> None:
        """The engine ends: so does a command that the stream comes from; after :meth:`stop_waiting`."""
        with self._meeting:
            channel = self._channel  # the thread `destination` may close it meanwhile
        if channel is not None:
            channel.leave()

    def _break(self) -> None:
        self._preempt_channel.shutdown()
        self._multifd.shutdown()
        channel = self._channel  # the thread `destination` may close it meanwhile
        if channel is not None:
            channel.shutdown()

    # --- the thread of the destination

    def run(self) -> None:
        """Receive one guest."""
        self._until_the_end(self._take_in)

    def begin_recovery(self, listener: Listener) -> None:
        """Wait for the source at this listener from now on; :meth:`stop_waiting` ends the wait."""
        self._incoming = IncomingChannels(listener, self._preempt)

    def recover(self) -> None:
        """Wait until the source has connected again, and go on; after :meth:`begin_recovery`."""
        self._until_the_end(self._go_on)

    def adopt(self) -> None:
        """Take over a paused postcopy whose engine has died."""
        self._postcopy.waits_for(WaitCause.ENGINE)
        userfaultfd = self._postcopy.adopt()
        self._placement.listen(userfaultfd, self._postcopy.mapper.later)
        trace("destination.adopted")

    def _until_the_end(self, steps: Callable[[], None]) -> None:
        try:
            steps()
        except PostcopyError as error:
            self._fail(error)
        finally:
            self._let_go()

    def _take_in(self) -> None:
        channel, first = self._meet(with_multifd=True)
        if self._capabilities.enabled(Capability.MAPPED_RAM):
            self._decoder = self._mapped_decoder(channel)
        elif self._multifd.group is not None:
            self._decoder = self._new_decoder(multifd=True)
            self._decoder.feed(first)
        trace("destination.connected")
        self._populating.stop()
        self._progress.move(Status.ACTIVE)
        self._receive(channel)

    def _mapped_decoder(self, channel: Channel) -> Decoder:
        file = check_seekable(channel)
        return MappedDecoder(
            self._formats,
            self._layout,
            expect=Expected(self._guest.machine_name, capabilities=frozenset({CAPABILITY})),
            start_offset=file.position,
            file_bytes=file.size_bytes,
            ignored_blocks=IGNORED_BLOCKS,
        )

    def _go_on(self) -> None:
        channel, _ = self._meet(with_multifd=False)
        self.error = self._silent = None
        self._paused_by_user = False
        channel.bound_buffers(RECEIVE_BUFFER_BYTES)
        # An engine that did not see the beginning takes the number of our own source.
        section = self._decoder.ram_section_id or self._guest.kept_stream()[0] or RAM_SECTION_ID
        self._decoder.resume(section)
        self._placement.forget_halves()
        self._ram.forget_claims()
        self._postcopy.serve_again()
        self._return_path.open(channel, hold_requests=True)
        self._progress.move(Status.POSTCOPY_RECOVER)
        self._postcopy.waits_for(WaitCause.RECOVERY)
        trace("destination.recovery-connected")
        self._receive(channel)

    def _meet(self, *, with_multifd: bool) -> tuple[Channel, bytes]:
        """Wait for the source, and begin to watch whether it is silent.

        :return: the main channel, and what has been received of it.
        """
        on = self._capabilities.on
        wanted = with_multifd and Capability.MULTIFD in on and Capability.MAPPED_RAM not in on
        group = self._multifd.switch_on() if wanted else None
        with self._meeting:
            channel, first = self._incoming.main_beside(group)
            self._loader.channel = self._channel = channel
        channel.watch(self._link_timeout_ms() / 1000)
        self._preempt_channel.expect(self._incoming)
        taken = AckedBytes(channel)
        self._peer_timeout = PeerTimeout(
            self._link_timeout_ms,
            lambda: self._signs(channel, taken),
            self._is_waiting,
            self._fell_silent,
        )
        self._peer_timeout.start()
        return channel, first

    def _signs(self, channel: Channel, taken: AckedBytes) -> tuple[int, int]:
        """What shows that the source is alive; in a recovery it also reads our bitmaps."""
        recovering = self._progress.status is Status.POSTCOPY_RECOVER
        taken_bytes = taken.of(channel.sent_bytes) if recovering else 0
        return channel.received_bytes + self._preempt_channel.received_bytes, taken_bytes

    def _is_waiting(self) -> bool:
        status = self._progress.status
        if status in {Status.POSTCOPY_DEVICE, Status.POSTCOPY_ACTIVE}:
            # With the last page in place it waits for the end of the stream.
            return self._postcopy.finished or self._ram.any_expected()
        return status is Status.POSTCOPY_RECOVER

    def _fell_silent(self, seconds: float) -> None:
        self._silent = ChannelBroken(f"nothing came from the source for {seconds:g} s")
        self._break()

    def _receive(self, channel: Channel) -> None:
        """Load records up to the end of the stream, and complete the migration."""
        decoder = self._decoder
        while not isinstance(record := decoder.next_record(), records.EndOfStream):
            if record is not None:
                self._loader.load(record)
            elif not self._receiver.receive(channel, decoder):
                decoder.finish()
        if self._progress.status is Status.POSTCOPY_RECOVER:
            # Another peer could end the stream with one zero byte, and all missing pages would be zero.
            raise StreamError("the stream ends before the recovery is done")
        if self._postcopy.listening:
            trace("destination.pages-ended")
            self._preempt_channel.finish()
            self._postcopy.finish()
            trace("destination.unwatched")
        else:
            trace("destination.all-received")
            self._multifd.end()
            self._complete_precopy()
            trace("destination.resumed")
        self._say_that_it_has_arrived()
        self._end(Status.COMPLETED)
        self._drain(channel)

    def _say_that_it_has_arrived(self) -> None:
        """Report success; the guest is complete here even if the source does not get the report."""
        try:
            self._return_path.shut(failed=False)
        except ChannelBroken:
            pass
        postcopy = self._postcopy.listening
        trace("destination.postcopy-shut-sent" if postcopy else "destination.shut-sent")

    def _complete_precopy(self) -> None:
        if not self._loader.ram_seen:
            raise StreamError("the stream ended without any RAM: nothing has arrived")
        self._check_leaves_its_source()
        self._loader.give_postcopy_up()
        self._loader.load_devices()
        trace("destination.devices-loaded")
        self._guest.resume()

    def _check_leaves_its_source(self) -> None:
        """Refuse a background snapshot, whose guest runs on at the source, unless it is wanted here.

        A file, a pipe or a command may bring one at any time; over a socket a migration is expected.
        """
        if self._loader.ram_ended or not isinstance(self._channel, SocketChannel):
            return
        if not self._capabilities.enabled(Capability.BACKGROUND_SNAPSHOT):
            raise StreamError(
                "this is a background snapshot, whose guest goes on at its source, and no migration; "
                "switch background-snapshot off there, or on here too if both are to run"
            )

    def _drain(self, channel: Channel) -> None:
        """Read what follows the end (a description): ``close`` would reset the connection otherwise."""
        try:
            while count := channel.receive_into(self._decoder.buffer()):
                self._decoder.received(count)
                while self._decoder.next_record() is not None:
                    pass
        except PostcopyError:
            pass  # the guest is here already

    # --- the end

    def _fail(self, error: PostcopyError) -> None:
        self._settle_package()
        if self._postcopy.finished:
            if self._progress.status is not Status.COMPLETED:
                self._end(Status.COMPLETED)  # only the end of the stream has not come
            return
        self.error = error = (
            self._postcopy.failure
            or self._silent
            or self._preempt_channel.failure
            or self._multifd.failure
            or error
        )
        if self._progress.status in AFTER_SWITCHOVER:
            if self._paused_by_user:
                self.error = ChannelBroken("Postcopy migration is paused by the user")
            self._return_path.close()
            # A wait for a recovery that did not begin leaves the status as it is.
            breaks = AFTER_SWITCHOVER - {Status.POSTCOPY_PAUSED}
            if self._progress.move(Status.POSTCOPY_PAUSED, only_from=breaks):
                self._postcopy.waits_for(WaitCause.PAUSED)
            return
        try:
            self._return_path.shut(failed=True)
        except ChannelBroken:
            pass  # the source is gone
        if self._progress.status not in {Status.COMPLETED, Status.FAILED}:
            self._end(Status.FAILED)

    def _settle_package(self) -> None:
        """A received package may still start the guest: wait until it has, or cannot."""
        while not self._postcopy.settle(_LOOK_S):
            self._preempt_channel.close()  # no other page comes
            if self._postcopy.give_up_package():
                return

    def _end(self, status: Status) -> None:
        """Report the last status.  This process may be ended for it: close the listener before."""
        self._incoming.close()
        self._progress.move(status)

    def _let_go(self) -> None:
        self._populating.stop()
        if self._peer_timeout is not None:
            self._peer_timeout.stop()
        self._preempt_channel.close()
        self._multifd.shutdown()
        self._incoming.close()
        self._incoming.close_others()
        if self._channel is not None:
            self._close(self._channel)
            self._channel = None
        if self._progress.status in AFTER_SWITCHOVER:
            return  # the pager goes on, and recovery will bring another channel
        self._postcopy.close()
        self._ram.close()

    def _close(self, channel: Channel) -> None:
        if self._progress.status in AFTER_SWITCHOVER:
            channel.shutdown()  # a command has nothing left to carry
        channel.delivered()
        try:
            channel.close()
        except ChannelBroken:
            pass  # whether all has come is known already
