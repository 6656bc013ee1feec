"""Directories whose files are memory: tmpfs and hugetlbfs.

Source: the kernel's ``Documentation/filesystems/tmpfs.rst`` and ``Documentation/filesystems/proc.rst``
(``mountinfo``).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from postcopy.errors import HostCannot, Refused

_MOUNTS: Final = Path("/proc/self/mountinfo")
_KINDS: Final = frozenset({"tmpfs", "hugetlbfs"})
_SMALL_PAGE_BYTES: Final = 4096
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryDirectory:
    """A directory in a tmpfs or a hugetlbfs.

    :ivar mount_point: where its file system is mounted; ``page_size_bytes``: of its files.
    """

    path: str
    mount_point: str
    page_size_bytes: int

    @classmethod
    def at(cls, path: str) -> "MemoryDirectory":
        """Look at a directory.

        :raises Refused: there is none, or its files are no memory.
        """
        try:
            device = os.stat(path).st_dev  # noqa: PTH116 - as the others below
            kind, mount_point = _mount_of(device)
            is_directory = os.path.isdir(path)  # noqa: PTH112
        except OSError as error:
            raise Refused(
                f"the memory path {path} cannot be used: {error.strerror}; give a directory in a tmpfs, "
                "such as /dev/shm, or in a hugetlbfs"
            ) from error
        if kind not in _KINDS or not is_directory:
            what = f"is in a file system '{kind}'" if is_directory else "is no directory"
            raise Refused(
                f"the memory path {path} {what}; give a directory in a tmpfs, such as /dev/shm, or in a "
                "hugetlbfs"
            )
        huge = kind == "hugetlbfs"
        size = os.statvfs(path).f_bsize if huge else _SMALL_PAGE_BYTES
        return cls(path, mount_point, size)

    def check_room(self, needed_bytes: int) -> None:
        """Check that the file system's limit leaves so much room; others may still take it first.

        :raises HostCannot: how much is missing.
        """
        now = os.statvfs(self.path)
        free_bytes = now.f_bavail * now.f_frsize
        if not now.f_blocks or needed_bytes <= free_bytes:  # no blocks: no limit
            return
        missing = needed_bytes - free_bytes
        total = now.f_blocks * now.f_frsize + missing
        raise HostCannot(
            f"the memory path {self.path} has room for {free_bytes // _MIB} MiB, and the guest needs "
            f"{needed_bytes // _MIB} MiB there: {-(-missing // _MIB)} MiB are missing",
            f"mount -o remount,size={-(-total // _MIB)}M {self.mount_point}",
        )

    def create(self, size_bytes: int) -> int:
        """Make a file without a name, which is one hole; return its descriptor (not inherited by exec).

        :raises Refused: it cannot be made there.
        """
        import tempfile  # takes long, and few machines need it

        try:
            with tempfile.TemporaryFile(dir=self.path, buffering=0) as file:
                os.ftruncate(file.fileno(), size_bytes)
                return os.dup(file.fileno())
        except OSError as error:
            raise Refused(
                f"no file can be made in the memory path {self.path}: {error.strerror}; give one that "
                "this user may write to"
            ) from error


def _mount_of(device: int) -> tuple[str, str]:
    """The type of the file system with this device number, and where it is mounted last."""
    number = f"{os.major(device)}:{os.minor(device)}"
    found = ("unknown", "/")
    for line in _MOUNTS.read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        fields = mount.split()
        if fields[2] == number:
            found = (rest.split()[0], fields[4])
    return found
