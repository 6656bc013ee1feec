"""``serve`` and ``restore --qemu`` refuse what cannot be, before any machine hears of it."""

import subprocess

import pytest

from fakes.commands import one_line
from fakes.snapshots import Portrait
from postcopy.cli import main
from postcopy.machine.workload import load

WORKLOAD = load("idle", 4 << 20, fill_bytes=1 << 20)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "image"
    with Portrait(WORKLOAD) as portrait:
        portrait.take(f"file:{path}")
    return path


def run(capfd, *arguments):
    """Run a command in this process: it ends before there is a machine."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, end.value.code, said.out, said.err)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["unix:/nowhere"], 1, "Failed to connect"),
        (["nonsense"], 3, "unknown migration protocol"),
        (["file:/nowhere/image"], 3, "cannot answer at 'file:/nowhere/image'"),
        (["unix:/nowhere", "--page-size", "pc.ram=2M"], 3, "its blocks are"),
        (["unix:/nowhere", "--page-size", "microvm.ram=3M"], 3, "not made of pages of"),
        (["unix:/nowhere", "--page-size", "2M"], 2, "is no BLOCK=SIZE"),
        (["unix:/nowhere", "--resume"], 4, "Failed to connect"),
    ],
)
def test_what_cannot_be(capfd, image, options, code, said):
    outcome = run(capfd, "serve", str(image), *options)
    assert (outcome.returncode, outcome.stdout) == (code, "")
    assert said in one_line(outcome)


def test_no_image(capfd, tmp_path):
    (tmp_path / "text").write_text("no image")
    for name in ("text", "missing"):
        outcome = run(capfd, "serve", str(tmp_path / name), "unix:/nowhere")
        assert outcome.returncode == 1
        assert str(tmp_path / name) in one_line(outcome)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--qemu", "nowhere/qemu -M pc"], "cannot start 'nowhere/qemu'"),
        (["--qemu", "qemu -incoming defer"], "leave it out"),
        (["--qemu", "qemu 'open"], "is no command"),
        (["--qemu", ""], "is empty"),
        (["--qemu", "qemu", "--accel", "kvm"], "--accel is not for a QEMU"),
        (["--qemu", "qemu", "--preempt"], "give --lazy too"),
        (["--qemu", "saved"], "does not tell its QEMU's command line"),
        (["--count", "2"], "--count is for a QEMU; give --qemu too"),
        (["--preempt"], "--preempt is for a QEMU"),
        (["--qemu", "qemu", "--count", "2", "--qmp", "unix:qmp"], "write {n} into --qmp"),
    ],
)
def test_what_cannot_be_started(capfd, image, options, said):
    outcome = run(capfd, "restore", str(image), *options)
    assert outcome.returncode == 3
    assert said in one_line(outcome)
