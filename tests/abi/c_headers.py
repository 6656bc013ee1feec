"""Comparing an abi module with the C compiler's reading of the same header.

Every claim of the module becomes one line of C.  A line that does not compile says by its message
whether the header contradicts the claim or merely has never heard of the name.
"""

import ctypes
import enum
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from postcopy.abi.ioctl import Ioctl, PlainIoctl

UNKNOWN = re.compile(r"undeclared|incomplete type|undefined type|has no member|no member named")


@dataclass(frozen=True)
class Claim:
    """One thing that a module says about its header; ``owner`` is what NEWER would list."""

    owner: str
    condition: str


@dataclass
class Comparison:
    compared: list[Claim] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def claims(module: ModuleType) -> Iterator[Claim]:
    """All that a module says."""
    for name, value in vars(module).items():
        if name.startswith("_") or name in {"HEADER", "C_NAMES", "NEWER"}:
            continue
        if isinstance(value, Ioctl | PlainIoctl):
            yield Claim(value.name, f"{value.name} == {value.number:#x}")
        elif isinstance(value, int) and not isinstance(value, enum.Enum) and name.isupper():
            yield Claim(name, f"{name} == {value}")
        elif isinstance(value, type) and value.__module__ == module.__name__:
            yield from _claims_of_class(module, value)


def _claims_of_class(module: ModuleType, kind: type) -> Iterator[Claim]:
    if issubclass(kind, ctypes.Structure):
        size = ctypes.sizeof(kind)
        yield Claim(kind.__name__, f"sizeof(struct {kind.__name__}) == {size}")
        for path, offset in _fields(kind):
            yield Claim(
                kind.__name__, f"__builtin_offsetof(struct {kind.__name__}, {path}) == {offset}"
            )
    elif issubclass(kind, enum.Enum):
        pattern = module.C_NAMES[kind]  # KeyError: an enumeration without its C names
        for member in kind:
            c_name = pattern.format(member.name)
            yield Claim(f"{kind.__name__}.{member.name}", f"{c_name} == {int(member.value)}")


def _fields(kind: type, prefix: str = "", start: int = 0) -> Iterator[tuple[str, int]]:
    renamed = getattr(kind, "_c_paths_", {})
    anonymous = getattr(kind, "_anonymous_", ())
    for name, field_type, *_ in kind._fields_:
        offset = start + getattr(kind, name).offset
        nested = isinstance(field_type, type) and issubclass(
            field_type, ctypes.Structure | ctypes.Union
        )
        path = prefix + renamed.get(name, name)
        if name in anonymous:
            path = prefix.removesuffix(".")
        elif not name.startswith("_"):
            yield path, offset
        if nested and (name in anonymous or not name.startswith("_")):
            yield from _fields(field_type, f"{path}." if path else "", offset)


def compare(module: ModuleType, directory: Path, *include_paths: Path) -> Comparison:
    """Compile one assertion a claim, and sort the claims by what the compiler says."""
    listed = list(claims(module))
    includes = [f"#include {header}" for header in module.HEADER.split()]
    source = directory / f"{module.__name__}.c"
    lines = ["#define _GNU_SOURCE", "#include <stddef.h>", "#include <sys/ioctl.h>", *includes]
    first = len(lines) + 1
    lines += [f'_Static_assert({claim.condition}, "differs");' for claim in listed]
    source.write_text("\n".join(lines) + "\n")
    flags = [f"-isystem{path}" for path in include_paths]
    command = ["gcc", "-std=gnu11", "-fsyntax-only", "-fmax-errors=0", *flags, str(source)]
    environment = os.environ | {"LC_ALL": "C"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return _sort(listed, first, run)


def _sort(listed: list[Claim], first: int, run: subprocess.CompletedProcess[str]) -> Comparison:
    messages: dict[int, str] = {}
    for line, message in re.findall(r"\.c:(\d+):(?:\d+:)? error: (.*)", run.stderr):
        messages.setdefault(int(line) - first, message)
    if run.returncode and not messages:
        raise AssertionError(run.stderr)
    result = Comparison()
    for index, claim in enumerate(listed):
        message = messages.pop(index, None)
        if message is None:
            result.compared.append(claim)
        elif UNKNOWN.search(message):
            result.unknown.add(claim.owner)
        else:
            result.wrong.append(f"{claim.condition}: {message}")
    result.wrong += [f"not a claim's line: {message}" for message in messages.values()]
    return result
