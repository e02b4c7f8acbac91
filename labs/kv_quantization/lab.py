"""KV quantization: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Prefix, Workload
from serving import metrics


def value_bytes(point: Point) -> float:
    return point.flags.kv_value_bytes


def capacity(point: Point) -> Prediction:
    return Prediction(
        value=point.kv_room_tokens,
        formula="floor(memory / (block x 2 layers KV-heads head-dim bytes)) block",
        source="Kwon et al., PagedAttention, SOSP 2023",
    )


def capacity_gain(quantized: Point, plain: Point) -> Prediction:
    return Prediction(
        value=quantized.kv_room_tokens / plain.kv_room_tokens,
        formula="tokens in whole blocks, 8 bits / 16 bits",
        source="Kwon et al., PagedAttention, SOSP 2023",
    )


def step_s(point: Point) -> float:
    kv_bytes = point.kv_bytes(value_bytes(point))
    return theory.forward_s(point.shape, point.ceilings, point.load.users, kv_bytes)


def step_ratio(quantized: Point, plain: Point) -> Prediction:
    return Prediction(
        value=step_s(quantized) / step_s(plain),
        formula="(weight bytes + B context KV bytes) 8 bits / 16 bits",
        assumptions=("reading is all a step does: widening 8 bits to 16 costs nothing",),
        source="Williams et al., Roofline, 2009",
    )


def batch_gain(quantized: Point, plain: Point) -> Prediction:
    """Predict the gain by how many of the requests in flight fit at their mean length."""

    def running(point: Point) -> float:
        return min(point.load.users, point.kv_room_tokens / point.context_tokens)

    return Prediction(
        value=running(quantized) / running(plain),
        formula="min(B, capacity / mean context), 8 bits / 16 bits",
        assumptions=("requests are spread evenly over their lives", "blocks waste nothing"),
        source="Kwon et al., PagedAttention, SOSP 2023",
    )


def returning_s(point: Point) -> float:
    """Return the TTFT of a prompt that returns: what is copied back, and what is left to compute.

    Prompts that come in turn are all kept, or each is evicted before it returns: by the KV cache,
    and by the host's memory where the engine has any.
    """
    prefix, flags = point.workload.prefix, point.flags
    value = value_bytes(point)
    each_bytes = (point.prompt_tokens + point.output_tokens) * point.shape.kv_bytes_per_token(value)
    groups, shared = (prefix.groups, prefix.tokens) if prefix else (1, 0)
    kept, copy_s = shared // flags.block_size * flags.block_size, 0.0
    if groups * each_bytes > flags.kv_parts(point.shape.kv_heads) * flags.kv_cache_memory_bytes:
        if groups * each_bytes > flags.kv_offloading_bytes:
            kept = 0
        copy_s = theory.kv_copy_s(point.shape, kept, point.ceilings.link_bytes_per_s, value)
    return copy_s + theory.prefill_left_s(point.shape, point.ceilings, point.prompt_tokens, kept)


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
        source="FLOP: Kaplan et al. 2020; vLLM, KV offloading connector",
    )


PLAIN = Variant(name="bf16", flags={"kv-cache-dtype": "auto"})
FP8 = PLAIN.but("fp8", {"kv-cache-dtype": "fp8_e4m3"})
# A GPU's: prompts in turn, more of them than the KV cache holds, and the host's memory beside it
RECOMPUTE = PLAIN.but("recompute", {"max-model-len": 8192})
OFFLOAD = RECOMPUTE.but("offload", {"kv-offloading-size": 8.0})
TIGHT = {"kv-cache-memory-bytes": 12 * 2**20, "max-model-len": 512}


def near_or_far(name: str, context_tokens: int, *only: str) -> Workload:
    """Make a workload that decodes over one shared context, which is prefilled once."""
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=context_tokens),
        output_tokens=Fixed(tokens=16),
        prefix=Prefix(tokens=context_tokens - 64),
        primed=True,
        only=only,
        loads=(Concurrent(users=4),),
    )


DTYPES = {"bf16": "auto", "fp8": "fp8_e4m3", "e5m2": "fp8_e5m2", "bf16-tight": "auto",
          "fp8-tight": "fp8_e4m3"}  # fmt: skip
VARIANTS = (
    PLAIN,
    FP8,
    PLAIN.but("e5m2", {"kv-cache-dtype": "fp8_e5m2"}),
    PLAIN.but("bf16-tight", TIGHT),
    FP8.but("fp8-tight", TIGHT),
    RECOMPUTE,
    OFFLOAD,
)
EVIDENCE = (
    *(
        Evidence.echo(name, metrics.CACHE_CONFIG, "cache_dtype", dtype)
        for name, dtype in DTYPES.items()
    ),
    Evidence(arm=Arm(variant=OFFLOAD.name), kind="rises", metric=metrics.KV_LOADED_BYTES),
    Evidence(arm=Arm(variant=RECOMPUTE.name), kind="absent", metric=metrics.KV_LOADED_BYTES),
)
WORKLOADS = (
    near_or_far("near", 128, "bf16", "fp8", "e5m2"),
    near_or_far("far", 2048, "bf16", "fp8"),
    Workload(
        name="growing",
        prompt_tokens=Fixed(tokens=72),
        output_tokens=Fixed(tokens=32),  # a fourth block for the last of them
        only=("bf16-tight", "fp8-tight"),
        loads=tuple(Concurrent(users=n) for n in (4, 12)),
    ),
    Workload(
        name="returning",
        prompt_tokens=Fixed(tokens=8000),
        output_tokens=Fixed(tokens=8),
        prefix=Prefix(tokens=7936, groups=6),
        primed=True,  # so that each prompt is one that returns
        only=(RECOMPUTE.name, OFFLOAD.name),
        loads=(Concurrent(users=1),),
    ),
)
CLAIMS = (
    Claim(
        name="capacity",
        metric="kv_capacity_tokens",
        treatment=Arm(variant="fp8", workload="near"),
        baseline=Arm(variant="bf16", workload="near"),
        expect="rises",
        predict=capacity_gain,
    ),
    Claim(
        name="batch",
        metric="batch",
        treatment=Arm(variant="fp8-tight", workload="growing", load="concurrent:12"),
        baseline=Arm(variant="bf16-tight", workload="growing", load="concurrent:12"),
        expect="rises",
        predict=batch_gain,
    ),
    Claim(
        name="near",
        metric="tpot_mean_s",
        treatment=Arm(variant="fp8", workload="near"),
        baseline=Arm(variant="bf16", workload="near"),
        expect="unchanged",
        predict=step_ratio,
    ),
    Claim(
        name="far",
        metric="tpot_mean_s",
        treatment=Arm(variant="fp8", workload="far"),
        baseline=Arm(variant="bf16", workload="far"),
        expect="falls",
        predict=step_ratio,
    ),
    Claim(
        name="returning",
        metric="ttft_mean_s",
        treatment=Arm(variant=OFFLOAD.name, workload="returning"),
        baseline=Arm(variant=RECOMPUTE.name, workload="returning"),
        expect="falls",
        predict=copied_back,
    ),
)
LAB = Lab(
    name="kv-quantization",
    answers=("KV-1", "KV-2", "KV-6", "KV-7"),
    variants=VARIANTS,
    flags={
        "max-model-len": 2304,
        "enable-prefix-caching": True,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 512 * 2**20,
        # later pieces of a prompt read what earlier ones left in the cache, quantized
        "max-num-batched-tokens": 256,
    },
    workloads=WORKLOADS,
    claims=CLAIMS,
    forecasts=(
        Forecast(
            name="capacity", metric="kv_capacity_tokens", arm=Arm(workload="near"), predict=capacity
        ),
    ),
    evidence=EVIDENCE,
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
