"""Whether a machine that waits would take the guest of another that runs, or of an image.

Both machines are asked over QMP; neither is changed.  What a machine does not tell is not compared: ours
knows nothing of CPU models, and a running QEMU does not tell its devices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from postcopy.client.machine_settings import capabilities_of
from postcopy.client.memory_check import Block, blocks_of
from postcopy.client.qmp import QmpConnection
from postcopy.errors import Refused
from postcopy.image.base import Image
from postcopy.image.formats import open_image
from postcopy.serve.preflight import Check
from postcopy.stream.numbers import IGNORED_BLOCKS

_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
_NO_FEATURES: Final = frozenset({"realized", "hotpluggable", "hotplugged"})
"""Properties of a CPU that are on or off, and no features of it."""
_EQUAL: Final = ("x-ignore-shared", "mapped-ram", "multifd", "postcopy-preempt")
"""Capabilities without which at either end the other waits for ever, or fails."""
_AT_TARGET: Final = ("postcopy-ram", "switchover-ack")
"""Capabilities that the target must have on if the source has."""
_RESIZED: Final = "/rom@"
"""Blocks that a QEMU makes as large as those that come."""
_WITH_MULTIFD: Final = ("multifd-channels", "multifd-compression")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a machine or an image tells of itself; ``None`` and empty: nothing.

    :ivar machine_type: such as ``pc-q35-10.0``; ``accelerator``: ``kvm`` or ``tcg``.
    :ivar features: the words of CPUID of a vCPU, by the leaf, subleaf and register that have them.
    :ivar run_state: QEMU's, such as ``inmigrate``.
    """

    machine_type: str | None = None
    accelerator: str | None = None
    run_state: str | None = None
    vcpus: int | None = None
    cpu_model: str | None = None
    features: Mapping[tuple[int, int, str], int] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    uuid: str | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits for a guest."""
        return self.run_state == "inmigrate"


async def preflight_image(path: Path, target: QmpConnection, *, lazy: bool) -> list[Check]:
    """Compare an image with a machine that waits.

    :param lazy: its pages are to come by postcopy.
    :raises ImageError: it is no image.
    """
    theirs = await facts_of(target)
    with open_image(path) as image:
        checks = [*compared(_facts_of_image(image), theirs, postcopy=lazy)]
    if lazy and theirs.capabilities:
        on = theirs.capabilities.get("postcopy-ram", False)
        problem = None if on else "it must be on before the guest comes"
        checks.append(Check("capability postcopy-ram", "needed", _state(on), problem))
    return checks


async def preflight_machine(
    source: QmpConnection, target: QmpConnection, *, lazy: bool
) -> list[Check]:
    """Compare a machine whose guest runs with one that waits.

    :param lazy: a postcopy is planned: page sizes must agree, too.
    """
    ours, theirs = await facts_of(source), await facts_of(target)
    postcopy = lazy or ours.capabilities.get("postcopy-ram", False)
    checks = [*compared(ours, theirs, postcopy=postcopy), *_settings(ours, theirs)]
    if ours.waits:
        checks.append(
            Check("source's state", "inmigrate", "-", "the source waits for a guest, and has none")
        )
    if _lacks(ours, theirs):
        lacking = ", ".join(await _lacking(source, target))
        problem = "the guest may use features that the target's CPU lacks"
        checks.append(Check("CPU features", lacking, "-", problem))
    return checks


def compared(source: Facts, target: Facts, *, postcopy: bool) -> Iterator[Check]:
    """Compare what the guest is with what waits for it; yield what both tell."""
    yield _waiting(target)
    lacking = "another CPU model, which lacks features" if _lacks(source, target) else None
    for what, ours, theirs, problem in (
        ("machine", source.machine_type, target.machine_type, "another machine type"),
        ("CPUs", source.vcpus, target.vcpus, "another number of CPUs"),
        # A model of another name does, if it has all that the guest's has.
        ("CPU model", source.cpu_model, target.cpu_model, lacking),
    ):
        if ours is not None and theirs is not None:
            yield Check(what, str(ours), str(theirs), None if ours == theirs else problem)
    if source.accelerator is not None and target.accelerator is not None:
        loses = source.accelerator == "kvm" != target.accelerator
        problem = "it has no place for the state of KVM's clock" if loses else None
        yield Check("accelerator", source.accelerator, target.accelerator, problem)
    if source.features and target.features and not _lacks(source, target):
        yield Check("CPU features", f"{len(source.features)} words", "all of them")
    yield from _blocks(source, target, postcopy=postcopy)


def _waiting(target: Facts) -> Check:
    problem = (
        None if target.waits else "it does not wait for a guest; start it with -incoming defer"
    )
    return Check("target's state", "-", target.run_state or "unknown", problem)


def _blocks(source: Facts, target: Facts, *, postcopy: bool) -> Iterator[Check]:
    if not source.blocks or not target.blocks:
        return
    for name, ours in source.blocks.items():
        theirs, problem = target.blocks.get(name), None
        if theirs is None:
            problem = "the target has no such block"
        elif theirs.size_bytes != ours.size_bytes and not name.startswith(_RESIZED):
            problem = "another size"
        elif postcopy and ours.page_size_bytes and theirs.page_size_bytes != ours.page_size_bytes:
            problem = "another page size, with which there is no postcopy"
        yield Check(f"RAM block {name}", str(ours), str(theirs or "-"), problem)


def _settings(source: Facts, target: Facts) -> Iterator[Check]:
    ours, theirs = source.capabilities, target.capabilities
    for name in _EQUAL:
        on, there = bool(ours.get(name)), bool(theirs.get(name))
        problem = None if on == there else "it must be the same at both ends"
        yield Check(f"capability {name}", _state(on), _state(there), problem)
    for name in _AT_TARGET:
        on, there = bool(ours.get(name)), bool(theirs.get(name))
        problem = "it must be on at the target, too" if on and not there else None
        yield Check(f"capability {name}", _state(on), _state(there), problem)
    if ours.get("multifd") and theirs.get("multifd"):
        for name in _WITH_MULTIFD:
            ours_is, theirs_is = source.parameters.get(name), target.parameters.get(name)
            problem = None if ours_is == theirs_is else "it must be the same at both ends"
            yield Check(f"parameter {name}", str(ours_is), str(theirs_is), problem)
    secret, known = (
        bool(source.parameters.get("tls-creds")),
        bool(target.parameters.get("tls-creds")),
    )
    problem = None if secret == known else "TLS must be at both ends, or at neither"
    yield Check("parameter tls-creds", _set(secret), _set(known), problem)
    if ours.get("validate-uuid") or ours.get("multifd"):
        problem = None if source.uuid == target.uuid else "another UUID, which is compared"
        yield Check("UUID", source.uuid or _NO_UUID, target.uuid or _NO_UUID, problem)


def _state(on: bool) -> str:  # noqa: FBT001 - of a capability
    return "on" if on else "off"


def _set(known: bool) -> str:  # noqa: FBT001 - of a parameter
    return "set" if known else "not set"


def _lacks(source: Facts, target: Facts) -> int:
    """How many words of the source's CPU have features that the target's lacks."""
    if not target.features:
        return 0
    return sum(bool(word & ~target.features.get(at, 0)) for at, word in source.features.items())


def _facts_of_image(image: Image) -> Facts:
    vcpus = sum(section.name == "cpu" for section in image.sections)
    # The page size of a block stands in no image.
    blocks = {each.name: Block(each.size_bytes, 0) for each in image.blocks}
    told = {name: block for name, block in blocks.items() if name not in IGNORED_BLOCKS}
    return Facts(machine_type=image.machine_name, vcpus=vcpus or None, blocks=told)


async def facts_of(machine: QmpConnection) -> Facts:
    """Ask a machine, and change nothing of it."""
    cpus = await machine.execute("query-cpus-fast")
    kvm = await _ask(machine, "query-kvm")
    typed = await _get(machine, "/machine", "type")
    path = cpus[0]["qom-path"] if cpus else ""
    model = await _get(machine, path, "type")
    words = await _get(machine, path, "feature-words")
    return Facts(
        machine_type=None if typed is None else typed.removesuffix("-machine"),
        accelerator=None if kvm is None else "kvm" if kvm["enabled"] else "tcg",
        run_state=(await machine.execute("query-status"))["status"],
        vcpus=len(cpus),
        cpu_model=None if model is None else model.removesuffix("-x86_64-cpu"),
        features={
            (word["cpuid-input-eax"], word.get("cpuid-input-ecx", 0), word["cpuid-register"]): word[
                "features"
            ]
            for word in words or ()
        },
        blocks=await blocks_of(machine),
        capabilities=await capabilities_of(machine),
        parameters=await machine.execute("query-migrate-parameters"),
        uuid=(await machine.execute("query-uuid"))["UUID"],
    )


async def _lacking(source: QmpConnection, target: QmpConnection) -> list[str]:
    """The names of the features that the source's first CPU has, and the target's has not."""
    ours = (await source.execute("query-cpus-fast"))[0]["qom-path"]
    theirs = (await target.execute("query-cpus-fast"))[0]["qom-path"]
    listed = await source.execute("qom-list", {"path": ours})
    names = sorted(
        each["name"]
        for each in listed
        if each["type"] == "bool" and each["name"] not in _NO_FEATURES
    )
    return [
        name
        for name in names
        if await _get(source, ours, name) is True and await _get(target, theirs, name) is not True
    ]


async def _ask(machine: QmpConnection, command: str, **arguments: str) -> Any:
    """The answer; None from a machine that does not know."""
    try:
        return await machine.execute(command, arguments)
    except Refused:
        return None


async def _get(machine: QmpConnection, path: str, name: str) -> Any:
    return await _ask(machine, "qom-get", path=path, property=name)
