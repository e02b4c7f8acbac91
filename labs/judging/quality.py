"""What quantization costs in quality: two engines' answers compared in pairs, and a gate on it.

* *Perplexity* on held-out prose, exp(mean negative log-likelihood a token) (Jelinek et al. 1977).
* *Top-1 agreement*: the share of positions at which both put the same token first.
* *KL(baseline || treatment)* a token, over the ids known of both (top-K and the actual token) and
  one bucket for the rest: a lower bound on the full divergence, by the data-processing inequality.
* *Needle retrieval*: a number hidden at a depth of a filler text (Kamradt 2023), five keys in one
  text and one asked for, so that the wrong numbers distract (RULER, Hsieh et al. 2024).
* *Task accuracy*: short few-shot questions, scored by exact match.

A baseline compared with its own second answers shows the false alarms: what batching alone moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel
from scipy import stats

from labs.judging.evaluation import Evaluation, ScoredCompletion
from labs.judging.judge import CONFIDENCE, Interval

LEAST_REST = 1e-6  # logprobs are kept to 5 decimals: below this the rest's probability is rounding

QualityUnit = Literal["1", "nat/token"]
GateResult = Literal["pass", "fail", "undecided"]


class QualityFigure(BaseModel, frozen=True, extra="forbid"):
    """A figure with its 95 % interval; `n` counts tokens or questions, `p_value` is McNemar's."""

    name: str
    where: str = ""
    value: float
    low: float | None
    high: float | None
    n: int
    unit: QualityUnit = "1"
    source: str
    p_value: float | None = None


def compare(baseline: Evaluation, treatment: Evaluation) -> list[QualityFigure]:
    """Every figure; differences are treatment - baseline, so a loss is negative.

    McNemar's test takes the needles of one text to be independent, which they are but roughly.
    """
    pairs = list(zip(baseline.passages, treatment.passages, strict=True))
    if any(a.token_ids != b.token_ids for a, b in pairs):
        raise ValueError("the passages differ: not the same texts or not the same tokenizer")
    levels = {"baseline": baseline, "treatment": treatment}
    figures = [
        _figure("perplexity", [[-v for v in p.logprobs] for p in answers.passages], where, math.exp)
        for where, answers in levels.items()
    ]
    lost = [[x - y for x, y in zip(a.logprobs, b.logprobs, strict=True)] for a, b in pairs]
    known = [list(zip(a.known, b.known, strict=True)) for a, b in pairs]
    same = [[float(_first(x) == _first(y)) for x, y in positions] for positions in known]
    kl = [[kl_divergence(x, y) for x, y in positions] for positions in known]
    figures += [
        _figure("perplexity_ratio", lost, transform=math.exp),
        _figure("top1_agreement", same),
        _figure("kl_divergence", kl, unit="nat/token"),
    ]
    for name, before, after in (
        ("needle_retrieval", baseline.needles, treatment.needles),
        ("task_accuracy", baseline.tasks, treatment.tasks),
    ):
        figures += [_level(name, before, "baseline"), _level(name, after, "treatment")]
        figures.append(_difference(name, before, after))
    for field, title in (("length_tokens", "{} tokens"), ("depth", "depth {:g}")):
        for part in sorted({getattr(r, field) for r in baseline.needles}):
            a, b = (
                [r for r in answers.needles if getattr(r, field) == part]
                for answers in (baseline, treatment)
            )
            figures.append(_difference("needle_retrieval", a, b, title.format(part)))
    return figures


def kl_divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """KL(p || q) in nats, coarsened to the ids known of both and the rest; from logprobs."""
    shared = p.keys() & q.keys()
    rest_p, rest_q = (
        max(LEAST_REST, 1 - math.fsum(math.exp(side[i]) for i in shared)) for side in (p, q)
    )
    terms = [math.exp(p[i]) * (p[i] - q[i]) for i in shared]
    return max(0.0, math.fsum([*terms, rest_p * math.log(rest_p / rest_q)]))


def per_token(clusters: Sequence[Sequence[float]]) -> Interval:
    """The mean over tokens; its interval takes passages, not tokens, to be independent."""
    return over_clusters([math.fsum(c) for c in clusters], [len(c) for c in clusters])


def over_clusters(totals: Sequence[float], sizes: Sequence[int]) -> Interval:
    """The sum of the clusters' totals over that of their sizes; `n` is the latter.

    The standard error of a ratio of cluster totals (Cochran 1977, 9.1), Student's t.
    """
    total, size = np.array(totals, dtype=float), np.array(sizes, dtype=float)
    m, mean = len(total), float(total.sum() / size.sum())
    if m < 2:
        return Interval(value=mean, low=None, high=None, n=int(size.sum()))
    spread = math.sqrt(float(((total - mean * size) ** 2).sum()) * m / (m - 1))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, m - 1)) * spread / float(size.sum())
    return Interval(value=mean, low=mean - half, high=mean + half, n=int(size.sum()))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[Interval, float]:
    """The change of a share, and McNemar's exact p (1947) from the answers that changed.

    The interval is the adjusted Wald of Bonett and Price (2012): it stays honest when no answer
    changed at all, where the plain one has no width.
    """
    both = list(zip(before, after, strict=True))
    n = len(both)
    gained, lost = (sum(pair == kind for pair in both) for kind in ((False, True), (True, False)))
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(
        (up + down - (up - down) ** 2) / (n + 2)
    )
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    changed = gained + lost
    p_value = float(stats.binomtest(lost, changed).pvalue) if changed else 1.0
    return Interval(value=(gained - lost) / n, low=low, high=high, n=n), p_value


def _first(known: Mapping[int, float]) -> int:
    """The likeliest id; BF16 logits tie now and then, and the lowest id then wins."""
    return min(known, key=lambda token: (-known[token], token))


SOURCES = {
    "perplexity": "Jelinek et al. 1977",
    "perplexity_ratio": "Jelinek et al. 1977; paired by passage",
    "top1_agreement": "clustered by passage",
    "kl_divergence": "Kullback and Leibler 1951; lower bound",
    "needle_retrieval": "Kamradt 2023; McNemar 1947",
    "task_accuracy": "exact match; McNemar 1947",
}


def _figure(
    name: str,
    clusters: Sequence[Sequence[float]],
    where: str = "",
    transform: Callable[[float], float] = float,
    unit: QualityUnit = "1",
) -> QualityFigure:
    found = per_token(clusters)
    low = None if found.low is None else transform(found.low)
    high = None if found.high is None else transform(found.high)
    if name == "top1_agreement" and high is not None:
        high = min(1.0, high)
    if name == "kl_divergence" and low is not None:
        low = max(0.0, low)
    value, source = transform(found.value), SOURCES[name]
    return QualityFigure(
        name=name, where=where, value=value, low=low, high=high, n=found.n, unit=unit, source=source
    )


def _level(name: str, replies: Sequence[ScoredCompletion], where: str) -> QualityFigure:
    right, n = sum(r.correct for r in replies), len(replies)
    bounds = stats.binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return QualityFigure(
        name=name,
        where=where,
        value=right / n,
        low=float(bounds.low),
        high=float(bounds.high),
        n=n,
        source=SOURCES[name],
    )


def _difference(
    name: str,
    before: Sequence[ScoredCompletion],
    after: Sequence[ScoredCompletion],
    where: str = "",
) -> QualityFigure:
    if [(r.question, r.expected) for r in before] != [(r.question, r.expected) for r in after]:
        raise ValueError(f"{name}: the two sides were not asked the same questions")
    found, p_value = paired_difference([r.correct for r in before], [r.correct for r in after])
    return QualityFigure(
        name=f"{name}_difference",
        where=where,
        **found.model_dump(),
        source=SOURCES[name],
        p_value=p_value,
    )


# ------------------------------------------------------------------------------------------ gate


class Margin(BaseModel, frozen=True, extra="forbid"):
    """What a figure over all texts may be and still pass: at most, or at least, the bound."""

    figure: str
    at_most: float = math.inf
    at_least: float = -math.inf


MARGINS = (
    Margin(figure="perplexity_ratio", at_most=1.02),
    Margin(figure="needle_retrieval_difference", at_least=-0.05),
    Margin(figure="task_accuracy_difference", at_least=-0.05),
)
"""A choice, to be replaced by what an application can bear. Five points are about the least that 60
needles can resolve: with not one answer changed, their interval is ± 4.5 points."""


class MarginResult(BaseModel, frozen=True, extra="forbid"):
    figure: QualityFigure
    margin: Margin
    result: GateResult


def gate(
    figures: Sequence[QualityFigure], margins: Sequence[Margin] = MARGINS
) -> tuple[GateResult, list[MarginResult]]:
    """A non-inferiority test (Piaggio et al. 2012) of every margin, and what they say together.

    A margin passes when the whole interval keeps it and fails when the whole interval breaks it.
    All must pass; one that fails decides; anything else is undecided, never a pass.
    """
    overall = {f.name: f for f in figures if not f.where}
    verdicts = [
        MarginResult(
            figure=overall[m.figure], margin=m, result=_margin_result(overall[m.figure], m)
        )
        for m in margins
    ]
    results = {v.result for v in verdicts}
    worst: tuple[GateResult, ...] = ("fail", "undecided", "pass")
    return next((r for r in worst if r in results), "undecided"), verdicts


def _margin_result(figure: QualityFigure, margin: Margin) -> GateResult:
    if figure.low is None or figure.high is None:
        return "undecided"
    if margin.at_least <= figure.low and figure.high <= margin.at_most:
        return "pass"
    if figure.high < margin.at_least or figure.low > margin.at_most:
        return "fail"
    return "undecided"


# ----------------------------------------------------------------------------------------- table
