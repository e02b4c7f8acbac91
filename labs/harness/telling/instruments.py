"""Read, write and show what `make bench` measured: `results/<machine>/bench.json`.

One file a machine, beside its results. Each part carries its own date: a part that is measured
again replaces that part alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from labs.harness.filing import results
from labs.harness.filing.bounded import read_json
from labs.harness.filing.committed import tracked
from labs.harness.judging.judge import Interval
from labs.harness.judging.text import number, value_with_interval
from labs.harness.telling.document import (
    Block,
    Inline,
    Paragraph,
    Strong,
    Table,
    bullets,
    parse,
    table,
)
from serving import whole
from serving.hardware.machine import Machine

FILE = "bench.json"
QUIET = 0.05  # share of the CPU time that others may take before the page says so


class Part(BaseModel, frozen=True, extra="forbid"):
    measured_at: str = ""
    cpu_others: float = 0.0  # share of the machine's CPU time that other processes and guests took


class Sent(BaseModel, frozen=True, extra="forbid"):
    """Streams of one shape, against a server that records when it handed over each chunk."""

    load_processes: int
    streams: int
    gap_s: float  # between two chunks
    tokens_per_chunk: int = 1
    shape: str = ""  # what else is odd about the streams
    chunks_per_s: float  # that were read
    delivered: float  # share of what an instant client and server would exchange
    lost: int
    ttft_added_p50_s: float | None
    ttft_added_p99_s: float | None
    # of the streams' first requests, which are sent at once; None also in files from before these
    start_ttft_added_p50_s: float | None = None
    start_ttft_added_p99_s: float | None = None
    read_late_p50_s: float | None  # a chunk: handed to the socket to stamped
    read_late_p99_s: float | None
    gap_error_p50_s: float | None
    gap_error_p99_s: float | None
    server_late_p99_s: float | None  # the server's own lateness: not the client's fault
    cpu_s_per_chunk: float | None  # of the processes that send
    all_cpu_s_per_chunk: float | None  # with the one that records


class Streams(Part, frozen=True):
    rows: list[Sent]


class Engine(Part, frozen=True):
    """Ours / `vllm bench serve`'s, on one engine and the same requests."""

    throughput: Interval
    ttft: Interval
    tpot: Interval


class Alarms(Part, frozen=True):
    """A lab's baseline against itself on the fake engine, whose speed varies."""

    lab: str
    runs: int
    alarms: int  # verdicts of helps or hurts, where there is nothing
    judged: int
    not_judged: int  # not valid
    low: float  # exact 95% interval of alarms / judged
    high: float
    spread: float  # median standard deviation of the log ratio between repeats

    @property
    def rate(self) -> float:
        return self.alarms / self.judged


class Bench(BaseModel, frozen=True, extra="ignore"):
    """What is shown of a machine's file; older files have further parts (docs/instruments.md)."""

    machine: Machine
    streams: Streams | None = None
    engine: Engine | None = None
    aa: Alarms | None = None


def path_of(machine: Machine) -> Path:
    return results.RESULTS / machine.slug / FILE


def keep(machine: Machine, name: str, part: Part) -> Path:
    """Write one part to the file of its machine; the other parts stay as they are."""
    path = path_of(machine)
    before = json.loads(path.read_text()) if path.exists() else {"machine": machine.model_dump()}
    whole.write(path, json.dumps(before | {name: part.model_dump()}, indent=1) + "\n")
    return path


def published_benches() -> list[Bench]:
    """Read what was published of every machine, GPUs first; raises DamagedError."""
    paths = tracked(sorted(results.RESULTS.glob(f"*/{FILE}")), results.RESULTS)
    benches = [read_json(path, Bench) for path in paths]
    return sorted(benches, key=lambda bench: bench.machine.kind == "cpu")


# ------------------------------------------------------------------------------------ as a document

COLUMNS = ("Load processes", "Streams", "Chunks/s", "Delivered", "Lost", "TTFT added, p50", "p99")
AT_START = ("At the start, p50", "p99")
MORE_COLUMNS = ("Gap error, p50", "p99", "CPU per chunk")


def blocks(bench: Bench) -> list[Block]:
    """Show a machine's table and sentences."""
    heading = Paragraph((Strong(bench.machine.describe()), f"{_days_measured(bench)}:"))
    streams = [_streams(bench.streams.rows)] if bench.streams else []
    return [heading, *streams, bullets(map(parse, _sentences(bench)))]


def _days_measured(bench: Bench) -> str:
    """Say on which days it was measured, and how much of the CPU other work took."""
    parts = [part for _, part in bench if isinstance(part, Part)]
    days = sorted({part.measured_at[:10] for part in parts})
    other_work_share = max((part.cpu_others for part in parts), default=0.0)
    busy = (
        f" (other work took up to {other_work_share:.0%} of the CPU time)"
        if other_work_share > QUIET
        else ""
    )
    return f", {' and '.join(days)}{busy}"


def _streams(rows: Sequence[Sent]) -> Table:
    """Make the table of the streams; files from before the start was timed have no such columns."""
    timed = any(row.start_ttft_added_p50_s is not None for row in rows)
    columns = (*COLUMNS, *(AT_START if timed else ()), *MORE_COLUMNS)
    return table(columns, [_row(row, timed) for row in rows])


def _row(row: Sent, start_timed: bool) -> list[Inline]:
    tokens = f", {row.tokens_per_chunk} tokens each" if row.tokens_per_chunk > 1 else ""
    shape = f", {row.shape}" if row.shape else ""
    at_start = (row.start_ttft_added_p50_s, row.start_ttft_added_p99_s) if start_timed else ()
    added = (row.ttft_added_p50_s, row.ttft_added_p99_s)
    times = (*added, *at_start, row.gap_error_p50_s, row.gap_error_p99_s)
    cpu = row.cpu_s_per_chunk
    return [
        f"{row.load_processes}",
        f"{row.streams}, a chunk every {1000 * row.gap_s:g} ms{tokens}{shape}",
        f"{row.chunks_per_s:,.0f}",
        f"{row.delivered:.1%}",
        f"{row.lost}",
        *(number(time, "s") for time in times),
        "–" if cpu is None else f"{1e6 * cpu:.1f} µs",
    ]


def _sentences(bench: Bench) -> list[str]:
    sentences = []
    if engine := bench.engine:
        sentences.append(
            f"The lab's Locust / `vllm bench serve`, the same requests on one vLLM: throughput"
            f" {value_with_interval(engine.throughput)}, mean TTFT"
            f" {value_with_interval(engine.ttft)}, mean TPOT {value_with_interval(engine.tpot)}."
        )
    if aa := bench.aa:
        sentences.append(
            f"A lab against itself (`{aa.lab}`, `AA=1`, {aa.runs} runs on a fake engine whose speed"
            f" varies): a false alarm in {aa.alarms} of {aa.judged} claims judged, {aa.rate:.1%}"
            f" ({aa.low:.1%} to {aa.high:.1%}), {aa.not_judged} not judged; the ratio varies by"
            f" {aa.spread:.1%} between repeats."
        )
    return sentences
