"""Chunked prefill: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from collections.abc import Callable

from labs.harness.spec import theory
from labs.harness.spec.declare import counter, falls, forecast, predicts, rises, sends, unchanged
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import SARATHI
from loadtests.arrivals import Contended
from loadtests.workload import Exponential, Intruder
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


def beside_streams(point: Point, seconds: Callable[..., float]) -> float:
    """Compute the seconds of a long prompt that is prefilled in chunks beside the streams."""
    return seconds(
        point.shape,
        point.ceilings,
        point.load.users,
        context_tokens(point),
        long_prompt_tokens(point),
        chunk_tokens(point),
    )


def stall_s(point: Point) -> float:
    """Return the longest step, with the prompt's last piece."""
    return beside_streams(point, theory.chunk_step_s)


def long_ttft_s(point: Point) -> float:
    return beside_streams(point, theory.chunked_prefill_s)


@predicts(
    "max(bytes / bandwidth, FLOP / rate) of B decoding and the prompt's last piece,"
    " min(budget - B, prompt) tokens",
    "perfect overlap",
    "no launch, scheduling or sampling cost",
    source=SARATHI,
    kind="floor",
)
def stall(point: Point) -> float:
    return stall_s(point)


@predicts(
    "the longest step, max(bytes / bandwidth, FLOP / rate), with a piece / whole",
    "what the roofline leaves out is a small share of either",
    source=SARATHI,
)
def stall_ratio(chunked: Point, whole: Point) -> float:
    return stall_s(chunked) / stall_s(whole)


@predicts(
    "sum over the pieces' steps of max(bytes / bandwidth, FLOP / rate), budget / whole",
    "a piece computes at the same rate as the whole",
    source=SARATHI,
)
def long_ttft_ratio(chunked: Point, whole: Point) -> float:
    return long_ttft_s(chunked) / long_ttft_s(whole)


def stream_ttft_s(point: Point) -> float:
    """Return the mean TTFT of the streams: their own prefill, and the wait for the long prompt.

    A stream sends its next prompt after any of its steps. Behind one of the long prompt's n steps
    it waits for those that are left, and for all n where the long prompt has just come before it:
    T (n + 1) / 2 over all of them, shared by the n + (P - T) / t steps of a period P.
    """
    assert point.load.kind == "contended"
    step_s = theory.step_of(point, context_tokens(point))
    prefill_s, pieces = long_ttft_s(point), -(-long_prompt_tokens(point) // chunk_tokens(point))
    steps = pieces + max(0.0, point.load.every_s - prefill_s) / step_s
    own_s = theory.prefill_left_s(point.shape, point.ceilings, point.lengths[0][0], 0)
    return own_s + prefill_s * (pieces + 1) / 2 / steps


@predicts(
    "t_prefill + T (n + 1) / 2 / (n + (P - T) / t), n pieces in T seconds every P",
    "a stream's answer ends after any step with the same chance",
    "a new prompt waits until the long one's last piece is computed",
    source="vLLM's scheduler, which serves running requests first",
)
def stream_ttft_ratio(chunked: Point, whole: Point) -> float:
    return stream_ttft_s(chunked) / stream_ttft_s(whole)


def budget(name: str, tokens: int, chunked: bool = True) -> Variant:
    return Variant(
        name=name, flags={"enable-chunked-prefill": chunked, "max-num-batched-tokens": tokens}
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
        budget("whole", 1024, chunked=False),
    ),
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        sends(
            "contended",
            32,
            # equal ones would end together, and so would all wait for a long prompt, or none
            Exponential(mean_tokens=24, max_tokens=96),
            Contended(users=4, every_s=1.5),
            intruder=Intruder(prompt_tokens=768),
        ),
    ),
    claims=(
        *(
            falls(
                f"stall-{name}", "stall_mean_s", f"{name} / whole", by=stall_ratio, coupled=COUPLED
            )
            for name in ("sixteenth", "quarter", "half")
        ),
        unchanged("larger", "stall_mean_s", "larger / whole", by=stall_ratio),
        rises(
            "ttft", "intruder_ttft_mean_s", "sixteenth / whole", by=long_ttft_ratio, coupled=COUPLED
        ),
        rises(
            "streams-ttft",
            "ttft_mean_s",
            "sixteenth / whole",
            by=stream_ttft_ratio,
            coupled=COUPLED,
        ),
    ),
    forecasts=(forecast("stall", "stall_mean_s", stall),),
    evidence=(
        counter(metrics.PREEMPTIONS, "stays"),
        counter("prefill_pieces", "pieces"),
    ),
    findings=("token-budget",),
    plots=("stall", "timeline"),
    slo=SLO(ttft_s=2, tpot_s=0.1, itl_s=0.2),
    requests=256,
    warmup_s=1.5,
    window_s=7.6,  # five long prompts begin in it
)
