"""How each trial-level metric is computed from a trial; `labs/judging/metrics.py` lists them all.

Request-level metrics (TTFT, TPOT, ITL ...) are defined in `loadtests/records.py`; here they are
taken over the requests *sent* in the measured window that succeeded. Throughput counts the tokens
that *arrived* in the window, whichever request they belong to. Percentiles are of raw samples
(linear interpolation), and one that too few samples support is None. A function that has nothing to
measure returns None, never 0.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from labs import theory
from labs.lab import SLO, Point
from loadtests.latencies import TPOT, Latency
from loadtests.plan import TrialSummary
from loadtests.records import RequestRecord
from serving import metrics, telemetry
from serving.metrics import Snapshot
from serving.telemetry import Sample


@dataclass(frozen=True)
class Trial:
    """A finished trial: what was asked, what came back, what the engine counted meanwhile."""

    point: Point
    repeat: int
    slo: SLO
    records: list[RequestRecord]
    summary: TrialSummary
    engine: Snapshot | None  # the engine's counters over this trial
    telemetry: list[Sample] = field(default_factory=list)  # of the hardware, on the trial's clock

    @cached_property
    def measured_requests(self) -> list[RequestRecord]:
        """What every metric is taken over, unless it says otherwise; an intruder's are not."""
        return [r for r in self._good if not self.point.workload.is_intruder(r.index)]

    @cached_property
    def intruders(self) -> list[RequestRecord]:
        return [r for r in self._good if self.point.workload.is_intruder(r.index)]

    @cached_property
    def _good(self) -> list[RequestRecord]:
        return [r for r in self.records if r.in_window and r.ok]

    @property
    def window_length_s(self) -> float:
        start, end = self.summary.window_s
        return end - start

    def samples_s(self, latency: Latency) -> list[float]:
        """All samples of a latency in seconds: one a request, a token or a chunk."""
        return [sample_s for r in self.measured_requests for sample_s in latency.samples_s(r)]


LEAST_SAMPLES = {50: 5, 90: 30, 99: 200}
"""A p99 rests on the 1 % above it: with fewer than two samples there it is a lottery ticket."""


def percentile(samples: list[float], q: int) -> float | None:
    """The q-th percentile of raw samples, or None when there are too few for it."""
    if len(samples) < LEAST_SAMPLES[q]:
        return None
    return float(np.percentile(samples, q))


def mean(samples: list[float]) -> float | None:
    """The arithmetic mean, or None where there is no sample."""
    return float(np.mean(samples)) if samples else None


def output_tokens_per_s(trial: Trial) -> float | None:
    """Output tokens/s: those that arrive in the measured window / its length.

    Whichever request they belong to, so that warm-up and drain bias it as little as can be.
    """
    start, end = trial.summary.window_s
    if end <= start:
        return None
    arrived = sum(k for r in trial.records for at, k in r.chunks if start <= at < end)
    return arrived / (end - start) if arrived else None


def requests_per_s(trial: Trial) -> float | None:
    """Requests/s: those sent in the window that succeeded / the window's length."""
    return (
        len(trial.measured_requests) / trial.window_length_s if trial.window_length_s > 0 else None
    )


def goodput_per_s(trial: Trial) -> float | None:
    """Requests/s that succeed and meet every part of the SLO; a one-token answer has no TPOT.

    After the goodput of DistServe (Zhong et al. 2024), here at the load that was sent.
    """
    if trial.window_length_s <= 0:
        return None
    good = [
        r
        for r in trial.measured_requests
        if (r.ttft_s or 0) <= trial.slo.ttft_s and (r.tpot_s or 0) <= trial.slo.tpot_s
    ]
    return len(good) / trial.window_length_s


def error_rate(trial: Trial) -> float | None:
    """Requests that failed / all requests of the trial, warm-up and drain included; a share."""
    return sum(not r.ok for r in trial.records) / len(trial.records) if trial.records else None


def batch(trial: Trial) -> float | None:
    """The mean number of requests in decode at once: decode seconds / the window's seconds.

    A request decodes from its first token to its last (Little's law over the window).
    """
    start, end = trial.summary.window_s
    busy = sum(
        max(0.0, min(end, r.chunks[-1][0]) - max(start, r.chunks[0][0]))
        for r in trial.records
        if r.chunks
    )
    return busy / (end - start) if busy and end > start else None


def mbu(trial: Trial) -> float | None:
    """Model bandwidth utilisation: bytes/s that decode needs / the measured ceiling; a share.

    Defined by Databricks ("LLM Inference Performance Engineering", 2023).

    Bytes a step from the model's shape at the mean batch and context, steps/s from TPOT: what
    decode must read, not what the device happened to move.
    """
    tpot_s, size = mean(trial.samples_s(TPOT)), batch(trial)
    if not tpot_s or not size:
        return None
    point = trial.point
    moved_bytes = theory.decode_bytes(point.shape, size, point.context_tokens)
    return moved_bytes / tpot_s / point.ceilings.memory_bandwidth_bytes_per_s


def flops_per_s(trial: Trial) -> float | None:
    """FLOP/s that the arriving tokens needed in decode; prefill is left out."""
    rate, point = output_tokens_per_s(trial), trial.point
    if rate is None:
        return None
    return rate * theory.decode_flops(point.shape, 1, point.context_tokens)


def mfu(trial: Trial) -> float | None:
    """Model FLOP utilisation: decode FLOP/s / the measured BF16 ceiling; a share.

    Defined in PaLM (Chowdhery et al. 2022), there for training.
    """
    rate = flops_per_s(trial)
    return rate and rate / trial.point.ceilings.bf16_flops_per_s


def intensity(trial: Trial) -> float | None:
    """Arithmetic intensity of the decode steps at the batch that was in flight, in FLOP/byte.

    The abscissa of the roofline (Williams et al. 2009).
    """
    size, point = batch(trial), trial.point
    if size is None:
        return None
    done = theory.decode_flops(point.shape, size, point.context_tokens)
    return done / theory.decode_bytes(point.shape, size, point.context_tokens)


def usd_per_million_tokens(trial: Trial) -> float | None:
    """US dollars a million output tokens cost at PRICE_PER_HOUR; None where no price is given."""
    price, rate = price_per_hour(), output_tokens_per_s(trial)
    return price / 3600 / rate * 1e6 if price and rate else None


def joules_per_token(trial: Trial) -> float | None:
    """Joules that an output token took: energy of the serving GPUs or processors / tokens.

    All energy of the window: the device's idle draw and prefill too, not the host's.
    """
    rate = output_tokens_per_s(trial)
    used_j = telemetry.energy_j(trial.telemetry, *trial.summary.window_s)
    return used_j / (rate * trial.window_length_s) if used_j and rate else None


def price_per_hour() -> float | None:
    """PRICE_PER_HOUR in US dollars; raises ValueError when it is no price."""
    text = os.environ.get("LABS_PRICE_PER_HOUR", "")
    try:
        price = float(text) if text else None
    except ValueError:
        price = -1.0
    if price is not None and not 0 < price < float("inf"):
        raise ValueError(f"PRICE_PER_HOUR={text} is no price: give US dollars, such as 2.50")
    return price


def prefix_hit_rate(trial: Trial) -> float | None:
    """Prompt tokens found in the prefix cache / looked up; a share, as the engine counts them.

    Over the whole trial, warm-up included.
    """
    values = trial.engine.values if trial.engine else {}
    queries = values.get(metrics.PREFIX_QUERIES)
    return values.get(metrics.PREFIX_HITS, 0.0) / queries if queries else None


def counter_increase(trial: Trial, metric: str) -> float | None:
    """How far an engine's counter rose over the whole trial, warm-up and drain included."""
    return trial.engine.values.get(metric) if trial.engine else None


def acceptance_rate(trial: Trial) -> float | None:
    """Draft tokens accepted / drafted; a share, as the engine counts them over the whole trial."""
    drafted, accepted = (
        counter_increase(trial, m) for m in (metrics.SPEC_DRAFTED, metrics.SPEC_ACCEPTED)
    )
    return accepted / drafted if drafted and accepted is not None else None


def acceptance_length(trial: Trial) -> float | None:
    """Tokens that a verified draft yields: those accepted and the target's own next one.

    Counted by the engine over the whole trial (Leviathan et al. 2023).
    """
    drafts, accepted = (
        counter_increase(trial, m) for m in (metrics.SPEC_DRAFTS, metrics.SPEC_ACCEPTED)
    )
    return 1 + accepted / drafts if drafts and accepted is not None else None


def kv_capacity_tokens(trial: Trial) -> float | None:
    """Tokens the KV cache holds: blocks x block size, as the engine's configuration echoes them."""
    config = trial.engine.info.get(metrics.CACHE_CONFIG, {}) if trial.engine else {}
    try:
        return float(int(config["num_gpu_blocks"]) * int(config["block_size"]))
    except (KeyError, ValueError):
        return None


def stalls_s(trial: Trial) -> list[float]:
    """For each intruder, the longest gap between tokens that any other stream saw meanwhile.

    Gaps that overlap the time from the intruder's send to its first token count, whole.
    """
    gaps = [
        (a, b)
        for r in trial.records
        if not trial.point.workload.is_intruder(r.index)
        for (a, _), (b, _) in pairwise(r.chunks)
    ]
    stalls = []
    for intruder in trial.intruders:
        start, end = intruder.sent_s, intruder.chunks[0][0]
        if touching_s := [b - a for a, b in gaps if a < end and b > start]:
            stalls.append(max(touching_s))
    return stalls


def prefill_pieces(trial: Trial) -> float | None:
    """Tokens a running stream received while a long prompt was prefilled, the mean over streams.

    A stream that decoded for a part of that time counts for the whole at its own pace; for less
    than half of it, not at all.
    """
    pieces = []
    for intruder in trial.intruders:
        start, end = intruder.sent_s, intruder.chunks[0][0]
        for r in trial.records:
            if trial.point.workload.is_intruder(r.index) or not r.chunks:
                continue
            since, until = max(start, r.chunks[0][0]), min(end, r.chunks[-1][0])
            if until - since >= (end - start) / 2:
                # the last step's token comes together with the intruder's own, or just after
                received = sum(since < at <= until + 0.005 for at, _ in r.chunks)
                pieces.append(received * (end - start) / (until - since))
    return mean(pieces)


def expected_pieces(point: Point) -> int:
    """How many pieces the token budget cuts a long prompt into beside the running streams."""
    assert point.workload.intruder
    budget = point.flags.max_num_batched_tokens - point.load.users
    return math.ceil(point.workload.intruder.prompt_tokens / budget)


def stall_mean_s(trial: Trial) -> float | None:
    """The mean stall of the other streams over the long prompts of a trial; see `stalls_s`."""
    return mean(stalls_s(trial))


def intruder_ttft_mean_s(trial: Trial) -> float | None:
    """The mean TTFT of the long prompts sent beside the streams."""
    return mean([r.ttft_s for r in trial.intruders if r.ttft_s is not None])


def engine_ttft_mean_s(trial: Trial) -> float | None:
    """The mean TTFT over every request of the trial as the engine's own histogram has it."""
    histogram = trial.engine and trial.engine.histograms.get(metrics.TTFT)
    return histogram.mean() if histogram else None


def client_ttft_mean_s(trial: Trial) -> float | None:
    """The mean TTFT over every request, from the send: what is held against the engine's."""
    return mean([r.chunks[0][0] - r.sent_s for r in trial.records if r.ok])
