"""What is wrong with a trial, or with what a claim compares: each a named caveat, with advice.

A caveat that blocks allows no verdict. The client's figures are held against the engine's own, what
was sent against what was due, and each variant against what the engine shows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median_low

import numpy as np

from labs.judging.judge import Caveat
from labs.judging.measure import Trial, expected_pieces
from labs.judging.metrics import METRICS, Repeats, by_repeat
from labs.judging.text import literal
from labs.lab import Claim, Evidence, Point, factors
from serving import metrics, telemetry
from serving.telemetry import POWER_CAP, SLOWDOWNS

LATE_S, LATE_SHARE = 0.005, 0.05  # a send this late, or this part of TTFT late, counts as late
MOST_LATE = 0.05
MOST_LOOP_LAG_S = 0.02
MOST_ERRORS = 0.01
LEAST_ACHIEVED = 0.95
MOST_SEVERAL = 0.05  # of the chunks carry several tokens, where nothing is guessed ahead
MOSTLY_SEVERAL = 0.5  # beyond this no token's own time is known
TOKEN_TIMES = tuple(name for name, metric in METRICS.items() if metric.token_times)
MOST_SLOWED = 0.01  # of the window; one sample can be a change of load
MOST_CAPPED = 0.5
MOST_WARM_TOKENS = 64  # found in the cache by a request that shares no more than a chat template
TOKENIZE_S = 3e-6  # a token, by a fast tokenizer on one core
TRANSPORT_S = 0.010  # HTTP parsing, tokenizing and templating before the engine's clock starts


def caveats_of(trial: Trial, evidence: Sequence[Evidence]) -> list[Caveat]:
    """Of one trial; evidence that its engine should show may be of other variants too."""
    found = [*_errors(trial)]
    if not trial.measured_requests:
        text = "no request was sent and answered within the window: widen it"
        return [*found, _of(trial, "nothing measured", text)]
    for check in (_sent, _answered, _warm, _reconciled, _throttled):
        found += check(trial)
    return [*found, *_untreated(trial, evidence)]


def _of(
    trial: Trial, name: str, text: str, blocks: bool = True, metrics: tuple[str, ...] = ()
) -> Caveat:
    return Caveat(name=name, text=text, blocks=blocks, point=trial.point.key, metrics=metrics)


def _errors(trial: Trial) -> Iterator[Caveat]:
    if errors := [r.error or "" for r in trial.records if not r.ok]:
        share = len(errors) / len(trial.records)
        count = f"{len(errors)} of {len(trial.records)} requests failed"
        text = f"{count}, the first with: {literal(errors[0])}"
        yield _of(trial, "errors", text, share > MOST_ERRORS)


def _sent(trial: Trial) -> Iterator[Caveat]:
    """The generator sent what was due, when it was due."""
    summary = trial.summary
    if summary.lost_share:
        yield _of(
            trial,
            "load process lost",
            f"one of the processes that send died, and {summary.lost_share:.0%} of the users with"
            " it: what is missing is not random",
        )
    if summary.exhausted:
        text = "the window was cut short: raise `requests`"
        yield _of(trial, "ran out of requests", text, blocks=False)
    lags = [(r.send_lag_s or 0.0, r.ttft_s or 0.0) for r in trial.measured_requests]
    late = sum(lag > max(LATE_S, LATE_SHARE * ttft) for lag, ttft in lags) / len(lags)
    if late > MOST_LATE:
        yield _of(
            trial,
            "generator lagged",
            f"{late:.0%} of the requests were sent late: lower the rate or add client cores",
        )
    if summary.loop_lag_p99_s > MOST_LOOP_LAG_S:
        yield _of(
            trial,
            "generator's loop lagged",
            f"its event loop ran {1000 * summary.loop_lag_p99_s:.0f} ms late (p99), so times are"
            " that uncertain: free a core for it",
        )
    if summary.planned and summary.sent < LEAST_ACHIEVED * summary.planned:
        yield _of(
            trial,
            "fell behind the schedule",
            f"{summary.sent} of {summary.planned} scheduled requests were sent: this was no longer"
            " an open loop; lower the rate",
        )


def _answered(trial: Trial) -> Iterator[Caveat]:
    """Answers have the length that was asked for, and come a token at a time."""
    done = [r for r in trial.records if r.ok]
    if odd := sum(sum(k for _, k in r.chunks) != r.output_tokens for r in done):
        yield _of(
            trial,
            "token counts differ",
            f"{odd} answers' chunks do not add up to the usage reported: ITL and TPOT are"
            " estimates on this server",
        )
    chunks = [k for r in trial.measured_requests for _, k in r.chunks[1:]]
    several = sum(k > 1 for k in chunks) / len(chunks) if chunks else 0.0
    if several > MOST_SEVERAL and not trial.point.flags.speculative_config:
        mostly = several > MOSTLY_SEVERAL
        yield _of(
            trial,
            "several tokens a chunk",
            f"{several:.0%} of the chunks carry more than one: the client or the server fell"
            " behind the engine, or gathers tokens; ITL is spread evenly over a chunk's tokens",
            blocks=mostly,
            metrics=TOKEN_TIMES if mostly else (),
        )
    if other := sum(r.output_tokens != r.asked_tokens for r in done):
        text = f"{other} answers have another length than asked"
        yield _of(trial, "lengths differ", text, blocks=False)


def _warm(trial: Trial) -> Iterator[Caveat]:
    """Prompts that share nothing find nothing in the prefix cache."""
    workload, engine = trial.point.workload, trial.engine
    if workload.prefix or workload.chat or engine is None:
        return
    tokens = engine.values.get(metrics.PREFIX_HITS, 0.0) / len(trial.records)
    if tokens > MOST_WARM_TOKENS:
        yield _of(
            trial,
            "warm prefix cache",
            f"{tokens:.0f} tokens of each prompt were found in the cache, though these prompts"
            " share nothing: was it not reset, or is another client using the engine?",
        )


def _reconciled(trial: Trial) -> Iterator[Caveat]:
    """Client and engine have seen the same requests, tokens and TTFT."""
    if trial.engine is None or metrics.TTFT not in trial.engine.histograms:
        return
    name, done = "client and engine disagree", [r for r in trial.records if r.ok]
    tokens = sum(r.output_tokens or 0 for r in done)
    for what, metric, ours in (
        ("requests", metrics.REQUESTS, len(done)),
        ("output tokens", metrics.GENERATION_TOKENS, tokens),
    ):
        theirs = trial.engine.values.get(metric)
        if theirs is not None and theirs != ours and len(done) == len(trial.records):
            yield _of(
                trial,
                name,
                f"the engine counts {theirs:.0f} {what}, the client {ours}: was another client"
                " using it?",
            )
    engine = trial.engine.histograms[metrics.TTFT]
    bucket = engine.bucket_of(0.5)
    # the lower of two middle ones, as the histogram has it: the two may lie far apart
    ours_s = median_low([r.chunks[0][0] - r.sent_s for r in done]) if done else None
    if bucket and ours_s is not None and not ttft_agrees(engine, ours_s):
        yield _of(
            trial,
            name,
            f"median TTFT is {1000 * ours_s:.1f} ms at the client, in the engine's histogram"
            f" between {1000 * bucket[0]:.0f} and {1000 * bucket[1]:.0f} ms: the transport or the"
            " generator adds the rest",
        )


def ttft_agrees(engine: metrics.Histogram, client_median_s: float) -> bool:
    """The client's median lies in the engine's median bucket or a neighbour, transport allowed."""
    bucket = engine.bucket_of(0.5)
    if bucket is None:
        return True
    bounds = (0.0, *engine.le)
    low = bounds[max(0, bounds.index(bucket[0]) - 1)]
    after = bounds.index(bucket[1]) + 1 if bucket[1] in bounds else len(bounds)
    high = bounds[after] if after < len(bounds) else math.inf
    return low <= client_median_s <= high + TRANSPORT_S


def _throttled(trial: Trial) -> Iterator[Caveat]:
    """The GPU ran at the clock it could have."""
    inside = telemetry.within(trial.telemetry, *trial.summary.window_s)
    causes = [c for c in SLOWDOWNS.values() if telemetry.throttled_share(inside, [c])]
    slowed = telemetry.throttled_share(inside, causes) or 0.0
    capped = telemetry.throttled_share(inside, [POWER_CAP]) or 0.0
    if slowed > MOST_SLOWED:
        yield _of(
            trial,
            "throttled",
            f"the GPU was slowed for {slowed:.0%} of the window ({', '.join(causes)}): cool it or"
            " mend its power supply, and measure again",
            blocks=False,
        )
    if capped > MOST_CAPPED:
        yield _of(
            trial,
            "at the power limit",
            f"the GPU ran at its power limit for {capped:.0%} of the window: absolute figures are"
            " those of this limit",
            blocks=False,
        )


def _untreated(trial: Trial, evidence: Sequence[Evidence]) -> Iterator[Caveat]:
    """The engine shows what is expected of this variant."""
    if trial.engine is None:
        return
    for item in evidence:
        if item.arm.matches(trial.point) and not _shown(item, trial):
            yield _of(trial, "treatment not applied", f"the engine does not show {item}")


def _shown(evidence: Evidence, trial: Trial) -> bool:
    assert trial.engine
    if evidence.kind == "echoes":
        return trial.engine.info.get(evidence.metric, {}).get(evidence.label) == evidence.value
    if evidence.kind == "pieces":
        found, expected = METRICS[evidence.metric].of(trial), expected_pieces(trial.point)
        most = 1.3 * expected + _steps_before(trial)
        return found is not None and 0.7 * expected <= found <= most
    if evidence.kind == "absent":
        return evidence.metric not in trial.engine.values
    moved = trial.engine.values.get(evidence.metric)
    if moved is None:  # a renamed counter proves nothing
        return False
    return moved > 0 if evidence.kind == "rises" else moved == 0


def _steps_before(trial: Trial) -> float:
    """Steps, at most, from a long prompt's send until the engine has it in its hands.

    One or two where steps are long; a GPU takes several while the prompt is parsed and tokenized.
    """
    intruder, step_s = trial.point.workload.intruder, METRICS["itl_p50_s"].of(trial)
    if not intruder or not step_s:
        return 2.5
    on_its_way_s = TRANSPORT_S + TOKENIZE_S * intruder.prompt_tokens
    return max(2.5, 1 + on_its_way_s / step_s)


# ------------------------------------------------------------------------- of more than one trial


def confounded(claim: Claim, treatment: Point, baseline: Point) -> list[Caveat]:
    """More than one thing differs between the two sides, so that none of them is the cause."""
    differ = factors(treatment, baseline)
    if len(differ) < 2:
        return []
    return [
        Caveat(
            name=f"more than one factor: {', '.join(differ)}",
            text=claim.coupled or "change one alone, or both sides alike",
            blocks=not claim.coupled,
            point=treatment.key,
        )
    ]


def first_trial_slow(repeats: Repeats, point: str) -> list[Caveat]:
    """The first repeat stands out from the others by more than a quarter."""
    known = by_repeat(repeats, "output_tokens_per_s")
    if len(known) < 3:
        return []
    first, *others = (known[r] for r in sorted(known))
    if first < 0.75 * min(others):
        text = f"the first repeat ran at {first / float(np.mean(others)):.0%} of the others"
        return [Caveat(name="slow first trial", text=text + ": discard it or warm up", point=point)]
    return []
