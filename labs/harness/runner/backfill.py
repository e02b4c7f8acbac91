"""Load finished runs into Prometheus at their own times, as `make import` does.

The client's series are computed again from the records of every request, by the exporter that
wrote them live; the engine's own are those that its trials have kept (`engine_series`), and of a
run that has kept none they are missing. The figures of the report (means with their intervals,
effects, verdicts, forecasts) become one sample each, at the end of the run.
A trial that Prometheus scraped while it was played, or that was loaded before, is left alone, so
loading twice changes nothing and a run that lost its Prometheus half-way is made whole.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import requests
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.exposition import generate_latest

from dashboards import prometheus, series
from dashboards.prometheus import Prometheus, PrometheusError
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import claim_outcome, counted, outcome_text
from labs.harness.analysis.verdicts import Interval
from labs.harness.spec.lab import Lab, LabError, Point
from labs.harness.spec.names import PointName
from labs.harness.storage import engine_series
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder, readable
from loadtests import exporter
from loadtests.exporter import Exporter
from loadtests.plan import Progress, TrialPlan, TrialSummary
from loadtests.records import RequestRecord
from serving.models.catalog import CACHE

SCRAPES_LATE_S = 2.0  # a trial's last scrape comes up to so long before its end
ROUNDED_S = 0.01  # times are written to the millisecond
_RUN = ("lab", "run_id", "machine")
_POINT = (*_RUN, "variant", "workload", "load", "metric", "unit")
_CLAIM = (*_RUN, "claim", "title", "treatment", "baseline")
_LABELS: dict[str, tuple[str, ...]] = {
    series.RUN_INFO: (*_RUN, "described", "model", "scale", "quick", "report"),
    series.MEASUREMENT: _POINT,
    series.MEASUREMENT_LOW: _POINT,
    series.MEASUREMENT_HIGH: _POINT,
    series.EFFECT: (*_CLAIM, "metric"),
    series.EFFECT_LOW: (*_CLAIM, "metric"),
    series.EFFECT_HIGH: (*_CLAIM, "metric"),
    series.EFFECT_PREDICTED: (*_CLAIM, "metric"),
    series.VERDICT: (*_CLAIM, "outcome", "prediction"),
    series.FORECAST: _POINT,
    series.FORECAST_PREDICTED: _POINT,
    series.FORECAST_OUTCOME: (*_POINT, "prediction"),
    series.SLO: (*_RUN, "slo"),
}


@dataclass(frozen=True)
class Loaded:
    """Says what of a run was added; nothing where Prometheus had all of it."""

    trials: int
    figures: bool

    def __str__(self) -> str:
        if not self.trials and not self.figures:
            return "already loaded"
        figures = " and the figures of its report" if self.figures else ""
        return f"{counted(self.trials, 'trial')}{figures}"


def load(folders: Sequence[RunFolder], report: Callable[[RunFolder, str], None]) -> None:
    """Add what Prometheus does not have yet. No run may be in progress. Raises LabError.

    A run that cannot be read is left out and reported; of an interrupted run the finished trials
    are added.
    """
    watch, damaged = prometheus.watching(), list[RunFolder]()
    try:
        with Prometheus(CACHE / "import.log") as own_prometheus:
            if own_prometheus.missing:
                raise LabError(own_prometheus.missing)
            loads = _loads(folders, own_prometheus, report, damaged)
        if watch and watch.own:  # it reads new blocks when it starts
            prometheus.unwatch()
        for folder, trials, since, figures in loads:
            try:
                with readable(folder):
                    if since or figures:
                        prometheus.load(_all(folder, trials, since, figures))
            except DamagedError as error:
                damaged.append(folder)
                report(folder, f"left out: {error}")
            else:
                report(folder, str(Loaded(len(since), figures)))
    except PrometheusError as error:
        raise LabError(str(error)) from error
    finally:
        if watch and watch.own and not prometheus.watching():
            prometheus.watch(watch.port)
    if damaged:
        raise LabError(
            f"runs that could not be read: {len(damaged)}; repair or remove their folders"
        )


def _loads(
    folders: Sequence[RunFolder],
    own_prometheus: Prometheus,
    report: Callable[[RunFolder, str], None],
    damaged: list[RunFolder],
) -> list[tuple[RunFolder, list[_Played], _Since, bool]]:
    """List what Prometheus lacks of each run, without records: runs may be many.

    A run that cannot be read is reported, and added to those that are damaged. Raises LabError.
    """
    loads: list[tuple[RunFolder, list[_Played], _Since, bool]] = []
    for folder in folders:
        try:
            with readable(folder):
                trials = _trials(folder)
            if trials:
                loads.append((folder, trials, *_missing(folder, trials, own_prometheus)))
            else:
                report(folder, "left out, as none of its trials has finished")
        except requests.RequestException as error:  # not "no samples"
            raise LabError(f"Prometheus did not answer: {error}") from error
        except (DamagedError, OSError) as error:
            damaged.append(folder)
            report(folder, f"left out: {error}")
    return loads


def load_figures(folder: RunFolder) -> None:
    """Add the figures of a run that Prometheus has just followed; none where every trial failed."""
    if trials := _trials(folder):
        prometheus.load(_figures(folder, _end_unix_s(trials)))


_Since = dict[tuple[str, int], float]
"""Trial (point, repeat) -> seconds of it that Prometheus has scraped already."""


@dataclass(frozen=True)
class _Played:
    """Holds of a trial what can be told without its records, of which there may be many."""

    point: Point
    repeat: int
    summary: TrialSummary
    length_s: float

    @property
    def name(self) -> tuple[str, int]:
        return self.point.key, self.repeat

    @property
    def start_unix_s(self) -> float:
        return self.summary.started_unix_s

    @property
    def end_unix_s(self) -> float:
        return self.start_unix_s + self.length_s


def _missing(
    folder: RunFolder, trials: Sequence[_Played], own_prometheus: Prometheus
) -> tuple[_Since, bool]:
    """Return the trials that Prometheus lacks, whole or in part; whether it lacks the figures."""
    run_id = folder.path.name
    known = f'count(last_over_time({series.RUN_INFO}{{run_id="{run_id}"}}[1m]))'
    lacking = {
        t.name: since_s
        for t in trials
        if not (since_s := _known_s(t, run_id, own_prometheus))
        or t.length_s - since_s > SCRAPES_LATE_S
    }
    if not folder.is_summarised:  # it was interrupted: there are none yet
        return lacking, False
    folder.summary()  # raises before anything is added where it cannot be read
    return lacking, own_prometheus.known(known, _end_unix_s(trials) + 1) is None


def _trials(folder: RunFolder) -> list[_Played]:
    run = folder.run()
    finished = []
    for point, result, trial in folder.trials(run.points(), run.rebuilt_lab()):
        if trial:
            finished.append(_Played(point, result.repeat, trial.summary, trial.length_s))
        del trial  # before the next one is read
    return sorted(finished, key=lambda t: t.start_unix_s)


def _known_s(trial: _Played, run_id: str, own_prometheus: Prometheus) -> float:
    """Return how many seconds into the trial Prometheus has samples of its run."""
    newest = f'max(timestamp({exporter.LOAD_POINT}{{run_id="{run_id}"}}))'
    latest = own_prometheus.known(newest, trial.end_unix_s + ROUNDED_S)
    return max(0.0, (latest or 0.0) - trial.start_unix_s)


def _end_unix_s(trials: Sequence[_Played]) -> float:
    return max(t.end_unix_s for t in trials)


def _all(
    folder: RunFolder, trials: Sequence[_Played], since: _Since, figures: bool
) -> Iterator[str]:
    with tempfile.TemporaryFile() as spool:
        places = _spool(folder, since, spool)
        yield from _client(folder, [t for t in trials if t.name in since], since, spool, places)
    if figures:
        yield from _figures(folder, _end_unix_s(trials))


def _spool(folder: RunFolder, since: _Since, spool: IO[bytes]) -> dict[tuple[str, int], int]:
    """Copy the records of these trials to where each can be sought; return its place there.

    They are wanted in the order of play. A packed run has them in another, in which it is read once
    here: for one that lies before the last, it would be read from the beginning.
    """
    places = {}
    run = folder.run()
    for point, result, trial in folder.trials(run.points(), run.rebuilt_lab()):
        if trial and (point.key, result.repeat) in since:
            places[point.key, result.repeat] = spool.tell()
            pickle.dump(trial.records, spool)
        del trial  # before the next one is read
    return places


def _client(
    folder: RunFolder,
    trials: Sequence[_Played],
    since: _Since,
    spool: IO[bytes],
    places: Mapping[tuple[str, int], int],
) -> Iterator[str]:
    """Write what the exporter would have shown at every second of these trials."""
    lab = folder.run().rebuilt_lab()
    by_variant: dict[str, Exporter] = {}  # only the variant under load has samples
    for trial in trials:
        since_s = since[trial.name]
        point, start = trial.point, trial.start_unix_s
        client = by_variant.setdefault(point.variant.name, Exporter())
        client.begin(_plan(lab, folder.path.name, trial))
        spool.seek(places[trial.name])
        found: list[RequestRecord] = pickle.load(spool)
        trial_records = sorted(
            (r for r in found if r.over_s > since_s or not since_s),
            key=lambda record: record.over_s,
        )
        outstanding = deque(trial_records)
        length_s = trial.length_s
        for now in (*range(math.ceil(length_s)), length_s):  # every second, as Prometheus scrapes
            while outstanding and outstanding[0].over_s <= now:
                client.observe(outstanding.popleft())
            warm = now >= trial.summary.window_s[0]
            client.progress(_progress(trial_records, len(outstanding), now, warm))
            if now == length_s:
                client.end()
            if now >= since_s:
                yield from _scrape(client.registry, start + now)
        labels = {"lab": lab.name, "run_id": folder.path.name, "variant": point.variant.name}
        kept = folder.series(point.key, trial.repeat)
        yield from engine_series.lines(kept, labels, start, since_s)


def _progress(sending: Sequence[RequestRecord], left: int, now_s: float, warm: bool) -> Progress:
    """Compute the progress that records show: without adapters and the event loop's lag."""
    sent = sum(r.sent_s <= now_s for r in sending)
    due = [r.scheduled_s <= now_s for r in sending if r.scheduled_s is not None]
    return Progress(
        sent=sent,
        in_flight=sent - (len(sending) - left),
        warm=warm,
        due=sum(due) if due else None,
    )


def _plan(lab: Lab, run_id: str, trial: _Played) -> TrialPlan:
    """Rebuild the part of a trial's plan that the exporter reads."""
    point = trial.point
    return TrialPlan(
        url="",
        arrival=point.load,
        requests=Path(),
        records=Path(),
        warmup_s=lab.warmup_of(point.workload),
        window_s=lab.window_s,
        timeout_s=lab.timeout_s,
        seed=lab.draw_seed(trial.repeat),
        lab=lab.name,
        variant=point.variant.name,
        run_id=run_id,
        workload=point.workload.name,
        slo_s=lab.slo.by_name(),
        turns_away=point.flags.turns_away,
    )


def _scrape(registry: CollectorRegistry, at_unix_s: float) -> Iterator[str]:
    """Write a registry's samples with their time, without the lines on the kinds of metric."""
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    for line in text.decode().splitlines():
        if not line.startswith("#"):
            yield f"{line} {at_unix_s:.3f}"


def _figures(folder: RunFolder, ended: float) -> Iterator[str]:
    run, summary = folder.run(), folder.summary()
    registry = CollectorRegistry()
    gauges = {name: Gauge(name, name, labels, registry=registry)
              for name, labels in _LABELS.items()}  # fmt: skip
    run_labels = {"lab": run.lab["name"], "run_id": folder.path.name, "machine": run.machine.slug}

    def put(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            gauges[name].labels(**run_labels, **labels).set(value)

    def put_interval(name: str, interval: Interval | None, **labels: str) -> None:
        if interval:
            for suffix, value in (
                ("", interval.value),
                ("_low", interval.low),
                ("_high", interval.high),
            ):
                put(name + suffix, value, **labels)

    put(series.RUN_INFO, 1, **_about(folder, run))
    for key in summary.measurements:
        for metric in METRICS.values():
            if metric.exported:
                figure = summary.figure(key, metric.name)
                put_interval(series.MEASUREMENT, figure, **_point(key), **_metric(metric.name))
    for j in summary.judgements:
        claim = {"claim": j.claim, "title": j.title, "treatment": j.treatment,
                 "baseline": j.baseline}  # fmt: skip
        ratio = j.effect.ratio if j.effect else None
        put_interval(series.EFFECT, ratio, **claim, metric=j.metric)
        put(series.EFFECT_PREDICTED, j.prediction.value, **claim, metric=j.metric)
        put(series.VERDICT, ended, **claim, outcome=j.outcome, prediction=claim_outcome(j))
    for f in summary.forecasts:
        place = {**_point(f.point), **_metric(f.metric)}
        put(series.FORECAST, f.measured.value if f.measured else None, **place)
        put(series.FORECAST_PREDICTED, f.prediction.value, **place)
        came_to = outcome_text(f.outcome, f.prediction, f.measured)
        put(series.FORECAST_OUTCOME, ended, **place, prediction=came_to)
    for slo, value in run.rebuilt_lab().slo.by_name().items():
        put(series.SLO, value, slo=slo)
    yield from _scrape(registry, ended)


def _about(folder: RunFolder, run: Run) -> dict[str, str]:
    return {
        "described": run.machine.describe(),
        "model": run.model,
        "scale": run.scale,
        "quick": "yes" if run.quick else "no",
        "report": f"{folder.place}/report.md",
    }


def _metric(name: str) -> dict[str, str]:
    unit = METRICS[name].unit
    return {"metric": name, "unit": "" if unit == "1" else unit}


def _point(key: str) -> dict[str, str]:
    return asdict(PointName.parse(key))
