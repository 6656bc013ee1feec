"""The small x86-64 machine: RAM, vCPUs, a serial port and a switch to turn itself off.

On the wire it is QEMU's ``microvm`` at its smallest, or ``none`` if told so.  It knows nothing of
migration but what :class:`postcopy.guest.Guest` asks of any guest.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from postcopy.errors import GuestError, KernelError, Refused, StreamError, WrongState
from postcopy.guest import DeviceState, Region, SharingProcess, VcpuThread
from postcopy.kernel.mapping import Buffer
from postcopy.machine import accelerator, boot, sections
from postcopy.machine.announcing import Announcer
from postcopy.machine.config import MachineConfig
from postcopy.machine.dirty_log import MIGRATION, DirtyLog
from postcopy.machine.dirty_rate import DirtyRate
from postcopy.machine.drive import open_device
from postcopy.machine.guest_memory import GuestMemory
from postcopy.machine.mapped_blocks import Ram
from postcopy.machine.ports import PortBus, SerialPort
from postcopy.machine.run_control import OnEvent, RunControl, RunState
from postcopy.machine.vcpu import Runner, Vcpu, install_kick_handler
from postcopy.machine.vcpu_throttle import DirtyLimit, VcpuThrottle
from postcopy.machine.virtio_mmio import NOTIFY_ADDRESS, VirtioMmio, check_state
from postcopy.ownership import Ownership

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Machine:
    """One machine, from :meth:`start` to :meth:`close`; satisfies ``postcopy.guest.Guest``.

    Every method may be called from any thread.  Those that touch guest memory may have to wait for
    missing pages, without holding the interpreter lock.

    :param on_event: see :class:`~postcopy.machine.run_control.RunControl`.
    :param on_serial: gets what the guest writes to its serial port.
    :raises Refused: the settings cannot work.
    :raises HostCannot: this host cannot run such a machine.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        on_event: OnEvent = lambda _name, _data: None,
        on_serial: Callable[[bytes], None] = lambda _data: None,
    ) -> None:
        config.check()
        install_kick_handler()
        self.config = config
        self._addresses = config.address_map
        self._ram = Ram(
            config.memory_blocks, self._addresses, transparent=config.transparent_huge_pages
        )
        self._memory = GuestMemory(self._ram.mapping, self._addresses)
        self._vcpus: list[Vcpu] = []
        self._runners: list[Runner] = []
        self._drive: VirtioMmio | None = None
        self._sharing: list[SharingProcess] = []
        self._tell_of_sharing: Callable[[SharingProcess], None] = lambda _: None
        try:
            self._accelerator = accelerator.choose(config, self._ram.mapping)
        except BaseException:
            self._ram.close()
            raise
        self.run_control = RunControl(self._runners, on_event)
        self._dirty_log = DirtyLog(self._accelerator, self._memory, config.memory_bytes)
        self.dirty_rate = DirtyRate(self)
        self._throttle = VcpuThrottle(self._vcpus)
        self.dirty_limit = DirtyLimit(self, self._throttle, self._vcpus)
        self.announcer = Announcer()
        self._serial = SerialPort(on_serial)
        self._closed = False
        try:
            self._attach_drive()
            self._make_vcpus()
            if self._drive is not None:
                # Behind the vCPUs: only when they have parked no request comes any more.
                self._runners.append(self._drive.runner)
        except BaseException:
            self.close()
            raise

    def _attach_drive(self) -> None:
        on_lost = self.run_control.fail
        queue = open_device(self.config, self._memory, self._ram.parts, self, on_lost)
        if queue is not None:
            self._drive, self.announcer.device = VirtioMmio(queue), queue
            for number, fd in enumerate(queue.kick_fds):
                self._accelerator.signal_at_write(NOTIFY_ADDRESS, number, fd)

    def _make_vcpus(self) -> None:
        ports = PortBus(self._serial, self.run_control.guest_shutdown)
        for index in range(self.config.vcpus):
            cpu = self._accelerator.create_cpu(index, ports, self._drive)
            try:
                vcpu = Vcpu(index, cpu, self.run_control.vcpu_ended)
            except BaseException:
                cpu.close()
                raise
            self._vcpus.append(vcpu)
            self._runners.append(vcpu)

    def start(self, *, paused: bool = False, incoming: bool = False) -> None:
        """Boot the image, or wait for a guest to come.

        :param paused: do not run before :meth:`cont`; with ``incoming``, not even on arrival.
        :param incoming: leave the memory alone; the guest is not ours before :meth:`resume`.
        :raises WrongState: the machine has been started.
        :raises Refused: there is nothing to boot.
        """

        # An arriving guest finds memory untouched and vCPUs in their reset state.
        def prepare() -> None:
            if not incoming:
                boot.boot_guest(self.config, self._ram.mapping, self._addresses, self._vcpus)

        self.run_control.start(prepare, paused=paused, incoming=incoming)

    @property
    def machine_name(self) -> str:
        """What it is on the wire: ``microvm`` or ``none``."""
        return self.config.machine_type

    @property
    def accelerator_name(self) -> str:
        """``kvm`` or ``unicorn``."""
        return self._accelerator.name

    @property
    def run_state(self) -> RunState:
        """What the machine is doing, by QEMU's name (it is a string)."""
        return self.run_control.state

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""
        return self.run_state is RunState.RUNNING

    @property
    def has_drive(self) -> bool:
        """Whether there is a drive."""
        return self._drive is not None

    @property
    def memory_bytes(self) -> int:
        """How much RAM there is."""
        return self.config.memory_bytes

    @property
    def vcpus(self) -> Sequence[VcpuThread]:
        """As :meth:`vcpu_threads`, for the monitor."""
        return self.vcpu_threads()

    def set_run_state(self, state: RunState) -> None:
        """See :meth:`RunControl.set_state`; for ``POSTMIGRATE``."""
        self.run_control.set_state(state)

    @property
    def ownership(self) -> Ownership:
        """Whose the guest is."""
        return self.run_control.ownership

    @property
    def owned(self) -> bool:
        """Whether the guest is ours to run."""
        return self.ownership.here

    @property
    def exit_code(self) -> int | None:
        """What the guest wrote to the exit port when it switched itself off."""
        return self.run_control.exit_code

    @property
    def failure(self) -> GuestError | None:
        """Why the state is ``INTERNAL_ERROR``."""
        return self.run_control.failure

    def fail(self, reason: str) -> None:
        """The guest cannot go on, for the reason that the caller gives (such as a lost page)."""
        self.run_control.fail(reason)

    def stop(self) -> None:
        """The user's stop: see :meth:`RunControl.stop`."""
        self.run_control.stop()

    def cont(self) -> None:
        """The user's cont: see :meth:`RunControl.cont`.

        :raises WrongState: the guest must not, or cannot, run here now.
        """
        self.run_control.cont()

    # What an engine asks: postcopy.guest.Guest.

    def regions(self) -> Sequence[Region]:
        """The RAM blocks, in the order of their guest addresses."""
        return self._ram.regions

    def shared_with(self) -> Sequence[SharingProcess]:
        """The other processes that have its memory mapped now."""
        return tuple(self._sharing)

    def tell_of_sharing(self, joined: Callable[[SharingProcess], None]) -> None:
        """Call this with each process that its memory is shared with from now on."""
        self._tell_of_sharing = joined

    def share(self, process: SharingProcess) -> None:
        """Another process has its memory mapped, and is about to touch it.

        :raises PostcopyError: pages are missing, and it cannot be served with them; it is not shared.
        """
        self._sharing.append(process)
        try:
            self._tell_of_sharing(process)
        except BaseException:
            self._sharing.remove(process)
            raise

    def unshare(self, process: SharingProcess) -> None:
        """That process has ended, or has let go of the memory."""
        self._sharing.remove(process)

    def vcpu_threads(self) -> Sequence[VcpuThread]:
        """The threads that run vCPUs; they are the same for the machine's whole life."""
        return tuple(vcpu.thread for vcpu in self._vcpus)

    def pause(self, *, to_move: bool = False) -> None:
        """Park the vCPUs, also those that wait for a missing page; harmless when done.

        :param to_move: for the switchover of a migration.
        :raises WrongState: ``to_move``, and the migration has been cancelled.
        """
        self.run_control.pause(to_move=to_move)

    def resume(self, arrival: int | None = None) -> None:
        """Go back to what the guest was doing before :meth:`pause`, or where it came from.

        :param arrival: see :meth:`RunControl.resume`.
        :raises WrongState: the guest was given up, or another guest is awaited by now.
        :raises GuestError: the guest is in no state to run.
        """
        self.run_control.resume(arrival)

    def throttle(self, percent: int) -> None:
        """Hold the vCPUs for so much of the time, in slices of some milliseconds; 0: no more."""
        self._throttle.set(percent)

    def limit_dirty_rate(self, mebibytes: int, period_ms: int) -> None:
        """Hold each vCPU to so many MiB a second, measured over a period; 0: no more.

        :raises Refused: there is no dirty log.
        """
        self.dirty_limit.set(mebibytes, period_ms=period_ms)

    def save_devices(self) -> Sequence[DeviceState]:
        """The sections of a stopped machine, ``globalstate`` last.

        :raises WrongState: it runs.
        """
        if self.running:
            raise WrongState("the state of a running guest cannot be saved; pause it first")
        cpus = [vcpu.get_state() for vcpu in self._vcpus]
        moving = self.run_control.state_to_move.value
        drive = None if self._drive is None else self._drive.save()
        return sections.encode_devices(cpus, self._serial.state, moving, drive=drive)

    def load_devices(self, states: Sequence[DeviceState]) -> None:
        """Take over what another machine's :meth:`save_devices` gave.

        :raises GuestError: it does not fit this machine; nothing runs.
        :raises WrongState: this machine runs.
        """
        self._check_stopped()
        self.run_control.arrive(self._load(self._decode(states)))

    def way_back(self, states: Sequence[DeviceState]) -> Callable[[], None]:
        """Understand what our own :meth:`save_devices` gave, or an image of this guest has.

        :return: what takes the stopped guest back to there, any number of times.
        :raises GuestError: it does not fit this machine.
        """
        then = self._decode(states)
        return lambda: self.run_control.go_back(self._load(then))

    def _decode(self, states: Sequence[DeviceState]) -> sections.MachineState:
        try:
            arrived = sections.decode_devices(states, self.config.vcpus)
        except StreamError as error:
            raise GuestError(f"the device state cannot be read: {error}") from error
        check_state(self._drive, arrived.drive)
        return arrived

    def _load(self, arrived: sections.MachineState) -> RunState:
        self._check_stopped()
        for vcpu, cpu in zip(self._vcpus, arrived.cpus, strict=True):
            vcpu.set_state(cpu)
        self._serial.state = arrived.serial
        if self._drive is not None:
            self._drive.load(arrived.drive)
        return RunState.of_stream(arrived.run_state)

    def _check_stopped(self) -> None:
        if self.running:
            raise WrongState("a running guest cannot be given another's state; stop it first")

    # Memory, by the guest's own addresses: offsets in all RAM.

    def read_memory(self, address: int, length: int) -> bytes:
        """Copy guest memory out; waits for missing pages without the interpreter lock.

        :raises Refused: some of it is not RAM.
        :raises GuestError: a page of it is lost.
        """
        self._check_ram(address, length)
        try:
            return self._ram.mapping.read(address, length)
        except KernelError as error:
            where = f"[{address:#x}, {address + length:#x})"
            raise GuestError(f"a page of {where} is lost (poisoned): {error}") from error

    def write_memory(self, address: int, data: Buffer) -> None:
        """Copy into guest memory; see :meth:`read_memory`."""
        self._check_ram(address, len(data))
        self._ram.mapping.write(address, data)

    # Memory, by physical addresses, which are others on a microvm of more than 3 GiB.

    def read_physical(self, address: int, length: int) -> bytes:
        """As :meth:`read_memory`, by physical address.

        :raises Refused: some of it is not RAM.
        """
        return self.read_memory(self._addresses.offset_of(address, length), length)

    def host_address(self, guest_address: int) -> int:
        """Where a physical address is in this process.

        :raises Refused: there is no RAM.
        """
        return self._ram.mapping.address + self._addresses.offset_of(guest_address, 1)

    def block_at(self, guest_address: int) -> str:
        """The name of the RAM block that has a physical address.

        :raises Refused: there is no RAM.
        """
        return self._ram.name_at(self._addresses.offset_of(guest_address, 1))

    def start_dirty_log(self, user: str = MIGRATION) -> None:
        """Begin to note, for one user, which pages the vCPUs and the drive write.

        :raises HostCannot: the accelerator has no such log.
        """
        self._dirty_log.start(user)

    def stop_dirty_log(self, user: str = MIGRATION) -> None:
        """Stop noting for that user."""
        self._dirty_log.stop(user)

    def fetch_dirty_log(self, block: str, user: str = MIGRATION) -> "npt.NDArray[np.uint8]":
        """Fetch and clear a block's log: one bit for each 4 KiB page, page 0 in bit 0 of byte 0.

        Only the guest's own writes are in it, not those of :meth:`write_memory` or of an engine.

        :raises Refused: there is no such block.
        """
        return self._dirty_log.fetch(user, *self._ram.range_of(block))

    def close(self) -> None:
        """Stop for good and give everything back; harmless when done."""
        if self._closed:
            return
        self._closed = True
        for part in (self.announcer, self.dirty_rate, self.dirty_limit, self._throttle):
            part.close()
        self.run_control.close()
        for vcpu in self._vcpus:
            vcpu.close()
        ended = self._drive is None or self._drive.close()
        self._accelerator.close()
        if ended:
            self._ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_ram(self, address: int, length: int) -> None:
        end = self.config.memory_bytes
        if address < 0 or length < 0 or address + length > end:
            what = f"no RAM at [{address:#x}, {address + length:#x})"
            raise Refused(f"{what}; it is at [0x0, {end:#x})")
