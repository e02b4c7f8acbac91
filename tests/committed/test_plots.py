"""The plots of a run, as matplotlib draws them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from labs.harness.analysis.verdicts import Interval
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.reports import plots
from labs.harness.reports.drawing import BANDS, GREY
from labs.harness.reports.plots import plots_of
from labs.harness.storage.results import RunFolder
from tests.committed import in_git


def test_however_wide_an_interval_ends_within_its_plot(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Interval(value=1.0, low=0.0, high=2.0, n=3)
    monkeypatch.setattr(Context, "interval", lambda *_: wide)
    plots_of("chunked-prefill")["stall"](_judged(committed, "chunked-prefill"))
    assert all(ax.get_ylim()[1] > 2000 for ax in plt.gcf().axes)  # in ms
    plt.close("all")


def test_one_wild_interval_does_not_flatten_the_others() -> None:
    wild = Interval(value=1.0, low=0.001, high=1000.0, n=3)
    usual = Interval(value=1.2, low=1.1, high=1.3, n=3)
    _, ax = plt.subplots()
    assert plots._clip(ax, [usual, wild], [2.0])
    assert (0.1, 10) < ax.get_xlim() < (1, 10)
    assert not plots._clip(ax, [usual])
    plt.close("all")


@pytest.mark.parametrize(
    ("lab", "plot", "label"),
    [
        ("continuous-batching", "pareto", "forecast, with its bands"),
        ("weight-quantization", "tradeoff", "speed-up forecast before the run"),
    ],
)
def test_a_plot_over_two_figures_shows_their_forecasts(
    committed: Path, lab: str, plot: str, label: str
) -> None:
    caption = plots_of(lab)[plot](_judged(committed, lab))
    assert caption
    assert _labels().count(label) == 1
    plt.close("all")


def test_curves_of_engines_show_the_forecast_of_the_one_that_has_one(committed: Path) -> None:
    assert plots_of("serving-engines")["curves"](_judged(committed, "serving-engines"))
    assert [text for text in _labels() if "forecast" in text] == 2 * ["vllm-eager, forecast"]
    plt.close("all")


def _labels() -> list[str]:
    return [text for ax in plt.gcf().axes for text in ax.get_legend_handles_labels()[1]]


def test_bars_of_structures_lie_on_the_bands_of_their_forecasts(committed: Path) -> None:
    run = _judged(committed, "structured-output")
    caption = plots_of("structured-output")["structures"](run)
    assert isinstance(caption, str)
    assert caption.endswith(BANDS)
    lines = [line for ax in plt.gcf().axes for line in ax.lines if line.get_color() == GREY]
    marks = [line for line in lines if line.get_marker() == "_"]
    bars = [bar for ax in plt.gcf().axes for bar in ax.patches]
    assert len(marks) == len(bars)
    plt.close("all")


def _judged(committed: Path, lab: str) -> JudgedRun:
    folder = RunFolder(committed / "results" / in_git.newest(lab))
    run, summary = folder.run(), folder.summary()
    context = Context(folder, run, run.rebuilt_lab(), run.points(), summary.measurements)
    return JudgedRun.of(context, summary)
