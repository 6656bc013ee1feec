"""Tables, ratios and verdicts of the benchmarks, from figures made up here."""

import pytest

from benchmarks import report
from benchmarks.report import Spread
from benchmarks.scenario import Target, cases


def result(contender, figures, case="precopy", repeat=0, **more):
    return {"case": case, "contender": contender, "repeat": repeat, "figures": figures} | more


def line(results, key, case="precopy"):
    found = report.lines(cases()[case], results)
    return next(one for one in found if one.figure.key == key)


def test_spread_is_median_lowest_highest():
    assert Spread.of([3.0, 1.0, None, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)
    assert Spread.of([None]) is None
    assert Spread.of([]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")],
)
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_spread_says_its_range_only_if_there_are_several():
    assert str(Spread(5.0, 5.0, 5.0, 1)) == "5.00"
    assert str(Spread(5.0, 4.0, 60.0, 3)) == "**5.00** [4.00 to 60.0]"


def test_target_bounds_are_included():
    assert Target(1.5, at_least=True).reached(1.5)
    assert not Target(1.5, at_least=True).reached(1.49)
    assert Target(0.25).reached(0.25)
    assert not Target(0.25).reached(0.26)


def test_ratio_is_of_medians_and_judged_by_the_target():
    results = [result("qemu", {"mib_s": value}) for value in (100.0, 200.0, 900.0)]
    results += [result("postcopy", {"mib_s": value}) for value in (100.0, 310.0, 320.0)]
    found = line(results, "mib_s")
    assert found.ratio == pytest.approx(1.55)
    assert found.reached is True
    assert found.to_json()["target"] == "≥ 1.5"


def test_where_two_of_ours_are_compared_both_have_to_reach_the_target():
    results = [
        result("qemu-preempt", {"fault_p99_us": 400.0}, "capped-20"),
        result("postcopy", {"fault_p99_us": 200.0}, "capped-20"),
        result("postcopy-preempt", {"fault_p99_us": 300.0}, "capped-20"),
    ]
    found = line(results, "fault_p99_us", "capped-20")
    assert found.ratios == {"postcopy": 0.5, "postcopy-preempt": 0.75}
    assert found.reached is True
    assert "| 400 | 200 | 300 | 0.50 and 0.75 | ≤ 1 | yes |" in report.to_markdown(
        {}, [cases()["capped-20"]], results
    )
    slow = result("postcopy-preempt", {"fault_p99_us": 401.0}, "capped-20", repeat=1)
    assert line([*results[:2], slow], "fault_p99_us", "capped-20").reached is False


def test_with_preempt_on_both_sides_ours_is_divided_by_theirs_with_preempt():
    results = [
        result("qemu", {"fault_p50_us": 1.0}, "uncapped-preempt"),
        result("qemu-preempt", {"fault_p50_us": 300.0}, "uncapped-preempt"),
        result("postcopy-preempt", {"fault_p50_us": 100.0}, "uncapped-preempt"),
    ]
    found = line(results, "fault_p50_us", "uncapped-preempt")
    assert found.ratio == pytest.approx(1 / 3)
    assert found.reached is True


def test_without_the_other_engine_there_is_no_verdict():
    found = line([result("postcopy", {"mib_s": 100.0})], "mib_s")
    assert (found.ratio, found.reached) == (None, None)
    found = line([result("qemu", {"mib_s": 0.0}), result("postcopy", {"mib_s": 1.0})], "mib_s")
    assert found.ratio is None


def test_a_failed_run_is_told_and_its_figures_are_left_out():
    failed = {"case": "precopy", "contender": "postcopy", "repeat": 2, "error": "RunFailed: no"}
    results = [result("qemu", {"mib_s": 100.0}), failed]
    assert report.trouble(results) == ["precopy, postcopy, repeat 2: RunFailed: no"]
    assert line(results, "mib_s").spreads["postcopy"] is None
    assert "RunFailed: no" in report.to_markdown({}, [cases()["precopy"]], results)


def test_damaged_memory_is_trouble():
    damaged = result("postcopy", {}, verified={"ok": False, "bad_words": 8})
    intact = result("qemu", {}, verified={"ok": True})
    assert len(report.trouble([damaged, intact])) == 1
    page = report.to_markdown({}, [cases()["precopy"]], [damaged, intact])
    assert "after 2 runs: 1 intact" in page


def test_noise_is_told():
    quiet, noisy = (result("qemu", {"others_cpus": cpus}) for cpus in (0.1, 0.9))
    assert report.noise([quiet]) == ""
    assert "in 1 of 2 runs" in report.to_markdown({}, [cases()["precopy"]], [quiet, noisy])
    busy = [quiet, result("postcopy", {"others_cpus": 0.2})]
    assert line(busy, "others_cpus").ratio is None


def test_tables_have_a_column_for_each_engine_that_ran():
    figures = {"guest_downtime_ms": 10.0, "fault_p50_us": 100.0}
    ran = [result(name, figures, "postcopy") for name in ("qemu", "postcopy", "qemu-preempt")]
    page = report.to_markdown({"host": {"cpus": 2}}, [cases()["postcopy"]], ran)
    assert (
        "| QEMU (n=1) | postcopy (n=1) | QEMU, preempt (n=1) | ratio | target | reached |" in page
    )
    assert "| 10.0 | 10.0 | 10.0 | 1.00 | ≤ 0.5 | **no** |" in page
    assert "QEMU, preempt" not in report.to_markdown({}, [cases()["postcopy"]], ran[:2])


def test_json_has_tables_and_runs():
    results = [result("qemu", {"mib_s": 100.0}), result("postcopy", {"mib_s": 160.0})]
    whole = report.to_json({"host": {"cpus": 2}}, [cases()["precopy"]], results)
    assert whole["tables"]["precopy"]["lines"][0]["reached"] is True
    assert whole["runs"] == results
    assert whole["host"] == {"cpus": 2}


def test_targets_belong_to_figures_of_their_case():
    for case in cases().values():
        assert set(case.targets) <= {figure.key for figure in case.figures}
