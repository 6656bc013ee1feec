"""The page about the Python API and the package say the same, and its examples run."""

import re
import subprocess
import sys

import pytest

import postcopy
from fakes.commands import need_kvm
from house.project import ROOT

PAGE = (ROOT / "docs/api.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_lists_the_public_names_in_their_order():
    listed = PAGE.rpartition("## All names")[2].partition("; in")[0]
    assert re.findall(r"`(\w+)`", listed) == postcopy.__all__


@pytest.mark.parametrize("name", postcopy.__all__)
def test_each_public_name_is_there(name):
    assert getattr(postcopy, name) is not None
    assert name in dir(postcopy)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        postcopy.nothing  # noqa: B018 - looking is the test


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, postcopy; assert not {'numpy', 'qemu', 'asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.kvm
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_runs(number, tmp_path):
    need_kvm()
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout
