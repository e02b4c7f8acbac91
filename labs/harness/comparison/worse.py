"""Is anything worse in a run (B) than in its baseline (A), as after an upgrade?

It is when a claim's verdict flips, when a figure is worse beyond chance and beyond a stated margin,
when something of the baseline is missing, and when the run is not complete; what decides nothing
fails as well. The margins come from a TOML file (`comparison/thresholds.toml` is the default and
says what each line means).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, NonNegativeFloat, ValidationError

from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import times_with_interval
from labs.harness.comparison.comparison import NO_VERDICT, UNDECIDED, ComparedFigure, Comparison
from labs.harness.comparison.sides import NOT_COMPLETE
from labs.harness.spec.lab import LabError

DEFAULT = Path(__file__).with_name("thresholds.toml")


class Verdicts(BaseModel, frozen=True, extra="forbid"):
    """Says whether an undecided claim, or a missing figure, fails."""

    undecided_fails: bool = False
    missing_fails: bool = True


class Thresholds(BaseModel, frozen=True, extra="forbid"):
    """Holds the limits: by which share each figure may get worse."""

    worse: dict[str, NonNegativeFloat]
    verdicts: Verdicts = Verdicts()

    def of(self, row: ComparedFigure) -> float:
        """Return the share by which this figure may get worse."""
        return self.worse.get(
            row.metric if row.kind == "metric" else row.kind, self.worse["default"]
        )


def thresholds(path: Path = DEFAULT) -> Thresholds:
    """Read the limits from a TOML file. Raises LabError with what is wrong in it."""
    try:
        limits = Thresholds.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise LabError(f"{path} is not a file of thresholds: {reason}") from error
    known = {*METRICS, "default", "effect", "measured"}
    if unknown := sorted(set(limits.worse) - known):
        raise LabError(
            f"{path} names unknown figures: {', '.join(unknown)};"
            " see labs/harness/comparison/thresholds.toml"
        )
    if "default" not in limits.worse:
        raise LabError(
            f"{path} has no `default` under [worse]: give one, as"
            " labs/harness/comparison/thresholds.toml"
        )
    return limits


def failures(comparison: Comparison, limits: Thresholds) -> list[str]:
    """List what is worse in the run (B) than in its baseline (A) allows; empty when it passes.

    Where nothing is worse because the two decide nothing, that fails.
    """
    rows = [r for r in comparison.rows if r.kind != "effect" or not comparison.same_hardware]
    failed = _incomplete(comparison)
    if comparison.forced:
        failed.append(f"not comparable: {comparison.forced}")
    if comparison.in_part:
        failed.append(f"not all is compared: {comparison.in_part}")
    for v in comparison.verdicts:
        lost = v.b in NO_VERDICT and v.a not in NO_VERDICT
        open_ = v.b == "inconclusive" and v.a not in UNDECIDED
        if v.flips or lost or (open_ and limits.verdicts.undecided_fails):
            failed.append(f"{v.title} ({v.where}): {v.a} in the baseline, {v.b} now")
    for row in rows:
        what = f"{row.title} at {row.where}"
        if row.b is None:  # a percentile is missing where few samples came, which chance decides
            if limits.verdicts.missing_fails and METRICS[row.metric].statistic.q is None:
                failed.append(f"{what}: missing now")
        elif _fails(row, limits.of(row)):
            failed.append(f"{what}: {_worse(row, limits.of(row))}")
    return failed or _undecided(comparison, rows)


def _undecided(comparison: Comparison, rows: Sequence[ComparedFigure]) -> list[str]:
    """Say why no figure is shown to differ or to be the same; nothing where one is."""
    tested = [row for row in rows if row.contrast or row.p_of_difference is not None]
    if any(row.outcome in ("same", "differs") for row in tested):
        return []
    names = f"{comparison.a} and {comparison.b}"
    if tested:
        return [
            f"the intervals of {names} are too wide to tell whether any figure differs or is the"
            " same, so nothing is decided: measure more repeats, without QUICK"
        ]
    only = "" if comparison.same_hardware else " (of other hardware only ratios are compared)"
    return [
        f"{names} have no figure in common to compare{only}, so nothing is decided: give a"
        " baseline of the same lab, from the same hardware"
    ]


def _incomplete(comparison: Comparison) -> list[str]:
    """Say what is missing of the run, where its baseline is complete.

    The repeats that are left may be as good as the baseline's.
    """
    of_a, of_b = (
        [c.text for c in comparison.caveats[side] if c.name == NOT_COMPLETE] for side in ("A", "B")
    )
    return [f"{comparison.b} is not complete: {text}" for text in of_b if not of_a]


def _fails(row: ComparedFigure, limit: float) -> bool:
    """Tell whether a figure is worse, beyond chance, by more than its limit.

    For a mean error rate above its limit, which in the baseline was not, it takes no test: what
    must not happen needs to be seen only once.
    """
    known = row.a is not None and row.b is not None
    if row.figure == "error_rate" and known and (row.a or 0) <= limit < (row.b or 0):
        return True
    return row.outcome == "differs" and (row.worse_by or 0) > limit


def _worse(row: ComparedFigure, limit: float) -> str:
    if row.contrast is None:
        return f"{row.a:.3g} in the baseline, {row.b:.3g} now"
    ratio = times_with_interval(row.contrast.ratio)
    return f"worse by {row.worse_by:.0%}, {limit:.0%} allowed: {ratio}"
