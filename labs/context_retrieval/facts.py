"""What each variant finds again in a long context, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from labs.context_retrieval.lab import (
    EVICTED_SHARE,
    FORMULAS,
    KEPT_BEYOND,
    KEPT_IN_8_BITS,
    KEPT_WITHIN,
    LOST_TOGETHER,
    SHARING_LAYERS,
    longest_prompt,
)
from labs.context_retrieval.retrieval import Changes, Needle, adds_up, by_text, margin_change
from labs.harness.analysis.computed import AT
from labs.harness.analysis.quality import paired_difference
from labs.harness.analysis.quantity import POINTS, Quantity
from labs.harness.analysis.verdicts import (
    CONFIDENCE,
    TWO_ONE_SIDED,
    Interval,
    PredictionOutcome,
    prediction_outcome,
    share,
)
from labs.harness.derived.offloading import CopyOrCompute
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Prediction

BOTH, PARTS_OF_BOTH = "both", ("kv-fp8", "w8a8")
RUN_BY = {"full": "full", "fp8": "kv-fp8", "window": "window"}


@dataclass(frozen=True)
class Facts:
    retrieval: tuple[Retrieved, ...]  # empty where the probe did not run
    retrieval_lost: Losses | None
    kv_methods: Ways | None  # None where nothing was written down of them


def facts(run: JudgedRun) -> Facts:
    variants = asked(run)
    lost = losses(run, variants)
    return Facts(tuple(found(of) for of in variants.values()), lost, ways(run, lost))


# ------------------------------------------------------------------------------- what was retrieved


@dataclass(frozen=True)
class Asked:
    """The needles that one variant was asked for."""

    variant: str
    window: int | None
    needles: list[Needle]

    def reaches(self, needle: Needle) -> bool:
        """Whether all of the needle lies within the window of the last token."""
        return self.window is None or needle.distance_tokens <= self.window


@dataclass(frozen=True)
class AtPlace:
    """What a variant found of the needles at a depth of the texts of one length."""

    length_tokens: int
    depth: float
    distance_tokens: float  # from the end, mean
    correct: int
    asked: int
    margin_nats: Quantity  # mean
    is_reached: bool  # whether all lie within the window of the last token


@dataclass(frozen=True)
class Retrieved:
    """What one variant found, place by place."""

    variant: str
    window: int | None  # tokens that a layer attends to, where not all
    correct: int
    asked: int
    places: tuple[AtPlace, ...]


@dataclass(frozen=True)
class Found:
    """How many needles were found of those asked for."""

    correct: int
    asked: int


def asked(run: Context) -> dict[str, Asked]:
    """Read what the probe asked of each variant; nothing where it did not run."""
    windows = {p.variant.name: p.flags.sliding_window for p in run.points}
    probes = {v.name: run.folder.probe_result("retrieval", v.name) for v in run.lab.variants}
    return {
        name: Asked(name, windows.get(name), [Needle.model_validate(n) for n in probe["needles"]])
        for name, probe in probes.items()
        if probe and probe["needles"]
    }


def found(of: Asked) -> Retrieved:
    places = sorted({n.place for n in of.needles})
    at_places = (at_place(of, [n for n in of.needles if n.place == place]) for place in places)
    return Retrieved(of.variant, of.window, *_count(of.needles), tuple(at_places))


def at_place(of: Asked, needles: Sequence[Needle]) -> AtPlace:
    return AtPlace(
        *needles[0].place,
        fmean(n.distance_tokens for n in needles),
        *_count(needles),
        mean_margin(needles).in_unit("1"),
        all(map(of.reaches, needles)),
    )


def mean_margin(needles: Sequence[Needle]) -> Quantity:
    margins = [n.margin_nats for n in needles if n.margin_nats is not None]
    return Quantity(fmean(margins), "nats") if margins else Quantity.missing("no margin", "nats")


def _count(needles: Sequence[Needle]) -> tuple[int, int]:
    """Count the needles that were found, and all."""
    return sum(n.correct for n in needles), len(needles)


# ------------------------------------------------------------------------------- what was lost, why

What = Literal["all", "within", "beyond", "sum"]


@dataclass(frozen=True)
class Held:
    """A forecast beside what came, and what became of it."""

    what: What
    kind: Literal["point", "ceiling", "floor"]
    forecast: Quantity
    measured: Quantity
    outcome: PredictionOutcome  # by the 90% interval


@dataclass(frozen=True)
class Lost:
    """What a variant finds beside what the base finds of the same needles."""

    variant: str
    found: Found
    difference: Quantity  # of the share found, paired
    p_value: float  # McNemar's
    margin: Quantity  # its mean change, in nats
    lost: int  # found by the base and not here
    gained: int
    margin_of_lost: Quantity  # what they had at the base, mean
    margin_of_kept: Quantity
    within: Found | None  # needles within a window's reach
    beyond: Found | None
    loses_within: bool  # whether it finds less of those within its reach than the base of all
    held: tuple[Held, ...]

    @property
    def is_shown(self) -> bool:
        """Whether the interval says that it finds more or fewer."""
        low, high = self.difference.low, self.difference.high
        return low is not None and high is not None and not low <= 0 <= high


@dataclass(frozen=True)
class Losses:
    """What each treatment costs; `base` names the variant in full precision."""

    base: str
    found: Found  # by the base
    variants: tuple[Lost, ...]

    @property
    def rounded(self) -> list[Lost]:
        """Those of fewer bits."""
        return [of for of in self.variants if of.variant in (*PARTS_OF_BOTH, BOTH)]

    def of(self, variant: str | None) -> Lost | None:
        return next((v for v in self.variants if v.variant == variant), None)


def losses(run: Context, variants: Mapping[str, Asked]) -> Losses | None:
    name = run.lab.variants[0].name
    if name not in variants:
        return None
    base, *treated = variants.values()
    predicted = run.predictions.arithmetic
    changes = {of.variant: by_text(base.needles, of.needles) for of in treated}
    return Losses(
        name,
        Found(*_count(base.needles)),
        tuple(lost(base, of, forecasts_held(base, of, predicted, changes)) for of in treated),
    )


def lost(base: Asked, treated: Asked, held: tuple[Held, ...]) -> Lost:
    pairs = list(zip(base.needles, treated.needles, strict=True))
    difference, p_value = paired_difference(
        [b.correct for b, _ in pairs], [t.correct for _, t in pairs]
    )
    gone = [b for b, t in pairs if b.correct and not t.correct]
    within, beyond = (
        Found(*_count([n for n in treated.needles if treated.reaches(n) is reached]))
        for reached in (True, False)
    )
    return Lost(
        treated.variant,
        Found(*_count(treated.needles)),
        Quantity.of(difference, POINTS),
        p_value,
        Quantity.of(margin_change(base.needles, treated.needles), "nats"),
        lost=len(gone),
        gained=sum(t.correct and not b.correct for b, t in pairs),
        margin_of_lost=mean_margin(gone),
        margin_of_kept=mean_margin([b for b, t in pairs if b.correct and t.correct]),
        within=within if treated.window else None,
        beyond=beyond if treated.window else None,
        # a smaller share of these than the base finds of all
        loses_within=treated.window is not None
        and within.correct * len(pairs) < within.asked * _count(base.needles)[0],
        held=held,
    )


def forecasts_held(
    base: Asked,
    treated: Asked,
    predicted: Mapping[str, Prediction],
    changes: Mapping[str, Changes],
) -> tuple[Held, ...]:
    """Hold against its forecast what a treatment kept of what the base found, and what it lost."""
    kept = [t for b, t in zip(base.needles, treated.needles, strict=True) if b.correct]
    if treated.window is None:
        held = (
            kept_of(kept, "all", predicted.get(KEPT_IN_8_BITS)),
            sums_up(treated.variant, changes, predicted.get(LOST_TOGETHER)),
        )
    else:
        near = [t for t in kept if treated.reaches(t)]
        far = [t for t in kept if not treated.reaches(t)]
        held = (
            kept_of(near, "within", predicted.get(KEPT_WITHIN)),
            kept_of(far, "beyond", predicted.get(KEPT_BEYOND)),
        )
    return tuple(of for of in held if of)


def kept_of(needles: Sequence[Needle], what: What, prediction: Prediction | None) -> Held | None:
    """Hold the share that is found against its forecast."""
    if prediction is None or not needles:
        return None
    shares = [share(*_count(needles), confidence) for confidence in (CONFIDENCE, TWO_ONE_SIDED)]
    return held_against(what, prediction, *shares)


def sums_up(
    variant: str, changes: Mapping[str, Changes], prediction: Prediction | None
) -> Held | None:
    """Hold the margin lost under two treatments at once against the sum of each alone."""
    if prediction is None or variant != BOTH or not changes.keys() >= {*PARTS_OF_BOTH}:
        return None
    parts = [changes[part] for part in PARTS_OF_BOTH]
    sums = [adds_up(changes[BOTH], parts, c) for c in (CONFIDENCE, TWO_ONE_SIDED)]
    return held_against("sum", prediction, *sums)


def held_against(
    what: What, prediction: Prediction, measured: Interval | None, narrow: Interval | None
) -> Held:
    return Held(
        what,
        prediction.kind,
        Quantity(prediction.value),
        Quantity.of(measured),
        prediction_outcome(prediction, narrow),
    )


# -------------------------------------------------------------------------- four ways, side by side


@dataclass(frozen=True)
class Way:
    """A way to a smaller KV cache: what a sequence takes, and what was measured with it."""

    sequence: Quantity
    ratio: float  # to all tokens in 16 bits
    formula: str
    variant: str | None  # that was run; None: arithmetic alone
    at_once: Quantity  # requests in decode / the base's, where memory is short
    step: Quantity  # TPOT over a long context / the base's
    found: Found | None
    within: Found | None
    beyond: Found | None

    @property
    def is_measured(self) -> bool:
        return self.at_once.known or self.step.known


@dataclass(frozen=True)
class Ways:
    """The ways, at the length of the long context."""

    tokens: int
    window: int | None
    window_at_twice: float | None  # its bytes / those of all tokens, at twice the length
    evicted_share: Quantity  # of the tokens that eviction keeps
    sharing_layers: int
    ways: dict[str, Way]
    offload: CopyOrCompute

    @property
    def is_measured(self) -> bool:
        return any(way.is_measured for way in self.ways.values())


def ways(run: Context, lost: Losses | None) -> Ways | None:
    """Read the bytes that were written down beforehand, and what each way that was run showed."""
    tokens = longest_prompt(run.lab)
    told = run.predictions.arithmetic
    of_method = {name: told.get(f"KV bytes of a sequence, {name}{AT}{tokens}") for name in FORMULAS}
    predicted = {name: prediction for name, prediction in of_method.items() if prediction}
    if not predicted or not run.points:
        return None
    window = next((w for p in run.points if (w := p.flags.sliding_window)), None)
    full_bytes = predicted["full"].value
    return Ways(
        tokens,
        window,
        window_at_twice=window / (2 * tokens) if window else None,
        evicted_share=Quantity(EVICTED_SHARE, "share"),
        sharing_layers=SHARING_LAYERS,
        ways={name: way(run, name, of, full_bytes, lost) for name, of in predicted.items()},
        offload=CopyOrCompute.of(run.points[0]),
    )


def way(
    run: Context, method: str, prediction: Prediction, full_bytes: float, lost: Losses | None
) -> Way:
    variant = RUN_BY.get(method)
    of = lost.of(variant) if lost else None
    of_base = lost.found if lost and lost.base == variant else None
    return Way(
        Quantity(prediction.value / 2**20, "MiB"),
        prediction.value / full_bytes,
        prediction.formula,
        variant,
        at_once=beside_base(run, variant, "tight", "batch"),
        step=beside_base(run, variant, "far", "tpot_mean_s"),
        found=of.found if of else of_base,
        within=of.within if of else None,
        beyond=of.beyond if of else None,
    )


def beside_base(run: Context, variant: str | None, workload: str, metric: str) -> Quantity:
    """Divide a variant's figure on a workload by the base's; missing for the base itself."""
    at = {p.variant.name: p for p in run.points if p.workload.name == workload}
    base = run.lab.variants[0].name
    return run.measured_ratio(at.get(variant or ""), at.get(base), metric)
