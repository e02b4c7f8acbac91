"""Find the parts of a report that belong to one lab, by the name of the lab.

`labs/<lab>/facts.py` computes numbers: its function `facts` returns one frozen dataclass of them,
which the page says and `plots.py` draws. It may also choose points, as `ReportParts` names them. A
lab without such a file has a report all the same: its claims, points, forecasts and validity.
"""

from __future__ import annotations

import contextlib
import importlib
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from labs.harness.analysis.diagnosis import Reading
from labs.harness.analysis.probes import COMMON_PROBES, Probe
from labs.harness.derived.published import Part, Published, PublishedFigures
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Point
from labs.harness.spec.page import ANSWERS, FINDINGS, HEADLINE, folder_of, page_of
from loadtests.arrivals import Day
from serving.simulator.fleet import Scaling

COMMON_PLOTS = frozenset(("effects", "sweep", "pareto", "roofline", "variants"))
"""Plots that any lab may name; `labs.harness.reports.plots` draws them."""
OwnPlot = Callable[[JudgedRun, Any], bool]
"""Draws the current figure from a run and its lab's facts; False where there is nothing to draw."""


@dataclass(frozen=True)
class Headline:
    """Says in plain words what one claim of a lab is about, for the front page."""

    claim: str
    done: str  # by the treatment, whatever came of it
    figure: str  # that it multiplied
    on_front_page: bool = True  # of the repository; a lesson of the course asks for every one


@dataclass(frozen=True)
class Pair:
    """Asks how a point's load would go on two engines of its kind; see `OnTwoEngines`."""

    point: Point
    link_gbit_per_s: float | None


@dataclass(frozen=True)
class AskedDay:
    """Asks how a day of a point's requests would go on a number of its engines; see `ScaledDay`."""

    name: str
    point: Point
    day: Day  # in multiples of the capacity of one engine
    length_s: float
    most: int  # engines
    scaling: Scaling


@dataclass(frozen=True)
class BlindTrial:
    """A trial whose cause a reader of the course names, from what the engine counted."""

    cause: str
    now: Reading
    healthy: Reading  # of the same service
    foretold: Mapping[Any, str]  # a figure -> where it goes with this cause, by prediction


@dataclass(frozen=True)
class Injections:
    """What a lab can make go wrong, each cause at a point of its own: a variant and a workload."""

    causes: Mapping[tuple[str, str], str]  # a point -> what is wrong there
    reference: tuple[str, str]  # the point at which nothing is
    foretold: Mapping[str, Mapping[Any, str]]  # a cause -> a figure -> where it goes with it


FROM_FACTS = (  # in a `facts.py`
    "facts", "over_time", "watched", "on_two", "days", "blind", "injections",
)  # fmt: skip


@dataclass(frozen=True)
class ReportParts:
    """Lists what a lab adds to its report, each part by its name or its question's id."""

    facts: Callable[[JudgedRun], Any] | None = None  # beyond its claims, as one dataclass
    # by the question's id, where not all of an answer is measured: what kind of answer it is
    kinds: Mapping[str, str] = field(default_factory=dict)
    # of all points, those whose forecast its plots show over time beside the measured trial
    over_time: Callable[[Sequence[Point]], Sequence[Point]] = lambda _: ()
    # those whose signals are watched, in a forecast as in a trial
    watched: Callable[[Sequence[Point]], Sequence[Point]] = lambda _: ()
    # what is forecast on two engines, which no run has, of the points that have a forecast
    on_two: Callable[[Sequence[Point]], Sequence[Pair]] = lambda _: ()
    # days that are forecast on a number of engines that follows the load
    days: Callable[[Sequence[Point]], Sequence[AskedDay]] = lambda _: ()
    # the trials whose cause is to be named
    blind: Callable[[Context], Sequence[BlindTrial]] = lambda _: ()
    injections: Injections | None = None
    published: PublishedFigures = field(default_factory=dict)
    headline: Headline | None = None


@cache
def parts_of(lab: str) -> ReportParts:
    """Imports the parts of the lab of that name; none where it has no page here."""
    if (page := page_of(lab)) is None:
        return ReportParts()
    module = _module_of(lab, "facts")
    return ReportParts(
        **{name: getattr(module, name) for name in FROM_FACTS if hasattr(module, name)},
        kinds={id: part.title for id, part in page[ANSWERS].parts.items() if part.title},
        published=_published(lab),
        headline=_headline(page[HEADLINE].named),
    )


def _headline(said: Mapping[str, str]) -> Headline | None:
    if not said:
        return None
    return Headline(said["claim"], said["done"], said["figure"], said.get("front page") != "no")


def findings_of(lab: str) -> Collection[str]:
    """Returns the names of the findings that a lab may have."""
    page = page_of(lab)
    return page[FINDINGS].parts.keys() if page else ()


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


def plot_names(lab: str) -> Collection[str]:
    """Returns the names of the plots that a lab may name. Imports matplotlib, in half a second."""
    return COMMON_PLOTS | own_plots(lab).keys()


def probes_of(lab: str) -> Mapping[str, Probe]:
    """Imports the probes that a lab may name, by their names: those of its folder, and common ones.

    A short form has `-quick` behind the name of its probe.
    """
    own: Mapping[str, Probe] = getattr(_module_of(lab, "probes"), "PROBES", {})
    return {**COMMON_PROBES, **own}


def before_engines(lab: str) -> Callable[..., None]:
    """Imports what a lab has timed once in a run, before its engines start; else what does nothing.

    It takes the run's set-up, its folder and the display of its progress.
    """
    of_lab: Callable[..., None] | None = getattr(_module_of(lab, "probes"), "before_engines", None)
    return of_lab or (lambda *_: None)


def plain(lab: str, facts: Any) -> dict[str, Any]:
    """Returns the facts of a lab as plain JSON, as a summary keeps them."""
    kept: dict[str, Any] = _adapter(lab).dump_python(facts, mode="json", exclude_defaults=True)
    return kept


def kept(lab: str, of_summary: Mapping[str, Any]) -> Any:
    """Returns the facts that a summary keeps as the lab's dataclass.

    None where it keeps none, or those of another version of the lab.
    """
    with contextlib.suppress(ValidationError):
        return _adapter(lab).validate_python(of_summary) if of_summary else None


@cache
def _adapter(lab: str) -> TypeAdapter[Any]:
    compute = parts_of(lab).facts
    of: Any = get_type_hints(compute)["return"] if compute else None
    return TypeAdapter(of)


def published_of(lab: str, part: Part, name: str) -> Sequence[Published]:
    """Returns what others published of a claim, a forecast or a finding of the lab."""
    return parts_of(lab).published.get(part, {}).get(name, ())
