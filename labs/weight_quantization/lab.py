"""Weight quantization: what do fewer bits a weight buy, what do they cost, and which recipe?

At a batch of one, decode reads every weight for every token: halve the bytes and, if reading is
all it does, a token takes half the time. In a large batch, and in prefill, arithmetic is the limit:
there 8-bit activations (W8A8) gain, if the hardware multiplies 8-bit numbers faster, and 4-bit
weights (W4A16), which are unpacked to 16 bits first, gain nothing. What is rounded is lost; the
recipes differ in how they round. *Round to nearest* is the naive one. *SmoothQuant* moves the
outliers of the activations into the weights before 8-bit rounding; *GPTQ* rounds weight by weight
and lets the rest of the row make up for the error; *AWQ* scales up the channels that the
activations make matter. Quality is measured on the served engine, against BF16.

Turn: the recipe (`make quantize METHOD=..` makes another, `variants.w4a16-gptq.weights` serves
it), the batch (`workloads.decode.loads`).
"""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics


def step_s(point: Point) -> float:
    return theory.forward_s(point.shape, point.ceilings, point.load.users, point.kv_bytes())


def by_bytes(quantized: Point, plain: Point) -> Prediction:
    return Prediction(
        value=step_s(quantized) / step_s(plain),
        formula="max((weight + KV bytes) / bandwidth, FLOP / rate), quantized / not quantized",
        assumptions=(
            "unpacking weights is free",
            "arithmetic takes as long as without quantizing, or hides",
        ),
        source="Williams et al., Roofline, 2009",
    )


def throughput_by_bytes(quantized: Point, plain: Point) -> Prediction:
    slower = by_bytes(quantized, plain)
    return slower.model_copy(update={"value": 1 / slower.value})


def prefill_by_rate(quantized: Point, plain: Point) -> Prediction:
    """Predict prefill by rate: FP8 weights run linear layers at the GPU's FP8 rate, if any."""
    fp8 = plain.ceilings.fp8_flops_per_s
    if quantized.variant.weights != "fp8" or not fp8:
        return Prediction(
            value=1.0,
            formula="FLOP / rate, the same on both sides",
            assumptions=(
                "prefill is bound by compute",
                "8-bit products run no faster than others",
            ),
            source="Williams et al., Roofline, 2009",
        )
    linear = 2 * (plain.shape.matmul_params - plain.shape.head_params) * plain.prompt_tokens
    share = linear / theory.prefill_flops(plain.shape, plain.prompt_tokens)
    return Prediction(
        value=1 - share + share * plain.ceilings.flops_per_s / fp8,
        formula="(linear FLOP / FP8 rate + other FLOP / BF16 rate) / (FLOP / BF16 rate)",
        assumptions=("prefill is bound by compute", "scaling the activations is free"),
        source="Williams et al., Roofline, 2009",
    )


BASE = Variant(name="bf16")
RECIPES = ("w8a8-rtn", "w8a8", "w4a16-gptq", "w4a16-awq")
VARIANTS = (BASE, *(BASE.but(name, weights=name) for name in RECIPES))
ROUNDED = (
    'SET="variants.w4a16-gptq.weights=w4a16-rtn" serves 4 bits rounded to nearest: see what GPTQ'
    " was worth"
)


def claim(
    name: str, title: str, metric: str, variant: str, workload: str, load: int, expect: str
) -> Claim:
    predict = {"tpot_mean_s": by_bytes, "output_tokens_per_s": throughput_by_bytes}
    arm = {"workload": workload, "load": f"concurrent:{load}"}
    return Claim.model_validate(
        {
            "name": name,
            "title": title,
            "metric": metric,
            "treatment": {"variant": variant, **arm},
            "baseline": {"variant": "bf16", **arm},
            "expect": expect,
            "predict": predict.get(metric, prefill_by_rate),
        }
    )


def claims(many: int) -> tuple[Claim, ...]:
    return (
        claim("w8-one", "Half the bytes shorten a single stream's TPOT (INT8)",
              "tpot_mean_s", "w8a8", "decode", 1, "falls"),
        claim("w4-one", "A quarter of the bytes shorten a single stream's TPOT (4 bits)",
              "tpot_mean_s", "w4a16-gptq", "decode", 1, "falls"),
        claim("w8-many", f"INT8 still gains throughput with {many} in flight",
              "output_tokens_per_s", "w8a8", "decode", many, "rises"),
        claim("w4-many", f"4 bits gain throughput with {many} in flight, if unpacking is free",
              "output_tokens_per_s", "w4a16-gptq", "decode", many, "rises"),
        claim("w4-prefill", "Prefill gains nothing from 4-bit weights",
              "ttft_mean_s", "w4a16-gptq", "prefill", 1, "unchanged"),
    )  # fmt: skip


def fp8_claims(many: int) -> tuple[Claim, ...]:
    return (
        claim("fp8-one", "Half the bytes shorten a single stream's TPOT (FP8)",
              "tpot_mean_s", "fp8", "decode", 1, "falls"),
        claim("fp8-many", f"FP8 still gains throughput with {many} in flight",
              "output_tokens_per_s", "fp8", "decode", many, "rises"),
        claim("fp8-prefill", "Prefill gains where the GPU multiplies FP8",
              "ttft_mean_s", "fp8", "prefill", 1, "falls"),
    )  # fmt: skip


# no CPU has a fast kernel for FP8; a GPU without FP8 products widens the weights as it reads them
FP8 = BASE.but("fp8", weights="fp8")
KINDS = ("bf16", "w8a8", "w4a16-gptq", "fp8")


def on_random_weights(lab: Lab) -> Lab:
    """Keep one recipe for each kind of weights, as only quality tells recipes apart."""
    return lab.model_copy(
        update={
            "variants": tuple(v for v in lab.variants if v.name in KINDS),
            "answers": ("CO-1", "IP-2"),
            "plots": ("variants",),
            "left_out": (*lab.left_out, "w8a8-rtn, w4a16-awq: the same bytes as another recipe's"),
            "next_knobs": lab.next_knobs[1:],  # rounding matters to quality alone
        }
    )


LAB = Lab(
    name="weight-quantization",
    title="Weight quantization",
    question="What do 8-bit and 4-bit weights gain for one user and for many, and which method"
    " keeps the quality?",
    answers=("CO-1", "CO-2", "CO-3", "CO-7", "ME-2", "IP-2"),
    variants=VARIANTS,
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": True,  # for the needles: what the loads send shares nothing
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        Workload(
            name="decode",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=12),
            loads=(Concurrent(users=1), Concurrent(users=16)),
        ),
        Workload(
            name="prefill",
            prompt_tokens=Fixed(tokens=192),
            output_tokens=Fixed(tokens=1),
            only=("bf16", "w8a8", "w4a16-gptq"),  # the other recipes make the same shapes
            loads=(Concurrent(users=1),),
        ),
    ),
    claims=claims(16),
    evidence=(Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),),
    studies=("outliers",),
    probes=("quality",),
    findings=("weights", "outliers", "quality", "needles"),
    plots=("tradeoff", "variants"),
    needs_text=("outliers", "quality", "quality-quick", "needles", "tradeoff"),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=384,
    warmup_s=0.5,
    window_s=2,
    scales={
        "cpu": {
            "repeats": 3,  # of many points; those that are undecided get more
            "most_s": 540,  # of which the quality of five engines takes nearly four minutes
        },
        "gpu": {
            "slo.ttft_s": 0.5,
            "flags": {"enable-prefix-caching": True},
            "workloads.decode.prompt_tokens.tokens": 128,
            "workloads.decode.output_tokens.tokens": 128,
            "workloads.decode.loads": (Concurrent(users=1), Concurrent(users=128)),
            "workloads.prefill.prompt_tokens.tokens": 2048,
            "workloads.prefill.only": KINDS,
            "variants": [v.model_dump() for v in (*VARIANTS, FP8)],
            "claims": [c.model_dump() for c in (*claims(128), *fp8_claims(128))],
            "next_knobs": (ROUNDED,),
            "requests": 4096,
            "warmup_s": 2,
            "window_s": 6,
        },
        "gpu-quick": {
            "flags.kv-cache-memory-bytes": 5 * 2**30,  # holds all that is sent at once
            "workloads.prefill.warmup_s": 0.5,
            "workloads.prefill.most_requests": 384,
            "requests": 2048,
            "warmup_s": 1,
            "window_s": 2.5,
        },
        "gpu-141-quick": {"flags.kv-cache-memory-bytes": 9 * 2**30},
    },
    dummy=on_random_weights,
    quick={"repeats": 1, "probes": ("quality-quick",)},
    limits={
        "cpu": "Quality and bytes carry over; speed does not. A CPU has instructions that"
        " multiply INT8 but has to unpack 4 bits in software, on every step: W4 saves memory, not"
        " time. On a GPU at a batch of one the order is the other way round.",
        "gpu": "One model: larger ones lose less quality at 4 bits. FP8 activations take a GPU of"
        " compute capability 8.9; an older one widens FP8 weights and gains only what it need not"
        " read.",
    },
    next_knobs=(
        ROUNDED,
        'SET="variants.w8a8.weights=fp8" serves FP8 weights, where the hardware has them',
        'SET=\'workloads.decode.loads=["concurrent:1","concurrent:16","concurrent:64"]\' looks'
        " further along the batch",
    ),
)  # fmt: skip
