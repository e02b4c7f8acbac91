"""Conclude what each variant finds again in a long context, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dashboards.palette import BOUND
from labs.context_retrieval.lab import (
    EVICTED_SHARE,
    FORMULAS,
    SHARING_LAYERS,
    longest_prompt,
)
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import plt
from labs.harness.facts.offloading import BREAK_EVEN_LENGTH, CopyOrCompute, break_even_sentence
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import AT, Finding
from labs.harness.judging.judge import CONFIDENCE, TWO_ONE_SIDED, Interval, prediction_outcome
from labs.harness.judging.quality import paired_difference
from labs.harness.judging.retrieval import Changes, Needle, adds_up, by_text, margin_change, share
from labs.harness.judging.text import (
    counted,
    number,
    prediction_text,
    sentences,
    times_with_interval,
)
from labs.harness.spec import Prediction

Place = tuple[int, float]  # length of a text in tokens, and depth in it

# ----------------------------------------------------------------------------- what was retrieved


@dataclass(frozen=True)
class Asked:
    """Holds the needles that one variant was asked for."""

    variant: str
    window: int | None  # tokens that a layer attends to, where not all
    needles: tuple[Needle, ...]

    @property
    def correct_count(self) -> int:
        return sum(n.correct for n in self.needles)

    @property
    def places(self) -> list[Place]:
        return sorted({n.place for n in self.needles})

    def at(self, place: Place) -> list[Needle]:
        return [n for n in self.needles if n.place == place]

    def reaches(self, needle: Needle) -> bool:
        """Whether all of the needle lies within the window of the last token."""
        return self.window is None or needle.distance_tokens <= self.window


def asked(context: Context) -> tuple[Asked, ...]:
    """Reads what the probe asked of each variant; nothing where it did not run."""
    windows = {p.variant.name: p.flags.sliding_window for p in context.points}
    probes = {
        v.name: context.folder.probe_result("retrieval", v.name) for v in context.lab.variants
    }
    return tuple(
        Asked(
            variant=name,
            window=windows.get(name),
            needles=tuple(Needle.model_validate(n) for n in probe["needles"]),
        )
        for name, probe in probes.items()
        if probe and probe["needles"]
    )


def tell_retrieval(facts: tuple[Asked, ...]) -> Finding:
    title = "What is found, by length and depth"
    if not facts:
        return Finding(title=title, lines=["The probe did not run."])
    rows = [["Text, tokens", "Depth", "Tokens from the end", *(f"`{a.variant}`" for a in facts)]]
    first = facts[0]
    for place in first.places:
        back = fmean(n.distance_tokens for n in first.at(place))
        rows.append(
            [f"{place[0]:,}", f"{place[1]:g}", f"{back:,.0f}", *(_cell(a, place) for a in facts)]
        )
    rows.append(
        ["all", "", "", *(f"**{a.correct_count} of {len(a.needles)}**" for a in facts)]
    )  # fmt: skip
    lines = [
        "Needles found of those asked, and in brackets the mean answer margin in nats: the"
        " log-probability of the right digit minus that of the best other token, the least of an"
        " answer's digits."
        " Below 0 the digit written is wrong. A circle marks what lies beyond a window's reach.",
        "Depth 0 is the beginning of the text, 1 its end. Five numbers lie in each text, and each"
        " is asked for by itself with nothing else in flight. A question that finds its text in the"
        " prefix cache reads what the cache keeps of it; so does every later piece of a prompt.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


def _cell(asked_of: Asked, place: Place) -> str:
    needles = asked_of.at(place)
    margins = [n.margin_nats for n in needles if n.margin_nats is not None]
    beyond = "" if all(map(asked_of.reaches, needles)) else " ○"
    mean = f" ({fmean(margins):.1f})" if margins else ""
    return f"{sum(n.correct for n in needles)} of {len(needles)}{mean}{beyond}"


RETRIEVAL = Conclusion("retrieval", asked, tell_retrieval)

# ------------------------------------------------------------------------------ what was lost, why


@dataclass(frozen=True)
class Held:
    """Holds a forecast beside what came, and what became of it."""

    what: str
    prediction: Prediction
    measured: Interval | None  # with its 95% interval
    narrow: Interval | None  # with the 90% interval by which it is judged

    @property
    def outcome(self) -> str:
        return prediction_outcome(self.prediction, self.narrow)


@dataclass(frozen=True)
class Lost:
    """Compares what a variant finds with what the base finds of the same needles."""

    variant: str
    n: int
    correct_count: int
    difference: Interval  # of the share found, paired
    p_value: float  # McNemar's
    margin: Interval | None  # its mean change, in nats
    lost: int  # found by the base and not here
    gained: int
    margin_of_lost: float | None  # what they had at the base, mean
    margin_of_kept: float | None
    within: tuple[int, int] | None  # needles found and asked within a window's reach
    beyond: tuple[int, int] | None
    held: tuple[Held, ...]


@dataclass(frozen=True)
class Losses:
    """Holds what each treatment costs; `base` names the variant in full precision."""

    base: str
    base_correct_count: int
    n: int
    variants: tuple[Lost, ...]

    def of(self, variant: str) -> Lost | None:
        return next((v for v in self.variants if v.variant == variant), None)


BOTH, PARTS_OF_BOTH = "both", ("kv-fp8", "w8a8")


def losses(context: Context) -> Losses | None:
    facts = context.once(asked)
    if not facts or facts[0].variant != context.lab.variants[0].name:
        return None
    base, *treated = facts
    predicted = context.predictions.arithmetic
    known = {a.variant: by_text(base.needles, a.needles) for a in treated}
    return Losses(
        base=base.variant,
        base_correct_count=base.correct_count,
        n=len(base.needles),
        variants=tuple(_lost(base, a, predicted, known) for a in treated),
    )


def _lost(
    base: Asked,
    treated: Asked,
    predicted: Mapping[str, Prediction],
    changes: Mapping[str, Changes],
) -> Lost:
    pairs = list(zip(base.needles, treated.needles, strict=True))
    difference, p_value = paired_difference(
        [b.correct for b, _ in pairs], [t.correct for _, t in pairs]
    )
    gone = [b for b, t in pairs if b.correct and not t.correct]
    stayed = [b for b, t in pairs if b.correct and t.correct]

    def kept(what: str, of: Sequence[tuple[Needle, Needle]]) -> Held | None:
        had = [(b, t) for b, t in of if b.correct]
        if what not in predicted or not had:
            return None
        hits = sum(t.correct for _, t in had)
        return Held(
            what, predicted[what], *(share(hits, len(had), c) for c in (CONFIDENCE, TWO_ONE_SIDED))
        )

    within = beyond = None
    if treated.window is None:
        held = [kept("needles kept, 8 bits", pairs)]
    else:
        near = [(b, t) for b, t in pairs if treated.reaches(t)]
        far = [(b, t) for b, t in pairs if not treated.reaches(t)]
        within, beyond = ((sum(t.correct for _, t in of), len(of)) for of in (near, far))
        held = [
            kept("needles kept, window, within its reach", near),
            kept("needles kept, window, beyond its reach", far),
        ]
    both = "margin lost, both / the sum of each"
    if treated.variant == BOTH and both in predicted and all(p in changes for p in PARTS_OF_BOTH):
        parts = [changes[p] for p in PARTS_OF_BOTH]
        sums = [adds_up(changes[BOTH], parts, c) for c in (CONFIDENCE, TWO_ONE_SIDED)]
        held.append(Held(both, predicted[both], *sums))
    return Lost(
        variant=treated.variant,
        n=len(pairs),
        correct_count=treated.correct_count,
        difference=difference,
        p_value=p_value,
        margin=margin_change(base.needles, treated.needles),
        lost=len(gone),
        gained=sum(t.correct and not b.correct for b, t in pairs),
        margin_of_lost=_mean_margin(gone),
        margin_of_kept=_mean_margin(stayed),
        within=within,
        beyond=beyond,
        held=tuple(h for h in held if h),
    )


def _mean_margin(needles: Sequence[Needle]) -> float | None:
    margins = [n.margin_nats for n in needles if n.margin_nats is not None]
    return fmean(margins) if margins else None


def tell_losses(facts: Losses | None) -> Finding:
    title = "What is lost, and why"
    if facts is None:
        return Finding(title=title, lines=["The probe did not run."])
    rows = [["Variant", "Found", f"Against `{facts.base}`, points", "McNemar's p",
             "Answer margin, change in nats", "Lost", "Gained",
             f"Margin of the lost at `{facts.base}`", "Of the kept"]]  # fmt: skip
    rows.append([f"`{facts.base}`", f"{facts.base_correct_count} of {facts.n}", *["–"] * 7])
    rows += [
        [f"`{v.variant}`", f"{v.correct_count} of {v.n}", _points(v.difference), number(v.p_value),
         _nats(v.margin), str(v.lost), str(v.gained), number(v.margin_of_lost),
         number(v.margin_of_kept)]
        for v in facts.variants
    ]  # fmt: skip
    lines = [line for v in facts.variants if (line := lost_sentence(v, facts.base))]
    lines += [held_sentence(v.variant, h) for v in facts.variants for h in v.held]
    lines += [line for v in facts.variants if (line := reach_sentence(v, facts))]
    lines.append(
        "Differences of shares have adjusted Wald intervals (Bonett and Price 2012), which take"
        " needles as independent; changes of the margin have intervals over texts. Both are 95%"
        " intervals. Forecasts are judged by 90% intervals."
    )
    return Finding(title=title, rows=rows, lines=lines)


def _points(interval: Interval, unit: str = "") -> str:
    ends = (100 * v for v in (interval.low, interval.high) if v is not None)
    return f"{100 * interval.value:+z.1f}{unit} ({' to '.join(f'{e:+z.1f}' for e in ends)})"


def _nats(interval: Interval | None, unit: str = "") -> str:
    if interval is None:
        return "–"
    if interval.low is None or interval.high is None:
        return f"{interval.value:+z.2f}{unit}"
    return f"{interval.value:+z.2f}{unit} ({interval.low:+z.2f} to {interval.high:+z.2f})"


def lost_sentence(lost: Lost, base: str) -> str | None:
    """Says of which needles a variant lost, by the margin that they had."""
    if not lost.lost or lost.margin_of_lost is None or lost.margin_of_kept is None:
        return None
    return (
        f"`{lost.variant}`: the {counted(lost.lost, 'needle')} that it lost had a mean margin of"
        f" {lost.margin_of_lost:.2f} nats at `{base}`, those that it kept"
        f" {lost.margin_of_kept:.2f}."
    )


def reach_sentence(lost: Lost, facts: Losses) -> str | None:
    """Says why a window may lose what lies within it; None where it finds as much there."""
    if not lost.within or not lost.within[1]:
        return None
    correct_count, n = lost.within
    if correct_count / n >= facts.base_correct_count / facts.n:
        return None
    return (
        f"`{lost.variant}` finds {correct_count} of the {n} within its reach. A window drops the"
        " text's first tokens as well. A model that was trained on whole texts directs much of its"
        " attention to them (attention sinks, Xiao et al. 2024). StreamingLLM keeps a few of them"
        " beside the window; vLLM does not."
    )


def held_sentence(variant: str, held: Held) -> str:
    came = "–" if held.measured is None else _value(held.measured)
    return (
        f"`{variant}`, {held.what}: forecast {prediction_text(held.prediction)}, measured {came}:"
        f" *{held.outcome}*."
    )


def _value(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


LOSSES = Conclusion("retrieval-lost", losses, tell_losses)

# ------------------------------------------------------------------------- four ways, side by side


@dataclass(frozen=True)
class Way:
    """Sets a way to a smaller KV cache beside the others."""

    method: str
    title: str
    sequence_bytes: float
    formula: str
    variant: str | None  # that was run; None: arithmetic alone
    at_once: Interval | None  # requests in decode / the base's, where memory is short
    step: Interval | None  # TPOT over a long context / the base's
    price: str


@dataclass(frozen=True)
class Ways:
    """Lists the ways, at the length of the long context."""

    tokens: int
    window: int | None
    ways: tuple[Way, ...]
    offload: CopyOrCompute | None

    def of(self, method: str) -> Way | None:
        return next((w for w in self.ways if w.method == method), None)

    def ratio(self, way: Way) -> float:
        full = self.of("full")
        return way.sequence_bytes / full.sequence_bytes if full else math.nan

    @property
    def measured(self) -> list[Way]:
        return [w for w in self.ways if w.at_once or w.step]


TITLES = {
    "full": "all tokens in 16 bits",
    "fp8": "a cache in 8 bits",
    "window": "a sliding window",
    "fp8 and window": "a sliding window in 8 bits",
    "evicted": f"eviction that keeps {EVICTED_SHARE:.0%} by attention",
    "shared": f"one cache for {SHARING_LAYERS} layers",
    "fp8 and shared": f"one cache for {SHARING_LAYERS} layers in 8 bits",
}
RUN_BY = {"full": "full", "fp8": "kv-fp8", "window": "window"}
NOT_RUN = {
    "fp8 and window": "both prices; not run",
    "evicted": "the server has to see scores of attention, which fused kernels never store, and"
    " what is evicted is gone for a later question (published, not run)",
    "shared": "the model must be trained so; published as about the quality of one without"
    " (not run)",
    "fp8 and shared": "both prices; not run",
}


def ways(context: Context) -> Ways | None:
    """Reads the bytes that were written down beforehand, and what each way that was run showed."""
    predicted = context.predictions.arithmetic
    tokens = longest_prompt(context.lab)
    lost = context.once(losses)
    kv_ways = []
    for method in FORMULAS:
        prediction = predicted.get(f"KV bytes of a sequence, {method}{AT}{tokens}")
        if prediction is None:
            continue
        variant = RUN_BY.get(method)
        kv_ways.append(
            Way(
                method=method,
                title=TITLES[method],
                sequence_bytes=prediction.value,
                formula=prediction.formula,
                variant=variant,
                at_once=_beside_base(context, variant, "tight", "batch"),
                step=_beside_base(context, variant, "far", "tpot_mean_s"),
                price=NOT_RUN.get(method) or _price(lost, variant),
            )
        )
    windows = [w for p in context.points if (w := p.flags.sliding_window)]
    if not kv_ways:
        return None
    return Ways(
        tokens=tokens,
        window=windows[0] if windows else None,
        ways=tuple(kv_ways),
        offload=CopyOrCompute.of(context.points[0]) if context.points else None,
    )


def _beside_base(
    context: Context, variant: str | None, workload: str, metric: str
) -> Interval | None:
    """Divides a variant's figure on a workload by the base's; None for the base itself."""
    at = {p.variant.name: p for p in context.points if p.workload.name == workload}
    base = context.lab.variants[0].name
    if variant is None or variant == base or not {variant, base} <= at.keys():
        return None
    measured = context.effect(at[variant], at[base], metric)
    return measured.ratio if measured else None


def _price(lost: Losses | None, variant: str | None) -> str:
    if lost is None or variant is None:
        return "–"
    if variant == lost.base:
        return f"finds {lost.base_correct_count} of {lost.n} needles"
    if (of := lost.of(variant)) is None:
        return "–"
    reach = (
        f": {of.within[0]} of {of.within[1]} within its reach, {of.beyond[0]} of {of.beyond[1]}"
        " beyond"
        if of.within and of.beyond
        else ""
    )
    return f"finds {of.correct_count} of {of.n} needles{reach}"


def tell_ways(facts: Ways | None) -> Finding:
    title = "Quantize, evict, slide a window, or share layers?"
    if facts is None:
        return Finding(title=title)
    rows = [["Way", f"KV cache of {facts.tokens:,} tokens", "Beside all in 16 bits",
             "Known from", "Requests at once where memory is short", "TPOT over a long context",
             "Price"]]  # fmt: skip
    rows += [
        [w.title, f"{number(w.sequence_bytes / 2**20)} MiB", f"{facts.ratio(w):.2f}x",
         f"run as `{w.variant}`" if w.variant else f"arithmetic: {w.formula}",
         times_with_interval(w.at_once) if w.at_once else "–",
         times_with_interval(w.step) if w.step else "–", w.price]
        for w in facts.ways
    ]  # fmt: skip
    lines = []
    if facts.window:
        lines.append(
            f"A window of {facts.window:,} tokens is the only way whose cache stops growing: at"
            f" twice the length it takes {facts.window / (2 * facts.tokens):.2f} of all in 16 bits."
            " The engine's own configuration shows that it attends to no more, and so do the"
            " needles: see the other findings."
        )
    lines.append(
        "What vLLM cannot do is arithmetic: it has no eviction by attention, and a model whose"
        " layers share their keys and values must be trained so. Evicting is at the published"
        f" {EVICTED_SHARE:.0%}, sharing at every second layer."
    )
    if facts.offload:
        lines.append(f"{break_even_sentence(facts.offload)} {BREAK_EVEN_LENGTH}")
    return Finding(title=title, rows=rows, lines=lines)


WAYS = Conclusion("kv-methods", ways, tell_ways)

# ------------------------------------------------------------------------------------ the answers


def why_it_drops(run: JudgedRun) -> str | None:
    """Answers ME-3 by the margins that were lost, and what they were before."""
    facts = LOSSES.facts_of(run)
    if facts is None:
        return None
    parts = [
        f"`{v.variant}` finds {v.correct_count} of {v.n}, {_points(v.difference, ' points')}"
        + (f", and its margin changes by {_nats(v.margin, ' nats')}" if v.margin else "")
        for v in facts.variants
        if v.variant in (*PARTS_OF_BOTH, BOTH)
    ]
    lost = [
        f"the {counted(v.lost, 'needle')} that `{v.variant}` lost had a mean margin of"
        f" {v.margin_of_lost:.2f} nats before, those that it kept {v.margin_of_kept:.2f}"
        for v in facts.variants
        if v.variant in (*PARTS_OF_BOTH, BOTH)
        and v.lost
        and v.margin_of_lost is not None
        and v.margin_of_kept is not None
    ]
    clauses = [
        "rounding adds an error to every product of a query with a key, and an answer turns where"
        " the error exceeds its margin over the best wrong one",
        f"of {facts.n} needles `{facts.base}` finds {facts.base_correct_count}; "
        + "; ".join(parts),
        "; ".join(lost),
    ]
    return sentences([s for s in clauses if s])


def which_way(run: JudgedRun) -> str | None:
    """Answers KV-8 by what was run, and by arithmetic for what was not."""
    facts = WAYS.facts_of(run)
    if facts is None or not facts.measured:
        return None
    ran = [
        f"{w.title} takes {facts.ratio(w):.2f} of the bytes"
        + (f", runs {times_with_interval(w.at_once)} the requests at once" if w.at_once else "")
        + (f", has {times_with_interval(w.step)} the TPOT" if w.step else "")
        + (f", and {w.price}" if w.price != "–" else "")
        for w in facts.measured
    ]
    rest = [f"{w.title} {facts.ratio(w):.2f}" for w in facts.ways if w.variant is None]
    text = sentences(
        [
            f"at {facts.tokens:,} tokens, measured: {'; '.join(ran)}",
            f"by arithmetic, not run, these take so much of the bytes: {', '.join(rest)}",
            "a window and sharing change the model, which is trained for them; the other two change"
            " how any model is served",
        ]
    )
    return f"{text} {break_even_sentence(facts.offload)}" if facts.offload else text


# --------------------------------------------------------------------------------------- its plots


def draw_retrieval(run: JudgedRun) -> str | None:
    """Draws the share of needles found by length and depth, a map for each variant."""
    facts = RETRIEVAL.facts_of(run)
    if not facts:
        return None
    lengths = sorted({n.length_tokens for n in facts[0].needles})
    depths = sorted({n.depth for n in facts[0].needles})
    _, axes = plt.subplots(1, len(facts), figsize=(2.3 * len(facts) + 0.6, 2.1), sharey=True,
                           squeeze=False)  # fmt: skip
    for ax, of in zip(axes[0], facts, strict=True):
        shares = [[fmean(n.correct for n in of.at((length, d))) for d in depths]
                  for length in lengths]  # fmt: skip
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
        ax.grid(False)
        for row, length in enumerate(lengths):
            for column, depth in enumerate(depths):
                needles = of.at((length, depth))
                ax.text(column, row, f"{sum(n.correct for n in needles)}/{len(needles)}",
                        ha="center", va="center", fontsize=8)  # fmt: skip
                if not all(map(of.reaches, needles)):
                    ax.plot(column + 0.36, row - 0.32, "o", mfc="none", color=BOUND, ms=4)
        ax.set_title(of.variant, fontsize=9)
        ax.set_xticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=8)
        ax.set_yticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
    axes[0][0].set_ylabel("tokens of text")
    axes[0][len(facts) // 2].set_xlabel("depth of the needle (0: the beginning, 1: the end)")
    return (
        "Needles found of those asked, by the length of the text and the depth in it; darker is"
        " more. A ring marks what lies beyond a window's reach."
    )


PUBLISHED: PublishedFigures = {
    "findings": {
        "retrieval-lost": (
            Published(
                figure="0.8%",
                setting="accuracy lost on long contexts with 8 bits, on average; 4 bits lose up to"
                " 59%",
                source="Mekala et al., EMNLP 2025",
            ),
        ),
        "kv-methods": (
            Published(
                figure="collapse",
                setting="of a plain window, once a text exceeds it and its first tokens are gone",
                source="Xiao et al., StreamingLLM, ICLR 2024",
            ),
            Published(
                figure="20% of the tokens",
                setting="kept by attention, quality held",
                source="Zhang et al., H2O, NeurIPS 2023",
            ),
            Published(
                figure="half the cache",
                setting="each two layers share, with about the quality of one without, 1B and 3B"
                " models trained so",
                source="Brandon et al., Cross-Layer Attention, NeurIPS 2024",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(RETRIEVAL, LOSSES, WAYS),
    answers={"ME-3": why_it_drops, "KV-8": which_way},
    plots={"retrieval": draw_retrieval},
    published=PUBLISHED,
    headline=Headline(
        claim="batch-window",
        done="Keeping only the end of a long context, by a sliding window",
        figure="the requests that run at once",
    ),
)
