"""Finished runs into Prometheus, at their own times: what `make import` does.

The client's series are made again from the records of every request, by the exporter that made
them live; the engine's own gauges are on no file and stay away. The figures of the report (means
with their intervals, effects, verdicts, forecasts) become one sample each, at the end of the run.
A trial that Prometheus scraped while it was played, or that was loaded before, is left alone, so
loading twice changes nothing and a run that lost its Prometheus half-way is made whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.exposition import generate_latest

from dashboards import prometheus, series
from dashboards.prometheus import Prometheus, PrometheusError
from labs.filing.results import Run, RunFolder
from labs.judging.judge import Interval
from labs.judging.measure import Trial
from labs.judging.metrics import METRICS
from labs.judging.text import claim_held
from labs.lab import Lab, LabError
from loadtests import exporter
from loadtests.exporter import Exporter
from loadtests.plan import Progress, TrialPlan
from loadtests.records import RequestRecord
from serving.models import CACHE

SCRAPES_LATE_S = 2.0  # a trial's last scrape comes up to so long before its end
ROUNDED_S = 0.01  # times are written to the millisecond
_RUN = ("lab", "run_id", "machine")
_POINT = (*_RUN, "variant", "workload", "load", "metric")
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
    series.VERDICT: (*_CLAIM, "outcome", "held"),
    series.FORECAST: _POINT,
    series.FORECAST_PREDICTED: _POINT,
    series.SLO: (*_RUN, "slo"),
}


@dataclass(frozen=True)
class Loaded:
    """What was added of a run; nothing where all of it was there."""

    trials: int
    figures: bool

    def __str__(self) -> str:
        if not self.trials and not self.figures:
            return "there already"
        return f"{self.trials} trials{' and the figures of its report' if self.figures else ''}"


def load(folders: Sequence[RunFolder], say: Callable[[RunFolder, str], None]) -> None:
    """Add what is not there yet; nobody else may be measuring. Raises LabError.

    A run that cannot be read is left out, and told of in the end; of one that was interrupted its
    finished trials are added.
    """
    watch = prometheus.watching()
    wanted: list[tuple[RunFolder, _Since, bool]] = []  # without records: runs may be many
    damaged: list[RunFolder] = []
    try:
        with Prometheus(CACHE / "import.log") as there:
            if there.missing:
                raise LabError(there.missing)
            for folder in folders:
                try:
                    if trials := _trials(folder):
                        wanted.append((folder, *_missing(folder, trials, there)))
                    else:
                        say(folder, "left out: no trial of it has finished")
                except requests.RequestException as error:  # which does not mean "not there"
                    raise LabError(f"Prometheus did not answer: {error}") from error
                except (OSError, ValueError, KeyError, TypeError) as error:
                    damaged.append(folder)
                    say(folder, f"left out: {str(error).splitlines()[0]}")
        if watch and watch.own:  # it would see new blocks only after a while: it starts again
            prometheus.unwatch()
        for folder, since, figures in wanted:
            if since or figures:
                prometheus.load(_all(folder, since, figures))
            say(folder, str(Loaded(len(since), figures)))
    except PrometheusError as error:
        raise LabError(str(error)) from error
    finally:
        if watch and watch.own and not prometheus.watching():
            prometheus.watch(watch.port)
    if damaged:
        raise LabError(f"runs that could not be read: {len(damaged)}; mend or remove them")


def load_figures(folder: RunFolder) -> None:
    """The figures of a run that Prometheus has just followed; none where every trial failed."""
    if _trials(folder):
        prometheus.load(_figures(folder))


_Since = dict[tuple[str, int], float]
"""Trial (point, repeat) -> from which time of its own on: what came before was scraped."""


def _name(trial: Trial) -> tuple[str, int]:
    return trial.point.key, trial.repeat


def _missing(folder: RunFolder, trials: Sequence[Trial], there: Prometheus) -> tuple[_Since, bool]:
    """What Prometheus has no sample of; and whether it lacks the figures."""
    run_id = folder.path.name
    known = f'count(last_over_time({series.RUN_INFO}{{run_id="{run_id}"}}[1m]))'
    lacking = {
        _name(t): since_s
        for t in trials
        if not (since_s := _known_s(t, run_id, there)) or _length_s(t) - since_s > SCRAPES_LATE_S
    }
    if not (folder.path / "summary.json").exists():  # it was interrupted: there are none yet
        return lacking, False
    folder.summary()  # before anything is added, it can be read
    return lacking, there.known(known, _end_unix_s(trials) + 1) is None


def _trials(folder: RunFolder) -> list[Trial]:
    run = folder.run()
    found = [t for _, _, t in folder.trials(run.points(), run.rebuilt_lab()) if t]
    return sorted(found, key=lambda t: t.summary.started_unix_s)


def _known_s(trial: Trial, run_id: str, there: Prometheus) -> float:
    """How far into the trial there are samples of its run."""
    start, end = trial.summary.started_unix_s, trial.summary.started_unix_s + _length_s(trial)
    latest = there.known(
        f'max(timestamp({exporter.LOAD_POINT}{{run_id="{run_id}"}}))', end + ROUNDED_S
    )
    return max(0.0, (latest or start) - start)


def _length_s(trial: Trial) -> float:
    return max([trial.summary.window_s[1], *map(_end_s, trial.records)])


def _end_unix_s(trials: Sequence[Trial]) -> float:
    return max(t.summary.started_unix_s + _length_s(t) for t in trials)


def _all(folder: RunFolder, since: _Since, figures: bool) -> Iterator[str]:
    yield from _client(folder, since)
    if figures:
        yield from _figures(folder)


def _client(folder: RunFolder, since: _Since) -> Iterator[str]:
    """What the exporter would have said of these trials at every second of them."""
    lab = folder.run().rebuilt_lab()
    by_variant: dict[str, Exporter] = {}  # only the one under load says anything
    for trial in _trials(folder):
        if (since_s := since.get(_name(trial))) is None:
            continue
        point, start = trial.point, trial.summary.started_unix_s
        client = by_variant.setdefault(point.variant.name, Exporter())
        client.begin(_plan(lab, folder.path.name, trial))
        found = sorted((r for r in trial.records if _end_s(r) > since_s or not since_s), key=_end_s)
        left = list(found)
        length_s = _length_s(trial)
        for now in (*range(math.ceil(length_s)), length_s):  # every second, as Prometheus scrapes
            while left and _end_s(left[0]) <= now:
                client.observe(left.pop(0))
            warm = now >= trial.summary.window_s[0]
            client.progress(_progress(found, len(left), now, warm))
            if now == length_s:
                client.end()
            if now >= since_s:
                yield from _scrape(client.registry, start + now)


def _progress(records: Sequence[RequestRecord], left: int, now_s: float, warm: bool) -> Progress:
    """As far as records tell: neither adapters nor the event loop's lag are in them."""
    sent = sum(r.sent_s <= now_s for r in records)
    due = [r.scheduled_s <= now_s for r in records if r.scheduled_s is not None]
    return Progress(
        sent=sent,
        in_flight=sent - (len(records) - left),
        warm=warm,
        due=sum(due) if due else None,
    )


def _plan(lab: Lab, run_id: str, trial: Trial) -> TrialPlan:
    """What was played, as far as an exporter asks."""
    point = trial.point
    return TrialPlan(
        url="",
        arrival=point.load,
        requests=Path(),
        records=Path(),
        warmup_s=point.workload.warmup_s or lab.warmup_s,
        window_s=lab.window_s,
        timeout_s=lab.timeout_s,
        seed=lab.draw_seed(trial.repeat),
        lab=lab.name,
        variant=point.variant.name,
        run_id=run_id,
        workload=point.workload.name,
        slo_s=lab.slo.by_name(),
    )


def _end_s(record: RequestRecord) -> float:
    return record.end_s or record.sent_s


def _scrape(registry: CollectorRegistry, at_unix_s: float) -> Iterator[str]:
    """A registry's samples, with the time they were taken; the kinds of metric are not repeated."""
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    for line in text.decode().splitlines():
        if not line.startswith("#"):
            yield f"{line} {at_unix_s:.3f}"


def _figures(folder: RunFolder) -> Iterator[str]:
    run, summary = folder.run(), folder.summary()
    registry = CollectorRegistry()
    gauges = {name: Gauge(name, name, labels, registry=registry)
              for name, labels in _LABELS.items()}  # fmt: skip
    ended = _end_unix_s(_trials(folder))
    mine = {"lab": run.lab["name"], "run_id": folder.path.name, "machine": run.machine.slug}

    def put(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            gauges[name].labels(**mine, **labels).set(value)

    def put_interval(name: str, found: Interval | None, **labels: str) -> None:
        if found:
            for suffix, value in (("", found.value), ("_low", found.low), ("_high", found.high)):
                put(name + suffix, value, **labels)

    put(series.RUN_INFO, 1, **_about(folder, run))
    for key in summary.measurements:
        for metric in METRICS.values():
            if metric.exported:
                shown = summary.figure(key, metric.name)
                put_interval(series.MEASUREMENT, shown, **_point(key), metric=metric.name)
    for j in summary.judgements:
        claim = {"claim": j.claim, "title": j.title, "treatment": j.treatment,
                 "baseline": j.baseline}  # fmt: skip
        ratio = j.effect.ratio if j.effect else None
        put_interval(series.EFFECT, ratio, **claim, metric=j.metric)
        put(series.EFFECT_PREDICTED, j.prediction.value, **claim, metric=j.metric)
        put(series.VERDICT, ended, **claim, outcome=j.outcome, held=claim_held(j))
    for f in summary.forecasts:
        place = {**_point(f.point), "metric": f.metric}
        put(series.FORECAST, f.measured.value if f.measured else None, **place)
        put(series.FORECAST_PREDICTED, f.prediction.value, **place)
    for slo, value in run.rebuilt_lab().slo.by_name().items():
        put(series.SLO, value, slo=slo)
    yield from _scrape(registry, ended)


def _about(folder: RunFolder, run: Run) -> dict[str, str]:
    return {
        "described": run.machine.describe(),
        "model": run.model,
        "scale": run.scale,
        "quick": "yes" if run.quick else "no",
        "report": "/".join((*folder.path.parts[-3:], "report.md")),
    }


def _point(key: str) -> dict[str, str]:
    return dict(zip(("variant", "workload", "load"), key.split("/"), strict=True))
