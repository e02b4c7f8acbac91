"""What the lab predicts of a second replica, by hand; and what is said of one that joined."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.quantity import Quantity
from labs.harness.spec.lab import Point
from labs.scale_out import facts, lab
from tests.unit.builders import CEILINGS, SHAPE

LAB = LABS["scale-out"].at("cpu", False)
POINTS = {p.key: p for p in LAB.points(SHAPE, CEILINGS)}


def point(variant: str, load: str) -> Point:
    return POINTS[f"{variant}/{load}"]


def test_a_second_replica_serves_in_time_what_the_first_alone_does_not() -> None:
    """At 1.3 times the capacity of one, all that is sent after 1 / 0.3 s is late."""
    one, two = (point(name, "more/capacity-1.3") for name in ("one", "two"))
    assert one.slo
    assert (one.slo.ttft_s, one.measured_s) == (1.0, (0.5, 8.5))
    assert lab.in_time(one) == pytest.approx((1 / 0.3 - 0.5) / 8)
    assert lab.in_time(two) == 1
    assert lab.goodput_ratio(two, one).value == pytest.approx(8 / (1 / 0.3 - 0.5))
    assert lab.as_many(two, one).value == 2


PROBE: dict[str, Any] = {
    "capacity_per_s": 2.0, "rate_per_s": 2.6, "decided_s": 3.0, "serves_s": 33.0, "first_s": 34.0,
    "ends_s": 49.0, "completed_by": [3.0, 1.0],
    "requests": [
        {"sent_s": 0.0, "ttft_s": 0.5, "e2e_s": 1.0},
        {"sent_s": 30.0, "ttft_s": 4.0, "e2e_s": 4.5},
        {"sent_s": 40.0, "ttft_s": 2.0, "e2e_s": 2.5},
        {"sent_s": 45.0, "ttft_s": 0.5, "e2e_s": 1.0},
        {"sent_s": 46.0, "ttft_s": None, "e2e_s": None},
    ],
    "starts": {"eager": 20.0, "compiled, caches empty": "no compiler"},
}  # fmt: skip


def test_every_request_of_a_joining_is_accounted_for() -> None:
    found = facts.joined(PROBE, slo_s=1.0)
    assert (found.sent, found.answered, found.lost) == (5, 4, 1)
    assert (found.by_first, found.by_second, found.adds_up) == (3, 1, True)
    assert (found.serves_s, found.first_s) == (Quantity(30.0, "s"), Quantity(31.0, "s"))
    assert (found.late_before.value, found.late_after.value) == (0.5, 0.5)
    miscounted = facts.joined({**PROBE, "completed_by": [3.0, 2.0]}, slo_s=1.0)
    assert not miscounted.adds_up


def test_a_start_that_failed_has_no_time_and_says_why() -> None:
    eager, compiled = facts.starts(PROBE)
    assert eager.took_s == Quantity(20.0, "s")
    assert (compiled.took_s.value, compiled.took_s.why) == (None, "no compiler")


def test_yesterdays_plan_has_room_for_every_rate_of_the_next_hour() -> None:
    planned = facts.plan()
    assert (planned[0][0], len(planned)) == (0, 48)
    assert {number for _, number in planned} == {1, 2, 3, 4}
    for (at_s, number), (until_s, _) in itertools.pairwise(planned):
        for moment_s in (at_s, (at_s + until_s) / 2, until_s):
            rate = facts.DAY.times_at(24 * moment_s / facts.DAY_S)
            assert rate <= number


def test_each_rule_is_asked_for_with_a_slow_start_and_a_fast_one() -> None:
    asked = facts.days(list(POINTS.values()))
    assert [day.name for day in asked] == ["always", *(["queue", "kv", "yesterday"] * 2)]
    assert {day.point.flags.replicas for day in asked} == {1}
    assert [day.scaling.start_s for day in asked[1:]] == [35] * 3 + [5] * 3
    assert facts.days([point("two", "more/capacity-1.3")]) == []
