"""Pruning: what do zeros in the weights cost, and do they make anything faster?

Most weights of a network are small, and dropping the smallest changes little. Of normally
distributed weights the smallest tenth holds 0.05% of the energy (the sum of squares), the smaller
half 7%, and seven tenths 22%: at first it grows with the cube of the sparsity. So pruning is
nearly free for a while, and then it falls off a cliff, since the layers' errors add up on the way
through the network. *Magnitude* pruning drops the smallest weights of each matrix. *Wanda* (Sun et
al., 2023) looks at what they do: |weight| times the norm of the input that it meets, the lowest of
each row. *2:4* leaves two of four neighbours, as a sparse tensor core wants it.

A zero saves nothing by itself. Stored among the others it is read as they are, and multiplied as
they are: the engine here has no sparse kernels (vLLM removed those for 2:4 in 2026), so the step
takes as long as before. What a kernel could gain is arithmetic: with two bits of index for each
kept weight, 2:4 reads 9/16 of the bytes. A *mixture of experts* gains it without such a kernel: it
reads and multiplies whole matrices, and leaves whole matrices out.

How much perplexity a sparsity costs does not follow from first principles, so none is forecast; it
is measured at seven sparsities by both methods, without an engine, before the run, and two of the
pruned models are served. The *knee* is defined beforehand: the sparsity after which ten points
more first multiply perplexity by over 1.10.

That the speed is the same is claimed within 15%. The question is whether the engine leaves zeros
out: a kernel that did would take about 0.66 times as long for 2:4 with the bundled model, by its
bytes, and one that reached half of that gain 0.81 times (its square root). A ratio within 15% of 1,
which is 0.87 to 1.15, excludes both. To show equality within 5%, as where a setting is chosen,
would take many more repeats with 16 in flight, and would answer no more.

Turn: the sparsity (`variants.wanda-50.weights=wanda-30`: 10 to 70, or 2-4, by either method), the
batch (`workloads.decode.loads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import erf, exp, pi, sqrt
from statistics import NormalDist

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Workload
from serving import metrics

WANDA = "Sun et al., Wanda, 2023"
KNEE_FACTOR = 1.10
"""Ten points of sparsity that multiply perplexity by more than this are beyond the knee."""
SAME_SPEED = 0.15
"""The margin of equality in speed, which tells from any gain by leaving zeros out: see above."""


def same_step(pruned: Point, dense: Point) -> Prediction:
    """Predict equality: a stored zero is read and multiplied as any other weight."""

    def step_s(point: Point) -> float:
        kv_bytes = point.kv_bytes()
        return theory.forward_s(point.shape, point.ceilings, point.load.users, kv_bytes)

    return Prediction(
        value=step_s(pruned) / step_s(dense),
        formula="max((weight + KV bytes) / bandwidth, FLOP / rate), pruned / dense",
        assumptions=(
            "zeros are stored and read as other weights are",
            "no kernel leaves out a product with zero",
        ),
        source="Williams et al., Roofline, 2009",
    )


def same_rate(pruned: Point, dense: Point) -> Prediction:
    slower = same_step(pruned, dense)
    return slower.model_copy(update={"value": 1 / slower.value})


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


def knee(perplexities: Sequence[tuple[float, float]]) -> float | None:
    """Return the sparsity after which a step first multiplies perplexity by over `KNEE_FACTOR`.

    `perplexities` are (sparsity, perplexity) from the dense model on, ten points apart; None where
    no step does.
    """
    for (share, before), (_, after) in pairwise(perplexities):
        if after > KNEE_FACTOR * before:
            return share
    return None


# -------------------------------------------------------------------------------------- the lab

DENSE = Variant(name="dense")
SERVED = ("wanda-50", "wanda-2-4")
VARIANTS = (DENSE, *(DENSE.but(name, weights=name) for name in SERVED))


def claim(name: str, title: str, metric: str, variant: str, load: int) -> Claim:
    arm = {"workload": "decode", "load": f"concurrent:{load}"}
    return Claim(
        name=name,
        title=title,
        metric=metric,
        treatment=Arm(variant=variant, **arm),
        baseline=Arm(variant="dense", **arm),
        expect="unchanged",
        predict=same_step if metric == "tpot_mean_s" else same_rate,
        margin=SAME_SPEED,
    )


def claims(many: int) -> tuple[Claim, ...]:
    return (
        claim("half-one",
              "Half of the weights are zero, and a single stream's TPOT is the same",
              "tpot_mean_s", "wanda-50", 1),
        claim("pattern-one",
              "Two of each four weights are zero (2:4), and a single stream's TPOT is the same",
              "tpot_mean_s", "wanda-2-4", 1),
        claim("half-many",
              f"Half of the weights are zero, and throughput with {many} in flight is the same",
              "output_tokens_per_s", "wanda-50", many),
        claim("pattern-many",
              f"Two of each four weights are zero (2:4), and throughput with {many} in flight is"
              " the same",
              "output_tokens_per_s", "wanda-2-4", many),
    )  # fmt: skip


def knobs(many: int, more: int) -> tuple[str, ...]:
    """Say what to turn next, `many` being the requests in flight of the claims."""
    return (
        'SET="variants.wanda-50.weights=wanda-30" serves another sparsity: 10 to 70, or 2-4',
        'SET="variants.wanda-50.weights=magnitude-50" serves what was chosen without a look at the'
        " inputs",
        f'SET=\'workloads.decode.loads=["concurrent:1","concurrent:{many}","concurrent:{more}"]\''
        " looks further along the batch",
    )


LAB = Lab(
    name="weight-pruning",
    title="Pruning",
    question="How many weights can be zero before the text suffers, and is a model faster for it?",
    answers=("CO-4", "CO-5", "CO-6", "CO-8"),
    variants=VARIANTS,
    flags={
        "max-model-len": 1024,
        "enable-prefix-caching": True,  # for the needles: what the loads send shares nothing
        "enforce-eager": True,
        "kv-cache-memory-bytes": 128 * 2**20,
    },
    workloads=(
        Workload(
            name="decode",
            prompt_tokens=Fixed(tokens=32),
            output_tokens=Fixed(tokens=12),
            loads=(Concurrent(users=1), Concurrent(users=16)),
        ),
    ),
    claims=claims(16),
    evidence=(Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),),
    studies=("sparsity",),
    probes=("quality",),
    findings=("zeros", "sparsities", "kernels", "experts", "smaller", "quality"),
    plots=("cliff", "variants"),
    needs_text=("sparsity", "quality", "quality-quick", "zeros", "sparsities", "cliff"),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=384,
    warmup_s=0.5,
    window_s=2,
    scales={
        "cpu": {"repeats": 3},
        "gpu": {
            "slo.ttft_s": 0.5,
            "flags": {"enable-prefix-caching": True},
            "workloads.decode.prompt_tokens.tokens": 128,
            "workloads.decode.output_tokens.tokens": 128,
            "workloads.decode.loads": (Concurrent(users=1), Concurrent(users=128)),
            "next_knobs": knobs(128, 256),
            "claims": [c.model_dump() for c in claims(128)],
            "requests": 4096,
            "warmup_s": 2,
            "window_s": 6,
        },
    },
    quick={"repeats": 1, "probes": ("quality-quick",)},
    limits={
        "cpu": "What zeros cost in quality is the model's own and carries over; a larger model"
        " loses less at the same sparsity. That a step takes as long as before holds wherever the"
        " kernels are dense.",
        "gpu": "A GPU draws less power where it multiplies zeros and may clock higher, so that a"
        " large batch can be a little faster without any sparse kernel.",
    },
    next_knobs=knobs(16, 64),
)  # fmt: skip
