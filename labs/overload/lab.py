"""Overload: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from labs.harness.spec import theory
from labs.harness.spec.declare import counter, falls, predicts, rises, sends, unchanged, users
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import ROOFLINE
from loadtests.arrivals import Offered, Ramp
from serving import metrics

FLUID = (
    "requests flow as a fluid: no bursts",
    "the batch is full from the beginning on",
    "the engine completes as much under overload as in the closed loop",
)
QUEUEING = "fluid limit of a queue; Newell, Applications of Queueing Theory, 1982"
LEAST_SHARE = 0.01  # of what is sent: so that a ratio exists where nothing is served in time
URGENT_EVERY = 3  # the share of requests that are urgent, where there are two classes


def offered(point: Point) -> float:
    """Return the rate that is sent, in multiples of the capacity."""
    assert isinstance(point.load, Offered)
    return point.load.times


def served_in_time(point: Point, load: float) -> float:
    """Return the share of the requests sent in the window that are sent before t*.

    `load` is the rate in multiples of the rate at which they are served, so that t* = SLO /
    (load - 1), counted from the trial's beginning.
    """
    assert point.slo
    if load <= 1:
        return 1.0
    start_s, end_s = point.measured_s
    until_s = min(end_s, point.slo.ttft_s / (load - 1))
    return max(LEAST_SHARE, (until_s - start_s) / (end_s - start_s))


def fluid_goodput(point: Point) -> float:
    """Return goodput in multiples of the capacity, as a fluid would have it."""
    load = offered(point)
    if point.flags.turns_away:
        return min(load, 1.0)
    if not point.workload.priorities:
        return load * served_in_time(point, load)
    urgent = load / URGENT_EVERY
    if urgent >= 1:
        return urgent * served_in_time(point, urgent)
    ordinary = load - urgent  # are served with what the urgent ones leave
    return urgent + ordinary * served_in_time(point, ordinary / (1 - urgent))


@predicts(
    "min(lambda, mu) with a limit / lambda times the share sent before"
    " t* = SLO mu / (lambda - mu) without",
    *FLUID,
    source=QUEUEING,
)
def goodput_ratio(treatment: Point, baseline: Point) -> float:
    return fluid_goodput(treatment) / fluid_goodput(baseline)


@predicts(
    "(lambda_urgent + those of the others that are sent before their own t*, at"
    " mu - lambda_urgent) / lambda times the share sent before t* = SLO mu / (lambda - mu)",
    *FLUID,
    source=QUEUEING,
)
def priority_ratio(treatment: Point, baseline: Point) -> float:
    return fluid_goodput(treatment) / fluid_goodput(baseline)


@predicts("mu / mu", "the batch is full with a limit and without", source=QUEUEING)
def as_much(treatment: Point, baseline: Point) -> float:
    return 1.0


@predicts(
    "min(lambda, mu) / min(lambda, mu)",
    "either limit lets so many wait as are served within the SLO",
    source=QUEUEING,
)
def as_good(treatment: Point, baseline: Point) -> float:
    return 1.0


def completed_per_s(point: Point) -> float:
    """Compute the requests/s of a full batch of `max-num-seqs` on the roofline."""
    return theory.throughput_of(point, point.flags.max_num_seqs) / point.output_tokens


@predicts(
    "roofline throughput of a batch of max-num-seqs / of the other",
    "both batches are full",
    "the costs the roofline leaves out do not grow with the batch",
    source=ROOFLINE,
)
def batch_ratio(treatment: Point, baseline: Point) -> float:
    return completed_per_s(treatment) / completed_per_s(baseline)


IN_ENGINE = (1.0, 1.25, 1.5)  # limits on requests, in multiples of the batch: 1 lets nobody wait


def searched(points: Sequence[Point]) -> list[Point]:
    """List a grid of batches and of limits at the flood, of which only a forecast is made.

    The batches are the powers of two from the smallest that is measured to twice the largest, so
    that the best one has neighbours on both sides.
    """
    measured = {
        (p.flags.max_num_seqs, limit): p
        for p in points
        if p.workload.name == "flood" and (limit := p.flags.max_num_queued_reqs)
    }
    if not measured:
        return []
    smallest, largest = (of(batch for batch, _ in measured) for of in (min, max))
    base = next(iter(measured.values()))
    batches = [2**i for i in range(largest.bit_length() + 1) if smallest <= 2**i <= 2 * largest]
    grid = dict.fromkeys((b, math.ceil(times * b)) for b in batches for times in IN_ENGINE)

    def limited(batch: int, limit: int) -> Variant:
        flags = {"max-num-seqs": batch, "max-num-queued-reqs": limit}
        return base.variant.but(f"batch-{batch}-limit-{limit}", flags)

    return [replace(base, variant=limited(*at)) for at in grid if at not in measured]


def times(multiple: float) -> Offered:
    """Offer a multiple of the capacity."""
    return Offered(times=multiple)


LIMITED = "capped / unbounded"
UNBOUNDED = Variant(name="unbounded")
CAPPED = UNBOUNDED.but("capped", {"max-num-queued-reqs": 11})

LAB = Lab(
    name="overload",
    answers=("SO-2", "SD-2", "SD-3", "SA-5"),
    variants=(
        UNBOUNDED,
        CAPPED,
        UNBOUNDED.but("capped-tokens", {"max-num-queued-tokens": 3 * 24}),
        UNBOUNDED.but("priority", {"scheduling-policy": "priority"}),
        CAPPED.but("narrow", {"max-num-seqs": 2, "max-num-queued-reqs": 3}),
        CAPPED.but("wide", {"max-num-seqs": 32, "max-num-queued-reqs": 40}),
    ),
    flags={
        "max-model-len": 512,
        "max-num-seqs": 8,
        "max-num-batched-tokens": 512,
        "enable-prefix-caching": False,  # nothing may be cheaper the second time
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        sends("saturated", 24, 12, *users(12), only=("unbounded",)),  # four wait: the batch is full
        sends("mixed", 24, 12, *map(times, (0.7, 1, 1.3, 2)), only=("unbounded", "capped")),
        sends(
            "classes",
            24,
            12,
            times(2),
            priorities=(0, *[1] * (URGENT_EVERY - 1)),  # lower is served first
            only=("priority",),
        ),
        sends(
            "flood",
            24,
            12,
            times(4),  # more than any of them serves
            only=("capped", "capped-tokens", "narrow", "wide"),
        ),
        sends("rising", 24, 12, Ramp(first=0.5, last=2.5), only=("unbounded",)),
    ),
    claims=(
        rises("overload", "goodput_per_s", LIMITED, "mixed", times(2), by=goodput_ratio),
        rises("slight", "goodput_per_s", LIMITED, "mixed", times(1.3), by=goodput_ratio),
        unchanged(
            "below", "goodput_per_s", LIMITED, "mixed", times(0.7), by=goodput_ratio, margin=0.1
        ),
        unchanged("work", "output_tokens_per_s", LIMITED, "mixed", times(2), by=as_much),
        rises(
            "priority",
            "goodput_per_s",
            "priority / unbounded",
            "classes / mixed",
            times(2),
            by=priority_ratio,
            coupled="an engine without this policy refuses a request that names a priority",
        ),
        unchanged(
            "tokens",
            "goodput_per_s",
            "capped-tokens / capped",
            "flood",
            by=as_good,
            margin=0.1,
            coupled="each limit has a flag of its own",
        ),
        rises(
            "wide",
            "goodput_per_s",
            "wide / capped",
            "flood",
            by=batch_ratio,
            coupled="the limit on requests counts those in the batch, so it grows with the batch",
        ),
        falls(
            "narrow",
            "output_tokens_per_s",
            "narrow / capped",
            "flood",
            by=batch_ratio,
            coupled="the limit on requests counts those in the batch, so it shrinks with the batch",
        ),
    ),
    evidence=(
        counter(metrics.TURNED_AWAY, "rises", "capped", "mixed", times(2)),
        counter(metrics.TURNED_AWAY, "rises", "capped", "flood"),
        counter(metrics.TURNED_AWAY, "rises", "capped-tokens", "flood"),
        counter(metrics.TURNED_AWAY, "rises", "narrow", "flood"),
        # the wide batch may serve all of the flood, so that its limit has nothing to turn away
        counter(metrics.PREEMPTIONS, "stays", "wide"),
        counter(metrics.TURNED_AWAY, "stays", "unbounded"),
        counter(metrics.TURNED_AWAY, "stays", "priority"),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    searched=searched,
    findings=("admission", "classes", "best-flags", "signals", "alarms"),
    plots=("goodput", "ramp"),
    slo=SLO(ttft_s=0.6, tpot_s=0.15),
    requests=512,
    warmup_s=0.3,
    window_s=3.2,
    repeats=4,
)
