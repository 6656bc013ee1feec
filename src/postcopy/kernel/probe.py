"""What this host can do, found out by trying, and for each thing that it cannot: the one cure.

Nothing here asks for the kernel's version.  Nothing here raises, or leaves anything behind.
"""

import errno
import importlib.util
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from postcopy.abi.kvm import KVM_API_VERSION, KVM_GET_API_VERSION
from postcopy.abi.userfaultfd import Feature, RegisterMode
from postcopy.errors import HostCannot, KernelError
from postcopy.kernel import cpu_latency, huge_tmpfs, userfaultfd_open
from postcopy.kernel.calls import ioctl_plain
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.kernel.userfaultfd import Userfaultfd

_HUGE_PAGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")
_NO_TRANSPARENT = "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
_USES = {
    Feature.PAGEFAULT_FLAG_WP: "background snapshots",
    Feature.EVENT_REMOVE: "guests that balloon",
    Feature.MISSING_HUGETLBFS: "postcopy into huge pages",
    Feature.MISSING_SHMEM: "postcopy into memfds",
    Feature.THREAD_ID: "blocktime of each vCPU",
    Feature.MINOR_HUGETLBFS: "huge pages filled through another mapping",
    Feature.MINOR_SHMEM: "memfds filled through another mapping",
    Feature.EXACT_ADDRESS: "faults told to the byte",
    Feature.WP_HUGETLBFS_SHMEM: "background snapshots of memfds and huge pages",
    Feature.WP_UNPOPULATED: "background snapshots of untouched memory",
    Feature.POISON: "lost pages that fail loudly",
    Feature.WP_ASYNC: "dirty tracking without KVM",
    Feature.MOVE: "pages placed without a copy",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a host has or has not.

    :ivar name: short and stable, such as ``userfaultfd: WP_ASYNC``.
    :ivar detail: what was found, or what failed.
    :ivar cure: one command or action; empty if there is nothing to do.
    """

    name: str
    available: bool
    detail: str
    cure: str = ""


def probe_host() -> list[Finding]:
    """Try everything, in the order in which a reader wants to know."""
    probes: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("userfaultfd", _userfaultfd),
        ("userfaultfd features", _features),
        ("PAGEMAP_SCAN", _pagemap_scan),
        ("KVM", _kvm),
        ("CPUs kept awake for faults", _cpu_latency),
        ("huge pages", _huge_pages),
        ("transparent huge pages", _transparent_huge_pages),
        ("memory", _memory),
        ("unicorn", _unicorn),
    )
    findings: list[Finding] = []
    for name, probe in probes:
        findings += _safely(name, probe)
    return findings


def _safely(name: str, probe: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(probe())
    except HostCannot as error:
        what = str(error).removesuffix(f"; {error.cure}")
        return [Finding(name, available=False, detail=what, cure=error.cure)]
    except KernelError as error:
        cure = error.detail.rpartition("; ")[2] or "report it: this is unforeseen"
        return [Finding(name, available=False, detail=str(error), cure=cure)]
    except Exception as error:
        # A failure that was not foreseen is a finding as well, and the other probes still run.
        detail = f"{type(error).__name__}: {error}"
        return [Finding(name, available=False, detail=detail, cure="report it: this is unforeseen")]


def _userfaultfd() -> Iterator[Finding]:
    device = userfaultfd_open.DEVICE
    name = "userfaultfd: by device"
    absent = "use Linux 6.1 or newer, or the system call"
    cure = f"setfacl -m u:{os.getuid()}:rw {device}" if device.exists() else absent
    yield _door(name, lambda: userfaultfd_open.by_device(_flags()), str(device), cure)
    name, cure = "userfaultfd: by system call", "sysctl vm.unprivileged_userfaultfd=1"
    yield _door(name, lambda: userfaultfd_open.by_syscall(_flags()), "userfaultfd(2)", cure)
    name = "userfaultfd: user mode only"
    flags = userfaultfd_open.flags_for(user_mode_only=True)
    cure = "use a kernel with CONFIG_USERFAULTFD, Linux 5.11 or newer"
    detail = "enough for plain processes, not for KVM or system calls on missing pages"
    yield _door(name, lambda: userfaultfd_open.by_syscall(flags), detail, cure)


def _flags() -> int:
    return userfaultfd_open.flags_for(user_mode_only=False)


def _door(name: str, open_it: Callable[[], int], detail: str, cure: str) -> Finding:
    try:
        os.close(open_it())
    except KernelError as error:
        return Finding(name, available=False, detail=str(error), cure=cure)
    return Finding(name, available=True, detail=detail)


def _features() -> Iterator[Finding]:
    supported = userfaultfd_open.supported_features()
    for feature in Feature:
        since = userfaultfd_open.SINCE.get(feature)
        cure = f"use Linux {since} or newer" if since else "use a kernel that is built with it"
        has = feature in supported
        detail = _USES.get(feature, "not used here")
        yield Finding(f"userfaultfd: {feature.name}", has, detail, "" if has else cure)


def _pagemap_scan() -> Iterator[Finding]:
    """Track a small mapping, write to one page, and see whether just that page is reported."""
    with (
        Userfaultfd.open(Feature.WP_ASYNC | Feature.WP_UNPOPULATED, user_mode_only=True) as watcher,
        Mapping.anonymous(16 * resource.getpagesize()) as memory,
        PagemapScanner(0, capacity=16) as scanner,
    ):
        start, end = memory.address, memory.address + memory.length
        watcher.register(start, memory.length, RegisterMode.WP)
        watcher.write_protect(start, memory.length, protect=True)
        scanner.scan(start, end, protect=True)
        memory.write(resource.getpagesize(), b"x")
        found = (scanner.scan(start, end, protect=True) - start) // resource.getpagesize()
    works = found.tolist() == [[1, 2]]
    detail = "tried: reports just the page written" if works else f"reports {found.tolist()}"
    yield Finding("PAGEMAP_SCAN", works, detail, "" if works else "use Linux 6.7 or newer")


def _kvm() -> Iterator[Finding]:
    path = Path("/dev/kvm")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        detail = f"{path}: {error.strerror}; the software CPU (unicorn) does without"
        denied = error.errno in {errno.EACCES, errno.EPERM}
        cure = f"setfacl -m u:{os.getuid()}:rw {path}" if denied else "modprobe kvm"
        yield Finding("KVM", available=False, detail=detail, cure=cure)
        return
    try:
        version = ioctl_plain(fd, KVM_GET_API_VERSION)
    finally:
        os.close(fd)
    works = version == KVM_API_VERSION
    cure = "" if works else "use a kernel with the stable KVM interface"
    yield Finding("KVM", works, f"{path}, API version {version}", cure)


def _cpu_latency() -> Iterator[Finding]:
    name, path = "CPUs kept awake for faults", cpu_latency.DEVICE
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        detail = f"{path}: {error.strerror}; a page that is waited for takes up to 0.1 ms longer"
        denied = error.errno in {errno.EACCES, errno.EPERM} and path.exists()
        absent = f"pass the device {path} to the container"
        cure = f"setfacl -m u:{os.getuid()}:w {path}" if denied else absent
        yield Finding(name, available=False, detail=detail, cure=cure)
        return
    yield Finding(name, available=True, detail=f"{path}; a page that is waited for comes sooner")


def _huge_pages() -> Iterator[Finding]:
    name = "huge pages of 2 MiB"
    if not _HUGE_PAGE_POOL.exists():
        cure = "use a kernel with CONFIG_HUGETLBFS"
        yield Finding(name, available=False, detail="the kernel has none", cure=cure)
        return
    total = int(_read(_HUGE_PAGE_POOL / "nr_hugepages"))
    free = int(_read(_HUGE_PAGE_POOL / "free_hugepages"))
    cure = "" if free else "sysctl vm.nr_hugepages=N (N = guest bytes / 2 MiB)"
    yield Finding(name, free > 0, f"{free} of {total} free", cure)


def _transparent_huge_pages() -> Iterator[Finding]:
    on, chosen = _chosen("enabled")
    cure = f"echo madvise > {_TRANSPARENT / 'enabled'}" if chosen else _NO_TRANSPARENT
    title = "transparent huge pages for anonymous memory"
    yield Finding(title, on, chosen or "the kernel has none", "" if on else cure)
    yield _transparent_guest_memory()


def _transparent_guest_memory() -> Finding:
    name = "transparent huge pages for guest memory"
    try:
        os.close(huge_tmpfs.create(1 << 21))
    except KernelError as error:
        on, chosen = _chosen("shmem_enabled")
        if on:
            return Finding(name, available=True, detail=f"{chosen}, for memfds")
        cure = f"run as root, or echo within_size > {_TRANSPARENT / 'shmem_enabled'}"
        detail = f"{error}; a guest runs on small pages, and slower while it is migrated"
        return Finding(
            name, available=False, detail=detail, cure=cure if chosen else _NO_TRANSPARENT
        )
    return Finding(name, available=True, detail="from a tmpfs of our own")


def _chosen(file: str) -> tuple[bool, str]:
    """Whether one of the kernel's settings of huge pages is on, and what is chosen there."""
    chosen = _read(_TRANSPARENT / file).partition("[")[2].partition("]")[0]
    return chosen not in {"never", "deny", ""}, chosen


def _memory() -> Iterator[Finding]:
    fields = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    enough = available >= 1 << 30
    cure = "" if enough else "free some memory: a guest needs its whole RAM twice on one host"
    yield Finding("memory available", enough, f"{available / (1 << 30):.1f} GiB", cure)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    yield Finding("memory lock limit", available=True, detail=f"{limit}; nothing here locks memory")


def _unicorn() -> Iterator[Finding]:
    has = importlib.util.find_spec("unicorn") is not None
    detail = "the software CPU, for hosts without KVM" if has else "no software CPU"
    yield Finding("unicorn", has, detail, "" if has else "pip install 'postcopy[unicorn]'")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
