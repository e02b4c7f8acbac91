"""The plots of a run, as matplotlib draws them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from labs.filing.results import RunFolder
from labs.findings.context import Context, JudgedRun
from labs.judging.judge import Interval
from labs.telling.plots import plots_of
from tests.committed import in_git


def test_however_wide_an_interval_ends_within_its_plot(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(committed / "results" / in_git.newest("chunked-prefill"))
    wide = Interval(value=1.0, low=0.0, high=2.0, n=3)
    monkeypatch.setattr(Context, "interval", lambda *_: wide)
    run, summary = folder.run(), folder.summary()
    context = Context(folder, run, run.rebuilt_lab(), run.points(), summary.measurements)
    plots_of("chunked-prefill")["stall"](JudgedRun.of(context, summary))
    assert all(ax.get_ylim()[1] > 2000 for ax in plt.gcf().axes)  # in ms
    plt.close("all")
