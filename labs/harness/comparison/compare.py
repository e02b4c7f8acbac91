"""Compare two runs, two variants or two machines: what differs, and by how much?

A **figure** is a metric at a point, what a claim compares (the ratio of its two points), or a
forecast's measured share of the predicted. Each has the ratio B / A with a 95% interval: paired by
repeat where both sides sent the same requests, Welch's otherwise; `outcomes` decides by it. On
other hardware only dimensionless figures are compared; MBU, MFU and what was reached of a predicted
bound are shares of each machine's own limits, and are listed as properties of the machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from labs.harness.analysis.machine_speed import Part, relative_speed
from labs.harness.analysis.metrics import METRICS, by_repeat, compared_metrics
from labs.harness.analysis.verdicts import Judgement, contrast, mean_interval
from labs.harness.comparison.comparison import (
    ComparedFigure,
    Comparison,
    MachineProperty,
    VerdictPair,
)
from labs.harness.comparison.outcomes import (
    SOME_ZEROS,
    Column,
    judged,
    of_claims,
    p_of_difference,
    without_ratio,
)
from labs.harness.comparison.sides import (
    Side,
    at_both,
    caveats,
    read_side,
    reason_not_comparable,
    same_requests,
)
from labs.harness.spec.lab import LabError
from labs.harness.storage import manifest
from labs.harness.storage.checks import unreadable
from labs.harness.storage.newest import newest_of
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder, runs_of
from serving.models.catalog import ROOT

Columns = dict[tuple[str, str], Column]  # (figure, where) -> column
Use = Literal["compared", "listed", "left out"]  # of a figure; the others only on other hardware
USES: tuple[Use, ...] = ("compared", "listed", "left out")


def compare(a: Side, b: Side, force: bool = False) -> Comparison:
    """Compare B with A. Raises LabError where they are not comparable, unless forced."""
    if (why := reason_not_comparable(a, b)) and not force:
        raise LabError(f"{a.name} and {b.name} are not comparable: {why}; FORCE=1 compares them")
    in_part = ""
    if a.run.quick != b.run.quick and not why:
        a, b, in_part = at_both(a, b)
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
        caveats={name: caveats(s) for name, s in (("A", a), ("B", b))},
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
    ratio, (outcome, why) = None, without_ratio(a, b)
    if not why and (ratio := contrast(b, a, paired=paired)) is None:
        outcome, why = "not comparable", "no repeat in common"
    if ratio and ratio.p is None:
        why = "one repeat gives no interval"
    p = p_of_difference(a, b) if why == SOME_ZEROS else None
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
