"""What Prometheus reads: the figures of query-migrate, over TCP and a Unix socket."""

import http.client
import json
import math
import re
import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes.commands import Running, one_line, pair, postcopy
from fakes.monitor_backend import make_backend
from fakes.pair import NEVER_ENDS
from fakes.waiting import wait_until
from postcopy.client.progress import Phase
from postcopy.errors import WrongState
from postcopy.monitor.metrics import METRICS
from postcopy.monitor.scrape import MOST_SCRAPES, serve_metrics
from postcopy.statistics import LATENCY_BUCKETS, Measured, MigrationInfo, RamStatistics
from postcopy.status import Status

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
DEADLINE_S = 30


def connect(address):
    """A socket to ``tcp:HOST:PORT`` or ``unix:PATH``."""
    kind, _, rest = address.partition(":")
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        return socket.create_connection((host, int(port)), DEADLINE_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE_S)
    connection.connect(rest)
    return connection


def scrape(address):
    """Each sample: its value by its name and its labels but for their names."""
    client = http.client.HTTPConnection("localhost")
    client.sock = connect(address)
    try:
        client.request("GET", "/metrics")
        answer = client.getresponse()
        text = answer.read().decode()
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    finally:
        client.close()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def backend():
    return make_backend()


@pytest.fixture(params=["tcp::0", "unix"])
def address(request, backend, tmp_path):
    """Of a server of either kind."""
    where = request.param if request.param != "unix" else f"unix:{tmp_path}/m"
    server = serve_metrics(where, backend)
    yield server.address
    server.close()


def test_nothing_has_been_ordered(address):
    found = scrape(address)
    assert found["postcopy_status", "none"] == 1
    assert sum(value for name, value in found.items() if name[0] == "postcopy_status") == 1
    assert not any(found["postcopy_phase", phase] for phase in Phase)
    assert found["postcopy_guest_running",] == 1
    assert found["postcopy_guest_memory_bytes",] == 64 << 20
    assert found["postcopy_memory_pages", "at-source"] == 3
    assert found["postcopy_queue_depth",] == found["postcopy_lost_pages",] == 0
    assert ("postcopy_transferred_bytes_total",) not in found


def test_a_tcp_address_without_a_host_is_of_loopback(backend):
    server = serve_metrics("tcp::0", backend)
    try:
        assert server.address.startswith("tcp:127.0.0.1:")
    finally:
        server.close()


def test_each_metric_of_the_table_is_read_of_the_figures(backend, address):
    """No row reads a member that is not there, and each has the type that it says."""
    measured = Measured(
        **{name: 3 for name in Measured.__slots__ if name not in {"blocktime_us", "fault_latency_dist"}},
        blocktime_us=(5, 7),
        fault_latency_dist=(0, 2, *[0] * (LATENCY_BUCKETS - 3), 1),
    )  # fmt: skip
    backend.migration.engine_restarts = 2
    backend.migration.now = MigrationInfo(
        status=Status.POSTCOPY_ACTIVE, ram=RamStatistics(mbps=8.0, dirty_pages_rate=10),
        total_time_ms=1500, downtime_ms=2, expected_downtime_ms=3, setup_time_ms=4,
        cpu_throttle_percentage=20, postcopy_latency_ns=1_000_000, measured=measured,
    )  # fmt: skip
    found = scrape(address)
    assert found["postcopy_phase", "postcopy"] == 1
    assert found["postcopy_rate_bytes",] == 1e6
    assert found["postcopy_dirty_rate_bytes",] == 40960
    assert found["postcopy_total_time_seconds",] == 1.5
    assert found["postcopy_throttle_ratio",] == pytest.approx(0.2)
    assert found["postcopy_blocktime_seconds_total", "1"] == pytest.approx(7e-6)
    assert found["postcopy_engine_restarts_total",] == 2
    assert found["postcopy_fault_latency_seconds_bucket", "2e-06"] == 0
    assert found["postcopy_fault_latency_seconds_bucket", "4e-06"] == 2
    assert found["postcopy_fault_latency_seconds_bucket", "8.388608"] == 2
    assert found["postcopy_fault_latency_seconds_bucket", "+Inf"] == 3
    assert found["postcopy_fault_latency_seconds_count",] == 3
    assert found["postcopy_fault_latency_seconds_sum",] == pytest.approx(0.003)
    names = {re.sub("_(bucket|count|sum)$", "", name[0]) for name in found}
    assert names == {row.name for row in METRICS if "xbzrle" not in row.name}


def test_a_snapshot_saves(backend, address):
    backend.machine.ownership.ordered("snapshot", "outgoing", "file:x")
    backend.migration.now = MigrationInfo(status=Status.ACTIVE)
    assert scrape(address)["postcopy_phase", Phase.SAVING] == 1


def test_an_engine_that_does_not_answer_leaves_its_figures_out(backend, address, monkeypatch):
    def silent():
        raise WrongState("the memory's map is not known")

    monkeypatch.setattr(backend.migration, "memory_map", silent)
    found = scrape(address)
    assert found["postcopy_guest_running",] == 1
    assert ("postcopy_lost_pages",) not in found


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\xff\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text; version=x\r\n\r\n",
    ],
)
def test_odd_requests_end_their_connection_alone(address, sent, caplog):
    with connect(address) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass  # it has left some of that unread
    assert scrape(address)["postcopy_guest_running",] == 1
    assert caplog.text == ""


def test_silent_clients_are_bounded(backend, tmp_path):
    server = serve_metrics(f"unix:{tmp_path}/m", backend)
    clients = [connect(server.address) for _ in range(MOST_SCRAPES)]
    try:
        with connect(server.address) as one_more:
            assert one_more.recv(1) == b""
        clients.pop().close()
        wait_until(lambda: answers(server.address), DEADLINE_S, "an answer")
    finally:
        server.close()
        for client in clients:
            client.close()


def answers(address):
    try:
        return scrape(address)
    except (OSError, http.client.HTTPException):
        return None


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("9100", "'9100' is no metrics address; give unix:PATH or tcp:HOST:PORT"),
        ("tcp:localhost:99999", "no metrics address"),
        ("unix:/does/not/exist/m", "cannot listen at unix:/does/not/exist/m: No such file"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(address, why):
    outcome = postcopy("run", "--workload", "idle", "--memory", "64M", "--metrics", address)
    assert why in one_line(outcome)
    assert outcome.returncode != 0


def test_metrics_are_of_a_machine_of_ours(tmp_path):
    outcome = postcopy("restore", str(tmp_path / "image"), "--qemu", "x", "--metrics", "tcp::0")
    assert "--metrics is not for a QEMU" in one_line(outcome)


def both(folder, name):
    """Options for a machine whose metrics are served over both transports."""
    return ["--metrics", f"unix:{folder}/{name}.metrics", "--metrics", "tcp::0"]


def scraped(side):
    """The metrics of a machine that stands still: the same over both transports."""
    over_unix = scrape(f"unix:{side.path}.metrics")
    over_tcp = scrape(
        re.search(r"metrics are served at (tcp:127\.0\.0\.1:\d+)$", side.stderr, re.M)[1]
    )
    assert over_unix == over_tcp
    return over_unix


def check_source(found, info):
    ram, ours = info["ram"], info.get("x-postcopy", {})
    assert found["postcopy_status", info["status"]] == 1
    assert found["postcopy_transferred_bytes_total",] == ram["transferred"]
    for phase in ("precopy", "downtime", "postcopy"):
        assert found["postcopy_phase_bytes_total", phase] == ram[f"{phase}-bytes"]
    assert found["postcopy_pages_total", "normal"] == ram["normal"]
    assert found["postcopy_pages_total", "zero"] == ram["duplicate"]
    assert found["postcopy_remaining_bytes",] == ram["remaining"]
    assert found["postcopy_total_bytes",] == ram["total"]
    assert found["postcopy_requests_total",] == ram["postcopy-requests"]
    assert found["postcopy_dirty_syncs_total",] == ram["dirty-sync-count"]
    assert math.isclose(found["postcopy_rate_bytes",], ram["mbps"] * 1e6 / 8)
    assert math.isclose(found["postcopy_total_time_seconds",], info["total-time"] / 1e3)
    assert math.isclose(found["postcopy_downtime_seconds",], info["downtime"] / 1e3)
    us = ours["guest-downtime-us"]
    assert math.isclose(found["postcopy_guest_downtime_seconds",], us / 1e6)


def check_destination(found, info):
    ours = info["x-postcopy"]
    assert found["postcopy_status", info["status"]] == 1
    assert found["postcopy_incoming",] == 1
    counts = [
        value for name, value in found.items() if name[0] == "postcopy_fault_latency_seconds_bucket"
    ]
    dist = info["postcopy-latency-dist"]
    assert counts == [sum(dist[: power + 1]) for power in range(len(dist))]
    for vcpu, us in enumerate(ours["blocktime-us"]):
        assert math.isclose(found["postcopy_blocktime_seconds_total", str(vcpu)], us / 1e6)
    p99 = found["postcopy_fault_latency_quantile_seconds", "0.99"]
    assert math.isclose(p99, ours["fault-latency-p99-us"] / 1e6)


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_postcopy_is_told_as_query_migrate_tells_it(tmp_path):
    with pair(tmp_path, "hammer", options=lambda name: both(tmp_path, name)) as (source, target):
        capabilities = ["postcopy-ram", "postcopy-blocktime"]
        switched = [{"capability": name, "state": True} for name in capabilities]
        for side in (source, target):
            side.ask("migrate-set-capabilities", capabilities=switched)
        limits = {**NEVER_ENDS, "max-postcopy-bandwidth": 4 << 20}
        source.ask("migrate-set-parameters", **limits)
        target.ask("migrate-incoming", uri=f"unix:{tmp_path}/way")
        source.ask("migrate", uri=f"unix:{tmp_path}/way")
        wait_until(lambda: source.migration_status() == "active", DEADLINE_S, "precopy")
        source.ask("migrate-start-postcopy")
        after = {"postcopy-active", "completed"}
        wait_until(lambda: target.migration_status() in after, DEADLINE_S, "postcopy")
        under_way = scrape(f"unix:{target.path}.metrics")
        source.ask("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
        for side in (source, target):
            wait_until(
                lambda side=side: side.migration_status() == "completed", DEADLINE_S, "its end"
            )
        here, there = scraped(source), scraped(target)
        check_source(here, source.ask("query-migrate")["return"])
        check_destination(there, target.ask("query-migrate")["return"])
    pages = {
        name[1]: value for name, value in under_way.items() if name[0] == "postcopy_memory_pages"
    }
    assert sum(pages.values()) == (64 << 20) >> 12
    assert under_way["postcopy_queue_depth",] == pages["asked-for"]
    assert there["postcopy_memory_pages", "in-place"] == (64 << 20) >> 12
    assert there["postcopy_lost_pages",] == there["postcopy_engine_restarts_total",] == 0


@pytest.mark.kvm
@pytest.mark.userfaultfd
def test_a_restore_serves_metrics_too(tmp_path):
    with Running(tmp_path, "guest", "--workload", "hammer") as guest:
        guest.ask("x-snapshot", uri=f"file:{tmp_path}/image", **{"mapped-ram": True})
        wait_until(lambda: guest.migration_status() == "completed", DEADLINE_S, "the image")
    with Restored(tmp_path, "again", *both(tmp_path, "again")) as again:
        wait_until(lambda: again.migration_status() == "completed", DEADLINE_S, "all memory")
        found, info = scraped(again), again.ask("query-migrate")["return"]
    assert found["postcopy_transferred_bytes_total",] == info["ram"]["transferred"]
    ours = info["x-postcopy"]
    assert found["postcopy_demand_faults_total",] == ours["demand-faults"]
    for until in ("running", "ready", "complete"):
        us = ours[f"restore-{until}-us"]
        assert math.isclose(found["postcopy_restore_seconds", until], us / 1e6)


class Restored(Running):
    """A guest that runs from the image before its memory has been read."""

    def _run_line(self):
        image = str(self.path.parent / "image")
        return [*self.command, "restore", image, "--lazy", "--qmp", self.qmp, *self._options]


def test_each_panel_of_the_dashboard_names_metrics_that_are_there():
    kinds = {row.name: row.kind for row in METRICS}
    labels = {row.name: {row.label} if row.label else set() for row in METRICS}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    named = set()
    for panel in panels:
        for target in panel.get("targets", ()):
            for name, kind, used in uses(target["expr"]):
                assert kinds[name] == kind, (panel["title"], name)
                assert used <= labels[name] | {"le", "instance"}, (panel["title"], name)
                named.add(name)
    assert len(named) > 20


def uses(expression):
    """Each metric of an expression, the type that it must have there, and the labels that are named."""
    grouped = {
        name for by in re.findall(r"\bby \(([^)]*)\)", expression) for name in by.split(", ")
    }
    for name, selected, ranged in re.findall(r"(postcopy_\w+)(\{[^}]*\})?(\[\$\w+\])?", expression):
        labels = set(re.findall(r"(\w+)=", selected)) | grouped
        base = re.sub("_(bucket|count|sum)$", "", name)
        yield base, "gauge" if not ranged else "histogram" if base != name else "counter", labels
