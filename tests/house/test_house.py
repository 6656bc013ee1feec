"""The rules of the house that a machine can check; CONTRIBUTING.md says why they are."""

import ast
import re
import subprocess
import sys

import pytest

from house.project import ROOT, files, modules, text

MAX_LINES = {"src": 400, "benchmarks": 400, "scripts": 400, "tests": 500}
SMALL_LINES, MOST_SMALL = 60, 15
MOST_FILES = {"command": 14, "fault": 15, "restore": 20, "snapshot": 22}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Put together here, so that this file does not find itself.
REGISTRIES = [".".join(name) for name in (("pypi", "org"), ("deb", "debian"), ("npmjs", "org"))]
REGISTRIES += ["python" + "hosted", "node" + "source", "snapshot." + "debian"]
MACHINE_PATHS = re.compile(r"(?<![\w.])/" + r"(work|farm|tmp/v|root/\.pyenv)(?![\w])")


def calls_in(path):
    """Every call of a module: (line, dotted name of what is called, the call)."""
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def test_there_is_something_to_look_at():
    assert len(modules("src")) > 20
    assert len(modules("tests")) > 5


def test_no_file_is_too_long():
    lengths = {path: len(text(path).splitlines()) for path in modules(*MAX_LINES)}
    assert {path: n for path, n in lengths.items() if n > MAX_LINES[path.parts[0]]} == {}


def test_few_files_are_small():
    """A subject that fits a screen stands in the file that uses it."""
    kept = [path for path in modules("src") if path.name != "__init__.py"]
    small = [path for path in kept if len(text(path).splitlines()) < SMALL_LINES]
    assert len(small) <= MOST_SMALL, small


def test_no_file_names_a_registry_or_a_path_of_one_machine():
    found = []
    for path in files():
        for number, line in enumerate((text(path) or "").splitlines(), 1):
            if MACHINE_PATHS.search(line) or any(host in line for host in REGISTRIES):
                found.append(f"{path}:{number}: {line.strip()}")
    assert found == []


def test_machine_paths_are_recognised():
    for place in ("work/main", "tmp/v/bin/python", "root/.pyenv"):
        assert MACHINE_PATHS.search(f"x=/{place}")
        assert not MACHINE_PATHS.search(f"x/net/a{place}")
        assert not MACHINE_PATHS.search(f"../{place}")


def test_each_module_says_what_it_is():
    # An empty __init__.py of a test folder has nothing to say.
    bare = [
        path
        for path in modules("src", "tests", "benchmarks", "scripts")
        if text(path).strip() and not ast.get_docstring(ast.parse(text(path)))
    ]
    assert bare == []


def test_each_file_of_tests_has_a_name_of_its_own():
    """Pytest imports all of them at the top level, and ends at the second of a name."""
    names = [path.name for path in files() if path.match("tests/**/test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_no_test_sleeps():
    sleeping = [
        f"{path}:{line}"
        for path in modules("tests")
        for line, name, _ in calls_in(path)
        if name in ("time.sleep", "sleep", "asyncio.sleep")
    ]
    assert sleeping == []


def test_only_the_command_line_prints():
    exempt = {ROOT.joinpath("src/postcopy/status.py").relative_to(ROOT)}
    printing = [
        f"{path}:{line}"
        for path in modules("src")
        if "cli" not in path.parts and path not in exempt
        for line, name, _ in calls_in(path)
        if name == "print"
    ]
    assert printing == []


def test_each_skip_has_its_reason():
    bare = []
    for path in modules("tests"):
        for line, name, call in calls_in(path):
            if name in ("pytest.skip", "pytest.importorskip"):
                has_reason = bool(call.args or call.keywords)
            elif name in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail"):
                has_reason = any(keyword.arg == "reason" for keyword in call.keywords)
            else:
                continue
            if not has_reason:
                bare.append(f"{path}:{line}")
    assert bare == []


def test_links_of_the_documents_lead_somewhere():
    pages = [path for path in files() if path.suffix == ".md"]
    assert pages
    broken = []
    for page in pages:
        for target in LINK.findall(FENCE.sub("", text(page))):
            if re.match(r"[a-z]+:|#", target):
                continue
            if not (ROOT / page.parent / target.split("#")[0]).exists():
                broken.append(f"{page}: {target}")
    assert broken == []


@pytest.mark.parametrize(("walk", "most"), MOST_FILES.items())
def test_few_files_are_opened_on_a_walk(walk, most):
    rows = [
        line
        for line in (ROOT / f"docs/life_of_a_{walk}.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    named = {target for row in rows for target in LINK.findall(row) if target.endswith(".py")}
    assert 10 <= len(named) <= most, sorted(named)


def test_imports_go_down_only():
    outcome = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("page", ["status", "ownership", "tracing", "cli", "monitor", "metrics"])
def test_the_drawn_pages_are_current(page):
    drawn = subprocess.run(
        [sys.executable, f"scripts/draw_{page}.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert drawn.returncode == 0, drawn.stderr
