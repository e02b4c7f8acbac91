"""What each variant finds again in a long context, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from labs.context_retrieval.lab import EVICTED_SHARE, FORMULAS, SHARING_LAYERS, longest_prompt
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.offloading import CopyOrCompute
from labs.harness.filing.results import AT
from labs.harness.judging.judge import (
    CONFIDENCE,
    TWO_ONE_SIDED,
    Interval,
    PredictionOutcome,
    prediction_outcome,
)
from labs.harness.judging.quality import paired_difference
from labs.harness.judging.quantity import POINTS, RATIO, Quantity
from labs.harness.judging.retrieval import Changes, Needle, adds_up, by_text, margin_change, share
from labs.harness.spec import Prediction

BOTH, PARTS_OF_BOTH = "both", ("kv-fp8", "w8a8")
RUN_BY = {"full": "full", "fp8": "kv-fp8", "window": "window"}
Pairs = Sequence[tuple[Needle, Needle]]  # of the base and of a variant


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


@dataclass(frozen=True)
class Held:
    """A forecast beside what came, and what became of it."""

    what: Literal["all", "within", "beyond", "sum"]
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


@dataclass(frozen=True)
class Way:
    """A way to a smaller KV cache: what a sequence takes, and what was measured with it."""

    method: str
    sequence_bytes: float
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


@dataclass(frozen=True)
class Facts:
    retrieval: tuple[Retrieved, ...]  # empty where the probe did not run
    retrieval_lost: Losses | None
    kv_methods: Ways | None  # None where nothing was written down of them


def facts(run: JudgedRun) -> Facts:
    retrieved = asked(run) if run.finds("retrieval") else {}
    windows = {p.variant.name: p.flags.sliding_window for p in run.points}
    lost = losses(run, retrieved, windows)
    return Facts(
        tuple(found(name, needles, windows.get(name)) for name, needles in retrieved.items()),
        lost,
        ways(run, lost),
    )


# ----------------------------------------------------------------------------- what was retrieved


def asked(run: Context) -> dict[str, list[Needle]]:
    """Read what the probe asked of each variant; nothing where it did not run."""
    probes = {v.name: run.folder.probe_result("retrieval", v.name) for v in run.lab.variants}
    return {
        name: [Needle.model_validate(n) for n in probe["needles"]]
        for name, probe in probes.items()
        if probe and probe["needles"]
    }


def found(variant: str, needles: Sequence[Needle], window: int | None) -> Retrieved:
    places = sorted({n.place for n in needles})
    return Retrieved(
        variant,
        window,
        *_count(needles),
        tuple(at_place([n for n in needles if n.place == place], window) for place in places),
    )


def at_place(needles: Sequence[Needle], window: int | None) -> AtPlace:
    return AtPlace(
        *needles[0].place,
        fmean(n.distance_tokens for n in needles),
        *_count(needles),
        mean_margin(needles).in_unit("1"),
        all(reaches(window, n) for n in needles),
    )


def reaches(window: int | None, needle: Needle) -> bool:
    """Whether all of the needle lies within the window of the last token."""
    return window is None or needle.distance_tokens <= window


def mean_margin(needles: Sequence[Needle]) -> Quantity:
    margins = [n.margin_nats for n in needles if n.margin_nats is not None]
    return Quantity(fmean(margins), "nats") if margins else Quantity.missing("no margin", "nats")


def _count(needles: Sequence[Needle]) -> tuple[int, int]:
    """Count the needles that were found, and all."""
    return sum(n.correct for n in needles), len(needles)


# ------------------------------------------------------------------------------ what was lost, why


def losses(
    run: Context, retrieved: Mapping[str, list[Needle]], windows: Mapping[str, int | None]
) -> Losses | None:
    base = run.lab.variants[0].name
    if base not in retrieved:
        return None
    plain = retrieved[base]
    predicted = run.predictions.arithmetic
    changes = {name: by_text(plain, of) for name, of in retrieved.items() if name != base}
    return Losses(
        base,
        Found(*_count(plain)),
        tuple(
            lost(plain, name, retrieved[name], windows.get(name), predicted, changes)
            for name in changes
        ),
    )


def lost(
    base: list[Needle],
    variant: str,
    treated: list[Needle],
    window: int | None,
    predicted: Mapping[str, Prediction],
    changes: Mapping[str, Changes],
) -> Lost:
    pairs = list(zip(base, treated, strict=True))
    difference, p_value = paired_difference(
        [b.correct for b, _ in pairs], [t.correct for _, t in pairs]
    )
    gone = [b for b, t in pairs if b.correct and not t.correct]
    near = [(b, t) for b, t in pairs if reaches(window, t)]
    far = [(b, t) for b, t in pairs if not reaches(window, t)]
    within, beyond = (Found(*_count([t for _, t in of])) for of in (near, far))
    forecasts = [
        kept("within", "needles kept, window, within its reach", near, predicted),
        kept("beyond", "needles kept, window, beyond its reach", far, predicted),
    ] if window else [
        kept("all", "needles kept, 8 bits", pairs, predicted),
        sums_up(variant, predicted, changes),
    ]  # fmt: skip
    return Lost(
        variant,
        Found(*_count(treated)),
        Quantity.of(difference, POINTS),
        p_value,
        Quantity.of(margin_change(base, treated), "nats"),
        lost=len(gone),
        gained=sum(t.correct and not b.correct for b, t in pairs),
        margin_of_lost=mean_margin(gone),
        margin_of_kept=mean_margin([b for b, t in pairs if b.correct and t.correct]),
        within=within if window else None,
        beyond=beyond if window else None,
        loses_within=bool(window and within.asked)
        and within.correct * len(base) < within.asked * _count(base)[0],
        held=tuple(of for of in forecasts if of),
    )


def kept(
    what: Literal["all", "within", "beyond"],
    name: str,
    pairs: Pairs,
    predicted: Mapping[str, Prediction],
) -> Held | None:
    """Hold the share of the base's needles that was kept against its forecast."""
    had = [t for b, t in pairs if b.correct]
    if name not in predicted or not had:
        return None
    shares = [share(*_count(had), confidence) for confidence in (CONFIDENCE, TWO_ONE_SIDED)]
    return held(what, predicted[name], *shares)


def sums_up(
    variant: str, predicted: Mapping[str, Prediction], changes: Mapping[str, Changes]
) -> Held | None:
    """Hold the margin lost under two treatments at once against the sum of each alone."""
    name = "margin lost, both / the sum of each"
    if variant != BOTH or name not in predicted or not changes.keys() >= {*PARTS_OF_BOTH}:
        return None
    parts = [changes[part] for part in PARTS_OF_BOTH]
    sums = [adds_up(changes[BOTH], parts, c) for c in (CONFIDENCE, TWO_ONE_SIDED)]
    return held("sum", predicted[name], *sums)


def held(
    what: Literal["all", "within", "beyond", "sum"],
    prediction: Prediction,
    measured: Interval | None,
    narrow: Interval | None,
) -> Held:
    return Held(
        what,
        prediction.kind,
        Quantity(prediction.value),
        Quantity.of(measured),
        prediction_outcome(prediction, narrow),
    )


# ------------------------------------------------------------------------- four ways, side by side


def ways(run: Context, lost: Losses | None) -> Ways | None:
    """Read the bytes that were written down beforehand, and what each way that was run showed."""
    tokens = longest_prompt(run.lab)
    predicted = {
        method: prediction
        for method in FORMULAS
        if (prediction := run.predictions.arithmetic.get(
            f"KV bytes of a sequence, {method}{AT}{tokens}"))
    }  # fmt: skip
    windows = [w for p in run.points if (w := p.flags.sliding_window)]
    if not predicted or not run.points:
        return None
    window = windows[0] if windows else None
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
        method,
        prediction.value,
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
    if variant is None or variant == base or not {variant, base} <= at.keys():
        return Quantity.missing("not run", RATIO)
    measured = run.effect(at[variant], at[base], metric)
    return Quantity.of(measured.ratio if measured else None, RATIO)
