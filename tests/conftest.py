"""What every test has: markers, and a deadline for the things that must not hang.

A thread that dies of an exception fails its test: pytest makes a warning of it
(``PytestUnhandledThreadExceptionWarning``), and ``filterwarnings = error`` a failure of that.
"""

import contextlib
import os
import signal

import hypothesis
import pytest

from fakes.certificates import Certificates
from fakes.commands import Running, need_kvm, need_userfaultfd
from fakes.engine_template import EngineTemplate
from fakes.huge_pages import reserved
from fakes.no_threads import host_without_threads
from fakes.peers import can_prove
from fakes.qemu_versions import USUAL, folder_of
from fakes.waiting import wait_until
from postcopy.link.guest.engine_process import EngineProcess

MARKERS = (
    "kvm: needs /dev/kvm",
    "userfaultfd: needs one that sees the faults of the kernel's own code",
    "qemu: needs a real QEMU; with versions, is run with each of them: qemu('7.2', '11.1')",
    "proves: what it shows of that QEMU, and needs of it: proves(Way.TO, Feature.POSTCOPY)",
)


# How long an example takes says how busy the host is, and nothing else.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts commands in its background so; those of tests would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A busy host may stop a test for seconds; how fast something is, benchmarks say.
    slow = [hypothesis.HealthCheck.too_slow]
    # In a checkout of another user there is no place for examples; hypothesis warns of that.
    examples = {} if os.access(config.rootpath, os.W_OK) else {"database": None}
    hypothesis.settings.register_profile(
        "house", deadline=None, suppress_health_check=slow, **examples
    )
    hypothesis.settings.load_profile("house")
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kvm"):
        need_kvm()
    if item.get_closest_marker("userfaultfd"):
        need_userfaultfd()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if marker := metafunc.definition.get_closest_marker("qemu"):
        metafunc.parametrize("qemu_version", marker.args or (USUAL,), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if can_prove(item)]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A certificate authority, and hosts of it, for the asking."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def tls_host(certificates):
    """A folder with good certificates for ``localhost``."""
    return certificates.host()


@pytest.fixture(autouse=True)
def qemu_version(request, monkeypatch):
    """What ``qemu-system-x86_64`` is in a test that is marked ``qemu``."""
    version = getattr(request, "param", None)
    if version is not None:
        monkeypatch.setenv("PATH", f"{folder_of(version)}{os.pathsep}{os.environ['PATH']}")
    return version


@pytest.fixture(scope="session")
def engine_template():
    """What engines of machines in this process are forked from."""
    with contextlib.closing(EngineTemplate()) as made:
        yield made


@pytest.fixture(autouse=True)
def engines_start(engine_template, monkeypatch):
    """How they start; override it where each is to be a new interpreter, as a user has it."""
    monkeypatch.setattr(EngineProcess, "start", engine_template.start)


@pytest.fixture
def guest(tmp_path):
    """A machine of ``postcopy run`` whose guest writes to its memory all the time."""
    need_kvm()
    with Running(tmp_path, "guest", "--workload", "hammer") as running:
        yield running


@pytest.fixture
def huge_pages():
    """``huge_pages(count)``: as many free pages of 2 MiB, until the test has ended."""
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(reserved(count))


@pytest.fixture
def no_threads():
    """``no_threads.refuse(NAME)``: the kernel has no room for threads of that name."""
    with host_without_threads() as made:
        yield made


@pytest.fixture
def deadline():
    """``deadline(condition, timeout_s, what)``: look until it holds, see :mod:`fakes.waiting`."""
    return wait_until
