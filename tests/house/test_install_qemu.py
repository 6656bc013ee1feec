"""The entry for Debian's backports, derived from whatever entry the machine has."""

import os
import subprocess

import pytest

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

DERIVED = """\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm-backports
Components: main contrib
Signed-By: /usr/share/keyrings/archive.gpg
"""

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb http://mirror.example/debian-security bookworm-security main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main
deb http://second.example/debian bookworm main
"""

DERIVED_ONE_LINE = """\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm-backports
Components: main
Signed-By: /k.gpg
"""


def derive(apt_dir):
    environment = os.environ | {
        "POSTCOPY_APT_DIR": str(apt_dir),
        "POSTCOPY_RELEASE": "bookworm",
    }
    return subprocess.run(
        ["bash", ".ci/install-qemu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout


@pytest.fixture
def apt_dir(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["debian.sources", "other.sources"])
def test_from_the_newer_form(apt_dir, name):
    (apt_dir / "sources.list.d" / name).write_text(DEB822)
    (apt_dir / "sources.list.d" / "zz.sources").write_text(DEB822.replace("mirror", "second"))
    (apt_dir / "sources.list").write_text(ONE_LINE)
    assert derive(apt_dir) == DERIVED


def test_from_the_one_line_form(apt_dir):
    (apt_dir / "sources.list").write_text(ONE_LINE)
    assert derive(apt_dir) == DERIVED_ONE_LINE


def test_plain_line_without_options(apt_dir):
    (apt_dir / "sources.list.d" / "a.list").write_text("deb http://m.example/d bookworm main\n")
    assert derive(apt_dir) == DERIVED_ONE_LINE.replace(
        "mirror.example/debian", "m.example/d"
    ).replace("Signed-By: /k.gpg\n", "")


def test_nothing_to_derive_from(apt_dir):
    (apt_dir / "sources.list").write_text("deb http://mirror.example/debian trixie main\n")
    assert derive(apt_dir).strip() == ""
