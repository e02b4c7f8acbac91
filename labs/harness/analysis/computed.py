"""What is computed of a run: its predictions before it starts, its summary from its trials."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat

from labs.harness.analysis.machine_speed import MachineSpeed
from labs.harness.analysis.signals import Watch
from labs.harness.analysis.timeline import Timeline
from labs.harness.analysis.verdicts import (
    Caveat,
    ForecastAtPoint,
    ForecastResult,
    Interval,
    Judgement,
    figure,
    over_repeats,
)
from labs.harness.spec.lab import OF_FORECASTS, Claim, Prediction
from labs.harness.spec.names import PairName
from serving.engines.flags import FlagValue
from serving.hardware.reference_step import ReferenceStep
from serving.metrics import KvUse

AT = " at "  # between what a lab's arithmetic is of and at which size
SEARCH, TWO_ENGINES, DAYS = "search of settings", "two engines", "days"


class Band(BaseModel, frozen=True, extra="forbid"):
    """A forecast figure, and the bounds between which it is expected.

    The value is a mean over plays. There is no geometric mean where a play had 0, and in runs
    before it was introduced.
    """

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    geometric_mean: FiniteFloat | None = None


class Searched(BaseModel, frozen=True, extra="forbid"):
    """A point of which only a forecast is made: its flags, and its figures in one play."""

    flags: dict[str, FlagValue]
    figures: dict[str, FiniteFloat]  # by metric


class OnTwoEngines(BaseModel, frozen=True, extra="forbid"):
    """The forecast of a point's load on two engines of its kind, which no run measures.

    With a link one of them prefills, and hands keys and values over it to the other, which decodes.
    Without one each does both, and a request goes to the one with fewer outstanding.
    """

    point: str
    link_gbit_per_s: float | None
    bands: dict[str, Band] = {}  # by metric


class ScaledDay(BaseModel, frozen=True, extra="forbid"):
    """The forecast of a day on a number of engines that follows its load, which no run measures."""

    name: str  # of the rule
    start_s: float  # from the order of an engine until it serves
    requests: int
    late: float  # share of these that the SLO was not met for
    replicas: float  # mean over the day, those that start among them


class PointForecasts(BaseModel, frozen=True, extra="forbid"):
    """The forecasts of every point, from vLLM's own scheduler run in virtual time."""

    points: dict[str, dict[str, Band]]  # point -> metric
    # variant, point, SEARCH, TWO_ENGINES or DAYS -> why it has no forecast
    without: dict[str, str] = {}
    trial_s: dict[str, float] = {}  # point -> from a trial's start to its last answer
    copied: dict[str, Band] = {}  # point that copies -> share of its guesses accepted in a trial
    # point at which chance decides how much is found in the prefix cache -> the fewest tokens that
    # any trial has found there after its first request, its second ..; not in older runs
    least_found: Annotated[dict[str, tuple[int, ...]], Field(exclude_if=lambda f: not f)] = {}
    step_times: list[dict[str, Any]] = []  # the stand-in steps, as they were timed
    # of this machine's speed, by earlier runs: both ends of all bands, and more at a curve's points
    machine_spread: float = 1.0
    # point whose load rises -> repeat -> which signals see it coming, in virtual time
    watches: Annotated[dict[str, tuple[Watch, ...]], Field(exclude_if=lambda w: not w)] = {}
    # point that a plot shows over time -> its first play, with the requests of the first repeat
    timelines: Annotated[dict[str, Timeline], Field(exclude_if=lambda t: not t)] = {}
    # point -> mean and peak share of the KV cache, each the mean over its plays at the timed step
    kv_use: Annotated[dict[str, KvUse], Field(exclude_if=lambda use: not use)] = {}
    # settings among which the best are looked for, beside those that are measured
    searched: Annotated[tuple[Searched, ...], Field(exclude_if=lambda points: not points)] = ()
    # point -> `mean` and `peak` with their bands; in runs from before that kept them, none
    kv_bands: Annotated[dict[str, dict[str, Band]], Field(exclude_if=lambda bands: not bands)] = {}
    on_two: Annotated[tuple[OnTwoEngines, ...], Field(exclude_if=lambda two: not two)] = ()
    days: Annotated[tuple[ScaledDay, ...], Field(exclude_if=lambda days: not days)] = ()
    # points at which more arrives than is served, so that TTFT grows with the length of the run
    growing: Annotated[tuple[str, ...], Field(exclude_if=lambda points: not points)] = ()

    @property
    def references(self) -> list[ReferenceStep]:
        """The reference steps that were timed in turn with the stand-in; none in older runs."""
        timed = (step.get("reference") for step in self.step_times)
        return [ReferenceStep.model_validate(each) for each in timed if each]

    def ratio(self, metric: str, pair: PairName, of_means: bool = False) -> Prediction | None:
        """Predict the ratio of two points by their forecasts; None where either has none, or 0.

        A measured ratio is one of geometric means over repeats, and so is this one. It is one of
        arithmetic means where that is asked for, and where either point has no geometric mean.
        """
        bands = [self.points.get(key, {}).get(metric) for key in (pair.treatment, pair.baseline)]
        above, below = (band and band.value for band in bands)
        if not above or not below:
            return None
        geometric = [band and band.geometric_mean for band in bands]
        if not of_means and all(geometric):
            above, below = (mean or math.nan for mean in geometric)
        return Prediction(
            value=above / below,
            formula="forecast of the treatment / forecast of the baseline",
            assumptions=(
                "vLLM's own scheduler in virtual time, over a step timed on this machine"
                " beforehand",
            ),
            source=OF_FORECASTS,
        )


class Predictions(BaseModel, frozen=True, extra="forbid"):
    """The predictions of a run, written before its first engine starts.

    `effects[claim][pair]` is the ratio of two points' forecasts where both have one;
    `closed_forms` then holds the lab's own formula beside it. `forecasts[name][point]` are closed
    forms, most of them bounds. `in_virtual_time` holds every point's forecast; it is None in runs
    before it was introduced, and where none could be made. `arithmetic` is what findings are held
    against, by what it is of: `memory, untiled at 4096`.
    """

    effects: dict[str, dict[str, Prediction]]
    closed_forms: dict[str, dict[str, Prediction]] = {}
    forecasts: dict[str, dict[str, Prediction]]
    in_virtual_time: PointForecasts | None = None
    acceptance: dict[str, float] = {}  # point that guesses -> share accepted, if not `copied`
    arithmetic: dict[str, Prediction] = {}

    def of_means(self, claim: Claim, treatment: str, baseline: str) -> Prediction | None:
        """Return what a ratio of arithmetic means is held against, where forecasts predict it."""
        pair = PairName(treatment, baseline)
        ratio = self.effects[claim.name][str(pair)]
        if ratio.source != OF_FORECASTS or not self.in_virtual_time:
            return None
        return self.in_virtual_time.ratio(claim.metric, pair, of_means=True)


class Summary(BaseModel, frozen=True, extra="forbid"):
    """Everything that a report says, computed from the trials."""

    measurements: dict[str, dict[int, dict[str, float | None]]]
    pooled: dict[str, dict[str, float]]  # point -> percentile over the samples of all repeats
    judgements: list[Judgement]
    forecasts: list[ForecastResult]
    in_virtual_time: list[ForecastAtPoint] = []
    # point -> mean and peak share of the KV cache, each the mean over repeats, if it was forecast
    kv_use: Annotated[dict[str, KvUse], Field(exclude_if=lambda use: not use)] = {}
    # point -> repeat -> metric -> request: by how much it moves the figure's logarithm, where
    # requests of several engines took turns
    influences: Annotated[
        dict[str, dict[int, dict[str, dict[int, float]]]], Field(exclude_if=lambda of: not of)
    ] = {}
    # what the lab computes beyond its claims, as plain JSON of its dataclass; its page says it
    facts: Annotated[dict[str, Any], Field(exclude_if=lambda facts: not facts)] = {}
    machine_speed: MachineSpeed | None = None  # by the reference steps; None in older runs
    caveats: list[Caveat]
    failed: dict[str, str]
    missing: int  # trials that were never played
    measured_again: dict[str, list[str]] = {}  # trial -> why, for each attempt that was discarded

    def figure(self, point: str, metric: str) -> Interval | None:
        """Return a point's figure as the table of metrics wants it shown, or None without data."""
        return figure(self.measurements.get(point, {}), self.pooled.get(point, {}), metric)

    def value(self, point: str, metric: str) -> float | None:
        """Return a point's figure without its interval."""
        interval = self.figure(point, metric)
        return interval.value if interval else None

    def over_repeats(self, point: str, metric: str) -> Interval | None:
        """Compute the mean over a point's repeats with its interval, for percentiles too."""
        return over_repeats(self.measurements.get(point, {}), metric)
