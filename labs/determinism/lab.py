"""Determinism: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import counter, echoes, predicts, rises, sends
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import ROOFLINE
from loadtests.arrivals import Waves
from serving import metrics

ASSUMED = ("all answers of a wave start and end together", "no cost grows but the roofline's")


@predicts("B (t_prefill + (L - 1) t(1)) / (B t_prefill + (L - 1) t(B))", *ASSUMED, source=ROOFLINE)
def throughput_ratio(many: Point, one: Point) -> float:
    return theory.throughput_of(many) / theory.throughput_of(one)


@predicts("t(B) / t(1), t(B) = max(bytes / bandwidth, FLOP / rate)", *ASSUMED, source=ROOFLINE)
def step_ratio(many: Point, one: Point) -> float:
    return theory.step_of(many) / theory.step_of(one)


PLAIN = Variant(name="plain", flags={"enable-prefix-caching": False})
GUESSES = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
}  # fmt: skip
CACHES = {"plain": "False", "cached": "True", "chunked": "False"}
RATE, MANY = "output_tokens_per_s", "waves:16 / waves:1"

LAB = Lab(
    name="determinism",
    answers=("ME-5",),
    variants=(
        PLAIN,
        PLAIN.but("cached", {"enable-prefix-caching": True}),
        PLAIN.but("chunked", {"max-num-batched-tokens": 32}),
        PLAIN.but("speculation", {"speculative-config": GUESSES}),
        PLAIN.but("int8", weights="w8a8"),
    ),
    flags={
        "max-model-len": 512,
        "max-num-seqs": 16,
        "max-num-batched-tokens": 2048,  # holds sixteen prompts
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        # a text to repeat, so that `speculation` finds something to copy
        sends("answers", 96, 24, Waves(size=1), Waves(size=16), task="quote"),
    ),
    claims=(
        rises("throughput", RATE, "plain", "answers", MANY, by=throughput_ratio),
        rises("tpot", "tpot_mean_s", "plain", "answers", MANY, by=step_ratio),
    ),
    evidence=(
        *echoes(metrics.CACHE_CONFIG, "enable_prefix_caching", CACHES),
        counter(metrics.SPEC_DRAFTS, "absent", "plain"),
        counter(metrics.SPEC_DRAFTS, "rises", "speculation"),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    probes=("greedy",),
    findings=("same-text", "near-ties", "forecast", "batch-invariant"),
    plots=("equal",),
    needs_text=("greedy", "greedy-quick", "same-text", "near-ties", "forecast", "equal"),
    slo=SLO(ttft_s=2, tpot_s=0.15),
    requests=192,
    warmup_s=0.5,
    window_s=3,
)
