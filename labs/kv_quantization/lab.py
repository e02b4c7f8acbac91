"""KV quantization: what does a smaller KV cache buy, and what does it cost?

Every token of context keeps a key and a value in every layer: 2 x layers x KV heads x head
dimension x bytes. Stored in 8 bits instead of 16 the same memory holds twice the tokens, so twice
the requests run at once before the engine must *preempt*: throw a running request's cache away and
compute it again later. Decode reads the whole context for each token, so long contexts also decode
faster where reading is what takes the time; the 8-bit values must be widened again, which costs
where arithmetic is dear. And what is rounded is lost: quality is measured on the same engine.

`fp8` has 4 exponent and 3 mantissa bits (e4m3), `e5m2` the other way round. The `tight` pair has so
little KV memory that preemption can be seen.

What is evicted need not be lost. With `--kv-offloading-size` vLLM also keeps blocks in the host's
memory, and copies them back when a prompt that begins alike returns. That takes the bytes of its
keys and values over the link to the host (PCIe), where computing them again takes its FLOP: a fast
link beats a slow prefill at any length, a slow link only at lengths at which attention, which grows
as the square, is most of the work. A request that runs has all of its keys and values in the GPU's
own memory, so no longer prompt fits. On a CPU both memories are the same one, and vLLM refuses.

Turn: the types that get the long context (`workloads.far.only`), the memory
(`variants.fp8-tight.flags.kv-cache-memory-bytes`), the context
(`workloads.far.prompt_tokens.tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
)
CLAIMS = (
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
)
# A GPU's: prompts in turn, more of them than the KV cache holds, and the host's memory beside it
RECOMPUTE = PLAIN.but("recompute", {"max-model-len": 8192})
OFFLOAD = RECOMPUTE.but("offload", {"kv-offloading-size": 8.0})
RETURNING = Workload(
    name="returning",
    prompt_tokens=Fixed(tokens=8000),
    output_tokens=Fixed(tokens=8),
    prefix=Prefix(tokens=7936, groups=6),
    primed=True,  # so that each prompt is one that returns
    only=(RECOMPUTE.name, OFFLOAD.name),
    loads=(Concurrent(users=1),),
)
COPIED_BACK = Claim(
    name="returning",
    title="A prompt that returns after it was evicted has its first token sooner where its keys and"
    " values are copied back than where they are computed again",
    metric="ttft_mean_s",
    treatment=Arm(variant=OFFLOAD.name, workload="returning"),
    baseline=Arm(variant=RECOMPUTE.name, workload="returning"),
    expect="falls",
    predict=copied_back,
)
OF_OFFLOADING = (
    Evidence(arm=Arm(variant=OFFLOAD.name), kind="rises", metric=metrics.KV_LOADED_BYTES),
    Evidence(arm=Arm(variant=RECOMPUTE.name), kind="absent", metric=metrics.KV_LOADED_BYTES),
)


def on_a_gpu() -> dict[str, Any]:
    """Leave out e5m2, and add what only a GPU can do, to all that the lab has elsewhere.

    vLLM's FlashAttention does not have e5m2, its Triton kernels take it for e4m3 without a word,
    and FlashInfer compiles its own with a CUDA toolkit, which few machines have.
    """
    parts: dict[str, Sequence[Variant | Evidence | Workload | Claim]] = {
        "variants": (*(v for v in VARIANTS if v.name != "e5m2"), RECOMPUTE, OFFLOAD),
        "evidence": (*(e for e in EVIDENCE if e.arm.variant != "e5m2"), *OF_OFFLOADING),
        "workloads": (*WORKLOADS, RETURNING),
        "claims": (*CLAIMS, COPIED_BACK),
    }
    return {
        **{name: [part.model_dump() for part in of] for name, of in parts.items()},
        "workloads.near.only": ("bf16", "fp8"),
        "probed": ("bf16", "fp8"),
    }


def returning(memory_bytes: int, host_gib: float) -> dict[str, Any]:
    """Set the KV memory that returning prompts overflow, and the host's, which holds them all."""
    pair = (RECOMPUTE.name, OFFLOAD.name)
    return {
        **{f"variants.{name}.flags.kv-cache-memory-bytes": memory_bytes for name in pair},
        f"variants.{OFFLOAD.name}.flags.kv-offloading-size": host_gib,
    }


def knobs(tight_bytes: int, far_tokens: int) -> tuple[str, ...]:
    return (
        f'SET="variants.fp8-tight.flags.kv-cache-memory-bytes={tight_bytes // 2}" halves the memory'
        " of the quantized side: it preempts where BF16 did",
        f'SET="workloads.far.prompt_tokens.tokens={far_tokens // 2}'
        f' workloads.far.prefix.tokens={far_tokens // 2 - 64}" halves the long context',
    )


SHORT_RETURNING = (
    'SET="workloads.returning.prompt_tokens.tokens=1000 workloads.returning.prefix.tokens=960'
    ' workloads.returning.prefix.groups=48" sends short prompts that return: is copying still'
    " faster?"
)


def tight(memory_bytes: int) -> dict[str, Any]:
    """Set the tight pair's KV memory on a GPU, where its requests are longer."""
    sizes = {"kv-cache-memory-bytes": memory_bytes, "max-model-len": 1024}
    pair = ("bf16-tight", "fp8-tight")
    changes = {f"variants.{name}.flags.{flag}": n for name in pair for flag, n in sizes.items()}
    return {**changes, "next_knobs": (*knobs(memory_bytes, 24576), SHORT_RETURNING)}


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
    workloads=WORKLOADS,
    claims=CLAIMS,
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
            **on_a_gpu(),
            **tight(2 * 2**30),
            **returning(2 * 2**30, 8.0),
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
        "gpu-16": {
            "flags.kv-cache-memory-bytes": 4 * 2**30, **tight(2**30), **returning(2**30, 4.0),
        },
        "gpu-24": returning(2**30, 4.0),
        "gpu-141": {**tight(6 * 2**30), **returning(4 * 2**30, 16.0)},
        # three times the users read the bytes of a context three times as long, in engines that
        # are shaped like other labs'
        "gpu-quick": {
            "without": (RECOMPUTE.name, OFFLOAD.name),
            "flags.max-model-len": 8192,
            "flags.max-num-batched-tokens": 8192,
            "flags.kv-cache-memory-bytes": 4 * 2**30,
            "variants.bf16-tight.flags.max-model-len": 8192,
            "variants.fp8-tight.flags.max-model-len": 8192,
            "workloads.far.prompt_tokens.tokens": 8000,
            "workloads.far.prefix.tokens": 7936,
            "workloads.far.loads": (Concurrent(users=48),),
            "workloads.far.most_requests": 256,
            "workloads.growing.output_tokens.tokens": 256,
            "workloads.growing.loads": (Concurrent(users=192),),
            "workloads.growing.warmup_s": 2,
            "requests": 1536,
            "warmup_s": 0.5,
            "window_s": 2.5,
            "next_knobs": (*knobs(2 * 2**30, 8000)[1:], SHORT_RETURNING),
        },
        "gpu-80-quick": {
            "workloads.growing.loads": (Concurrent(users=96),),
            "claims.batch.treatment.load": "concurrent:96",
            "claims.batch.baseline.load": "concurrent:96",
        },
        "gpu-141-quick": {"flags.kv-cache-memory-bytes": 6 * 2**30},
    },
    quick={
        "repeats": 1,
        "probes": ("quality-quick",),
    },
    limits={
        "cpu": "Capacity, preemption and quality are the engine's own and carry over. Speed does"
        " not: this CPU widens 8-bit values in software, so that long contexts decode slower with"
        " them, where a GPU reads half the bytes and gains. Offloading to the host is arithmetic"
        " here: vLLM refuses it on a CPU.",
        "gpu": "The long context is shared by all requests, so that it is prefilled once; each"
        " still reads it for itself in decode. `e5m2` is left out: of vLLM's kernels for a GPU only"
        " those that a CUDA toolkit has to compile keep it apart from e4m3. Prompts return one"
        " after another: with many at a time copies share the link, and overlap with computing.",
    },
    next_knobs=(
        'SET=\'workloads.far.only=["bf16","fp8","e5m2"]\' sends the long context to the coarser'
        " type too",
        *knobs(12 * 2**20, 2048),
    ),
)  # fmt: skip
