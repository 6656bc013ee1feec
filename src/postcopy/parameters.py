"""Capabilities and parameters: what a user may set before and during a migration.

Names, defaults, ranges and complaints are those of QEMU 11.1 (``qapi/migration.json``), so that
QEMU's clients and scripts find what they know; the complaints were compared with a real one.
What we have added ourselves starts with ``x-`` and is marked ``ours``.
"""

import enum
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from postcopy.announcement import AnnouncementTimes
from postcopy.errors import Refused
from postcopy.parameter_rules import Kind, Rule, choice, parameter, percent, size, uint8
from postcopy.tls_options import TlsOptions


class Capability(enum.StrEnum):
    """QEMU's migration capabilities in QEMU's order; all are off at first."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"
    SWITCHOVER_ACK = "switchover-ack"
    DIRTY_LIMIT = "dirty-limit"
    MAPPED_RAM = "mapped-ram"


C = Capability

MEANINGS: Mapping[Capability, str] = {
    C.XBZRLE: "a page that is sent again goes as what has changed in it, if it is in a cache",
    C.AUTO_CONVERGE: "the vCPUs of a guest that writes too fast are held for a share of the time",
    C.EVENTS: "the event `MIGRATION` at each change of the status",
    C.POSTCOPY_RAM: "the guest may run at the destination before its memory is there",
    C.RETURN_PATH: "the destination answers the source, in precopy too",
    C.PAUSE_BEFORE_SWITCHOVER: "precopy waits in `pre-switchover` for `migrate-continue`",
    C.MULTIFD: "pages go over `multifd-channels` connections of their own, compressed or not",
    C.POSTCOPY_BLOCKTIME: "how long vCPUs waited for pages is measured, and told by the destination",
    C.LATE_BLOCK_ACTIVATE: "accepted; a drive is never locked, and used only while the guest runs",
    C.BACKGROUND_SNAPSHOT: "`migrate` writes an image of a guest that goes on",
    C.VALIDATE_UUID: "accepted; the machine has no UUID, and takes a guest of any, as a QEMU without one",
    C.ZERO_COPY_SEND: "the kernel sends pages over `multifd` without a copy, where the network card can",
    C.POSTCOPY_PREEMPT: "pages that are asked for have a connection of their own",
    C.SWITCHOVER_ACK: "the guest waits for devices that must be made ready there; none of ours must",
    C.DIRTY_LIMIT: "a guest that writes too fast is held to `vcpu-dirty-limit`; needs KVM",
    C.MAPPED_RAM: "each page has a fixed place in the file",
}
"""What this version can do, and what it is; switching on any other capability is refused by name."""
SUPPORTED = frozenset(MEANINGS)
REASONS: Mapping[Capability, str] = {
    C.RDMA_PIN_ALL: "pages go over sockets and into files, and not by RDMA",
    C.X_COLO: "no second machine is kept in step with this one",
    C.RELEASE_RAM: "pages are kept until the destination has them: a recovery sends them again",
    C.DIRTY_BITMAPS: "the drive is a raw file, which has no dirty bitmaps",
    C.X_IGNORE_SHARED: "no memory is shared with the destination, so all of it is sent",
}
"""Why a capability has no meaning for this machine."""

_NOT_WITH_BACKGROUND_SNAPSHOT = (
    C.POSTCOPY_RAM,
    C.DIRTY_BITMAPS,
    C.POSTCOPY_BLOCKTIME,
    C.LATE_BLOCK_ACTIVATE,
    C.RETURN_PATH,
    C.MULTIFD,
    C.PAUSE_BEFORE_SWITCHOVER,
    C.AUTO_CONVERGE,
    C.RELEASE_RAM,
    C.RDMA_PIN_ALL,
    C.XBZRLE,
    C.X_COLO,
    C.VALIDATE_UUID,
    C.ZERO_COPY_SEND,
)

_NO_ZERO_COPY = "Zero copy only available for non-compressed non-TLS multifd migration"

# (these together, without that, the complaint), in the order in which QEMU looks at them.
_CONFLICTS: tuple[tuple[Set[Capability], Capability | None, str], ...] = (
    ({C.X_COLO}, C.RETURN_PATH, "Capability 'x-colo' requires capability 'return-path'"),
    ({C.POSTCOPY_RAM, C.X_IGNORE_SHARED}, None, "Postcopy is not compatible with ignore-shared"),
    *(
        (
            {C.BACKGROUND_SNAPSHOT, other},
            None,
            f"Background-snapshot is not compatible with {other.value}",
        )
        for other in _NOT_WITH_BACKGROUND_SNAPSHOT
    ),
    ({C.ZERO_COPY_SEND}, C.MULTIFD, _NO_ZERO_COPY),
    ({C.ZERO_COPY_SEND, C.XBZRLE}, None, _NO_ZERO_COPY),
    ({C.POSTCOPY_PREEMPT}, C.POSTCOPY_RAM, "Postcopy preempt requires postcopy-ram"),
    (
        {C.SWITCHOVER_ACK},
        C.RETURN_PATH,
        "Capability 'switchover-ack' requires capability 'return-path'",
    ),
    (
        {C.DIRTY_LIMIT, C.AUTO_CONVERGE},
        None,
        "dirty-limit conflicts with auto-converge either of then available currently",
    ),
    ({C.MULTIFD, C.XBZRLE}, None, "Multifd is not compatible with xbzrle"),
    ({C.MAPPED_RAM, C.XBZRLE}, None, "Mapped-ram migration is incompatible with xbzrle"),
    ({C.MAPPED_RAM, C.POSTCOPY_RAM}, None, "Mapped-ram migration is incompatible with postcopy"),
)
# What the destination's listener must know before its first connection.
_BEFORE_INCOMING: tuple[tuple[Capability, str], ...] = (
    (C.POSTCOPY_PREEMPT, "Postcopy preempt must be set before incoming starts"),
    (C.MULTIFD, "Multifd must be set before incoming starts"),
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities that are on; immutable, so a migration keeps those it began with."""

    on: frozenset[Capability] = frozenset()

    def __iter__(self) -> Iterator[Capability]:
        return (capability for capability in Capability if capability in self.on)

    def enabled(self, capability: Capability) -> bool:
        """Whether it is on."""
        return capability in self.on

    def with_changes(
        self, changes: Mapping[Capability, bool], *, incoming_started: bool = False
    ) -> "Capabilities":
        """The set after ``changes``, all of them or none.

        :param incoming_started: this side is a destination that already listens.
        :raises Refused: QEMU has a rule against the combination (then in QEMU's words), or one of them
            has no meaning for our machine.
        """
        wanted = {c for c in Capability if changes.get(c, c in self.on)}
        for complaint in self._complaints(wanted, incoming_started=incoming_started):
            raise Refused(complaint)
        for capability in Capability:
            if capability in wanted - self.on and capability in REASONS:
                reason = REASONS[capability]
                raise Refused(f"Capability '{capability}' has no meaning here: {reason}")
        return Capabilities(frozenset(wanted))

    def _complaints(self, wanted: set[Capability], *, incoming_started: bool) -> Iterator[str]:
        for together, without, text in _CONFLICTS:
            if together <= wanted and without not in wanted:
                yield text
        if incoming_started:
            fresh = wanted - self.on
            yield from (text for one, text in _BEFORE_INCOMING if one in fresh)

    def to_qapi(self) -> list[dict[str, Any]]:
        """As ``query-migrate-capabilities`` returns it: all of them, in QEMU's order."""
        return [{"state": c in self.on, "capability": c.value} for c in Capability]


@dataclass(frozen=True)
class Parameters:
    """Everything that can be tuned.  Bandwidths are bytes per second, times milliseconds.

    The Python name is QEMU's with ``_`` for ``-``.  Order: that of QEMU's schema.
    """

    announce_initial: int = size(50, most=100000, help="ms before the second announcement")
    announce_max: int = size(550, most=100000, help="longest time in ms between two of them")
    announce_rounds: int = size(5, most=1000, help="how often an arrived guest is announced (RARP)")
    # QEMU refuses 0 and says that 0 is allowed.
    announce_step: int = size(
        100, least=1, most=10000, complaint="Option {name} expects a value between 0 and {most}",
        help="so many ms more before each further announcement",
    )  # fmt: skip
    throttle_trigger_threshold: int = percent(
        50, 100, "of the bytes sent: a guest that writes more is slowed down"
    )
    cpu_throttle_initial: int = percent(20, 99, "of the time: how long vCPUs are held at first")
    cpu_throttle_increment: int = percent(10, 99, "of the time: more at each step")
    cpu_throttle_tailslow: bool = parameter(
        Kind.BOOLEAN, default=False, help="steps no larger than are needed, by what was written"
    )
    tls_creds: str = parameter(
        Kind.STRING, "", help="the object with the certificates (`tls-creds-x509`); empty: no TLS"
    )
    tls_hostname: str = parameter(
        Kind.STRING, "", help="name in the destination's certificate; empty: that of the address"
    )
    tls_authz: str = parameter(
        Kind.STRING, "", help="the object that says which sources may connect; empty: all of the CA"
    )
    max_bandwidth: int = size(
        128 << 20, mebibytes=True, help="most bytes a second before the switchover; 0: no limit"
    )
    avail_switchover_bandwidth: int = size(
        0, mebibytes=True, help="bytes a second that the switchover will have; 0: as measured"
    )
    downtime_limit: int = size(
        300,
        most=2000 * 1000,
        complaint="Option {name} expects an integer in the range of 0 to (2000 * 1000) ms",
        help="longest time in ms for which a precopy may stop the guest at the switchover",
    )
    x_checkpoint_delay: int = parameter(Kind.UINT32, 20000)
    multifd_channels: int = uint8(2, 1, 255, help="connections of `multifd`, as many at both sides")
    xbzrle_cache_size: int = size(
        64 << 20,
        least=4096,
        power_of_two=True,
        complaint="Option {name} expects a power of two no less than the target page size",
        help="bytes of copies of pages that `xbzrle` keeps",
    )
    max_postcopy_bandwidth: int = size(
        0, help="most bytes a second of pages that nothing waits for, after it; 0: no limit"
    )
    max_cpu_throttle: int = parameter(Kind.UINT8, 99, help="of the time: the most")
    multifd_compression: str = choice(
        *("none", "zlib", "zstd"),
        default="none",
        help="how `multifd` compresses pages, at both sides",
    )
    multifd_zlib_level: int = uint8(1, 0, 9, help="0: not at all, 1: fastest, 9: smallest")
    multifd_qatzip_level: int = uint8(1, 1, 9)
    multifd_zstd_level: int = uint8(1, 0, 20, help="1: fastest, 20: smallest; 0: that of zstd")
    x_vcpu_dirty_limit_period: int = size(
        1000, least=1, most=1000, help="ms over which `dirty-limit` measures"
    )
    vcpu_dirty_limit: int = size(
        1, least=1, complaint="Parameter '{name}' must be greater than 1 MB/s",
        help="MiB a second that `dirty-limit` lets the vCPUs write",
    )  # fmt: skip
    mode: str = choice(
        "normal", "cpr-reboot", "cpr-transfer", "cpr-exec", default="normal", only=("normal",)
    )
    zero_page_detection: str = choice(
        *("none", "legacy", "multifd"), default="multifd",
        help="with `multifd`: zero pages are told on its channels, on the main one, or sent whole",
    )  # fmt: skip
    direct_io: bool = parameter(
        Kind.BOOLEAN, default=False,
        help="with `mapped-ram` and `multifd`: pages go past the page cache (`O_DIRECT`)",
    )  # fmt: skip
    # These two wait in vain for their use: for RDMA, and for the mode cpr-exec.
    x_rdma_chunk_size: int = size(
        1 << 20,
        least=1 << 20,
        most=1 << 30,
        power_of_two=True,
        complaint="Option x_rdma_chunk_size expects a power of 2 in the range 1MiB to 1024MiB",
    )
    cpr_exec_command: tuple[str, ...] = parameter(Kind.STRINGS, ())
    x_dirty_tracking: str = choice(
        *("auto", "pagemap", "kvm"), default="auto", ours=True,
        help="how writes to guest memory are noticed; `auto`: the best that this host has",
    )  # fmt: skip
    x_on_loss: str = choice(
        *("hold", "poison", "quit"), default="hold", ours=True,
        help="what `x-migrate-lost` does at a destination about the pages that will never come",
    )  # fmt: skip
    x_switchover_ack_legacy: bool = parameter(
        Kind.BOOLEAN, default=False, ours=True,
        help="with `switchover-ack`: the destination always answers, as QEMU's did before 11.1",
    )  # fmt: skip
    x_link_timeout: int = size(
        5000, most=3600 * 1000, ours=True, help="silence in ms after which a link is dead; 0: never"
    )

    def with_changes(self, changes: Mapping[str, object]) -> "Parameters":
        """The parameters after ``changes`` (by QEMU's names), all of them or none.

        :raises Refused: a name, type or value that QEMU would refuse too, in QEMU's words; or one
            that we do not implement.
        """
        accepted = {
            python_name(name): rule.accept(name, changes[name])
            for name, rule in rules().items()
            if name in changes
        }
        for name in changes:
            if name not in rules():
                raise Refused(f"Parameter '{name}' is unexpected")
        changed = replace(self, **accepted)  # type: ignore[arg-type]
        for name, rule in rules().items():
            rule.check(name, getattr(changed, python_name(name)))
        if not changed.cpu_throttle_initial <= changed.max_cpu_throttle <= 99:
            expects = "expects an integer in the range of cpu-throttle-initial to 99"
            raise Refused(f"Option max-cpu-throttle {expects}")
        return changed

    def acknowledged(self, capabilities: Capabilities) -> bool:
        """Whether a destination lets its source switch over even if nothing has to be made ready.

        Before QEMU 11.1 ``switchover-ack`` was so; since then the source counts what it has to wait for.
        """
        return self.x_switchover_ack_legacy and capabilities.enabled(Capability.SWITCHOVER_ACK)

    @property
    def announcement(self) -> AnnouncementTimes:
        """How a guest that has arrived is announced."""
        times = self.announce_initial, self.announce_step, self.announce_max
        return AnnouncementTimes(self.announce_rounds, *times)

    def to_qapi(self) -> dict[str, Any]:
        """As ``query-migrate-parameters`` returns it, ours included."""
        values = {name: getattr(self, python_name(name)) for name in rules()}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


@dataclass(frozen=True, slots=True)
class Overrides:
    """What one order sets for itself alone: over what is set, and gone with the order's job.

    :ivar capabilities: those that it switches on or off.
    :ivar parameters: those that it sets, by QEMU's names.
    """

    capabilities: Mapping[Capability, bool] = field(default_factory=dict)
    parameters: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def for_snapshot(cls, *, mapped: bool) -> Self:
        """Those of a background snapshot, whatever is set: most capabilities exclude it.

        :param mapped: pages at fixed places in the file (``mapped-ram``).
        """
        off = dict.fromkeys(Capability, False)
        del off[C.EVENTS]
        return cls(off | {C.BACKGROUND_SNAPSHOT: True, C.MAPPED_RAM: mapped})

    def __bool__(self) -> bool:
        return bool(self.capabilities or self.parameters)


NO_OVERRIDES = Overrides()


@dataclass(frozen=True, slots=True)
class Settings:
    """Capabilities and parameters of a guest's process, or of one job; immutable, as its parts are.

    :ivar tls: of a job, what the parameters about TLS meant when it began.
    """

    capabilities: Capabilities = field(default_factory=Capabilities)
    parameters: Parameters = field(default_factory=Parameters)
    tls: TlsOptions | None = None

    def enabled(self, capability: Capability) -> bool:
        """Whether it is on."""
        return capability in self.capabilities.on

    def overridden(self, overrides: Overrides) -> "Settings":
        """What an order with ``overrides`` begins with.

        :raises Refused: see :meth:`Capabilities.with_changes`, :meth:`Parameters.with_changes` and
            :meth:`checked`.
        """
        return replace(
            self,
            capabilities=self.capabilities.with_changes(overrides.capabilities),
            parameters=self.parameters.with_changes(overrides.parameters),
        ).checked()

    def checked(self) -> Self:
        """Itself, if capabilities and parameters go together.

        :raises Refused: they do not, in QEMU's words.
        """
        if self.enabled(Capability.ZERO_COPY_SEND):
            plain = self.parameters.multifd_compression == "none" and not self.parameters.tls_creds
            if not plain:
                raise Refused(_NO_ZERO_COPY)
        return self


def python_name(name: str) -> str:
    """The attribute of :class:`Parameters` for QEMU's ``name``."""
    return name.replace("-", "_")


def rules() -> dict[str, Rule]:
    """The rule of every parameter by QEMU's name, in the order of QEMU's schema."""
    return {f.name.replace("_", "-"): f.metadata["rule"] for f in fields(Parameters)}
