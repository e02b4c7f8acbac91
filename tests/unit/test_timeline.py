"""What is drawn over the seconds of a trial: what was measured, and what was forecast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from labs.chunked_prefill import facts as chunked
from labs.chunked_prefill.plots import MOST_GAPS_DRAWN
from labs.chunked_prefill.plots import timeline as draw_timeline
from labs.continuous_batching.facts import facts
from labs.continuous_batching.plots import static
from labs.harness.analysis.computed import PointForecasts, Predictions
from labs.harness.analysis.timeline import GRID_S, Timeline, timeline
from labs.harness.analysis.verdicts import Interval, mean_interval
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.reports.drawing import reach
from labs.harness.spec.lab import Lab, Variant
from labs.harness.storage.recorded import TrialResult
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import records
from loadtests.records import RequestRecord
from loadtests.workload import Intruder
from tests.unit.builders import (
    CEILINGS,
    SHAPE,
    make_lab,
    make_point,
    make_record,
    make_summary,
    make_workload,
    write_run,
)
from tests.unit.judged import judged_run

LONG = 3  # every fourth request is an intruder's


@pytest.fixture(autouse=True)
def _no_figure_is_left() -> Iterator[None]:
    yield
    plt.close("all")


def contended(stall_s: float) -> list[RequestRecord]:
    """Two streams and a long prompt, sent at 10.06 s, that stops one of them for so long."""
    return [
        make_record([(10.01, 1), (10.05, 1), (10.05 + stall_s, 1)], sent_s=9.9, index=0),
        make_record([(10.01, 1), (10.03, 1)], sent_s=9.9, index=1),
        make_record([(10.05 + stall_s, 1)], sent_s=10.06, index=LONG),
    ]


BESIDE = make_point(load="contended:2/1", intruder=Intruder(prompt_tokens=32))


def test_the_gap_of_a_moment_is_the_longest_that_any_stream_is_in() -> None:
    found = timeline(BESIDE, contended(stall_s=0.1))
    assert found.prefills_s == ((10.06, 10.15),)
    assert found.decoding_s == ()
    assert len(found.gaps_s) == 1 + int(10.15 / GRID_S)
    assert set(found.gaps_s[:500]) == {None}  # nothing is decoded before 10 s
    assert found.gaps_s[500:] == (0.04, 0.04, *[0.1] * 6)


def test_without_long_prompts_it_holds_when_each_answer_was_decoded() -> None:
    answers = [make_record([(10.0, 1), (10.5, 3)]), make_record([]), make_record([(11.00004, 1)])]
    assert timeline(make_point(), answers) == Timeline(decoding_s=((10.0, 10.5), (11.0, 11.0)))


def test_a_trial_without_an_answer_has_an_empty_one() -> None:
    assert timeline(make_point(), [make_record([])]) == Timeline()
    assert timeline(BESIDE, []).gaps_s == (None,)


# ------------------------------------------------------------------------- what a forecast keeps


def test_forecasts_without_a_timeline_are_written_as_before() -> None:
    assert "timelines" not in PointForecasts(points={}).model_dump()
    kept = PointForecasts(points={}, timelines={"a": Timeline(gaps_s=(None, 0.1))})
    assert PointForecasts.model_validate_json(kept.model_dump_json()) == kept


# ---------------------------------------------------------------------------------- the pictures


def drawn_run(
    home: Path,
    lab: Lab,
    trials: Mapping[str, Sequence[RequestRecord]],
    played: Mapping[str, Timeline],
) -> JudgedRun:
    folder, points = RunFolder(home / "run"), lab.points(SHAPE, CEILINGS)
    by_load = {f"{p.variant.name} {p.load}": p for p in points}
    for name, trial in trials.items():
        point = by_load[name]
        records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", trial)
        result = TrialResult(point=point.key, repeat=1, summary=make_summary())
        write_json(folder.trial_folder(point, 1) / "trial.json", result)
    forecasts = PointForecasts(
        points={}, timelines={by_load[name].key: of for name, of in played.items()}
    )
    write_json(
        folder.path / "predictions.json",
        Predictions(effects={}, forecasts={}, in_virtual_time=forecasts),
    )
    return judged_run(Context(folder, write_run(home).run(), lab, points, {}))


def legend_texts() -> set[str]:
    return {text.get_text() for legend in plt.gcf().legends for text in legend.get_texts()}


def test_streams_gaps_are_drawn_beside_those_that_were_forecast(tmp_path: Path) -> None:
    lab = make_lab(
        variants=tuple(Variant(name=name, flags={}) for name in ("small", "whole")),
        workloads=(make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32)),),
        claims=(), evidence=(),
    )  # fmt: skip
    trials = {
        "small contended:2/1": contended(0.1),
        "whole contended:2/1": contended(1.0),
    }
    foreseen = timeline(BESIDE, contended(0.8))
    run = drawn_run(tmp_path, lab, trials, {"whole contended:2/1": foreseen})
    found = chunked.facts(run)
    assert found.played
    assert draw_timeline(run, found)
    small, whole = (ax for ax in plt.gcf().axes if ax.get_ylabel() == "gap (ms)")
    (came,) = small.patches
    assert came.get_data().values[-1] == pytest.approx(100)  # type: ignore[attr-defined]
    assert [p.get_data().values[-1] for p in whole.patches] == [  # type: ignore[attr-defined]
        pytest.approx(1000), pytest.approx(800)
    ]  # fmt: skip
    assert whole.get_xlabel() == "seconds in the trial"
    assert small.get_xlim() == whole.get_xlim()
    assert legend_texts() == {
        "longest gap, measured", "long prompts, measured", "longest gap, forecast",
        "long prompts, forecast",
    }  # fmt: skip


def test_a_long_trial_is_drawn_no_finer_than_the_picture_and_keeps_its_longest_gaps(
    tmp_path: Path,
) -> None:
    """Twenty minutes of gaps, one of which is long; the page of a run holds its pictures whole."""
    lab = make_lab(
        variants=(Variant(name="small", flags={}),),
        workloads=(make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32)),),
        claims=(), evidence=(),
    )  # fmt: skip
    readings = [None, *[0.05] * 60_000]
    readings[40_001] = 0.7
    foreseen = Timeline(gaps_s=tuple(readings), prefills_s=((800, 800.7),))
    trial = {"small contended:2/1": contended(0.1)}
    run = drawn_run(tmp_path, lab, trial, {"small contended:2/1": foreseen})
    assert draw_timeline(run, chunked.facts(run))
    (small,) = (ax for ax in plt.gcf().axes if ax.get_ylabel() == "gap (ms)")
    *_, of_forecast = (patch.get_data() for patch in small.patches)  # type: ignore[attr-defined]
    assert len(of_forecast.values) <= MOST_GAPS_DRAWN
    assert of_forecast.edges[-1] == pytest.approx(1200, rel=0.01)
    assert sorted(of_forecast.values)[-2:] == [pytest.approx(50), pytest.approx(700)]
    at = int(np.argmax(of_forecast.values))
    assert of_forecast.edges[at] <= 800.02 <= of_forecast.edges[at + 1]


def test_an_interval_reaches_as_far_below_and_above_as_it_does() -> None:
    """One of the mean's logarithm is longer above, and never goes below 0."""
    wide = mean_interval([1.0, 9.0])
    known = Interval(value=10, low=8, high=11, n=3)
    alone = Interval(value=10, low=None, high=None, n=1)
    below, above = reach([wide, known, alone, None], scale=2)
    assert 0 < below[0] < 2 * wide.value < above[0]
    assert (below[1:], above[1:]) == ([4, 0, 0], [2, 0, 0])
    assert reach([known]) == [[pytest.approx(2)], [pytest.approx(1)]]


@pytest.mark.parametrize("kept", [True, False])
def test_fixed_batches_are_drawn_beside_those_that_were_forecast(
    kept: bool, tmp_path: Path
) -> None:
    lab = make_lab(
        variants=(Variant(name="base", flags={}),),
        workloads=(make_workload("waves:2", "concurrent:2"),),
        claims=(), evidence=(),
    )  # fmt: skip
    trial = [make_record([(1.0, 1), (end_s, 1)], sent_s=0.5, index=i)
             for i, end_s in enumerate((2.0, 4.0))]  # fmt: skip
    played = Timeline(decoding_s=((1.0, 2.5), (1.0, 5.0)))
    run = drawn_run(
        tmp_path, lab, {"base waves:2": trial, "base concurrent:2": trial},
        {"base waves:2": played} if kept else {},
    )  # fmt: skip
    found = facts(run)
    assert found.played == kept
    assert static(run, found)
    waves, _ = plt.gcf().axes
    lines = [np.asarray(line.get_xydata()).tolist() for line in waves.lines]
    assert lines[0] == [[0, 0], [1, 1], [1, 2], [2, 1], [4, 0]]
    assert lines[1:] == [[[0, 0], [1, 1], [1, 2], [2.5, 1], [5, 0]]] * kept
    assert legend_texts() == (
        {"fixed batches, measured", "continuous, measured", "forecast"} if kept else set()
    )
