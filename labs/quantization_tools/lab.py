"""Quantization tools: do the archived originals and their heirs agree, and what does the text do?

AutoGPTQ and AutoAWQ made 4-bit weights popular and are archived; GPTQModel and llm-compressor go
on from there. All of them round the same layers of the same model in groups of the same size on
the same calibration text, each in an environment of its own, and what they made is served by the
same engine: what differs is the tool. One more is only rounded to the nearest of the 16 levels, to
show what the recipes are worth, and one is made by the same tool on another text, Python code,
while quality is judged on prose: GPTQ makes up for its errors where the calibration text says that
they matter.

Making all of it takes about twenty minutes the first time, most of it setting up the four tools.

Turn: the text (`make quantize METHOD=w4a16-gptq-code` says how it is named), the length of the
questions (`probes`).
"""

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


def claim(name: str, title: str, heir: str, original: str) -> Claim:
    return Claim(
        name=name,
        title=title,
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
    title="Quantization tools",
    question="AutoGPTQ and AutoAWQ are archived: are the weights that their maintained successors"
    " make as fast and as good?",
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
        claim("gptq-heir", "GPTQModel's weights are as fast as AutoGPTQ's",
              "gptqmodel", "auto-gptq"),
        claim("gptq-vllm", "llm-compressor's GPTQ weights are as fast as AutoGPTQ's",
              "w4a16-gptq", "auto-gptq"),
        claim("awq-heir", "llm-compressor's AWQ weights are as fast as AutoAWQ's",
              "w4a16-awq", "autoawq"),
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
    scales={
        "gpu": {
            "slo.ttft_s": 0.5,
            "flags": {"enable-prefix-caching": True},
            "workloads.decode.prompt_tokens.tokens": 128,
            "workloads.decode.output_tokens.tokens": 128,
            "requests": 4096,
            "warmup_s": 2,
            "window_s": 6,
        }
    },
    quick={"repeats": 1, "probes": ("quality-quick",)},
    limits={
        "cpu": "Quality carries over. A small model loses more to 4 bits than a large one.",
        "gpu": "One model and one size of calibration set.",
    },
    next_knobs=(
        'SET="variants.autoawq.weights=w8a8" puts 8 bits into the same table',
    ),
)  # fmt: skip
