"""A forecast beside what was measured: in files, in tables, in the report."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest

from labs.harness.analysis.computed import Band, OnTwoEngines, PointForecasts
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.verdicts import Caveat, ForecastAtPoint, Interval
from labs.harness.derived.summarize import summarise
from labs.harness.reports import markdown, report, residuals, tables
from labs.harness.reports.document import plain_text
from labs.harness.reports.residuals import Residual, Scores
from labs.harness.runner import run
from labs.harness.spec.lab import OF_FORECASTS
from labs.harness.spec.names import PairName
from labs.harness.storage import engine_series, results
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip, write_json
from serving.metrics import KV_USAGE, KvUse
from tests.unit.builders import make_lab, make_point, write_run

HIT_RATE = METRICS["prefix_hit_rate"].title
NEAR = Band(value=1, low=0.9, high=1.2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose first two points were forecast: twice the measured TPOT, and the very same."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder = write_run(tmp_path)
    plain = summarise(folder)
    first, second = list(plain.measurements)[:2]
    points = {}
    for key, factor in ((first, 2.0), (second, 1.0)):
        measured = plain.over_repeats(key, "tpot_mean_s")
        assert measured
        value = factor * measured.value
        points[key] = {"tpot_mean_s": Band(value=value, low=0.9 * value, high=1.1 * value)}
    forecasts = PointForecasts(points=points, without={"on": "it was not timed"})
    before = folder.predictions().model_copy(update={"in_virtual_time": forecasts})
    write_json(folder.path / "predictions.json", before)
    return folder


def test_every_forecast_meets_what_was_measured(folder: RunFolder) -> None:
    far, near = summarise(folder).in_virtual_time
    assert far.share == pytest.approx(0.5)
    assert (far.within, near.within) == (False, True)


def test_the_report_tells_how_near_the_forecasts_came(folder: RunFolder) -> None:
    summarise(folder)
    report.write(folder)
    text = (folder.path / "report.md").read_text()
    _, _, told = text.partition("## Forecast beside measured")
    assert re.search(r"1 of 2 .* 25%", told)
    assert "| 0.50x | no |" in told
    assert "- `on`: it was not timed" in told


def test_the_cache_in_use_stands_beside_what_was_forecast_of_it(folder: RunFolder) -> None:
    """The window is from 10 to 20 s; of the second point nothing was scraped."""
    summarise(folder)
    assert '"kv_use"' not in (folder.path / "summary.json").read_text()
    assert "KV cache in use" not in report.write(folder).read_text()
    before = folder.predictions()
    assert before.in_virtual_time
    first, second = before.in_virtual_time.points
    foreseen = {first: KvUse(mean=0.5, peak=0.75), second: KvUse(mean=0.1, peak=0.2)}
    forecasts = before.in_virtual_time.model_copy(update={"kv_use": foreseen})
    write_json(
        folder.path / "predictions.json", before.model_copy(update={"in_virtual_time": forecasts})
    )
    for repeat, share in ((1, 0.2), (2, 0.6)):
        series = {"name": KV_USAGE, "labels": {}, "times_s": [5, 15], "values": [share, 0.4]}
        home = folder.path / "trials" / first / str(repeat)
        write_gzip(home / engine_series.FILE, [series])
    use = summarise(folder).kv_use
    assert use.keys() == {first}
    assert [use[first].mean, use[first].peak] == pytest.approx([0.4, 0.5])
    told = report.write(folder).read_text()
    assert "| 50% | 40% | 75% | 50% |" in told
    assert "| 10% | – | 20% | – |" in told
    alone = markdown.fragment([tables.in_virtual_time(make_lab(), forecasts)])
    assert "| 50% | 75% |" in alone


def test_before_a_run_the_use_of_ample_memory_is_not_shown(folder: RunFolder) -> None:
    forecasts = folder.predictions().in_virtual_time
    assert forecasts
    first, second = forecasts.points
    ample = {first: KvUse(mean=0.3, peak=0.49), second: KvUse(mean=0.1, peak=0.2)}
    short = ample | {second: KvUse(mean=0.1, peak=0.5)}
    shown = [run._for_terminal(forecasts.model_copy(update={"kv_use": u})) for u in (ample, short)]
    assert [forecasts.kv_use for forecasts in shown] == [{}, short]


def test_two_engines_have_a_section_of_their_own_that_says_what_it_is(folder: RunFolder) -> None:
    """Beside the same point on one engine, as it was forecast; and only where it was."""
    summarise(folder)
    assert "on two engines" not in report.write(folder).read_text()
    before = folder.predictions()
    assert before.in_virtual_time
    first, second = before.in_virtual_time.points
    bands = {"tpot_mean_s": NEAR}
    split = OnTwoEngines(point=first, link_gbit_per_s=10, bands=bands)
    shared = OnTwoEngines(point=second, link_gbit_per_s=None, bands=bands)
    forecasts = before.in_virtual_time.model_copy(update={"on_two": (split, shared)})
    write_json(
        folder.path / "predictions.json", before.model_copy(update={"in_virtual_time": forecasts})
    )
    assert folder.predictions().in_virtual_time == forecasts
    _, _, after = report.write(folder).read_text().partition("on two engines, not measured")
    told, _, _ = after.partition("\n## ")
    assert told.count("| one, ") == 2
    assert re.search(r"\| two, .* 10 Gbit/s [^|]*\| 1 s \(", told)
    assert re.search(r"\| two, [^|]* shared [^|]*\| 1 s \(", told)
    assert "Forecast alone" in told


def write_summary(folder: RunFolder, *caveats: Caveat) -> None:
    """Write the summary with these caveats alone: a run made by hand lacks some evidence."""
    summary = summarise(folder).model_copy(update={"caveats": list(caveats)})
    write_json(folder.path / "summary.json", summary)


def test_residuals_are_told_by_figure_and_every_miss_by_name(folder: RunFolder) -> None:
    write_summary(folder)
    found = residuals.of_runs([folder])
    told = markdown.document(
        residuals.page(Scores(found), residuals.to_reports(folder.path.parent))
    )
    assert "| TPOT, mean | 2 | 25% | 1 (50%) | 1 (50%) |" in told
    assert f"| {found[0].machine} | TPOT, mean | 2 | 25% | 1 (50%) | 1 (50%) |" in told
    assert "| 0.50x |" in told
    assert f"]({folder.path.name})" in told  # it has no report, which is written when asked for


def test_an_older_run_counts_only_among_all_runs(folder: RunFolder, tmp_path: Path) -> None:
    write_summary(folder)
    older = RunFolder(Path(shutil.copytree(folder.path, tmp_path / "20000101T000000Z-older")))
    found = residuals.of_runs([folder, older])
    told = markdown.document(residuals.page(Scores(found), residuals.to_reports(tmp_path)))
    assert "\n| TPOT, mean | 4 |" in told
    assert f"| {found[0].machine} | TPOT, mean | 2 |" in told


@pytest.fixture
def with_zeros(folder: RunFolder) -> RunFolder:
    """The run with hit rates that were forecast as 3.85%, 0, 0, and measured as 0, 5%, 0."""
    write_summary(folder)
    summary = folder.summary()
    points = list(summary.measurements)

    def at(point: str, value: float, measured: float) -> ForecastAtPoint:
        interval = Interval(value=measured, low=measured, high=measured, n=2)
        return ForecastAtPoint(
            point=point, metric="prefix_hit_rate", value=value, low=0.9 * value, high=1.1 * value,
            measured=interval,
        )  # fmt: skip

    added = [at(points[0], 0.0385, 0), at(points[1], 0, 0.05), at(points[2], 0, 0)]
    update = {"in_virtual_time": [*summary.in_virtual_time, *added]}
    write_json(folder.path / "summary.json", summary.model_copy(update=update))
    return folder


def test_a_zero_is_a_miss_unless_it_was_forecast(with_zeros: RunFolder) -> None:
    *_, nothing, unforeseen, foreseen = with_zeros.summary().in_virtual_time
    assert (nothing.share, unforeseen.share, foreseen.share) == (0, math.inf, None)
    found = residuals.residuals(with_zeros)
    zeros = [r for r in found if r.group == HIT_RATE]
    assert [(r.predicted, r.measured, r.near) for r in zeros] == [
        (0.0385, 0, False),
        (0, 0.05, False),
    ]
    assert [r.slowdown for r in zeros] == [None, None]


def test_a_zero_is_a_miss_on_the_page_and_in_the_report(with_zeros: RunFolder) -> None:
    link = residuals.to_reports(with_zeros.path.parent)
    told = markdown.document(residuals.page(Scores.of([with_zeros]), link))
    assert "| 3.85% | 0% | 0.00x | – |" in told
    assert "| 0% | 5% | – | – |" in told
    assert "| Prefix hit rate | 2 | infinite | 0 (0%) | 0 (0%) |" in told
    score = report.forecast_score(with_zeros.summary())
    assert score
    assert (score["within"], score["measured"], score["distance"]) == (1, 4, "75%")
    compared = tables.forecast_beside_measured(make_lab(), with_zeros.summary())
    rows = [[plain_text(cell) for cell in row[2:]] for row in compared.rows[2:]]
    assert [row[0] for row in rows] == ["3.85%", "0%"]
    assert [row[-2:] for row in rows] == [["0.00x", "no"], ["–", "no"]]


def test_quick_runs_have_no_residuals_on_the_page(folder: RunFolder) -> None:
    """Nor have incomplete ones, random weights and changed labs."""
    assert residuals.is_full(folder)
    run = folder.run()
    write_json(folder.path / "run.json", run.model_copy(update={"quick": True}))
    assert not residuals.is_full(folder)


def test_a_figure_that_is_not_valid_has_no_residual(folder: RunFolder) -> None:
    points = [f.point for f in summarise(folder).in_virtual_time]
    write_summary(folder, Caveat(name="x", text="x", blocks=True, point=points[0]))
    left = [r for r in residuals.residuals(folder) if r.within is not None]
    assert len(left) == len(points) - 1


@pytest.mark.parametrize(
    ("source", "group"),
    [(OF_FORECASTS, residuals.BY_FORECAST), ("Orca, OSDI 2022", residuals.BY_FORMULA)],
)
def test_a_prediction_by_formula_is_not_counted_as_a_forecast(
    folder: RunFolder, source: str, group: str
) -> None:
    """Also where other claims of its run were forecast."""
    before = folder.predictions()
    told = {
        claim: {pair: p.model_copy(update={"source": source}) for pair, p in of_claim.items()}
        for claim, of_claim in before.effects.items()
    }
    update = {"effects": told, "closed_forms": before.effects}
    write_json(folder.path / "predictions.json", before.model_copy(update=update))
    write_summary(folder)
    groups = {r.group for r in residuals.residuals(folder) if r.unit == "x"}
    assert groups == {group}


def test_a_claim_is_predicted_by_two_forecasts_where_both_are_there() -> None:
    ours, theirs = make_point(variant="on"), make_point(variant="off")
    both = {ours.key: {"tpot_mean_s": NEAR}, theirs.key: {"tpot_mean_s": NEAR}}
    both[theirs.key]["tpot_mean_s"] = Band(value=4, low=3, high=5)
    pair = PairName(ours.key, theirs.key)
    found = PointForecasts(points=both).ratio("tpot_mean_s", pair)
    assert found
    assert found.value == 0.25
    assert not PointForecasts(points=both).ratio("batch", pair)
    one = PointForecasts(points={ours.key: both[ours.key]})
    assert not one.ratio("tpot_mean_s", pair)


def of_a_run(folder: RunFolder, group: str, unit: str, measured: float) -> Residual:
    banded = None if unit == "x" else (0.9, 1.1)
    return Residual(
        folder, "tiny", "abacus", group, "one user", 1.0,
        Interval(value=measured, low=measured, high=measured, n=5), unit, banded,
    )  # fmt: skip


def test_the_aims_are_told_beside_what_was_reached(folder: RunFolder) -> None:
    """Three of four claims are within 25%, and none of two times within its band."""
    claims = [of_a_run(folder, residuals.BY_FORECAST, "x", share) for share in (1.0, 1.02, 1.2)]
    claims.append(of_a_run(folder, residuals.BY_FORMULA, "x", 2.0))
    times = [of_a_run(folder, "TPOT, mean", "s", 1.12) for _ in range(2)]
    rates = [of_a_run(folder, "Output throughput", "tok/s", 1.05) for _ in range(8)]
    found = {aim.what: (aim.found, aim.met) for aim in residuals.aims_of([*claims, *times, *rates])}
    assert found == {
        "Claims within 25%": ("3 of 4 (75%)", False),
        "Claims: median distance": ("11% over 4", False),
        "Output throughput: median distance": ("5% over 8", True),
        "TPOT, mean: median distance": ("12% over 2", False),
        "Figures within their band": ("8 of 10 (80%)", True),
    }
    text = markdown.document(
        residuals.page(Scores([*claims, *times, *rates]), lambda folder: "report.md")
    )
    assert "| abacus | Claims within 25% | at least 85% | 3 of 4 (75%) | missed |" in text
    assert "| abacus | Figures within their band | 80% to 97% | 8 of 10 (80%) | met |" in text
    assert residuals.aims_of([]) == []
    inside = [of_a_run(folder, "TTFT, mean", "s", 1.0) for _ in range(100)]
    *_, bands = residuals.aims_of(inside)  # too wide
    assert (bands.found, bands.met) == ("100 of 100 (100%)", False)


def test_a_miss_is_told_beside_the_pace_of_its_run(folder: RunFolder) -> None:
    """Of a machine that was half as fast as when its step was timed."""
    slow = [of_a_run(folder, "TPOT, mean", "s", 2.0) for _ in range(4)]
    slow += [
        of_a_run(folder, "Output throughput", "tok/s", 0.5),
        of_a_run(folder, "TTFT, mean", "s", 6.0),
    ]
    claim = of_a_run(folder, residuals.BY_FORECAST, "x", 3.0)
    assert residuals.paces_of([*slow, claim]) == {folder.path: 2.0}
    assert residuals.paces_of(slow[1:]) == {}  # too few
    assert [r.share_at(2.0) for r in slow] == [1.0] * 5 + [3.0]
    assert claim.share_at(2.0) is None
    text = markdown.document(residuals.page(Scores([*slow, claim]), lambda folder: "report.md"))
    assert re.search("Of the 6 .* 5 lie", text)
    assert "| 2.00x | 1.00x |" in text
    assert "| 6.00x | 3.00x |" in text
    assert "| 3.00x | – |" in text
    alone = markdown.document(residuals.page(Scores([claim]), lambda folder: "report.md"))
    assert "that missed" not in alone
