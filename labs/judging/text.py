"""Figures and names as text."""

from __future__ import annotations

from labs.judging.judge import Interval
from labs.lab import Lab


def number(value: float | None, unit: str = "1") -> str:
    """Three digits that matter, times in ms; a figure that is not there is a dash, never 0."""
    if value is None:
        return "–"
    if unit == "s" and abs(value) < 0.9995:
        return f"{_three_digits(1000 * value)} ms"
    return _three_digits(value) if unit in ("1", "USD") else f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def times(ratio: Interval) -> str:
    """With its interval, where more than one repeat gave one."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}x (of one repeat)"
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def yes(held: bool | None) -> str:
    return {True: "yes", False: "no", None: "–"}[held]


def short(key: str, lab: Lab) -> str:
    """A point's name without the parts that never vary in this lab."""
    variant, workload, load = key.split("/")
    parts = [load.replace("-", " ")]
    if len(lab.workloads) > 1:
        parts.insert(0, workload)
    if len(lab.variants) > 1:
        parts.insert(0, variant)
    return " ".join(parts)
