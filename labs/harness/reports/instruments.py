"""Read, write and show what `make bench` measured: `results/<machine>/bench.json`.

One file a machine, beside its results. Each part carries its own date: a part that is measured
again replaces that part alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from labs.harness.analysis.text import value_with_interval
from labs.harness.analysis.verdicts import Interval
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.templates import filled
from labs.harness.storage import results
from labs.harness.storage.bounded import read_json
from labs.harness.storage.committed import tracked
from serving import atomic
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

    @property
    def what(self) -> str:
        """The streams: `64, a chunk every 10 ms`."""
        tokens = f", {self.tokens_per_chunk} tokens each" if self.tokens_per_chunk > 1 else ""
        shape = f", {self.shape}" if self.shape else ""
        return f"{self.streams}, a chunk every {1000 * self.gap_s:g} ms{tokens}{shape}"

    @property
    def cpu_us_per_chunk(self) -> float | None:
        return None if self.cpu_s_per_chunk is None else 1e6 * self.cpu_s_per_chunk


class Streams(Part, frozen=True):
    rows: list[Sent]


class Engine(Part, frozen=True):
    """Ours / `vllm bench serve`'s, on one engine and the same requests."""

    throughput: Interval
    ttft: Interval
    tpot: Interval


class Alarms(Part, frozen=True):
    """A lab's baseline against itself on a fake engine, as it was measured until December 2026."""

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

    @property
    def parts(self) -> list[Part]:
        return [part for _, part in self if isinstance(part, Part)]

    @property
    def days(self) -> list[str]:
        """The days on which it was measured."""
        return sorted({part.measured_at[:10] for part in self.parts})

    @property
    def cpu_others(self) -> float:
        """The largest share of the CPU time that other work took."""
        return max((part.cpu_others for part in self.parts), default=0.0)

    @property
    def is_busy(self) -> bool:
        return self.cpu_others > QUIET

    @property
    def start_timed(self) -> bool:
        """Tell whether the streams' first requests were timed: in older files they were not."""
        rows = self.streams.rows if self.streams else ()
        return any(row.start_ttft_added_p50_s is not None for row in rows)


def path_of(machine: Machine) -> Path:
    return results.RESULTS / machine.slug / FILE


def keep(machine: Machine, name: str, part: Part) -> Path:
    """Write one part to the file of its machine; the other parts stay as they are."""
    path = path_of(machine)
    before = json.loads(path.read_text()) if path.exists() else {"machine": machine.model_dump()}
    atomic.write(path, json.dumps(before | {name: part.model_dump()}, indent=1) + "\n")
    return path


def published_benches() -> list[Bench]:
    """Read what was published of every machine, GPUs first; raises DamagedError."""
    paths = tracked(sorted(results.RESULTS.glob(f"*/{FILE}")), results.RESULTS)
    benches = [read_json(path, Bench) for path in paths]
    return sorted(benches, key=lambda bench: bench.machine.kind == "cpu")


def told(benches: Sequence[Bench]) -> Markdown:
    """Show each machine's table and sentences."""
    return filled("benches.md", benches=benches, with_interval=value_with_interval)
