"""Give findings, answers and plots their view of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from labs.harness.analysis.computed import Predictions, Summary
from labs.harness.analysis.measure import Trial
from labs.harness.analysis.metrics import METRICS, Repeats
from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.timeline import Timeline
from labs.harness.analysis.verdicts import (
    Caveat,
    Effect,
    ForecastAtPoint,
    Influences,
    Interval,
    Judgement,
    PredictionOutcome,
    Sampling,
    over_repeats,
    prediction_outcome,
)
from labs.harness.derived.design import sampling_of
from labs.harness.spec.lab import Lab, Point
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Context:
    """Gives findings a run; `values[point][repeat][metric]` holds the measurements."""

    folder: RunFolder
    run: Run
    lab: Lab
    points: list[Point]
    values: Mapping[str, Repeats]
    caveats: Sequence[Caveat] = ()
    influences: Mapping[str, Influences] = field(default_factory=dict)
    computed: dict[Callable[[Context], Any], Any] = field(
        default_factory=dict, init=False, compare=False
    )

    def once(self, compute: Callable[[Context], Facts]) -> Facts:
        """Computes a function of this run once, however many callers need it."""
        if compute not in self.computed:
            self.computed[compute] = compute(self)
        facts: Facts = self.computed[compute]
        return facts

    @property
    def sampling(self) -> Sampling:
        """Tells how the run's repeats came about."""
        return self.once(_sampling)

    @property
    def predictions(self) -> Predictions:
        """Returns what was written down before the engines started; empty without its file."""
        return self.once(_predictions)

    @property
    def played(self) -> Mapping[str, Timeline]:
        """Returns the kept play of each point in virtual time; none where none was kept."""
        forecasts = self.predictions.in_virtual_time
        return forecasts.timelines if forecasts else {}

    def finds(self, finding: str) -> bool:
        """Tells whether the lab has this finding here; random weights may leave it out."""
        return finding in self.lab.findings

    def quantity(self, point: Point | None, metric: str) -> Quantity:
        """Returns the metric over the repeats of a point, which may be none of this run's."""
        interval = self.interval(point, metric) if point else None
        return Quantity.of(interval, METRICS[metric].unit)

    def measured_ratio(
        self, treatment: Point | None, baseline: Point | None, metric: str
    ) -> Quantity:
        """Compares two points as a claim does, valid or not; missing without two points."""
        effect = None
        if treatment and baseline and treatment != baseline:
            effect = self.effect(treatment, baseline, metric)
        return Quantity.of(effect.ratio if effect else None, RATIO)

    def ratio_of(self, treatment: Point | None, baseline: Point | None, metric: str) -> Quantity:
        """Compares two points as a claim does; missing without both, or where it is not valid."""
        if treatment and baseline and self.withholds(metric, treatment, baseline):
            return Quantity.missing("not valid", RATIO)
        return self.measured_ratio(treatment, baseline, metric)

    def engine_mean(self, point: Point | None, histogram: str, unit: str) -> Quantity:
        """Returns the mean of what an engine counted in a histogram, over a point's trials."""
        histograms = [
            trial.engine.histograms[histogram]
            for trial in self.trials(point)
            if trial.engine and histogram in trial.engine.histograms
        ]
        count = sum(h.count for h in histograms)
        if not count:
            return Quantity.missing("the engine did not count it", unit)
        return Quantity(sum(h.sum for h in histograms) / count, unit)

    def foreseen(self, point: Point | None, metric: str) -> Quantity:
        """Returns what was forecast of a point before any engine started, without its band."""
        played = self.predictions.in_virtual_time
        band = played.points.get(point.key, {}).get(metric) if played and point else None
        return Quantity.given(band.value if band else None, METRICS[metric].unit, "not forecast")

    def predicted(self, name: str, unit: str = "1", scale: float = 1) -> Quantity:
        """Returns what was predicted by arithmetic under this name.

        `scale` is what the prediction has of its own unit in one of the given.
        """
        prediction = self.predictions.arithmetic.get(name)
        value = prediction.value / scale if prediction else None
        return Quantity.given(value, unit, "nothing was predicted")

    def outcome(self, name: str, measured: Interval | None) -> PredictionOutcome | None:
        """Says what became of that prediction by a 90% interval; None where there is none."""
        prediction = self.predictions.arithmetic.get(name)
        return prediction_outcome(prediction, measured) if prediction else None

    def trials(self, *points: Point | None) -> Iterator[Trial]:
        """Reads the trials of points, one after another, that did not fail."""
        there = [point for point in points if point]
        return (trial for _, _, trial in self.folder.trials(there, self.lab) if trial)

    def rows(self, point: Point) -> Collection[Mapping[str, float | None]]:
        """Returns the measurements of a point, one mapping a repeat."""
        return self.values.get(point.key, {}).values()

    def mean(self, point: Point, metric: str) -> float | None:
        """Averages the metric over the repeats that have it."""
        interval = self.interval(point, metric)
        return interval.value if interval else None

    def interval(self, point: Point, metric: str) -> Interval | None:
        """Averages the metric over the repeats that have it, with a 95% interval."""
        return over_repeats(self.values.get(point.key, {}), metric)

    def effect(self, treatment: Point, baseline: Point, metric: str) -> Effect | None:
        """Compares two points as a claim does: treatment / baseline; None without both."""
        return self.sampling.effect(self.values, (treatment.key, baseline.key), metric)

    def withholds(self, metric: str, *points: Point) -> bool:
        """Tells whether a caveat withholds verdicts on a metric at any of these points.

        An effect between them is then not valid: nothing is ranked, won or lost by it.
        """
        return any(c.hits(metric, *(p.key for p in points)) for c in self.caveats)

    def point(self, variant: str, workload: str, load: str) -> Point | None:
        wanted = (variant, workload, load)
        return next(
            (p for p in self.points if (p.variant.name, p.workload.name, str(p.load)) == wanted),
            None,
        )


def _sampling(context: Context) -> Sampling:
    sampling = sampling_of(context.folder, context.points, context.lab)
    return replace(sampling, influences=context.influences)


def _predictions(context: Context) -> Predictions:
    if context.folder.is_predicted:
        return context.folder.predictions()
    return Predictions(effects={}, forecasts={})


@dataclass(frozen=True, kw_only=True)
class JudgedRun(Context):
    """Adds the summary, which plots and the answers to the lab's questions read as well."""

    summary: Summary

    @classmethod
    def of(cls, context: Context, summary: Summary) -> JudgedRun:
        of_context = {f.name: getattr(context, f.name) for f in fields(context) if f.init}
        run = cls(**of_context, summary=summary)
        run.computed.update(context.computed)
        return run

    def forecast(self, point: Point, metric: str) -> ForecastAtPoint | None:
        """Returns the point's figure as it was forecast, with its band; None without a forecast."""
        known = {(f.point, f.metric): f for f in self.summary.in_virtual_time}
        return known.get((point.key, metric))

    def forecast_ratio(self, above: Point, below: Point, metric: str) -> float | None:
        """Divides two points' forecasts of a metric; None without both.

        It has no band: a machine that is faster than expected is so at both points.
        """
        top, bottom = self.forecast(above, metric), self.forecast(below, metric)
        return top.value / bottom.value if top and bottom and bottom.value else None

    def judged(self, claim: str) -> list[Judgement]:
        """Returns the valid judgements of a claim, one a pair of points."""
        return [j for j in self.summary.judgements if j.claim == claim and j.outcome != "not valid"]


def ratio_of_claim(summary: Summary, claim: str) -> Quantity:
    """Returns treatment / baseline at the first valid pair of a claim's points."""
    judged = [j for j in summary.judgements if j.claim == claim]
    valid = next((j.effect for j in judged if j.outcome != "not valid" and j.effect), None)
    why = judged[0].why if judged else "this run has no points for it"
    return Quantity.of(valid.ratio if valid else None, RATIO, why)
