"""Measure what the load generator adds to TTFT and to gaps, and the CPU time it costs.

The reference is a server that records when it wrote each chunk (`bench/truth.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import trials
from bench.console import aim, console, scaled, table, tell
from bench.load import locust
from bench.trials import Totals
from bench.truth import CHUNKS, PROGRAMS, SHARED, TTFT_S
from labs.harness.telling import instruments

REPEATS = 2


@dataclass(frozen=True)
class Aims:
    """Holds the most that the load generator should add and take, at a number of streams."""

    ttft_p50_s: float
    ttft_p99_s: float
    cpu_s_per_chunk: float = 12e-6


AIMS = {16: Aims(0.001, 0.001), 64: Aims(0.002, 0.003), 256: Aims(0.004, 0.008)}
"""By streams that all begin and end together, with 10 ms between chunks."""
DELIVERED = {64: 0.99, 256: 0.8}
"""The least share of their chunks that streams should get, with 1 ms between chunks.

That is 60,000 chunks/s to 64 streams, and 195,000 to 256: more than one core can write or read one
by one, so that several wait for each reading.
"""


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
                tell(f"streams: {program.title}, {many(processes)}, {repeat + 1} of {REPEATS}")
                folder = work / f"{repeat}-{i}"
                trials.measure(program, loads[processes], folder, totals[program, processes])
    rows = [cost.sent(program, processes) for (program, processes), cost in totals.items()]
    show(rows)
    return instruments.Streams(rows=rows)


def many(processes: int) -> str:
    return f"{processes} load process{'es' if processes > 1 else ''}"


def show(rows: Sequence[instruments.Sent]) -> None:
    times = table(
        "What the load generator adds, against a server that records what it sent (ms)",
        *("streams, gap", "load processes", "TTFT added p50", "p99", "at the start p50", "p99"),
        *("read late p50", "p99", "gap error p50", "p99", "server late p99"),
    )
    costs = table(
        "What it delivers, and the CPU of what sends",
        *("streams, gap", "load processes", "chunks/s", "lost", "delivered", "µs a chunk"),
        *("with the master", "s per 1,000 tokens"),
    )
    for sent in rows:
        tokens = f" × {sent.tokens_per_chunk}" if sent.tokens_per_chunk > 1 else ""
        shape = f", {sent.shape}" if sent.shape else ""
        name = f"{sent.streams}{tokens}, {1000 * sent.gap_s:g} ms{shape}"
        times_s = (
            *(sent.ttft_added_p50_s, sent.ttft_added_p99_s),
            *(sent.start_ttft_added_p50_s, sent.start_ttft_added_p99_s),
            *(sent.read_late_p50_s, sent.read_late_p99_s),
            *(sent.gap_error_p50_s, sent.gap_error_p99_s, sent.server_late_p99_s),
        )
        times.add_row(name, f"{sent.load_processes}", *(scaled(t, 1000, 2) for t in times_s))
        costs.add_row(
            name,
            f"{sent.load_processes}",
            f"{sent.chunks_per_s:,.0f}",
            f"{sent.lost}",
            f"{sent.delivered:.1%}",
            scaled(sent.cpu_s_per_chunk, 1e6, 1),
            scaled(sent.all_cpu_s_per_chunk, 1e6, 1),
            scaled(sent.cpu_s_per_chunk, 1000 / sent.tokens_per_chunk, 4),
        )
    console.print(times)
    console.print(
        f"[dim]A stream: {CHUNKS} chunks unless it says so, the first after {1000 * TTFT_S:.0f} ms;"
        " a user sends again at once. × 4: so many tokens a chunk. TTFT added: the"
        " client's (first chunk - sent) less the server's (first chunk - received), so the"
        " request's way is in it. At the start: that of each stream's first request; all are sent"
        " at once, and wait in the server, too, which reads them one by one. Read late: written to"
        " stamped. Server late: due to written; where it is large, other work disturbed the server,"
        " or it is past its limit.[/]"
    )
    console.print(costs)
    console.print(
        "[dim]Delivered: chunks in the window, of those an instant client and server would"
        " exchange. Waking up for one chunk costs more than reading it, so chunks that come"
        " together cost less each; a bare epoll loop took 14 to 18 µs at 64, 10 ms.[/]"
    )
    for sent in (s for s in rows if s.gap_s == 0.01 and s.streams in AIMS and not s.shape):
        aims, late_s = AIMS[sent.streams], sent.server_late_p99_s or 0.0
        name = f"{sent.streams} streams, {many(sent.load_processes)}"
        for quantile, added_s, most_s in (
            ("p50", sent.ttft_added_p50_s, aims.ttft_p50_s),
            ("p99", sent.ttft_added_p99_s, aims.ttft_p99_s),
        ):
            if added_s is not None:
                disturbed = added_s > most_s and late_s > most_s
                doubt = f"the server itself ran {1000 * late_s:.1f} ms late" if disturbed else ""
                title = f"TTFT added at {name}, {quantile}"
                aim(title, 1000 * added_s, 1000 * most_s, "ms", doubt=doubt)
        if sent.load_processes == 1 and sent.cpu_s_per_chunk:
            spent = 1e6 * sent.cpu_s_per_chunk
            aim(f"CPU of what sends at {name}", spent, 1e6 * aims.cpu_s_per_chunk, "µs a chunk")
    for sent in (s for s in rows if s.gap_s == 0.001 and s.streams in DELIVERED):
        late_s = sent.server_late_p99_s or 0.0
        doubt = f"the server itself ran {1000 * late_s:.0f} ms late" * (late_s > sent.gap_s)
        name = f"chunks delivered to {sent.streams} streams, 1 ms"
        aim(name, 100 * sent.delivered, 100 * DELIVERED[sent.streams], "%", True, doubt=doubt)
    aim("chunks lost", sum(sent.lost for sent in rows), 0)
