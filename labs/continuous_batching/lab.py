"""Continuous batching: why serve many requests at once, and why not in fixed batches?

One sequence decodes one token at a time, and for each token the device reads all the weights:
decode is bound by memory bandwidth, so a second sequence rides along nearly free. *Static*
batching sends a batch and waits for all of it: places whose completion is finished stay empty until
the longest one is done. *Continuous* batching (Orca, OSDI 2022) fills a place the moment it is
free.

The engine is the same for both; the arrivals differ. `waves:B` sends B requests and waits for all
of them, as a static batch would; `concurrent:B` keeps B in flight. With lengths that vary the wait
costs E[max L] / E[L]; with equal lengths nothing.

Turn: the spread of the lengths (`workloads.exponential.output_tokens.max_tokens`), the batch
(`workloads.exponential.loads`), and the engine's own limit (`flags.max-num-seqs`).
"""

from __future__ import annotations

from typing import Any

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


# where a batch of these lengths takes ten seconds and more: half of them
SLOWER: dict[str, Any] = {
    "workloads.exponential.output_tokens": Exponential(mean_tokens=64, max_tokens=320),
    "window_s": 21.0,
}

SWEEP = tuple(Concurrent(users=n) for n in (1, 2, 4, 8, 16))

LAB = Lab(
    name="continuous-batching",
    title="Continuous batching",
    question="Why serve many users at once, what does it cost each of them, and what is wrong with"
    " fixed batches?",
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
            title="Continuous batching beats static batches when lengths vary",
            metric="output_tokens_per_s",
            treatment=Arm(workload="exponential", load="concurrent:8"),
            baseline=Arm(workload="exponential", load="waves:8"),
            expect="rises",
            predict=static_penalty,
        ),
        Claim(
            name="static-fixed",
            title="With equal lengths continuous batching gains nothing over static batches",
            metric="output_tokens_per_s",
            treatment=Arm(workload="fixed", load="concurrent:8"),
            baseline=Arm(workload="fixed", load="waves:8"),
            expect="unchanged",
            predict=static_penalty,
        ),
        Claim(
            name="throughput",
            title="A larger batch raises throughput",
            metric="output_tokens_per_s",
            treatment=Arm(workload="exponential", load="concurrent:16"),
            baseline=Arm(workload="exponential", load="concurrent:1"),
            expect="rises",
            predict=throughput_gain,
        ),
        Claim(
            name="tpot",
            title="In a larger batch each user's TPOT is longer",
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
    scales={
        "cpu-fp32": {"curve_repeats": 3},  # where every step takes twice as long
        "gpu": {
            "slo.ttft_s": 0.5,
            "flags": {"enable-prefix-caching": False, "max-num-seqs": 256},
            "workloads.exponential.prompt_tokens.tokens": 128,
            "workloads.exponential.output_tokens": Exponential(mean_tokens=128, max_tokens=640),
            "workloads.exponential.loads": (
                *(Concurrent(users=n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
                Waves(size=32),
                Poisson(rate_per_s=8),
            ),
            "workloads.fixed.prompt_tokens.tokens": 128,
            "workloads.fixed.output_tokens.tokens": 128,
            "workloads.fixed.loads": (Concurrent(users=32), Waves(size=32)),
            "claims.static.treatment.load": "concurrent:32",
            "claims.static.baseline.load": "waves:32",
            "claims.static-fixed.treatment.load": "concurrent:32",
            "claims.static-fixed.baseline.load": "waves:32",
            "claims.throughput.treatment.load": "concurrent:256",
            "claims.tpot.treatment.load": "concurrent:256",
            "requests": 4096,
            # one sends and reads some 20,000 tokens/s; the users alone would choose as many, but
            # the forecasts on file are of settings that name the number
            "load_processes": 4,
            "window_s": 15.0,  # three waves on the slowest card of a class
            "next_knobs": (
                'SET="workloads.exponential.output_tokens.max_tokens=128" takes the tail away:'
                " watch the gain over static batches shrink",
                'SET="flags.max-num-seqs=64" lets the engine itself cap the batch: requests queue,'
                " and TTFT pays",
                'SET="flags.enforce-eager=true" goes without CUDA graphs: every small operation is'
                " launched for itself",
            ),
        },
        "gpu-48": SLOWER,
        # the classes' random weights are of smaller models, and answer more
        **{f"gpu-{gb}": {**SLOWER, "requests": 8192} for gb in (24, 141)},
        "gpu-quick": {
            "workloads.exponential.output_tokens": SLOWER["workloads.exponential.output_tokens"],
            "workloads.exponential.loads": (
                *(Concurrent(users=n) for n in (1, 8, 32, 256)),
                Waves(size=32),
            ),
            "requests": 3072,
            "window_s": 3,  # it ends with a wave
        },
    },
    quick={"window_s": 3.5, "repeats": 2},
    limits={
        "cpu": "A CPU engine shows the same scheduler as a GPU's, and so the same cost of waiting"
        " for the longest completion. The figures themselves do not carry over: a large part of a"
        " step of few requests is here the cost of launching small operations, so batching looks"
        " even cheaper than memory bandwidth alone would make it, and the ridge is where this"
        " core's arithmetic puts it: far off with matrix instructions, near without.",
        "gpu": "One GPU with one model: the knee moves with the model's size, the context length"
        " and the KV cache that is left.",
    },
    next_knobs=(
        'SET="workloads.exponential.output_tokens.max_tokens=24" takes the tail away: watch the'
        " gain over static batches shrink",
        'SET=\'workloads.exponential.loads=["concurrent:8","waves:8","concurrent:1",'
        '"concurrent:16","concurrent:32"]\' looks further along the curve',
        'SET="flags.max-num-seqs=4" lets the engine itself cap the batch: requests queue, and TTFT'
        " pays",
        'SET="flags.enforce-eager=false" compiles the model: shorter steps, a longer start',
    ),
)
