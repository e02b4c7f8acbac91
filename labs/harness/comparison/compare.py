"""Compare two runs, two variants or two machines: what differs, and by how much?

A **figure** is a metric at a point, what a claim compares (the ratio of its two points), or a
forecast's measured share of the predicted. Each has the ratio B / A with a 95% interval: paired by
repeat where both sides sent the same requests, Welch's otherwise. Where a figure is 0 in some
repeats there is no ratio, and the difference of the means decides, by Welch's test. With dozens of
figures some intervals exclude 1 by chance, so a figure *differs* only where it still does when the
rate of false discoveries over all of them is held at 5% (Benjamini and Hochberg 1995). It differs,
or is the same, by one margin: the claim's for what a claim compares, the default one for the
others. Of a quick run and a full one, the points that both have are compared. On other hardware
only dimensionless figures are; MBU, MFU and what was reached of a predicted bound are shares of
each machine's own limits, and are listed as properties of the machines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import scipy

from labs.harness.analysis.computed import Summary
from labs.harness.analysis.machine_speed import Part, relative_speed
from labs.harness.analysis.metrics import METRICS, by_repeat, compared_metrics
from labs.harness.analysis.text import counted
from labs.harness.analysis.verdicts import (
    CONFIDENCE,
    Caveat,
    ForecastResult,
    Interval,
    Judgement,
    contrast,
    is_within,
    mean_interval,
    welchs_test,
)
from labs.harness.comparison.comparison import (
    ComparedFigure,
    Comparison,
    MachineProperty,
    Outcome,
    VerdictPair,
)
from labs.harness.derived.summarize import checked
from labs.harness.spec.lab import MARGIN, LabError, Point
from labs.harness.spec.names import PointName, TrialName
from labs.harness.storage import manifest
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.checks import unreadable
from labs.harness.storage.newest import newest_of
from labs.harness.storage.recorded import Run, fresh_knobs
from labs.harness.storage.results import RunFolder, open_run, readable, runs_of
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
SOME_ZEROS = "zero in some repeats"

Column = dict[int, float]  # repeat -> value
Columns = dict[tuple[str, str], Column]  # (figure, where) -> column
Use = Literal["compared", "listed", "left out"]  # of a figure; the others only on other hardware
USES: tuple[Use, ...] = ("compared", "listed", "left out")


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


# ------------------------------------------------------------------------------------ comparable?


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


def _at_both(a: Side, b: Side) -> tuple[Side, Side, str]:
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


# ---------------------------------------------------------------------------------------- compare


def compare(a: Side, b: Side, force: bool = False) -> Comparison:
    """Compare B with A. Raises LabError where they are not comparable, unless forced."""
    if (why := reason_not_comparable(a, b)) and not force:
        raise LabError(f"{a.name} and {b.name} are not comparable: {why}; FORCE=1 compares them")
    in_part = ""
    if a.run.quick != b.run.quick and not why:
        a, b, in_part = _at_both(a, b)
    same_hardware, paired = a.hardware == b.hardware, same_requests(a, b)
    columns_a, columns_b = (columns_of(s, _metrics(a.run), same_hardware) for s in (a, b))
    rows = {use: _rows(columns_a[use], columns_b[use], paired) for use in USES}
    compared = judged(of_claims(rows["compared"], [*a.judgements, *b.judgements]))
    manifests = [manifest.recorded(s.folder) for s in (a, b)]
    facts = manifest.fact_pairs(*manifests)
    return Comparison(
        a=a.name,
        b=b.name,
        lab=a.run.lab["name"],
        same_hardware=same_hardware,
        paired=paired,
        forced=why,
        in_part=in_part,
        rows=sorted(compared, key=lambda row: row.kind != "effect"),
        of_machines=_of_machines(rows["listed"]),
        left_out=len(rows["left out"]),
        verdicts=_verdicts(a.judgements, b.judgements),
        caveats={name: _caveats(s) for name, s in (("A", a), ("B", b))},
        speeds=_speeds(a, b),
        facts=facts,
        differences=[fact for fact in facts if fact.differs],
        unrecorded=manifest.unrecorded(*manifests),
        loads={p.load.name: p.load.words for p in (*a.points, *b.points)},
    )


def _speeds(a: Side, b: Side) -> dict[Part, float] | None:
    """Divide the speeds of the machines by their reference steps, the same work on one kind."""
    of_a, of_b = a.summary.machine_speed, b.summary.machine_speed
    if of_a is None or of_b is None or a.folder.path == b.folder.path:
        return None
    same_work = a.run.machine.kind == b.run.machine.kind
    return relative_speed(of_b, of_a) if same_work else None


def _metrics(run: Run) -> list[str]:
    """Name the metrics of a comparison: those of every lab, and those of the lab's claims."""
    claimed = [c["metric"] for c in run.lab["claims"]]
    return list(dict.fromkeys([*compared_metrics(), *claimed]))


def columns_of(side: Side, metrics: Sequence[str], same_hardware: bool) -> dict[Use, Columns]:
    """Compute every figure of a side by repeat, sorted by what the comparison does with it."""
    columns: dict[Use, Columns] = {use: {} for use in USES}
    measurements = side.summary.measurements
    for point in side.points:
        for metric in metrics:
            use: Use = METRICS[metric].across_machines or "left out"
            column = by_repeat(measurements.get(point.key, {}), metric)
            columns["compared" if same_hardware else use][metric, side.where(point.key)] = column
    for f in [] if same_hardware else side.forecasts:
        use = "compared" if f.prediction.kind == "point" else "listed"
        column = by_repeat(measurements.get(f.point, {}), f.metric)
        predicted = dict.fromkeys(column, f.prediction.value)
        name = f"measured / predicted {f.metric}"
        columns[use][name, side.where(f.point)] = _quotients(column, predicted)
    for j in side.judgements:
        treatment, baseline = (
            by_repeat(measurements.get(key, {}), j.metric) for key in (j.treatment, j.baseline)
        )
        columns["compared"][f"effect on {j.metric}", j.where] = _quotients(treatment, baseline)
    return columns


def _quotients(dividends: Column, divisors: Column) -> Column:
    """Divide by repeat; a repeat whose divisor is 0 has no ratio."""
    shared = sorted(set(dividends) & set(divisors))
    return {repeat: dividends[repeat] / divisors[repeat] for repeat in shared if divisors[repeat]}


def _of_machines(rows: Sequence[ComparedFigure]) -> list[MachineProperty]:
    """Say of each figure from where to where it lies over the points that both sides have."""
    ranges: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.a is not None and row.b is not None:
            ranges.setdefault(row.figure, []).append((row.a, row.b))
    properties = []
    for figure, pairs in ranges.items():
        in_a, in_b = zip(*pairs, strict=True)
        a, b = (min(in_a), max(in_a)), (min(in_b), max(in_b))
        properties.append(MachineProperty(figure=figure, points=len(pairs), a=a, b=b))
    return properties


def _rows(a: Columns, b: Columns, paired: bool) -> list[ComparedFigure]:
    """Pair the figures of both sides; one that is zero throughout on both is left out."""
    return [
        _row(key, a.get(key, {}), b.get(key, {}), paired)
        for key in {**a, **b}
        if any(a.get(key, {}).values()) or any(b.get(key, {}).values())
    ]


def _row(key: tuple[str, str], a: Column, b: Column, paired: bool) -> ComparedFigure:
    figure, where = key
    metric = METRICS[figure.split()[-1]]
    ratio, (outcome, why) = None, _without_ratio(a, b)
    if not why and (ratio := contrast(b, a, paired=paired)) is None:
        outcome, why = "not comparable", "no repeat in common"
    if ratio and ratio.p is None:
        why = "one repeat gives no interval"
    p = _p_of_difference(a, b) if why == SOME_ZEROS else None
    return ComparedFigure(
        figure=figure,
        where=where,
        unit=metric.unit if figure in METRICS else "1",
        better=metric.better,
        a=mean_interval(list(a.values())).value if a else None,
        b=mean_interval(list(b.values())).value if b else None,
        contrast=ratio,
        p_of_difference=p,
        outcome=outcome,
        why=why,
    )


def _p_of_difference(a: Column, b: Column) -> float | None:
    """Return Welch's p-value of the means being equal; None where a side has a single repeat."""
    if min(len(a), len(b)) < 2:
        return None
    return float(welchs_test(list(a.values()), list(b.values())).pvalue)


def _without_ratio(a: Column, b: Column) -> tuple[Outcome, str]:
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


def _verdicts(a: Sequence[Judgement], b: Sequence[Judgement]) -> list[VerdictPair]:
    judged_a, judged_b = ({(j.claim, j.where): j for j in of} for of in (a, b))
    return [
        VerdictPair(
            claim=key[0],
            title=(judged_a.get(key) or judged_b[key]).title,
            where=key[1],
            a=judged_a[key].outcome if key in judged_a else "missing",
            b=judged_b[key].outcome if key in judged_b else "missing",
            a_ratio=judged_a[key].ratio if key in judged_a else None,
            b_ratio=judged_b[key].ratio if key in judged_b else None,
        )
        for key in {**judged_a, **judged_b}
    ]


def _caveats(side: Side) -> list[Caveat]:
    point_keys = {p.key for p in side.points}
    caveats = [c for c in side.summary.caveats if c.point is None or c.point in point_keys]
    if text := _what_is_missing(side):
        caveats.append(Caveat(name=NOT_COMPLETE, text=text))
    if side.run.quick:
        caveats.append(Caveat(name="quick run", text="few and short repeats: a smoke test"))
    if side.run.dummy:
        caveats.append(Caveat(name="random weights", text="speed is real, the text is not"))
    return caveats


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


# --------------------------------------------------------------------------------------- machines


def compare_named(a: str, b: str, force: bool = False) -> tuple[list[Comparison], list[str]]:
    """Compare what A and B name; of two machines, also say why some labs were not compared.

    Raises LabError where nothing is comparable.
    """
    homes = [_machine(text) for text in (a, b)]
    if None in homes:
        if homes != [None, None]:
            raise LabError(f"{a} and {b}: give two runs, two variants of runs, or two machines")
        return [compare(read_side(a), read_side(b), force)], []
    runs_a, runs_b = (
        {folder.lab_name: folder for folder in _newest_below(home)} for home in homes if home
    )
    comparisons, refused = [], []
    for lab in {**runs_a, **runs_b}:
        if lab not in runs_a or lab not in runs_b:
            refused.append(f"{lab}: {b if lab in runs_a else a} has no run of it")
            continue
        side_a, side_b = (read_side(str(runs[lab].path)) for runs in (runs_a, runs_b))
        if (why := reason_not_comparable(side_a, side_b)) and not force:
            refused.append(f"{lab}: {why}")
        else:
            comparisons.append(compare(side_a, side_b, force))
    if not comparisons:
        raise LabError(f"no lab of {a} and {b} is comparable: {'; '.join(refused) or 'no runs'}")
    return comparisons, refused


def _newest_below(home: Path) -> list[RunFolder]:
    """List the newest run of each lab in a machine's folder, wherever that lies."""
    return newest_of(folder for folder in runs_of(home) if not unreadable(folder))


def _machine(text: str) -> Path | None:
    """Find a machine's folder of results by its path; None where it is not one.

    It may be without ceilings, where its runs were held against those of another machine.
    """
    for path in (Path(text), ROOT / text):
        if (path / "machine.json").exists() or runs_of(path):
            return path.resolve()
    return None
