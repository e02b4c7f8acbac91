"""Signals and the breach of the SLO that they are to see coming."""

from __future__ import annotations

import pytest

from labs.harness.analysis.signals import CALM_S, GRID_S, is_watched, watched
from loadtests.arrivals import AnyArrival, Concurrent, Day, Offered, Ramp, Replay


def readings(*above: tuple[float, float], length_s: float = 30.0) -> list[bool]:
    """A signal that is above its threshold from each first time to each second, in seconds."""
    times = [i * GRID_S for i in range(round(length_s / GRID_S))]
    return [any(low <= at < high for low, high in above) for at in times]


def test_an_alarm_leads_the_breach_that_it_lasts_until() -> None:
    found = watched(readings((8.0, 25.0)), breach_s=11.5)
    assert found.crossed_s == pytest.approx(8.0, abs=GRID_S)
    assert found.lead_s == pytest.approx(3.5, abs=GRID_S)
    assert found.false_alarms == 0


def test_an_alarm_that_was_over_before_the_breach_was_false() -> None:
    found = watched(readings((2.0, 3.0), (12.0, 20.0)), breach_s=15.0)
    assert found.lead_s == pytest.approx(3.0, abs=GRID_S)
    assert found.false_alarms == 1
    late = watched(readings((2.0, 3.0), (16.0, 20.0)), breach_s=15.0)
    assert (late.lead_s, late.crossed_s, late.false_alarms) == (None, None, 1)


def test_a_short_pause_does_not_end_an_alarm() -> None:
    found = watched(readings((5.0, 6.0), (6.0 + CALM_S / 2, 9.0)), breach_s=8.0)
    assert found.lead_s == pytest.approx(3.0, abs=GRID_S)


def test_an_alarm_that_is_on_at_the_end_lasts_until_a_later_breach() -> None:
    """The first late request is sent within the window, and is late some seconds after it."""
    found = watched(readings((25.0, 30.0)), breach_s=30.0 + 3 * CALM_S)
    assert found.lead_s == pytest.approx(5.0 + 3 * CALM_S, abs=2 * GRID_S)
    assert found.false_alarms == 0
    over = watched(readings((20.0, 28.0)), breach_s=30.0 + 3 * CALM_S)
    assert (over.lead_s, over.false_alarms) == (None, 1)


def test_without_a_breach_every_alarm_was_false() -> None:
    found = watched(readings((2.0, 3.0), (12.0, 20.0)), breach_s=None)
    assert (found.lead_s, found.false_alarms) == (None, 2)


def test_loads_whose_rate_changes_are_watched() -> None:
    watches: tuple[AnyArrival, ...] = (
        Ramp(first=0.5, last=2), Day(night=0.3, peak=1.4), Replay(speed=60),
    )  # fmt: skip
    assert all(is_watched(load) for load in watches)
    assert not is_watched(Concurrent(users=8))
    assert not is_watched(Offered(times=2))
