"""Whether each cause was named from the metrics alone, and what TTFT and ITL are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from labs.diagnosis.lab import ALONE, INJECTED, REFERENCE, SIGNATURES, Direction, Figure
from labs.harness.analysis.diagnosis import (
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
from labs.harness.analysis.quantity import CHANGE, RATIO, Quantity
from labs.harness.derived.fits import polynomial
from labs.harness.derived.lab_modules import BlindTrial, Injections
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.tables import Row
from labs.harness.spec.lab import Point
from serving import metrics
from serving.simulator.step import Piece, Step, StepTimes
from serving.simulator.traffic import Delays

injections = Injections(INJECTED, REFERENCE, SIGNATURES)


def point_of(run: Context, variant: str, workload: str) -> Point | None:
    named = (p for p in run.points if (p.variant.name, p.workload.name) == (variant, workload))
    return next(named, None)


def readings(run: Context, variant: str, workload: str) -> dict[int, Reading]:
    """Read what the engine counted in each trial of a point, by its repeat."""
    point = point_of(run, variant, workload)
    return {
        result.repeat: Reading(trial.engine)
        for _, result, trial in run.folder.trials([point] if point else [], run.lab)
        if trial and trial.engine
    }


def pooled(of_trials: Mapping[int, Reading]) -> Reading | None:
    counted = [reading.counted for reading in of_trials.values()]
    return Reading(metrics.together(counted)) if counted else None


def healthy(run: Context) -> Reading | None:
    """Pool the trials of the reference; they are diagnosed against, and never diagnosed."""
    return pooled(readings(run, *REFERENCE))


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
    if (reference := run.once(healthy)) is None:
        return ToldApart(())
    named: list[Named] = []
    for (variant, workload), injected in INJECTED.items():
        found = {
            repeat: diagnosis(reading, reference)
            for repeat, reading in readings(run, variant, workload).items()
        }
        names = {repeat: of.cause if of else "too little" for repeat, of in found.items()}
        for name in dict.fromkeys(names.values()):
            repeats = tuple(repeat for repeat, given in names.items() if given == name)
            first = found[repeats[0]]
            symptoms, marks = (first.symptoms, first.marks) if first else ((), ())
            mark = marks[0] if marks else None
            named.append(Named(injected, name, repeats, len(found), symptoms, mark))
    name, metric = BUDGET_CLAIM
    changed_later = any(c.name == name and c.metric != metric for c in run.lab.claims)
    return ToldApart(tuple(named), changed_later)


def blind(run: Context) -> list[BlindTrial]:
    """Choose trials for a reader: the first with each cause, and those that were named wrongly."""
    if (reference := run.once(healthy)) is None:
        return []
    chosen: list[BlindTrial] = []
    for (variant, workload), cause in INJECTED.items():
        of_cause = readings(run, variant, workload)
        for repeat, now in of_cause.items():
            found = diagnosis(now, reference)
            if found and (repeat == min(of_cause) or found.cause != cause):
                chosen.append(BlindTrial(cause, now, reference, SIGNATURES[cause]))
    return chosen


def diagnosis(reading: Reading, reference: Reading) -> Diagnosis | None:
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
        by_cause = {row.injected: row for row in self.rows}
        wanted = [by_cause[c] for c in ("burst", "long neighbour", "cold cache") if c in by_cause]
        return [row for row in wanted if row.knows("TTFT", "Queue", "Prefill")]


def signatures(run: Context) -> Signatures:
    if (reference := run.once(healthy)) is None:
        return Signatures({}, ())
    rows = [
        Signature(injected, {name: moved(name, injected, now, reference) for name in FIGURES})
        for (variant, workload), injected in INJECTED.items()
        if (now := pooled(readings(run, variant, workload)))
    ]
    return Signatures({name: of.level(reference) for name, of in FIGURES.items()}, tuple(rows))


def moved(name: Figure, injected: str, now: Reading, reference: Reading) -> Moved | None:
    found = FIGURES[name].moved(now, reference)
    return Moved(*found, SIGNATURES[injected].get(name)) if found else None


Found = tuple[Level, Direction] | None
"""What a figure is and how it moved; None where it, or the healthy one, lacks it."""


def level(value: float | None, unit: str) -> Level:
    return Level(Quantity.given(value, unit, "not counted"))


def direction(of: float, more: float, less: float) -> Direction:
    """Say which of two bounds a figure is beyond."""
    return "rises" if of > more else "falls" if of < less else "stays"


def step(more: float, least: float) -> Direction:
    return "rises" if more >= least else "falls" if more <= -least else "stays"


@dataclass(frozen=True)
class Counted:
    """A figure that moves by a factor, or by a `least` step where that is given."""

    of: Callable[[Reading], float | None]
    unit: str
    least: float | None = None

    def level(self, reading: Reading) -> Level:
        return level(self.of(reading), self.unit)

    def moved(self, now: Reading, healthy: Reading) -> Found:
        after, before = self.of(now), self.of(healthy)
        if after is None or before is None:
            return None
        if self.least is not None:
            return level(after, self.unit), step(after - before, self.least)
        if not before:
            return None
        ratio = after / before
        return level(ratio, RATIO), direction(ratio, SLOWER_TOKEN, 1 / SLOWER_TOKEN)


class Queue(Counted):
    """Its step is beside the healthy TTFT: any queue is many times as long as next to none."""

    def moved(self, now: Reading, healthy: Reading) -> Found:
        if now.queue_s is None or healthy.queue_s is None:
            return None
        share = (now.queue_s - healthy.queue_s) / (healthy.ttft_s or math.inf)
        return level(now.queue_s, "s"), direction(share, SLOWER_TOKEN - 1, 1 - SLOWER_TOKEN)


class LongGaps(Counted):
    def moved(self, now: Reading, healthy: Reading) -> Found:
        more = more_long_gaps(now, healthy)
        return None if more is None else (level(more, CHANGE), step(more, MORE_LONG_GAPS))


class LongestPrompt:
    """The bucket in which the longest prompt lies."""

    def level(self, reading: Reading) -> Level:
        if reading.longest_prompt_tokens is None:
            return level(None, "1")
        low, high = reading.longest_prompt_tokens
        missing = Quantity.missing("the last bucket has no end")
        return Level(Quantity(low), missing if math.isinf(high) else Quantity(high))

    def moved(self, now: Reading, healthy: Reading) -> Found:
        longest, usual = now.longest_prompt_tokens, healthy.longest_prompt_tokens
        if longest is None or usual is None:
            return None
        higher, lower = longest[0] >= usual[1], longest[1] <= usual[0]
        return self.level(now), "rises" if higher else "falls" if lower else "stays"


FIGURES: Mapping[Figure, Counted | LongestPrompt] = {
    "TTFT": Counted(lambda reading: reading.ttft_s, "s"),
    "Queue": Queue(lambda reading: reading.queue_s, "s"),
    "Prefill": Counted(lambda reading: reading.prefill_s, "s"),
    "TPOT": Counted(lambda reading: reading.tpot_s, "s"),
    "Long gaps": LongGaps(lambda reading: reading.long_gap_s, "s"),  # p99, at most
    "Hit rate": Counted(lambda reading: reading.hit_rate, "share", HITS_LOST),
    "Preemptions": Counted(lambda reading: reading.preemptions, "1", PREEMPTED),
    "Longest prompt": LongestPrompt(),
}

# ------------------------------------------------------------- what clients saw of each cause

USUAL = ("healthy", "usual")
MAY_SLOW = (
    "slow step", "long context", "cold cache", "long neighbour", "large budget", "speculation",
)  # fmt: skip
"""Causes that may make tokens slower, in the order in which they are told."""
SEEN = {"tpot": "tpot_mean_s", "ttft": "ttft_mean_s"}


def seen_by_clients(run: Context) -> tuple[Row, ...]:
    """Compare what clients saw of each cause that may make tokens slower; of valid ratios alone.

    They are multiples of the usual load's in the measured windows, as the claims compare the same
    points. The signatures are the engine's own counts, of whole trials and of every request, a
    neighbour's long ones among them.
    """
    usual = point_of(run, *USUAL)
    points = {cause: point_of(run, *at) for at, cause in INJECTED.items()}
    seen = [
        Row(cause, {name: run.ratio_of(points[cause], usual, m) for name, m in SEEN.items()})
        for cause in MAY_SLOW
    ]
    return tuple(of for of in seen if of["tpot"].known)


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
        fit(times.ttft, 2, times.forecast_ttft), fit(times.itl, 1, times.forecast_itl)
    )


def alone(run: Context) -> AloneTimes:
    """Read the requests that were alone. Each is one point, its ITL the mean over its tokens."""
    requests = [r for t in run.trials(point_of(run, *ALONE)) for r in t.measured_requests]
    delays_s = Delays().request_s + Delays().response_s
    first = [(float(r.prompt_tokens), r.ttft_s) for r in requests if r.prompt_tokens and r.ttft_s]
    later = [
        (r.prompt_tokens + (r.output_tokens or 0) / 2, r.tpot_s)
        for r in requests
        if r.prompt_tokens and r.tpot_s
    ]
    return AloneTimes(
        first,
        later,
        stepped(run, [(n, Piece(round(n), 0)) for n, _ in first], outside_s=delays_s),
        stepped(run, [(n, Piece(1, round(n))) for n, _ in later]),
    )


def stepped(run: Context, pieces: Sequence[tuple[float, Piece]], outside_s: float = 0) -> Times:
    """Time the stand-in step that was timed before any engine started, of one piece each."""
    forecasts = run.predictions.in_virtual_time
    if not forecasts or not forecasts.step_times:
        return ()
    times = StepTimes.model_validate(forecasts.step_times[0])
    return [(n, times.seconds(Step((piece,), rows=1)) + outside_s) for n, piece in pieces]


def fit(measured: Times, degree: int, forecast: Times) -> Fit | None:
    """Fit a polynomial; None with fewer than two points more than it has coefficients.

    The spread grows with the time, so the fit weighs each by the inverse of its own.
    """
    if len({tokens for tokens, _ in measured}) < degree + 3:
        return None
    estimates = polynomial(measured, degree)
    expected = polynomial(forecast, degree) if forecast else None
    if estimates is None:
        return None
    coefficients = []
    for power, (unit, seconds) in enumerate(UNITS[: degree + 1]):
        foreseen = expected[power].value / seconds if expected else None
        coefficients.append(
            Coefficient(
                estimates[power].times(1 / seconds).quantity(unit),
                Quantity.given(foreseen, unit, "no step was timed"),
            )
        )
    return Fit(tuple(coefficients), max(tokens for tokens, _ in measured))


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Facts:
    told_apart: ToldApart | None
    signatures: Signatures | None
    coefficients: Coefficients | None
    clients: tuple[Row, ...] = ()  # by their cause

    @property
    def slower(self) -> list[Row]:
        """Those whose interval says that a token took longer."""
        return [of for of in self.clients if (of["tpot"].low or 0) > 1]

    @property
    def not_slower(self) -> list[Row]:
        """Those with which no token was seen to take longer."""
        return [of for of in self.clients if of not in self.slower]


def facts(run: JudgedRun) -> Facts:
    return Facts(
        told_apart(run) if run.finds("told-apart") else None,
        signatures(run) if run.finds("signatures") else None,
        coefficients(run) if run.finds("coefficients") else None,
        seen_by_clients(run),
    )
