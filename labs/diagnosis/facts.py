"""Tell whether each cause was named from the metrics alone, and what TTFT and ITL are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from dashboards.palette import BLUE, BOUND
from labs.diagnosis.lab import ALONE, INJECTED, REFERENCE, SIGNATURES, Direction, Figure
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import plt
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.filing.results import Finding
from labs.harness.judging.diagnosis import (
    BUDGET_MARK_SINCE,
    HITS_LOST,
    MORE_LONG_GAPS,
    PREEMPTED,
    SLOWER_TOKEN,
    Diagnosis,
    Reading,
    TooLittle,
    diagnose,
    more_long_gaps,
)
from labs.harness.judging.text import number
from labs.harness.spec import Point
from serving import metrics
from serving.forecasting.step import Piece, Step, StepTimes
from serving.forecasting.traffic import Delays

TITLES = {
    "healthy": "nothing", "burst": "a burst", "cold cache": "a cold cache",
    "long neighbour": "a neighbour's long prompt", "long context": "a long context",
    "preemption": "preemption", "large budget": "a large token budget",
    "speculation": "speculation under load", "more requests at once": "more requests at once",
    "slow step": "a slower step",
    "unknown": "no cause", "cannot be told": "not to be told", "too little": "too few requests",
}  # fmt: skip
"""The causes in words; `unknown` is what the rule says of a symptom without any mark."""

CAUSES = TITLES | {"healthy": "a healthy engine"}
"""The causes in a sentence about what a trial was taken for."""

NOT_NAMED = {
    "unknown": "noticed without its cause",
    "cannot be told": "left without a name, as its engine lacked figures,",
    "too little": "left without a name, as it had too few requests,",
}
"""What became of a trial that was given no name."""


def _point_of(context: Context, variant: str, workload: str) -> Point | None:
    named = (p for p in context.points if (p.variant.name, p.workload.name) == (variant, workload))
    return next(named, None)


def _readings(context: Context, point: Point | None) -> list[tuple[int, Reading]]:
    """Read what the engine counted in each trial of a point, by its repeat."""
    if point is None:
        return []
    return [
        (result.repeat, Reading(trial.engine))
        for _, result, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine
    ]


def _pooled(readings: Iterable[tuple[int, Reading]]) -> Reading | None:
    counted = [reading.counted for _, reading in readings]
    return Reading(metrics.together(counted)) if counted else None


def healthy(context: Context) -> Reading | None:
    """Pool the trials of the reference; they are diagnosed against, and never diagnosed."""
    return _pooled(_readings(context, _point_of(context, *REFERENCE)))


# ------------------------------------------------------------------------- each trial, blind


@dataclass(frozen=True)
class Blind:
    """Holds a trial that was diagnosed from its metrics alone, and what was wrong with it."""

    injected: str
    repeat: int
    named: str
    also: tuple[str, ...]  # other causes to which its metrics pointed
    why: str  # the evidence; empty where nothing pointed to anything

    @property
    def right(self) -> bool:
        return self.named == self.injected


@dataclass(frozen=True)
class BlindDiagnoses:
    """Holds every trial that was diagnosed."""

    trials: tuple[Blind, ...]
    mark_changed_later: bool = False  # that of a large token budget, after this run

    @property
    def right(self) -> int:
        return sum(t.right for t in self.trials)

    @property
    def injected(self) -> list[str]:
        return [
            cause for cause in INJECTED.values() if any(t.injected == cause for t in self.trials)
        ]

    def count(self, injected: str) -> Counter[str]:
        return Counter(t.named for t in self.trials if t.injected == injected)


def blind_diagnoses(context: Context) -> BlindDiagnoses:
    """Diagnoses every trial but those of the reference, each beside the pooled reference."""
    reference = context.once(healthy)
    if reference is None:
        return BlindDiagnoses(())
    return BlindDiagnoses(
        tuple(
            _blind_diagnosis(injected, repeat, reading, reference)
            for (variant, workload), injected in INJECTED.items()
            for repeat, reading in _readings(context, _point_of(context, variant, workload))
        ),
        context.run.started_at < BUDGET_MARK_SINCE,
    )


def _blind_diagnosis(injected: str, repeat: int, reading: Reading, reference: Reading) -> Blind:
    try:
        diagnosis: Diagnosis = diagnose(reading, reference)
    except TooLittle as reason:
        return Blind(injected, repeat, "too little", (), str(reason))
    return Blind(
        injected,
        repeat,
        diagnosis.cause,
        tuple(mark.cause for mark in diagnosis.marks[1:]),
        diagnosis.marks[0].evidence if diagnosis.marks else "; ".join(diagnosis.symptoms),
    )


def tell_blind_diagnoses(facts: BlindDiagnoses) -> Finding:
    """Shows the confusion matrix, and the evidence of each trial that was named otherwise."""
    title = "Are the causes told apart from the metrics alone?"
    if not facts.trials:
        return Finding(title=title, lines=["No trial could be diagnosed."])
    named = [c for c in TITLES if any(t.named == c for t in facts.trials)]
    exception = (
        ", but for the mark of a large token budget, which was changed after this run"
        if facts.mark_changed_later
        else ""
    )
    rows = [["What was wrong", *(f"Named: {TITLES[c]}" for c in named)]]
    for injected in facts.injected:
        count = facts.count(injected)
        rows.append([TITLES[injected], *(str(count[c]) if count[c] else "·" for c in named)])
    lines = [
        f"{facts.right} of {len(facts.trials)} trials were named rightly, each from what its engine"
        " counted, beside the trials of the reference. The rule and its thresholds were written"
        f" before (`labs/harness/judging/diagnosis.py`){exception}."
    ]
    for injected, named_otherwise in dict.fromkeys(
        (t.injected, t.named) for t in facts.trials if not t.right
    ):
        alike = [t for t in facts.trials if (t.injected, t.named) == (injected, named_otherwise)]
        repeats = f"repeat{'s' * (len(alike) > 1)} {', '.join(str(t.repeat) for t in alike)}"
        why = alike[0].why or "nothing was worse by more than the thresholds"
        lines.append(
            f"*{TITLES[injected]}* ({repeats}) was named *{TITLES[named_otherwise]}*: {why}."
        )
    lines += [
        f"*{TITLES[injected]}* was named rightly (repeat {t.repeat}): {t.why}."
        for injected in facts.injected
        if (t := next((t for t in facts.trials if t.injected == injected and t.right), None))
        and t.why
    ]
    return Finding(title=title, rows=rows, lines=lines)


TOLD_APART = Conclusion("told-apart", blind_diagnoses, tell_blind_diagnoses)

# ---------------------------------------------------------------------------- the signatures

SIGN: dict[Direction, str] = {"rises": "↑", "falls": "↓", "stays": "="}
FIGURES: tuple[Figure, ...] = (
    "TTFT", "Queue", "Prefill", "TPOT", "Long gaps", "Hit rate", "Preemptions", "Longest prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """Holds how one of the engine's figures moved under a disturbance."""

    text: str
    ratio: float | None  # now / healthy, of a time
    moved: Direction
    predicted: Direction | None  # None where nothing was predicted of it

    @property
    def as_predicted(self) -> bool | None:
        return None if self.predicted is None else self.moved == self.predicted


@dataclass(frozen=True)
class Signature:
    """Holds how the figures moved under one disturbance, over all its trials; None: unknown."""

    injected: str
    figures: dict[Figure, Moved | None]


@dataclass(frozen=True)
class Signatures:
    """Holds the healthy figures and every disturbance's signature."""

    healthy: dict[Figure, str]
    rows: tuple[Signature, ...]

    @property
    def directions_as_predicted(self) -> list[bool]:
        """Whether each predicted direction was seen."""
        cells = (cell for row in self.rows for cell in row.figures.values() if cell)
        return [cell.as_predicted for cell in cells if cell.as_predicted is not None]


def signatures(context: Context) -> Signatures:
    reference = context.once(healthy)
    if reference is None:
        return Signatures({}, ())
    rows = []
    for (variant, workload), injected in INJECTED.items():
        now = _pooled(_readings(context, _point_of(context, variant, workload)))
        if now:
            predicted = SIGNATURES[injected]
            rows.append(
                Signature(
                    injected,
                    {name: _moved(name, now, reference, predicted.get(name)) for name in FIGURES},
                )
            )
    return Signatures({name: _figure(name, reference) for name in FIGURES}, tuple(rows))


def _figure(name: Figure, reading: Reading) -> str:
    times_s = _times_of(reading)
    if name in times_s:
        return number(times_s[name], "s")
    if name == "Long gaps":
        long_s = reading.long_gap_s
        return "–" if long_s is None else f"p99 at most {number(long_s, 's')}"
    if name == "Hit rate":
        return number(reading.hit_rate, "share")
    if name == "Preemptions":
        return number(reading.preemptions)
    longest = reading.longest_prompt_tokens
    return "–" if longest is None else _bucket(longest)


def _bucket(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"over {low:,.0f}" if math.isinf(high) else f"{low:,.0f} to {high:,.0f}"


def _times_of(reading: Reading) -> dict[Figure, float | None]:
    return {
        "TTFT": reading.ttft_s,
        "Queue": reading.queue_s,
        "Prefill": reading.prefill_s,
        "TPOT": reading.tpot_s,
    }


def _moved(
    name: Figure, now: Reading, reference: Reading, predicted: Direction | None
) -> Moved | None:
    """Says how a figure moved, by the thresholds of the rule; None where either lacks it.

    A queue is compared with the healthy TTFT, because next to no queue any other is many times as
    long.
    """
    if name in (times_s := _times_of(now)):
        after, before = times_s[name], _times_of(reference)[name]
        if after is None or before is None:
            return None
        ratio = after / before if before > 0 else None
        if name == "Queue":
            share = (after - before) / (reference.ttft_s or math.inf)
            moved = _direction(1 + share if share >= 0 else 1 / (1 - share), SLOWER_TOKEN)
            return Moved(number(after, "s"), ratio, moved, predicted)
        if ratio is None:
            return None
        return Moved(f"{ratio:.2f}x", ratio, _direction(ratio, SLOWER_TOKEN), predicted)
    text = _figure(name, now)
    if name == "Longest prompt":
        longest, usual = now.longest_prompt_tokens, reference.longest_prompt_tokens
        if longest is None or usual is None:
            return None
        higher, lower = longest[0] >= usual[1], longest[1] <= usual[0]
        return Moved(text, None, "rises" if higher else "falls" if lower else "stays", predicted)
    if name == "Long gaps":
        longer, step = more_long_gaps(now, reference), MORE_LONG_GAPS
        if longer is None:
            return None
        more, text = longer, f"{100 * longer:+.0f}%"
    else:
        after, before, step = {
            "Hit rate": (now.hit_rate, reference.hit_rate, HITS_LOST),
            "Preemptions": (now.preemptions, reference.preemptions, PREEMPTED),
        }[name]
        if after is None or before is None:
            return None
        more = after - before
    return Moved(
        text, None, "rises" if more >= step else "falls" if more <= -step else "stays", predicted
    )


def _direction(ratio: float, threshold: float) -> Direction:
    return "rises" if ratio > threshold else "falls" if ratio < 1 / threshold else "stays"


def tell_signatures(facts: Signatures) -> Finding:
    """Shows the signatures; a figure that did not move as predicted is strong."""
    title = "Which figure moves in which direction?"
    if not facts.rows:
        return Finding(title=title, lines=["No trial could be read."])
    rows = [["What was wrong", *FIGURES]]
    rows.append(["*the reference*", *(facts.healthy[name] for name in FIGURES)])
    rows += [
        [TITLES[row.injected], *(_cell(row.figures[name]) for name in FIGURES)]
        for row in facts.rows
    ]
    as_predicted = facts.directions_as_predicted
    lines = [
        f"Of {len(as_predicted)} predicted directions {sum(as_predicted)} were seen. A sign is what"
        " was predicted (↑ rises, ↓ falls, = stays); without one nothing was, and **strong** is"
        " what came otherwise.",
        "All figures are the engine's own means over whole trials, the warm-up included, so they"
        " differ from the clients' above, which are of the window: TTFT, TPOT and prefill as"
        " multiples of the reference's, the queue in time, long gaps as what was added to the share"
        " of gaps above the bucket of the reference's p99, preemptions a request, and the bucket of"
        " the longest prompt in tokens.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


def _cell(cell: Moved | None) -> str:
    if cell is None:
        return "–"
    text = f"{cell.text} {SIGN[cell.predicted]}" if cell.predicted else cell.text
    return f"**{text}**" if cell.as_predicted is False else text


SIGNATURE = Conclusion("signatures", signatures, tell_signatures)

# ------------------------------------------------------------- what TTFT and ITL are made of


@dataclass(frozen=True)
class Coefficient:
    """Holds a fitted coefficient, half of its 95% interval, and what the forecast's step says."""

    value: float
    reach: float
    forecast: float | None

    @property
    def known(self) -> bool:
        """Whether its interval excludes 0."""
        return abs(self.value) > self.reach


@dataclass(frozen=True)
class Fit:
    """Holds a polynomial through measured times: the coefficients from the constant on.

    `measured` and `forecast` hold (tokens, seconds).
    """

    coefficients: tuple[Coefficient, ...]
    measured: tuple[tuple[float, float], ...]
    forecast: tuple[tuple[float, float], ...]

    def at(self, tokens: float) -> float:
        return float(sum(c.value * tokens**i for i, c in enumerate(self.coefficients)))


@dataclass(frozen=True)
class Coefficients:
    """Holds TTFT over the prompt and ITL over the context, of one request at a time."""

    ttft: Fit | None
    itl: Fit | None


def coefficients(context: Context) -> Coefficients:
    """Fits TTFT = a + b N + c N^2 and ITL = a + b C to the requests that were alone.

    A request is one point, its ITL the mean over its tokens. The spread grows with the time, so the
    fit weighs each by the inverse of its own.
    """
    point = _point_of(context, *ALONE)
    trials = context.folder.trials([point], context.lab) if point else ()
    alone = [r for _, _, trial in trials if trial for r in trial.measured_requests]
    step = _forecast_step(context)
    prompts = [(float(r.prompt_tokens), r.ttft_s) for r in alone if r.prompt_tokens and r.ttft_s]
    contexts = [
        (r.prompt_tokens + (r.output_tokens or 0) / 2, r.tpot_s)
        for r in alone
        if r.prompt_tokens and r.tpot_s
    ]
    return Coefficients(
        _fit(prompts, 2, [(n, _first_token_s(step, n)) for n, _ in prompts] if step else []),
        _fit(contexts, 1, [(c, _token_s(step, c)) for c, _ in contexts] if step else []),
    )


def _forecast_step(context: Context) -> StepTimes | None:
    """Reads the stand-in step that was timed before any engine started."""
    forecasts = context.predictions.in_virtual_time
    plain = next(iter(forecasts.step_times), None) if forecasts else None
    return StepTimes.model_validate(plain) if plain else None


def _first_token_s(step: StepTimes, tokens: float) -> float:
    delays = Delays()
    outside_s = delays.request_s + delays.response_s
    return step.seconds(Step((Piece(round(tokens), 0),), rows=1)) + outside_s


def _token_s(step: StepTimes, tokens: float) -> float:
    return step.seconds(Step((Piece(1, round(tokens)),), rows=1))


def _fit(
    measured: Sequence[tuple[float, float]], degree: int, forecast: Sequence[tuple[float, float]]
) -> Fit | None:
    """Fits a polynomial; None with fewer than two points more than it has coefficients."""
    if len({x for x, _ in measured}) < degree + 3:
        return None
    estimates, covariance = _least_squares(measured, degree)
    quantile = float(scipy.stats.t.ppf(0.975, len(measured) - degree - 1))
    predicted = _least_squares(forecast, degree)[0] if forecast else None
    return Fit(
        tuple(
            Coefficient(
                float(estimates[i]),
                quantile * math.sqrt(float(covariance[i, i])),
                None if predicted is None else float(predicted[i]),
            )
            for i in range(degree + 1)
        ),
        tuple(measured),
        tuple(forecast),
    )


def _least_squares(
    points: Sequence[tuple[float, float]], degree: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the coefficients, the constant first, and their covariance."""
    x, y = (np.array(column, float) for column in zip(*points, strict=True))
    scale = float(x.max()) or 1.0  # so that powers of thousands do not lose digits
    design = np.vander(x / scale, degree + 1, increasing=True) / y[:, None]
    estimates, *_ = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)
    rest = 1 - design @ estimates
    variance = float(rest @ rest) / max(1, len(y) - degree - 1)
    covariance = variance * np.linalg.pinv(design.T @ design)
    powers = scale ** np.arange(degree + 1)
    return estimates / powers, covariance / np.outer(powers, powers)


TERMS = {
    "ttft": ("a, one step's fixed cost", "b, for a token of the prompt", "c, for a pair of tokens"),
    "itl": ("a, one step without context", "b, for a token of the context"),
}
SCALES = ((1e3, "ms"), (1e6, "µs"), (1e9, "ns"))
"""A coefficient of tokens^i is written in units of 1000^-(i + 1) seconds."""


def tell_coefficients(facts: Coefficients) -> Finding:
    rows = [["What", "Term", "Measured", "95% interval", "Forecast's step"]]
    lines = []
    for name, title, fit in (("ttft", "TTFT over N prompt tokens", facts.ttft),
                             ("itl", "ITL over C tokens of context", facts.itl)):  # fmt: skip
        if fit is None:
            rows.append([title, *["–"] * (len(rows[0]) - 1)])
            lines.append(f"{title}: too few requests were alone to fit it.")
            continue
        for i, (term, coefficient) in enumerate(zip(TERMS[name], fit.coefficients, strict=True)):
            scale, unit = SCALES[i]
            low, high = (scale * (coefficient.value + s * coefficient.reach) for s in (-1, 1))
            rows.append(
                [
                    title if i == 0 else "",
                    term,
                    f"{number(scale * coefficient.value)} {unit}",
                    f"{number(low)} to {number(high)} {unit}",
                    "–"
                    if coefficient.forecast is None
                    else f"{number(scale * coefficient.forecast)} {unit}",
                ]
            )
    if facts.ttft and facts.itl:
        lines += [made_of(facts.ttft, facts.itl)]
        lines.append(
            "Least squares over single requests, each weighed by the inverse of its own time. The"
            " forecast's step is the stand-in that was timed before any engine started; its column"
            " is the same fit to its times at the same lengths."
        )
    return Finding(title="What TTFT and ITL are made of", rows=rows, lines=lines)


def made_of(ttft: Fit, itl: Fit) -> str:
    """Says what a long prompt's first token and a token after it take, part by part."""
    longest = max(n for n, _ in ttft.measured)
    parts = [c.value * longest**i for i, c in enumerate(ttft.coefficients)]
    pairs = "" if ttft.coefficients[2].known else " (its interval includes 0)"
    far = max(c for c, _ in itl.measured)
    grows = itl.coefficients[1]
    context = (
        f"and {number(grows.value * far, 's')} more with {far:,.0f} of them"
        if grows.known
        else f"and what {far:,.0f} of them add has an interval that includes 0"
    )
    return (
        f"A prompt of {longest:,.0f} tokens alone has its first token after"
        f" {number(ttft.at(longest), 's')}; by the fit {number(parts[0], 's')} are fixed,"
        f" {number(parts[1], 's')} for its tokens, {number(parts[2], 's')} for its pairs of"
        f" tokens{pairs}. A later token takes {number(itl.coefficients[0].value, 's')} without"
        f" context, {context}."
    )


def draw_coefficients(facts: Coefficients) -> str | None:
    """Draws both fits through the requests that were alone, beside the forecast's step."""
    if not (facts.ttft and facts.itl):
        return None
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for ax, fit, xlabel, ylabel in (
        (axes[0], facts.ttft, "prompt (tokens)", "TTFT (ms)"),
        (axes[1], facts.itl, "context (tokens)", "ITL, mean of a request (ms)"),
    ):
        x, y = zip(*fit.measured, strict=True)
        ax.plot(x, [1e3 * v for v in y], "o", ms=3.5, alpha=0.6, color=BLUE, label="a request")
        grid = np.linspace(min(x), max(x), 50)
        ax.plot(grid, [1e3 * fit.at(v) for v in grid], color=BLUE, label="fit")
        if fit.forecast:
            line = sorted(fit.forecast)
            ax.plot(
                [v for v, _ in line], [1e3 * v for _, v in line], "--", color=BOUND,
                label="forecast's step",
            )  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.set_ylim(0, None)
    axes[0].legend(frameon=False)
    return (
        "One request at a time: the first token over the length of its prompt (left), a later one"
        " over its context (right)."
    )


COEFFICIENTS = Conclusion("coefficients", coefficients, tell_coefficients, draw_coefficients)

# ------------------------------------------------------------------------------------ the answers


def causes_from_metrics(run: JudgedRun) -> str | None:
    facts = TOLD_APART.facts_of(run)
    if not facts or not facts.trials:
        return None
    missed = Counter((t.injected, t.named) for t in facts.trials if not t.right)
    as_what = [
        f"{CAUSES[injected]} was {NOT_NAMED.get(named, f'taken for {CAUSES[named]}')} in {count} of"
        f" {facts.count(injected).total()} trials"
        for (injected, named), count in missed.items()
    ]
    but = f" Named wrongly: {'; '.join(as_what)}." if missed else ""
    return (
        f"Each cause was brought about alone. In {facts.right} of {len(facts.trials)} trials the"
        " rule named the right one, from the engine's metrics. The marks that are looked for:"
        " preemptions are counted, a cold cache loses its hits, a neighbour shows in the longest"
        " prompt, a burst in the queue."
        f"{but} `make diagnose` applies the same rule to a running server."
    )


def parts_of_latency(run: JudgedRun) -> str | None:
    facts = COEFFICIENTS.facts_of(run)
    if not facts or not facts.ttft or not facts.itl:
        return None
    return (
        "TTFT is the queue and the prefill, and prefill has a part that is fixed, one that grows"
        " with the prompt and one with its square; ITL is a step, which grows with the context. "
        + made_of(facts.ttft, facts.itl)
    )


def first_token_late(run: JudgedRun) -> str | None:
    """Splits a late first token into queue and prefill, cause by cause."""
    facts = SIGNATURE.facts_of(run)
    rows = {row.injected: row for row in facts.rows} if facts else {}
    clauses = []
    for cause in ("burst", "long neighbour", "cold cache"):
        cells = rows[cause].figures if cause in rows else {}
        ttft, queue, prefill = (cells.get(name) for name in ("TTFT", "Queue", "Prefill"))
        if ttft and queue and prefill:
            clauses.append(
                f"with {TITLES[cause]}, TTFT is {ttft.text}, the queue {queue.text}, prefill"
                f" {prefill.text}"
            )
    if not facts or not clauses:
        return None
    return (
        "Split it into queue and prefill, as the engine counts them (over whole trials, the warm-up"
        " included, and against the workload `reference`; the claims compare what clients saw in"
        f" the window). Healthy, the queue takes {facts.healthy['Queue']} and prefill"
        f" {facts.healthy['Prefill']}; {'; '.join(clauses)}. A longer queue means more requests"
        " than the batch takes, or a long prompt ahead. A longer prefill means a longer prompt, or"
        " one that the cache has lost: then the hit rate has fallen."
    )


def token_slow(run: JudgedRun) -> str | None:
    """Tells how TPOT moved with each cause that may make tokens slower, and what moved with it."""
    facts = SIGNATURE.facts_of(run)
    rows = {row.injected: row for row in facts.rows} if facts else {}
    clauses = []
    for cause in ("slow step", "large budget", "speculation", "long context"):
        cells = rows[cause].figures if cause in rows else {}
        tpot, gaps, prefill = (cells.get(name) for name in ("TPOT", "Long gaps", "Prefill"))
        if tpot and gaps and prefill:
            clauses.append(
                f"with {TITLES[cause]}, TPOT is {tpot.text}, prefill {prefill.text}, long gaps"
                f" {gaps.text}"
            )
    if not clauses:
        return None
    return (
        f"Look at what moved with it, by the engine's own counts: {'; '.join(clauses)}. Check what"
        " was sent first (the median prompt), then whether the engine guesses ahead, then whether a"
        " few gaps grew while the others shrank (a token budget); where none moved, the step itself"
        " is slower."
    )


# -------------------------------------------------------------------------------------- its plot


def draw_signatures(run: JudgedRun) -> str | None:
    """Draws the times under each disturbance, and beside them what each trial was named."""
    facts, diagnoses = SIGNATURE.facts_of(run), TOLD_APART.facts_of(run)
    if not facts or not facts.rows or not diagnoses or not diagnoses.trials:
        return None
    times: tuple[Figure, ...] = ("TTFT", "Prefill", "TPOT")
    causes = [row.injected for row in facts.rows]
    _, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.9 + 0.42 * len(causes)), width_ratios=(2, 4)
    )
    ratios = np.array([
        [cell.ratio or np.nan if (cell := row.figures[name]) else np.nan for name in times]
        for row in facts.rows
    ])  # fmt: skip
    most = math.log2(max(4.0, float(np.nanmax(ratios, initial=1.0))))
    left.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    named = [c for c in TITLES if any(t.named == c for t in diagnoses.trials)]
    matrix = np.array([
        [diagnoses.count(c)[n] / max(1, diagnoses.count(c).total()) for n in named] for c in causes
    ])  # fmt: skip
    right.imshow(matrix, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for ax, columns, texts in (
        (left, list(times), [["–" if v != v else f"{v:.2f}x" for v in row] for row in ratios]),
        (right, [TITLES[n] for n in named],
         [[str(diagnoses.count(c)[n] or "") for n in named] for c in causes]),
    ):  # fmt: skip
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                dark = ax is left and abs(math.log2(ratios[y, x])) > 0.7 * most
                ax.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
        ax.set_yticks(range(len(causes)), [TITLES[c] for c in causes] if ax is left else [])
        ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        ax.grid(False)
    left.set_title("times, of the reference's", fontsize=9)
    right.set_title("what the rule named, trials", fontsize=9)
    return (
        "What was wrong, row by row: the engine's mean times as multiples of the reference's"
        " (left), and what the rule named from the metrics of each trial (right)."
    )


PARTS = ReportParts(
    conclusions=(TOLD_APART, SIGNATURE, COEFFICIENTS),
    answers={
        "ME-4": causes_from_metrics,
        "IP-4": parts_of_latency,
        "IP-5": first_token_late,
        "IP-6": token_slow,
    },
    plots={"signatures": draw_signatures},
    headline=Headline(
        claim="cold",
        done="Losing a prefix cache that held half of every prompt",
        figure="the time to the first token",
    ),
)
