"""Chunked prefill: what does one long prompt do to everybody else's stream, and what mends it?

An engine step serves all running requests at once. A prompt that is prefilled whole makes its step
as long as its prefill, and every stream that is being decoded stands still meanwhile. *Chunked
prefill* (Sarathi-Serve, OSDI 2024) gives each step a token budget: the decoding requests take
theirs first, what is left goes to a piece of the prompt. The longest gap a reader sees becomes a
decode step and one piece; the long prompt itself waits longer for its first token, because every
piece brings a decode step along. The streams pay as well: running requests are served first, so
while the pieces fill every step's budget, a stream's next prompt waits for the last of them.

Streams decode, and at a fixed interval a long prompt comes in. Variants differ in the budget,
written as a share of the long prompt; `whole` has chunking off (which forces a budget of at least
the longest prompt: the one place where the engine couples two settings).

Turn: the budget (`variants.quarter.flags.max-num-batched-tokens`), the length of the long prompt
(`workloads.contended.intruder.prompt_tokens`), the number of streams
(`workloads.contended.loads`).
"""

from __future__ import annotations

from typing import Any

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


def budgets(**tokens: int) -> dict[str, Any]:
    """Return the field of each variant's budget with its tokens."""
    return {f"variants.{name}.flags.max-num-batched-tokens": n for name, n in tokens.items()}


def knobs(budget: int, prompt: int, load: str) -> tuple[str, ...]:
    return (
        f'SET="variants.quarter.flags.max-num-batched-tokens={budget}" tries a budget between two'
        " of the table's",
        f'SET="workloads.contended.intruder.prompt_tokens={prompt}" halves the long prompt: the'
        " stall of `whole` halves, that of `sixteenth` stays",
        f"SET='workloads.contended.loads=[\"{load}\"]' puts twice the streams beside it",
    )


def beside_long_prompts(every_s: float, requests: int = 1024) -> dict[str, Any]:
    """Have a long prompt come every so many seconds, in a window in which five of them begin."""
    return {
        "workloads.contended.loads": (Contended(users=32, every_s=every_s),),
        "window_s": 5 * every_s + 0.1,
        "requests": requests,  # every fourth of 7,680 tokens, which take long to write
        "next_knobs": knobs(budget=960, prompt=3840, load=f"contended:64/{every_s:g}"),
    }


COUPLED = "without chunks the engine wants a budget that holds a whole prompt"

LAB = Lab(
    name="chunked-prefill",
    title="Chunked prefill",
    question="Somebody sends a very long prompt: how long does everybody else's text stand still,"
    " and what does cutting the prompt into pieces cost?",
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
                title=f"A budget of {text} of the long prompt shortens the stall",
                metric="stall_mean_s",
                treatment=Arm(variant=name),
                baseline=Arm(variant="whole"),
                expect="falls",
                predict=stall_ratio,
                coupled=COUPLED,
            )
            for name, text in (("sixteenth", "a sixteenth"), ("quarter", "a quarter"),
                               ("half", "half"))
        ),
        Claim(
            name="larger",
            title="A budget larger than the long prompt changes nothing: it is not cut",
            metric="stall_mean_s",
            treatment=Arm(variant="larger"),
            baseline=Arm(variant="whole"),
            expect="unchanged",
            predict=stall_ratio,
        ),
        Claim(
            name="ttft",
            title="The long prompt pays for its small pieces with a later first token",
            metric="intruder_ttft_mean_s",
            treatment=Arm(variant="sixteenth"),
            baseline=Arm(variant="whole"),
            expect="rises",
            predict=long_ttft_ratio,
            coupled=COUPLED,
        ),
        Claim(
            name="streams-ttft",
            title="The streams' own prompts wait while the pieces of a long one fill each step",
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
    scales={
        # a token of a prompt takes four to six times as long as in BF16
        "cpu-fp32": {
            **budgets(sixteenth=20, quarter=80, half=160),
            "workloads.contended.intruder.prompt_tokens": 320,
            "workloads.contended.loads": (Contended(users=4, every_s=2.5),),
            "workloads.contended.output_tokens.mean_tokens": 12,  # the last answer ends a trial
            "workloads.contended.output_tokens.max_tokens": 48,
            "window_s": 12.6,
            "next_knobs": knobs(budget=40, prompt=160, load="contended:8/3"),
        },
        "gpu": {
            "flags": {"enable-prefix-caching": False},
            **budgets(sixteenth=480, quarter=1920, half=3840, larger=8192, whole=8192),
            "workloads.contended.prompt_tokens.tokens": 128,
            "workloads.contended.output_tokens.mean_tokens": 192,
            "workloads.contended.output_tokens.max_tokens": 768,
            "workloads.contended.intruder.prompt_tokens": 7680,
            "slo.itl_s": 0.05,
            **beside_long_prompts(every_s=5),
        },
        # the slowest card of a class prefills a long prompt in about a third of this; its fastest
        # serves most streams meanwhile, of random weights more than of its default model
        "gpu-16": beside_long_prompts(every_s=3),
        "gpu-24": beside_long_prompts(every_s=5, requests=1536),
        "gpu-80": beside_long_prompts(every_s=3),
        "gpu-141": beside_long_prompts(every_s=4, requests=1536),
        "gpu-quick": {
            "without": ("quarter", "half", "larger"),
            "flags.kv-cache-memory-bytes": 5 * 2**30,  # holds all that is sent at once
            "warmup_s": 0.5,
        },
        "gpu-80-quick": beside_long_prompts(every_s=2.5, requests=768),
        "gpu-141-quick": {"flags.kv-cache-memory-bytes": 10 * 2**30},
    },
    quick={"warmup_s": 1, "repeats": 1},
    limits={
        "cpu": "The scheduler that cuts prompts into chunks is vLLM's own, so the shape of the"
        " trade carries over: the stall grows with the budget, the first token comes later as it"
        " shrinks. A large part of a decode step here is the cost of launching small operations,"
        " which every piece pays again: small budgets cost the long prompt more than on a GPU.",
        "gpu": "One long prompt at a time; where several arrive together they share the budget.",
    },
    next_knobs=knobs(budget=96, prompt=384, load="contended:8/2"),
)  # fmt: skip
