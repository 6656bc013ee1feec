"""The entries for other suites, derived from whatever entry the machine has."""

import os
import re
import subprocess

import pytest

from fakes import qemu_versions
from house.project import ROOT

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""

SUITES = [
    "Suites: bookworm",
    "Suites: bookworm bookworm-backports",
    "Suites: trixie trixie-backports",
]

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb http://mirror.example/debian-security bookworm-security main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main
deb http://second.example/debian bookworm main
"""


def derive(apt_dir):
    """What is common to all the entries of the scripts; their suites are looked at here."""
    common = {tuple(entries_of(apt_dir, "install-qemu", SUITES))}
    common.add(tuple(entries_of(apt_dir, "install-headers", SUITES[-1:])))
    common.add(tuple(entries_of(apt_dir, "install-peers", SUITES[:1])))
    common.add(tuple(entries_of(apt_dir, "install-browser", SUITES[:1])))
    (found,) = common
    return list(found) or None


def entries_of(apt_dir, script, suites):
    environment = os.environ | {
        "POSTCOPY_APT_DIR": str(apt_dir),
        "POSTCOPY_RELEASE": "bookworm",
    }
    answer = subprocess.run(
        ["bash", f".ci/{script}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert not answer.stderr
    entries = [entry.splitlines() for entry in answer.stdout.strip().split("\n\n")]
    if entries == [[]]:
        return []
    assert [entry[-2:] for entry in entries] == [[each, "Components: main"] for each in suites]
    (common,) = {tuple(entry[:-2]) for entry in entries}
    return common


@pytest.fixture
def apt_dir(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["debian.sources", "other.sources"])
def test_from_the_newer_form(apt_dir, name):
    (apt_dir / "sources.list.d" / name).write_text(DEB822)
    (apt_dir / "sources.list.d" / "zz.sources").write_text(DEB822.replace("mirror", "second"))
    (apt_dir / "sources.list").write_text(ONE_LINE)
    assert derive(apt_dir) == [
        "Types: deb",
        "URIs: http://mirror.example/debian",
        "Signed-By: /usr/share/keyrings/archive.gpg",
    ]


def test_a_key_that_stands_in_the_entry_itself(apt_dir):
    key = " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY"
    text = DEB822.replace(" /usr/share/keyrings/archive.gpg", f"\n{key}")
    (apt_dir / "sources.list.d" / "a.sources").write_text(text)
    assert derive(apt_dir)[2:] == ["Signed-By:", *key.splitlines()]


def test_an_entry_that_is_switched_off_is_not_taken(apt_dir):
    off = DEB822.replace("Types: deb deb-src", "Types: deb\nEnabled: no", 1)
    (apt_dir / "sources.list.d" / "a.sources").write_text(off)
    (apt_dir / "sources.list.d" / "b.sources").write_text(DEB822.replace("mirror", "second"))
    assert derive(apt_dir)[1] == "URIs: http://second.example/debian"


def test_from_the_one_line_form(apt_dir):
    (apt_dir / "sources.list").write_text(ONE_LINE)
    assert derive(apt_dir) == [
        "Types: deb",
        "URIs: http://mirror.example/debian",
        "Signed-By: /k.gpg",
    ]


def test_plain_line_without_options(apt_dir):
    (apt_dir / "sources.list.d" / "a.list").write_text("deb http://m.example/d bookworm main\n")
    assert derive(apt_dir) == ["Types: deb", "URIs: http://m.example/d"]


def test_nothing_to_derive_from(apt_dir):
    (apt_dir / "sources.list").write_text("deb http://mirror.example/debian trixie main\n")
    assert derive(apt_dir) is None


def test_it_brings_what_the_suite_has_as_peers():
    listed = re.search(r"^PEERS=\((.*)\)$", (ROOT / ".ci" / "install-qemu").read_text(), re.M)
    brought = re.findall(r'"([0-9.]+) [^"]+"', listed[1])
    assert tuple(brought) == qemu_versions.ALL


@pytest.mark.parametrize(
    "script", ["install-qemu", "install-peers", "install-headers", "install-browser"]
)
@pytest.mark.parametrize(("option", "code"), [((), 1), (("--if-possible",), 0)])
def test_a_home_that_cannot_be_written_is_named(script, option, code):
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/none"}
    told = subprocess.run(
        ["bash", f".ci/{script}", *option],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert told.returncode == code
    assert "/proc/none/.cache/postcopy" in told.stderr
    assert f"set POSTCOPY_{script.partition('-')[2].upper()}" in told.stderr
