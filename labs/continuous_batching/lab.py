"""Continuous batching: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    ANY,
    counter,
    echoes,
    forecast,
    predicts,
    rises,
    sends,
    unchanged,
    users,
)
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import ROOFLINE
from loadtests.arrivals import Poisson, Waves
from loadtests.workload import Exponential
from serving import metrics

OVERLAPS = "reading and computing overlap perfectly within a step"
IN_TURN = "prefill and decode take turns on the device"
NO_COST = "no launch, scheduling or sampling cost"
NO_GROWTH = "the costs the roofline leaves out do not grow with B"


@predicts(
    "E[max L over a batch] / E[L]",
    "a decode step takes as long with empty places as with full ones",
    "prefill is short beside decode",
    source="Yu et al., Orca, OSDI 2022",
)
def static_penalty(continuous: Point, static: Point) -> float:
    lengths = [output for _, output in static.lengths]
    return theory.static_batching_penalty(lengths, static.load.users)


@predicts(
    "L / ((L - 1) t(B) / B + t_prefill), t(B) = max(bytes / bandwidth, FLOP / rate)",
    OVERLAPS,
    IN_TURN,
    NO_COST,
    source=ROOFLINE,
    kind="ceiling",
)
def throughput(point: Point) -> float:
    return theory.throughput_of(point)


@predicts("roofline throughput at B / at 1", NO_GROWTH, source=ROOFLINE)
def throughput_gain(many: Point, one: Point) -> float:
    return theory.throughput_of(many) / theory.throughput_of(one)


def interval_s(point: Point) -> float:
    """Return TPOT: a step, and the prefills of others that come between two tokens of a user."""
    prefills_per_step = (point.load.users - 1) / point.output_tokens
    return theory.step_of(point) + prefills_per_step * theory.prefill_of(point)


@predicts("t(B) + (B - 1) / L t_prefill", OVERLAPS, IN_TURN, NO_COST, source=ROOFLINE, kind="floor")
def token_interval(point: Point) -> float:
    return interval_s(point)


@predicts("roofline TPOT at B / at 1", NO_GROWTH, source=ROOFLINE)
def step_growth(many: Point, one: Point) -> float:
    return interval_s(many) / interval_s(one)


STATIC, MANY, CLOSED = "concurrent:8 / waves:8", "concurrent:16 / concurrent:1", "concurrent"

LAB = Lab(
    name="continuous-batching",
    answers=("SO-1", "SD-1", "IP-3", "IP-7", "ME-1"),
    variants=(Variant(name="base"),),
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,  # nothing may be cheaper the second time
        "enforce-eager": True,  # a compiled start takes a minute longer and gains 15% here
        "kv-cache-memory-bytes": 2**30,
    },
    workloads=(
        sends(
            "exponential",
            32,
            Exponential(mean_tokens=24, max_tokens=96),
            *users(1, 2, 4, 8, 16),
            Waves(size=8),
            Poisson(rate_per_s=2),
        ),
        sends("fixed", 32, 24, *users(8), Waves(size=8)),
    ),
    claims=(
        rises("static", "output_tokens_per_s", ANY, "exponential", STATIC, by=static_penalty),
        unchanged("static-fixed", "output_tokens_per_s", ANY, "fixed", STATIC, by=static_penalty),
        rises("throughput", "output_tokens_per_s", ANY, "exponential", MANY, by=throughput_gain),
        rises("tpot", "tpot_mean_s", ANY, "exponential", MANY, by=step_growth),
    ),
    forecasts=(
        forecast("throughput", "output_tokens_per_s", throughput, ANY, "exponential", CLOSED),
        forecast("tpot", "tpot_mean_s", token_interval, ANY, "exponential", CLOSED),
    ),
    evidence=(
        *echoes(metrics.CACHE_CONFIG, "enable_prefix_caching", {"": "False"}),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    findings=("steps",),
    plots=("sweep", "pareto", "static", "roofline"),
    slo=SLO(ttft_s=1.0, tpot_s=0.1),
    requests=512,
    warmup_s=1,
    window_s=4.5,  # in which nine requests of the open loop are due
)
