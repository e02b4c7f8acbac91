"""Overload: what becomes of a server that is sent more than it can serve, and what mends it?

An open loop does not wait for answers: people come whether or not the last ones have been served.
Below the capacity mu a queue is short. Above it, at lambda requests a second, the queue grows by
lambda - mu every second, and a request that is sent at the time t waits t (lambda - mu) / mu before
its first token. Once that passes what people will wait for, at t* = SLO mu / (lambda - mu), *every*
later answer comes too late. The engine works as hard as ever and its throughput is at its best, but
nobody is served in time: goodput falls to nothing.

*Admission control* turns away what could not be answered in time anyhow. With a limit on the
requests in the engine (`max-num-queued-reqs`) the wait has a bound, and goodput stays near
min(lambda, mu): those that are let in are served in time, the others know at once (HTTP 503) that
they are to ask elsewhere. `max-num-queued-tokens` sets the same bound in prompt tokens. vLLM has
these limits since 0.32; before an earlier one the load generator holds them, by the same rule. A
*priority* (`scheduling-policy`) turns nobody away, and lets one class of requests pass the others.

The loads are multiples of the capacity, which is found first: it is what the engine without a limit
completes in a closed loop that keeps its batch full (`concurrent`), in the first repeat. The rates
of all later trials are set by that figure alone. The forecast finds its own capacity in the same
way, in virtual time.

Which batch and which limit serve most in time is looked for by forecast, over a grid of both at the
heaviest load, before any engine starts; a few of them are measured.

An operator would rather see it coming. On a ramp, and on a compressed day if asked for
(`day:0.3/1.4`), each signal has a threshold that was set beforehand, and the time from its alarm
to the first request that comes too late is held against the forecast's.

Turn: the limit (`variants.capped.flags.max-num-queued-reqs`), the batch (`flags.max-num-seqs`),
what people will wait for (`slo.ttft_s`), the loads (`workloads.mixed.loads`).
"""

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


def knobs(limit: int, patience_s: int) -> tuple[str, ...]:
    return (
        f'SET="variants.capped.flags.max-num-queued-reqs={limit}" lets more wait: they are served,'
        " too late",
        f'SET="slo.ttft_s={patience_s}" is for patient people: answers come'
        " too late only after a longer time",
        'SET=\'workloads.mixed.loads=["capacity:0.7","capacity:1.1","capacity:1.5"]\' looks'
        " closer at the loads near the capacity (claims about other loads are left out)",
        'SET="admission_by_client=true" has the load generator hold the limits, as it does where'
        " the engine's vLLM has none",
    )


UNBOUNDED = Variant(name="unbounded")
CAPPED = UNBOUNDED.but("capped", {"max-num-queued-reqs": 11})

LAB = Lab(
    name="overload",
    title="Overload and admission control",
    question="More people come than a server can serve: who is still served in time, and is it"
    " better to turn some away?",
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
            title="At twice the capacity, turning requests away keeps goodput up",
            metric="goodput_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:2"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:2"),
            expect="rises",
            predict=goodput_ratio,
        ),
        Claim(
            name="slight",
            title="At 1.3 times the capacity, turning requests away keeps goodput up",
            metric="goodput_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:1.3"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:1.3"),
            expect="rises",
            predict=goodput_ratio,
        ),
        Claim(
            name="below",
            title="Below the capacity a limit on requests costs no goodput",
            metric="goodput_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:0.7"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:0.7"),
            expect="unchanged",
            predict=goodput_ratio,
            margin=0.1,
        ),
        Claim(
            name="work",
            title="The engine works as hard with a limit on requests as without",
            metric="output_tokens_per_s",
            treatment=Arm(variant="capped", workload="mixed", load="capacity:2"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:2"),
            expect="unchanged",
            predict=as_much,
        ),
        Claim(
            name="priority",
            title="A priority saves the urgent requests, and turns nobody away",
            metric="goodput_per_s",
            treatment=Arm(variant="priority", workload="classes", load="capacity:2"),
            baseline=Arm(variant="unbounded", workload="mixed", load="capacity:2"),
            expect="rises",
            predict=priority_ratio,
            coupled="an engine without this policy refuses a request that names a priority",
        ),
        Claim(
            name="tokens",
            title="A limit in prompt tokens keeps goodput up as well as a limit in requests",
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
            title="A larger batch serves more of a flood within the SLO",
            metric="goodput_per_s",
            treatment=Arm(variant="wide", workload="flood"),
            baseline=Arm(variant="capped", workload="flood"),
            expect="rises",
            predict=batch_ratio,
            coupled="the limit on requests counts those in the batch, so it grows with the batch",
        ),
        Claim(
            name="narrow",
            title="A small batch costs throughput, and so dollars a token",
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
    scales={
        "gpu": {
            "flags": {
                "max-model-len": 4096, "max-num-seqs": 32, "enable-prefix-caching": False,
            },
            "variants.capped.flags.max-num-queued-reqs": 48,
            "variants.capped-tokens.flags.max-num-queued-tokens": 16 * 256,
            "variants.narrow.flags.max-num-seqs": 8,
            "variants.narrow.flags.max-num-queued-reqs": 24,
            "variants.wide.flags.max-num-seqs": 128,
            "variants.wide.flags.max-num-queued-reqs": 144,
            **{
                f"workloads.{name}.{part}.tokens": tokens
                for name in ("saturated", "mixed", "classes", "flood", "rising")
                for part, tokens in (("prompt_tokens", 256), ("output_tokens", 128))
            },
            "workloads.saturated.loads": (Concurrent(users=48),),
            "slo.ttft_s": 2.0,
            "requests": 4096,
            "warmup_s": 1,
            "window_s": 10,
            "load_processes": 4,  # for its open loops, by which no run chooses a number
            "next_knobs": knobs(limit=128, patience_s=6),
        },
        "gpu-quick": {"flags.max-model-len": 8192},  # as in other labs
    },
    quick={"repeats": 1},  # a shorter window would end before anyone is late
    limits={
        "cpu": "The scheduler, its queue and its limits are vLLM's own, so what overload does to"
        " goodput carries over, in multiples of the capacity. The best batch does not: a large"
        " part of a step here is the cost of launching small operations, so a larger batch looks"
        " cheaper than on a GPU.",
        "gpu": "One engine, equal lengths. A fleet turns a request away from one engine and sends"
        " it to another; clients here do not try again, and real ones that do make it worse.",
    },
    next_knobs=knobs(limit=32, patience_s=2),
)  # fmt: skip
