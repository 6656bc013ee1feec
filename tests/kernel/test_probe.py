"""What the probe finds on this host, and on stranger ones."""

import errno
import importlib.util
import os
from pathlib import Path

import pytest

from postcopy.abi.userfaultfd import Feature
from postcopy.errors import KernelError
from postcopy.kernel import cpu_latency, huge_tmpfs, probe, userfaultfd_open
from postcopy.kernel.probe import probe_host

AWAKE = "CPUs kept awake for faults"


def found():
    return {finding.name: finding for finding in probe_host()}


def test_names_are_unique_and_every_lack_has_its_cure():
    findings = probe_host()
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.detail
        assert finding.available or finding.cure, finding
        assert "\n" not in finding.detail + finding.cure


def test_it_agrees_with_the_host():
    findings = found()
    assert findings["KVM"].available == os.access("/dev/kvm", os.R_OK | os.W_OK)
    assert findings[AWAKE].available == os.access(cpu_latency.DEVICE, os.W_OK)
    supported = userfaultfd_open.supported_features()
    for feature in Feature:
        assert findings[f"userfaultfd: {feature.name}"].available == (feature in supported)
    assert findings["PAGEMAP_SCAN"].available == (Feature.WP_ASYNC in supported)
    assert findings["unicorn"].available == (importlib.util.find_spec("unicorn") is not None)


def test_it_leaves_no_descriptor_behind():
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    probe_host()
    assert count() == before


GUEST_PAGES = "transparent huge pages for guest memory"


@pytest.mark.parametrize(
    ("setting", "available", "cure"),
    [
        ("always within_size [advise] never deny force", True, ""),
        ("always within_size advise [never] deny force", False, "run as root, or echo within_size"),
        ("", False, "CONFIG_TRANSPARENT_HUGEPAGE"),
    ],
)
def test_huge_guest_memory_without_rights_is_up_to_the_host(
    monkeypatch, tmp_path, setting, available, cure
):
    def refused(_):
        raise KernelError("fsopen", errno.EPERM)

    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "shmem_enabled").write_text(setting)
    monkeypatch.setattr(probe, "_TRANSPARENT", tmp_path)
    monkeypatch.setattr(huge_tmpfs, "create", refused)
    finding = found()[GUEST_PAGES]
    assert (finding.available, cure in finding.cure) == (available, True)


def test_a_host_with_nothing_is_described_and_not_crashed_on(monkeypatch, tmp_path):
    def closed(_):
        raise KernelError("userfaultfd", errno.ENOSYS)

    monkeypatch.setattr(userfaultfd_open, "DEVICE", tmp_path / "userfaultfd")
    monkeypatch.setattr(cpu_latency, "DEVICE", tmp_path / "cpu_dma_latency")
    monkeypatch.setattr(userfaultfd_open, "by_syscall", closed)
    monkeypatch.setattr(probe, "_HUGE_PAGE_POOL", tmp_path)
    monkeypatch.setattr(probe, "_TRANSPARENT", tmp_path)
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda _: None)
    findings = found()
    for name in ("userfaultfd: by device", "userfaultfd: by system call", AWAKE, "unicorn"):
        assert not findings[name].available
        assert findings[name].cure
    assert "CONFIG_USERFAULTFD" in findings["userfaultfd features"].cure
    assert "CONFIG_USERFAULTFD" in findings["PAGEMAP_SCAN"].cure
    assert "report it" in findings["huge pages"].cure  # an empty directory: not even the numbers


@pytest.mark.parametrize(
    ("code", "cure"),
    [(errno.EACCES, f"setfacl -m u:{os.getuid()}"), (errno.ENOENT, "modprobe kvm")],
)
def test_kvm_that_cannot_be_opened(monkeypatch, code, cure):
    def closed(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(probe.os, "open", closed)
    finding = found()["KVM"]
    assert not finding.available
    assert finding.cure.startswith(cure)


@pytest.mark.parametrize(
    ("code", "cure"),
    [(errno.EACCES, f"setfacl -m u:{os.getuid()}:w "), (errno.ENOENT, "pass the device ")],
)
def test_cpus_that_cannot_be_kept_awake(monkeypatch, tmp_path, code, cure):
    def closed(*_):
        raise OSError(code, os.strerror(code))

    device = tmp_path / "cpu_dma_latency"
    device.touch()
    monkeypatch.setattr(cpu_latency, "DEVICE", device)
    monkeypatch.setattr(probe.os, "open", closed)
    finding = found()[AWAKE]
    assert not finding.available
    assert "0.1 ms longer" in finding.detail
    assert finding.cure.startswith(cure)
    assert str(device) in finding.cure


def test_looking_for_the_device_asks_for_nothing(monkeypatch, tmp_path):
    device = tmp_path / "cpu_dma_latency"
    device.touch()
    monkeypatch.setattr(cpu_latency, "DEVICE", device)
    finding = found()[AWAKE]
    assert (finding.available, finding.cure) == (True, "")
    assert device.read_bytes() == b""


def test_an_older_kernels_lacking_features_name_the_kernel_that_has_them(monkeypatch):
    monkeypatch.setattr(userfaultfd_open, "supported_features", lambda: Feature.THREAD_ID)
    findings = found()
    assert findings["userfaultfd: THREAD_ID"].available
    assert findings["userfaultfd: WP_ASYNC"].cure == "use Linux 6.7 or newer"
