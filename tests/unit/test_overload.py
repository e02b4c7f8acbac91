"""The lab of overload: its predictions by hand, and how the capacity of its loads is found."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from labs import LABS
from labs.harness.spec import Lab, LabError, Point
from labs.overload.lab import searched
from tests.unit.builders import CEILINGS, SHAPE, make_lab, make_workload

LAB = LABS["overload"].at("cpu", quick=False)


def point(key: str, lab: Lab = LAB) -> Point:
    return next(p for p in lab.points(SHAPE, CEILINGS) if p.key == key)


def predicted(claim: str) -> float:
    (one,) = (c for c in LAB.claims if c.name == claim)
    ((treatment, baseline),) = LAB.pairs(one, LAB.points(SHAPE, CEILINGS))
    return one.predict(treatment, baseline).value


def test_goodput_without_a_limit_is_what_was_sent_before_t_star() -> None:
    """A window from 0.3 s to 3.5 s, and 0.6 s to wait: t* is 0.6 s at 2x, and 2 s at 1.3x.

    So 0.3 of 3.2 s are in time at twice the capacity, and 1.7 of 3.2 s at 1.3 times.
    """
    assert LAB.slo.ttft_s == 0.6
    assert point("unbounded/mixed/capacity-2").measured_s == pytest.approx((0.3, 3.5))
    assert predicted("overload") == pytest.approx(1 / (2 * 0.3 / 3.2))
    assert predicted("slight") == pytest.approx(1 / (1.3 * 1.7 / 3.2))
    assert predicted("below") == predicted("work") == predicted("tokens") == 1


def test_urgent_requests_pass_the_others() -> None:
    """A third of 2x is urgent: the others, 4/3, are served with 1/3, and t* is 0.2 s: none."""
    assert predicted("priority") == pytest.approx((2 / 3 + 4 / 3 * 0.01) / (2 * 0.3 / 3.2))


def test_the_capacity_is_found_in_a_closed_loop() -> None:
    with pytest.raises(ValidationError, match="found at the first load of the first workload"):
        make_lab(workloads=(make_workload("capacity:2", "concurrent:1"),))
    assert make_lab(workloads=(make_workload("concurrent:1", "capacity:2"),)).finds_capacity
    with pytest.raises(LabError, match="found at the first load of the first workload"):
        LABS["overload"].at("cpu", quick=False, changes={"workloads": ["mixed"]})


@pytest.mark.parametrize(("scale", "settings"), [("cpu", 12), ("gpu-80", 14)])
def test_a_grid_of_batches_and_limits_is_forecast_beside_what_is_measured(
    scale: str, settings: int
) -> None:
    lab = LABS["overload"].at(scale, quick=False)
    points = lab.points(SHAPE, CEILINGS)
    grid = searched(points)
    flags = [(p.flags.max_num_seqs, p.flags.max_num_queued_reqs) for p in grid]
    measured = [(p.flags.max_num_seqs, p.flags.max_num_queued_reqs) for p in points]
    assert len(set(flags)) == len(flags) == settings
    assert not set(flags) & set(measured)
    assert {batch for batch, _ in flags} == (
        {2, 4, 8, 16, 32} if scale == "cpu" else {8, 16, 32, 64, 128}
    )
    assert all(batch <= limit for batch, limit in flags if limit)
    assert {(p.workload.name, str(p.load)) for p in grid} == {("flood", "capacity:4")}
    assert "searched" not in lab.resolved()
    assert not searched(lab.against_itself().points(SHAPE, CEILINGS))


def test_without_a_limit_on_requests_there_is_nothing_to_look_among() -> None:
    changes = {"variants": ["unbounded", "priority"]}
    lab = LABS["overload"].at("cpu", quick=False, changes=changes)
    assert searched(lab.points(SHAPE, CEILINGS)) == []


def test_an_aa_run_finds_the_capacity_first() -> None:
    twins = LAB.against_itself()
    first, *others = twins.points(SHAPE, CEILINGS)
    assert (first.variant.name, str(first.load)) == ("unbounded", "concurrent:12")
    assert {str(p.load) for p in others} == {"capacity:0.7", "capacity:1.3", "capacity:2"}
