"""How the load generator's memory grows over an hour of load, minute after minute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression

from bench import BenchError, truth
from bench.clock import Clock
from bench.console import aim
from bench.load import locust, trial
from bench.truth import Program
from labs.harness.telling import instruments

SENT = Program(64)
MINUTE_S = 60.0
LEAST_MINUTES = 5
SETTLING, LEAST_SETTLING = 0.1, 2
"""The first minutes, by share and number, are left out: memory that is taken once is no growth."""
MOST_GROWTH = 0.05  # of what a process holds, an hour


def measure(clock: Clock, work: Path, minutes: int) -> instruments.Soak:
    """Play trials of a minute on one Locust, one after another; look at its memory after each.

    Raises BenchError where a trial is cut short, or where the minutes are too few for a slope.
    """
    requests, records = work / "requests.jsonl", work / "records"
    work.mkdir(parents=True)
    truth.write_requests(requests, SENT, MINUTE_S)
    held: list[tuple[int, int]] = []
    sent = 0
    with locust(SENT.streams, work) as load, truth.serving(SENT, work) as (url, _):
        for minute in range(minutes):
            clock.tell(f"minute {minute + 1} of {minutes}", minute / minutes)
            summary = load.generator.play(trial(url, SENT.streams, requests, 0, MINUTE_S, records))
            if summary.exhausted or summary.aborted:
                raise BenchError(summary.aborted or "the prepared requests ran out")
            sent += summary.sent
            held.append(load.held_bytes())
    masters, workers = zip(*held, strict=True)
    soak = instruments.Soak(
        minutes=minutes,
        streams=SENT.streams,
        requests=sent,
        sending=memory_of(workers),
        recording=memory_of(masters),
    )
    for name, memory in (("sends", soak.sending), ("records", soak.recording)):
        figure = f"growth an hour of the process that {name}"
        aim(figure, 100 * memory.growth, 100 * MOST_GROWTH, "%")
    return soak


def memory_of(held_bytes: Sequence[int]) -> instruments.Memory:
    """Fit a line through what was held after each minute. Raises BenchError for too few."""
    if len(held_bytes) < LEAST_MINUTES:
        raise BenchError(f"a slope takes {LEAST_MINUTES} minutes or more")
    settled = held_bytes[max(LEAST_SETTLING, int(SETTLING * len(held_bytes))) :]
    slope, _ = linear_regression(range(len(settled)), settled)
    return instruments.Memory(most_bytes=max(held_bytes), bytes_per_hour=60 * slope)
