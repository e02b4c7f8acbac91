"""Read, write and show what `make bench` measured: `results/<machine>/bench.json`.

One file a machine, beside its results. Each part carries its own date: a part that is measured
again replaces that part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field

from labs.harness.filing import results
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
from serving.hardware.machine import Machine

FILE = "bench.json"
QUIET = 0.05  # share of the CPU time that others may take before the page says so
P = TypeVar("P", bound="Part")


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


class Neighbour(Part, frozen=True):
    throughput: Interval  # beside an idle engine / beside one held still


class Recording(Part, frozen=True):
    tokens_per_s: float
    share: Interval  # of the generator's CPU time


class Overhead(Part, frozen=True):
    lab: str
    share: float  # of a run's time


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


class Twins(Alarms, frozen=True):
    """The same on two real engines side by side; `runs` are blocks of pairs."""

    pairs: int  # trials of each twin at every point


class Memory(BaseModel, frozen=True, extra="forbid"):
    """What a process held, and the slope of a line through what it held minute after minute."""

    most_bytes: int
    bytes_per_hour: float

    @property
    def growth(self) -> float:
        """The share by which it grows in an hour."""
        return self.bytes_per_hour / self.most_bytes


class Soak(Part, frozen=True):
    """The load generator's memory over minutes of steady load."""

    minutes: int
    streams: int
    requests: int
    sending: Memory  # the load processes together
    recording: Memory


class Played(BaseModel, frozen=True, extra="forbid"):
    """A load on a fleet in virtual time, and how long a core took to play it."""

    router: str
    replicas: int
    rate_per_s: float  # of each replica
    requests: int  # of all
    output_tokens: int  # of all
    in_flight: float  # at each replica, on average
    cpu_s: float  # of the one process that plays


class Fleet(Part, frozen=True):
    """How the time grows that fleets take in virtual time, in one process."""

    vllm: str
    import_s: float  # of CPU time, until the first engine is built
    build_s: float  # for every further one
    held_bytes: int
    rows: list[Played]


class Answering(BaseModel, frozen=True, extra="forbid"):
    """What vLLM's API server sent, and the CPU time that it took of one core."""

    streams: int
    chunks_per_s: float
    core_share: float
    cpu_s_per_chunk: float


class Server(Part, frozen=True):
    """vLLM's API server in front of an engine that computes nothing."""

    vllm: str
    rows: list[Answering]


class Bench(BaseModel, frozen=True, extra="forbid"):
    machine: Machine
    streams: Streams | None = None
    engine: Engine | None = None
    neighbour: Neighbour | None = None
    recording: Recording | None = None
    overhead: Overhead | None = None
    aa: Alarms | None = None
    twins: Twins | None = None
    soak: Soak | None = None
    fleet: Fleet | None = None
    server: Annotated[Server | None, Field(exclude_if=lambda server: server is None)] = None


def path_of(machine: Machine) -> Path:
    return results.RESULTS / machine.slug / FILE


def keep(machine: Machine, name: str, part: Part) -> Path:
    """Write one part to the file of its machine; the other parts stay as they are."""
    path = path_of(machine)
    before = results.read_json(path, Bench) if path.exists() else Bench(machine=machine)
    results.write_json(path, before.model_copy(update={name: part}))
    return path


def published_benches() -> list[Bench]:
    """Read what was published of every machine, GPUs first; raises DamagedError."""
    paths = tracked(sorted(results.RESULTS.glob(f"*/{FILE}")), results.RESULTS)
    benches = [results.read_json(path, Bench) for path in paths]
    return sorted(benches, key=lambda bench: bench.machine.kind == "cpu")


# ------------------------------------------------------------------------------------ as a document

COLUMNS = (
    "Load processes", "Streams", "Chunks/s", "Delivered", "Lost", "TTFT added, p50", "p99",
)  # fmt: skip
AT_START = ("At the start, p50", "p99")
MORE_COLUMNS = ("Gap error, p50", "p99", "CPU per chunk")
PLAYED = (
    "Router", "Replicas", "Requests/s each", "In flight each", "Requests", "CPU time",
    "Requests/s of a core", "Per output token",
)  # fmt: skip


def blocks(bench: Bench) -> list[Block]:
    """Show a machine's table and sentences."""
    heading = Paragraph((Strong(bench.machine.describe()), f"{_days_measured(bench)}:"))
    streams = [_streams(bench.streams.rows)] if bench.streams else []
    fleet = [table(PLAYED, map(played_row, bench.fleet.rows))] if bench.fleet else []
    return [heading, *streams, bullets(map(parse, _sentences(bench))), *fleet]


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
    times = (
        row.ttft_added_p50_s, row.ttft_added_p99_s, *at_start, row.gap_error_p50_s,
        row.gap_error_p99_s,
    )  # fmt: skip
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


def played_row(row: Played) -> list[str]:
    """Write the cells under PLAYED."""
    return [
        row.router,
        f"{row.replicas}",
        f"{row.rate_per_s:g}",
        f"{row.in_flight:.1f}",
        f"{row.requests:,}",
        f"{row.cpu_s:.1f} s",
        f"{row.requests / row.cpu_s:.1f}",
        f"{1e6 * row.cpu_s / row.output_tokens:.0f} µs",
    ]


def fleet_sentence(fleet: Fleet) -> str:
    """Say what a process of the forecaster costs before it plays."""
    return (
        f"A process that plays fleets in virtual time (vLLM {fleet.vllm}) takes"
        f" {fleet.import_s:.1f} s of CPU time to start and {fleet.build_s:.2f} s to build another"
        f" replica; with all of them it holds {fleet.held_bytes / 1e6:,.0f} MB."
    )


def server_sentence(server: Server) -> str:
    """Say what a chunk costs vLLM's API server, and for how many a core would have time."""
    rows = server.rows
    return (
        f"vLLM's API server (vLLM {server.vllm}), in front of an engine that computes nothing:"
        f" {', '.join(f'{1e6 * row.cpu_s_per_chunk:.0f} µs' for row in rows)} of CPU time a chunk"
        f" with {', '.join(f'{row.streams}' for row in rows)} streams. One core would have time"
        f" for {', '.join(f'{round(1 / row.cpu_s_per_chunk, -2):,.0f}' for row in rows)} chunks/s"
        " (an estimate)."
    )


def _memory(memory: Memory) -> str:
    change = f"{'grew' if memory.growth >= 0 else 'shrank'} by {abs(memory.growth):.1%} an hour"
    return f"held at most {memory.most_bytes / 1e6:,.0f} MB and {change}"


def _sentences(bench: Bench) -> list[str]:
    sentences = []
    if engine := bench.engine:
        sentences.append(
            f"The lab's Locust / `vllm bench serve`, the same requests on one vLLM: throughput"
            f" {value_with_interval(engine.throughput)}, mean TTFT"
            f" {value_with_interval(engine.ttft)}, mean TPOT {value_with_interval(engine.tpot)}."
        )
    if neighbour := bench.neighbour:
        sentences.append(
            "An engine's throughput beside another that is loaded and idle / beside one that is"
            f" stopped: {value_with_interval(neighbour.throughput)}."
        )
    if recording := bench.recording:
        share = recording.share
        within = "" if share.low is None else f" ({share.low:.1%} to {share.high:.1%})"
        sentences.append(
            f"Recording into Prometheus takes {share.value:.1%}{within} of the generator's CPU"
            f" time at {recording.tokens_per_s:,.0f} tokens/s."
        )
    if overhead := bench.overhead:
        sentences.append(
            f"The share of a run (`{overhead.lab}`) that is neither engine starts nor load:"
            f" {overhead.share:.1%}."
        )
    if aa := bench.aa:
        sentences.append(
            f"A lab against itself (`{aa.lab}`, `AA=1`, {aa.runs} runs on a fake engine whose speed"
            f" varies): a false alarm in {aa.alarms} of {aa.judged} claims judged, {aa.rate:.1%}"
            f" ({aa.low:.1%} to {aa.high:.1%}), {aa.not_judged} not judged; the ratio varies by"
            f" {aa.spread:.1%} between repeats."
        )
    if twins := bench.twins:
        sentences.append(
            f"A lab against itself on two real engines side by side (`{twins.lab}`, {twins.pairs}"
            f" pairs of trials at each point, judged in {twins.runs} blocks): a false alarm in"
            f" {twins.alarms} of {twins.judged} claims judged, {twins.rate:.1%} ({twins.low:.1%} to"
            f" {twins.high:.1%}), {twins.not_judged} not judged; the ratio varies by"
            f" {twins.spread:.1%} between pairs."
        )
    if soak := bench.soak:
        sentences.append(
            f"{soak.minutes} minutes of load ({soak.streams} streams, {soak.requests:,} requests):"
            f" the process that sends {_memory(soak.sending)}; the one that records"
            f" {_memory(soak.recording)}."
        )
    if bench.fleet:
        sentences.append(fleet_sentence(bench.fleet))
    if bench.server:
        sentences.append(server_sentence(bench.server))
    return sentences
