"""Computes each trial-level metric from a trial; `labs/harness/analysis/metrics.py` lists them all.

Request-level metrics (TTFT, TPOT, ITL ...) are defined in `loadtests/records.py`; here they are
taken over the requests *sent* in the measured window that succeeded. Percentiles are of raw samples
(linear interpolation); with too few samples a percentile is None. A function that has nothing to
measure returns None, never 0.

Rates are taken over complete cycles. In a closed loop a cycle is one request of one user, from its
send to the end of its answer: a rate is `users x sum(amount) / sum(cycle)` over the requests sent
in the window. A count over a window of fixed length would be wrong by up to a cycle, since users in
lockstep receive their tokens in bursts. Where the window was held open for the least number of
requests, that number is fixed instead of the time, and a ratio of two sums over a few requests is
biased where lengths vary (requests/s by a sixth): then it is Beale's (1962) ratio, which takes the
larger part of that away. In waves the cycle is the wave, and the window holds whole waves. A
request for several answers has a record for each, so a user has as many cycles at once. Cycles
leave out the pauses of a user whose requests take turns with those of other engines. An open loop
has no cycles: it counts what comes in the window. So does a closed loop whose batch emptied
before the last request that counts was answered, which made its last cycles too short; it counts
until the first user stopped. In `tests/unit/test_throughput.py` each is held against engines whose
throughput is known.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np

from labs.harness.spec import theory
from labs.harness.spec.lab import SLO, Point
from loadtests.arrivals import Concurrent, Contended, OfTrace
from loadtests.latencies import TPOT, Latency
from loadtests.plan import LEAST_COUNTED, TrialSummary
from loadtests.records import RequestRecord
from loadtests.workload import Asked
from serving import metrics
from serving.hardware import telemetry
from serving.hardware.telemetry import Sample
from serving.metrics import Snapshot

T = TypeVar("T")


def ran_out(point: Point, summary: TrialSummary) -> bool:
    """Whether a trial would have sent more than was prepared; a trace that is over would not."""
    load, trace = point.load, point.workload.trace
    if isinstance(load, OfTrace):
        over = bool(trace) and trace[-1][0] / load.speed <= summary.window_s[1]
    else:
        over = summary.sent == len(trace)  # a benchmark of so many requests
    return summary.exhausted and not over


@dataclass(frozen=True)
class OtherWork:
    """Holds what used the machine during a trial; None where it was not recorded.

    The shares are of the time of all CPU cores, but for that of the API server.
    """

    steal_share: float | None = None  # taken by other guests of the host
    other_processes_share: float | None = None  # used by other processes of this machine
    engine_share: float | None = None  # used by the engine
    gpu_processes: int | None = None  # of others, on the GPUs of this machine
    cores: int | None = None  # of this machine
    server_core_share: float | None = None  # of one core, by the busiest API server in the window


@dataclass(frozen=True)
class Trial:
    """A trial is a point played once: its records, and what the engine counted meanwhile."""

    point: Point
    repeat: int
    slo: SLO
    records: list[RequestRecord]
    summary: TrialSummary
    engine: Snapshot | None  # the engine's counters over this trial
    telemetry: list[Sample] = field(default_factory=list)  # of the hardware, on the trial's clock
    other_work: OtherWork = OtherWork()
    asked: Sequence[Asked] = ()  # by the index of a request; empty where that is not known
    usd_per_hour: float | None = None  # the price of the machine, as the run recorded it
    beside: Sequence[str] = ()  # the points whose requests took turns with this one's
    _once: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, compute: Callable[..., T], *of: object) -> T:
        """Compute something of this trial and `of`, and keep it for whoever asks again."""
        if (compute, of) not in self._once:
            self._once[compute, of] = compute(self, *of)
        value: T = self._once[compute, of]
        return value

    def info(self, metric: str) -> Mapping[str, str]:
        """The labels of an info metric of the engine; empty where it does not show it."""
        return self.engine.info.get(metric, {}) if self.engine else {}

    @property
    def cache_config(self) -> Mapping[str, str]:
        """The engine's configuration of its KV cache; empty where it is not known."""
        return self.info(metrics.CACHE_CONFIG)

    @cached_property
    def measured_requests(self) -> list[RequestRecord]:
        """The successful requests that were sent in the window, without those of an intruder."""
        return self._without_intruders(self._counted_records)

    @cached_property
    def streams(self) -> list[RequestRecord]:
        """Every request, of warm-up and drain too, without those of an intruder."""
        return self._without_intruders(self.records)

    def _without_intruders(self, records: list[RequestRecord]) -> list[RequestRecord]:
        workload = self.point.workload
        return (
            [r for r in records if not workload.is_intruder(r.index)]
            if workload.intruder
            else records
        )

    @cached_property
    def intruders(self) -> list[RequestRecord]:
        """The successful long prompts sent beside the streams in the window."""
        workload = self.point.workload
        sent = self._counted_records if workload.intruder else []
        return [r for r in sent if workload.is_intruder(r.index)]

    @cached_property
    def answered(self) -> list[RequestRecord]:
        """The requests that succeeded, of warm-up and drain too."""
        return [r for r in self.records if r.ok]

    @cached_property
    def _counted_records(self) -> list[RequestRecord]:
        return [r for r in self.answered if r.in_window]

    @cached_property
    def turned_away(self) -> list[RequestRecord]:
        """The requests that the engine refused for lack of room, as its flags ask it to.

        An engine without a limit on its queue has no reason to: there a refusal is a failure.
        """
        limited = self.point.flags.turns_away
        return [r for r in self.records if r.turned_away] if limited else []

    @cached_property
    def failed(self) -> list[RequestRecord]:
        """The requests that failed, without those that the engine turned away by its limit."""
        turned_away = {id(r) for r in self.turned_away}
        return [r for r in self.records if not r.ok and id(r) not in turned_away]

    @property
    def length_s(self) -> float:
        """The length of the trial, from its start to its last answer and its window's end."""
        return max([self.summary.window_s[1], *(r.over_s for r in self.records)])

    @property
    def window_length_s(self) -> float:
        """The length of the measured window, in seconds."""
        start, end = self.summary.window_s
        return end - start

    def samples_s(self, latency: Latency) -> array[float]:
        """Collect all samples of a latency in seconds: one per request, token or chunk."""
        return self.once(_samples_s, latency)

    def percentile_s(self, latency: Latency, q: int) -> float | None:
        """Compute the q-th percentile of a latency's samples, or None with too few for it."""
        return self.once(_percentiles_s, latency).get(q)

    def per_s(self, amount: Callable[[RequestRecord], float]) -> float | None:
        """Compute how much of an amount the requests that were sent in the window bring a second.

        See the module's docstring. None where no time is measured.
        """
        amounts = [amount(r) for r in self._sent]
        weight_per_s = self._weight_per_s
        if weight_per_s and self.complete_cycles and self._held_open:
            weight_per_s *= beale_correction(amounts, [cycle_s(r) for r in self._sent])
        return weight_per_s and weight_per_s * sum(amounts)

    @cached_property
    def _sent(self) -> list[RequestRecord]:
        """The streams that were sent in the window, whatever came of them."""
        return [r for r in self.streams if r.in_window]

    @cached_property
    def _weight_per_s(self) -> float | None:
        """The weight in 1/s at which each of these requests counts in a rate."""
        if self.complete_cycles:
            users = self.point.sequences * (1 - self.summary.lost_share)
            cycles_s = sum(map(cycle_s, self._sent))
            return users / cycles_s if cycles_s > 0 else None
        if self._in_turn:
            arrived_per_s, tokens = self.arrived_per_s(), sum(map(output_tokens, self._sent))
            return arrived_per_s / tokens if arrived_per_s and tokens else None
        return 1 / self.window_length_s if self.window_length_s > 0 else None

    @property
    def _held_open(self) -> bool:
        """Whether no more requests count than a window is held open for."""
        least = max(self.point.load.users, LEAST_COUNTED) * self.point.workload.choices
        return self.summary.answered_under_load and len(self._sent) <= least

    @property
    def _in_turn(self) -> bool:
        """Whether each user sends by itself, whenever its own last answer is complete."""
        return isinstance(self.point.load, Concurrent | Contended)

    @cached_property
    def complete_cycles(self) -> bool:
        """Whether the cycles that count all ran under the load of all users.

        So it is where users went on until the last of them, and otherwise where they stopped nearly
        together, as in lockstep, so that the batch did not empty meanwhile.
        """
        last_s = max((r.end_s or 0.0 for r in self._sent), default=0.0)
        stops_s = [s for r in self.streams if (s := r.end_s or 0.0) >= self._first_stop_s]
        idle_s = sum(max(0.0, last_s - stop_s) for stop_s in stops_s)
        return self._in_turn and (
            self.summary.answered_under_load or idle_s <= MOST_IDLE * sum(map(cycle_s, self._sent))
        )

    @cached_property
    def _first_stop_s(self) -> float:
        """When the first user of a closed loop stopped: the first end that no send follows."""
        last_sent_s = max((r.sent_s for r in self.streams), default=0.0)
        ends_s = (r.end_s for r in self.streams if r.end_s is not None)
        return min((end_s for end_s in ends_s if end_s > last_sent_s), default=math.inf)

    @property
    def loaded_window_s(self) -> tuple[float, float]:
        """The window, as far as all users of a closed loop were sending in it."""
        start, end = self.summary.window_s
        return start, min(end, self._first_stop_s) if self._in_turn else end

    def arrived_per_s(self) -> float | None:
        """Output tokens that arrive in the loaded window, whichever request they belong to, / s."""
        start, end = self.loaded_window_s
        if end <= start:
            return None
        return sum(r.chunks.tokens_between(start, end) for r in self.streams) / (end - start)


def _samples_s(trial: Trial, latency: Latency) -> array[float]:
    return array("d", chain.from_iterable(map(latency.samples_s, trial.measured_requests)))


def _percentiles_s(trial: Trial, latency: Latency) -> dict[int, float]:
    return percentiles(trial.samples_s(latency))


MOST_IDLE = 0.01
"""The most time of users that may be missing at the end of complete cycles, as a share of these."""
LEAST_SAMPLES = {50: 5, 90: 30, 99: 200}
"""The least number of samples for each percentile, so that at least two lie above a p99."""


def percentiles(samples: Sequence[float]) -> dict[int, float]:
    """Compute each percentile for which there are enough raw samples."""
    qs = [q for q, least in LEAST_SAMPLES.items() if len(samples) >= least]
    return dict(zip(qs, np.percentile(samples, qs).tolist(), strict=True)) if qs else {}


def percentile(samples: Sequence[float], q: int) -> float | None:
    """Compute the q-th percentile of raw samples, or None where there are too few for it."""
    if len(samples) < LEAST_SAMPLES[q]:
        return None
    return float(np.percentile(samples, q))


GROWING = 0.05
"""Seconds of TTFT that a second of arrivals adds, from which on it is said to grow."""


def grows(records: Iterable[RequestRecord]) -> bool:
    """Tell whether TTFT grows with the length of the run, as more arrives than is served.

    Of an open load each second adds to the queue what was not served of it, so that the slope of
    TTFT over the time of the send is the arrivals' excess over the capacity.
    """
    sent = [(r.sent_s, r.ttft_s) for r in records if r.in_window and r.ttft_s is not None]
    if len(sent) < LEAST_SAMPLES[90] or len({at_s for at_s, _ in sent}) < 2:
        return False
    at_s, ttft_s = np.array(sent).T
    slope, _ = np.polyfit(at_s, ttft_s, 1)
    return bool(slope > GROWING)


def mean(samples: Sequence[float]) -> float | None:
    """Compute the arithmetic mean, or None where there is no sample."""
    return float(np.mean(samples)) if samples else None


def beale_correction(amounts: Sequence[float], times_s: Sequence[float]) -> float:
    """Compute the factor by which sum(amount) / sum(time) over a few requests is to be corrected.

    A ratio of sums over n pairs is off by about (s_tt / t^2 - s_at / (a t)) / n of itself, and the
    corrected one by a multiple of 1 / n^2. Where every pair is the same the factor is 1. Defined by
    Beale ("Some uses of computers in operational research", 1962); compared by Tin (1965).
    """
    n = len(times_s)
    if n < 2 or not any(amounts):
        return 1.0
    mean_amount, mean_s = np.mean(amounts), np.mean(times_s)
    (_, s_at), (_, s_tt) = np.cov(amounts, times_s)
    by_both, by_time = s_at / (n * mean_amount * mean_s), s_tt / (n * mean_s**2)
    return float((1 + by_both) / (1 + by_time))


def cycle_s(record: RequestRecord) -> float:
    """Compute a request's cycle: from its send to the end of its answer, in seconds."""
    return 0.0 if record.end_s is None else record.end_s - record.sent_s


def output_tokens(record: RequestRecord) -> int:
    """Count the output tokens that a request received."""
    return sum(record.chunks.tokens)


def influences(trial: Trial) -> dict[str, dict[int, float]]:
    """Compute by how much each counted request moves the logarithm of a figure, by its index.

    The variance of these over n requests, divided by n, is that of the figure's logarithm (the
    empirical influence function: Hampel 1974). For a mean it is x_i / mean - 1, for a rate over
    complete cycles the difference of that of its amount and that of its cycle. Only of trials whose
    requests took turns with those of other engines, and of answers that come one by one.
    """
    requests = trial.measured_requests
    if not trial.beside or trial.point.workload.choices > 1 or not trial.complete_cycles:
        return {}
    samples_s = {
        "ttft_mean_s": {r.index: r.ttft_s for r in requests},
        "tpot_mean_s": {r.index: r.tpot_s for r in requests},
    }
    found = {metric: _relative(of) for metric, of in samples_s.items()}
    tokens = _relative({r.index: float(output_tokens(r)) for r in requests})
    cycles = _relative({r.index: cycle_s(r) for r in requests})
    found["output_tokens_per_s"] = {i: tokens[i] - cycles[i] for i in tokens.keys() & cycles.keys()}
    return {metric: of for metric, of in found.items() if of}


def _relative(values: Mapping[int, float | None]) -> dict[int, float]:
    """Compute how far each value lies from their mean, as a share of it; none where one lacks."""
    known = {i: value for i, value in values.items() if value is not None}
    average = mean([*known.values()])
    if len(known) < len(values) or not average:
        return {}
    return {i: round(value / average - 1, 6) for i, value in known.items()}


def output_tokens_per_s(trial: Trial) -> float | None:
    """Output tokens/s: of complete cycles, and in an open loop of those that arrive in the window.

    An intruder's tokens are left out, as in all other rates.
    """
    open_loop = trial.point.load.open_loop
    return (trial.arrived_per_s() if open_loop else trial.per_s(output_tokens)) or None


def requests_per_s(trial: Trial) -> float | None:
    """Requests/s: those that succeed, of complete cycles; in an open loop, sent in the window."""
    return trial.per_s(lambda r: r.ok)


def goodput_per_s(trial: Trial) -> float | None:
    """Requests/s that succeed within the SLO's TTFT and TPOT; a one-token output has no TPOT.

    Defined in DistServe (Zhong et al. 2024), here at the load that was sent.
    """
    return trial.per_s(lambda r: in_time(r, trial.slo))


def in_time(record: RequestRecord, slo: SLO) -> bool:
    """Tell whether a request succeeded within the SLO's TTFT and TPOT."""
    within = (record.ttft_s or 0) <= slo.ttft_s and (record.tpot_s or 0) <= slo.tpot_s
    return record.ok and within


def error_rate(trial: Trial) -> float | None:
    """Requests that failed / all requests of the trial, warm-up and drain included; a share.

    An intruder's are among both. What an engine turns away by a limit on its queue has not failed,
    and is among all: `turned_away_rate` counts it, over the window alone.
    """
    return len(trial.failed) / len(trial.records) if trial.records else None


def server_core_share(trial: Trial) -> float | None:
    """The CPU time of the busiest API server in the window / the window; a share of one core.

    As a process of Python it hardly uses more than one. None where it was not recorded, or where
    the process that answers requests computes, too.
    """
    return trial.other_work.server_core_share


def turned_away_rate(trial: Trial) -> float | None:
    """Requests that a limit on the engine's queue turned away / those sent in the window; a share.

    None where the engine has no such limit.
    """
    sent = sum(r.in_window for r in trial.records)
    if not sent or not trial.point.flags.turns_away:
        return None
    return sum(r.in_window for r in trial.turned_away) / sent


def batch(trial: Trial) -> float | None:
    """The mean number of requests in decode at once: seconds of decode / second (Little's law).

    A request decodes from its first token to its last. Without complete cycles, its decode counts
    as far as it lies in the window.
    """
    if trial.complete_cycles:
        return (
            trial.per_s(
                lambda r: r.chunks.times_s[-1] - r.chunks.times_s[0] if r.chunks.times_s else 0.0
            )
            or None
        )
    start, end = trial.loaded_window_s
    busy = sum(
        max(0.0, min(end, r.chunks.times_s[-1]) - max(start, r.chunks.times_s[0]))
        for r in trial.streams
        if r.chunks
    )
    return busy / (end - start) if busy and end > start else None


def mbu(trial: Trial) -> float | None:
    """Model bandwidth utilization: bytes/s that decode needs / the measured ceiling; a share.

    Bytes per step come from the model's shape at the mean batch and context, steps/s from TPOT:
    what decode must read, not what the device happened to move. Defined by Databricks ("LLM
    Inference Performance Engineering", 2023). None with speculation, where a step gives more tokens
    than one.
    """
    tpot_s, size = mean(trial.samples_s(TPOT)), batch(trial)
    if not tpot_s or not size or trial.point.flags.speculative_config:
        return None
    bandwidth = trial.point.ceilings.memory_bandwidth_bytes_per_s
    return _step_bytes(trial.point, size) / tpot_s / bandwidth


def _step_bytes(point: Point, size: float) -> float:
    """Compute the bytes of a decode step of so many requests, keys and values as they are cached.

    The context is the point's mean, or its window where layers attend to no more.
    """
    return theory.decode_bytes(point.shape, size, point.attended_tokens, point.flags.kv_value_bytes)


def flops_per_s(trial: Trial) -> float | None:
    """FLOP/s that the output tokens needed in decode; prefill is left out."""
    rate, point = output_tokens_per_s(trial), trial.point
    if rate is None:
        return None
    return rate * theory.decode_flops(point.shape, 1, point.attended_tokens)


def mfu(trial: Trial) -> float | None:
    """Model FLOP/s utilization: the FLOP/s of prefill and decode / the measured ceiling.

    A share of complete cycles, and without these of the window: there a prompt's prefill is spread
    evenly from its send to its first token, and a token's decode step comes when it arrives. So it
    is beside an intruder, whose prefill is work of the device too. Prefill leaves out the share of
    all prompts that the prefix cache held; each token after the first takes the FLOP of a decode
    step of one sequence. Defined in PaLM (Chowdhery et al. 2022), there for training.
    """
    start, end = trial.loaded_window_s
    point = trial.point
    cached_share = prefix_hit_rate(trial) or 0.0
    decode_flop = theory.decode_flops(point.shape, 1, point.attended_tokens)

    def flop(r: RequestRecord, start: float = -math.inf, end: float = math.inf) -> float:
        if not r.chunks:
            return 0.0
        first_s = r.chunks.times_s[0]
        prompt = r.prompt_tokens or point.prompt_tokens
        prefill_flop = theory.prefill_flops(point.shape, prompt, cached_share * prompt)
        within_s = min(end, first_s) - max(start, r.sent_s)
        prefilled = within_s / (first_s - r.sent_s) if within_s > 0 else 0.0
        decoded_tokens = r.chunks.tokens_between(start, end, since=1)
        return prefilled * prefill_flop + decode_flop * decoded_tokens

    if trial.complete_cycles and not trial.intruders:
        flops = trial.per_s(flop)
    elif end <= start:
        return None
    else:
        flops = sum(flop(r, start, end) for r in trial.records) / (end - start)
    return flops / point.ceilings.flops_per_s if flops else None


def intensity(trial: Trial) -> float | None:
    """Arithmetic intensity of the decode steps at the mean batch in flight, in FLOP/byte.

    It is the abscissa of the roofline (Williams et al. 2009). None with speculation, where a step
    computes guesses as well.
    """
    size, point = batch(trial), trial.point
    if size is None or point.flags.speculative_config:
        return None
    flops = theory.decode_flops(point.shape, size, point.attended_tokens)
    return flops / _step_bytes(point, size)


def usd_per_million_tokens(trial: Trial) -> float | None:
    """US dollars for a million output tokens; None where the run was given no PRICE_PER_HOUR."""
    price, rate = trial.usd_per_hour, output_tokens_per_s(trial)
    return price / 3600 / rate * 1e6 if price and rate else None


def joules_per_token(trial: Trial) -> float | None:
    """Joules per output token: mean power of the serving GPUs or processors / output tokens/s.

    The power is the energy that the devices used in the window, idle power and prefill included,
    over its length; the host's is not in it.
    """
    rate = output_tokens_per_s(trial)
    used_j = telemetry.energy_j(trial.telemetry, *trial.summary.window_s)
    return used_j / (rate * trial.window_length_s) if used_j and rate else None


def prefix_hit_rate(trial: Trial) -> float | None:
    """Prompt tokens found in the prefix cache / looked up; a share, as the engine counts them.

    It covers the whole trial, warm-up included.
    """
    values = trial.engine.values if trial.engine else {}
    queries = values.get(metrics.PREFIX_QUERIES)
    return values.get(metrics.PREFIX_HITS, 0.0) / queries if queries else None


def busiest_share(trial: Trial) -> float | None:
    """Requests that the busiest replica completed / all; a share. None where there is only one.

    It covers the whole trial, as the engines count.
    """
    values = trial.engine.values if trial.engine else {}
    done = [at for name, at in values.items() if name.startswith(f"{metrics.REQUESTS}:")]
    return max(done) / sum(done) if sum(done) else None


def counter_increase(trial: Trial, metric: str) -> float | None:
    """The increase of an engine's counter over the whole trial, warm-up and drain included."""
    return trial.engine.values.get(metric) if trial.engine else None


def acceptance_rate(trial: Trial) -> float | None:
    """Draft tokens accepted / drafted; a share, as the engine counts them over the whole trial."""
    drafted, accepted = (
        counter_increase(trial, m) for m in (metrics.SPEC_DRAFTED, metrics.SPEC_ACCEPTED)
    )
    return accepted / drafted if drafted and accepted is not None else None


def acceptance_length(trial: Trial) -> float | None:
    """Tokens that a verified draft yields: the accepted ones and the target's own next one.

    Counted by the engine over the whole trial (Leviathan et al. 2023).
    """
    drafts, accepted = (
        counter_increase(trial, m) for m in (metrics.SPEC_DRAFTS, metrics.SPEC_ACCEPTED)
    )
    return 1 + accepted / drafts if drafts and accepted is not None else None


def kv_capacity_tokens(trial: Trial) -> float | None:
    """Tokens that the KV cache holds, or those of all copies of the model together.

    Blocks x block size, from an engine's configuration, times the copies, each with its own. Of
    each copy's blocks vLLM keeps one for itself: it is counted here, and requests cannot have it.
    """
    config, copies = trial.cache_config, trial.point.flags.copies
    try:
        return float(copies * int(config["num_gpu_blocks"]) * int(config["block_size"]))
    except (KeyError, ValueError):
        return None


def stalls_s(trial: Trial) -> list[float]:
    """The longest gap between tokens in any other stream during each intruder's prefill.

    A gap counts, at its full length, where it overlaps the time from the intruder's send to its
    first token. In seconds, one for each intruder.
    """
    if not trial.intruders:
        return []
    gaps = [gap for r in trial.streams for gap in pairwise(r.chunks.times_s)]
    stalls = []
    for intruder in trial.intruders:
        start, end = intruder.sent_s, intruder.chunks.times_s[0]
        if touching_s := [b - a for a, b in gaps if a < end and b > start]:
            stalls.append(max(touching_s))
    return stalls


def prefill_pieces(trial: Trial) -> float | None:
    """Tokens that a running stream received while a long prompt was prefilled: mean over streams.

    The tokens of a stream that decoded for a part of that time are scaled up to the whole; a stream
    that decoded for less than half of it is left out.
    """
    pieces = []
    for intruder in trial.intruders:
        start, end = intruder.sent_s, intruder.chunks.times_s[0]
        for r in trial.streams:
            if not r.chunks:
                continue
            since, until = max(start, r.chunks.times_s[0]), min(end, r.chunks.times_s[-1])
            if until - since >= (end - start) / 2:
                # the last step's token comes together with the intruder's own, or just after
                received = sum(since < at <= until + 0.005 for at, _ in r.chunks)
                pieces.append(received * (end - start) / (until - since))
    return mean(pieces)


def expected_pieces(point: Point) -> int:
    """Compute into how many pieces the token budget cuts a long prompt beside running streams."""
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
    """The mean TTFT over every request of the trial, from the engine's own histogram."""
    histogram = trial.engine and trial.engine.histograms.get(metrics.TTFT)
    return histogram.mean() if histogram else None


def client_ttft_mean_s(trial: Trial) -> float | None:
    """The mean TTFT over every request, from the send: to be compared with the engine's."""
    return mean([r.chunks.times_s[0] - r.sent_s for r in trial.answered])
