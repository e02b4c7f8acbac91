"""Quantization tools: what is asked of them. Their words stand in page.md, sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec.declare import counter, predicts, sends, unchanged, users
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from serving import metrics


@predicts(
    "1: 4 bits a weight, one scale a group, the same kernel",
    "the formats differ in their headers, not in what a step reads",
    source="Frantar et al., GPTQ, 2022; Lin et al., AWQ, 2023",
)
def same_bytes(_treatment: Point, _baseline: Point) -> float:
    return 1.0


BASE = Variant(name="bf16")
MADE = (
    "w4a16-rtn", "w4a16-gptq", "w4a16-gptq-code", "gptqmodel", "auto-gptq", "w4a16-awq", "autoawq",
)  # fmt: skip

LAB = Lab(
    name="quantization-tools",
    answers=("CO-3", "CO-7", "ME-2"),
    variants=(BASE, *(BASE.but(name, weights=name) for name in MADE)),
    flags={
        "max-model-len": 1280,
        "enable-prefix-caching": True,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(sends("decode", 32, 12, *users(1)),),
    claims=tuple(
        unchanged(name, "tpot_mean_s", f"{heir} / {original}", by=same_bytes)
        for name, heir, original in (
            ("gptq-heir", "gptqmodel", "auto-gptq"),
            ("gptq-vllm", "w4a16-gptq", "auto-gptq"),
            ("awq-heir", "w4a16-awq", "autoawq"),
        )
    ),
    evidence=(counter(metrics.PREEMPTIONS, "stays"),),
    made_here=True,  # weights that others publish have another calibration text
    probes=("quality",),
    findings=("tools", "quality", "weights"),
    plots=("tradeoff",),
    needs_text=("quality", "quality-quick", "tools", "tradeoff"),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=384,
    warmup_s=0.5,
    window_s=2.8,
)
