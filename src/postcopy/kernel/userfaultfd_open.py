"""Opens a userfaultfd, by the device or the system call; an error names the least privilege that helps."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from postcopy.abi import userfaultfd as abi
from postcopy.abi.userfaultfd import Feature
from postcopy.errors import HostCannot, KernelError
from postcopy.kernel import calls
from postcopy.kernel.calls import ioctl, ioctl_plain, syscall

DEVICE = Path("/dev/userfaultfd")
_SHAKEN = 1 << 31
"""What the kernel notes beside the features when a userfaultfd has shaken hands."""
_SYSCALL_NUMBERS = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}

SINCE = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
}
"""The version of Linux that brought a feature, where a kernel in use may lack it."""


def open_with(features: Feature, *, user_mode_only: bool = False) -> int:
    """Open a userfaultfd and request ``features`` (``UFFDIO_API``).

    :raises HostCannot: it cannot be opened, or a feature is missing.
    :raises KernelError: otherwise.
    """
    fd = open_raw(user_mode_only=user_mode_only)
    try:
        handshake(fd, features)
    except KernelError as error:
        os.close(fd)
        if error.errno not in {errno.EINVAL, errno.EPERM}:
            raise  # neither a matter of features nor of rights
        raise _refused(features, error, user_mode_only=user_mode_only) from error
    return fd


def supported_features(*, user_mode_only: bool = True) -> Feature:
    """All features of this kernel, those without a name here included.

    :raises HostCannot: there is no userfaultfd for us.
    """
    fd = open_raw(user_mode_only=user_mode_only)
    try:
        return handshake(fd, Feature(0))
    finally:
        os.close(fd)


def handshake(fd: int, features: Feature) -> Feature:
    """Request features (``UFFDIO_API``); once for each descriptor.

    :return: all that the kernel has.
    :raises KernelError: ``EINVAL`` if one is missing; ``EPERM`` if ``EVENT_FORK`` is not allowed.
    """
    argument = abi.uffdio_api(abi.UFFD_API, features)
    ioctl(fd, abi.UFFDIO_API, argument)
    return Feature(argument.features)


def features_of(fd: int) -> Feature:
    """The features that a userfaultfd, of whichever process, was opened with (``/proc/self/fdinfo``).

    :raises KernelError: ``EBADF``: it is no userfaultfd, or has not shaken hands.
    """
    path = Path(f"/proc/self/fdinfo/{fd}")
    for line in calls.of_python("read", str(path), path.read_text).splitlines():
        name, _, value = line.partition(":")
        if name == "API":  # API:features:all that the kernel has
            features = int(value.split(":")[1], 16)
            if features & _SHAKEN:
                return Feature(features & ~_SHAKEN)
    raise KernelError("read", errno.EBADF, f"{path}; this is no userfaultfd that is ready for use")


def open_raw(*, user_mode_only: bool = False) -> int:
    """Open a userfaultfd before its handshake, by the device or else by the system call.

    :raises HostCannot: neither is allowed.
    """
    refusals: list[KernelError] = []
    ways: tuple[Callable[[int], int], ...] = (by_device, by_syscall)
    for open_by in ways:
        try:
            return open_by(flags_for(user_mode_only=user_mode_only))
        except KernelError as error:
            refusals.append(error)
    what = f"no userfaultfd for this user ({'; '.join(map(str, refusals))})"
    raise HostCannot(what, _cure(refusals))


def flags_for(*, user_mode_only: bool) -> int:
    """The flags of both ways.  Without ``O_NONBLOCK`` ``poll`` always reports ``POLLERR``."""
    return os.O_CLOEXEC | os.O_NONBLOCK | (abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)


def by_device(flags: int) -> int:
    """Open through ``/dev/userfaultfd`` (Linux 6.1), for which file permissions are enough."""
    device = calls.of_python("open", str(DEVICE), os.open, DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return ioctl_plain(device, abi.USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def by_syscall(flags: int) -> int:
    """Open by ``userfaultfd(2)``, which asks for ``CAP_SYS_PTRACE`` unless a sysctl says no."""
    number = _SYSCALL_NUMBERS.get(os.uname().machine)
    if number is None:
        raise KernelError("userfaultfd", errno.ENOSYS, f"on {os.uname().machine}")
    return syscall("userfaultfd", number, flags)


def _cure(refusals: list[KernelError]) -> str:
    if any(error.errno in {errno.EMFILE, errno.ENFILE} for error in refusals):
        return "raise the limit of open files (ulimit -n)"
    if all(error.errno in {errno.ENOENT, errno.ENOSYS} for error in refusals):
        return "use a kernel with CONFIG_USERFAULTFD"
    if DEVICE.exists():
        return f"setfacl -m u:{os.getuid()}:rw {DEVICE}"
    return "sysctl vm.unprivileged_userfaultfd=1"


def _refused(features: Feature, error: KernelError, *, user_mode_only: bool) -> HostCannot:
    supported = supported_features(user_mode_only=user_mode_only)
    missing = Feature(int(features) & ~int(supported))  # Feature's own ~ forgets unknown bits
    if not missing:
        # Only EVENT_FORK is a matter of privilege: it hands out the child's memory.
        return HostCannot(f"userfaultfd refused {features!r} ({error})", "run with CAP_SYS_PTRACE")
    names = ", ".join(member.name or "" for member in missing) or hex(missing)
    versions = [SINCE[member] for member in missing if member in SINCE]
    newest = max(
        versions, key=lambda version: [int(part) for part in version.split(".")], default=""
    )
    cure = f"use Linux {newest} or newer" if newest else "use a kernel that is built with it"
    return HostCannot(f"this kernel's userfaultfd has no {names}", cure)
