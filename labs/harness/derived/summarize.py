"""Compute all figures and verdicts of a report from the files of a run, and from nothing else."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from labs.harness.analysis import expected_treatment
from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.checks.run import CachedRepeats, Making
from labs.harness.analysis.computed import Predictions, Summary
from labs.harness.analysis.machine_speed import MachineSpeed, machine_speed
from labs.harness.analysis.measure import influences
from labs.harness.analysis.metrics import METRICS, measure, pooled_latencies, pooled_percentiles
from labs.harness.analysis.validity import caveats_of, check, speed_jumped
from labs.harness.analysis.verdicts import (
    Caveat,
    ForecastAtPoint,
    judge,
    judge_forecast,
    over_repeats,
)
from labs.harness.derived.design import transports_s
from labs.harness.derived.lab_modules import parts_of, plain
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Lab, Point
from labs.harness.spec.names import PairName, TrialName
from labs.harness.storage import engine_series, packing
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.checks import contradictions, problems
from labs.harness.storage.recorded import Run, Session
from labs.harness.storage.results import RunFolder
from loadtests.latencies import Latency
from serving.metrics import KvUse


@dataclass(frozen=True)
class _Measured:
    """Holds what was measured in the trials of a run."""

    values: dict[str, dict[int, dict[str, float | None]]]  # point -> repeat -> metric -> value
    samples_s: dict[str, dict[Latency, array[float]]]  # point -> samples of all its repeats
    caveats: list[Caveat]
    failed: dict[str, str]  # trial -> reason
    machine_speed: MachineSpeed | None
    measured_again: dict[str, list[str]]  # trial -> why each attempt was discarded
    influences: dict[str, dict[int, dict[str, dict[int, float]]]]


def summarise(folder: RunFolder) -> Summary:
    """Compute the summary of a run from its recorded trials, and write it beside them."""
    summary = computed(folder)
    packing.write_summary(folder, summary)
    return summary


def checked(folder: RunFolder) -> Summary:
    """Compute the summary of a run that somebody else may have made.

    Raises DamagedError where its files contradict each other.
    """
    again: list[Summary] = []
    if wrong := contradictions(folder, lambda run: again.append(computed(run))):
        raise DamagedError(wrong[0])
    (summary,) = again
    if problem := unlike(folder.summary(), summary):
        raise DamagedError(problem)
    return summary


def all_problems(folder: RunFolder) -> list[str]:
    """List what is wrong with a run on file, and where its summary is not what its records give.

    A run whose files contradict each other gives no summary to compare.
    """
    again: list[Summary] = []
    wrong = problems(folder, lambda run: again.append(computed(run)))
    stale = [unlike(folder.summary(), summary) for summary in again]
    return [*wrong, *filter(None, stale)]


def unlike(filed: Summary, again: Summary) -> str:
    """Say which figure or verdict on file is not what its records give; empty where all are.

    Prose is left out, and figures that have been defined since: those are no fault of the records.
    """
    given = _figures(again)
    for name, figure in _figures(filed).items():
        if not _same(figure, given.get(name)):
            return f"its summary's {name} is not what its records give"
    return ""


def _figures(summary: Summary) -> dict[str, object]:
    """Name each figure of a summary, each verdict, and what became of each prediction."""
    verdicts = {f"{j.claim} at {j.where}": j for j in summary.judgements}
    forecasts = {f"{f.metric} at {f.point}": f for f in summary.forecasts}
    measured: dict[str, Mapping[str, float | None]] = {**summary.pooled}
    for point, repeats in summary.measurements.items():
        measured |= {str(TrialName(point, repeat)): values for repeat, values in repeats.items()}
    return {
        "list of failed trials": summary.failed.keys(),
        "number of missing trials": summary.missing,
        "list of predictions": verdicts.keys() | forecasts.keys(),
        **{
            f"{metric} of {place}": value
            for place, values in measured.items()
            for metric, value in values.items()
            if metric in METRICS
        },
        **{f"verdict on {name}": verdict.outcome for name, verdict in verdicts.items()},
        **{f"effect on {name}": verdict.effect for name, verdict in verdicts.items()},
        **{f"prediction of {name}": v.prediction_outcome for name, v in verdicts.items()},
        **{f"prediction of {name}": forecast.outcome for name, forecast in forecasts.items()},
        **{f"mean of {name}": forecast.measured for name, forecast in forecasts.items()},
        **{f"forecast of {f.metric} at {f.point}": f for f in summary.in_virtual_time},
    }


def _same(filed: object, again: object) -> bool:
    """Compare a figure on file with the recomputed one; fields that the file lacks do not count."""
    if isinstance(filed, BaseModel):
        fields = filed.model_fields_set
        return all(_same(getattr(filed, f), getattr(again, f, None)) for f in fields)
    if isinstance(filed, float) and isinstance(again, float):
        return math.isclose(filed, again, rel_tol=1e-6, abs_tol=1e-12)
    return filed == again


def computed(folder: RunFolder) -> Summary:
    """Compute the summary of a run from its recorded trials; raises DamagedError."""
    run = folder.run()
    lab, points, predictions = run.rebuilt_lab(), run.points(), folder.predictions()
    expected = run.expected(predictions)
    expected = expected.with_transport(transports_s(folder, points, lab, expected))
    measured = _measure(folder, lab, points, expected)
    values, caveats = measured.values, measured.caveats
    pairs = [
        (claim, t, b, check("sides", t.key, claim, t, b))
        for claim in lab.claims
        for t, b in lab.pairs(claim, points)
    ]
    context = Context(folder, run, lab, points, values, caveats, measured.influences)
    summary = Summary(
        measurements=values,
        pooled={key: pooled_percentiles(of_point) for key, of_point in measured.samples_s.items()},
        judgements=[
            judge(
                claim,
                t.key,
                b.key,
                values,
                predictions.effects[claim.name][str(PairName(t.key, b.key))],
                [*caveats, *own],
                context.sampling,
                predictions.of_means(claim, t.key, b.key),
            )
            for claim, t, b, own in pairs
        ],
        forecasts=[
            judge_forecast(forecast, key, values.get(key, {}), prediction, context.sampling)
            for forecast in lab.forecasts
            for key, prediction in predictions.forecasts[forecast.name].items()
        ],
        in_virtual_time=_beside_forecasts(predictions, values),
        kv_use=_kv_use(folder, lab, points, predictions),
        influences=measured.influences,
        caveats=[*caveats, *(caveat for *_, own in pairs for caveat in own)],
        failed=measured.failed,
        machine_speed=measured.machine_speed,
        measured_again=measured.measured_again,
        missing=sum(
            folder.trial_result(p, r) is None
            for p in points
            for r in range(1, lab.repeats_of(p) + 1)
        ),
    )
    if compute := parts_of(lab.name).facts:
        facts = plain(lab.name, compute(JudgedRun.of(context, summary)))
        summary = summary.model_copy(update={"facts": facts})
    return summary


def _measure(folder: RunFolder, lab: Lab, points: list[Point], expected: Expected) -> _Measured:
    """Measure every trial on its own, and collect what weakens the run."""
    values: dict[str, dict[int, dict[str, float | None]]] = {p.key: {} for p in points}
    samples_s: dict[str, dict[Latency, array[float]]] = {}
    caveats: list[Caveat] = []
    failed: dict[str, str] = {}
    again: dict[str, list[str]] = {}
    timed, found = [], dict[str, list[expected_treatment.CacheHits]]()
    moved = dict[str, dict[int, dict[str, dict[int, float]]]]()
    for point, result, trial in folder.trials(points, lab):
        name = str(TrialName(point.key, result.repeat))
        if result.discarded:
            again[name] = [", ".join(d.reasons) for d in result.discarded]
        if trial is None:
            failed[name] = result.failed or "no summary"
            continue
        values[point.key][result.repeat] = measure(trial)
        for latency in pooled_latencies():
            of_point = samples_s.setdefault(point.key, {})
            of_point.setdefault(latency, array("d")).extend(trial.samples_s(latency))
        if of_trial := influences(trial):
            moved.setdefault(point.key, {})[result.repeat] = of_trial
        caveats += caveats_of(trial, expected)
        if in_cache := expected_treatment.cache_hits(trial, expected.template_tokens):
            found.setdefault(point.key, []).append(in_cache)
        timed += [result.timed] if result.timed else []
        del trial  # before the next one is read
    for point in points:
        if point.key in found and point.key in expected.least_hit_rate and not expected.endpoint:
            repeats = CachedRepeats(point, found[point.key], lab.repeats_of(point))
            caveats += check("cached-repeats", point.key, repeats, expected)
    caveats += speed_jumped(timed)
    caveats += [c for p in points for c in check("repeats", p.key, values[p.key])]
    making = _making(folder.run(), lab, folder.session())
    caveats = _each_once([*caveats, *check("making", None, making)])
    return _Measured(values, samples_s, caveats, failed, machine_speed(timed), again, moved)


def _beside_forecasts(
    predictions: Predictions, values: dict[str, dict[int, dict[str, float | None]]]
) -> list[ForecastAtPoint]:
    """Put each forecast figure beside its mean over repeats; none where nothing was forecast."""
    if predictions.in_virtual_time is None:
        return []
    rows = []
    for key, bands in predictions.in_virtual_time.points.items():
        for metric, band in bands.items():
            rows.append(
                ForecastAtPoint(
                    point=key,
                    metric=metric,
                    value=band.value,
                    low=band.low,
                    high=band.high,
                    measured=over_repeats(values.get(key, {}), metric),
                )
            )
    return rows


def _kv_use(
    folder: RunFolder, lab: Lab, points: Sequence[Point], predictions: Predictions
) -> dict[str, KvUse]:
    """Read how much of the KV cache was in use at each point for which that was forecast."""
    before = predictions.in_virtual_time
    uses: dict[str, list[KvUse]] = {}
    for point in (p for p in points if before and p.key in before.kv_use):
        for repeat in range(1, lab.rounds + 1):
            result = folder.trial_result(point, repeat)
            if not result or not result.summary or result.beside:  # it held little in the pauses
                continue
            kept = folder.series(point.key, repeat)
            if use := engine_series.kv_use(kept, result.summary.window_s):
                uses.setdefault(point.key, []).append(use)
    return KvUse.over_trials(uses)


def _making(run: Run, lab: Lab, session: Session | None) -> Making:
    return Making(
        in_blocks=bool(session and not session.resident and not session.there_and_back),
        at_endpoint=bool(run.endpoint),
        parallel=any(flags.is_parallel for flags in lab.all_flags),
        on_cpu=run.machine.kind == "cpu",
    )


def _each_once(caveats: Sequence[Caveat]) -> list[Caveat]:
    """Keep the first of the caveats that weigh the same at a point, as repeats show the same."""
    first: dict[tuple[str, str | None, bool, tuple[str, ...]], Caveat] = {}
    for caveat in caveats:
        first.setdefault((caveat.name, caveat.point, caveat.blocks, caveat.metrics), caveat)
    return list(first.values())
