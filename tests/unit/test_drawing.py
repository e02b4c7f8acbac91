"""What plots are drawn from."""

from __future__ import annotations

import pytest

from labs.findings.drawing import reach
from labs.judging.judge import Interval, mean_interval


def test_an_interval_reaches_as_far_below_and_above_as_it_does() -> None:
    """One of the mean's logarithm is longer above, and never goes below 0."""
    wide = mean_interval([1.0, 9.0])
    known = Interval(value=10, low=8, high=11, n=3)
    alone = Interval(value=10, low=None, high=None, n=1)
    below, above = reach([wide, known, alone, None], scale=2)
    assert 0 < below[0] < 2 * wide.value < above[0]
    assert (below[1:], above[1:]) == ([4, 0, 0], [2, 0, 0])
    assert reach([known]) == [[pytest.approx(2)], [pytest.approx(1)]]
