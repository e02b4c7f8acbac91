"""Defines every metric in one row of a table.

To add a metric, add a row and, unless it is a mean or a percentile of a latency, the function in
`analysis/measure.py` that computes it. Whatever measures, judges, compares, draws or exports
asks this table; nothing is read out of a metric's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from labs.harness.analysis.measure import (
    LEAST_SAMPLES,
    Trial,
    acceptance_length,
    acceptance_rate,
    batch,
    busiest_share,
    client_ttft_mean_s,
    counter_increase,
    engine_ttft_mean_s,
    error_rate,
    flops_per_s,
    goodput_per_s,
    intensity,
    intruder_ttft_mean_s,
    joules_per_token,
    kv_capacity_tokens,
    mbu,
    mean,
    mfu,
    output_tokens_per_s,
    percentile,
    prefill_pieces,
    prefix_hit_rate,
    requests_per_s,
    server_core_share,
    stall_mean_s,
    turned_away_rate,
    usd_per_million_tokens,
)
from loadtests.latencies import CHUNK_GAP, E2E, ITL, TPOT, TTFT, Latency
from serving.metrics import PREEMPTIONS

# "1": a number; "share": a part of 1, which is shown in per cent
Unit = Literal["s", "tok", "tok/s", "req/s", "FLOP/s", "1", "share", "USD", "J"]
Repeats = Mapping[int, Mapping[str, float | None]]  # of a point: repeat -> metric -> value


@dataclass(frozen=True)
class Statistic:
    """A statistic is what is computed from a trial, and from which samples."""

    per: Literal["token", "chunk", "request", "long prompt", "trial"]  # what gives one sample
    of: Callable[[Trial], float | None]
    latency: Latency | None = None  # whose samples a mean or a percentile takes
    q: int | None = None  # which percentile
    pooled: bool = False  # over the samples of all repeats; else a mean over repeats

    @property
    def least_samples(self) -> int:
        """The least number of samples; with fewer the statistic is None."""
        return 1 if self.q is None else LEAST_SAMPLES[self.q]


@dataclass(frozen=True)
class Metric:
    """A trial-level metric and where a reader meets it."""

    name: str  # its key in summaries, in lab files, and as a label in Prometheus
    title: str
    unit: Unit
    better: Literal["higher", "lower"]
    statistic: Statistic
    most: float = math.inf  # that it can be; none can be below zero
    column: int | None = None  # its place in the table of every point, from the left
    main: bool = False  # also in the short table that a terminal shows
    compared: bool = False  # in comparisons, hence in reproductions
    exported: bool = True  # to Prometheus, once a run has ended
    each_trial: bool = True  # measured in every trial; else only over all repeats together
    # between different machines: compared, or listed, as a share of each machine's own ceiling is
    across_machines: Literal["", "compared", "listed"] = ""
    token_times: bool = False  # needs the times of single tokens within a stream
    by_engine: bool = False  # counted by the engine over the whole trial, whatever its window
    # by the engine's scheduler in virtual time, at every point: in files alone, or in reports too
    forecast: Literal["", "kept", "shown"] = ""
    # what the dashboards *Compare* (after "Lower is better; ") and *Machines* say of it; empty: it
    # has no panel there
    compare_panel: str = ""
    machines_panel: str = ""

    def of(self, trial: Trial) -> float | None:
        """Compute the metric of a trial, or None where it cannot be measured."""
        return self.statistic.of(trial)


# ---------------------------------------------------------------------------------- the statistics


def mean_of(latency: Latency) -> Statistic:
    """Take the mean of a latency's samples; a point's figure is the mean over repeats."""
    return Statistic(latency.per, lambda t: mean(t.samples_s(latency)), latency)


def percentile_of(latency: Latency, q: int, pooled: bool = True) -> Statistic:
    """Take the q-th percentile of a latency's raw samples."""
    return Statistic(latency.per, lambda t: t.percentile_s(latency, q), latency, q, pooled)


def of_trial(of: Callable[[Trial], float | None]) -> Statistic:
    """Take a rate, a ratio of two totals, or a count of a trial."""
    return Statistic("trial", of)


def mean_over(
    per: Literal["request", "long prompt"], of: Callable[[Trial], float | None]
) -> Statistic:
    """Take a mean of samples other than the latencies of the measured streams."""
    return Statistic(per, of)


# --------------------------------------------------------------------------------------- the table

LOW: Literal["lower"] = "lower"
HIGH: Literal["higher"] = "higher"


def _table(*rows: Metric) -> dict[str, Metric]:
    return {row.name: row for row in rows}


# fmt: off
METRICS: dict[str, Metric] = _table(
    Metric("output_tokens_per_s", "Output throughput", "tok/s", HIGH, of_trial(output_tokens_per_s),
           column=10, main=True, compared=True, forecast="shown",
           compare_panel="see at which load the variants part.",
           machines_panel="Absolute figures are a machine's own; the order of variants is what may"
           " carry over."),
    Metric("requests_per_s", "Requests completed", "req/s", HIGH, of_trial(requests_per_s),
           forecast="kept"),
    Metric("goodput_per_s", "Goodput", "req/s", HIGH, of_trial(goodput_per_s),
           column=70, compared=True, forecast="kept",
           compare_panel="requests/s that met the SLO: the throughput for which nobody waited too"
           " long."),
    Metric("ttft_mean_s", "TTFT, mean", "s", LOW, mean_of(TTFT), forecast="shown"),
    Metric("ttft_p50_s", "TTFT, p50", "s", LOW, percentile_of(TTFT, 50),
           column=20, main=True, compared=True, forecast="kept",
           compare_panel="prefill and queueing.",
           machines_panel="Prefill, which arithmetic bounds, and the time in the queue."),
    Metric("ttft_p90_s", "TTFT, p90", "s", LOW, percentile_of(TTFT, 90), column=30, compared=True),
    Metric("ttft_p99_s", "TTFT, p99", "s", LOW, percentile_of(TTFT, 99), forecast="kept"),
    Metric("tpot_mean_s", "TPOT, mean", "s", LOW, mean_of(TPOT),
           column=40, main=True, compared=True, token_times=True, forecast="shown",
           compare_panel="the pace of an answer.",
           machines_panel="Decode is bound by memory bandwidth, so this follows it."),
    Metric("tpot_p50_s", "TPOT, p50", "s", LOW, percentile_of(TPOT, 50), token_times=True),
    Metric("tpot_p90_s", "TPOT, p90", "s", LOW, percentile_of(TPOT, 90),
           exported=False, each_trial=False, token_times=True),
    Metric("tpot_p99_s", "TPOT, p99", "s", LOW, percentile_of(TPOT, 99), token_times=True),
    Metric("itl_p50_s", "ITL, p50", "s", LOW, percentile_of(ITL, 50),
           token_times=True, forecast="kept"),
    Metric("itl_p90_s", "ITL, p90", "s", LOW, percentile_of(ITL, 90),
           exported=False, each_trial=False, token_times=True),
    Metric("itl_p99_s", "ITL, p99", "s", LOW, percentile_of(ITL, 99),
           column=50, compared=True, token_times=True,
           compare_panel="how long a stream stands still."),
    Metric("chunk_gap_p99_s", "Chunk gap, p99", "s", LOW,
           percentile_of(CHUNK_GAP, 99, pooled=False), token_times=True),
    Metric("e2e_p50_s", "E2E, p50", "s", LOW, percentile_of(E2E, 50),
           column=60, main=True, compared=True, forecast="kept",
           compare_panel="the whole answer."),
    Metric("e2e_p90_s", "E2E, p90", "s", LOW, percentile_of(E2E, 90),
           exported=False, each_trial=False),
    Metric("e2e_p99_s", "E2E, p99", "s", LOW, percentile_of(E2E, 99), forecast="kept"),
    Metric("error_rate", "Error rate", "share", LOW, of_trial(error_rate), most=1,
           column=80, compared=True, across_machines="compared"),
    Metric("turned_away_rate", "Turned away", "share", LOW, of_trial(turned_away_rate), most=1,
           column=85, compared=True, across_machines="compared", forecast="kept"),
    Metric("batch", "Requests in decode, mean", "1", HIGH, of_trial(batch),
           across_machines="compared", forecast="kept"),
    Metric("mbu", "MBU", "share", HIGH, of_trial(mbu),
           column=170, main=True, compared=True, across_machines="listed",
           machines_panel="Share of the measured bandwidth that decode needs: what is left is"
           " overhead."),
    Metric("mfu", "MFU", "share", HIGH, of_trial(mfu),
           column=180, compared=True, across_machines="listed"),
    Metric("intensity", "FLOP per byte", "1", HIGH, of_trial(intensity),
           across_machines="compared"),
    Metric("flops_per_s", "Decode rate", "FLOP/s", HIGH, of_trial(flops_per_s)),
    Metric("prefix_hit_rate", "Prefix hit rate", "share", HIGH, of_trial(prefix_hit_rate), most=1,
           column=90, compared=True, across_machines="compared", by_engine=True, forecast="shown"),
    Metric("busiest_share", "Requests at the busiest replica", "share", LOW,
           of_trial(busiest_share), most=1, column=95, compared=True, across_machines="compared",
           by_engine=True, forecast="kept"),
    Metric("acceptance_rate", "Drafts accepted", "share", HIGH, of_trial(acceptance_rate), most=1,
           column=130, compared=True, across_machines="compared", by_engine=True, forecast="kept"),
    Metric("acceptance_length", "Tokens per draft step", "1", HIGH, of_trial(acceptance_length),
           column=140, compared=True, across_machines="compared", by_engine=True, forecast="shown"),
    Metric("preemptions", "Preemptions", "1", LOW,
           of_trial(lambda t: counter_increase(t, PREEMPTIONS)),
           column=160, across_machines="compared", by_engine=True, forecast="shown"),
    Metric("kv_capacity_tokens", "KV capacity", "tok", HIGH, of_trial(kv_capacity_tokens),
           column=150, compared=True, by_engine=True, forecast="kept"),
    Metric("prefill_pieces", "Pieces of a long prompt", "1", LOW,
           mean_over("long prompt", prefill_pieces),
           column=110, compared=True, across_machines="compared", forecast="kept"),
    Metric("stall_mean_s", "Stall during a prefill, mean", "s", LOW,
           mean_over("long prompt", stall_mean_s),
           column=100, compared=True, token_times=True, forecast="shown"),
    Metric("intruder_ttft_mean_s", "TTFT of the long prompt", "s", LOW,
           mean_over("long prompt", intruder_ttft_mean_s),
           column=120, compared=True, forecast="shown"),
    Metric("server_core_share", "API server's share of a core", "share", LOW,
           of_trial(server_core_share), column=185),
    Metric("usd_per_million_tokens", "$/M tokens", "USD", LOW, of_trial(usd_per_million_tokens),
           column=200),
    Metric("joules_per_token", "J/token", "J", LOW, of_trial(joules_per_token), column=190),
    Metric("engine_ttft_mean_s", "TTFT, engine's mean", "s", LOW,
           mean_over("request", engine_ttft_mean_s), by_engine=True),
    Metric("client_ttft_mean_s", "TTFT, client's mean", "s", LOW,
           mean_over("request", client_ttft_mean_s)),
)
# fmt: on


# -------------------------------------------------------------------------------- questions to it


def measure(trial: Trial) -> dict[str, float | None]:
    """Compute every metric of one trial; None where the trial has too few samples for it."""
    return {name: metric.of(trial) for name, metric in METRICS.items() if metric.each_trial}


def trial_metrics() -> list[str]:
    """Name the metrics that are measured in every trial, which claims and forecasts may use."""
    return [name for name, metric in METRICS.items() if metric.each_trial]


def pooled_latencies() -> set[Latency]:
    """List the latencies whose samples are pooled over the repeats of a point."""
    return {
        metric.statistic.latency
        for metric in METRICS.values()
        if metric.statistic.pooled and metric.statistic.latency
    }


def pooled_percentiles(samples_s: Mapping[Latency, Sequence[float]]) -> dict[str, float]:
    """Compute a point's percentiles from the samples of all its repeats together, in seconds.

    A percentile with too few samples is left out.
    """
    figures = {}
    for name, metric in METRICS.items():
        statistic = metric.statistic
        if statistic.pooled and statistic.latency and statistic.q:
            value = percentile(samples_s[statistic.latency], statistic.q)
            if value is not None:
                figures[name] = value
    return figures


def columns() -> list[str]:
    """Name the columns of the table of every point, from the left."""
    placed = {name: metric.column for name, metric in METRICS.items() if metric.column is not None}
    return sorted(placed, key=placed.__getitem__)


def main_columns() -> list[str]:
    """Name those of the columns that a terminal has room for."""
    return [name for name in columns() if METRICS[name].main]


def shown_first() -> list[str]:
    """Name the figures that a page draws unless its reader chooses others.

    They are the main columns, those with an interval before percentiles of all samples together.
    """
    return sorted(main_columns(), key=lambda name: METRICS[name].statistic.pooled)


def compared_metrics() -> list[str]:
    """Name the figures of a comparison: first those that depend on the machine."""
    chosen = [name for name in columns() if METRICS[name].compared]
    chosen += [name for name in METRICS if METRICS[name].compared and name not in chosen]
    return sorted(chosen, key=lambda name: METRICS[name].across_machines != "")


def by_repeat(repeats: Repeats, metric: str) -> dict[int, float]:
    """Map each repeat to its value of a metric; a repeat without one is left out."""
    return {repeat: v for repeat, row in repeats.items() if (v := row.get(metric)) is not None}
