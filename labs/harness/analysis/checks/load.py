"""Checks that the load was sent as planned, and that enough of it counts."""

from __future__ import annotations

from labs.harness.analysis.checks.expected import Expected, Found
from labs.harness.analysis.measure import Trial, ran_out
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import counted, literal
from loadtests.plan import LEAST_COUNTED

LATE_S, LATE_SHARE = 0.005, 0.05  # a send counts as late beyond both
MOST_LATE = 0.05
MOST_LOOP_LAG_S = 0.02  # at the 99th percentile
MOST_LOOP_LAG_ONCE_S, MOST_LOOP_LAG_ITLS = 0.05, 2.0  # at worst: the larger of the two
MOST_ERRORS = 0.01
LEAST_ACHIEVED = 0.95


def many_failed(trial: Trial, _: Expected) -> Found:
    if _share_failed(trial) > MOST_ERRORS:
        yield from _failed(trial)


def few_failed(trial: Trial, _: Expected) -> Found:
    if _share_failed(trial) <= MOST_ERRORS:
        yield from _failed(trial)


def _share_failed(trial: Trial) -> float:
    return len(trial.failed) / max(1, len(trial.records))


def _failed(trial: Trial) -> Found:
    if failed := trial.failed:
        first = literal(failed[0].error or "")
        yield {"failed": len(failed), "requests": len(trial.records), "first": first}


def process_lost(trial: Trial, _: Expected) -> Found:
    if trial.summary.lost_share:
        yield {"lost": trial.summary.lost_share}


def sent_late(trial: Trial, _: Expected) -> Found:
    lags = [(r.send_lag_s or 0.0, r.ttft_s or 0.0) for r in trial.measured_requests]
    late = sum(lag > max(LATE_S, LATE_SHARE * ttft) for lag, ttft in lags) / len(lags)
    if late > MOST_LATE:
        yield {"late": late}


def fell_behind(trial: Trial, _: Expected) -> Found:
    summary = trial.summary
    cut = summary.exhausted  # where the requests, or the trace, ended
    if summary.planned and not cut and summary.sent < LEAST_ACHIEVED * summary.planned:
        yield {"sent": summary.sent, "planned": summary.planned}


def loop_late(trial: Trial, _: Expected) -> Found:
    if trial.summary.loop_lag_p99_s > MOST_LOOP_LAG_S:
        yield {"lag_ms": 1000 * trial.summary.loop_lag_p99_s}


def loop_late_once(trial: Trial, _: Expected) -> Found:
    summary, itl_s = trial.summary, METRICS["itl_p50_s"].of(trial) or 0.0
    most_s = max(MOST_LOOP_LAG_ONCE_S, MOST_LOOP_LAG_ITLS * itl_s)
    if summary.loop_lag_p99_s <= MOST_LOOP_LAG_S and summary.loop_lag_max_s > most_s:
        yield {"lag_ms": 1000 * summary.loop_lag_max_s, "most_ms": 1000 * most_s}


def nothing_measured(trial: Trial, _: Expected) -> Found:
    if not trial.measured_requests:
        yield {}


def requests_ran_out(trial: Trial, _: Expected) -> Found:
    if ran_out(trial.point, trial.summary):
        workload = trial.point.workload
        settings = ["`requests`"]
        if workload.most_requests:
            settings.append(f"`workloads.{workload.name}.most_requests`")
        yield {"settings": " and ".join(settings)}


def too_few_requests(trial: Trial, _: Expected) -> Found:
    if (count := len(trial.measured_requests)) < LEAST_COUNTED:
        yield {"requests": counted(count, "request"), "least": LEAST_COUNTED}


def too_few_long_prompts(trial: Trial, _: Expected) -> Found:
    if trial.point.workload.intruder and (count := len(trial.intruders)) < LEAST_COUNTED:
        yield {"prompts": counted(count, "long prompt"), "least": LEAST_COUNTED}
