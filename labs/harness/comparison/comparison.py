"""A comparison as plain data: figures and verdicts of two sides, and what became of them.

A `Comparison` is of two runs, variants or machines; a `Reproduction` is that of a run and its
repetition, as it is filed with the original.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, Field, computed_field

from labs.harness.analysis.machine_speed import Part
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.verdicts import Caveat, Contrast, Interval
from labs.harness.spec.lab import MARGIN
from labs.harness.storage.manifest import Fact
from serving.hardware.machine import Machine

NO_VERDICT = ("not valid", "missing")
UNDECIDED = ("inconclusive", *NO_VERDICT)

Outcome = Literal["same", "differs", "undecided", "not comparable"]
Answer = Literal["reproduced", "not reproduced", "undecided", "not comparable"]
ANSWER_OF_OUTCOME: dict[Outcome, Answer] = {
    "same": "reproduced",
    "differs": "not reproduced",
    "undecided": "undecided",
    "not comparable": "not comparable",
}
EXIT_CODES: dict[Answer, int] = {"reproduced": 0, "not reproduced": 1, "undecided": 2}
NOTHING = "nothing to reproduce"


def counted_outcomes(found: Iterable[str], kinds: Iterable[str]) -> str:
    """Count the outcomes of each kind: `3 reproduced, 1 undecided`."""
    count = Counter(found)
    return ", ".join(f"{count[kind]} {kind}" for kind in kinds if count[kind])


def title_of(figure: str) -> str:
    """Write a figure with the metric's title for its name."""
    *of, metric = figure.split()
    return " ".join([*of, METRICS[metric].title])


class ComparedFigure(BaseModel, frozen=True, extra="forbid"):
    """Holds one figure of both sides, and what their ratio shows."""

    figure: str  # a metric, or `effect of <claim>`, or `measured / predicted <metric>`
    where: str
    unit: str
    better: Literal["higher", "lower"]
    a: float | None  # mean over repeats
    b: float | None
    margin: float = MARGIN  # within which share of 1 the two are the same
    contrast: Contrast | None  # B / A
    p_of_difference: Annotated[float | None, Field(exclude_if=lambda p: p is None)] = None
    """The p-value of the means being equal, where repeats of 0 leave no ratio."""
    outcome: Outcome
    why: str = ""

    @property
    def kind(self) -> str:
        """Return `metric`, `effect` (of a claim) or `measured` (over predicted)."""
        return "metric" if self.figure in METRICS else self.figure.split()[0]

    @property
    def metric(self) -> str:
        """Return the metric that the figure is, or is a ratio of."""
        return self.figure.split()[-1]

    @property
    def title(self) -> str:
        """Return the figure with the metric's title for its name: `effect on TTFT, p50`."""
        return title_of(self.figure)

    @property
    def worse_by(self) -> float | None:
        """Return the share by which B is worse than A; negative where it is better.

        Without a ratio it is by the means, and infinite where one of them is 0 and B is worse.
        """
        a, b = (1.0, self.contrast.ratio.value) if self.contrast else (self.a, self.b)
        if a is None or b is None:
            return None
        large, small = (a, b) if self.better == "higher" else (b, a)
        if not small:
            return math.inf if large else 0.0
        return large / small - 1


class VerdictPair(BaseModel, frozen=True, extra="forbid"):
    """Holds a claim's verdict on both sides."""

    claim: str
    title: str
    where: str
    a: str
    b: str
    a_ratio: Interval | None = None  # treatment / baseline
    b_ratio: Interval | None = None

    @property
    def answer(self) -> Answer:
        """Return what became of the original's verdict, where B repeats A."""
        return ANSWER_OF_OUTCOME[self.outcome]

    @property
    def contains_original(self) -> bool:
        """Tell whether B's interval contains A's ratio."""
        a, b = self.a_ratio, self.b_ratio
        if a is None or b is None or b.low is None or b.high is None:
            return False
        return b.low <= a.value <= b.high

    @property
    def flips(self) -> bool:
        """Tell whether both sides decided, and differently."""
        return self.a != self.b and self.a not in UNDECIDED and self.b not in UNDECIDED

    @property
    def outcome(self) -> Outcome:
        """Tell whether B shows A's verdict.

        They are the same where both decided alike. They differ where B's ratio is shown to be
        another, as the two intervals have nothing in common. Where A decided nothing there is
        nothing to compare; all else is undecided, as is a ratio of B that is not valid.
        """
        if self.a in UNDECIDED:
            return "not comparable"
        if self.a == self.b:
            return "same"
        if self.b in NO_VERDICT:
            return "undecided"
        return "differs" if _are_disjoint(self.a_ratio, self.b_ratio) else "undecided"


def _are_disjoint(a: Interval | None, b: Interval | None) -> bool:
    """Tell whether two intervals have nothing in common; one that is not known may reach any."""
    if not a or not b or None in (a.low, a.high, b.low, b.high):
        return False
    return (a.high or 0) < (b.low or 0) or (b.high or 0) < (a.low or 0)


class MachineProperty(BaseModel, frozen=True, extra="forbid"):
    """Holds a share of a machine's own limits that an engine reached: its range over the points."""

    figure: str  # as in `ComparedFigure`
    points: int
    a: tuple[float, float]  # least and largest
    b: tuple[float, float]

    @property
    def title(self) -> str:
        """Return the figure with the metric's title for its name."""
        return title_of(self.figure)


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """Holds the comparison of B with A on one lab."""

    a: str
    b: str
    lab: str
    same_hardware: bool
    paired: bool
    forced: str = ""  # why they are not comparable, where the reader insisted
    in_part: str = ""  # what of both is compared, where one is a quick run and the other is not
    rows: list[ComparedFigure]  # effects of claims, whose sides are among the others, come first
    of_machines: list[MachineProperty] = []  # of other hardware
    left_out: int  # absolute figures, of other hardware
    verdicts: list[VerdictPair]
    caveats: dict[str, list[Caveat]]  # side -> what is wrong with it
    speeds: dict[Part, float] | None = None  # of B's machine / A's, where both timed it
    facts: list[Fact] = Field(default=[], exclude=True)  # of both manifests, likeliest cause first
    differences: list[Fact]  # among them
    unrecorded: list[str]
    loads: dict[str, str] = Field(default={}, exclude=True)  # name -> in words

    @property
    def figure_counts(self) -> str:
        """Count what became of the figures: `3 same, 1 differs`."""
        left_out: list[Outcome] = ["not comparable"] * self.left_out
        return counted_outcomes([*(r.outcome for r in self.rows), *left_out], ANSWER_OF_OUTCOME)


class ReproducedFigure(BaseModel, frozen=True):
    """Says how one figure of the original came out in the repetition.

    What follows from other fields is in the file for its readers, and is passed over when it is
    read again.
    """

    row: ComparedFigure

    @computed_field  # type: ignore[prop-decorator]
    @property
    def answer(self) -> Answer:
        """Return what became of the figure."""
        return ANSWER_OF_OUTCOME[self.row.outcome]


class Repetition(BaseModel, frozen=True, extra="forbid"):
    """Describes the run that repeated another."""

    run: str
    started_at: str
    machine: Machine
    model: str
    vllm: str | None
    git_commit: str | None
    git_dirty: bool | None


class Reproduction(BaseModel, frozen=True):
    """Holds the comparison of a run (A) with its repetition (B); read as `ReproducedFigure` is."""

    original: str
    by: Repetition
    remark: str = ""  # written by hand, where it is filed: what was measured of a disagreement
    verdicts: list[VerdictPair]
    answers: list[ReproducedFigure]
    of_machines: list[MachineProperty] = []  # of other hardware
    not_comparable: int  # figures with a dimension, of other hardware
    likeliest_cause: str  # of what differs
    caveats: dict[str, list[Caveat]]
    differences: list[Fact]
    unrecorded: list[str]
    same_hardware: bool
    speeds: dict[Part, float] | None = None  # of this machine / the original's, where both timed it

    @computed_field  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Answer:
        """Answer for the run as a whole: reproduced where every verdict of the original is."""
        answers = {ANSWER_OF_OUTCOME[v.outcome] for v in self.verdicts} - {"not comparable"}
        if "not reproduced" in answers:
            return "not reproduced"
        return "reproduced" if answers == {"reproduced"} else "undecided"

    @property
    def exit_code(self) -> int:
        """Return 0, 1 or 2: reproduced, not reproduced, undecided."""
        return EXIT_CODES[self.outcome]

    @property
    def apart(self) -> list[ComparedFigure]:
        """Return the figures that were not reproduced, or are undecided."""
        return [a.row for a in self.answers if a.answer != "reproduced"]

    @property
    def figure_counts(self) -> str:
        """Count what became of the original's figures, those that are not comparable last."""
        left_out: list[Answer] = ["not comparable"] * self.not_comparable
        answers = [a.answer for a in self.answers]
        return counted_outcomes([*answers, *left_out], ANSWER_OF_OUTCOME.values())

    @property
    def verdict_counts(self) -> str:
        """Count what became of the original's verdicts: `3 reproduced, 1 undecided`."""
        answers = (ANSWER_OF_OUTCOME[v.outcome] for v in self.verdicts)
        return counted_outcomes(answers, EXIT_CODES) or NOTHING

    @property
    def day(self) -> str:
        """Return the date on which the repetition started."""
        return self.by.started_at[:10]
