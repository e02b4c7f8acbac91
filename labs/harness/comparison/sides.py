"""A side of a comparison: a run, or a variant of one; what is wrong with it, and what it fits.

Two sides are comparable when they were sent the same load; of a quick run and a full one, the
points that both have.
"""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from labs.harness.analysis.computed import Summary
from labs.harness.analysis.text import counted
from labs.harness.analysis.verdicts import Caveat, ForecastResult, Judgement
from labs.harness.derived.summarize import checked
from labs.harness.spec.lab import LabError, Point
from labs.harness.spec.names import PointName, TrialName
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.recorded import Run, fresh_knobs
from labs.harness.storage.results import RunFolder, open_run, readable
from serving.models.catalog import ROOT
from serving.plugins.guard import HERE

SENT = (  # the knobs of a lab that say what is sent and what is measured of it
    "workloads",
    "requests",
    "warmup_s",
    "window_s",
    "timeout_s",
    "load_processes",
    "seed",
    "slo",
)
SIZES = ("workloads", "requests", "warmup_s", "window_s")  # those that a quick run cuts
SIZES_OF_WORKLOAD = ("loads", "only", "most_requests", "warmup_s")
NOT_COMPLETE = "not complete"
MOST_NAMED = 6  # failed trials


@dataclass(frozen=True)
class Side:
    """Holds one side of a comparison: a run, or one variant of it, or some of their points."""

    folder: RunFolder
    variant: str | None
    run: Run
    summary: Summary
    places: Set[str] | None = None  # of the points that count, as `where` names them; None: all

    @property
    def name(self) -> str:
        path = self.folder.path.resolve()
        text = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else path.name
        return f"{text}:{self.variant}" if self.variant else text

    @property
    def hardware(self) -> str:
        """Name what served: the machine, unless it was another that an endpoint names."""
        endpoint, here = self.run.endpoint, self.run.machine.slug
        if endpoint is None:
            return here
        return f"{endpoint} on {here}" if _is_here(endpoint) else endpoint

    def where(self, point: str) -> str:
        """Return the name of a point, without the variant where variants are compared."""
        name = PointName.parse(point)
        return f"{name.workload}/{name.load}" if self.variant else point

    @property
    def points(self) -> list[Point]:
        own = [p for p in self.run.points() if self.variant in (None, p.variant.name)]
        return [p for p in own if self.places is None or self.where(p.key) in self.places]

    @property
    def judgements(self) -> list[Judgement]:
        """Return the verdicts on its points; of a single variant there are none."""
        keys = {point.key for point in self.points}
        return [
            j
            for j in self.summary.judgements
            if self.variant is None and {j.treatment, j.baseline} <= keys
        ]

    @property
    def forecasts(self) -> list[ForecastResult]:
        """Return the forecasts of its points."""
        keys = {point.key for point in self.points}
        return [f for f in self.summary.forecasts if f.point in keys]


def _is_here(endpoint: str) -> bool:
    """Tell whether an endpoint is on the machine that sent the load, as each means by that name."""
    try:
        return urlsplit(endpoint).hostname in HERE
    except ValueError:
        return False


def read_side(text: str) -> Side:
    """Read a side from `results/<machine>/<lab>/<run>`, or that with `:variant` behind it.

    Its summary is computed from its records again. Raises LabError where it cannot be read, where
    its files contradict each other, and where it has no such variant.
    """
    path, colon, variant = text.rpartition(":") if ":" in Path(text).name else (text, "", "")
    folder = open_run(Path(path))
    try:
        with readable(folder):
            run, summary = folder.run(), checked(folder)
    except (DamagedError, OSError) as error:
        raise LabError(
            f"{path} cannot be used: {error}. Where its records are right, `make report"
            f" RUN={path}` computes the rest again"
        ) from error
    known = [v["name"] for v in run.lab["variants"]]
    if colon and variant not in known:
        raise LabError(f"{path} has no variant {variant!r}; it has {', '.join(known)}")
    return Side(folder, variant or None, run, summary)


def reason_not_comparable(a: Side, b: Side) -> str:
    """Say why the two cannot be compared; empty where they can.

    Raises LabError where a variant is named on one side alone.
    """
    if (a.variant is None) != (b.variant is None):
        raise LabError("name a variant on both sides, run:variant, or on neither")
    lab_a, lab_b = a.run.lab["name"], b.run.lab["name"]
    if lab_a != lab_b:
        return f"they are runs of different labs, {lab_a} and {lab_b}"
    knobs_a, knobs_b = (fresh_knobs(s.run.lab) for s in (a, b))
    # a number that a run chose for its machine is told among what differs in how they were run
    chosen = any(s.run.lab.get("load_processes_chosen") for s in (a, b))
    in_part = a.run.quick != b.run.quick
    passed_over = ("load_processes",) * chosen + SIZES * in_part
    compared = [k for k in SENT if k not in passed_over]
    if differing := [k for k in compared if knobs_a[k] != knobs_b[k]]:
        return f"they were not sent the same load: {', '.join(differing)} differ"
    if in_part and not _places_of_both(a, b):
        return "one is a quick run, and no point of the other was sent the same load"
    return ""


def _places_of_both(a: Side, b: Side) -> set[str]:
    """Name the points that both have, of workloads that are alike but for their sizes."""
    of_a, of_b = (
        {
            workload["name"]: {k: v for k, v in workload.items() if k not in SIZES_OF_WORKLOAD}
            for workload in fresh_knobs(s.run.lab)["workloads"]
        }
        for s in (a, b)
    )
    alike = {name for name, workload in of_a.items() if of_b.get(name) == workload}
    in_a, in_b = ({s.where(p.key) for p in s.points if p.workload.name in alike} for s in (a, b))
    return in_a & in_b


def at_both(a: Side, b: Side) -> tuple[Side, Side, str]:
    """Keep what a quick run and a full one both have, and say what differs in their sizes."""
    places = _places_of_both(a, b)
    kinds = ("quick" if s.run.quick else "full" for s in (a, b))
    (kind_a, kind_b), (of_a, of_b) = kinds, (len(s.points) for s in (a, b))
    sizes = [
        f"{name} {in_a:g} / {in_b:g}"
        for name in ("repeats", "requests", "warmup_s", "window_s")
        if (in_a := a.run.lab[name]) != (in_b := b.run.lab[name])
    ]
    if a.run.scale != b.run.scale:
        sizes.insert(0, f"scale {a.run.scale} / {b.run.scale}")
    text = (
        f"A is a {kind_a} run of {counted(of_a, 'point')}, B a {kind_b} one of {of_b}: compared is"
        f" what both have, at {counted(len(places), 'point')}"
    )
    text = f"{text}; {', '.join(sizes)}" if sizes else text
    return replace(a, places=places), replace(b, places=places), text


def same_requests(a: Side, b: Side) -> bool:
    """Tell whether each repeat sent the same prompts on both sides, so that they can be paired."""
    return a.folder.path == b.folder.path or a.run.prompts_sha256 == b.run.prompts_sha256


def caveats(side: Side) -> list[Caveat]:
    """List what is wrong with a side, or limits what it shows."""
    point_keys = {p.key for p in side.points}
    found = [c for c in side.summary.caveats if c.point is None or c.point in point_keys]
    if text := _what_is_missing(side):
        found.append(Caveat(name=NOT_COMPLETE, text=text))
    if side.run.quick:
        found.append(Caveat(name="quick run", text="few and short repeats: a smoke test"))
    if side.run.dummy:
        found.append(Caveat(name="random weights", text="speed is real, the text is not"))
    return found


def _what_is_missing(side: Side) -> str:
    """Say why a run is not complete, with the names of failed trials; empty where it is."""
    own = {point.key for point in side.points}
    failed = [trial for trial in side.summary.failed if TrialName.parse(trial).point in own]
    missing, parts = 0 if side.variant else side.summary.missing, list[str]()
    if failed:
        named = ", ".join(failed[:MOST_NAMED]) + ", ..." * (len(failed) > MOST_NAMED)
        parts.append(f"{counted(len(failed), 'trial')} failed ({named})")
    if missing:
        parts.append(f"{counted(missing, 'trial')} not played")
    if not parts and not side.folder.complete and not side.variant:
        parts.append("the run has not ended")
    return ", ".join(parts)
