"""What plots are drawn from."""

from __future__ import annotations

from itertools import pairwise

import pytest

from labs.harness.facts.drawing import aside, draw_logarithmic, plt, reach
from labs.harness.judging.judge import Interval, mean_interval
from labs.harness.telling import plots


def test_an_interval_reaches_as_far_below_and_above_as_it_does() -> None:
    """One of the mean's logarithm is longer above, and never goes below 0."""
    wide = mean_interval([1.0, 9.0])
    known = Interval(value=10, low=8, high=11, n=3)
    alone = Interval(value=10, low=None, high=None, n=1)
    below, above = reach([wide, known, alone, None], scale=2)
    assert 0 < below[0] < 2 * wide.value < above[0]
    assert (below[1:], above[1:]) == ([4, 0, 0], [2, 0, 0])
    assert reach([known]) == [[pytest.approx(2)], [pytest.approx(1)]]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (4, 90, ["5", "10", "20", "50"]),
        (0.4, 30, ["0.5", "1", "2", "5", "10", "20"]),
        (900, 1.2e6, ["1,000", "3,000", "10,000", "30,000", "100,000", "300,000", "1,000,000"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers(low: float, high: float, labels: list[str]) -> None:
    figure, ax = plt.subplots(figsize=(6, 3.8))
    ax.plot([low, high], [low, high])
    ax.set_ylim(low, high)
    draw_logarithmic(ax)
    figure.canvas.draw()
    seen = [
        label.get_text()
        for at, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
        if low <= at <= high
    ]
    plt.close(figure)
    assert seen == labels
    assert not any(label.get_text() for label in ax.get_yticklabels(minor=True))


@pytest.mark.parametrize("span", [1.2, 1.5, 1.9, 2.1, 3, 5, 7.9, 8.1, 30, 400])
def test_numbers_on_an_axis_of_ratios_do_not_touch(span: float) -> None:
    """On half a page: names of claims take the rest of it."""
    figure, ax = plt.subplots(figsize=(4.3, 2))
    ax.set_xlim(0.8, 0.8 * span)
    plots._ratio_axis(ax)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    plt.close(figure)
    assert len(boxes) >= 2
    space = 0.3 * boxes[0].height
    assert all(a.x1 + space < b.x0 for a, b in pairwise(boxes))


def test_series_are_moved_aside_evenly_about_their_place() -> None:
    left, middle, right = (aside(place, 3) for place in range(3))
    assert (left < middle < right, middle) == (True, 1)
    assert left * right == pytest.approx(1)
    assert aside(0, 1) == 1
