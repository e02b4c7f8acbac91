"""Mixture of experts: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec.declare import (
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
from labs.harness.spec.lab import SLO, Claim, Lab, Point, Variant
from labs.harness.spec.theory import ROOFLINE, step_of
from serving import metrics

SHAZEER = "Shazeer et al., Sparsely-Gated Mixture-of-Experts, 2017"
NEARLY = 0.25
"""Two models read about as much where their ratio is 1 within this share; the page says why."""


FORMULA = "max((weights read + KV bytes) / bandwidth, FLOP / rate)"
ASSUMPTIONS = (
    "a mixture reads (1 - (1 - k/E)^B) of its experts: tokens are routed evenly, each by itself",
    "routing, launching, scheduling and sampling take no time",
    "no prompt is prefilled between two tokens",
)


@predicts(f"{FORMULA}, treatment / baseline", *ASSUMPTIONS, source=SHAZEER)
def step_ratio(treatment: Point, baseline: Point) -> float:
    return step_of(treatment) / step_of(baseline)


@predicts(FORMULA, *ASSUMPTIONS, source=ROOFLINE, kind="floor")
def floor(point: Point) -> float:
    return step_of(point)


MIXTURE = Variant(name="mixture")
TOTAL, ACTIVE = "dense-total", "dense-active"
TO_TOTAL, TO_ACTIVE = (f"{MIXTURE.name} / {dense}" for dense in (TOTAL, ACTIVE))
TPOT = "tpot_mean_s"
DENSE = "Qwen3ForCausalLM"


def claims(some: int) -> tuple[Claim, ...]:
    """State what is expected at one request, and at `some` in flight, which memory limits."""
    one, many = users(1, some)
    return (
        falls("one-total", TPOT, TO_TOTAL, "decode", one, by=step_ratio),
        unchanged("one-active", TPOT, TO_ACTIVE, "decode", one, by=step_ratio, margin=NEARLY),
        rises("batch", TPOT, TO_ACTIVE, "decode", many, by=step_ratio),
    )


def gain_lost(many: int) -> Claim:
    """State what is expected of so many in flight where memory limits the dense model as large."""
    (load,) = users(many)
    return unchanged("many-total", TPOT, TO_TOTAL, "decode", load, by=step_ratio, margin=NEARLY)


LAB = Lab(
    name="mixture-of-experts",
    answers=("CO-4",),
    variants=(MIXTURE, *(MIXTURE.but(dense, weights=dense) for dense in (TOTAL, ACTIVE))),
    shape="moe-tiny",
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(sends("decode", 32, 32, *users(1, 4, 16)),),
    claims=claims(4),
    forecasts=(forecast("step", TPOT, floor, workload="decode"),),
    evidence=(
        counter(metrics.PREEMPTIONS, "stays"),
        *echoes(metrics.ENGINE_CONFIG, "architecture", {"mixture": "Qwen3MoeForCausalLM"}),
        *echoes(metrics.ENGINE_CONFIG, "routing", {"mixture": metrics.EVEN_ROUTING}),
        *echoes(metrics.ENGINE_CONFIG, "architecture", dict.fromkeys((TOTAL, ACTIVE), DENSE)),
    ),
    findings=("shapes", "batches"),
    plots=("batches",),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=256,
    warmup_s=0.5,
    window_s=2,
    scales={"gpu": {"claims": (*claims(64), gain_lost(64))}},
)
