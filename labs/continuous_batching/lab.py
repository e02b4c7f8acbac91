"""Continuous batching: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent, Poisson, Waves
from loadtests.workload import Exponential, Fixed, Workload
from serving import metrics


def static_penalty(continuous: Point, static: Point) -> Prediction:
    lengths = [output for _, output in static.lengths]
    return Prediction(
        value=theory.static_batching_penalty(lengths, static.load.users),
        formula="E[max L over a batch] / E[L]",
        assumptions=(
            "a decode step takes as long with empty places as with full ones",
            "prefill is short beside decode",
        ),
        source="Yu et al., Orca, OSDI 2022",
    )


def throughput(point: Point) -> Prediction:
    return Prediction(
        value=theory.batch_throughput(
            point.shape,
            point.ceilings,
            point.load.users,
            point.prompt_tokens,
            point.output_tokens,
        ),
        kind="ceiling",
        formula="L / ((L - 1) t(B) / B + t_prefill), t(B) = max(bytes / bandwidth, FLOP / rate)",
        assumptions=(
            "reading and computing overlap perfectly within a step",
            "prefill and decode take turns on the device",
            "no launch, scheduling or sampling cost",
        ),
        source="Williams et al., Roofline, 2009",
    )


def throughput_gain(many: Point, one: Point) -> Prediction:
    return Prediction(
        value=throughput(many).value / throughput(one).value,
        formula="roofline throughput at B / at 1",
        assumptions=("the costs the roofline leaves out do not grow with B",),
        source="Williams et al., Roofline, 2009",
    )


def token_interval(point: Point) -> Prediction:
    """Predict TPOT: a step, and the prefills of others that come between two tokens of a user."""
    step_s = theory.decode_step_s(
        point.shape, point.ceilings, point.load.users, point.context_tokens
    )
    prefills_per_step = (point.load.users - 1) / point.output_tokens
    return Prediction(
        value=step_s
        + prefills_per_step * theory.prefill_s(point.shape, point.ceilings, point.prompt_tokens),
        kind="floor",
        formula="t(B) + (B - 1) / L t_prefill",
        assumptions=(
            "reading and computing overlap perfectly within a step",
            "prefill and decode take turns on the device",
            "no launch, scheduling or sampling cost",
        ),
        source="Williams et al., Roofline, 2009",
    )


def step_growth(many: Point, one: Point) -> Prediction:
    return Prediction(
        value=token_interval(many).value / token_interval(one).value,
        formula="roofline TPOT at B / at 1",
        assumptions=("the costs the roofline leaves out do not grow with B",),
        source="Williams et al., Roofline, 2009",
    )


SWEEP = tuple(Concurrent(users=n) for n in (1, 2, 4, 8, 16))

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
        Workload(
            name="exponential",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Exponential(mean_tokens=24, max_tokens=96),
            loads=(*SWEEP, Waves(size=8), Poisson(rate_per_s=2)),
        ),
        Workload(
            name="fixed",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=24),
            loads=(Concurrent(users=8), Waves(size=8)),
        ),
    ),
    claims=(
        Claim(
            name="static",
            metric="output_tokens_per_s",
            treatment=Arm(workload="exponential", load="concurrent:8"),
            baseline=Arm(workload="exponential", load="waves:8"),
            expect="rises",
            predict=static_penalty,
        ),
        Claim(
            name="static-fixed",
            metric="output_tokens_per_s",
            treatment=Arm(workload="fixed", load="concurrent:8"),
            baseline=Arm(workload="fixed", load="waves:8"),
            expect="unchanged",
            predict=static_penalty,
        ),
        Claim(
            name="throughput",
            metric="output_tokens_per_s",
            treatment=Arm(workload="exponential", load="concurrent:16"),
            baseline=Arm(workload="exponential", load="concurrent:1"),
            expect="rises",
            predict=throughput_gain,
        ),
        Claim(
            name="tpot",
            metric="tpot_mean_s",
            treatment=Arm(workload="exponential", load="concurrent:16"),
            baseline=Arm(workload="exponential", load="concurrent:1"),
            expect="rises",
            predict=step_growth,
        ),
    ),
    forecasts=(
        Forecast(
            name="throughput",
            metric="output_tokens_per_s",
            arm=Arm(workload="exponential", kind="concurrent"),
            predict=throughput,
        ),
        Forecast(
            name="tpot",
            metric="tpot_mean_s",
            arm=Arm(workload="exponential", kind="concurrent"),
            predict=token_interval,
        ),
    ),
    evidence=(
        Evidence(
            arm=Arm(),
            kind="echoes",
            metric=metrics.CACHE_CONFIG,
            label="enable_prefix_caching",
            value="False",
        ),
        Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    ),
    findings=("steps",),
    plots=("sweep", "pareto", "static", "roofline"),
    slo=SLO(ttft_s=1.0, tpot_s=0.1),
    requests=512,
    warmup_s=1,
    window_s=4.5,  # in which nine requests of the open loop are due
)
