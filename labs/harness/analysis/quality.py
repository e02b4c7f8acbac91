"""Compares the quality of two engines in pairs, as after quantization, and sets a gate on it.

* *Perplexity* on held-out prose, exp(mean negative log-likelihood a token) (Jelinek et al. 1977).
* *Top-1 agreement*: the share of positions at which both put the same token first.
* *KL(baseline || treatment)* a token, over the ids known of both (top-K and the actual token) and
  one bucket for the rest: a lower bound on the full divergence, by the data-processing inequality.
* *Needle retrieval*: a number hidden at a depth of a filler text (Kamradt 2023), five keys in one
  text and one asked for, so that the wrong numbers distract (RULER, Hsieh et al. 2024).
* *Task accuracy*: short few-shot questions, scored by exact match.

A baseline compared with its own second evaluation shows the false alarms: what batching alone
changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import scipy
from pydantic import BaseModel

from labs.harness.analysis.evaluation import Evaluation, ScoredCompletion
from labs.harness.analysis.verdicts import CONFIDENCE, Interval, share

LEAST_REST = 1e-6  # logprobs have 5 decimals: a smaller probability of the rest is rounding error

QualityUnit = Literal["1", "nat/token"]
GateResult = Literal["pass", "fail", "undecided"]


class QualityFigure(BaseModel, frozen=True, extra="forbid"):
    """A figure of quality with its 95% interval.

    `n` counts tokens or questions; `p_value` is that of McNemar's test, where one was made.
    """

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
    """Compute every figure; differences are treatment - baseline, so that a loss is negative.

    McNemar's test assumes that the needles of one text are independent, which holds only roughly.
    Raises ValueError where the two sides were not asked the same.
    """
    pairs = list(zip(baseline.passages, treatment.passages, strict=True))
    if any(a.token_ids != b.token_ids for a, b in pairs):
        raise ValueError("the passages differ: not the same texts or not the same tokenizer")
    levels = {"baseline": baseline, "treatment": treatment}
    figures = [
        _figure("perplexity", [[-v for v in p.logprobs] for p in side.passages], where, math.exp)
        for where, side in levels.items()
    ]
    losses = [[x - y for x, y in zip(a.logprobs, b.logprobs, strict=True)] for a, b in pairs]
    logprobs = [list(zip(a.known, b.known, strict=True)) for a, b in pairs]
    agreement = [[float(_first(x) == _first(y)) for x, y in positions] for positions in logprobs]
    kl = [[kl_divergence(x, y) for x, y in positions] for positions in logprobs]
    figures += [
        _figure("perplexity_ratio", losses, transform=math.exp),
        _figure("top1_agreement", agreement),
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
                [r for r in side.needles if getattr(r, field) == part]
                for side in (baseline, treatment)
            )
            figures.append(_difference("needle_retrieval", a, b, title.format(part)))
    return figures


def kl_divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Compute KL(p || q) in nats from logprobs, over the ids that both know and one rest."""
    shared = p.keys() & q.keys()
    logs_p, logs_q = ([side[i] for i in shared] for side in (p, q))
    shares_p = [*map(math.exp, logs_p)]
    rest_p = max(LEAST_REST, 1 - math.fsum(shares_p))
    rest_q = max(LEAST_REST, 1 - math.fsum(map(math.exp, logs_q)))
    terms = [p_i * (a - b) for p_i, a, b in zip(shares_p, logs_p, logs_q, strict=True)]
    return max(0.0, math.fsum([*terms, rest_p * math.log(rest_p / rest_q)]))


def per_token(clusters: Sequence[Sequence[float]]) -> Interval:
    """Compute the mean over tokens, with an interval that treats passages as independent."""
    return over_clusters([math.fsum(c) for c in clusters], [len(c) for c in clusters])


def over_clusters(totals: Sequence[float], sizes: Sequence[int]) -> Interval:
    """Divide the sum of the clusters' totals by the sum of their sizes, which is `n`."""
    return ratio_of_sums(totals, sizes).model_copy(update={"n": sum(sizes)})


def ratio_of_sums(
    totals: Sequence[float], sizes: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """Divide two sums over the same clusters, whose number is `n`.

    The interval is Student's t with the standard error of a ratio of cluster totals (Cochran 1977,
    9.1).
    """
    total, size = np.array(totals, dtype=float), np.array(sizes, dtype=float)
    m, value = len(total), float(total.sum() / size.sum())
    if m < 2:
        return Interval(value=value, low=None, high=None, n=m)
    spread = math.sqrt(float(((total - value * size) ** 2).sum()) * m / (m - 1))
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, m - 1)) * spread / abs(float(size.sum()))
    return Interval(value=value, low=value - half, high=value + half, n=m)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[Interval, float]:
    """Compute the change of the share that is true, and McNemar's exact p (1947) for it.

    The interval is the adjusted Wald interval of Bonett and Price (2012): it keeps its coverage
    where no answer changed, while the plain one has no width there.
    """
    pairs = list(zip(before, after, strict=True))
    n = len(pairs)
    gained, lost = (sum(pair == kind for pair in pairs) for kind in ((False, True), (True, False)))
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(scipy.stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(
        (up + down - (up - down) ** 2) / (n + 2)
    )
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    changed = gained + lost
    p_value = float(scipy.stats.binomtest(lost, changed).pvalue) if changed else 1.0
    return Interval(value=(gained - lost) / n, low=low, high=high, n=n), p_value


def _first(logprobs: Mapping[int, float]) -> int:
    """Return the likeliest id; where BF16 logits tie, the lowest of the tied ids."""
    most = max(logprobs.values())
    return min(token for token, logprob in logprobs.items() if logprob == most)


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
    mean = per_token(clusters).mapped(transform)
    low, high = mean.low, mean.high
    if name == "top1_agreement" and high is not None:
        high = min(1.0, high)
    if name == "kl_divergence" and low is not None:
        low = max(0.0, low)
    return QualityFigure(
        name=name,
        where=where,
        value=mean.value,
        low=low,
        high=high,
        n=mean.n,
        unit=unit,
        source=SOURCES[name],
    )


def _level(name: str, completions: Sequence[ScoredCompletion], where: str) -> QualityFigure:
    correct = share(sum(c.correct for c in completions), len(completions))
    return QualityFigure(name=name, where=where, **correct.model_dump(), source=SOURCES[name])


def _difference(
    name: str,
    before: Sequence[ScoredCompletion],
    after: Sequence[ScoredCompletion],
    where: str = "",
) -> QualityFigure:
    if [(r.question, r.expected) for r in before] != [(r.question, r.expected) for r in after]:
        raise ValueError(f"{name}: the two sides were not asked the same questions")
    difference, p_value = paired_difference([r.correct for r in before], [r.correct for r in after])
    return QualityFigure(
        name=f"{name}_difference",
        where=where,
        **difference.model_dump(),
        source=SOURCES[name],
        p_value=p_value,
    )


# ------------------------------------------------------------------------------------------ gate


class Margin(BaseModel, frozen=True, extra="forbid"):
    """A margin bounds a figure over all texts: the values with which it still passes."""

    figure: str
    at_most: float = math.inf
    at_least: float = -math.inf


MARGINS = (
    Margin(figure="perplexity_ratio", at_most=1.02),
    Margin(figure="needle_retrieval_difference", at_least=-0.05),
    Margin(figure="task_accuracy_difference", at_least=-0.05),
)
"""These margins are a choice, to be replaced by what an application can tolerate.

Five points are about the least that 60 needles can resolve: their interval is ± 4.5 points even
where no answer changed.
"""


class MarginResult(BaseModel, frozen=True, extra="forbid"):
    """Whether a figure keeps its margin."""

    figure: QualityFigure
    margin: Margin
    result: GateResult


def gate(
    figures: Sequence[QualityFigure], margins: Sequence[Margin] = MARGINS
) -> tuple[GateResult, list[MarginResult]]:
    """Test every margin for non-inferiority (Piaggio et al. 2012), and combine the results.

    A margin passes when the whole interval lies within it and fails when the whole interval lies
    outside. The gate passes when all margins pass, fails when one fails, and is undecided
    otherwise.
    """
    overall = {f.name: f for f in figures if not f.where}
    margin_results = [
        MarginResult(
            figure=overall[m.figure], margin=m, result=_margin_result(overall[m.figure], m)
        )
        for m in margins
    ]
    results = {r.result for r in margin_results}
    worst_first: tuple[GateResult, ...] = ("fail", "undecided", "pass")
    return next((r for r in worst_first if r in results), "undecided"), margin_results


def _margin_result(figure: QualityFigure, margin: Margin) -> GateResult:
    if figure.low is None or figure.high is None:
        return "undecided"
    if margin.at_least <= figure.low and figure.high <= margin.at_most:
        return "pass"
    if figure.high < margin.at_least or figure.low > margin.at_most:
        return "fail"
    return "undecided"
