"""Measure what the load generator adds to TTFT and to gaps, and the CPU time it costs.

The reference is a server that records when it wrote each chunk (`bench/truth.py`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from bench import tell, trials
from bench.load import locust
from bench.trials import Totals
from bench.truth import PROGRAMS, SHARED
from labs.harness.reports import instruments

REPEATS = 2


def measure(work: Path) -> instruments.Streams:
    """Play every program once, then all again; each by one load process, some also by two."""
    cases = [(program, 1) for program in PROGRAMS] + [(program, 2) for program in SHARED]
    cases.sort(key=lambda case: PROGRAMS.index(case[0]))
    totals = {case: Totals() for case in cases}
    users = max(program.streams for program in PROGRAMS)
    with contextlib.ExitStack() as exits:
        tell("streams: starting Locust")
        loads = {n: exits.enter_context(locust(users, work / f"{n}", n)) for n in (1, 2)}
        for repeat in range(REPEATS):
            for i, (program, processes) in enumerate(cases):
                tell(f"streams: {program.title}, {processes} sending, {repeat + 1} of {REPEATS}")
                folder = work / f"{repeat}-{i}"
                trials.measure(program, loads[processes], folder, totals[program, processes])
    rows = [cost.sent(program, processes) for (program, processes), cost in totals.items()]
    return instruments.Streams(rows=rows)
