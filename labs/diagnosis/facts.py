"""Whether each cause was named from the metrics alone, and what TTFT and ITL are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from labs.diagnosis.lab import ALONE, INJECTED, REFERENCE, SIGNATURES, Direction, Figure
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.judging.diagnosis import (
    BUDGET_CLAIM,
    HITS_LOST,
    MORE_LONG_GAPS,
    PREEMPTED,
    SLOWER_TOKEN,
    Diagnosis,
    Mark,
    Reading,
    Symptom,
    TooLittle,
    diagnose,
    more_long_gaps,
)
from labs.harness.judging.quantity import CHANGE, RATIO, Quantity
from labs.harness.spec import Point
from loadtests.records import RequestRecord
from serving import metrics
from serving.forecasting.step import Piece, Step, StepTimes
from serving.forecasting.traffic import Delays


def point_of(run: Context, variant: str, workload: str) -> Point | None:
    named = (p for p in run.points if (p.variant.name, p.workload.name) == (variant, workload))
    return next(named, None)


def _readings(run: Context, variant: str, workload: str) -> list[tuple[int, Reading]]:
    """Read what the engine counted in each trial of a point, by its repeat."""
    point = point_of(run, variant, workload)
    return [
        (result.repeat, Reading(trial.engine))
        for _, result, trial in run.folder.trials([point] if point else [], run.lab)
        if trial and trial.engine
    ]


def _pooled(readings: Iterable[tuple[int, Reading]]) -> Reading | None:
    counted = [reading.counted for _, reading in readings]
    return Reading(metrics.together(counted)) if counted else None


def _healthy(run: Context) -> Reading | None:
    """Pool the trials of the reference; they are diagnosed against, and never diagnosed."""
    return _pooled(_readings(run, *REFERENCE))


# ------------------------------------------------------------------------- each trial, blind


@dataclass(frozen=True)
class Named:
    """The trials with one cause that were given the same name, from their metrics alone."""

    injected: str  # the cause
    named: str
    repeats: tuple[int, ...]
    trials: int  # with that cause
    # of the first of them: what became worse, and by which figures the rule named it
    symptoms: tuple[Symptom, ...]
    mark: Mark | None

    @property
    def is_right(self) -> bool:
        return self.named == self.injected


@dataclass(frozen=True)
class ToldApart:
    """What every trial was named, blind."""

    named: tuple[Named, ...]
    mark_changed_later: bool = False  # that of a large token budget, after this run

    @property
    def trials(self) -> int:
        return sum(len(of.repeats) for of in self.named)

    @property
    def right(self) -> int:
        return sum(len(of.repeats) for of in self.named if of.is_right)

    @property
    def wrong(self) -> list[Named]:
        return [of for of in self.named if not of.is_right]

    @property
    def names(self) -> list[str]:
        """The names that were given, in the order of the causes."""
        given = [of.named for of in self.named]
        return [name for name in dict.fromkeys((*INJECTED.values(), *given)) if name in given]

    @property
    def matrix(self) -> dict[str, list[int | None]]:
        """By what was wrong, how many trials were given each name; None for none."""
        trials = {(of.injected, of.named): len(of.repeats) for of in self.named}
        injected = dict.fromkeys(of.injected for of in self.named)
        return {cause: [trials.get((cause, name)) for name in self.names] for cause in injected}


def told_apart(run: Context) -> ToldApart:
    """Diagnose every trial but those of the reference, each beside the pooled reference."""
    if (reference := run.once(_healthy)) is None:
        return ToldApart(())
    named = [
        named
        for (variant, workload), injected in INJECTED.items()
        for named in _named(injected, _readings(run, variant, workload), reference)
    ]
    name, metric = BUDGET_CLAIM
    changed_later = any(c.name == name and c.metric != metric for c in run.lab.claims)
    return ToldApart(tuple(named), changed_later)


def _named(
    injected: str, readings: Sequence[tuple[int, Reading]], reference: Reading
) -> list[Named]:
    found = {repeat: _diagnosis(reading, reference) for repeat, reading in readings}
    by_name: dict[str, list[int]] = {}
    for repeat, diagnosis in found.items():
        by_name.setdefault(diagnosis.cause if diagnosis else "too little", []).append(repeat)
    return [
        _first_named(injected, name, repeats, len(found), found[repeats[0]])
        for name, repeats in by_name.items()
    ]


def _first_named(
    injected: str, name: str, repeats: Sequence[int], trials: int, first: Diagnosis | None
) -> Named:
    symptoms, marks = (first.symptoms, first.marks) if first else ((), ())
    return Named(injected, name, tuple(repeats), trials, symptoms, marks[0] if marks else None)


def _diagnosis(reading: Reading, reference: Reading) -> Diagnosis | None:
    try:
        return diagnose(reading, reference)
    except TooLittle:
        return None


# ---------------------------------------------------------------------------- the signatures


@dataclass(frozen=True)
class Level:
    """A figure, or the bucket of a histogram in which it lies."""

    value: Quantity  # of a bucket, its lower end
    end: Quantity | None = None  # of a bucket, its upper end; missing where it has none

    @property
    def kind(self) -> Literal["figure", "bucket", "last bucket"]:
        if self.end is None:
            return "figure"
        return "bucket" if self.end.known else "last bucket"


@dataclass(frozen=True)
class Moved:
    """How one of the engine's figures moved under a disturbance."""

    level: Level
    moved: Direction
    predicted: Direction | None  # None where nothing was predicted of it

    @property
    def is_unforeseen(self) -> bool:
        return self.predicted not in (None, self.moved)


@dataclass(frozen=True)
class Signature:
    """How the figures moved under one disturbance, over all its trials; None: unknown."""

    injected: str
    figures: dict[Figure, Moved | None]

    def knows(self, *figures: Figure) -> bool:
        return all(self.figures[name] for name in figures)


@dataclass(frozen=True)
class Signatures:
    """The healthy figures, and how they moved under every disturbance."""

    healthy: dict[Figure, Level]
    rows: tuple[Signature, ...]

    @property
    def predicted(self) -> int:
        """How many directions were predicted, of figures that are known."""
        return sum(moved.predicted is not None for moved in self._moved)

    @property
    def seen(self) -> int:
        """How many of the predicted directions were seen."""
        return self.predicted - sum(moved.is_unforeseen for moved in self._moved)

    @property
    def _moved(self) -> list[Moved]:
        return [moved for row in self.rows for moved in row.figures.values() if moved]

    @property
    def late(self) -> list[Signature]:
        """Those of causes that make first tokens late."""
        wanted = ("burst", "long neighbour", "cold cache")
        return [r for r in self._of(wanted) if r.knows("TTFT", "Queue", "Prefill")]

    @property
    def slow(self) -> list[Signature]:
        """Those of causes that may make tokens slower."""
        wanted = ("slow step", "large budget", "speculation", "long context")
        return [r for r in self._of(wanted) if r.knows("TPOT", "Long gaps", "Prefill")]

    def _of(self, causes: Sequence[str]) -> list[Signature]:
        by_cause = {row.injected: row for row in self.rows}
        return [by_cause[cause] for cause in causes if cause in by_cause]


def signatures(run: Context) -> Signatures:
    if (reference := run.once(_healthy)) is None:
        return Signatures({}, ())
    pooled = {
        injected: _pooled(_readings(run, variant, workload))
        for (variant, workload), injected in INJECTED.items()
    }
    rows = (_signature(injected, now, reference) for injected, now in pooled.items() if now)
    return Signatures(_levels(reference), tuple(rows))


def _levels(reading: Reading) -> dict[Figure, Level]:
    return {
        "TTFT": _level(reading.ttft_s, "s"),
        "Queue": _level(reading.queue_s, "s"),
        "Prefill": _level(reading.prefill_s, "s"),
        "TPOT": _level(reading.tpot_s, "s"),
        "Long gaps": _level(reading.long_gap_s, "s"),  # p99, at most
        "Hit rate": _level(reading.hit_rate, "share"),
        "Preemptions": _level(reading.preemptions, "1"),
        "Longest prompt": _bucket(reading.longest_prompt_tokens),
    }


def _level(value: float | None, unit: str) -> Level:
    return Level(Quantity(value, unit, why="" if value is not None else "not counted"))


def _bucket(bounds: tuple[float, float] | None) -> Level:
    if bounds is None:
        return _level(None, "1")
    low, high = bounds
    missing = Quantity.missing("the last bucket has no end")
    return Level(Quantity(low), missing if math.isinf(high) else Quantity(high))


def _signature(injected: str, now: Reading, reference: Reading) -> Signature:
    moved: dict[Figure, Moved | None] = {}
    for name, compare in FIGURES.items():
        found = compare(now, reference)
        moved[name] = Moved(*found, SIGNATURES[injected].get(name)) if found else None
    return Signature(injected, moved)


Compare = Callable[[Reading, Reading], tuple[Level, Direction] | None]
"""Says what a figure is and how it moved, now and healthy; None where either lacks it."""


def _as_multiple(of: Callable[[Reading], float | None]) -> Compare:
    def compare(now: Reading, healthy: Reading) -> tuple[Level, Direction] | None:
        after, before = of(now), of(healthy)
        if after is None or not before:
            return None
        return _level(after / before, RATIO), _direction(after / before)

    return compare


def _direction(ratio: float) -> Direction:
    return "rises" if ratio > SLOWER_TOKEN else "falls" if ratio < 1 / SLOWER_TOKEN else "stays"


def _queue(now: Reading, healthy: Reading) -> tuple[Level, Direction] | None:
    """Compare a queue with the healthy TTFT: any is many times as long as next to none."""
    if now.queue_s is None or healthy.queue_s is None:
        return None
    share = (now.queue_s - healthy.queue_s) / (healthy.ttft_s or math.inf)
    return _level(now.queue_s, "s"), _direction(1 + share if share >= 0 else 1 / (1 - share))


def _long_gaps(now: Reading, healthy: Reading) -> tuple[Level, Direction] | None:
    more = more_long_gaps(now, healthy)
    return None if more is None else (_level(more, CHANGE), _step(more, MORE_LONG_GAPS))


def _as_is(of: Callable[[Reading], float | None], unit: str, step: float) -> Compare:
    def compare(now: Reading, healthy: Reading) -> tuple[Level, Direction] | None:
        after, before = of(now), of(healthy)
        if after is None or before is None:
            return None
        return _level(after, unit), _step(after - before, step)

    return compare


def _step(more: float, step: float) -> Direction:
    return "rises" if more >= step else "falls" if more <= -step else "stays"


def _longest_prompt(now: Reading, healthy: Reading) -> tuple[Level, Direction] | None:
    longest, usual = now.longest_prompt_tokens, healthy.longest_prompt_tokens
    if longest is None or usual is None:
        return None
    higher, lower = longest[0] >= usual[1], longest[1] <= usual[0]
    return _bucket(longest), "rises" if higher else "falls" if lower else "stays"


FIGURES: Mapping[Figure, Compare] = {
    "TTFT": _as_multiple(lambda reading: reading.ttft_s),
    "Queue": _queue,
    "Prefill": _as_multiple(lambda reading: reading.prefill_s),
    "TPOT": _as_multiple(lambda reading: reading.tpot_s),
    "Long gaps": _long_gaps,
    "Hit rate": _as_is(lambda reading: reading.hit_rate, "share", HITS_LOST),
    "Preemptions": _as_is(lambda reading: reading.preemptions, "1", PREEMPTED),
    "Longest prompt": _longest_prompt,
}

# ------------------------------------------------------------- what TTFT and ITL are made of

UNITS = (("s", 1.0), ("µs", 1e-6), ("ns", 1e-9))
"""The units of the coefficients of tokens^0, tokens^1 and tokens^2, and their seconds."""


@dataclass(frozen=True)
class Coefficient:
    """A fitted coefficient, and that of the same fit to the forecast's step."""

    measured: Quantity
    forecast: Quantity

    @property
    def is_known(self) -> bool:
        """Whether its interval excludes 0."""
        low, high = self.measured.low, self.measured.high
        return low is not None and high is not None and (low > 0 or high < 0)


@dataclass(frozen=True)
class Fit:
    """A polynomial through measured times: the coefficients in s, in µs a token, in ns a pair."""

    coefficients: tuple[Coefficient, ...]
    longest: float  # tokens

    @property
    def parts(self) -> list[Quantity]:
        """What each term takes at the most tokens."""
        return self._parts(self.longest)

    @property
    def takes(self) -> Quantity:
        """What all terms take at the most tokens."""
        return sum(self.parts, Quantity(0.0, "s"))

    def at(self, tokens: float) -> float:
        """Return the seconds of the fit."""
        return sum(part.value or 0.0 for part in self._parts(tokens))

    def _parts(self, tokens: float) -> list[Quantity]:
        return [
            (coefficient.measured * (seconds * tokens**power)).in_unit("s")
            for power, (coefficient, (_, seconds)) in enumerate(
                zip(self.coefficients, UNITS, strict=False)
            )
        ]


@dataclass(frozen=True)
class Coefficients:
    """TTFT over the prompt and ITL over the context, of one request at a time."""

    ttft: Fit | None
    itl: Fit | None


Times = Sequence[tuple[float, float]]  # (tokens, seconds)


@dataclass(frozen=True)
class AloneTimes:
    """The times of requests that were alone, and those of the forecast's step at these lengths."""

    ttft: Times
    itl: Times
    forecast_ttft: Times  # empty where no step was timed
    forecast_itl: Times


def coefficients(run: Context) -> Coefficients:
    """Fit TTFT = a + b N + c N^2 and ITL = a + b C to the requests that were alone."""
    times = run.once(alone)
    return Coefficients(
        _fit(times.ttft, 2, times.forecast_ttft), _fit(times.itl, 1, times.forecast_itl)
    )


def alone(run: Context) -> AloneTimes:
    """Read the requests that were alone. Each is one point, its ITL the mean over its tokens."""
    point = point_of(run, *ALONE)
    trials = run.folder.trials([point] if point else [], run.lab)
    requests = [r for _, _, trial in trials if trial for r in trial.measured_requests]
    ttft = [(float(r.prompt_tokens), r.ttft_s) for r in requests if r.prompt_tokens and r.ttft_s]
    itl = [(_context(r), r.tpot_s) for r in requests if r.prompt_tokens and r.tpot_s]
    step = _forecast_step(run)
    return AloneTimes(
        ttft,
        itl,
        [(tokens, _first_token_s(step, tokens)) for tokens, _ in ttft] if step else (),
        [(tokens, _token_s(step, tokens)) for tokens, _ in itl] if step else (),
    )


def _context(request: RequestRecord) -> float:
    return (request.prompt_tokens or 0) + (request.output_tokens or 0) / 2


def _forecast_step(run: Context) -> StepTimes | None:
    """Read the stand-in step that was timed before any engine started."""
    forecasts = run.predictions.in_virtual_time
    plain = next(iter(forecasts.step_times), None) if forecasts else None
    return StepTimes.model_validate(plain) if plain else None


def _first_token_s(step: StepTimes, tokens: float) -> float:
    delays = Delays()
    outside_s = delays.request_s + delays.response_s
    return step.seconds(Step((Piece(round(tokens), 0),), rows=1)) + outside_s


def _token_s(step: StepTimes, tokens: float) -> float:
    return step.seconds(Step((Piece(1, round(tokens)),), rows=1))


def _fit(measured: Times, degree: int, forecast: Times) -> Fit | None:
    """Fit a polynomial; None with fewer than two points more than it has coefficients.

    The spread grows with the time, so the fit weighs each by the inverse of its own.
    """
    if len({tokens for tokens, _ in measured}) < degree + 3:
        return None
    estimates, covariance = _least_squares(measured, degree)
    quantile = float(scipy.stats.t.ppf(0.975, len(measured) - degree - 1))
    reach = quantile * np.sqrt(np.diag(covariance))
    expected = _least_squares(forecast, degree)[0] if forecast else None
    coefficients = tuple(
        Coefficient(
            Quantity(
                float(estimates[i]) / seconds,
                unit,
                float(estimates[i] - reach[i]) / seconds,
                float(estimates[i] + reach[i]) / seconds,
            ),
            Quantity.missing("no step was timed", unit)
            if expected is None
            else Quantity(float(expected[i]) / seconds, unit),
        )
        for i, (unit, seconds) in enumerate(UNITS[: degree + 1])
    )
    return Fit(coefficients, max(tokens for tokens, _ in measured))


def _least_squares(points: Times, degree: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coefficients, the constant first, and their covariance."""
    x, y = (np.array(column, float) for column in zip(*points, strict=True))
    scale = float(x.max()) or 1.0  # so that powers of thousands do not lose digits
    design = np.vander(x / scale, degree + 1, increasing=True) / y[:, None]
    estimates, *_ = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)
    rest = 1 - design @ estimates
    variance = float(rest @ rest) / max(1, len(y) - degree - 1)
    covariance = variance * np.linalg.pinv(design.T @ design)
    powers = scale ** np.arange(degree + 1)
    return estimates / powers, covariance / np.outer(powers, powers)


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Facts:
    told_apart: ToldApart | None
    signatures: Signatures | None
    coefficients: Coefficients | None


def facts(run: JudgedRun) -> Facts:
    return Facts(
        told_apart(run) if run.finds("told-apart") else None,
        signatures(run) if run.finds("signatures") else None,
        coefficients(run) if run.finds("coefficients") else None,
    )
