"""This module tells what zeros in the weights cost, what they gain, and what gains more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, ORANGE
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import GREY, plt, write_plainly
from labs.harness.facts.parts import ARITHMETIC, IN_PART, Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.facts.quality import QUALITY, figure_of, treatments_of
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.quality import over_clusters
from labs.harness.judging.text import number, times_with_interval
from labs.harness.spec import Point
from labs.weight_pruning.lab import (
    KNEE_FACTOR,
    WANDA,
    bytes_ratio,
    energy_gone,
    energy_gone_2_4,
    knee,
)
from serving import dummy, models
from serving.models import Shape

METHODS = {"magnitude": "Magnitude", "wanda": "Wanda"}
PATTERN = "2-4"

# ------------------------------------------------------------------- what was served, and how fast


@dataclass(frozen=True)
class Served:
    """Holds what a variant's file of weights has of zeros, and what they do to a step."""

    variant: str
    asked: float | None  # share of zeros; None for the dense model
    zeros: float | None  # found in the written file
    groups_too_full: int | None  # of four neighbours, with more than two weights that are not zero
    weight_bytes: float | None
    files_sha256: str
    tpot_s: float | None  # at one stream
    slower: Interval | None  # TPOT / the dense model's; None for that
    many: Interval | None  # throughput at the largest load / the dense model's
    users: int  # of the largest load


def served_weights(context: Context) -> tuple[Served, ...]:
    base, users = context.points[0].variant.name, max(p.load.users for p in context.points)

    def at(variant: str, load: int) -> Point | None:
        mine = (p for p in context.points if (p.variant.name, p.load.users) == (variant, load))
        return next(mine, None)

    def beside(variant: str, load: int, metric: str) -> Interval | None:
        ours, dense = at(variant, load), at(base, load)
        effect = context.effect(ours, dense, metric) if ours and dense and ours != dense else None
        return effect.ratio if effect else None

    served = []
    for variant in context.lab.variants:
        about = context.run.about.get(variant.weights, {})
        alone = at(variant.name, 1)
        served.append(
            Served(
                variant=variant.name,
                asked=about.get("asked"),
                zeros=about.get("zeros"),
                groups_too_full=about.get("groups_too_full"),
                weight_bytes=alone.shape.weight_bytes if alone else None,
                files_sha256=context.run.derived_sha256.get(variant.weights, ""),
                tpot_s=context.mean(alone, "tpot_mean_s") if alone else None,
                slower=beside(variant.name, 1, "tpot_mean_s"),
                many=beside(variant.name, users, "output_tokens_per_s"),
                users=users,
            )
        )
    return tuple(served)


def tell_served(facts: tuple[Served, ...]) -> Finding:
    rows = [["Weights", "Zeros asked", "Zeros in the file", "Groups of four with over two left",
             "Bytes", "TPOT, one stream", "Beside dense",
             f"Throughput, {facts[0].users} in flight, beside dense", "Files"]]  # fmt: skip
    for served in facts:
        rows.append(
            [
                f"`{served.variant}`",
                "–" if served.asked is None else f"{served.asked:.0%}",
                "–" if served.zeros is None else f"{served.zeros:.2%}",
                "–" if served.groups_too_full is None else f"{served.groups_too_full:,}",
                f"{served.weight_bytes / 1e6:,.0f} MB" if served.weight_bytes else "–",
                number(served.tpot_s, "s"),
                times_with_interval(served.slower) if served.slower else "–",
                times_with_interval(served.many) if served.many else "–",
                f"`{served.files_sha256[:12]}`" if served.files_sha256 else "–",
            ]
        )
    lines = [
        "Zeros are counted in the file that was written, among the matrices that are pruned (all"
        " but the output matrix). *Files* is the hash of the folder in the manifest; a trial has"
        " no verdict unless the engine says that it serves a folder of that hash.",
        "The zeros are stored as other weights are, so the files are equally large.",
    ]
    return Finding(title="What was served, and is it faster?", rows=rows, lines=lines)


SERVED = Conclusion("zeros", served_weights, tell_served)

# ------------------------------------------------------------------------ every sparsity, scored


@dataclass(frozen=True)
class Sparsity:
    """Scores the model at one sparsity; intervals are paired with the dense model by passage."""

    by: str  # "magnitude" or "wanda"; "" for the dense model
    pattern: str  # percent, or "2-4"
    share: float
    perplexity: float
    ratio: float  # to the dense model's perplexity
    low: float | None
    high: float | None
    solved: int | None  # None where tasks were not asked
    energy_gone: float
    energy_normal: float  # by arithmetic, of normal weights; magnitude alone

    @property
    def title(self) -> str:
        return "2:4" if self.pattern == PATTERN else f"{self.share:.0%}"


@dataclass(frozen=True)
class Sweep:
    """Holds every sparsity that was scored without an engine, and where each method has its knee"""

    dense: Sparsity
    all: tuple[Sparsity, ...]
    tasks: int
    tokens: int
    held_out_sha256: str
    calibration_sha256: str
    calibration_tokens: int
    pruned_params: int
    knees: Mapping[str, float | None]

    def of(self, by: str) -> list[Sparsity]:
        """List a method's sparsities in percent, from the lowest, without the pattern 2:4."""
        mine = (s for s in self.all if s.by == by and s.pattern != PATTERN)
        return sorted(mine, key=lambda s: s.share)

    def at(self, by: str, pattern: str) -> Sparsity | None:
        return next((s for s in self.all if (s.by, s.pattern) == (by, pattern)), None)


def sweep(context: Context) -> Sweep | None:
    """Reads the study of sparsities; None where the run has none."""
    about = context.run.about.get("sparsity", {})
    if "loss_nats" not in about:
        return None
    sizes, plain = about["passages_tokens"], about["loss_nats"]["dense"]

    def scored(name: str) -> Sparsity:
        by, _, pattern = name.partition("-") if name != "dense" else ("", "", "0")
        share = 0.5 if pattern == PATTERN else int(pattern) / 100
        nats = about["loss_nats"][name]
        lost = over_clusters([n - p for n, p in zip(nats, plain, strict=True)], sizes)
        known = by and lost.low is not None and lost.high is not None
        return Sparsity(
            by=by,
            pattern=pattern,
            share=share,
            perplexity=math.exp(sum(nats) / sum(sizes)),
            ratio=math.exp(lost.value),
            low=math.exp(lost.low) if known and lost.low is not None else None,
            high=math.exp(lost.high) if known and lost.high is not None else None,
            solved=sum(about["solved"][name]) if name in about["solved"] else None,
            energy_gone=about["energy_gone"][name],
            energy_normal=energy_gone_2_4() if pattern == PATTERN else energy_gone(share),
        )

    dense = scored("dense")
    pruned = tuple(scored(name) for name in about["loss_nats"] if name != "dense")
    facts = Sweep(
        dense=dense,
        all=pruned,
        tasks=len(about["solved"]["dense"]),
        tokens=sum(sizes),
        held_out_sha256=about["held_out_sha256"],
        calibration_sha256=about["calibration_sha256"],
        calibration_tokens=about["calibration_tokens"],
        pruned_params=about["pruned_params"],
        knees={},
    )
    knees = {
        by: knee([(0.0, dense.perplexity), *((s.share, s.perplexity) for s in facts.of(by))])
        for by in METHODS
        if facts.of(by)
    }
    return replace(facts, knees=knees)


def tell_sweep(facts: Sweep | None) -> Finding:
    title = "What does each sparsity cost?"
    if facts is None:
        return Finding(title=title, lines=["Not studied in this run."])
    rows = [["Zeros", *(f"{title}: {what}" for title in METHODS.values()
             for what in ("perplexity", "beside dense", "tasks")),
             "Energy gone, by magnitude", "Of normal weights, forecast"]]  # fmt: skip
    rows.append(
        ["none", *(2 * [f"{facts.dense.perplexity:.2f}", "1", f"{facts.dense.solved} of"
                        f" {facts.tasks}"]), "0", "0"]
    )  # fmt: skip
    for pattern in dict.fromkeys(s.pattern for s in facts.all):
        pair = [facts.at(by, pattern) for by in METHODS]
        first = next(s for s in pair if s)
        row = [first.title]
        for s in pair:
            row += [number(s.perplexity), _ratio(s), number(s.solved)] if s else 3 * ["–"]
        magnitude = pair[0]
        gone = f"{magnitude.energy_gone:.2%}" if magnitude else "–"
        rows.append([*row, gone, f"{first.energy_normal:.2%}"])
    lines = [knee_sentence(facts), energy_sentence(facts)]
    lines.append(
        f"Scored in one process before the run, without an engine: {facts.tokens:,} tokens of"
        f" held-out text (SHA-256 `{facts.held_out_sha256[:12]}`) and {facts.tasks} tasks. Wanda"
        f" saw {facts.calibration_tokens:,} tokens of another text"
        f" (`{facts.calibration_sha256[:12]}`). Ratios have 95% intervals, paired over passages."
        " Perplexity was not forecast, as no theory gives it; the energy that goes was, for weights"
        " that are normally distributed."
    )
    return Finding(title=title, rows=rows, lines=lines)


def _ratio(s: Sparsity) -> str:
    if s.low is None or s.high is None:
        return number(s.ratio)
    return f"{number(s.ratio)} ({number(s.low)} to {number(s.high)})"


def knee_sentence(facts: Sweep) -> str:
    def of(by: str) -> str:
        at = facts.knees[by]
        last = facts.of(by)[-1]
        if at is None:
            return f"{METHODS[by]} has none up to {last.share:.0%}"
        beyond = next(s for s in facts.of(by) if s.share > at)
        before = next((s for s in facts.of(by) if s.share == at), facts.dense)
        return (
            f"{METHODS[by]} has it at {at:.0%} (perplexity {number(before.perplexity)}; at"
            f" {beyond.share:.0%} {number(beyond.perplexity)}, at {last.share:.0%}"
            f" {number(last.perplexity)})"
        )

    places = "; ".join(of(by) for by in facts.knees)
    return (
        "The knee, by the definition that was set beforehand, is where ten points more first"
        f" multiply perplexity by over {KNEE_FACTOR:.2f}: {places}."
    )


def energy_sentence(facts: Sweep) -> str:
    by_magnitude = facts.of("magnitude")
    if not by_magnitude:
        return "How much energy goes by magnitude was not measured."
    first, last = by_magnitude[0], by_magnitude[-1]
    far = max(by_magnitude, key=lambda s: abs(math.log(s.energy_gone / s.energy_normal)))
    return (
        f"By magnitude, {first.share:.0%} of the weights hold {first.energy_gone:.2%} of the"
        f" energy and {last.share:.0%} hold {last.energy_gone:.1%}. Normal weights were"
        f" forecast to hold {first.energy_normal:.2%} and {last.energy_normal:.1%}; the"
        f" forecast is farthest off at {far.share:.0%}, where"
        f" {far.energy_gone / far.energy_normal:.2f} times as much goes."
    )


SWEEP = Conclusion("sparsities", sweep, tell_sweep)

# ------------------------------------------------------------------------- what a kernel would do


@dataclass(frozen=True)
class Form:
    """Holds what storing the weights in one form would make of a step; arithmetic."""

    title: str
    matrices: float  # bytes of a pruned matrix, as a ratio to the dense one's
    step: float  # of decode at one stream, where it only reads, as a ratio to the dense one's
    note: str


@dataclass(frozen=True)
class Kernels:
    """Sets what sparse kernels could gain beside what was measured without them."""

    forms: tuple[Form, ...]
    pruned_share: float  # of the bytes that a step reads
    measured: Interval | None  # TPOT with half of the weights zero / dense
    variant: str

    def step_of(self, title: str) -> float:
        return next(f.step for f in self.forms if f.title == title)


FORMS = (
    ("zeros stored, as served here", "dense", 0.5, "no kernel needed"),
    ("2:4", "2:4", 0.5, "sparse tensor cores; twice the BF16 rate where arithmetic limits"),
    ("50% anywhere, a bit for each weight", "bitmap", 0.5, "unpacked before each product"),
    ("50% anywhere, a column for each kept weight", "index", 0.5, "CSR with 16-bit columns"),
    ("70% anywhere, a bit for each weight", "bitmap", 0.7, "unpacked before each product"),
    ("70% anywhere, a column for each kept weight", "index", 0.7, "CSR with 16-bit columns"),
)
EIGHT_BITS = "no zeros, 8 bits a weight"


def kernels(context: Context) -> Kernels | None:
    """Computes bytes and the bound of a step for each way to store a pruned model."""
    about = context.run.about
    pruned = next((a["pruned_params"] for a in about.values() if "pruned_params" in a), None)
    dense = next((p for p in context.points if p.load.users == 1), None)
    if pruned is None or dense is None:
        return None
    read = theory.decode_bytes(dense.shape, 1, dense.context_tokens)
    share = 2 * pruned / read

    def form(title: str, ratio: float, note: str) -> Form:
        return Form(title, ratio, 1 - share * (1 - ratio), note)

    half = next((s for s in context.once(served_weights) if s.slower), None)
    return Kernels(
        forms=(
            *(form(title, bytes_ratio(name, zeros), note) for title, name, zeros, note in FORMS),
            form(EIGHT_BITS, 0.5, "see the lab weight-quantization"),
        ),
        pruned_share=share,
        measured=half.slower if half else None,
        variant=half.variant if half else "",
    )


def tell_kernels(facts: Kernels | None) -> Finding:
    title = "What would sparse kernels gain?"
    if facts is None:
        return Finding(title=title)
    rows = [["Weights", "Bytes of a matrix", "TPOT, one stream, at best", "Known from", "Needs"]]
    for number_of, form in enumerate(facts.forms):
        known = "arithmetic"
        if number_of == 0 and facts.measured:
            known = f"measured: {times_with_interval(facts.measured)}"
        rows.append([form.title, f"{form.matrices:.3g}x", f"{form.step:.2f}x", known, form.note])
    lines = [
        "Of 16-bit weights 2:4 keeps two of four with two bits of index each:"
        " (2 x 16 + 2 x 2) / (4 x 16) = 9/16. A bit for each weight gives the same at 50%, and"
        " breaks even at 1/16 of zeros; a 16-bit column for each kept weight breaks even at half.",
        f"*At best* is a step that only reads: {facts.pruned_share:.0%} of its bytes are pruned"
        " matrices, the rest is the output matrix, norms, keys and values. Eight bits a weight read"
        " less than any form of 50% zeros, and served engines have kernels for it.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


KERNELS = Conclusion("kernels", kernels, tell_kernels)

# ----------------------------------------------------------------------------- mixture of experts

EXPERTS_SHAPE = "moe-30b"
BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Routed:
    """Holds what one step over so many tokens reads of a mixture of experts; arithmetic."""

    tokens: int
    experts: float  # of a layer, that at least one token is expected to need
    read_bytes: float
    share: float  # of all weights that a large batch reads


@dataclass(frozen=True)
class Experts:
    """Sets a mixture of experts beside a dense model of as many parameters; arithmetic."""

    name: str
    params: int
    active_params: int  # that a token is multiplied with
    experts: int
    per_token: int
    steps: tuple[Routed, ...]


def experts(context: Context) -> Experts:
    """Counts a shape that ships with the lab. Tokens are routed evenly and independently."""
    shape = models.shape_of(dummy.config_of(EXPERTS_SHAPE))
    return Experts(
        name=dummy.SHAPES[EXPERTS_SHAPE].partition(":")[0],
        params=shape.params,
        active_params=shape.matmul_params,
        experts=shape.experts,
        per_token=shape.experts_per_token,
        steps=tuple(_routed(shape, tokens) for tokens in BATCHES),
    )


def _routed(shape: Shape, tokens: int) -> Routed:
    idle = (1 - shape.experts_per_token / shape.experts) ** tokens
    read = shape.step_bytes(tokens)
    return Routed(tokens, shape.experts * (1 - idle), read, read / shape.weight_bytes)


def tell_experts(facts: Experts) -> Finding:
    rows = [["Tokens in a step", "Experts of a layer that it needs", "Weights that it reads",
             "Of all"]]  # fmt: skip
    rows += [
        [str(s.tokens), f"{s.experts:.3g} of {facts.experts}", f"{s.read_bytes / 1e9:.3g} GB",
         f"{s.share:.0%}"]
        for s in facts.steps
    ]  # fmt: skip
    lines = [
        f"Arithmetic, of {facts.name}: {facts.params / 1e9:.1f} billion parameters, of which a"
        f" token is multiplied with {facts.active_params / 1e9:.1f} billion"
        f" ({facts.active_params / facts.params:.0%}). No mixture of experts is served in this lab:"
        " `mixture-of-experts` serves one of random weights. All experts take memory; what is saved"
        " is reading and arithmetic, with dense kernels.",
        "Routing is taken to be even, and each token's independent of the others': a step needs"
        " E (1 - (1 - k/E)^tokens) of E experts. So a large batch reads nearly all of them, while"
        " each token is still multiplied with its own only.",
    ]
    return Finding(title="Mixture of experts: sparse by whole matrices", rows=rows, lines=lines)


EXPERTS = Conclusion("experts", experts, tell_experts)

# ---------------------------------------------------------------------- what training would change

TOKENS_TRAINED = 10_000_000


@dataclass(frozen=True)
class Training:
    """Sets what training could win back, and what it takes, beside what pruning took."""

    lost: Sparsity | None  # half of the weights, by Wanda: all that training could win back
    half_params: float  # of a model with half of the layers, as a share of this one's
    half_step: float  # its decode step at one stream, where it only reads, beside this one's
    calibrate_tokens: int
    calibrate_flop: float
    train_flop: float  # for TOKENS_TRAINED
    flops_per_s: float  # of this machine, measured
    made_s: float | None  # what pruning took


def training(context: Context) -> Training | None:
    facts = context.once(sweep)
    point = next((p for p in context.points if p.load.users == 1), None)
    if facts is None or point is None:
        return None
    shape, half = point.shape, _half_of(point, facts.pruned_params)
    context_tokens = point.context_tokens
    made = context.run.about.get("wanda-50", {})
    return Training(
        lost=facts.at("wanda", "50"),
        half_params=half.params / shape.params,
        half_step=theory.decode_bytes(half, 1, context_tokens)
        / theory.decode_bytes(shape, 1, context_tokens),
        calibrate_tokens=facts.calibration_tokens,
        calibrate_flop=2 * shape.matmul_params * facts.calibration_tokens,
        train_flop=6 * shape.matmul_params * TOKENS_TRAINED,
        flops_per_s=point.ceilings.flops_per_s,
        made_s=made.get("seconds"),
    )


def _half_of(point: Point, pruned: int) -> Shape:
    """The shape of a model with half of the layers: half of the pruned weights, and of the KV."""
    shape = point.shape
    return replace(
        shape,
        layers=shape.layers // 2,
        params=shape.params - pruned // 2,
        matmul_params=shape.matmul_params - pruned // 2,
        weight_bytes=shape.weight_bytes - pruned,  # half of two bytes each
    )


def tell_training(facts: Training | None) -> Finding:
    title = "What would training change?"
    if facts is None:
        return Finding(title=title, lines=["Not studied in this run."])
    lost = facts.lost
    rows = [["Way", "Parameters read", "TPOT, one stream, at best", "Perplexity beside dense",
             "FLOP to make it", "At this machine's measured rate"],
            ["half of the weights zero (Wanda)", "1x", "1x", _ratio(lost) if lost else "–",
             _tera(facts.calibrate_flop), _time(facts.calibrate_flop / facts.flops_per_s)],
            ["half of the layers, distilled", f"{facts.half_params:.2f}x",
             f"{facts.half_step:.2f}x", "not measured", _tera(facts.train_flop),
             _time(facts.train_flop / facts.flops_per_s)],
            ["the same zeros, trained around them", "1x", "1x",
             f"1 to {number(lost.ratio)}" if lost else "–", _tera(facts.train_flop),
             _time(facts.train_flop / facts.flops_per_s)]]  # fmt: skip
    lines = [
        "Arithmetic, but for the first row's perplexity. Making weights after training (PTQ, or"
        f" this pruning) passes {facts.calibrate_tokens:,} tokens through the model once, 2 FLOP"
        " for each parameter and token. Training with the zeros or the rounding in place (QAT) or"
        f" distilling takes 6: the figures are for {TOKENS_TRAINED / 1e6:.0f} million"
        " tokens, which is little; what published models took is beside this table.",
        "A distilled model is dense and small, so every engine gains what its bytes say. Training"
        " around zeros or rounding can win back at most what they cost without it.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


def _tera(flop: float) -> str:
    return number(flop / 1e12, "TFLOP")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else number(seconds, "s")


TRAINING = Conclusion("smaller", training, tell_training)

# ------------------------------------------------------------------------------------ the answers


def sparse_kinds(run: JudgedRun) -> str | None:
    facts, moe, one = KERNELS.facts_of(run), EXPERTS.facts_of(run), run.ratio("half-one")
    pattern = run.ratio("pattern-one")
    if facts is None or moe is None or one is None:
        return None
    first, last = moe.steps[0], moe.steps[-1]
    return (
        "Zeros are stored and read as other weights are: with half of the weights zero TPOT is"
        f" {one}"
        f"{f', in the pattern 2:4 {pattern}' if pattern else ''}. With sparse"
        f" kernels 2:4 would read 9/16 of a matrix and take {facts.step_of('2:4'):.2f}x at best"
        " (arithmetic; this engine has none, and 8 bits a weight read less). A mixture of experts"
        f" leaves out whole matrices, with dense kernels: of {moe.name} a token is multiplied with"
        f" {moe.active_params / moe.params:.0%} of the parameters, and a step reads"
        f" {first.share:.0%} of the weights for one token and {last.share:.0%} for {last.tokens}"
        " (arithmetic)."
    )


def cliff(run: JudgedRun) -> str | None:
    facts = SWEEP.facts_of(run)
    if facts is None:
        return None
    gone = ", ".join(f"{s.share:.0%}: {s.energy_gone:.2%}" for s in facts.of("magnitude")[::2])
    return (
        "The smallest weights hold hardly any energy, and those after them quickly more: what"
        f" magnitude pruning takes away grows with about the cube of the sparsity ({gone}), and"
        f" each layer passes its error on to the next. {knee_sentence(facts)}"
    )


def distillation(run: JudgedRun) -> str | None:
    facts = TRAINING.facts_of(run)
    if facts is None:
        return None
    lost = facts.lost
    kept = (
        f" Zeros in half of the weights cost {_ratio(lost)} times the perplexity (measured) and"
        " leave the bytes as they are."
        if lost
        else ""
    )
    return (
        f"By arithmetic: a model with half of the layers has {facts.half_params:.2f} of the"
        f" parameters and takes {facts.half_step:.2f}x the time a token at best, on any engine."
        f"{kept} What quality distillation gives such a model takes training, which this lab does"
        " not do."
    )


def qat(run: JudgedRun) -> str | None:
    facts = TRAINING.facts_of(run)
    if facts is None:
        return None
    return (
        "By arithmetic: first without training, since that takes"
        f" {_tera(facts.calibrate_flop)}"
        f"{f' ({facts.made_s:.0f} s here)' if facts.made_s else ''} and training takes"
        f" {_tera(facts.train_flop)} for {TOKENS_TRAINED / 1e6:.0f} million tokens,"
        f" about {float(f'{facts.train_flop / facts.calibrate_flop:.2g}'):,.0f} times as much."
        " What training could win back is at most what was lost without it: little before the"
        " knee, and beyond it a lot. The lab weight-quantization measures the loss at 8 and 4 bits."
    )


# --------------------------------------------------------------------------------------- its plot


def draw_cliff(run: JudgedRun) -> str | None:
    """Draws perplexity over sparsity, and the energy that goes beside its forecast."""
    facts = SWEEP.facts_of(run)
    if facts is None:
        return None
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(3, 2))
    for by, colour in zip(METHODS, (BLUE, ORANGE), strict=True):
        mine = facts.of(by)
        if not mine:
            continue
        left.plot(
            [0, *(100 * s.share for s in mine)],
            [1, *(s.ratio for s in mine)],
            "o-",
            color=colour,
            ms=4,
            label=METHODS[by],
        )
        if pattern := facts.at(by, PATTERN):
            left.plot(50, pattern.ratio, "s", color=colour, mfc="white", ms=7,
                      label=f"{METHODS[by]}, 2:4")  # fmt: skip
        if (at := facts.knees[by]) is not None:
            left.axvline(100 * at, color=colour, ls=":", lw=1)
    _draw_served(left, run, facts)
    left.set_yscale("log")
    write_plainly(left.yaxis)
    left.set_xlabel("zeros, %; dotted: each method's knee")
    left.set_ylabel("perplexity / dense")
    left.legend(frameon=False, fontsize=8)
    magnitude = facts.of("magnitude")
    shares = [i / 100 for i in range(5, 76)]
    right.plot([100 * s for s in shares], [100 * energy_gone(s) for s in shares], color=GREY,
               label="forecast: normal weights")  # fmt: skip
    right.plot([100 * s.share for s in magnitude], [100 * s.energy_gone for s in magnitude], "o",
               color=BLUE, ms=4, label="measured, by magnitude")  # fmt: skip
    right.set_yscale("log")
    write_plainly(right.yaxis)
    right.set_xlabel("zeros, %")
    right.set_ylabel("energy of the weights gone, %")
    right.legend(frameon=False, fontsize=8)
    return (
        "Left: what zeros cost in perplexity, scored without an engine on the beginnings of the"
        " passages, with diamonds for what the served engines have over whole ones. Right: the"
        " share of the weights' energy that goes, which grows with the cube of the sparsity at"
        " first."
    )


def _draw_served(ax: Axes, run: JudgedRun, facts: Sweep) -> None:
    """Draws the perplexity that the quality probe found on the engines, where it ran."""
    weights = {v.name: v.weights for v in run.lab.variants}
    label = "on the engine"
    for name, figures in treatments_of(run).items():
        ratio = figure_of(figures, "perplexity_ratio")
        by, _, pattern = weights[name].partition("-")
        at = facts.at(by, pattern)
        if at is None:
            continue
        ax.plot(100 * at.share, ratio.value, "D", color=BOUND, ms=5, zorder=4, mfc="none",
                label=label)  # fmt: skip
        label = ""


def _published() -> Sequence[Published]:
    return (
        Published(figure="5.12 to 14.89 by magnitude, 6.42 by Wanda", source=f"{WANDA}, repository",
                  setting="perplexity on WikiText, 50% zeros, LLaMA-2 7B"),
        Published(figure="54.59 by magnitude, 11.02 by Wanda", source=f"{WANDA}, repository",
                  setting="the same, 2:4"),
        Published(figure="3.12 to 4.98 and 3.98", source=f"{WANDA}, repository",
                  setting="50% zeros, LLaMA-2 70B, magnitude and Wanda"),
    )  # fmt: skip


PUBLISHED: PublishedFigures = {
    "findings": {
        "sparsities": _published(),
        "kernels": (
            Published(figure="twice the math throughput", setting="sparse tensor cores, 2:4, A100",
                      source="Mishra et al., 2021"),
            Published(figure="support for 2:4 removed", setting="vLLM, March 2026, as few used it",
                      source="vLLM, pull request 36799"),
        ),
        "smaller": (
            Published(figure="under 3% of the training data",
                      setting="8B and 4B out of a 15B, pruned by structure and distilled",
                      source="Muralidharan et al., Minitron, 2024"),
        ),
    },
}  # fmt: skip

PARTS = ReportParts(
    conclusions=(SERVED, SWEEP, KERNELS, EXPERTS, TRAINING, QUALITY),
    answers={
        "CO-4": sparse_kinds,
        "CO-5": distillation,
        "CO-6": cliff,
        "CO-8": qat,
    },
    kinds={"CO-4": IN_PART, "CO-5": ARITHMETIC, "CO-8": ARITHMETIC},
    plots={"cliff": draw_cliff},
    published=PUBLISHED,
    headline=Headline(
        claim="half-one",
        done="Setting half of the weights to zero, for a single user",
        figure="the time per token",
    ),
)
