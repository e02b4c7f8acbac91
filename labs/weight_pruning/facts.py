"""What zeros in the weights cost, what they gain, and what training gains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.quality_summary import (
    Beside,
    Quality,
    perplexity,
    perplexity_ratio,
    quality,
)
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.tables import Figures, Row, Table
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from labs.weight_pruning.lab import SERVED, bytes_ratio, energy_gone, energy_gone_2_4
from serving.models import catalog, dummy
from serving.models.catalog import Shape

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
    training: Training | None  # None: not studied
    quality: Quality | None  # None: the probe did not run


def facts(run: JudgedRun) -> Facts:
    scored = quality(run)
    return Facts(
        zeros(run, scored),
        sparsities(run.run.about.get("sparsity", {})),
        kernels(run),
        experts(),
        training(run),
        scored,
    )


def alone(run: Context, variant: str) -> Point | None:
    return run.point(variant, "decode", "concurrent:1")


# -------------------------------------------------------------------- what was served, and how fast


@dataclass(frozen=True, kw_only=True)
class Zeros(Table):
    """What was served, each variant by its name, and how fast beside the dense model."""

    files_sha256: dict[str, str]  # of the variants that were pruned, its beginning


def zeros(run: Context, scored: Quality | None) -> Zeros:
    users = max(p.load.users for p in run.points)
    shapes = {p.variant.name: p.shape for p in run.points}
    treatments = scored.treatments if scored else {}
    weights = {v.name: v.weights for v in run.lab.variants}
    hashes = {name: run.run.derived_sha256.get(weights[name], "")[:12] for name in shapes}
    return Zeros(
        rows=tuple(
            Row(name, served(run, name, weights[name], shape, users, treatments.get(name)))
            for name, shape in shapes.items()
        ),
        figures={"users": Quantity(users)},  # of the largest load
        files_sha256={name: of for name, of in hashes.items() if of},
    )


def served(
    run: Context, variant: str, weights: str, shape: Shape, users: int, scored: Beside | None
) -> Figures:
    """Say what a variant's file of weights has of zeros, and what they do to a step."""
    about = run.run.about.get(weights, {})
    return {
        "asked": Quantity.given(about.get("asked"), "share", "not pruned"),
        "zeros": Quantity.given(about.get("zeros"), "share", "not pruned"),  # in the written file
        # of four neighbours, with more than two weights that are not zero
        "groups_too_full": Quantity.given(about.get("groups_too_full"), why="not pruned"),
        "weights": Quantity(shape.weight_bytes / 1e6, "MB"),
        "tpot_s": run.quantity(alone(run, variant), "tpot_mean_s").brief,  # at one stream
        "slower": beside_dense(run, variant, 1, "tpot_mean_s"),
        "many": beside_dense(run, variant, users, "output_tokens_per_s"),
        # on the engine
        "perplexity": scored.perplexity_ratio if scored else Quantity.missing("not asked", RATIO),
    }


def beside_dense(run: Context, variant: str, users: int, metric: str) -> Quantity:
    """Divide a variant's figure by the dense model's, valid or not; none of that by itself."""
    names = (variant, run.points[0].variant.name)
    ours, dense = (run.point(name, "decode", f"concurrent:{users}") for name in names)
    return run.measured_ratio(ours, dense, metric)


# --------------------------------------------------------------------------- every sparsity, scored


@dataclass(frozen=True)
class Step:
    """A sparsity by each method."""

    pattern: str  # percent, or PATTERN
    zeros: Quantity
    energy_normal: Quantity  # that would go of normal weights by magnitude
    by: dict[Selection, Figures]  # see `scored`

    @property
    def energy_ratio(self) -> Quantity:
        """The energy that goes by magnitude / what was forecast."""
        return self.by["magnitude"]["energy_gone"] / self.energy_normal


@dataclass(frozen=True)
class Knee:
    """The step after which ten points more first multiply perplexity by over `KNEE_FACTOR`."""

    before: Step
    beyond: Step


TOLD = ("30", "40", "70")


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
    def told(self) -> list[Step]:
        """The steps of the curve that the answer names."""
        return [step for step in self.curve if step.pattern in TOLD]

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
        more = beyond.by[by]["perplexity"] / before.by[by]["perplexity"]
        if (more.value or 0) > KNEE_FACTOR:
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


def scored(about: Mapping[str, Any], name: str) -> Figures:
    """Read a model's score without an engine; its interval is paired with the dense by passage."""
    nats, sizes = about["loss_nats"], about["passages_tokens"]
    ratio = perplexity_ratio(nats[name], nats["dense"], sizes)
    solved = sum(about["solved"][name]) if name in about["solved"] else None
    return {
        "perplexity": Quantity(perplexity(nats[name], sizes)),
        "ratio": ratio.brief if name == "dense" else ratio,
        "solved": Quantity.given(solved, why="not asked"),  # of the tasks
        "energy_gone": Quantity(about["energy_gone"][name], "share"),
    }


# --------------------------------------------------------------------------- what a kernel would do


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
    forms: dict[str, Figures]
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

    def form(zeros: float, ratio: float) -> Figures:
        """Return what a form makes of a pruned matrix, and of a step at one stream."""
        step = 1 - share * (1 - ratio)
        return {
            "zeros": Quantity(zeros, "share"),
            "matrices": Quantity(ratio, RATIO),
            "step": Quantity(step, RATIO),
        }

    forms = {
        name: form(zeros, bytes_ratio(of, zeros, bits=8 * each))
        for name, (of, zeros) in FORMS.items()
    }
    forms[EIGHT_BITS] = form(0, 1 / each)
    slower = (beside_dense(run, name, 1, "tpot_mean_s") for name in SERVED)
    measured = next((ratio for ratio in slower if ratio.known), Quantity.missing("none", RATIO))
    return Kernels(Quantity(share, "share"), forms, measured)


# ------------------------------------------------------------------------------- mixture of experts

EXPERTS_SHAPE = "moe-30b"
BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True, kw_only=True)
class Experts(Table):
    """A mixture of experts beside a dense model of as many parameters; arithmetic."""

    model: str


def experts() -> Experts:
    """Count a shape that ships with the lab. Tokens are routed evenly and independently."""
    shape = catalog.shape_of(dummy.config_of(EXPERTS_SHAPE))
    return Experts(
        rows=tuple(Row(str(tokens), routed(shape, tokens)) for tokens in BATCHES),
        figures={
            "params": Quantity(shape.params / 1e9),  # in billions
            "active_params": Quantity(shape.matmul_params / 1e9),  # that a token meets
            "active_share": Quantity(shape.matmul_params / shape.params, "share"),
            "experts": Quantity(shape.experts),
            "per_token": Quantity(shape.experts_per_token),
        },
        model=dummy.SHAPES[EXPERTS_SHAPE].partition(":")[0],
    )


def routed(shape: Shape, tokens: int) -> Figures:
    """Count what one step over so many tokens reads."""
    read = shape.step_bytes(tokens)
    return {
        "tokens": Quantity(tokens),
        # experts of a layer, that at least one token is expected to need
        "needed": Quantity(theory.experts_needed(shape.experts, shape.experts_per_token, tokens)),
        "read": Quantity(read / 1e9, "GB"),
        "share": Quantity(read / shape.weight_bytes, "share"),  # of all weights
    }


# ---------------------------------------------------------------------------- what training changed


Compared = Literal["better", "worse", "not told apart"]


def compared(ratio: Quantity) -> Compared:
    """Say what the interval of a perplexity over another's says of the first; lower is better."""
    low, high = ratio.low or 0, ratio.high or math.inf
    return "better" if high < 1 else "worse" if low > 1 else "not told apart"


@dataclass(frozen=True)
class Bits:
    """A way of rounding each, to so many bits; the reference is the plain fine-tuned model."""

    bits: int
    nearest: Figures
    gptq: Figures
    qat: Figures
    qat_over_gptq: Quantity  # their ratio of perplexity
    times_as_long: Quantity  # seconds of QAT / of GPTQ
    from_tuned: bool = False  # QAT began at fine-tuned weights; in older runs at the spread ones

    @property
    def qat_is(self) -> Compared:
        """What QAT is beside GPTQ."""
        return compared(self.qat_over_gptq)


@dataclass(frozen=True)
class Untaught:
    """The layers that were distilled, trained in as many steps on the tokens, without a teacher."""

    last: Figures
    best: Figures  # after the epoch that is best on the scored text, which favours it
    best_epoch: int
    distilled_over_best: Quantity  # their ratio of perplexity

    @property
    def distilled_is(self) -> Compared:
        """What the distilled layers are beside the best of these."""
        return compared(self.distilled_over_best)


@dataclass(frozen=True)
class Training:
    """What minutes of training did, by the study of it."""

    models: dict[str, Figures]  # the file, and what was made of it; see `trained`
    bits: tuple[Bits, ...]
    texts_tokens: int
    scored_tokens: int
    held_out_sha256: str  # its beginning
    untaught: Untaught | None = None  # None in older runs


def training(run: Context) -> Training | None:
    """Read the study of training; None where the run has none."""
    about = run.run.about.get("training", {})
    if "loss_nats" not in about:
        return None
    nats, sizes = about["loss_nats"], about["passages_tokens"]
    params = run.points[0].shape.matmul_params
    half = params - (run.points[0].shape.params - about["params"])

    def over(name: str, to: str) -> Quantity:
        return perplexity_ratio(nats[name], nats[to], sizes)

    def trained(name: str, to: str, made: str = "", flop_a_token: float = 0) -> Figures:
        """Read a model on held-out text beside its reference, and what making it took."""
        effort = about["efforts"].get(made)
        tokens = effort and effort["tokens"]
        flop = effort and flop_a_token * tokens / 1e12
        return {
            "perplexity": Quantity(perplexity(nats[name], sizes)),
            "ratio": over(name, to).brief if name == to else over(name, to),
            "tokens": Quantity.given(tokens, why="not trained"),  # passed through it
            "flop": Quantity.given(flop, "TFLOP", "not trained"),
            "took": Quantity.given(effort and effort["seconds"], "s", "not trained"),
        }

    def at(bits: int) -> Bits:
        gptq, from_tuned = f"plain-gptq-{bits}", f"tuned-qat-{bits}" in nats
        qat = f"tuned-qat-{bits}" if from_tuned else f"qat-{bits}"
        by_gptq = trained(gptq, "plain", f"gptq-{bits}", 2 * params)
        by_qat = trained(qat, "plain", qat, 6 * params)
        return Bits(
            bits,
            trained(f"plain-nearest-{bits}", "plain"),
            by_gptq,
            by_qat,
            over(qat, gptq),
            by_qat["took"] / by_gptq["took"],
            from_tuned,
        )

    def untaught() -> Untaught | None:
        epochs = [name for name in nats if name.startswith("untaught-")]
        if not epochs:
            return None
        best = min(epochs, key=lambda name: sum(nats[name]))
        return Untaught(
            trained(epochs[-1], "file", "untaught", 6 * half),
            trained(best, "file"),
            1 + epochs.index(best),
            over("distilled", best),
        )

    return Training(
        models={
            "file": trained("file", "file"),  # as it came
            "file_nearest": trained("file-nearest-4", "file"),
            "spread": trained("spread", "file"),  # off its grid
            "spread_nearest": trained("spread-nearest-4", "spread"),
            "plain": trained("plain", "file", "plain", 6 * params),  # that, fine-tuned
            "kept": trained("kept", "file"),  # half of the layers
            "distilled": trained("distilled", "file", "distilled", 6 * half),
        },
        bits=tuple(at(int(bits)) for n in nats for bits in re.findall(r"^plain-gptq-(\d)", n)),
        texts_tokens=about["calibration_tokens"],
        scored_tokens=sum(sizes),
        held_out_sha256=about["held_out_sha256"][:12],
        untaught=untaught(),
    )
