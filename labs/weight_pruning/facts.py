"""What zeros in the weights cost, what they gain, and what gains more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.quality import Quality, perplexity, perplexity_ratio, quality
from labs.harness.judging.quantity import RATIO, Quantity
from labs.harness.spec import Point
from labs.weight_pruning.lab import bytes_ratio, energy_gone, energy_gone_2_4
from serving.weights import dummy, models
from serving.weights.models import Shape

Selection = Literal["magnitude", "wanda"]  # how the weights that go are chosen
DENSE, PATTERN = "0", "2-4"
KNEE_FACTOR = 1.10
"""Ten points of sparsity that multiply perplexity by more than this are beyond the knee."""


@dataclass(frozen=True)
class Facts:
    zeros: Zeros
    sparsities: Sparsities | None  # None: not studied
    kernels: Kernels | None  # None: nothing was pruned
    experts: Experts
    smaller: Training | None  # None: not studied
    quality: Quality | None  # None: the probe did not run


def facts(run: JudgedRun) -> Facts:
    studied = sparsities(run.run.about.get("sparsity", {}))
    return Facts(
        zeros(run),
        studied,
        kernels(run),
        experts(),
        training(run, studied) if studied else None,
        quality(run),
    )


def alone(run: Context, variant: str) -> Point | None:
    return run.point(variant, "decode", "concurrent:1")


# -------------------------------------------------------------------- what was served, and how fast


@dataclass(frozen=True)
class Served:
    """What a variant's file of weights has of zeros, and what they do to a step."""

    variant: str
    asked: Quantity  # share of zeros
    zeros: Quantity  # share found in the written file
    groups_too_full: int | None  # of four neighbours, with more than two weights that are not zero
    weights: Quantity
    files_sha256: str  # its beginning
    tpot_s: Quantity  # at one stream
    slower: Quantity  # TPOT / the dense model's
    many: Quantity  # throughput at the largest load / the dense model's


@dataclass(frozen=True)
class Zeros:
    """What was served, and how fast beside the dense model."""

    users: int  # of the largest load
    variants: tuple[Served, ...]


def zeros(run: Context) -> Zeros:
    users = max(p.load.users for p in run.points)
    shapes = {p.variant.name: p.shape for p in run.points}
    return Zeros(users, tuple(served(run, name, shape, users) for name, shape in shapes.items()))


def served(run: Context, variant: str, shape: Shape, users: int) -> Served:
    weights = next(v.weights for v in run.lab.variants if v.name == variant)
    about = run.run.about.get(weights, {})
    return Served(
        variant,
        asked=Quantity(about.get("asked"), "share", why="not pruned"),
        zeros=Quantity(about.get("zeros"), "share", why="not pruned"),
        groups_too_full=about.get("groups_too_full"),
        weights=Quantity(shape.weight_bytes / 1e6, "MB"),
        files_sha256=run.run.derived_sha256.get(weights, "")[:12],
        tpot_s=run.quantity(alone(run, variant), "tpot_mean_s").brief,
        slower=beside_dense(run, variant, 1, "tpot_mean_s"),
        many=beside_dense(run, variant, users, "output_tokens_per_s"),
    )


def beside_dense(run: Context, variant: str, users: int, metric: str) -> Quantity:
    """Divide a variant's figure by the dense model's, valid or not; none of that by itself."""
    names = (variant, run.points[0].variant.name)
    ours, dense = (run.point(name, "decode", f"concurrent:{users}") for name in names)
    return run.measured_ratio(ours, dense, metric)


# --------------------------------------------------------------------------- every sparsity, scored


@dataclass(frozen=True)
class Scored:
    """A model, scored without an engine; intervals are paired with the dense one by passage."""

    perplexity: float
    ratio: Quantity  # to the dense model's perplexity
    solved: int | None  # of the tasks; None where they were not asked
    energy_gone: Quantity  # share of the weights' sum of squares


@dataclass(frozen=True)
class Step:
    """A sparsity by each method."""

    pattern: str  # percent, or PATTERN
    zeros: Quantity
    energy_normal: Quantity  # that would go of normal weights by magnitude
    by: dict[Selection, Scored]

    @property
    def energy_ratio(self) -> Quantity:
        """The energy that goes by magnitude / what was forecast."""
        return self.by["magnitude"].energy_gone / self.energy_normal


@dataclass(frozen=True)
class Knee:
    """The step after which ten points more first multiply perplexity by over `KNEE_FACTOR`."""

    before: Step
    beyond: Step


@dataclass(frozen=True)
class Sparsities:
    """Every sparsity that was scored without an engine, from the dense model on."""

    steps: tuple[Step, ...]
    tasks: int
    tokens: int
    held_out_sha256: str  # its beginning
    calibration_sha256: str  # its beginning
    calibration_tokens: int
    pruned_params: int  # by any pattern

    @property
    def curve(self) -> list[Step]:
        """The steps in percent, ten points apart."""
        return [step for step in self.steps if step.pattern != PATTERN]

    @property
    def first(self) -> Step:
        """The fewest zeros."""
        return self.curve[1]

    @property
    def last(self) -> Step:
        """The most zeros."""
        return self.curve[-1]

    @property
    def farthest(self) -> Step:
        """The step of the curve at which the forecast of the energy is farthest off."""
        return max(self.curve, key=lambda step: abs(math.log(step.energy_ratio.value or 1)))

    @property
    def knees(self) -> dict[Selection, Knee | None]:
        """Where each method has its knee; None where it has none."""
        return {by: knee(self.curve, by) for by in get_args(Selection)}

    def at(self, pattern: str) -> Step | None:
        return next((step for step in self.steps if step.pattern == pattern), None)


def knee(curve: Sequence[Step], by: Selection) -> Knee | None:
    for before, beyond in pairwise(curve):
        if beyond.by[by].perplexity > KNEE_FACTOR * before.by[by].perplexity:
            return Knee(before, beyond)
    return None


def sparsities(about: Mapping[str, Any]) -> Sparsities | None:
    """Read the study of sparsities; None where the run has none."""
    if "loss_nats" not in about:
        return None
    patterns = dict.fromkeys(n.partition("-")[2] for n in about["loss_nats"] if n != "dense")
    return Sparsities(
        steps=tuple(step(about, pattern) for pattern in (DENSE, *patterns)),
        tasks=len(about["solved"]["dense"]),
        tokens=sum(about["passages_tokens"]),
        held_out_sha256=about["held_out_sha256"][:12],
        calibration_sha256=about["calibration_sha256"][:12],
        calibration_tokens=about["calibration_tokens"],
        pruned_params=about["pruned_params"],
    )


def step(about: Mapping[str, Any], pattern: str) -> Step:
    share = 0.5 if pattern == PATTERN else int(pattern) / 100
    gone = energy_gone_2_4() if pattern == PATTERN else energy_gone(share)
    by = {
        by: scored(about, "dense" if pattern == DENSE else f"{by}-{pattern}")
        for by in get_args(Selection)
    }
    return Step(pattern, Quantity(share, "share"), Quantity(gone, "share"), by)


def scored(about: Mapping[str, Any], name: str) -> Scored:
    nats, sizes = about["loss_nats"], about["passages_tokens"]
    ratio = perplexity_ratio(nats[name], nats["dense"], sizes)
    return Scored(
        perplexity=perplexity(nats[name], sizes),
        ratio=ratio.brief if name == "dense" else ratio,
        solved=sum(about["solved"][name]) if name in about["solved"] else None,
        energy_gone=Quantity(about["energy_gone"][name], "share"),
    )


# --------------------------------------------------------------------------- what a kernel would do


@dataclass(frozen=True)
class Form:
    """What storing the weights in one form would make of a step's bytes; arithmetic."""

    zeros: Quantity
    matrices: Quantity  # bytes of a pruned matrix / the dense one's
    step: Quantity  # bytes that decode reads at one stream / the dense one's


FORMS: Mapping[str, tuple[str, float]] = {
    "dense": ("dense", 0.5),
    "2:4": ("2:4", 0.5),
    "bitmap-50": ("bitmap", 0.5),
    "index-50": ("index", 0.5),
    "bitmap-70": ("bitmap", 0.7),
    "index-70": ("index", 0.7),
}
EIGHT_BITS = "8-bit"


@dataclass(frozen=True)
class Kernels:
    """What sparse kernels could gain."""

    pruned_share: Quantity  # of the bytes that a step reads
    forms: dict[str, Form]
    measured: Quantity  # TPOT of a pruned model, without such kernels / dense


def kernels(run: Context) -> Kernels | None:
    """Compute the bytes of a matrix and of a step for each way to store a pruned model."""
    pruned = next(
        (a["pruned_params"] for a in run.run.about.values() if "pruned_params" in a), None
    )
    dense = alone(run, run.points[0].variant.name)
    if pruned is None or dense is None:
        return None
    each = dense.shape.value_bytes  # bytes of a weight, as it is served
    share = each * pruned / theory.decode_bytes(dense.shape, 1, dense.context_tokens)

    def form(zeros: float, ratio: float) -> Form:
        step = 1 - share * (1 - ratio)
        return Form(Quantity(zeros, "share"), Quantity(ratio, RATIO), Quantity(step, RATIO))

    forms = {
        name: form(zeros, bytes_ratio(of, zeros, bits=8 * each))
        for name, (of, zeros) in FORMS.items()
    }
    forms[EIGHT_BITS] = form(0, 1 / each)
    slower = (beside_dense(run, v.name, 1, "tpot_mean_s") for v in run.lab.variants)
    measured = next((ratio for ratio in slower if ratio.known), Quantity.missing("none", RATIO))
    return Kernels(Quantity(share, "share"), forms, measured)


# ------------------------------------------------------------------------------- mixture of experts

EXPERTS_SHAPE = "moe-30b"
BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Routed:
    """What one step over so many tokens reads of a mixture of experts; arithmetic."""

    tokens: int
    needed: Quantity  # experts of a layer, that at least one token is expected to need
    read: Quantity
    share: Quantity  # of all weights that a large batch reads


@dataclass(frozen=True)
class Experts:
    """A mixture of experts beside a dense model of as many parameters; arithmetic."""

    name: str
    params: Quantity  # in billions
    active_params: Quantity  # in billions, that a token is multiplied with
    active_share: Quantity
    experts: int
    per_token: int
    steps: tuple[Routed, ...]

    @property
    def one(self) -> Routed:
        """A step over one token."""
        return self.steps[0]

    @property
    def most(self) -> Routed:
        """The step over the most tokens."""
        return self.steps[-1]


def experts() -> Experts:
    """Count a shape that ships with the lab. Tokens are routed evenly and independently."""
    shape = models.shape_of(dummy.config_of(EXPERTS_SHAPE))
    return Experts(
        name=dummy.SHAPES[EXPERTS_SHAPE].partition(":")[0],
        params=Quantity(shape.params / 1e9),
        active_params=Quantity(shape.matmul_params / 1e9),
        active_share=Quantity(shape.matmul_params / shape.params, "share"),
        experts=shape.experts,
        per_token=shape.experts_per_token,
        steps=tuple(routed(shape, tokens) for tokens in BATCHES),
    )


def routed(shape: Shape, tokens: int) -> Routed:
    needed = theory.experts_needed(shape.experts, shape.experts_per_token, tokens)
    read = shape.step_bytes(tokens)
    return Routed(
        tokens,
        needed=Quantity(needed),
        read=Quantity(read / 1e9, "GB"),
        share=Quantity(read / shape.weight_bytes, "share"),
    )


# ----------------------------------------------------------------------- what training would change

TOKENS_TRAINED = 10_000_000
PTQ_TOKENS = 128 * 2048
"""Calibration tokens of GPTQ and SparseGPT (Frantar et al. 2023): 128 segments of 2,048."""


@dataclass(frozen=True)
class Effort:
    """What it takes to pass so many tokens through the model."""

    tokens: int
    flop: Quantity
    takes: Quantity  # at the machine's measured rate


@dataclass(frozen=True)
class Training:
    """What training could win back, and what it takes, beside what pruning took."""

    lost: Quantity  # ratio of perplexity at half of the weights, by Wanda
    half_params: Quantity  # of a model with half of the layers / this one's
    half_step: Quantity  # bytes that its decode reads at one stream / this one's
    rate: Quantity  # of this machine, measured
    calibrate: Effort
    train: Effort
    made_s: Quantity  # what pruning took

    @property
    def ptq_tokens(self) -> int:
        return PTQ_TOKENS

    @property
    def times_as_much(self) -> Quantity:
        """FLOP to train / to pass PTQ's calibration tokens forward once."""
        a_token = self.calibrate.flop / self.calibrate.tokens
        return (self.train.flop / (a_token * PTQ_TOKENS)).in_unit("1")


def training(run: Context, studied: Sparsities) -> Training | None:
    point = alone(run, run.points[0].variant.name)
    if point is None:
        return None
    shape, half = point.shape, half_of(point.shape, studied.pruned_params)
    half_bytes, whole_bytes = (
        theory.decode_bytes(of, 1, point.context_tokens) for of in (half, shape)
    )
    rate = point.ceilings.flops_per_s
    calibrate = effort(2 * shape.matmul_params, studied.calibration_tokens, rate)
    train = effort(6 * shape.matmul_params, TOKENS_TRAINED, rate)
    at_half = studied.at("50")
    return Training(
        lost=at_half.by["wanda"].ratio if at_half else Quantity.missing("not studied", RATIO),
        half_params=Quantity(half.params / shape.params, RATIO),
        half_step=Quantity(half_bytes / whole_bytes, RATIO),
        rate=Quantity(rate / 1e12, "TFLOP/s"),
        calibrate=calibrate,
        train=train,
        made_s=Quantity(run.run.about.get("wanda-50", {}).get("seconds"), "s", why="not made here"),
    )


def half_of(shape: Shape, pruned: int) -> Shape:
    """The shape of a model with half of the layers: half of the pruned weights, and of the KV."""
    return replace(
        shape,
        layers=shape.layers // 2,
        params=shape.params - pruned // 2,
        matmul_params=shape.matmul_params - pruned // 2,
        weight_bytes=shape.weight_bytes - shape.value_bytes * pruned // 2,
    )


def effort(flop_a_token: int, tokens: int, flops_per_s: float) -> Effort:
    flop = flop_a_token * tokens
    took_s = flop / flops_per_s
    takes = Quantity(took_s / 3600, "h") if took_s > 3600 else Quantity(took_s, "s")
    return Effort(tokens, Quantity(flop / 1e12, "TFLOP"), takes)
