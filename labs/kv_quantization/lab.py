"""KV quantization: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    ANY,
    counter,
    echoes,
    falls,
    forecast,
    predicts,
    rises,
    sends,
    unchanged,
    users,
)
from labs.harness.spec.lab import SLO, Lab, Point, Prediction, Variant
from labs.harness.spec.theory import KAPLAN, KWON, ROOFLINE
from loadtests.workload import Prefix, Workload
from serving import metrics


@predicts("floor(memory / (block x 2 layers KV-heads head-dim bytes)) block", source=KWON)
def capacity(point: Point) -> float:
    return point.kv_room_tokens


@predicts("tokens in whole blocks, 8 bits / 16 bits", source=KWON)
def capacity_gain(quantized: Point, plain: Point) -> float:
    return quantized.kv_room_tokens / plain.kv_room_tokens


def step_s(point: Point) -> float:
    kv_bytes = point.kv_bytes(point.flags.kv_value_bytes)
    return theory.forward_s(point.shape, point.ceilings, point.load.users, kv_bytes)


@predicts(
    "(weight bytes + B context KV bytes) 8 bits / 16 bits",
    "reading is all a step does: widening 8 bits to 16 costs nothing",
    source=ROOFLINE,
)
def step_ratio(quantized: Point, plain: Point) -> float:
    return step_s(quantized) / step_s(plain)


@predicts(
    "min(B, capacity / mean context), 8 bits / 16 bits",
    "requests are spread evenly over their lives",
    "blocks waste nothing",
    source=KWON,
)
def batch_gain(quantized: Point, plain: Point) -> float:
    """Predict the gain by how many of the requests in flight fit at their mean length."""

    def running(point: Point) -> float:
        return min(point.load.users, point.kv_room_tokens / point.context_tokens)

    return running(quantized) / running(plain)


def returning_s(point: Point) -> float:
    """Return the TTFT of a prompt that returns: what is copied back, and what is left to compute.

    Prompts that come in turn are all kept, or each is evicted before it returns: by the KV cache,
    and by the host's memory where the engine has any.
    """
    prefix, flags = point.workload.prefix, point.flags
    value = flags.kv_value_bytes
    each_bytes = (point.prompt_tokens + point.output_tokens) * point.shape.kv_bytes_per_token(value)
    groups, shared = (prefix.groups, prefix.tokens) if prefix else (1, 0)
    kept, copy_s = shared // flags.block_size * flags.block_size, 0.0
    if groups * each_bytes > flags.kv_parts(point.shape.kv_heads) * flags.kv_cache_memory_bytes:
        if groups * each_bytes > flags.kv_offloading_bytes:
            kept = 0
        copy_s = theory.kv_copy_s(point.shape, kept, point.ceilings.link_bytes_per_s, value)
    return copy_s + theory.first_token_of(point, kept)


def copied_back(offloading: Point, recomputing: Point) -> Prediction:
    link = "was measured" if offloading.ceilings.host_bytes_per_s else "is taken as PCIe 4.0 x16"
    return Prediction(
        value=returning_s(offloading) / returning_s(recomputing),
        formula="(kept tokens x KV bytes / link + FLOP left / rate) / (FLOP / rate)",
        assumptions=(
            f"the link to the host's memory {link}",
            "copying reaches that rate, and is over before the rest of the prompt is computed",
            "prefill runs at the measured rate",
        ),
        source=f"FLOP: {KAPLAN}; vLLM, KV offloading connector",
    )


PLAIN = Variant(name="bf16", flags={"kv-cache-dtype": "auto"})
FP8 = PLAIN.but("fp8", {"kv-cache-dtype": "fp8_e4m3"})
TIGHT = {"kv-cache-memory-bytes": 12 * 2**20, "max-model-len": 512}
# A GPU's: prompts in turn, more of them than the KV cache holds, and the host's memory beside it
RECOMPUTE = PLAIN.but("recompute", {"max-model-len": 8192})
OFFLOAD = RECOMPUTE.but("offload", {"kv-offloading-size": 8.0})


FEW, MANY = users(4, 12)


def near_or_far(name: str, context_tokens: int, *only: str) -> Workload:
    """Make a workload that decodes over one shared context, which is prefilled once."""
    prefix = Prefix(tokens=context_tokens - 64)
    return sends(name, context_tokens, 16, FEW, prefix=prefix, primed=True, only=only)


LAB = Lab(
    name="kv-quantization",
    answers=("KV-1", "KV-2", "KV-6", "KV-7"),
    variants=(
        PLAIN,
        FP8,
        PLAIN.but("e5m2", {"kv-cache-dtype": "fp8_e5m2"}),
        PLAIN.but("bf16-tight", TIGHT),
        FP8.but("fp8-tight", TIGHT),
        RECOMPUTE,
        OFFLOAD,
    ),
    flags={
        "max-model-len": 2304,
        "enable-prefix-caching": True,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 512 * 2**20,
        # later pieces of a prompt read what earlier ones left in the cache, quantized
        "max-num-batched-tokens": 256,
    },
    workloads=(
        near_or_far("near", 128, "bf16", "fp8", "e5m2"),
        near_or_far("far", 2048, "bf16", "fp8"),
        # a fourth block for the last of the tokens
        sends("growing", 72, 32, FEW, MANY, only=("bf16-tight", "fp8-tight")),
        sends(
            "returning",
            8000,
            8,
            *users(1),
            prefix=Prefix(tokens=7936, groups=6),
            primed=True,  # so that each prompt is one that returns
            only=("recompute", "offload"),
        ),
    ),
    claims=(
        rises("capacity", "kv_capacity_tokens", "fp8 / bf16", "near", by=capacity_gain),
        rises(
            "batch", "batch", "fp8-tight / bf16-tight", "growing", "concurrent:12", by=batch_gain
        ),
        unchanged("near", "tpot_mean_s", "fp8 / bf16", "near", by=step_ratio),
        falls("far", "tpot_mean_s", "fp8 / bf16", "far", by=step_ratio),
        falls("returning", "ttft_mean_s", "offload / recompute", "returning", by=copied_back),
    ),
    forecasts=(forecast("capacity", "kv_capacity_tokens", capacity, ANY, "near"),),
    evidence=(
        *echoes(
            metrics.CACHE_CONFIG,
            "cache_dtype",
            {
                "bf16": "auto",
                "fp8": "fp8_e4m3",
                "e5m2": "fp8_e5m2",
                "bf16-tight": "auto",
                "fp8-tight": "fp8_e4m3",
            },
        ),
        counter(metrics.KV_LOADED_BYTES, "rises", "offload"),
        counter(metrics.KV_LOADED_BYTES, "absent", "recompute"),
    ),
    probes=("quality",),
    probed=("bf16", "fp8", "e5m2"),
    findings=("preemption", "context-slope", "quality", "memory-ladder"),
    plots=("preemption",),
    needs_text=("quality", "quality-quick"),
    slo=SLO(ttft_s=2, tpot_s=0.15),
    requests=192,
    warmup_s=0.8,
    window_s=2,
)
