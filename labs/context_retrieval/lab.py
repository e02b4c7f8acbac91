"""Context retrieval: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from typing import Any

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    echoes,
    falls,
    forecast,
    predicts,
    rises,
    sends,
    users,
    variants,
)
from labs.harness.spec.lab import SLO, Lab, Point, Prediction
from labs.harness.spec.theory import KWON, ROOFLINE
from loadtests.workload import Fixed, Prefix
from serving import metrics

MISTRAL = "Jiang et al., Mistral 7B, 2023"
STREAMING = "Xiao et al., StreamingLLM, ICLR 2024"
H2O = "Zhang et al., H2O, NeurIPS 2023"
CLA = "Brandon et al., Cross-Layer Attention, NeurIPS 2024"
LONG_QUANTIZED = "Mekala et al., EMNLP 2025"
EVICTED_SHARE = 0.2  # of the tokens that H2O keeps
SHARING_LAYERS = 2  # that have one layer's keys and values
BY_CHANCE = 1 / 5  # one of the five numbers in a text, drawn blindly


# ------------------------------------------------------------------------- bytes, by arithmetic


def sequence_bytes(method: str, point: Point, tokens: int, window: int) -> float:
    """Compute the bytes of keys and values that a sequence keeps of `tokens`, by each method.

    `point` is in full precision.
    """
    kept = {
        "full": tokens,
        "fp8": tokens / 2,
        "window": min(tokens, window),
        "fp8 and window": min(tokens, window) / 2,
        "evicted": EVICTED_SHARE * tokens,
        "shared": tokens / SHARING_LAYERS,
        "fp8 and shared": tokens / (2 * SHARING_LAYERS),
    }[method]
    return kept * point.shape.kv_bytes_per_token()


FORMULAS = {
    "full": ("2 layers KV-heads head-dim 2 N", KWON),
    "fp8": ("half of full: a byte a value", KWON),
    "window": ("full of min(N, W)", MISTRAL),
    "fp8 and window": ("half of the window's", MISTRAL),
    "evicted": (f"{EVICTED_SHARE:g} of full: the tokens that drew most attention", H2O),
    "shared": (f"full / {SHARING_LAYERS}: every second layer has the layer's before", CLA),
    "fp8 and shared": (f"full / {2 * SHARING_LAYERS}", CLA),
}


KEPT_IN_8_BITS = "needles kept, 8 bits"
KEPT_WITHIN = "needles kept, window, within its reach"
KEPT_BEYOND = "needles kept, window, beyond its reach"
LOST_TOGETHER = "margin lost, both / the sum of each"


def longest_prompt(lab: Lab) -> int:
    """Return the length of the longest context that is sent, in tokens."""
    prompts = [w.prompt_tokens for w in lab.workloads]
    return max((p.tokens for p in prompts if isinstance(p, Fixed)), default=0)


def arithmetic(lab: Lab, point: Point) -> dict[str, Prediction]:
    """Write down beforehand what the findings are held against."""
    tokens = longest_prompt(lab)
    windows = [w for v in lab.variants if (w := lab.flags_of(v).sliding_window)]
    predictions = {
        f"KV bytes of a sequence, {method} at {tokens}": Prediction(
            value=sequence_bytes(method, point, tokens, windows[0] if windows else tokens),
            formula=formula,
            source=source,
        )
        for method, (formula, source) in FORMULAS.items()
        if windows or "window" not in method
    }
    predictions[KEPT_IN_8_BITS] = Prediction(
        value=0.992,
        formula="1 - 0.008, which 8 bits cost on long contexts on average",
        assumptions=("a small model loses no more than the published ones of 7 to 72 B",),
        source=LONG_QUANTIZED,
    )
    predictions[LOST_TOGETHER] = Prediction(
        value=1.0,
        formula="1: the errors of weights and of keys and values are small, and add up",
        assumptions=("a small error moves the margin in proportion",),
        source="first-order Taylor expansion",
    )
    if windows:
        predictions[KEPT_WITHIN] = Prediction(
            value=1.0,
            formula="1: what lies within W tokens is attended to in full precision",
            assumptions=("the model does without the first tokens, on which attention rests",),
            source=MISTRAL,
        )
        predictions[KEPT_BEYOND] = Prediction(
            value=BY_CHANCE,
            kind="ceiling",
            formula="1 / 5: nothing but one of five numbers drawn blindly",
            assumptions=("a model that saw all tokens does not pass on from layer to layer",),
            source=STREAMING,
        )
    return predictions


# ------------------------------------------------------------------------------- on the engine


@predicts("tokens in whole blocks, 8 bits / 16 bits", source=KWON)
def capacity_ratio(quantized: Point, plain: Point) -> float:
    return quantized.kv_room_tokens / plain.kv_room_tokens


@predicts("floor(memory / (block x 2 layers KV-heads head-dim bytes)) block", source=KWON)
def capacity(point: Point) -> float:
    return point.kv_room_tokens


def admitted(point: Point) -> float:
    """Return how many requests run at once: all in flight, or as many as the blocks hold.

    The engine keeps one block for itself. A window lies in at most ceil((W - 1) / b) + 1 blocks.
    """
    block, window = point.flags.block_size, point.flags.sliding_window
    held = block * -(-point.context_tokens // block)
    if window is not None:
        held = min(held, block * (-(-(window - 1) // block) + 1))
    return min(point.load.users, (point.kv_room_tokens - block) / held)


@predicts(
    "min(B, (C - b) / tokens held), treatment / baseline",
    "what the running requests hold together stays near its mean",
    "prefill takes no time, so that whoever is admitted decodes",
    source=KWON,
)
def admitted_ratio(treatment: Point, baseline: Point) -> float:
    return admitted(treatment) / admitted(baseline)


def step_s(point: Point) -> float:
    return theory.forward_of(point, point.kv_bytes(point.flags.kv_value_bytes))


@predicts(
    "(weight bytes + B min(N, W) KV bytes a token) treatment / baseline",
    "reading is all that a step does: widening 8 bits to 16 costs nothing",
    source=ROOFLINE,
)
def step_ratio(treatment: Point, baseline: Point) -> float:
    return step_s(treatment) / step_s(baseline)


# --------------------------------------------------------------------------------------- the lab

FULL, KV_FP8 = variants("kv-cache-dtype", full="auto", kv_fp8="fp8_e4m3")


def reaching(tokens: int) -> dict[str, Any]:
    """Have all layers attend to the last `tokens`; a list of layers' kinds would say otherwise."""
    return {"hf-overrides": {"sliding_window": tokens, "layer_types": []}}


VARIANTS = (
    FULL,
    KV_FP8,
    FULL.but("w8a8", weights="w8a8"),
    KV_FP8.but("both", weights="w8a8"),
    FULL.but("window", reaching(192)),
)
SAVING = ("full", "kv-fp8", "window")  # the KV cache, in memory
READING = ("full", "kv-fp8", "w8a8")  # the whole context, in each step


WINDOW = "--hf-overrides.sliding_window"  # of a variant's own flags

LAB = Lab(
    name="context-retrieval",
    answers=("ME-3", "KV-8"),
    variants=VARIANTS,
    flags={
        "max-model-len": 1280,
        "enable-prefix-caching": True,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 32 * 2**20,  # little more than one text of the longest
        # later pieces of a prompt read what earlier ones left in the cache, quantized
        "max-num-batched-tokens": 256,
    },
    workloads=(
        sends(
            "far",
            1024,
            16,
            *users(4),
            prefix=Prefix(tokens=960),
            primed=True,  # so that a trial is decode, and hardly any prefill
            # an engine with a window soon finds no long prefix in a small cache any more
            only=READING,
        ),
        sends("tight", 352, 16, *users(5), only=SAVING),
    ),
    claims=(
        rises("capacity", "kv_capacity_tokens", "kv-fp8 / full", "far", by=capacity_ratio),
        rises("batch-kv-fp8", "batch", "kv-fp8 / full", "tight", by=admitted_ratio),
        rises("batch-window", "batch", "window / full", "tight", by=admitted_ratio),
        falls("far-kv", "tpot_mean_s", "kv-fp8 / full", "far", by=step_ratio),
        falls("far-weights", "tpot_mean_s", "w8a8 / full", "far", by=step_ratio),
    ),
    forecasts=(forecast("capacity", "kv_capacity_tokens", capacity, workload="far"),),
    evidence=(
        *echoes(
            metrics.CACHE_CONFIG, "cache_dtype", {v.name: "--kv-cache-dtype" for v in VARIANTS}
        ),
        *echoes(
            metrics.CACHE_CONFIG,
            "sliding_window",
            {v.name: WINDOW if v.name == "window" else "None" for v in VARIANTS},
        ),
    ),
    arithmetic=arithmetic,
    probes=("retrieval",),
    findings=("retrieval", "retrieval-lost", "kv-methods"),
    plots=("retrieval",),
    needs_text=("retrieval", "retrieval-quick", "retrieval-lost"),
    dummy=lambda lab: lab.model_copy(update={"answers": ("KV-8",)}),
    slo=SLO(ttft_s=4, tpot_s=0.2),
    requests=96,
    warmup_s=0.8,
    window_s=2,
)
