"""Weight quantization: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

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
# no CPU has a fast kernel for FP8; a GPU without FP8 products widens the weights as it reads them
FP8 = "fp8"
KINDS = ("bf16", "w8a8", "w4a16-gptq", FP8)


def claim(name: str, metric: str, variant: str, workload: str, load: int, expect: str) -> Claim:
    predict = {"tpot_mean_s": by_bytes, "output_tokens_per_s": throughput_by_bytes}
    arm = {"workload": workload, "load": f"concurrent:{load}"}
    return Claim.model_validate(
        {
            "name": name,
            "metric": metric,
            "treatment": {"variant": variant, **arm},
            "baseline": {"variant": "bf16", **arm},
            "expect": expect,
            "predict": predict.get(metric, prefill_by_rate),
        }
    )


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
            only=KINDS,  # the other recipes make the same shapes
            loads=(Concurrent(users=1),),
        ),
    ),
    claims=(
        claim("w8-one", "tpot_mean_s", "w8a8", "decode", 1, "falls"),
        claim("w4-one", "tpot_mean_s", "w4a16-gptq", "decode", 1, "falls"),
        claim("w8-many", "output_tokens_per_s", "w8a8", "decode", 16, "rises"),
        claim("w4-many", "output_tokens_per_s", "w4a16-gptq", "decode", 16, "rises"),
        claim("w4-prefill", "ttft_mean_s", "w4a16-gptq", "prefill", 1, "unchanged"),
        claim("fp8-one", "tpot_mean_s", FP8, "decode", 1, "falls"),
        claim("fp8-many", "output_tokens_per_s", FP8, "decode", 16, "rises"),
        claim("fp8-prefill", "ttft_mean_s", FP8, "prefill", 1, "falls"),
    ),
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
    dummy=on_random_weights,
)
