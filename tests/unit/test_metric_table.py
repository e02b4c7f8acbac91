"""The table of metrics: a metric is one row, and everyone who shows one asks the table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest

from dashboards import boards, prometheus, series
from labs.harness.analysis.metrics import (
    METRICS,
    Metric,
    Repeats,
    Unit,
    compared_metrics,
    main_columns,
    of_trial,
    pooled_percentiles,
)
from labs.harness.analysis.verdicts import Interval, figure, over_repeats
from labs.harness.comparison import compare, side_by_side, worse
from labs.harness.comparison.sides import read_side
from labs.harness.derived.summarize import summarise
from labs.harness.reports import chart_data, tables
from labs.harness.runner import backfill
from labs.harness.storage import export
from loadtests.latencies import LATENCIES, TTFT, Latency
from tests.unit.builders import make_record, write_run, write_slowed

TOKENS = Metric(
    "answer_tokens", "Tokens of all answers", "tok", "higher",
    of_trial(lambda trial: sum(r.output_tokens or 0 for r in trial.records)),
    column=15, main=True, compared=True,
    compare_panel="all that is written.", machines_panel="However fast.",
)  # fmt: skip


def test_a_row_of_the_table_is_all_that_a_metric_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METRICS, TOKENS.name, TOKENS)
    folder = write_run(tmp_path)
    run, summary = folder.run(), summarise(folder)
    lab, points = run.rebuilt_lab(), run.points()

    first = next(p for p in points if p.variant.name == "on")
    assert summary.figure(first.key, TOKENS.name) == over_repeats(
        {1: {TOKENS.name: 301}, 2: {TOKENS.name: 302}}, TOKENS.name
    )
    for columns in (None, main_columns()):
        header = tables.points(points, lab, summary, columns).header
        assert header.index(TOKENS.title) == header.index("Output throughput") + 1
    assert chart_data.data(folder, run, summary)["metrics"][TOKENS.name]["title"] == TOKENS.title
    assert TOKENS.name in {row["metric"] for row in export.measurements(folder)}

    slowed = read_side(str(write_slowed(folder, 2).path))
    comparison = compare.compare(read_side(str(folder.path)), slowed)
    assert TOKENS.name in {row.figure for row in comparison.rows}
    assert f"| {TOKENS.title} |" in side_by_side.tables(comparison, comparison.rows, "Figures")

    written = boards.files([], METRICS)
    for board, says in (("compare", "Higher is better; all"), ("machines", "However fast. At")):
        panels = boards.panels(json.loads(written[boards.FOLDER / f"{board}.json"]))
        (panel,) = (p for p in panels if p["title"] == TOKENS.title)
        assert panel["description"].startswith(says)
        assert panel["fieldConfig"]["defaults"]["unit"] == boards.UNITS["tok"]

    limits = tmp_path / "thresholds.toml"
    limits.write_text(f"[worse]\ndefault = 0.1\n{TOKENS.name} = 0.3\n")
    row = next(row for row in comparison.rows if row.figure == TOKENS.name)
    assert worse.thresholds(limits).of(row) == 0.3

    gauges: list[str] = []

    def keep(lines: Iterable[str]) -> None:
        gauges.extend(lines)

    monkeypatch.setattr(prometheus, "load", keep)
    backfill.load_figures(folder)
    mine = [g for g in gauges if g.startswith(f"{series.MEASUREMENT}{{") and TOKENS.name in g]
    assert len(mine) == len(points)


def test_a_pooled_percentile_is_of_all_samples_and_any_other_metric_a_mean_over_repeats() -> None:
    repeats: Repeats = {
        1: {"ttft_p50_s": 1.0, "ttft_mean_s": 1.0},
        2: {"ttft_p50_s": 3.0, "ttft_mean_s": 3.0},
        3: {"ttft_p50_s": None, "ttft_mean_s": None},
    }
    together = {"ttft_p50_s": 2.5}
    assert figure(repeats, together, "ttft_p50_s") == Interval(value=2.5, low=None, high=None, n=2)
    assert figure(repeats, {}, "ttft_p50_s") is None
    mean = figure(repeats, together, "ttft_mean_s")
    assert mean == over_repeats(repeats, "ttft_mean_s") == over_repeats(repeats, "ttft_p50_s")
    assert mean
    assert (mean.value, mean.n) == (2.0, 2)
    assert figure({}, {}, "ttft_mean_s") is None


def test_percentiles_of_a_point_are_those_that_its_samples_support() -> None:
    samples_s = {latency: [float(i) for i in range(1, 41)] for latency in LATENCIES}
    assert pooled_percentiles({**samples_s, TTFT: [1.0] * 4}) == {
        f"{name}_p{q}_s": value
        for name in ("tpot", "itl", "e2e")
        for q, value in ((50, 20.5), (90, 36.1))
    }


def test_the_own_margins_of_a_threshold_are_of_figures_that_a_comparison_has() -> None:
    own = worse.thresholds().worse.keys() - {"default", "effect", "measured"}
    assert own <= {*compared_metrics()}


def test_every_unit_is_one_that_grafana_and_the_live_page_know() -> None:
    assert {*get_args(Unit)} == boards.UNITS.keys()
    charts = (boards.FOLDER.parent / "page" / "charts.js").read_text()
    (known,) = re.findall(r"^const UNITS = \{([^}]+)\}", charts, re.M)
    plain = {unit for unit in boards.UNITS.values() if not unit.startswith("suffix:")}
    assert plain <= {*re.findall(r"(\w+):", known), "s"}


@pytest.mark.parametrize("latency", LATENCIES, ids=lambda latency: latency.title)
def test_a_latency_names_what_a_record_has(latency: Latency) -> None:
    answer = make_record([(1.0, 1), (1.5, 2), (2.5, 1)], sent_s=0.5, scheduled_s=0.25)
    expected = {"request": 1, "token": 3, "chunk": 2}[latency.per]
    assert len(latency.samples_s(answer)) == expected
    refused = make_record([])
    assert latency.samples_s(refused) == []
