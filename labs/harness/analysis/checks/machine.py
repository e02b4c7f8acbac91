"""Checks that the machine worked for the trial alone, and that no part of it was at its limit."""

from __future__ import annotations

import math

from labs.harness.analysis.checks.expected import Expected, Found
from labs.harness.analysis.measure import Trial
from serving.hardware import telemetry
from serving.hardware.telemetry import POWER_CAP, SLOWDOWNS, Sample

MOST_SLOWED = 0.01  # share of the window; one sample can be a change of load
MOST_CAPPED = 0.5
MOST_STEAL = 0.02  # share of all CPU time
MOST_OTHERS = 0.05  # of the CPU time that the engine uses
MOST_SERVER = 0.9  # of one core; beyond, requests and chunks wait for it
LEAST_OTHERS_CORES = 0.01  # of the CPU time of one core: less is a tick or two of its clock
LEAST_OTHERS = 0.005  # of all CPU time, where the number of cores was not recorded


def _in_window(trial: Trial) -> list[Sample]:
    return telemetry.within(trial.telemetry, *trial.summary.window_s)


def gpu_slowed(trial: Trial, _: Expected) -> Found:
    inside = _in_window(trial)
    causes = [c for c in SLOWDOWNS.values() if telemetry.throttled_share(inside, [c])]
    slowed = telemetry.throttled_share(inside, causes) or 0.0
    if slowed > MOST_SLOWED:
        yield {"slowed": slowed, "causes": ", ".join(causes)}


def gpu_capped(trial: Trial, _: Expected) -> Found:
    capped = telemetry.throttled_share(_in_window(trial), [POWER_CAP]) or 0.0
    if capped > MOST_CAPPED:
        yield {"capped": capped}


def cpu_stolen(trial: Trial, _: Expected) -> Found:
    if (steal := trial.other_work.steal_share or 0.0) > MOST_STEAL:
        yield {"steal": steal}


def gpu_shared(trial: Trial, _: Expected) -> Found:
    if processes := trial.other_work.gpu_processes:
        yield {"processes": processes}


def others_beside_the_engine(trial: Trial, expected: Expected) -> Found:
    engine_share = trial.other_work.engine_share
    if engine_share is not None:
        yield from _others(trial, expected, engine_share)


def others_beside_the_rest(trial: Trial, expected: Expected) -> Found:
    """Look at an old trial, which did not record what the engine used: at most what was left."""
    if trial.other_work.engine_share is None:
        yield from _others(trial, expected, 1 - (trial.other_work.other_processes_share or 0.0))


def _others(trial: Trial, expected: Expected, engine_share: float) -> Found:
    """Compare what other processes used with the engine; an endpoint's machine is not known."""
    others, cores = trial.other_work.other_processes_share, trial.other_work.cores
    if others is None or expected.endpoint:
        return
    least = LEAST_OTHERS_CORES / cores if cores else LEAST_OTHERS
    if others > max(least, MOST_OTHERS * engine_share):
        yield {"others": others / engine_share if engine_share else math.inf}


def gpu_unread(trial: Trial, expected: Expected) -> Found:
    if not expected.gpu_part:
        yield from _unread(trial, expected)


def gpu_part_unread(trial: Trial, expected: Expected) -> Found:
    """Look at a part of a GPU (MIG, vGPU), which refuses to be read whatever its user does."""
    if expected.gpu_part:
        yield from _unread(trial, expected)


def _unread(trial: Trial, expected: Expected) -> Found:
    unread = []
    if trial.other_work.gpu_processes is None:
        unread.append("whether other processes used it")
    if telemetry.throttled_share(_in_window(trial), []) is None:
        unread.append("whether heat or power slowed it")
    if expected.on_gpus and unread:
        yield {"unread": ", nor ".join(unread)}


def server_busy(trial: Trial, expected: Expected) -> Found:
    """Look at the API server, a process of Python that hardly uses more than a core.

    It sends each token of every stream. Where it is always busy, chunks wait for it, users for
    their answers, and the engine for the users' next requests: the figures, throughput and
    latencies alike, are then the server's limit, and two variants look the same whatever the engine
    does. That is what this vLLM serves on this machine, so it withholds no verdict; on a GPU every
    answer of the run says it as well (derived.summarize).

    Where there are several, it is about the busiest. Other threads of a server, which Python lets
    compute meanwhile, are in its CPU time, too, so that one near the limit may not be at it. One
    whose core others take is at its limit sooner; those are named by the other processes.
    """
    if not _may_have_more_servers(trial, expected):
        yield from _busy(trial)


def server_busy_that_may_be_several(trial: Trial, expected: Expected) -> Found:
    """Look at the same where several servers, on cores that the engine leaves free, mend it.

    They are no default: no lab has run with them on a GPU, where an engine that does not start
    would cost more than a verdict with a caveat. On a CPU what keeps the server busy may be the
    engine itself, by which the cores' caches, memory and clock are used, and more servers would
    take cores from it.
    """
    if _may_have_more_servers(trial, expected):
        servers = max(4, 2 * trial.point.flags.api_server_count)
        for busy in _busy(trial):
            yield {**busy, "servers": servers}


def _may_have_more_servers(trial: Trial, expected: Expected) -> bool:
    return expected.on_gpus and not trial.point.flags.get("enable-lora")


def _busy(trial: Trial) -> Found:
    share = trial.other_work.server_core_share
    if share is not None and share > MOST_SERVER:
        yield {"busy": share}
