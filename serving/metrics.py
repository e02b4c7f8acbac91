"""The lab's names of engines' metrics, and how `/metrics` is read.

The names are vLLM's: the files of every run, the dashboards and the digests of labs contain them.
Another engine's module maps its own names to these (`serving/engines/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, FiniteFloat

TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
E2E = "vllm:e2e_request_latency_seconds"
QUEUE_TIME = "vllm:request_queue_time_seconds"
PREFILL_TIME = "vllm:request_prefill_time_seconds"
DECODE_TIME = "vllm:request_decode_time_seconds"
STEP_TOKENS = "vllm:iteration_tokens_total"
REQUEST_PROMPT_TOKENS = "vllm:request_prompt_tokens"
REQUESTS = "vllm:request_success_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATION_TOKENS = "vllm:generation_tokens_total"
PREEMPTIONS = "vllm:num_preemptions_total"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
CACHE_CONFIG = "vllm:cache_config_info"
SPEC_DRAFTS = "vllm:spec_decode_num_drafts_total"
SPEC_DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
SPEC_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
SPEC_ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos_total"  # by label `position`
KV_LOADED_BYTES = "vllm:kv_offload_load_bytes_total"  # from the host's memory, where it offloads
TURNED_AWAY = "vllm:admission_rejections_total"  # by a limit on what waits; of vLLM 0.32, not 0.26
LORA = "vllm:lora_requests_info"
ENGINE_CONFIG = "engine_config"  # not a metric: the settings that the engine logs
ROUTER = "router"  # nor is this: the policy and limits that a router logs, and its replicas
EVEN_ROUTING = (
    "lab_even"  # its `routing` where `serving.plugins.random_weights.EvenRouting` routes tokens
)
ENGINE_ARGUMENTS = "engine_arguments"  # nor is this: what its log says that it was given
ZEROS = "random_weights_zeros"  # nor is this: their share by bits a weight, from the log
SERVED = "served_model"  # nor is this: the folder that it says it serves, and its files' SHA-256

HISTOGRAMS = (
    TTFT,
    ITL,
    E2E,
    QUEUE_TIME,
    PREFILL_TIME,
    DECODE_TIME,
    STEP_TOKENS,
    REQUEST_PROMPT_TOKENS,
)
COUNTERS = (
    REQUESTS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    PREEMPTIONS,
    PREFIX_QUERIES,
    PREFIX_HITS,
)
GAUGES = (RUNNING, WAITING, KV_USAGE, CACHE_CONFIG)
SPECULATION = (SPEC_DRAFTS, SPEC_DRAFTED, SPEC_ACCEPTED, SPEC_ACCEPTED_AT)
BY_REPLICA = (REQUESTS, PREFIX_QUERIES, PREFIX_HITS)
"""The counters that are also kept of each replica by itself: `of_replica`."""
MOST = 1e18  # that an engine can have counted, in any unit; sums and rates of it stay finite


def position(index: int) -> str:
    """Name the counter of drafts accepted at this position (0 is the first token drafted)."""
    return f"{SPEC_ACCEPTED_AT}:{index}"


def of_replica(metric: str, replica: int) -> str:
    """Name the counter of one replica of several behind a router."""
    return f"{metric}:{replica}"


def is_counter(name: str) -> bool:
    with_a_setting = (*SPECULATION, TURNED_AWAY, KV_LOADED_BYTES)
    of_each = tuple(f"{metric}:" for metric in (SPEC_ACCEPTED_AT, *BY_REPLICA))
    return name in (*COUNTERS, *with_a_setting) or name.startswith(of_each)


def is_known(name: str) -> bool:
    """Tell whether the lab knows a sample of this name; histograms have their own list."""
    return is_counter(name) or name in (
        *GAUGES,
        LORA,
        ENGINE_CONFIG,
        ENGINE_ARGUMENTS,
        ROUTER,
        ZEROS,
        SERVED,
    )


class KvUse(BaseModel, frozen=True, extra="forbid"):
    """Holds which share of an engine's KV cache was in use over a trial's window."""

    mean: FiniteFloat  # over time
    peak: FiniteFloat

    @classmethod
    def over_time(
        cls, readings: Sequence[tuple[float, float]], start_s: float, end_s: float
    ) -> KvUse | None:
        """Weigh readings (time, share) by the time from each to the next within a window.

        None where no reading holds in it.
        """
        held_s = used_s = peak = 0.0
        until = [*(at_s for at_s, _ in readings[1:]), end_s]
        for (at_s, share), next_s in zip(readings, until, strict=False):
            within_s = min(next_s, end_s) - max(at_s, start_s)
            if within_s > 0:
                held_s += within_s
                used_s += share * within_s
                peak = max(peak, share)
        return cls(mean=used_s / held_s, peak=peak) if held_s else None

    @classmethod
    def over_trials(cls, uses: Mapping[str, Sequence[KvUse]]) -> dict[str, KvUse]:
        """Average the means and the peaks of each point over its trials."""
        return {
            point: cls(mean=fmean(use.mean for use in of), peak=fmean(use.peak for use in of))
            for point, of in uses.items()
        }


@dataclass(frozen=True)
class Histogram:
    """A Prometheus histogram: cumulative `counts` at the upper bounds `le`, the last one inf."""

    le: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    sum: float = 0.0
    count: float = 0.0

    @property
    def adds_up(self) -> bool:
        """Whether the counts rise, to that of all observations at the bound inf."""
        return sorted(self.counts) == [*self.counts[:-1], self.count] and self.le[-1] == math.inf

    def minus(self, before: Histogram) -> Histogram:
        """Return the histogram of what was observed since `before` was read."""
        base = before.counts or (0.0,) * len(self.counts)
        return Histogram(
            self.le,
            tuple(a - b for a, b in zip(self.counts, base, strict=True)),
            self.sum - before.sum,
            self.count - before.count,
        )

    def plus(self, other: Histogram) -> Histogram:
        """Return the histogram of what both observed. Raises ValueError for other bounds."""
        if not (self.le and other.le):
            return self if self.le else other
        if self.le != other.le:
            raise ValueError("two histograms with other buckets cannot be added")
        return Histogram(
            self.le,
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            self.sum + other.sum,
            self.count + other.count,
        )

    def share_above(self, value: float) -> float:
        """Return the share of the observations in buckets that begin at `value` or above it."""
        counts = zip(self.le, self.counts, strict=True)
        below = next((count for bound, count in counts if bound >= value), self.count)
        return 1 - below / self.count if self.count else 0.0

    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def bucket_of(self, quantile: float) -> tuple[float, float] | None:
        """Find the bounds (lower, upper] of the bucket with the quantile; None when empty."""
        rank, lower = quantile * self.count, 0.0
        if not self.count:
            return None
        for bound, cumulative in zip(self.le, self.counts, strict=True):
            if cumulative >= rank:
                return lower, bound
            lower = bound
        return lower, float("inf")

    def bucket_around(self, value: float) -> tuple[float, float]:
        """Find the bounds (lower, upper] of the bucket in which a value lies."""
        upper = next((bound for bound in self.le if bound >= value), float("inf"))
        return max((bound for bound in self.le if bound < value), default=0.0), upper


@dataclass(frozen=True)
class Snapshot:
    """One reading of an engine's `/metrics`, summed over its label sets."""

    values: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    info: dict[str, dict[str, str]] = field(default_factory=dict)

    def since(self, before: Snapshot) -> Snapshot:
        """Subtract the counters and histograms of `before`; gauges and info stay as they are."""
        return Snapshot(
            {
                name: value - before.values.get(name, 0.0) if is_counter(name) else value
                for name, value in self.values.items()
            },
            {n: h.minus(before.histograms.get(n, Histogram())) for n, h in self.histograms.items()},
            self.info,
        )


def together(readings: Iterable[Snapshot]) -> Snapshot:
    """Add up counters and histograms of readings of one kind of engine; the rest is the last's.

    Raises ValueError where their histograms have other buckets.
    """
    values: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    info: dict[str, dict[str, str]] = {}
    for reading in readings:
        for name, value in reading.values.items():
            values[name] = value + (values.get(name, 0.0) if is_counter(name) else 0.0)
        for name, histogram in reading.histograms.items():
            histograms[name] = histograms.get(name, Histogram()).plus(histogram)
        info |= reading.info
    return Snapshot(values, histograms, info)


def across(readings: Sequence[Snapshot]) -> Snapshot:
    """Put together readings of replicas at one time: what they count, run and have waiting adds up.

    Of the shares of their KV caches in use the largest is kept. The rest is the last's. Raises
    ValueError where their histograms have other buckets.
    """
    whole = together(readings)
    for metric in BY_REPLICA:
        whole.values.update(
            (of_replica(metric, replica), each.values[metric])
            for replica, each in enumerate(readings)
            if metric in each.values
        )
    for name, combine in ((RUNNING, sum), (WAITING, sum), (KV_USAGE, max)):
        if values := [each.values[name] for each in readings if name in each.values]:
            whole.values[name] = combine(values)
    return whole


def parse(text: str, renamed: Mapping[str, str] | None = None) -> Snapshot:
    """Read the Prometheus text format; `renamed` maps an engine's names to the lab's.

    Unknown metrics are kept under their own names. Raises ValueError for another format, and for a
    number that a known metric cannot have.
    """
    try:
        snapshot = _parse(text, renamed or {})
    except KeyError as error:
        raise ValueError(f"a series of a histogram or counter has no {error}") from error
    except OverflowError as error:
        raise ValueError("a number has too many digits") from error
    for name, shown in snapshot.histograms.items():
        if name in HISTOGRAMS and not shown.adds_up:
            raise ValueError(f"the buckets of {name} do not add up to its count")
    return within(snapshot, 0.0)


def within(snapshot: Snapshot, least: float) -> Snapshot:
    """Return it if each number of a known metric lies between `least` and MOST.

    Raises ValueError where one does not; NaN and infinity never do.
    """
    for name, number in _known_numbers(snapshot):
        if not least <= number <= MOST:
            raise ValueError(f"{name} shows {number}, which is no number of it")
    return snapshot


def _known_numbers(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    for name, value in snapshot.values.items():
        if is_known(name):
            yield name, value
    for name in snapshot.histograms.keys() & set(HISTOGRAMS):
        shown = snapshot.histograms[name]
        bounds = (bound for bound in shown.le if bound != math.inf)
        yield from ((name, number) for number in (*bounds, *shown.counts, shown.sum, shown.count))


def _parse(text: str, lab_name: Mapping[str, str]) -> Snapshot:
    values: dict[str, float] = {}
    info: dict[str, dict[str, str]] = {}
    buckets: dict[str, dict[float, float]] = {}
    sums: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        histogram = lab_name.get(family.name, family.name)
        for sample in family.samples:
            name = lab_name.get(sample.name, sample.name)
            if family.type == "histogram":
                if sample.name.endswith("_bucket"):
                    counts = buckets.setdefault(histogram, {})
                    le = float(sample.labels["le"])
                    counts[le] = counts.get(le, 0.0) + sample.value
                elif not sample.name.endswith("_created"):
                    totals = sums.setdefault(histogram, {})
                    suffix = sample.name.removeprefix(family.name)
                    totals[suffix] = totals.get(suffix, 0.0) + sample.value
            else:
                before = values.get(name, 0.0)
                add = max if name == KV_USAGE else float.__add__  # of copies, the fullest cache
                values[name] = add(before, sample.value)
                if name == SPEC_ACCEPTED_AT:
                    at_position = position(int(sample.labels["position"]))
                    values[at_position] = values.get(at_position, 0.0) + sample.value
                if name.endswith("_info"):
                    info[name] = dict(sample.labels)
    histograms = {
        name: Histogram(
            tuple(sorted(counts)),
            tuple(counts[le] for le in sorted(counts)),
            sums[name].get("_sum", 0.0),
            sums[name].get("_count", 0.0),
        )
        for name, counts in buckets.items()
    }
    return Snapshot(values, histograms, info)
