"""Overload: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent, Offered, Ramp
from loadtests.workload import Fixed, Workload
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


def goodput_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=fluid_goodput(treatment) / fluid_goodput(baseline),
        formula="min(lambda, mu) with a limit / lambda times the share sent before"
        " t* = SLO mu / (lambda - mu) without",
        assumptions=FLUID,
        source=QUEUEING,
    )


def priority_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=fluid_goodput(treatment) / fluid_goodput(baseline),
        formula="(lambda_urgent + those of the others that are sent before their own t*, at"
        " mu - lambda_urgent) / lambda times the share sent before t* = SLO mu / (lambda - mu)",
        assumptions=FLUID,
        source=QUEUEING,
    )


def as_much(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=1.0,
        formula="mu / mu",
        assumptions=("the batch is full with a limit and without",),
        source=QUEUEING,
    )


def as_good(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=1.0,
        formula="min(lambda, mu) / min(lambda, mu)",
        assumptions=("either limit lets so many wait as are served within the SLO",),
        source=QUEUEING,
    )


def completed_per_s(point: Point) -> float:
    """Compute the requests/s of a full batch of `max-num-seqs` on the roofline."""
    tokens_per_s = theory.batch_throughput(
        point.shape,
        point.ceilings,
        point.flags.max_num_seqs,
        point.prompt_tokens,
        point.output_tokens,
    )
    return tokens_per_s / point.output_tokens


def batch_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=completed_per_s(treatment) / completed_per_s(baseline),
        formula="roofline throughput of a batch of max-num-seqs / of the other",
        assumptions=(
            "both batches are full",
            "the costs the roofline leaves out do not grow with the batch",
        ),
        source="Williams et al., Roofline, 2009",
    )


IN_ENGINE = (1.0, 1.25, 1.5)  # limits on requests, in multiples of the batch: 1 lets nobody wait


def searched(points: Sequence[Point]) -> list[Point]:
    """List a grid of batches and of limits at the flood, of which only a forecast is made.

    The batches are the powers of two from the smallest that is measured to the largest.
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
    batches = [2**i for i in range(largest.bit_length()) if smallest <= 2**i <= largest]
    grid = dict.fromkeys((b, math.ceil(times * b)) for b in batches for times in IN_ENGINE)
    return [
        replace(base, variant=base.variant.but(
            f"batch-{b}-limit-{limit}", {"max-num-seqs": b, "max-num-queued-reqs": limit}
        ))
        for b, limit in grid
        if (b, limit) not in measured
    ]  # fmt: skip


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
        Workload(
            name="saturated",
            prompt_tokens=Fixed(tokens=24),
            output_tokens=Fixed(tokens=12),
            only=("unbounded",),
            loads=(Concurrent(users=12),),  # four always wait, so that the batch is full
        ),
        Workload(
            name="mixed",
            prompt_tokens=Fixed(tokens=24),
            output_tokens=Fixed(tokens=12),
            only=("unbounded", "capped"),
            loads=tuple(Offered(times=x) for x in (0.7, 1, 1.3, 2)),
        ),
        Workload(
            name="classes",
            prompt_tokens=Fixed(tokens=24),
            output_tokens=Fixed(tokens=12),
            priorities=(0, *[1] * (URGENT_EVERY - 1)),  # lower is served first
            only=("priority",),
            loads=(Offered(times=2),),
        ),
        Workload(
            name="flood",
            prompt_tokens=Fixed(tokens=24),
            output_tokens=Fixed(tokens=12),
            only=("capped", "capped-tokens", "narrow", "wide"),
            loads=(Offered(times=4),),  # more than any of them serves
        ),
        Workload(
            name="rising",
            prompt_tokens=Fixed(tokens=24),
            output_tokens=Fixed(tokens=12),
            only=("unbounded",),
            loads=(Ramp(first=0.5, last=2.5),),
        ),
    ),
    claims=(
        Claim(
            name="overload",
            metric="goodput_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:2"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:2"),
            expect="rises",
            predict=goodput_ratio,
        ),
        Claim(
            name="slight",
            metric="goodput_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:1.3"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:1.3"),
            expect="rises",
            predict=goodput_ratio,
        ),
        Claim(
            name="below",
            metric="goodput_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:0.7"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:0.7"),
            expect="unchanged",
            predict=goodput_ratio,
            margin=0.1,
        ),
        Claim(
            name="work",
            metric="output_tokens_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:2"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:2"),
            expect="unchanged",
            predict=as_much,
        ),
        Claim(
            name="priority",
            metric="goodput_per_s",
            treatment=Arm(variant="priority", workload="classes", load="capacity:2"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:2"),
            expect="rises",
            predict=priority_ratio,
            coupled="an engine without this policy refuses a request that names a priority",
        ),
        Claim(
            name="tokens",
            metric="goodput_per_s",
            treatment=Arm(variant="capped-tokens", workload="flood"),
            baseline=Arm(variant="capped", workload="flood"),
            expect="unchanged",
            predict=as_good,
            margin=0.1,
            coupled="each limit has a flag of its own",
        ),
        Claim(
            name="wide",
            metric="goodput_per_s",
            treatment=Arm(variant="wide", workload="flood"),
            baseline=Arm(variant="capped", workload="flood"),
            expect="rises",
            predict=batch_ratio,
            coupled="the limit on requests counts those in the batch, so it grows with the batch",
        ),
        Claim(
            name="narrow",
            metric="output_tokens_per_s",
            treatment=Arm(variant="narrow", workload="flood"),
            baseline=Arm(variant="capped", workload="flood"),
            expect="falls",
            predict=batch_ratio,
            coupled="the limit on requests counts those in the batch, so it shrinks with the batch",
        ),
    ),
    evidence=(
        *(
            Evidence(
                arm=Arm(variant=name, workload=workload, load=load),
                kind="rises",
                metric=metrics.TURNED_AWAY,
            )
            for name, workload, load in (
                ("capped", "mixed", "capacity:2"), ("capped", "flood", None),
                ("capped-tokens", "flood", None), ("narrow", "flood", None),
            )
        ),
        # the wide batch may serve all of the flood, so that its limit has nothing to turn away
        Evidence(arm=Arm(variant="wide"), kind="stays", metric=metrics.PREEMPTIONS),
        Evidence(arm=Arm(variant="unbounded"), kind="stays", metric=metrics.TURNED_AWAY),
        Evidence(arm=Arm(variant="priority"), kind="stays", metric=metrics.TURNED_AWAY),
        Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    ),
    searched=searched,
    findings=("admission", "classes", "best-flags", "signals", "alarms"),
    plots=("goodput", "ramp"),
    slo=SLO(ttft_s=0.6, tpot_s=0.15),
    requests=512,
    warmup_s=0.3,
    window_s=3.2,
    repeats=4,
)  # fmt: skip
