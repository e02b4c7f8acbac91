"""The plots of a run, as matplotlib draws them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from labs.filing.results import RunFolder, Summary
from labs.judging.judge import Interval
from labs.telling import plots
from tests.unit import in_git


def test_however_wide_an_interval_ends_within_its_plot(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(committed / "results" / in_git.newest("chunked-prefill"))
    wide = Interval(value=1.0, low=0.0, high=2.0, n=3)
    monkeypatch.setattr(Summary, "over_repeats", lambda *_: wide)
    lab, points, summary = folder.run().rebuilt_lab(), folder.run().points(), folder.summary()
    plots.stall(folder, lab, points, summary)
    assert all(ax.get_ylim()[1] > 2000 for ax in plt.gcf().axes)  # in ms
    plt.close("all")
