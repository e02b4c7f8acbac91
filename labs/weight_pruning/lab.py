"""Zeros in the weights, anywhere or in a pattern, and half of the layers, beside a dense model."""

from __future__ import annotations

from math import erf, exp, pi, sqrt
from statistics import NormalDist

from labs.harness.spec import theory
from labs.harness.spec.declare import counter, falls, predicts, rises, sends, unchanged, users
from labs.harness.spec.lab import SLO, Claim, Lab, Point, Variant
from labs.harness.spec.theory import ROOFLINE
from serving import metrics

SAME_SPEED = 0.15
"""The margin of equality in speed, which tells from any gain by leaving zeros out: see the page."""


def step_ratio(treatment: Point, baseline: Point) -> float:
    """Divide the roofline's seconds of a decode step."""
    treated_s, untreated_s = (theory.forward_of(p, p.kv_bytes()) for p in (treatment, baseline))
    return treated_s / untreated_s


STORED = predicts(
    "max((weight + KV bytes) / bandwidth, FLOP / rate), pruned / dense",
    "zeros are stored and read as other weights are",
    "no kernel leaves out a product with zero",
    source=ROOFLINE,
)


@STORED
def same_step(pruned: Point, dense: Point) -> float:
    """Predict equality: a stored zero is read and multiplied as any other weight."""
    return step_ratio(pruned, dense)


@STORED
def same_rate(pruned: Point, dense: Point) -> float:
    return 1 / step_ratio(pruned, dense)


SHORTER = predicts(
    "max((weight + KV bytes) / bandwidth, FLOP / rate), half of the layers / all",
    "launching operations takes no time; it halves with the layers, the output matrix does not",
    source=ROOFLINE,
)


@SHORTER
def shorter_step(half: Point, dense: Point) -> float:
    return step_ratio(half, dense)


@SHORTER
def higher_rate(half: Point, dense: Point) -> float:
    return 1 / step_ratio(half, dense)


# --------------------------------------------------------------- what sparsity is, by arithmetic


def energy_gone(share: float) -> float:
    """Compute which share of their energy normal weights lose with their smallest `share`.

    The integral of w^2 phi(w) from -t to t, with t where a normal number lies within it with
    probability `share`: share - 2 t phi(t). For a small share it is (pi / 6) share^3.
    """
    t = NormalDist().inv_cdf((1 + share) / 2)
    return share - 2 * t * exp(-t * t / 2) / sqrt(2 * pi)


def energy_gone_2_4(steps: int = 4000, most: float = 8.0) -> float:
    """Compute the same where the two smaller of each four normal weights go.

    A weight of magnitude w is among the two smallest of four with probability P(at most one of the
    three others is smaller) = q^3 + 3 q^2 (1 - q), with q the probability that one is larger.
    """
    width, total = most / steps, 0.0
    for i in range(steps):
        w = (i + 0.5) * width
        q = 1 - erf(w / sqrt(2))
        among = q**3 + 3 * q**2 * (1 - q)
        total += 2 * width * w * w * exp(-w * w / 2) / sqrt(2 * pi) * among
    return total


def bytes_ratio(form: str, share: float, bits: int = 16) -> float:
    """Compute the bytes of a pruned matrix in a sparse form, as a ratio to the dense one's.

    `2:4`: half of the weights, each with a 2-bit index: (bits + 2) / (2 bits), 9/16 of 16-bit
    weights. `bitmap`: a bit for each weight, and those that are kept. `index`: a 16-bit column for
    each kept weight, as in CSR. `dense`: 1.
    """
    kept = 1 - share
    return {
        "dense": 1.0,
        "2:4": (bits + 2) / (2 * bits),
        "bitmap": (1 + kept * bits) / bits,
        "index": kept * (bits + 16) / bits,
    }[form]


# -------------------------------------------------------------------------------------- the lab

DENSE = Variant(name="dense")
SERVED = ("wanda-50", "wanda-2-4")
HALF = "half-depth"
ONE, MANY = users(1, 16)


TPOT, RATE = "tpot_mean_s", "output_tokens_per_s"


def same_tpot(name: str, variant: str) -> Claim:
    sides = f"{variant} / dense"
    return unchanged(name, TPOT, sides, "decode", ONE, by=same_step, margin=SAME_SPEED)


def same_throughput(name: str, variant: str) -> Claim:
    sides = f"{variant} / dense"
    return unchanged(name, RATE, sides, "decode", MANY, by=same_rate, margin=SAME_SPEED)


LAB = Lab(
    name="weight-pruning",
    answers=("CO-4", "CO-5", "CO-6", "CO-8"),
    variants=(
        DENSE,
        *(DENSE.but(name, weights=name) for name in SERVED),
        DENSE.but(HALF, weights="training"),
    ),
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": True,  # for the needles: what the loads send shares nothing
        "enforce-eager": True,
        "kv-cache-memory-bytes": 128 * 2**20,
    },
    workloads=(sends("decode", 32, 12, ONE, MANY),),
    claims=(
        same_tpot("half-one", "wanda-50"),
        same_tpot("pattern-one", "wanda-2-4"),
        same_throughput("half-many", "wanda-50"),
        same_throughput("pattern-many", "wanda-2-4"),
        falls("depth-one", TPOT, f"{HALF} / dense", "decode", ONE, by=shorter_step),
        rises("depth-many", RATE, f"{HALF} / dense", "decode", MANY, by=higher_rate),
    ),
    evidence=(counter(metrics.PREEMPTIONS, "stays"),),
    studies=("sparsity",),
    probes=("quality",),
    findings=("zeros", "sparsities", "kernels", "experts", "smaller", "quality"),
    plots=("cliff", "variants"),
    needs_text=("sparsity", "quality", "quality-quick", "zeros", "sparsities", "cliff"),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=384,
    warmup_s=0.5,
    window_s=2,
)
