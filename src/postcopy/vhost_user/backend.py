"""What a back end does for each message of its front end: features, memory, rings, log, postcopy."""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from postcopy.errors import RingError, VhostUserError
from postcopy.vhost_user import postcopy
from postcopy.vhost_user.connection import Connection, Message
from postcopy.vhost_user.device import Device
from postcopy.vhost_user.dirty_log import DirtyLog
from postcopy.vhost_user.memory import MOST_SLOTS, GuestMemory, MappedRegion
from postcopy.vhost_user.messages import (
    BACK_END,
    FEATURE_LOG_ALL,
    FEATURE_PROTOCOL_FEATURES,
    FRONT_END,
    BackendRequest,
    ProtocolFeature,
)
from postcopy.vhost_user.payloads import (
    HEADER,
    MOST_CONFIG_BYTES,
    Config,
    Log,
    MemoryTable,
    Number,
    Payload,
    Region,
    RingAddresses,
    RingDescriptor,
    RingState,
    SingleRegion,
)
from postcopy.vhost_user.postcopy import Postcopy, Stage
from postcopy.vhost_user.vring import Vring
from postcopy.virtio.ring import Feature

DONE, REFUSED = 0, 1
_NO_FD: Final = -1
_BODY_AT: Final = HEADER.size
_OF_RINGS: Final = int(Feature.VERSION_1 | Feature.INDIRECT_DESC) | FEATURE_LOG_ALL
_PROTOCOL: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a message is answered with in any case."""

    payload: Payload | None = None
    fds: tuple[int, ...] = ()


Result = Answer | int | None
"""An answer; or what an acknowledgement says if one is asked for (0 is success); or neither."""


class BackEnd:
    """All that one front end has set up; one thread.

    :param say: is told in one line of what the driver did wrong.
    """

    def __init__(self, device: Device, say: Callable[[str], None]) -> None:
        self._device = device
        self._say = say
        self._memory = GuestMemory()
        self.vrings = [Vring(n, device, self._memory, say) for n in range(device.queues)]
        self._postcopy = Postcopy()
        self._log: DirtyLog | None = None
        self._features = 0
        self._offered = device.features | _OF_RINGS | FEATURE_PROTOCOL_FEATURES
        self._protocol = ProtocolFeature(0)
        self._offered_protocol = _PROTOCOL
        if postcopy.is_possible():
            self._offered_protocol |= ProtocolFeature.PAGEFAULT
        self._to_front_end: Connection | None = None

    @property
    def acknowledges(self) -> bool:
        """Whether acknowledgements have been agreed on."""
        return ProtocolFeature.REPLY_ACK in self._protocol

    @property
    def served(self) -> list[Vring]:
        """The rings whose requests are to be looked at now."""
        if self._postcopy.stage is Stage.TABLE_SENT:
            return []  # a page that is missing would not be waited for yet
        return [vring for vring in self.vrings if vring.is_served]

    def handle(self, message: Message) -> Result:
        """Do what a message says.

        :raises VhostUserError: it cannot be now.
        """
        kind = message.kind
        if kind.needs & ~self._protocol:
            raise message.wrong(f"{kind.needs.name} has not been agreed on", 0)
        waiting = self._postcopy.stage is Stage.TABLE_SENT
        if waiting and not kind.is_acknowledged:
            raise message.wrong("the acknowledgement of the memory table is due", 0)
        try:
            return _HANDLERS[kind.number](self, message, message.payload)
        except (VhostUserError, RingError) as error:
            raise message.wrong(error.message, error.offset) from error

    def tell_configuration_changed(self) -> None:
        """Have the front end read the configuration anew, if it has given us a channel for that."""
        if self._to_front_end is not None:
            with contextlib.suppress(ConnectionError):  # it is gone, which is seen elsewhere
                self._to_front_end.send(BACK_END[BackendRequest.CONFIG_CHANGE_MSG])

    def close(self) -> None:
        """Let go of everything."""
        for vring in self.vrings:
            vring.close()
        self._postcopy.end()
        self._memory.close()
        self._set_log(None)
        self._set_channel(None)

    # Features

    def _get_features(self, *_: object) -> Result:
        return Answer(Number(self._offered))

    def _set_features(self, _: Message, features: Number) -> Result:
        if features.value & ~self._offered:
            raise VhostUserError(f"{features.value & ~self._offered:#x} was not offered", 12)
        self._features = features.value
        if not features.value & FEATURE_PROTOCOL_FEATURES:
            for vring in self.vrings:
                vring.enabled = True
        for vring in self.vrings:
            vring.indirect = bool(features.value & Feature.INDIRECT_DESC)
        self._apply_log()
        self._device.agreed(features.value)
        return DONE

    def _get_protocol_features(self, *_: object) -> Result:
        return Answer(Number(int(self._offered_protocol)))

    def _set_protocol_features(self, _: Message, features: Number) -> Result:
        if features.value & ~int(self._offered_protocol):
            unknown = features.value & ~int(self._offered_protocol)
            raise VhostUserError(f"{unknown:#x} was not offered", 12)
        self._protocol = ProtocolFeature(features.value)
        return DONE

    def _get_queue_num(self, *_: object) -> Result:
        return Answer(Number(len(self.vrings)))

    def _set_owner(self, *_: object) -> Result:
        return DONE

    def _reset_owner(self, *_: object) -> Result:
        for vring in self.vrings:
            vring.enabled = False
        return DONE

    def _mapped(self, message: Message, regions: Sequence[Region]) -> list[MappedRegion]:
        mapped: list[MappedRegion] = []
        try:
            for region, fd in zip(regions, message.descriptors, strict=True):
                mapped.append(MappedRegion(region, fd))
        except BaseException:
            for region_mapped in mapped:
                region_mapped.close()
            raise
        return mapped

    # Memory

    def _set_mem_table(self, message: Message, table: MemoryTable | Number) -> Result:
        if isinstance(table, Number):
            return self._acknowledged(message, table)
        if self._postcopy.stage is Stage.TABLE_SENT:
            raise VhostUserError("the acknowledgement of the memory table before is due", 12)
        mapped = self._mapped(message, table.regions)
        self._replace(mapped, new=mapped)
        if not self._postcopy.is_listening:
            return DONE
        self._postcopy.stage = Stage.TABLE_SENT
        return Answer(MemoryTable(tuple(region.ours() for region in mapped)))

    def _add_mem_reg(self, message: Message, added: SingleRegion | Number) -> Result:
        if isinstance(added, Number):
            return self._acknowledged(message, added)
        if len(self._memory.regions) >= MOST_SLOTS:
            raise VhostUserError(f"more than {MOST_SLOTS} regions", 20)
        mapped = self._mapped(message, [added.region])
        self._replace([*self._memory.regions, *mapped], new=mapped)
        if not self._postcopy.is_listening:
            return DONE
        self._postcopy.stage = Stage.TABLE_SENT
        return Answer(SingleRegion(mapped[0].ours()))

    def _rem_mem_reg(self, _: Message, removed: SingleRegion) -> Result:
        wanted = removed.region
        kept = [region for region in self._memory.regions if not region.is_at(wanted)]
        if len(kept) == len(self._memory.regions):
            raise VhostUserError(
                f"there is no region at guest address {wanted.guest_address:#x}", 20
            )
        self._replace(kept, new=[])
        return DONE

    def _get_max_mem_slots(self, *_: object) -> Result:
        return Answer(Number(MOST_SLOTS))

    def _acknowledged(self, _: Message, result: Number) -> Result:
        if self._postcopy.stage is not Stage.TABLE_SENT:
            raise VhostUserError("an acknowledgement, and no memory table was answered", 8)
        if result.value:
            raise VhostUserError(f"the front end failed with our memory table ({result.value})", 12)
        self._postcopy.arm(self._memory.regions)
        return None

    def _replace(self, regions: Sequence[MappedRegion], *, new: Sequence[MappedRegion]) -> None:
        try:
            self._memory.replace(regions)
            self._check_log()
        except VhostUserError:
            for region in new:
                region.close()
            raise
        for vring in self.vrings:
            vring.forget_views()

    # Rings

    def _vring(self, _: Message, number: int) -> Vring:
        if number >= len(self.vrings):
            raise VhostUserError(f"ring {number} of {len(self.vrings)}", _BODY_AT)
        return self.vrings[number]

    def _set_vring_num(self, message: Message, state: RingState) -> Result:
        self._vring(message, state.index).set_size(state.value)
        return DONE

    def _set_vring_addr(self, message: Message, addresses: RingAddresses) -> Result:
        self._vring(message, addresses.index).set_addresses(addresses)
        return DONE

    def _set_vring_base(self, message: Message, state: RingState) -> Result:
        self._vring(message, state.index).set_base(state.value)
        return DONE

    def _get_vring_base(self, message: Message, state: RingState) -> Result:
        return Answer(RingState(state.index, self._vring(message, state.index).stop()))

    def _set_vring_kick(self, message: Message, descriptor: RingDescriptor) -> Result:
        vring = self._vring(message, descriptor.index)
        if not descriptor.has_descriptor:
            raise VhostUserError("a ring without a kick would have to be polled", _BODY_AT)
        vring.set_kick(message.take_descriptor())
        self._check_version(message)
        return DONE

    def _set_vring_call(self, message: Message, descriptor: RingDescriptor) -> Result:
        vring = self._vring(message, descriptor.index)
        vring.set_call(message.take_descriptor() if descriptor.has_descriptor else _NO_FD)
        return DONE

    def _set_vring_err(self, message: Message, descriptor: RingDescriptor) -> Result:
        vring = self._vring(message, descriptor.index)
        vring.set_error(message.take_descriptor() if descriptor.has_descriptor else _NO_FD)
        return DONE

    def _set_vring_enable(self, message: Message, state: RingState) -> Result:
        vring = self._vring(message, state.index)
        if state.value > 1:
            raise VhostUserError(f"{state.value} is neither on nor off", _BODY_AT + 4)
        vring.enabled = bool(state.value)
        return DONE

    def _check_version(self, _: Message) -> None:
        if not self._features & Feature.VERSION_1:
            raise VhostUserError(
                "the driver has not agreed on VERSION_1; give it a modern device "
                "(QEMU: -global virtio-mmio.force-legacy=off)"
            )

    # The dirty log

    def _set_log_base(self, message: Message, log: Log) -> Result:
        made = DirtyLog(log.size, log.offset, message.descriptors[0])
        try:
            if self._memory.regions:
                made.check_covers(self._memory.end)
        except VhostUserError:
            made.close()
            raise
        self._set_log(made)
        return Answer(Number(DONE))

    def _set_log_fd(self, *_: object) -> Result:
        return DONE  # a wish to be told of each mark; the front end looks at the log anyway

    def _set_log(self, log: DirtyLog | None) -> None:
        old, self._log = self._log, log
        self._apply_log()
        if old is not None:
            old.close()

    def _apply_log(self) -> None:
        log = self._log if self._features & FEATURE_LOG_ALL else None
        for vring in self.vrings:
            vring.log = log

    def _check_log(self) -> None:
        if self._log is not None and self._features & FEATURE_LOG_ALL:
            self._log.check_covers(self._memory.end)

    # Configuration, and the channel to the front end

    def _get_config(self, _: Message, asked: Config) -> Result:
        whole = self._device.configuration().ljust(MOST_CONFIG_BYTES, b"\0")
        part = whole[asked.offset : asked.offset + len(asked.data)]
        return Answer(Config(asked.offset, asked.flags, part))

    def _set_config(self, message: Message, _: Config) -> Result:
        self._say(f"{message.kind.name}: no field of the configuration can be written; refused")
        return REFUSED

    def _set_backend_req_fd(self, message: Message, _: None) -> Result:
        fd = message.take_descriptor()
        try:
            channel = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise VhostUserError(f"its descriptor is no socket: {error.strerror}", 0) from error
        self._set_channel(Connection(channel, {}))
        return DONE

    def _set_channel(self, channel: Connection | None) -> None:
        if self._to_front_end is not None:
            self._to_front_end.close()
        self._to_front_end = channel

    # Postcopy

    def _postcopy_advise(self, *_: object) -> Result:
        return Answer(None, (self._postcopy.advise(),))

    def _postcopy_listen(self, *_: object) -> Result:
        if self._memory.regions:
            raise VhostUserError("there is a memory table already", 0)
        self._postcopy.listen()
        return DONE

    def _postcopy_end(self, *_: object) -> Result:
        self._postcopy.end()
        return Answer(Number(DONE))


_HANDLERS: Final[dict[int, Callable[[BackEnd, Message, Any], Result]]] = {
    number: getattr(BackEnd, f"_{kind.name.lower()}") for number, kind in FRONT_END.items()
}
