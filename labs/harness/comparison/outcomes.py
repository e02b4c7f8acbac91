"""Decide whether a figure of two sides differs or is the same.

With dozens of figures some intervals exclude 1 by chance, so a figure *differs* only where it still
does when the rate of false discoveries over all of them is held at 5% (Benjamini and Hochberg
1995). It differs, or is the same, by one margin: the claim's for what a claim compares, the default
one for the others. Where a figure is 0 in some repeats there is no ratio, and the difference of the
means decides, by Welch's test.
"""

from __future__ import annotations

from collections.abc import Sequence

import scipy

from labs.harness.analysis.verdicts import CONFIDENCE, Interval, Judgement, is_within, welchs_test
from labs.harness.comparison.comparison import ComparedFigure, Outcome
from labs.harness.spec.lab import MARGIN

SOME_ZEROS = "zero in some repeats"

Column = dict[int, float]  # repeat -> value


def p_of_difference(a: Column, b: Column) -> float | None:
    """Return Welch's p-value of the means being equal; None where a side has a single repeat."""
    if min(len(a), len(b)) < 2:
        return None
    return float(welchs_test(list(a.values()), list(b.values())).pvalue)


def without_ratio(a: Column, b: Column) -> tuple[Outcome, str]:
    """Decide where a figure is missing or zero, so that there is no ratio."""
    if not a or not b:
        return "not comparable", f"missing in {'A' if not a else 'B'}"
    if all(v > 0 for v in (*a.values(), *b.values())):
        return "undecided", ""
    if a == b:
        return "same", "zero in the same repeats"
    if any(all(x.values()) and not any(y.values()) for x, y in ((a, b), (b, a))):
        return "differs", "zero on one side"
    return "undecided", SOME_ZEROS


def of_claims(
    rows: Sequence[ComparedFigure], judgements: Sequence[Judgement]
) -> list[ComparedFigure]:
    """Give each effect the margin of its claim; of several claims, the least."""
    margins: dict[tuple[str, str], float] = {}
    for j in judgements:
        key = (f"effect on {j.metric}", j.where)
        margins[key] = min(j.margin, margins.get(key, j.margin))
    return [
        row.model_copy(update={"margin": margins.get((row.figure, row.where), row.margin)})
        for row in rows
    ]


def judged(rows: Sequence[ComparedFigure]) -> list[ComparedFigure]:
    """Decide each row that chance may explain: the rate of false discoveries over all is bounded.

    The others are decided already.
    """
    ps = [p for row in rows if (p := _p_of(row)) is not None]
    adjusted = iter(scipy.stats.false_discovery_control(ps) if ps else ())
    return [row if _p_of(row) is None else _judged(row, float(next(adjusted))) for row in rows]


def _p_of(row: ComparedFigure) -> float | None:
    return row.contrast.p if row.contrast else row.p_of_difference


def _judged(row: ComparedFigure, p: float) -> ComparedFigure:
    """Decide a row by its p-value, adjusted for the number of figures."""
    if row.contrast:
        outcome, why = _by_ratio(row.contrast.ratio, p, row.margin)
    else:
        beyond = not (row.a and row.b and is_within(row.b / row.a, row.margin))
        outcome, why = "differs" if beyond and p < 1 - CONFIDENCE else "undecided", row.why
    return row.model_copy(update={"outcome": outcome, "why": why})


def _by_ratio(ratio: Interval, p: float, margin: float) -> tuple[Outcome, str]:
    """Decide by a ratio's interval, and say why."""
    assert ratio.low is not None
    assert ratio.high is not None
    same, undecided = usual_reasons(margin)
    if is_within(ratio.low, margin) and is_within(ratio.high, margin):
        return "same", same
    beyond = not is_within(ratio.value, margin)
    if beyond and p < 1 - CONFIDENCE:
        return "differs", ""
    if beyond and not ratio.low <= 1 <= ratio.high:
        return "undecided", "may be chance among so many figures"
    return "undecided", undecided


def usual_reasons(margin: float = MARGIN) -> tuple[str, str]:
    """Say why figures are the same, and why they mostly are undecided."""
    within = f"{100 * margin:g}%"
    return f"within {within}", f"the interval reaches beyond {within}"
