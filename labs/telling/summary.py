"""Everything a report says, computed from the files of a run and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from labs.filing.results import Run, RunFolder, Session, Summary, TrialResult, write_json
from labs.findings.context import Context, JudgedRun
from labs.findings.parts import answers, parts_of
from labs.judging.judge import Caveat, ForecastAtPoint, judge, judge_forecast, mean_interval
from labs.judging.metrics import by_repeat, measure, pooled_latencies, pooled_percentiles
from labs.judging.validity import caveats_of, confounded, first_trial_slow
from labs.lab import Lab
from loadtests.latencies import Latency

STEAL_SHARE = 0.05
OTHERS_SHARE = 0.1


def summarise(folder: RunFolder) -> Summary:
    """Computed from the trials on file, and written beside them."""
    run = folder.run()
    lab, points, predictions = run.rebuilt_lab(), run.points(), folder.predictions()
    values: dict[str, dict[int, dict[str, float | None]]] = {p.key: {} for p in points}
    samples_s: dict[str, dict[Latency, list[float]]] = {}
    found: list[Caveat] = []
    failed: dict[str, str] = {}
    for point, result, trial in folder.trials(points, lab):
        if trial is None:
            failed[f"{point.key}/{result.repeat}"] = result.failed or "no summary"
            continue
        values[point.key][result.repeat] = measure(trial)
        for latency in pooled_latencies():
            of_point = samples_s.setdefault(point.key, {})
            of_point.setdefault(latency, []).extend(trial.samples_s(latency))
        # an endpoint's engine was not configured here: there is no treatment to prove
        found += caveats_of(trial, () if run.endpoint else lab.evidence)
        found += _disturbed(result, run)
    found += [c for p in points for c in first_trial_slow(values[p.key], p.key)]
    found = _each_once([*found, *_of_the_whole(run, lab, folder.session())])
    judged = [
        (claim, t, b, confounded(claim, t, b))
        for claim in lab.claims
        for t, b in lab.pairs(claim, points)
    ]
    context = Context(folder, run, lab, points, values, found)
    conclusions = parts_of(lab.name).findings
    summary = Summary(
        measurements=values,
        pooled={key: pooled_percentiles(of_point) for key, of_point in samples_s.items()},
        judgements=[
            judge(
                claim,
                t.key,
                b.key,
                values,
                predictions.effects[claim.name][f"{t.key}|{b.key}"],
                [*found, *own],
            )
            for claim, t, b, own in judged
        ],
        forecasts=[
            judge_forecast(forecast, key, values.get(key, {}), prediction)
            for forecast in lab.forecasts
            for key, prediction in predictions.forecasts[forecast.name].items()
        ],
        in_virtual_time=[
            ForecastAtPoint(
                point=key,
                metric=metric,
                value=band.value,
                low=band.low,
                high=band.high,
                measured=mean_interval(list(by.values())) if by else None,
            )
            for key, bands in (
                predictions.in_virtual_time.points if predictions.in_virtual_time else {}
            ).items()
            for metric, band in bands.items()
            for by in (by_repeat(values.get(key, {}), metric),)
        ],
        findings=[conclusions[name].finding(context) for name in lab.findings],
        caveats=[*found, *(caveat for *_, own in judged for caveat in own)],
        failed=failed,
        missing=sum(
            folder.trial_result(p, r) is None for p in points for r in range(1, lab.repeats + 1)
        ),
    )
    if not run.aa:  # where an engine meets its twin there is nothing to answer
        judged_run = JudgedRun.of(context, summary)
        summary = summary.model_copy(update={"answers": answers(judged_run)})
    write_json(folder.path / "summary.json", summary)
    return summary


def _disturbed(result: TrialResult, run: Run) -> list[Caveat]:
    """Somebody else used the machine during a trial."""
    found = []
    if (result.cpu_steal or 0) > STEAL_SHARE:
        text = f"other guests of the host took {result.cpu_steal:.0%} of this trial's CPU time"
        found.append(Caveat(name="load from others", text=text, point=result.point))
    if (result.cpu_others or 0) > OTHERS_SHARE and not run.endpoint:
        text = (
            f"other processes on this machine took {result.cpu_others:.0%} of its CPU time: end"
            " them and measure again"
        )
        found.append(Caveat(name="other processes", text=text, point=result.point))
    return found


def _of_the_whole(run: Run, lab: Lab, session: Session | None) -> list[Caveat]:
    """How the run was made weakens what is concluded from it."""
    found = []
    if session and not session.resident and not session.there_and_back:
        text = (
            "each was measured in a block of its own, so what the machine drifted between two"
            " blocks is in their ratio: where an effect is small, run again with another SEED="
        )
        found.append(Caveat(name="engines took turns", text=text))
    if run.endpoint:
        text = "predictions rest on this machine's ceilings; the endpoint may run on another"
        found.append(Caveat(name="endpoint's hardware unknown", text=text))
    if any(flags.is_parallel for flags in lab.all_flags):
        text = "predictions rest on one GPU's ceilings and count no communication"
        found.append(Caveat(name="several GPUs", text=text))
    return found


def _each_once(caveats: Sequence[Caveat]) -> list[Caveat]:
    """The first of each name at each point: repeats tell the same."""
    first: dict[tuple[str, str | None], Caveat] = {}
    for caveat in caveats:
        first.setdefault((caveat.name, caveat.point), caveat)
    return list(first.values())
