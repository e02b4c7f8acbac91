"""Quantization tools: what is asked of them. Their words stand in page.md, sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics


def same_bytes(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=1.0,
        formula="1: 4 bits a weight, one scale a group, the same kernel",
        assumptions=("the formats differ in their headers, not in what a step reads",),
        source="Frantar et al., GPTQ, 2022; Lin et al., AWQ, 2023",
    )


def claim(name: str, heir: str, original: str) -> Claim:
    return Claim(
        name=name,
        metric="tpot_mean_s",
        treatment=Arm(variant=heir),
        baseline=Arm(variant=original),
        expect="unchanged",
        predict=same_bytes,
    )


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
    workloads=(
        Workload(
            name="decode",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=12),
            loads=(Concurrent(users=1),),
        ),
    ),
    claims=(
        claim("gptq-heir", "gptqmodel", "auto-gptq"),
        claim("gptq-vllm", "w4a16-gptq", "auto-gptq"),
        claim("awq-heir", "w4a16-awq", "autoawq"),
    ),
    evidence=(Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),),
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
