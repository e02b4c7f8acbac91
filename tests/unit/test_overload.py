"""The lab of overload: its predictions by hand, how its capacity is found, what its runs say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from labs import LABS
from labs.harness.analysis.computed import PointForecasts, Predictions, Searched
from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.signals import BATCH, KV, QUEUE, SIGNALS, TTFT, Watch, Watched
from labs.harness.derived.alarms import alarms
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Lab, LabError, Point, Variant
from labs.harness.storage.writing import write_json
from labs.overload.facts import admission, best_flags, classes, signals
from labs.overload.lab import searched
from loadtests.plan import QueueLimits
from tests.unit.builders import CEILINGS, SHAPE, make_lab, make_record, make_workload
from tests.unit.judged import context, judged_run, played, withheld

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


@pytest.mark.parametrize(("scale", "settings"), [("cpu", 15), ("gpu-80", 14)])
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
        {2, 4, 8, 16, 32, 64} if scale == "cpu" else {64, 128, 256, 512, 1024}
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


# ------------------------------------------------------------------------- what a run says of it


def overloaded(home: Path, by_client: bool = False, not_valid: str = "") -> JudgedRun:
    """Two in a batch; the capacity is 2 req/s, and a request may wait for a second."""
    plain = Variant(name="unbounded", flags={"max-num-seqs": 2})
    lab = make_lab(
        variants=(
            plain,
            plain.but("capped", {"max-num-queued-reqs": 4}),
            plain.but("priority", {"scheduling-policy": "priority"}),
        ),
        workloads=(
            make_workload("concurrent:3", name="full", only=("unbounded",)),
            make_workload("capacity:0.5", "capacity:2", name="mixed", only=("unbounded", "capped")),
            make_workload("capacity:2", name="two", only=("priority",), priorities=(0, 1)),
            make_workload("ramp:0.5/2.5", name="rising", only=("unbounded",)),
        ),
        claims=(), evidence=(), admission_by_client=by_client,
    )  # fmt: skip
    slow, half, most = "unbounded/mixed/capacity-2", "unbounded/mixed/capacity-0.5", CAPPED
    found = context(home, lab, {
        "unbounded/full/concurrent-3": {"requests_per_s": [2.0, 2.5]},
        half: {"goodput_per_s": 1.0},
        slow: {"goodput_per_s": 0.5, "output_tokens_per_s": 8.0},
        most: {"goodput_per_s": 1.9, "output_tokens_per_s": 7.0, "turned_away_rate": 0.5},
    })  # fmt: skip
    in_time, late = ([(first, 1), (first + 0.1, 1)] for first in (11.0, 15.5))
    first, second = make_record(in_time, sent_s=10.5), make_record(late, sent_s=12.5, index=1)
    played(found, half, [make_record([(10.5, 1), (11.0, 1)])])
    played(found, slow, [first, second])
    played(found, most, [first, make_record([], error="HTTP 503: busy")])
    played(found, "priority/two/capacity-2", [first, second])
    sent = ((12.0, 12.4), (12.1, 12.4), (14.0, 15.5))
    played(found, RISING, [make_record([(came, 1)], sent_s=at) for at, came in sent])
    return judged_run(withheld(found, not_valid))


CAPPED, RISING = "capped/mixed/capacity-2", "unbounded/rising/ramp-0.5-2.5"


def values(*quantities: Quantity) -> list[float | None]:
    return [quantity.value for quantity in quantities]


def test_goodput_stands_beside_what_was_offered(tmp_path: Path) -> None:
    """A fluid at twice the capacity is late after 1 / (2 - 1) s; the first late one came at 12.5 s.

    Rates are multiples of the capacity of the first repeat, not of the mean.
    """
    found = admission(overloaded(tmp_path))
    half, slow, capped = found.rows
    columns = ("offered_per_s", "late_from_s", "fluid_late_from_s")
    assert [half[name].value for name in columns] == [0.1, None, None]
    assert [slow[name].value for name in columns] == [0.2, 12.5, 1]
    assert values(capped["turned_away"], capped["late_from_s"], slow["gain"]) == [0.5, None, None]
    assert capped["gain"].value == pytest.approx(1.9 / 0.5)
    assert found["capacity_per_s"].value == 2
    assert found["window_s"].value == 4
    assert (found.without, found.limited) == (slow, capped)


def test_a_limit_that_the_client_holds_is_called_so(tmp_path: Path) -> None:
    run = overloaded(tmp_path, by_client=True)
    assert admission(run).limited_by == {"unbounded": "nobody", "capped": "client"}
    limits = {of.variant: (of.limits, of.by_client) for of in best_flags(run).tried}
    assert limits["capped"] == (QueueLimits(requests=4), True)
    assert limits["unbounded"] == (QueueLimits(), False)


def test_a_class_that_is_served_first_is_told_from_the_other(tmp_path: Path) -> None:
    found = classes(overloaded(tmp_path))
    assert found["times"].value == 2
    served = [
        (c.variant, *values(c["priority"], c["in_time"], c["ttft_mean_s"])) for c in found.rows
    ]
    assert served == [
        ("priority", 0, 1, 0.5), ("priority", 1, 0, 3), ("unbounded", None, 0.5, 1.75),
    ]  # fmt: skip


def test_the_best_flags_may_differ_for_goodput_and_for_throughput(tmp_path: Path) -> None:
    """Of those that are valid; runs from before there was a search have no other."""
    found = best_flags(overloaded(tmp_path))
    unbounded, capped, _ = found.tried
    assert (found.goodput.measured, found.throughput.measured) == (capped, unbounded)
    assert (found.goodput.foreseen, found.goodput.searched) == ("not forecast", None)
    # 8 tokens a second are 28,800 an hour; no larger batch than 2 was offered
    assert found.throughput.measured
    assert found.throughput.measured.usd_at_one_an_hour.value == pytest.approx(1e6 / 28_800)
    assert found.throughput.at_edge
    assert found.prompt_tokens == 6
    larger = replace(found.tried[1], batch=4)
    assert not replace(found, tried=(unbounded, larger)).throughput.at_edge
    not_valid = best_flags(overloaded(tmp_path / "b", not_valid=CAPPED)).goodput
    assert (not_valid.measured, not_valid.all_are_valid) == (unbounded, False)


@pytest.mark.parametrize(
    ("goodput", "is_open"), [([3.0, 3.1, 3.0], False), ([3.0, 1.5, 3.0], True)]
)
def test_the_best_batch_is_open_where_the_next_may_serve_as_much(
    goodput: list[float], is_open: bool, tmp_path: Path
) -> None:
    """Of those with one kind of limit: what has another serves most, and decides nothing."""
    narrow = Variant(name="narrow", flags={"max-num-seqs": 2, "max-num-queued-reqs": 4})
    tokens = Variant(name="tokens", flags={"max-num-seqs": 2, "max-num-queued-tokens": 24})
    lab = make_lab(
        variants=(narrow, narrow.but("wide", {"max-num-seqs": 4}), tokens),
        workloads=(
            make_workload("concurrent:3", name="full", only=("narrow",)),
            make_workload("capacity:4", name="flood"),
        ),
        claims=(), evidence=(),
    )  # fmt: skip
    found = best_flags(judged_run(context(tmp_path, lab, {
        "narrow/flood/capacity-4": {"goodput_per_s": [2.0, 2.1, 2.0]},
        "wide/flood/capacity-4": {"goodput_per_s": goodput},
        "tokens/flood/capacity-4": {"goodput_per_s": [4.0, 4.0, 4.1]},
    })))  # fmt: skip
    pair = found.goodput.batches
    assert pair
    assert (pair.variant, pair.batch, pair.other, pair.other_batch, pair.is_open) == (
        "wide", 4, "narrow", 2, is_open,
    )  # fmt: skip
    assert found.throughput.batches is None


def test_the_best_of_what_was_only_forecast_is_named(tmp_path: Path) -> None:
    run = overloaded(tmp_path)
    grid = tuple(
        Searched(
            flags={"max-num-seqs": batch, "max-num-queued-reqs": 2 * batch},
            figures={"goodput_per_s": goodput, "output_tokens_per_s": tokens_per_s},
        )
        for batch, goodput, tokens_per_s in ((4, 2.5, 9.0), (8, 2.0, 12.0))
    )
    write_forecasts(run, searched=grid)
    found = best_flags(run)
    assert (found.goodput.searched, found.throughput.searched) == found.searched
    assert [(s.variant, s.batch, s.limits.requests) for s in found.searched] == [
        (None, 4, 8), (None, 8, 16),
    ]  # fmt: skip


def write_forecasts(run: JudgedRun, **forecasts: Any) -> None:
    played = PointForecasts(**{"points": {}, **forecasts})
    predictions = Predictions(effects={}, forecasts={}, in_virtual_time=played)
    write_json(run.folder.path / "predictions.json", predictions)


def test_the_queue_sees_an_overload_coming_and_a_full_batch_does_not(tmp_path: Path) -> None:
    """Two wait from 12.1 s on, where one did at the steady load; one sent at 14 s is too late."""
    found = signals(overloaded(tmp_path))
    assert {s.name: s["alarms"].value for s in found.rows} == {
        QUEUE: 2,
        BATCH: 0,
        KV: 0,
        TTFT: 0,
    }
    (queue,) = (signal for signal in found.rows if signal["lead_s"].known)
    assert values(queue["lead_s"], found["breach_s"]) == [pytest.approx(1.9), 14]


def test_alarms_stand_beside_those_in_virtual_time(tmp_path: Path) -> None:
    """Two wait from 12.1 s to 12.4 s, as many as a batch has. One sent at 14 s may wait 1 s.

    So the SLO is broken at 15 s, when the queue has been short for more than 2 s: a false alarm.
    """
    run = overloaded(tmp_path)
    silent = Watched(crossed_s=None, lead_s=None, false_alarms=0)
    led = Watched(crossed_s=10.0, lead_s=3.0, false_alarms=1)
    foreseen = Watch(breach_s=13.0, signals={**dict.fromkeys(SIGNALS, silent), QUEUE: led})
    write_forecasts(run, watches={RISING: (foreseen,)})
    (of,) = alarms(run)
    assert (of.measured.broken, of.forecast.broken) == (2, 1)
    assert values(of.measured.breach_s, of.forecast.breach_s) == [15, 13]
    queue = of.alarms[0]
    assert values(queue.threshold, queue.measured.lead_s, queue.forecast.lead_s) == [2, None, 3]
    assert [(said.led, said.false_alarms) for said in (queue.measured, queue.forecast)] == [
        (0, 2), (1, 1),
    ]  # fmt: skip
    assert {a.signal: a.also_healthy for a in of.alarms} == {QUEUE: 0, BATCH: 0, KV: 0, TTFT: 2}
    assert of.first is None  # as none led in every trial
    # one that led in both trials is first
    early = replace(queue, measured=replace(queue.measured, led=2, lead_s=Quantity(29, "s")))
    both = replace(of, measured=replace(of.measured, broken=2), alarms=(early,))
    assert both.first == early
    earlier = replace(early, measured=replace(early.measured, lead_s=Quantity(31, "s")))
    assert replace(both, alarms=(early, earlier)).first == earlier
    # what a healthy load sets off as well is no sign of too much
    set_off = replace(earlier, also_healthy=1)
    of_load = replace(both, alarms=(early, set_off))
    assert (of_load.first, of_load.set_off) == (early, [set_off])
