"""An engine's orders about a guest that wakes from its image, or goes back to a reset point."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from postcopy.engine.engine import Engine
from postcopy.errors import WrongState
from postcopy.lazy_restore.restore import Restore
from postcopy.lazy_restore.restore_image import RestoreImage
from postcopy.link.protocol import (
    EngineReports,
    ImageMachine,
    ImagePoint,
    ResetCommands,
    RestoreCommands,
)
from postcopy.link.values import Fd
from postcopy.parameters import Parameters
from postcopy.restore_options import RestoreOptions
from postcopy.status import Status

if TYPE_CHECKING:
    from postcopy.reset.reset import Reset


class Restoring(RestoreCommands):
    """Runs one restore; see :class:`RestoreCommands` for what each order does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._opened: RestoreImage | None = None

    def look_at_image(self, path: str) -> ImageMachine:
        self._opened = opened = RestoreImage(Path(path))
        image = opened.image
        blocks = {block.name: block.size_bytes for block in image.blocks}
        vcpus = sum(1 for device in image.devices if device.name == "cpu")
        return ImageMachine(image.machine_name, blocks, vcpus)

    def start_restore(self, options: RestoreOptions, parameters: Parameters) -> str:
        engine = self._engine
        if engine.populating is not None:
            engine.populating.stop()
        restore = Restore(
            engine.guest(),
            engine.take_ram(),
            options,
            engine.progress,
            parameters,
            partial(engine.link.note, EngineReports.progressed),
            opened=self._take_opened(Path(options.path)),
        )
        engine.set_job(restore)
        engine.take_space = restore.share
        return restore.identity

    def _take_opened(self, path: Path) -> RestoreImage | None:
        """What has been looked at, if that is it: its file may have another name by now."""
        opened, self._opened = self._opened, None
        if opened is None or opened.path == path:
            return opened
        opened.close()
        return None

    def restore(self) -> None:
        self._engine.start("restore", self._restore.run)

    def adopt_restore(
        self, status: Status, options: RestoreOptions, parameters: Parameters
    ) -> None:
        self._engine.take_over(status)
        self.start_restore(options, parameters)
        self._engine.start("restore", self._restore.adopt)

    def hurry(self, *, wanted: bool) -> None:
        self._restore.hurry(wanted=wanted)

    @property
    def _restore(self) -> Restore:
        if not isinstance(self._engine.job, Restore):
            raise WrongState("this engine restores nothing")
        return self._engine.job


class Resets(ResetCommands):
    """Keeps the memory of one reset point; see :class:`ResetCommands` for what each order does."""

    def __init__(self, engine: Engine) -> None:
        self._guest = engine.guest
        self._reset: Reset | None = None

    def reset_to_image(self, copies: Sequence[Fd], path: str) -> ImagePoint:
        reset = self._make(copies, path)
        reset.watch()
        return ImagePoint(reset.identity, reset.needs_file, reset.devices)

    def reset_to_now(self, copies: Sequence[Fd]) -> int:
        return self._make(copies).keep()

    def keep_rest(self) -> int:
        return self._job.keep_rest()

    def put_back(self, *, everything: bool) -> int:
        return self._job.put_back(everything=everything)

    def adopt_reset(
        self, copies: Sequence[Fd], path: str | None = None, identity: str = ""
    ) -> None:
        self._make(copies, path, identity).watch()

    def _make(self, copies: Sequence[Fd], path: str | None = None, identity: str = "") -> "Reset":
        from postcopy.reset.reset import Reset  # a guest that wakes does not wait for it

        self._reset = Reset(self._guest(), copies, path, identity)
        return self._reset

    @property
    def _job(self) -> "Reset":
        if self._reset is None:
            raise WrongState("this engine keeps no reset point")
        return self._reset
