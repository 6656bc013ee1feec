"""Serves one image to one destination, and goes on after a break."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from postcopy.channel.address import FileAddress, check_tls_address, parse
from postcopy.errors import ImageError, MigrationFailed, NeedsRecovery, PostcopyError, Refused
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.serve.saved_guest import SavedGuest
from postcopy.source.source import MigrationOptions, Source
from postcopy.statistics import MigrationInfo
from postcopy.status import AFTER_SWITCHOVER, Status, StatusMachine
from postcopy.tls_options import TlsOptions


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve an image.

    :ivar lazy: the guest runs before its memory is there; else all of it is sent first.
    :ivar preempt: requested pages have a connection of their own (``postcopy-preempt``).
    :ivar bandwidth: limit of the push, in bytes a second; 0: none.  Requested pages are not limited.
    :ivar page_sizes: in bytes, of blocks of huge pages at the destination.
    :ivar tls: encrypt with this; None: not at all.
    """

    lazy: bool = True
    preempt: bool = False
    bandwidth: int = 0
    page_sizes: Mapping[str, int] = field(default_factory=dict)
    tls: TlsOptions | None = None


class ImageServer:
    """An image that is a postcopy source.

    :meth:`serve` and :meth:`resume` block; all else is for any thread.

    A server has no state that would be lost with it: another one of the same image goes on by
    :meth:`resume`, since the destination says which pages it has.

    :param opened: the image; it may be that of several servers, and is the caller's to close.
    :param on_status: called with each new status, by the thread that serves.
    :raises Refused: not with these options.
    """

    def __init__(
        self,
        opened: RestoreImage,
        options: ServeOptions,
        on_status: Callable[[Status], None] = lambda _: None,
    ) -> None:
        self._opened = opened
        self._guest = SavedGuest(opened, options.page_sizes)
        self._lazy = options.lazy
        self._tls = options.tls
        self.capabilities = _capabilities(options)
        self._parameters = Parameters(
            max_bandwidth=options.bandwidth, max_postcopy_bandwidth=options.bandwidth
        )
        self._source: Source | None = None
        self._on_status = on_status
        self._progress = StatusMachine(on_status)

    @property
    def status(self) -> Status:
        """How far it is."""
        return self._progress.status

    @property
    def runs_there(self) -> bool:
        """Whether the destination has taken the devices, so that its guest runs, or waits for pages."""
        return self.status in AFTER_SWITCHOVER | {Status.COMPLETED}

    def info(self) -> MigrationInfo | None:
        """The figures, once it has begun."""
        return None if self._source is None else self._source.info()

    @property
    def ran(self) -> bool:
        """Whether the guest ran when it was saved."""
        return self._guest.ran

    def serve(self, uri: str) -> None:
        """Serve a destination that waits for a guest at ``uri``, until it has every page.

        :raises Refused: the destination could not answer at such an address.
        :raises NeedsRecovery: the connection broke when the guest ran there; :meth:`resume` goes on.
        :raises MigrationFailed: the guest does not run there, and may be served to another.
        :raises ImageError: a page of the image cannot be had; no wrong one has been sent.
        """
        _check(uri, self._tls)
        self._progress.move(Status.SETUP)
        self._source = source = self._make(uri)
        if self._lazy:
            source.requests.postcopy()  # at once: no page is sent before the devices
        source.run()
        self._raise_failure(source)

    def resume(self, uri: str) -> None:
        """Go on with a destination that has lost its server, and listens at ``uri`` by ``migrate-recover``.

        Errors are those of :meth:`serve`.
        """
        _check(uri, self._tls)
        if self._source is None or self.status is not Status.POSTCOPY_PAUSED:
            self._progress = StatusMachine(self._on_status, Status.POSTCOPY_PAUSED)
            self._source = self._make(uri)
            self._source.adopt()
        source = self._source
        source.begin_recovery()
        source.recover(uri)
        self._raise_failure(source)

    def stop(self) -> None:
        """End :meth:`serve` and :meth:`resume` soon: they raise."""
        if self._source is not None:
            self._source.cancel()
            if self._progress.status in AFTER_SWITCHOVER | {Status.POSTCOPY_DEVICE}:
                self._source.pause()
            self._source.leave()

    def _make(self, uri: str) -> Source:
        return Source(
            self._guest,
            self._guest,
            MigrationOptions(uri, self.capabilities, self._guest.ours_only, self._tls),
            self._parameters,
            self._progress,
            lambda _: self._opened.image.description or "{}",
            lambda _: None,
        )

    def _raise_failure(self, source: Source) -> None:
        if self.status is Status.COMPLETED:
            return
        error = source.error
        if isinstance(error, ImageError):
            raise error
        if self.status is Status.POSTCOPY_PAUSED:
            raise NeedsRecovery(
                f"{error}; the guest waits for its pages (postcopy-paused): give it 'migrate-recover' "
                "with a URI, and serve the image there with --resume"
            ) from error
        if isinstance(error, PostcopyError):
            raise error
        raise MigrationFailed("stopped before the destination had taken the guest")


def _capabilities(options: ServeOptions) -> Capabilities:
    if not options.lazy:
        return Capabilities(frozenset({Capability.RETURN_PATH}))
    preempt = {Capability.POSTCOPY_PREEMPT} if options.preempt else frozenset[Capability]()
    return Capabilities(frozenset({Capability.POSTCOPY_RAM} | preempt))


def _check(uri: str, tls: TlsOptions | None) -> None:
    if tls is not None:
        check_tls_address(tls, parse(uri))
    if isinstance(parse(uri), FileAddress):
        raise Refused(f"a destination cannot answer at '{uri}'; give tcp:HOST:PORT or unix:PATH")
