"""Serves one image to one destination, and goes on after a break."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from postcopy.channel.address import FileAddress, parse
from postcopy.errors import ImageError, MigrationFailed, NeedsRecovery, PostcopyError, Refused
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.parameters import Capabilities, Capability, Parameters
from postcopy.serve.saved_guest import SavedGuest
from postcopy.source.source import MigrationOptions, Source
from postcopy.statistics import MigrationInfo
from postcopy.status import AFTER_SWITCHOVER, Status, StatusMachine

_DONE: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve an image.

    :ivar preempt: requested pages have a connection of their own (``postcopy-preempt``).
    :ivar bandwidth: limit of the push, in bytes a second; 0: none.  Requested pages are not limited.
    :ivar page_sizes: in bytes, of blocks of huge pages at the destination.
    """

    preempt: bool = False
    bandwidth: int = 0
    page_sizes: Mapping[str, int] = field(default_factory=dict)


class ImageServer:
    """An image that is a postcopy source.

    :meth:`serve` and :meth:`resume` block; all else is for any thread.

    A server has no state that would be lost with it: another one of the same image goes on by
    :meth:`resume`, since the destination says which pages it has.

    :param path: the image.
    :raises ImageError: it is no image, or damaged where it is checked beforehand.
    :raises Refused: not with these options.
    """

    def __init__(self, path: Path, options: ServeOptions) -> None:
        self._opened = RestoreImage(path)
        try:
            self._guest = SavedGuest(self._opened, options.page_sizes)
        except BaseException:
            self._opened.close()
            raise
        wanted = {Capability.POSTCOPY_RAM}
        if options.preempt:
            wanted.add(Capability.POSTCOPY_PREEMPT)
        self._capabilities = Capabilities(frozenset(wanted))
        self._parameters = Parameters(max_postcopy_bandwidth=options.bandwidth)
        self._source: Source | None = None
        self._progress = StatusMachine()

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

    def wait(self, *statuses: Status) -> Status:
        """Wait until the status is one of these, or the end has come; return it."""
        self._progress.wait(*_DONE, Status.POSTCOPY_PAUSED, *statuses)
        return self.status

    def serve(self, uri: str) -> None:
        """Serve a destination that waits for a guest at ``uri``, until it has every page.

        :raises Refused: the destination could not answer at such an address.
        :raises NeedsRecovery: the connection broke when the guest ran there; :meth:`resume` goes on.
        :raises MigrationFailed: the guest does not run there, and may be served to another.
        :raises ImageError: a page of the image cannot be had; no wrong one has been sent.
        """
        _check(uri)
        self._progress = StatusMachine(begin=Status.SETUP)
        self._source = source = self._make(uri)
        source.requests.postcopy()  # at once: no page is sent before the devices
        source.run()
        self._raise_failure(source)

    def resume(self, uri: str) -> None:
        """Go on with a destination that has lost its server, and listens at ``uri`` by ``migrate-recover``.

        Errors are those of :meth:`serve`.
        """
        _check(uri)
        if self._source is None or self.status is not Status.POSTCOPY_PAUSED:
            self._progress = StatusMachine(begin=Status.POSTCOPY_PAUSED)
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

    def close(self) -> None:
        """Let go of the image."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self, uri: str) -> Source:
        return Source(
            self._guest,
            self._guest,
            MigrationOptions(uri, self._capabilities, self._guest.ours_only),
            self._parameters,
            self._progress,
            lambda _: "",
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


def _check(uri: str) -> None:
    if isinstance(parse(uri), FileAddress):
        raise Refused(f"a destination cannot answer at '{uri}'; give tcp:HOST:PORT or unix:PATH")
