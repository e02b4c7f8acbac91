"""Find the parts of a report that belong to one lab, by the name of the lab.

`labs/<lab>/facts.py` holds them as one literal, `PARTS`. A lab without such a file has a report
all the same: its claims, points, forecasts and validity, with every question left unanswered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic

from labs import folder_of
from labs.harness.facts.context import Context, Facts, JudgedRun
from labs.harness.facts.published import Part, Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.spec import Point


@dataclass(frozen=True)
class Conclusion(Generic[Facts]):
    """Concludes beyond a lab's claims: it reads facts of a run and writes a finding of them.

    `facts` reads the run's files alone; `tell` makes a table and sentences of the facts alone.
    Answers to questions read the same facts.
    """

    name: str  # as in `Lab.findings`
    facts: Callable[[Context], Facts]
    tell: Callable[[Facts], Finding]
    draw: Callable[[Facts], str | None] | None = None  # its own plot, as `Draw` does of a run

    def finding(self, context: Context) -> Finding:
        return self.tell(context.once(self.facts))

    def drawing(self, run: JudgedRun) -> str | None:
        """Draws the current figure of the facts and returns its caption, as `Draw` does."""
        return self.draw(run.once(self.facts)) if self.draw else None

    def facts_of(self, run: Context) -> Facts | None:
        """Returns the facts of a run; None where it leaves this out, as random weights may."""
        return run.once(self.facts) if self.name in run.lab.findings else None


Answer = Callable[[JudgedRun], str | None]
"""Writes a sentence or two with the run's own figures; None where it lacks them."""
Draw = Callable[[JudgedRun], str | None]
"""Draws the current figure and returns its caption; None where there is nothing to draw."""


@dataclass(frozen=True)
class Headline:
    """Says in plain words what one claim of a lab is about, for the front page."""

    claim: str
    done: str  # by the treatment, whatever came of it
    figure: str  # that it multiplied
    on_front_page: bool = True  # of the repository; a lesson of the course asks for every one


ARITHMETIC = "arithmetic on measured figures"
IN_PART = "measured in part, else arithmetic"
IN_PART_FORECAST = "measured in part, else arithmetic and forecast"


@dataclass(frozen=True)
class Pair:
    """Asks how a point's load would go on two engines of its kind; see `OnTwoEngines`."""

    point: Point
    link_gbit_per_s: float | None


@dataclass(frozen=True)
class ReportParts:
    """Lists what a lab adds to its report, each part by its name or its question's id."""

    conclusions: Sequence[Conclusion[Any]] = ()
    answers: Mapping[str, Answer] = field(default_factory=dict)  # by the question's id
    # by the question's id too, where not all of an answer is measured: what kind of answer it is
    kinds: Mapping[str, str] = field(default_factory=dict)
    plots: Mapping[str, Draw] = field(default_factory=dict)
    # of all points, those whose forecast its plots show over time beside the measured trial
    over_time: Callable[[Sequence[Point]], Sequence[Point]] = lambda _: ()
    # those whose signals are watched, in a forecast as in a trial
    watched: Callable[[Sequence[Point]], Sequence[Point]] = lambda _: ()
    # what is forecast on two engines, which no run has, of the points that have a forecast
    on_two: Callable[[Sequence[Point]], Sequence[Pair]] = lambda _: ()
    published: PublishedFigures = field(default_factory=dict)
    headline: Headline | None = None

    @property
    def findings(self) -> dict[str, Conclusion[Any]]:
        return {conclusion.name: conclusion for conclusion in self.conclusions}


@cache
def parts_of(lab: str) -> ReportParts:
    """Imports the parts of the lab of that name; none where it has no file of findings."""
    folder = folder_of(lab)
    if not (folder / "facts.py").exists():
        return ReportParts()
    name = f"labs.{folder.name}.facts"
    parts = importlib.import_module(name).PARTS
    if not isinstance(parts, ReportParts):
        raise TypeError(f"{name}.PARTS is no ReportParts")
    return parts


def answers(run: JudgedRun) -> dict[str, str]:
    """Returns, by question id, the answers that this run can give."""
    functions = parts_of(run.lab.name).answers
    texts = {id: functions[id](run) for id in run.lab.answers if id in functions}
    return {id: text for id, text in texts.items() if text}


def published_of(lab: str, part: Part, name: str) -> Sequence[Published]:
    """Returns what others published of a claim, a forecast or a finding of the lab."""
    return parts_of(lab).published.get(part, {}).get(name, ())
