"""What abi/ says is what the headers say; what they lack is asked of the kernel itself."""

import ctypes
import importlib
import os
import pkgutil
import shutil
from types import ModuleType

import pytest
from c_headers import claims, compare

import postcopy.abi
from fakes.unpacked import folder
from postcopy.abi import pagemap, userfaultfd
from postcopy.abi.userfaultfd import Feature, RangeIoctl, RegisterMode
from postcopy.errors import HostCannot, KernelError, PageExists
from postcopy.kernel.mapping import Mapping
from postcopy.kernel.pagemap import PagemapScanner
from postcopy.kernel.userfaultfd import Userfaultfd
from postcopy.kernel.userfaultfd_open import supported_features

PAGE = 4096

NEWER_HEADERS = folder("headers") / "newer" / "usr" / "include"
"""Of a newer kernel, to compare with as well; ``.ci/install-headers`` brings them."""


def abi_modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(postcopy.abi.__path__)]
    modules = [importlib.import_module(f"postcopy.abi.{name}") for name in names]
    return [module for module in modules if hasattr(module, "HEADER")]


MODULES = pytest.mark.parametrize("module", abi_modules(), ids=lambda module: module.__name__)


@pytest.fixture(autouse=True)
def _compiler():
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc and the kernel's headers: apt-get install gcc libc6-dev")


@MODULES
def test_every_claim_is_the_headers(module, tmp_path, record_property):
    result = compare(module, tmp_path)
    assert result.wrong == []
    assert result.compared or result.unknown, "the module claims nothing at all"
    newer = getattr(module, "NEWER", frozenset())
    assert result.unknown <= newer, "the header lacks names that NEWER does not list"
    record_property("not in this header", sorted(result.unknown))
    lacking = sorted(result.unknown)
    print(f"{module.__name__}: {len(result.compared)} compared, lacking: {lacking}")  # noqa: T201 - shown by -rA


@MODULES
def test_every_claim_is_a_newer_headers_too(module, tmp_path):
    if not NEWER_HEADERS.is_dir():
        pytest.skip("needs the headers of a newer kernel: run .ci/install-headers")
    result = compare(module, tmp_path, NEWER_HEADERS, NEWER_HEADERS / "x86_64-linux-gnu")
    assert (result.wrong, result.unknown) == ([], set())


@MODULES
def test_newer_names_exist(module):
    assert getattr(module, "NEWER", frozenset()) <= {claim.owner for claim in claims(module)}


def test_a_wrong_claim_is_found(tmp_path):
    """The comparison itself must be able to fail."""
    wrong = ModuleType("wrong")
    wrong.HEADER = "<linux/userfaultfd.h>"

    class uffdio_range(ctypes.Structure):  # noqa: N801 - the kernel's name
        _fields_ = [("start", ctypes.c_uint32), ("len", ctypes.c_uint64), ("more", ctypes.c_uint8)]
        __module__ = "wrong"

    wrong.uffdio_range = uffdio_range
    wrong.UFFD_API = 0xAB
    wrong.UFFD_NOT_THERE = 1
    result = compare(wrong, tmp_path)
    assert len(result.wrong) == 2  # the size and the number; offsets happen to agree
    assert result.unknown == {"uffdio_range", "UFFD_NOT_THERE"}


# What Linux 6.1's headers lack, asked of the kernel that runs.


def open_or_skip(features: Feature) -> Userfaultfd:
    try:
        return Userfaultfd.open(features)
    except HostCannot as error:
        pytest.skip(f"needs userfaultfd: {error}")


def registered(features: Feature, mode: RegisterMode, pages: int = 8):
    memory = Mapping.anonymous(pages * PAGE)
    watcher = open_or_skip(features)
    return watcher, memory, watcher.register(memory.address, memory.length, mode)


def test_newer_features_are_the_kernels():
    """The kernel enables each, and refuses the first bit that nobody has a name for."""
    known = supported_features()
    newer = Feature.WP_UNPOPULATED | Feature.POISON | Feature.WP_ASYNC | Feature.MOVE
    if known & newer != newer:
        pytest.skip(f"needs userfaultfd features {newer & ~known!r}: Linux 6.8 or newer")
    for feature in newer:
        with open_or_skip(feature) as watcher:
            assert watcher.features == feature
    with pytest.raises(HostCannot, match="has no"):
        Userfaultfd.open(Feature(1 << 63))


def test_poison_and_its_mode_are_the_kernels():
    watcher, memory, ioctls = registered(Feature.POISON, RegisterMode.MISSING)
    with watcher, memory:
        assert RangeIoctl.POISON in ioctls
        assert watcher.poison(memory.address, PAGE, wake=False) == PAGE
        with pytest.raises(PageExists):
            watcher.poison(memory.address, PAGE)


def test_pagemap_scan_categories_and_flags_are_the_kernels():
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    watcher, memory, _ = registered(features, RegisterMode.WP)
    with watcher, memory, PagemapScanner(0) as scanner:
        first, end = memory.address, memory.address + memory.length
        watcher.write_protect(first, memory.length, protect=True)
        assert scanner.scan(first, end, protect=True).size == 0
        memory.write(2 * PAGE, b"x")
        category = pagemap.PageCategory
        expected = [[first + 2 * PAGE, first + 3 * PAGE]]
        for one in (category.PRESENT, category.WRITTEN, category.PRESENT | category.WPALLOWED):
            assert scanner.scan(first, end, protect=False, categories=one).tolist() == expected
        for none in (category.FILE, category.PFNZERO, category.HUGE):
            assert scanner.scan(first, end, protect=False, categories=none).size == 0
        # The kernel marks a protected hole as it marks a page that is swapped out.
        holes = [[first, first + 2 * PAGE], [first + 3 * PAGE, end]]
        swapped = scanner.scan(first, end, protect=False, categories=category.SWAPPED)
        assert swapped.tolist() == holes
        assert scanner.scan(first, end, protect=True).tolist() == expected
        assert scanner.scan(first, end, protect=True).size == 0
        unwatched = Mapping.anonymous(PAGE)
        with unwatched, pytest.raises(KernelError, match="WP_ASYNC"):
            scanner.scan(unwatched.address, unwatched.address + PAGE, protect=True)


def test_continue_protected_is_the_kernels():
    """UFFDIO_CONTINUE_MODE_WP: a mode that an older kernel would refuse with EINVAL."""
    assert userfaultfd.UFFDIO_CONTINUE_MODE_WP == 2
    from postcopy.kernel import memfd

    fd = memfd.create("continue", PAGE)
    with Mapping.shared(fd, PAGE) as memory, Mapping.shared(fd, PAGE) as writer:
        os.close(fd)
        mode = RegisterMode.MINOR | RegisterMode.WP
        watcher = open_or_skip(Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM)
        with watcher:
            watcher.register(memory.address, PAGE, mode)
            writer.write(0, b"there")
            assert watcher.map_existing(memory.address, PAGE, protect=True) == PAGE
            assert memory.read(0, 5) == b"there"
