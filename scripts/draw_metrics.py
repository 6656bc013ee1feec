"""Write ``docs/metrics.md`` and ``docs/grafana.json`` from the table of metrics.

``--check`` only says whether they are current.
"""

import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from postcopy.monitor.metrics import METRICS

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
HEAD = """\
# Metrics

Made by `scripts/draw_metrics.py` from the table in
[`metrics.py`](../src/postcopy/monitor/metrics.py); do not edit it here.

`--metrics` of `postcopy run` and `postcopy restore` serves the figures of the machine to
[Prometheus](https://prometheus.io), as text over HTTP. The option may be given several times.

```console
$ postcopy run --incoming tcp:0:4444 --metrics tcp::9100 --metrics unix:/run/vm.metrics
postcopy: metrics are served at tcp:127.0.0.1:9100
```

* A TCP address without a host is one of loopback (127.0.0.1). Everybody who can reach the address can
  read the figures: give another host only on a network that you trust. No request changes anything.
* A Unix socket is read with `curl --unix-socket /run/vm.metrics http://localhost/metrics`.
* The machine is asked when a scrape comes, and at no other time. The answer has the figures of
  `query-migrate`, and the counts of [the memory's map](watch.md#the-maps-cost), at that moment. A scrape
  waits for the engine, for some seconds at most.
* A metric that is not known at the time is left out, such as blocktime without the capability
  `postcopy-blocktime`.
* The figures are those of the last order. They begin at zero with each order, as Prometheus allows for
  counters. `postcopy_engine_restarts_total` alone counts from the start of the machine.

`scrape_configs` for Prometheus:

```yaml
scrape_configs:
  - job_name: postcopy
    scrape_interval: 1s
    static_configs:
      - targets: ["127.0.0.1:9100", "127.0.0.1:9101"]
```

[`grafana.json`](grafana.json) is a dashboard for these metrics. Import it in Grafana (Dashboards, New,
Import), and choose the data source.

## The metrics

"""


def _rate(name: str) -> str:
    return f"rate({name}{{i}}[$__rate_interval])"


PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Phase", "short", (("postcopy_phase{i} == 1", "{{instance}} {{phase}}"),)),
    ("Status", "short", (("postcopy_status{i} == 1", "{{instance}} {{status}}"),)),
    ("Bytes per second", "Bps", (
        ("postcopy_rate_bytes{i}", "{{instance}} sent"),
        ("postcopy_dirty_rate_bytes{i}", "{{instance}} written by the guest"),
    )),
    ("Remaining", "bytes", (
        ("postcopy_remaining_bytes{i}", "{{instance}} remaining"),
        ("postcopy_total_bytes{i}", "{{instance}} in all"),
    )),
    ("Bytes per second by phase", "Bps", (
        (_rate("postcopy_phase_bytes_total"), "{{instance}} {{phase}}"),
        (_rate("postcopy_multifd_bytes_total"), "{{instance}} multifd"),
        (_rate("postcopy_xbzrle_bytes_total"), "{{instance}} xbzrle"),
    )),
    ("Pages per second by kind", "short", (
        (_rate("postcopy_pages_total"), "{{instance}} {{kind}}"),
        (_rate("postcopy_xbzrle_pages_total"), "{{instance}} xbzrle"),
    )),
    ("Memory by state", "short", (("postcopy_memory_pages{i}", "{{instance}} {{state}}"),)),
    ("Page faults per second", "short", (
        (_rate("postcopy_requests_total"), "{{instance}} requests"),
        (_rate("postcopy_demand_faults_total"), "{{instance}} of a restore"),
        (_rate("postcopy_fault_latency_seconds_count"), "{{instance}} measured"),
    )),
    ("Latency of page faults", "s", (
        ("postcopy_fault_latency_quantile_seconds{i}", "{{instance}} {{quantile}}"),
    )),
    ("Latency of page faults, over time", "s", (
        ("sum by (le) (" + _rate("postcopy_fault_latency_seconds_bucket") + ")", "{{le}}"),
    )),
    ("Blocked share of each vCPU", "percentunit", (
        (_rate("postcopy_blocktime_seconds_total"), "{{instance}} vCPU {{vcpu}}"),
        (_rate("postcopy_overlapped_blocktime_seconds_total"), "{{instance}} all at once"),
    )),
    ("Queue depth", "short", (("postcopy_queue_depth{i}", "{{instance}}"),)),
    ("Lost pages", "short", (("postcopy_lost_pages{i}", "{{instance}}"),)),
    ("Downtime", "s", (
        ("postcopy_guest_downtime_seconds{i}", "{{instance}} as the guest felt it"),
        ("postcopy_downtime_seconds{i}", "{{instance}} as QEMU counts it"),
        ("postcopy_expected_downtime_seconds{i}", "{{instance}} expected"),
    )),
    ("Engine restarts", "short", (
        ("increase(postcopy_engine_restarts_total{i}[$__rate_interval])", "{{instance}}"),
    )),
    ("Restores and snapshots", "s", (
        ("postcopy_restore_seconds{i}", "{{instance}} restored: {{until}}"),
        ("postcopy_snapshot_pause_seconds{i}", "{{instance}} snapshot: pause"),
        ("postcopy_write_stall_quantile_seconds{i}", "{{instance}} snapshot: write stall {{quantile}}"),
    )),
)  # fmt: skip
"""Of the dashboard: title, Grafana's unit, and expressions with their legends."""

_INSTANCE = '{instance=~"$instance"}'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HEAT = "Latency of page faults, over time"
_COLUMNS, _WIDTH, _HEIGHT = 2, 12, 8


def page() -> str:
    """The whole page."""
    rows = [("metric", "type", "label", ""), ("---", "---", "---", "---")]
    rows += [
        (f"`{row.name}`", row.kind, f"`{row.label}`" if row.label else "", row.meaning)
        for row in METRICS
    ]
    return HEAD + "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def dashboard() -> str:
    """The dashboard, as Grafana imports it."""
    return json.dumps(
        {
            "title": "postcopy",
            "uid": "postcopy",
            "description": "Migrations, snapshots and restores of postcopy's machines",
            "schemaVersion": 39,
            "refresh": "5s",
            "time": {"from": "now-15m", "to": "now"},
            "templating": {"list": list(_variables())},
            "panels": [_panel(number, *each) for number, each in enumerate(PANELS)],
        },
        indent=1,
    ) + "\n"  # fmt: skip


def _variables() -> Iterable[dict[str, Any]]:
    yield {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "Data source",
    }
    yield {
        "name": "instance",
        "type": "query",
        "label": "Machine",
        "datasource": _SOURCE,
        "query": "label_values(postcopy_status, instance)",
        "multi": True,
        "includeAll": True,
        "refresh": 2,
    }


def _panel(
    number: int, title: str, unit: str, targets: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    heat = title == _HEAT
    place = {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
    return {
        "id": number + 1,
        "title": title,
        "type": "heatmap" if heat else "timeseries",
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": expression.replace("{i}", _INSTANCE),
                "legendFormat": legend,
                "format": "heatmap" if heat else "time_series",
            }
            for place, (expression, legend) in enumerate(targets)
        ],
    }


if __name__ == "__main__":
    for name, text in (("metrics.md", page()), ("grafana.json", dashboard())):
        if "--check" not in sys.argv[1:]:
            (DOCS / name).write_text(text)
        elif (DOCS / name).read_text() != text:
            sys.exit(f"{name} is not what the table says: run scripts/draw_metrics.py")
