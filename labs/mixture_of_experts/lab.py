"""Mixture of experts: what does leaving most of a model out of each step gain, and how long?

A layer of a *mixture of experts* has E small MLPs, the experts, in the place of one large MLP, and
a router that sends each token to k of them (Shazeer et al., 2017). A token is multiplied with its
own k alone, so a step over one token reads a few of the experts; all of them have to lie in memory,
as nobody knows beforehand which the next token needs. A batch needs more of them: where B tokens
are routed evenly, and each independently of the others, a step is expected to need
E (1 - (1 - k/E)^B) of a layer's experts. With k/E = 1/8 that is an eighth for one request, two
fifths for four and nine tenths for sixteen. While memory bandwidth is what limits decode, that is
what happens to the gain: one user has the speed of a small model, and a full batch nearly that of
the large one. Arithmetic is saved at every batch, since each token is still multiplied with its own
experts only; that pays where arithmetic limits, as in prefill.

The mixture stands beside two dense models, which differ from it in their MLPs alone. `dense-total`
has an MLP as wide as all experts together, so that it holds as many bytes; `dense-active` one as
wide as the k experts of a token, so that it reads as many for one token. All three have random
weights, since what is read does not depend on their values, and the engine is told to route each
token to experts drawn evenly. Trained routers do so only nearly; where they are uneven, a batch
needs fewer experts.

Claims about ratios that are to be nearly 1 have a margin of 25%, which was set before the first
run. Reading all experts and reading a token's own lie a factor of more than three and a half apart,
so a difference of a quarter still tells which of the two it is; and routing, launching and the
kernels' own speed, which bytes do not count, may take as much.

That a full batch loses the gain is claimed where memory still limits the dense model as large: on a
GPU. On a CPU its arithmetic may take longer than reading, by how much depends on the CPU, and the
mixture then keeps a part of its gain.

Turn: the batch (`workloads.decode.loads`), the length of the answers
(`workloads.decode.output_tokens.tokens`), the shape (`MODEL=moe-3b`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
"""Two models read about as much where their ratio is 1 within this share; the docstring says why"""


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


def claim(
    name: str, title: str, treatment: Arm, baseline: Arm, expect: str, margin: float = MARGIN
) -> Claim:
    return Claim.model_validate(
        {
            "name": name,
            "title": title,
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
        claim("one-total",
              "One user's tokens come sooner from the mixture than from a dense model as large",
              arm("mixture", 1), arm(TOTAL, 1), "falls"),
        claim("one-active",
              "One user's tokens come about as soon from the mixture as from a dense model with the"
              " parameters of one token",
              arm("mixture", 1), arm(ACTIVE, 1), "unchanged", NEARLY),
        claim("batch",
              f"With {some} in flight tokens come later from the mixture than from a dense model"
              " with the parameters of one token",
              arm("mixture", some), arm(ACTIVE, some), "rises"),
    )  # fmt: skip


def gain_lost(many: int) -> Claim:
    """State what is expected of so many in flight where memory limits the dense model as large."""
    return claim("many-total",
                 f"With {many} in flight little is left of the gain over a dense model as large",
                 arm("mixture", many), arm(TOTAL, many), "unchanged", NEARLY)  # fmt: skip


def knobs(loads: Sequence[int], tokens: int) -> tuple[str, ...]:
    """Say what to turn next: loads that go further, and prompts of so many tokens."""
    further = ",".join(f'"concurrent:{users}"' for users in loads)
    return (
        f"SET='workloads.decode.loads=[{further}]' looks further along the batch: from where"
        " arithmetic limits a dense model as large, the mixture gains again",
        f'SET="workloads.decode.prompt_tokens.tokens={tokens}" has each request bring some more'
        " keys and values, which all three read alike, and a longer prefill",
    )


EVIDENCE = (
    Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    Evidence.echo("mixture", metrics.ENGINE_CONFIG, "architecture", "Qwen3MoeForCausalLM"),
    Evidence.echo("mixture", metrics.ENGINE_CONFIG, "routing", metrics.EVEN_ROUTING),
    Evidence.echo(TOTAL, metrics.ENGINE_CONFIG, "architecture", "Qwen3ForCausalLM"),
    Evidence.echo(ACTIVE, metrics.ENGINE_CONFIG, "architecture", "Qwen3ForCausalLM"),
)

LARGE = {"shape": "moe-30b", "flags.kv-cache-memory-bytes": 8 * 2**30}

LAB = Lab(
    name="mixture-of-experts",
    title="Mixture of experts",
    question="How much faster is a mixture of experts than a dense model as large, for one user and"
    " for many?",
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
    scales={
        "cpu": {"repeats": 3},
        "gpu": {
            "shape": "moe-3b",
            "flags": {
                "enable-prefix-caching": False,
                "kv-cache-memory-bytes": 4 * 2**30,
            },
            "slo.ttft_s": 0.5,
            "workloads.decode.output_tokens.tokens": 128,
            "workloads.decode.loads": tuple(Concurrent(users=n) for n in (1, 4, 16, 64)),
            "claims": [c.model_dump() for c in (*claims(64), gain_lost(64))],
            "next_knobs": knobs((1, 64, 256), 128),
            "requests": 4096,
            "warmup_s": 2,
            "window_s": 6,
        },
        "gpu-80": LARGE,
        "gpu-141": LARGE,
    },
    quick={"repeats": 1},
    limits={
        "cpu": "The shape is small, but larger than most caches, so that one"
        " user's step reads memory. Without fast BF16, arithmetic limits the dense model as large"
        " before 16 are in flight: the mixture keeps a part of its gain there, so that no claim"
        " says what is left of it. How many experts a batch is expected to need is arithmetic for"
        " even routing, on any machine. How much a step takes beside reading them does not carry"
        " over: a CPU's kernel for experts is another than a GPU's. Random weights tell nothing of"
        " the text that a mixture writes.",
        "gpu": "One GPU holds all experts. Larger mixtures spread them over several, and what"
        " sending tokens between those costs is not measured here. Random weights tell nothing of"
        " the text that a mixture writes.",
    },
    next_knobs=knobs((1, 16, 64), 128),
)  # fmt: skip
