"""Weight quantization: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import counter, falls, predicts, rises, sends, unchanged, users
from labs.harness.spec.lab import SLO, Lab, Point, Prediction, Variant
from labs.harness.spec.theory import ROOFLINE
from serving import metrics


def step_s(point: Point) -> float:
    return theory.forward_of(point, point.kv_bytes())


BY_BYTES = predicts(
    "max((weight + KV bytes) / bandwidth, FLOP / rate), quantized / not quantized",
    "unpacking weights is free",
    "arithmetic takes as long as without quantizing, or hides",
    source=ROOFLINE,
)


@BY_BYTES
def by_bytes(quantized: Point, plain: Point) -> float:
    return step_s(quantized) / step_s(plain)


@BY_BYTES
def throughput_by_bytes(quantized: Point, plain: Point) -> float:
    return 1 / by_bytes(quantized, plain).value


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
            source=ROOFLINE,
        )
    linear = 2 * (plain.shape.matmul_params - plain.shape.head_params) * plain.prompt_tokens
    share = linear / theory.prefill_flops(plain.shape, plain.prompt_tokens)
    return Prediction(
        value=1 - share + share * plain.ceilings.flops_per_s / fp8,
        formula="(linear FLOP / FP8 rate + other FLOP / BF16 rate) / (FLOP / BF16 rate)",
        assumptions=("prefill is bound by compute", "scaling the activations is free"),
        source=ROOFLINE,
    )


BASE = Variant(name="bf16")
RECIPES = ("w8a8-rtn", "w8a8", "w4a16-gptq", "w4a16-awq")
# no CPU has a fast kernel for FP8; a GPU without FP8 products widens the weights as it reads them
FP8 = "fp8"
KINDS = ("bf16", "w8a8", "w4a16-gptq", FP8)
ONE, MANY = users(1, 16)
TPOT, TTFT, RATE = "tpot_mean_s", "ttft_mean_s", "output_tokens_per_s"


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
    answers=("CO-1", "CO-2", "CO-3", "CO-7", "ME-2", "IP-2"),
    variants=(BASE, *(BASE.but(name, weights=name) for name in (*RECIPES, FP8))),
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": True,  # for the needles: what the loads send shares nothing
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        sends("decode", 32, 12, ONE, MANY),
        sends("prefill", 192, 1, ONE, only=KINDS),  # the other recipes make the same shapes
    ),
    claims=(
        falls("w8-one", TPOT, "w8a8 / bf16", "decode", ONE, by=by_bytes),
        falls("w4-one", TPOT, "w4a16-gptq / bf16", "decode", ONE, by=by_bytes),
        rises("w8-many", RATE, "w8a8 / bf16", "decode", MANY, by=throughput_by_bytes),
        rises("w4-many", RATE, "w4a16-gptq / bf16", "decode", MANY, by=throughput_by_bytes),
        unchanged("w4-prefill", TTFT, "w4a16-gptq / bf16", "prefill", ONE, by=prefill_by_rate),
        falls("fp8-one", TPOT, "fp8 / bf16", "decode", ONE, by=by_bytes),
        rises("fp8-many", RATE, "fp8 / bf16", "decode", MANY, by=throughput_by_bytes),
        falls("fp8-prefill", TTFT, "fp8 / bf16", "prefill", ONE, by=prefill_by_rate),
    ),
    evidence=(counter(metrics.PREEMPTIONS, "stays"),),
    studies=("outliers",),
    probes=("quality",),
    findings=("weights", "outliers", "quality", "needles"),
    plots=("tradeoff", "variants"),
    needs_text=("outliers", "quality", "quality-quick", "needles", "tradeoff"),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=384,
    warmup_s=0.5,
    window_s=2,
    dummy=on_random_weights,
)
