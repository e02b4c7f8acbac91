"""Chunked prefill: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Contended
from loadtests.workload import Exponential, Fixed, Intruder, Workload
from serving import metrics


def long_prompt_tokens(point: Point) -> int:
    assert point.workload.intruder
    return point.workload.intruder.prompt_tokens


def chunk_tokens(point: Point) -> int:
    """Return the tokens that a step has left for the long prompt, after one for each stream."""
    return point.flags.max_num_batched_tokens - point.load.users


def context_tokens(point: Point) -> float:
    """Return the mean context of the streams, without the long prompts among them."""
    own = [(p, o) for p, o in point.lengths if p != long_prompt_tokens(point)]
    return sum(p + o / 2 for p, o in own) / len(own)


def stall(point: Point) -> Prediction:
    return Prediction(
        value=theory.chunk_step_s(
            point.shape,
            point.ceilings,
            point.load.users,
            context_tokens(point),
            long_prompt_tokens(point),
            chunk_tokens(point),
        ),
        kind="floor",
        formula="max(bytes / bandwidth, FLOP / rate) of B decoding and the prompt's last piece,"
        " min(budget - B, prompt) tokens",
        assumptions=("perfect overlap", "no launch, scheduling or sampling cost"),
        source="Agrawal et al., Sarathi-Serve, OSDI 2024",
    )


def stall_ratio(chunked: Point, whole: Point) -> Prediction:
    return Prediction(
        value=stall(chunked).value / stall(whole).value,
        formula="the longest step, max(bytes / bandwidth, FLOP / rate), with a piece / whole",
        assumptions=("what the roofline leaves out is a small share of either",),
        source="Agrawal et al., Sarathi-Serve, OSDI 2024",
    )


def long_ttft(point: Point) -> float:
    return theory.chunked_prefill_s(
        point.shape,
        point.ceilings,
        point.load.users,
        context_tokens(point),
        long_prompt_tokens(point),
        chunk_tokens(point),
    )


def long_ttft_ratio(chunked: Point, whole: Point) -> Prediction:
    return Prediction(
        value=long_ttft(chunked) / long_ttft(whole),
        formula="sum over the pieces' steps of max(bytes / bandwidth, FLOP / rate), budget / whole",
        assumptions=("a piece computes at the same rate as the whole",),
        source="Agrawal et al., Sarathi-Serve, OSDI 2024",
    )


def stream_ttft_s(point: Point) -> float:
    """Return the mean TTFT of the streams: their own prefill, and the wait for the long prompt.

    A stream sends its next prompt after any of its steps. Behind one of the long prompt's n steps
    it waits for those that are left, and for all n where the long prompt has just come before it:
    T (n + 1) / 2 over all of them, shared by the n + (P - T) / t steps of a period P.
    """
    assert point.load.kind == "contended"
    step_s = theory.decode_step_s(
        point.shape, point.ceilings, point.load.users, context_tokens(point)
    )
    prefill_s, pieces = long_ttft(point), -(-long_prompt_tokens(point) // chunk_tokens(point))
    steps = pieces + max(0.0, point.load.every_s - prefill_s) / step_s
    own_s = theory.prefill_left_s(point.shape, point.ceilings, point.lengths[0][0], 0)
    return own_s + prefill_s * (pieces + 1) / 2 / steps


def stream_ttft_ratio(chunked: Point, whole: Point) -> Prediction:
    return Prediction(
        value=stream_ttft_s(chunked) / stream_ttft_s(whole),
        formula="t_prefill + T (n + 1) / 2 / (n + (P - T) / t), n pieces in T seconds every P",
        assumptions=(
            "a stream's answer ends after any step with the same chance",
            "a new prompt waits until the long one's last piece is computed",
        ),
        source="vLLM's scheduler, which serves running requests first",
    )


def budget(name: str, tokens: int) -> Variant:
    return Variant(
        name=name, flags={"enable-chunked-prefill": True, "max-num-batched-tokens": tokens}
    )


WHOLE = Variant(
    name="whole", flags={"enable-chunked-prefill": False, "max-num-batched-tokens": 1024}
)


COUPLED = "without chunks the engine wants a budget that holds a whole prompt"

LAB = Lab(
    name="chunked-prefill",
    answers=("SO-3", "SA-1"),
    variants=(
        budget("sixteenth", 48),
        budget("quarter", 192),
        budget("half", 384),
        budget("larger", 1024),
        WHOLE,
    ),
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        Workload(
            name="contended",
            prompt_tokens=Fixed(tokens=32),
            # equal ones would end together, and so would all wait for a long prompt, or none
            output_tokens=Exponential(mean_tokens=24, max_tokens=96),
            intruder=Intruder(prompt_tokens=768),
            loads=(Contended(users=4, every_s=1.5),),
        ),
    ),
    claims=(
        *(
            Claim(
                name=f"stall-{name}",
                metric="stall_mean_s",
                treatment=Arm(variant=name),
                baseline=Arm(variant="whole"),
                expect="falls",
                predict=stall_ratio,
                coupled=COUPLED,
            )
            for name in ("sixteenth", "quarter", "half")
        ),
        Claim(
            name="larger",
            metric="stall_mean_s",
            treatment=Arm(variant="larger"),
            baseline=Arm(variant="whole"),
            expect="unchanged",
            predict=stall_ratio,
        ),
        Claim(
            name="ttft",
            metric="intruder_ttft_mean_s",
            treatment=Arm(variant="sixteenth"),
            baseline=Arm(variant="whole"),
            expect="rises",
            predict=long_ttft_ratio,
            coupled=COUPLED,
        ),
        Claim(
            name="streams-ttft",
            metric="ttft_mean_s",
            treatment=Arm(variant="sixteenth"),
            baseline=Arm(variant="whole"),
            expect="rises",
            predict=stream_ttft_ratio,
            coupled=COUPLED,
        ),
    ),
    forecasts=(Forecast(name="stall", metric="stall_mean_s", arm=Arm(), predict=stall),),
    evidence=(
        Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
        Evidence(arm=Arm(), kind="pieces", metric="prefill_pieces"),
    ),
    findings=("token-budget",),
    plots=("stall", "timeline"),
    slo=SLO(ttft_s=2, tpot_s=0.1, itl_s=0.2),
    requests=256,
    warmup_s=1.5,
    window_s=7.6,  # five long prompts begin in it
)
