"""Finds what is wrong with a trial, or with what a claim compares: named caveats, with advice.

A caveat that blocks allows no verdict. The client's figures are checked against the engine's own,
what was sent against what was due, and each variant against what the engine shows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median_low

import numpy as np

from labs.judging.judge import Caveat
from labs.judging.machine_speed import MOST_CHANGED, TimedTrial, jump, machine_speed
from labs.judging.measure import Trial, expected_pieces
from labs.judging.metrics import METRICS, Repeats, by_repeat
from labs.judging.text import literal
from labs.lab import Claim, Evidence, Point, factors
from serving import metrics, telemetry
from serving.telemetry import POWER_CAP, SLOWDOWNS

LATE_S, LATE_SHARE = 0.005, 0.05  # a send counts as late beyond both
MOST_LATE = 0.05
MOST_LOOP_LAG_S = 0.02
MOST_ERRORS = 0.01
LEAST_ACHIEVED = 0.95
MOST_SEVERAL = 0.05  # share of chunks with several tokens, without speculation
MOSTLY_SEVERAL = 0.5  # beyond this share the times of single tokens are unknown
TOKEN_TIMES = tuple(name for name, metric in METRICS.items() if metric.token_times)
MOST_SLOWED = 0.01  # share of the window; one sample can be a change of load
MOST_CAPPED = 0.5
MOST_WARM_TOKENS = 64  # that a request which shares only the chat template may find cached
TOKENIZE_S = 3e-6  # per token, with a fast tokenizer on one core
TRANSPORT_S = 0.010  # HTTP parsing, templating and tokenizing, before the engine's clock starts


def caveats_of(trial: Trial, evidence: Sequence[Evidence]) -> list[Caveat]:
    """List what is wrong with one trial; `evidence` may include that of other variants."""
    caveats = [*_errors(trial)]
    if not trial.measured_requests:
        text = "no request was sent and answered within the window: widen it"
        return [*caveats, _caveat(trial, "nothing measured", text)]
    for check in (_sent, _answered, _warm, _reconciled, _throttled):
        caveats += check(trial)
    return [*caveats, *_untreated(trial, evidence)]


def _caveat(
    trial: Trial, name: str, text: str, blocks: bool = True, metrics: tuple[str, ...] = ()
) -> Caveat:
    return Caveat(name=name, text=text, blocks=blocks, point=trial.point.key, metrics=metrics)


def _errors(trial: Trial) -> Iterator[Caveat]:
    if errors := [r.error or "" for r in trial.records if not r.ok]:
        share = len(errors) / len(trial.records)
        count = f"{len(errors)} of {len(trial.records)} requests failed"
        text = f"{count}, the first with: {literal(errors[0])}"
        yield _caveat(trial, "errors", text, share > MOST_ERRORS)


def _sent(trial: Trial) -> Iterator[Caveat]:
    """Check that the generator sent what was due, when it was due."""
    summary = trial.summary
    if summary.lost_share:
        yield _caveat(
            trial,
            "load process lost",
            f"one of the processes that send died, and {summary.lost_share:.0%} of the users with"
            " it: what is missing is not random",
        )
    if summary.exhausted:
        text = "the window was cut short: raise `requests`"
        yield _caveat(trial, "ran out of requests", text, blocks=False)
    lags = [(r.send_lag_s or 0.0, r.ttft_s or 0.0) for r in trial.measured_requests]
    late = sum(lag > max(LATE_S, LATE_SHARE * ttft) for lag, ttft in lags) / len(lags)
    if late > MOST_LATE:
        yield _caveat(
            trial,
            "generator lagged",
            f"{late:.0%} of the requests were sent late: lower the rate or add client cores",
        )
    if summary.loop_lag_p99_s > MOST_LOOP_LAG_S:
        yield _caveat(
            trial,
            "generator's loop lagged",
            f"its event loop ran {1000 * summary.loop_lag_p99_s:.0f} ms late (p99), so times are"
            " that uncertain: free a core for it",
        )
    if summary.planned and summary.sent < LEAST_ACHIEVED * summary.planned:
        yield _caveat(
            trial,
            "fell behind the schedule",
            f"{summary.sent} of {summary.planned} scheduled requests were sent: this was no longer"
            " an open loop; lower the rate",
        )


def _answered(trial: Trial) -> Iterator[Caveat]:
    """Check that outputs have the length that was asked for, and come one token at a time."""
    completed = [r for r in trial.records if r.ok]
    if odd := sum(sum(k for _, k in r.chunks) != r.output_tokens for r in completed):
        yield _caveat(
            trial,
            "token counts differ",
            f"{odd} answers' chunks do not add up to the usage reported: ITL and TPOT are"
            " estimates on this server",
        )
    chunks = [k for r in trial.measured_requests for _, k in r.chunks[1:]]
    several = sum(k > 1 for k in chunks) / len(chunks) if chunks else 0.0
    if several > MOST_SEVERAL and not trial.point.flags.speculative_config:
        mostly = several > MOSTLY_SEVERAL
        yield _caveat(
            trial,
            "several tokens a chunk",
            f"{several:.0%} of the chunks carry more than one: the client or the server fell"
            " behind the engine, or gathers tokens; ITL is spread evenly over a chunk's tokens",
            blocks=mostly,
            metrics=TOKEN_TIMES if mostly else (),
        )
    if different := sum(r.output_tokens != r.asked_tokens for r in completed):
        text = f"{different} answers have another length than asked"
        yield _caveat(trial, "lengths differ", text, blocks=False)


def _warm(trial: Trial) -> Iterator[Caveat]:
    """Check that prompts which share nothing find nothing in the prefix cache."""
    workload, engine = trial.point.workload, trial.engine
    if workload.prefix or workload.chat or engine is None:
        return
    tokens = engine.values.get(metrics.PREFIX_HITS, 0.0) / len(trial.records)
    if tokens > MOST_WARM_TOKENS:
        yield _caveat(
            trial,
            "warm prefix cache",
            f"{tokens:.0f} tokens of each prompt were found in the cache, though these prompts"
            " share nothing: was it not reset, or is another client using the engine?",
        )


def _reconciled(trial: Trial) -> Iterator[Caveat]:
    """Check that client and engine agree on requests, tokens and TTFT."""
    if trial.engine is None or metrics.TTFT not in trial.engine.histograms:
        return
    name, completed = "client and engine disagree", [r for r in trial.records if r.ok]
    tokens = sum(r.output_tokens or 0 for r in completed)
    for counted, metric, by_client in (
        ("requests", metrics.REQUESTS, len(completed)),
        ("output tokens", metrics.GENERATION_TOKENS, tokens),
    ):
        by_engine = trial.engine.values.get(metric)
        if by_engine is None or len(completed) < len(trial.records):
            continue
        if by_engine != by_client:
            yield _caveat(
                trial,
                name,
                f"the engine counts {by_engine:.0f} {counted}, the client {by_client}: was another"
                " client using it?",
            )
    engine = trial.engine.histograms[metrics.TTFT]
    bucket = engine.bucket_of(0.5)
    # of two middle samples the lower one, as in the histogram: the two may lie far apart
    median_s = median_low([r.chunks[0][0] - r.sent_s for r in completed]) if completed else None
    if bucket and median_s is not None and not ttft_agrees(engine, median_s):
        yield _caveat(
            trial,
            name,
            f"median TTFT is {1000 * median_s:.1f} ms at the client, in the engine's histogram"
            f" between {1000 * bucket[0]:.0f} and {1000 * bucket[1]:.0f} ms: the transport or the"
            " generator adds the rest",
        )


def ttft_agrees(engine: metrics.Histogram, client_median_s: float) -> bool:
    """Whether the client's median TTFT lies in the engine's median bucket or next to it.

    The client may measure up to `TRANSPORT_S` more. True where the engine has no samples.
    """
    bucket = engine.bucket_of(0.5)
    if bucket is None:
        return True
    bounds = (0.0, *engine.le)
    low = bounds[max(0, bounds.index(bucket[0]) - 1)]
    after = bounds.index(bucket[1]) + 1 if bucket[1] in bounds else len(bounds)
    high = bounds[after] if after < len(bounds) else math.inf
    return low <= client_median_s <= high + TRANSPORT_S


def _throttled(trial: Trial) -> Iterator[Caveat]:
    """Check that the GPU was not slowed by heat or power."""
    inside = telemetry.within(trial.telemetry, *trial.summary.window_s)
    causes = [c for c in SLOWDOWNS.values() if telemetry.throttled_share(inside, [c])]
    slowed = telemetry.throttled_share(inside, causes) or 0.0
    capped = telemetry.throttled_share(inside, [POWER_CAP]) or 0.0
    if slowed > MOST_SLOWED:
        yield _caveat(
            trial,
            "throttled",
            f"the GPU was slowed for {slowed:.0%} of the window ({', '.join(causes)}): cool it or"
            " mend its power supply, and measure again",
            blocks=False,
        )
    if capped > MOST_CAPPED:
        yield _caveat(
            trial,
            "at the power limit",
            f"the GPU ran at its power limit for {capped:.0%} of the window: absolute figures are"
            " those of this limit",
            blocks=False,
        )


def _untreated(trial: Trial, evidence: Sequence[Evidence]) -> Iterator[Caveat]:
    """Check that the engine shows the evidence expected of this variant."""
    if trial.engine is None:
        return
    for item in evidence:
        if item.arm.matches(trial.point) and not _shown(item, trial):
            yield _caveat(trial, "treatment not applied", f"the engine does not show {item}")


def _shown(evidence: Evidence, trial: Trial) -> bool:
    assert trial.engine
    if evidence.kind == "echoes":
        return trial.engine.info.get(evidence.metric, {}).get(evidence.label) == evidence.value
    if evidence.kind == "pieces":
        pieces, expected = METRICS[evidence.metric].of(trial), expected_pieces(trial.point)
        most = 1.3 * expected + _steps_before(trial)
        return pieces is not None and 0.7 * expected <= pieces <= most
    if evidence.kind == "absent":
        return evidence.metric not in trial.engine.values
    increase = trial.engine.values.get(evidence.metric)
    if increase is None:  # a counter that was renamed proves nothing
        return False
    return increase > 0 if evidence.kind == "rises" else increase == 0


def _steps_before(trial: Trial) -> float:
    """Estimate at most how many steps pass between a long prompt's send and its first piece.

    These are one or two where steps are long; a GPU takes several while the prompt is parsed and
    tokenized.
    """
    intruder, step_s = trial.point.workload.intruder, METRICS["itl_p50_s"].of(trial)
    if not intruder or not step_s:
        return 2.5
    delay_s = TRANSPORT_S + TOKENIZE_S * intruder.prompt_tokens
    return max(2.5, 1 + delay_s / step_s)


# ------------------------------------------------------------------------- of more than one trial


def confounded(claim: Claim, treatment: Point, baseline: Point) -> list[Caveat]:
    """Warn where more than one factor differs between the sides, so that the cause is unknown.

    It blocks the verdict unless the claim says why the factors are coupled.
    """
    differing = factors(treatment, baseline)
    if len(differing) < 2:
        return []
    return [
        Caveat(
            name=f"more than one factor: {', '.join(differing)}",
            text=claim.coupled or "change one alone, or both sides alike",
            blocks=not claim.coupled,
            point=treatment.key,
        )
    ]


def first_trial_slow(repeats: Repeats, point: str) -> list[Caveat]:
    """Warn where the first repeat's throughput is below that of all others by over a quarter."""
    rates = by_repeat(repeats, "output_tokens_per_s")
    if len(rates) < 3:
        return []
    first, *later = (rates[repeat] for repeat in sorted(rates))
    if first < 0.75 * min(later):
        text = f"the first repeat ran at {first / float(np.mean(later)):.0%} of the others"
        return [Caveat(name="slow first trial", text=text + ": discard it or warm up", point=point)]
    return []


def speed_jumped(trials: Sequence[TimedTrial]) -> list[Caveat]:
    """Name the trials around which the machine's own speed jumped, by its reference steps.

    A caveat, and no ground to withhold a verdict: a reference step is a sample of 0.1 s beside a
    trial, not of what went on within it.
    """
    run = machine_speed(trials)
    rule = f"more than {MOST_CHANGED:.0%} is a jump"
    return [
        Caveat(
            name="the machine's speed jumped",
            text=f"the reference step's {what} ({rule}): measure again on a quiet machine",
            point=trial.point,
        )
        for trial in trials
        if run and (what := jump(trial, run))
    ]
