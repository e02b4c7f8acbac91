"""Find the parts of a report that belong to one lab, by the name of the lab.

`labs/<lab>/facts.py` computes numbers: its function `facts` returns one frozen dataclass of them,
which the page says and `plots.py` draws. It may also choose points, as `ReportParts` names them. A
lab without such a file has a report all the same: its claims, points, forecasts and validity.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, Generic, get_type_hints

from pydantic import TypeAdapter

from labs.harness.facts.context import Context, Facts, JudgedRun
from labs.harness.facts.published import Part, Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.page import ANSWERS, FINDINGS, HEADLINE, folder_of, page_of
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
OwnPlot = Callable[[JudgedRun, Any], bool]
"""Draws the current figure from a run and its lab's facts; False where there is nothing to draw."""


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


FROM_FACTS = ("facts", "over_time", "watched", "on_two")  # functions that `facts.py` may have


@dataclass(frozen=True)
class ReportParts:
    """Lists what a lab adds to its report, each part by its name or its question's id."""

    facts: Callable[[JudgedRun], Any] | None = None  # beyond its claims, as one dataclass

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
    if page := page_of(lab):
        module = _module_of(lab, "facts")
        headline = page[HEADLINE].named
        return ReportParts(
            **{name: getattr(module, name) for name in FROM_FACTS if hasattr(module, name)},
            kinds={id: part.title for id, part in page[ANSWERS].parts.items() if part.title},
            published=_published(lab),
            headline=Headline(
                headline["claim"],
                headline["done"],
                headline["figure"],
                headline.get("front page") != "no",
            )
            if headline
            else None,
        )
    folder = folder_of(lab)
    if not (folder / "facts.py").exists():
        return ReportParts()
    name = f"labs.{folder.name}.facts"
    parts = importlib.import_module(name).PARTS
    if not isinstance(parts, ReportParts):
        raise TypeError(f"{name}.PARTS is no ReportParts")
    return parts


def findings_of(lab: str) -> Collection[str]:
    """Returns the names of the findings that a lab may have."""
    page = page_of(lab)
    return page[FINDINGS].parts.keys() if page else parts_of(lab).findings.keys()


def _module_of(lab: str, name: str) -> ModuleType | None:
    """Imports a file of a lab's folder; None where it has no such file."""
    folder = folder_of(lab)
    if not (folder / f"{name}.py").exists():
        return None
    return importlib.import_module(f"labs.{folder.name}.{name}")


def _published(lab: str) -> PublishedFigures:
    path = folder_of(lab) / "published.toml"
    if not path.exists():
        return {}
    return TypeAdapter(PublishedFigures).validate_python(tomllib.loads(path.read_text()))


def own_plots(lab: str) -> Mapping[str, OwnPlot]:
    """Imports the plots of a lab's folder, and with them the library that draws."""
    plots: Mapping[str, OwnPlot] = getattr(_module_of(lab, "plots"), "PLOTS", {})
    return plots


def plain(lab: str, facts: Any) -> dict[str, Any]:
    """Returns the facts of a lab as plain JSON, as a summary keeps them."""
    return (
        _adapter(lab).dump_python(facts, mode="json", exclude_defaults=True)
        if facts is not None
        else {}
    )


def kept(lab: str, of_summary: Mapping[str, Any]) -> Any:
    """Returns the facts that a summary keeps as the lab's dataclass; None where it keeps none.

    Raises ValueError where they are those of another version of the lab.
    """
    return _adapter(lab).validate_python(of_summary) if of_summary else None


@cache
def _adapter(lab: str) -> TypeAdapter[Any]:
    compute = parts_of(lab).facts
    of: Any = get_type_hints(compute)["return"] if compute else None
    return TypeAdapter(of)


def answers(run: JudgedRun) -> dict[str, str]:
    """Returns, by question id, the answers that this run can give, of a lab without a page."""
    functions = parts_of(run.lab.name).answers
    texts = {id: functions[id](run) for id in run.lab.answers if id in functions}
    return {id: text for id, text in texts.items() if text}


def published_of(lab: str, part: Part, name: str) -> Sequence[Published]:
    """Returns what others published of a claim, a forecast or a finding of the lab."""
    return parts_of(lab).published.get(part, {}).get(name, ())
