"""Whether a machine that waits would take the guest of another, found out without changing either."""

import asyncio
import contextlib
import json
import shlex

import pytest

from fakes.commands import Running, one_line, pair, postcopy
from fakes.real_qemu import QemuProcess
from postcopy.client.qmp import QmpConnection
from postcopy.serve.running_preflight import Facts, compared, preflight_image, preflight_machine

BASE = ["-M", "q35", "-accel", "kvm", "-m", "64M", "-smp", "2", "-cpu", "qemu64"]
UUID = ["-uuid", "11111111-1111-1111-1111-111111111111"]

# What is replaced at the target; what is said of it, and no more than that.
OTHERS = {
    "less memory": ({"64M": "32M"}, "RAM block pc.ram: another size"),
    "more memory": ({"64M": "96M"}, "RAM block pc.ram: another size"),
    "a pc": ({"q35": "pc"}, "machine: another machine type (source: pc-q35-"),
    "an older q35": ({"q35": "pc-q35-6.2"}, "machine: another machine type"),
    "one CPU": ({"2": "1"}, "CPUs: another number of CPUs (source: 2; target: 1)"),
    "another model": ({"qemu64": "kvm32"}, "CPU model: another CPU model, which lacks"),
    "a feature less": ({"qemu64": "qemu64,-cx16"}, "CPU features: the guest may use features that the "
                       "target's CPU lacks (source: cx16; target: -)"),
    "two features less": ({"qemu64": "qemu64,-cx16,-fxsr"}, "(source: cx16, fxsr; target: -)"),
    "no KVM": ({"kvm": "tcg"}, "accelerator: it has no place for the state of KVM's clock"),
}  # fmt: skip

# Capabilities and parameters of the source and of the target, and what is said.
SETTINGS = {
    "mapped-ram here": (["mapped-ram"], [], "capability mapped-ram: it must be the same at both ends"),
    "mapped-ram there": ([], ["mapped-ram"], "capability mapped-ram: it must be the same at both"),
    "x-ignore-shared": (["x-ignore-shared"], [], "capability x-ignore-shared: it must be the same"),
    "multifd here": (["multifd"], [], "capability multifd: it must be the same at both ends"),
    "multifd there": ([], ["multifd"], "capability multifd: it must be the same at both ends"),
    "postcopy here": (["postcopy-ram"], [], "capability postcopy-ram: it must be on at the target"),
    "preempt here": (["postcopy-ram", "postcopy-preempt"], ["postcopy-ram"], "capability postcopy-pre"),
    "preempt there": (["postcopy-ram"], ["postcopy-ram", "postcopy-preempt"], "capability postcopy-pre"),
    "an acknowledged switchover": (["return-path", "switchover-ack"], [], "capability switchover-ack"),
}  # fmt: skip


class Machine(QemuProcess):
    """A QEMU with a monitor of its own for the command under test."""

    def __init__(self, folder, *words):
        self.address = f"unix:{folder}/qmp"
        super().__init__(folder, [*words, "-qmp", f"{self.address},server=on,wait=off"])

    def switch(self, capabilities, **parameters):
        if capabilities:
            self.capabilities(*capabilities)
        if parameters:
            self(
                "migrate-set-parameters", **{n.replace("_", "-"): v for n, v in parameters.items()}
            )


@contextlib.contextmanager
def machines(folder, replaced, *more):
    words = [replaced.get(word, word) for word in BASE]
    with (
        Machine(folder / "source", *BASE, "-S", *more) as source,
        Machine(folder / "target", *words, "-incoming", "defer") as target,
    ):
        yield source, target


def problems(source, target, **options):
    async def found():
        async with contextlib.AsyncExitStack() as stack:
            ends = [await QmpConnection.connect(each.address) for each in (source, target)]
            for end in ends:
                stack.push_async_callback(end.close)
            return await preflight_machine(*ends, **{"lazy": False, **options})

    return [f"{each.what}: {each.problem} (source: {each.image}; target: {each.qemu})"
            for each in asyncio.run(found()) if each.problem is not None]  # fmt: skip


@pytest.mark.kvm
@pytest.mark.qemu
@pytest.mark.parametrize("other", OTHERS)
def test_each_mismatch_has_its_name(tmp_path, other):
    replaced, said = OTHERS[other]
    with machines(tmp_path, replaced) as ends:
        found = problems(*ends)
        assert any(said in each for each in found), found


@pytest.mark.kvm
@pytest.mark.qemu("7.2", "10.0", "11.1")
def test_settings_of_both_ends(tmp_path):
    with machines(tmp_path, {}) as (source, target):
        assert problems(source, target, lazy=True) == []  # no false alarm
        known = {each["capability"] for each in source("query-migrate-capabilities")}
        for name, (here, there, said) in SETTINGS.items():
            if not known.issuperset([*here, *there]):
                continue  # it is younger than this QEMU
            source.switch(here)
            target.switch(there)
            (found,) = problems(source, target)
            assert said in found, name
            for end, on in ((source, here), (target, there)):
                off = [{"capability": each, "state": False} for each in on]
                end("migrate-set-capabilities", capabilities=off)
        source.switch(["multifd"], multifd_channels=4)
        target.switch(["multifd"], multifd_compression="zlib")
        said = problems(source, target)
        assert [each.partition(":")[0] for each in said] == [
            "parameter multifd-channels",
            "parameter multifd-compression",
        ]


def test_a_larger_model_does():
    word = (1, 0, "ECX")
    small = Facts(run_state="running", cpu_model="qemu64", features={word: 0b101})
    large = Facts(run_state="inmigrate", cpu_model="max", features={word: 0b111, (7, 0, "EBX"): 1})
    assert not any(each.problem for each in compared(small, large, postcopy=False))
    (model,) = [each for each in compared(large, small, postcopy=False) if each.what == "CPU model"]
    assert model.problem


@pytest.mark.kvm
@pytest.mark.qemu
def test_a_uuid_counts_if_it_is_compared(tmp_path):
    with machines(tmp_path, {}, *UUID) as (source, target):
        assert problems(source, target) == []
        source.switch(["validate-uuid"])
        (found,) = problems(source, target)
        assert found.startswith("UUID: another UUID, which is compared (source: 11111111-")


@pytest.mark.kvm
@pytest.mark.qemu("10.0", "11.1")
def test_an_image_and_a_machine_that_waits(tmp_path):
    with machines(tmp_path, {}) as (source, target):
        source.save(tmp_path / "image")

        async def found(**options):
            machine = await QmpConnection.connect(target.address)
            checks = await preflight_image(tmp_path / "image", machine, **options)
            await machine.close()
            return [each.what for each in checks if each.problem is not None]

        assert asyncio.run(found(lazy=False)) == []
        assert asyncio.run(found(lazy=True)) == ["capability postcopy-ram"]
        target.switch(["postcopy-ram"])
        assert asyncio.run(found(lazy=True)) == []
    with machines(tmp_path / "more", {"64M": "32M", "2": "1"}) as (_, target):
        assert asyncio.run(found(lazy=False)) == ["CPUs", "RAM block pc.ram"]


@pytest.mark.kvm
@pytest.mark.qemu
def test_the_command(tmp_path):
    with machines(tmp_path, {}) as (source, target):
        fits = postcopy("preflight", source.address, "--qemu", target.address)
        assert fits.returncode == 0, fits.stderr
        assert f"{source.address}: fits; " in fits.stdout
        turned = postcopy("preflight", target.address, "--qemu", source.address)
        assert turned.returncode == 1
        assert "it does not wait for a guest" in turned.stdout
        assert "the source waits for a guest" in turned.stdout
        told = json.loads(
            postcopy("preflight", source.address, "--qemu", target.address, "--json").stdout
        )
        assert told["fits"] is True
        line = shlex.join(["qemu-system-x86_64", *BASE])
        outcome = postcopy("preflight", source.address, "--qemu", line)
        assert "give --qemu its QMP address" in one_line(outcome)


@pytest.mark.kvm
def test_machines_of_ours(tmp_path):
    with pair(tmp_path) as (source, target):
        line = ["preflight", source.qmp, "--qemu", target.qmp]
        assert postcopy(*line).returncode == 0
        small = tmp_path / "small"
        small.mkdir()
        with Running(small, "target", "--incoming", "defer", "--memory", "32M") as other:
            outcome = postcopy("preflight", source.qmp, "--qemu", other.qmp)
            assert outcome.stdout.startswith("RAM block microvm.ram: another size")
