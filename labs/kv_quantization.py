"""KV quantization: what does a smaller KV cache buy, and what does it cost?

Every token of context keeps a key and a value in every layer: 2 x layers x KV heads x head
dimension x bytes. Stored in 8 bits instead of 16 the same memory holds twice the tokens, so twice
the requests run at once before the engine must *preempt*: throw a running request's cache away and
compute it again later. Decode reads the whole context for each token, so long contexts also decode
faster where reading is what takes the time; the 8-bit values must be widened again, which costs
where arithmetic is dear. And what is rounded is lost: quality is measured on the same engine.

`fp8` has 4 exponent and 3 mantissa bits (e4m3), `e5m2` the other way round. The `tight` pair has so
little KV memory that preemption can be seen.

Turn: the types that get the long context (`workloads.far.only`), the memory
(`variants.fp8-tight.flags.kv-cache-memory-bytes`), the context
(`workloads.far.prompt_tokens.tokens`).
"""

from __future__ import annotations

from typing import Any

from labs import theory
from labs.lab import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
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


PLAIN = Variant(name="bf16", flags={"kv-cache-dtype": "auto"})
FP8 = PLAIN.but("fp8", {"kv-cache-dtype": "fp8_e4m3"})
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
)
EVIDENCE = tuple(
    Evidence.echo(name, metrics.CACHE_CONFIG, "cache_dtype", dtype)
    for name, dtype in DTYPES.items()
)
# vLLM's FlashAttention does not have it, its Triton kernels take it for e4m3 without a word, and
# FlashInfer compiles its own with a CUDA toolkit, which few machines have
WITHOUT_E5M2 = {
    "variants": [v.model_dump() for v in VARIANTS if v.name != "e5m2"],
    "evidence": [e.model_dump() for e in EVIDENCE if e.arm.variant != "e5m2"],
    "workloads.near.only": ("bf16", "fp8"),
    "probed": ("bf16", "fp8"),
}


def knobs(tight_bytes: int, far_tokens: int) -> tuple[str, ...]:
    return (
        f'SET="variants.fp8-tight.flags.kv-cache-memory-bytes={tight_bytes // 2}" halves the memory'
        " of the quantized side: it preempts where BF16 did",
        f'SET="workloads.far.prompt_tokens.tokens={far_tokens // 2}'
        f' workloads.far.prefix.tokens={far_tokens // 2 - 64}" halves the long context',
    )


def tight(memory_bytes: int) -> dict[str, Any]:
    """Set the tight pair's KV memory on a GPU, where its requests are longer."""
    sizes = {"kv-cache-memory-bytes": memory_bytes, "max-model-len": 1024}
    pair = ("bf16-tight", "fp8-tight")
    changes = {f"variants.{name}.flags.{flag}": n for name in pair for flag, n in sizes.items()}
    return {**changes, "next_knobs": knobs(memory_bytes, 24576)}


LAB = Lab(
    name="kv-quantization",
    title="KV quantization",
    question="Memory is short: how many more users do 8-bit keys and values admit, and what do"
    " they cost in speed and quality?",
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
    workloads=(
        near_or_far("near", 128, "bf16", "fp8", "e5m2"),
        near_or_far("far", 2048, "bf16", "fp8"),
        Workload(
            name="growing",
            prompt_tokens=Fixed(tokens=72),
            output_tokens=Fixed(tokens=32),  # a fourth block for the last of them
            only=("bf16-tight", "fp8-tight"),
            loads=tuple(Concurrent(users=n) for n in (4, 12)),
        ),
    ),
    claims=(
        Claim(
            name="capacity",
            title="In 8 bits the same memory holds twice the tokens",
            metric="kv_capacity_tokens",
            treatment=Arm(variant="fp8", workload="near"),
            baseline=Arm(variant="bf16", workload="near"),
            expect="rises",
            predict=capacity_gain,
        ),
        Claim(
            name="batch",
            title="In 8 bits twice the requests run at once where memory is short",
            metric="batch",
            treatment=Arm(variant="fp8-tight", workload="growing", load="concurrent:12"),
            baseline=Arm(variant="bf16-tight", workload="growing", load="concurrent:12"),
            expect="rises",
            predict=batch_gain,
        ),
        Claim(
            name="near",
            title="Over a short context 8 bits gain nothing: there is little to read",
            metric="tpot_mean_s",
            treatment=Arm(variant="fp8", workload="near"),
            baseline=Arm(variant="bf16", workload="near"),
            expect="unchanged",
            predict=step_ratio,
        ),
        Claim(
            name="far",
            title="Over a long context 8 bits make a shorter step: half the bytes are read",
            metric="tpot_mean_s",
            treatment=Arm(variant="fp8", workload="far"),
            baseline=Arm(variant="bf16", workload="far"),
            expect="falls",
            predict=step_ratio,
        ),
    ),
    forecasts=(
        Forecast(name="capacity", metric="kv_capacity_tokens",
                 arm=Arm(workload="near"), predict=capacity),
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
    scales={
        # there is time for no more, so it looks at its claims once
        "cpu": {"repeats": 5, "curve_repeats": 3, "most_repeats": 0},
        "gpu": {
            "flags": {
                "max-model-len": 32768,
                "enable-prefix-caching": True,
                "block-size": 16,
                "kv-cache-memory-bytes": 12 * 2**30,
                "max-num-batched-tokens": 2048,
            },
            **WITHOUT_E5M2,
            **tight(2 * 2**30),
            # 16 requests' keys and values are few bytes beside a small model's weights, too
            "workloads.near.prompt_tokens.tokens": 256,
            "workloads.near.prefix.tokens": 192,
            "workloads.near.loads": (Concurrent(users=16),),
            "workloads.near.output_tokens.tokens": 128,
            "workloads.far.prompt_tokens.tokens": 24576,
            "workloads.far.prefix.tokens": 24512,
            "workloads.far.loads": (Concurrent(users=16),),
            "workloads.far.output_tokens.tokens": 128,
            "workloads.growing.prompt_tokens.tokens": 256,
            "workloads.growing.output_tokens.tokens": 512,
            "workloads.growing.loads": tuple(Concurrent(users=n) for n in (32, 96, 192)),
            "claims.batch.treatment.load": "concurrent:192",
            "claims.batch.baseline.load": "concurrent:192",
            "requests": 480,  # of up to 24,576 tokens, which take long to write
            "warmup_s": 3,
            "window_s": 6,
        },
        "gpu-16": {"flags.kv-cache-memory-bytes": 4 * 2**30, **tight(2**30)},
        "gpu-141": tight(6 * 2**30),
    },
    quick={
        "repeats": 1,
        "probes": ("quality-quick",),
    },
    limits={
        "cpu": "Capacity, preemption and quality are the engine's own and carry over. Speed does"
        " not: this CPU widens 8-bit values in software, so that long contexts decode slower with"
        " them, where a GPU reads half the bytes and gains.",
        "gpu": "The long context is shared by all requests, so that it is prefilled once; each"
        " still reads it for itself in decode. `e5m2` is left out: of vLLM's kernels for a GPU only"
        " those that a CUDA toolkit has to compile keep it apart from e4m3.",
    },
    next_knobs=(
        'SET=\'workloads.far.only=["bf16","fp8","e5m2"]\' sends the long context to the coarser'
        " type too",
        *knobs(12 * 2**20, 2048),
    ),
)  # fmt: skip
