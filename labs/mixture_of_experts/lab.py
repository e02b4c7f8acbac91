"""Mixture of experts: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import (
    MARGIN,
    SLO,
    Arm,
    Claim,
    Evidence,
    Forecast,
    Lab,
    Point,
    Prediction,
    Variant,
)
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

SHAZEER = "Shazeer et al., Sparsely-Gated Mixture-of-Experts, 2017"
NEARLY = 0.25
"""Two models read about as much where their ratio is 1 within this share; the page says why."""


def experts_needed(experts: int, per_token: int, tokens: float) -> float:
    """Return how many of a layer's experts a step over so many tokens is expected to need.

    E (1 - (1 - k/E)^B): an expert stays idle where none of the B tokens is sent to it. Routing is
    taken to be even, and each token's independent of the others'.
    """
    idle: float = (1 - per_token / experts) ** tokens
    return experts * (1 - idle)


def step_s(point: Point) -> float:
    """Return the least seconds of a decode step with all requests in flight."""
    return theory.decode_step_s(point.shape, point.ceilings, point.load.users, point.context_tokens)


FORMULA = "max((weights read + KV bytes) / bandwidth, FLOP / rate)"
ASSUMPTIONS = (
    "a mixture reads (1 - (1 - k/E)^B) of its experts: tokens are routed evenly, each by itself",
    "routing, launching, scheduling and sampling take no time",
    "no prompt is prefilled between two tokens",
)


def step_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=step_s(treatment) / step_s(baseline),
        formula=f"{FORMULA}, treatment / baseline",
        assumptions=ASSUMPTIONS,
        source=SHAZEER,
    )


def floor(point: Point) -> Prediction:
    return Prediction(
        value=step_s(point),
        kind="floor",
        formula=FORMULA,
        assumptions=ASSUMPTIONS,
        source="Williams et al., Roofline, 2009",
    )


# -------------------------------------------------------------------------------------- the lab

MIXTURE = Variant(name="mixture")
TOTAL, ACTIVE = "dense-total", "dense-active"
VARIANTS = (MIXTURE, MIXTURE.but(TOTAL, weights=TOTAL), MIXTURE.but(ACTIVE, weights=ACTIVE))


def arm(variant: str, users: int) -> Arm:
    return Arm(variant=variant, workload="decode", load=f"concurrent:{users}")


def claim(name: str, treatment: Arm, baseline: Arm, expect: str, margin: float = MARGIN) -> Claim:
    return Claim.model_validate(
        {
            "name": name,
            "metric": "tpot_mean_s",
            "treatment": treatment,
            "baseline": baseline,
            "expect": expect,
            "predict": step_ratio,
            "margin": margin,
        }
    )


def claims(some: int) -> tuple[Claim, ...]:
    """State what is expected at one request, and at `some` in flight, which memory limits."""
    return (
        claim("one-total", arm("mixture", 1), arm(TOTAL, 1), "falls"),
        claim("one-active", arm("mixture", 1), arm(ACTIVE, 1), "unchanged", NEARLY),
        claim("batch", arm("mixture", some), arm(ACTIVE, some), "rises"),
    )


def gain_lost(many: int) -> Claim:
    """State what is expected of so many in flight where memory limits the dense model as large."""
    return claim("many-total", arm("mixture", many), arm(TOTAL, many), "unchanged", NEARLY)


EVIDENCE = (
    Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    Evidence.echo("mixture", metrics.ENGINE_CONFIG, "architecture", "Qwen3MoeForCausalLM"),
    Evidence.echo("mixture", metrics.ENGINE_CONFIG, "routing", metrics.EVEN_ROUTING),
    Evidence.echo(TOTAL, metrics.ENGINE_CONFIG, "architecture", "Qwen3ForCausalLM"),
    Evidence.echo(ACTIVE, metrics.ENGINE_CONFIG, "architecture", "Qwen3ForCausalLM"),
)

LAB = Lab(
    name="mixture-of-experts",
    answers=("CO-4",),
    variants=VARIANTS,
    shape="moe-tiny",
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        Workload(
            name="decode",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=32),
            loads=(Concurrent(users=1), Concurrent(users=4), Concurrent(users=16)),
        ),
    ),
    claims=claims(4),
    forecasts=(
        Forecast(name="step", metric="tpot_mean_s", arm=Arm(workload="decode"), predict=floor),
    ),
    evidence=EVIDENCE,
    findings=("shapes", "batches"),
    plots=("batches",),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=256,
    warmup_s=0.5,
    window_s=2,
    scales={"gpu": {"claims": (*claims(64), gain_lost(64))}},
)
