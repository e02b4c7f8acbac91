"""Computes what other tools would have reported, by their definitions, from a run's own records.

Read from the tools' sources in November 2026: `vllm bench serve` (`benchmarks/serve.py`), GuideLLM
(`GenerativeRequestStats`), AIPerf (`InterTokenLatencyMetric`) and inference-perf
(`summarize_requests`). All four count a request from its send, whatever the schedule said, include
every request of the benchmark, and divide its tokens by its whole duration; we measure complete
cycles of closed loops, and a window between warm-up and drain of open ones. Here a trial is the
benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from labs.harness.analysis.measure import Trial, output_tokens_per_s
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import number, point_label
from labs.harness.spec.lab import Lab, Point
from labs.harness.storage.results import RunFolder
from loadtests.latencies import ITL, TPOT, TTFT
from loadtests.records import RequestRecord

THROUGHPUT = METRICS["output_tokens_per_s"]
COLUMNS = {
    **{f"{latency.title}, mean": "s" for latency in (TTFT, TPOT, ITL)},
    THROUGHPUT.title: THROUGHPUT.unit,
}
"""Title -> unit of each column, in the order of a tool's figures."""
THEIRS = "as they reported it"  # the row of another run's figures
PerRequest = Callable[[RequestRecord], Sequence[float]]


@dataclass(frozen=True)
class Tool:
    """A tool computes samples in seconds of each request; it may have none of a latency."""

    name: str
    definition: str
    ttft_s: PerRequest
    tpot_s: PerRequest
    itl_s: PerRequest


def _as_list(value: float | None) -> list[float]:
    return [] if value is None else [value]


def from_send(record: RequestRecord) -> list[float]:
    """TTFT from the send: first chunk - send."""
    return [record.chunks[0][0] - record.sent_s]


def decode_s(record: RequestRecord) -> float:
    """Seconds from the first chunk to the last."""
    return record.chunks[-1][0] - record.chunks[0][0]


def after_first_token(record: RequestRecord) -> list[float]:
    """TPOT as (last - first) / (n - 1), which takes the first chunk for one token."""
    n = record.output_tokens or 0
    return [decode_s(record) / (n - 1)] if n > 1 else []


def after_first_chunk(record: RequestRecord) -> list[float]:
    """TPOT as (last - first) / (n - tokens of the first chunk)."""
    n = (record.output_tokens or 0) - record.chunks[0][1]
    return [decode_s(record) / n] if n > 0 else []


def first_token_included(record: RequestRecord) -> list[float]:
    """TPOT as (last - send) / n, which includes the first token."""
    n = record.output_tokens or 0
    return [(record.chunks[-1][0] - record.sent_s) / n] if n else []


def token_gaps(record: RequestRecord) -> list[float]:
    """ITL as the gaps between tokens, where the tokens of one chunk came at the same time."""
    times = [at for at, tokens in record.chunks for _ in range(tokens)]
    return [b - a for a, b in pairwise(times)]


THIS_LAB = Tool(
    "this lab",
    "from the schedule under open loop; requests sent in the window; a chunk of k tokens after a"
    " gap g is k latencies of g / k; tokens over complete cycles, of an open loop over the window",
    lambda r: _as_list(r.ttft_s),
    lambda r: _as_list(r.tpot_s),
    lambda r: r.itl_s,
)
OTHER_TOOLS = (
    Tool(
        "vllm bench serve",
        "ITL is the gap between chunks, however many tokens each carries",
        from_send,
        after_first_token,
        lambda r: r.chunk_gaps_s,
    ),
    Tool(
        "GuideLLM",
        "TPOT has the first token in it, (last - send) / n; ITL is one average a request",
        from_send,
        first_token_included,
        after_first_token,
    ),
    Tool(
        "AIPerf",
        "ITL is one average a request, without the tokens of the first chunk; no TPOT beside it",
        from_send,
        lambda _: [],
        after_first_chunk,
    ),
    Tool(
        "inference-perf",
        "ITL is the gap between tokens, so that all but one of a chunk's are zero; it counts tokens"
        " by tokenizing the text again, here they are the engine's",
        from_send,
        after_first_token,
        token_gaps,
    ),
)


def whole_throughput(records: Sequence[RequestRecord]) -> float | None:
    """Output tokens/s over the whole benchmark: tokens / (last end - first send)."""
    if not records:
        return None
    duration_s = max(r.chunks[-1][0] for r in records) - min(r.sent_s for r in records)
    return sum(r.output_tokens or 0 for r in records) / duration_s if duration_s > 0 else None


def score(trial: Trial) -> dict[str, list[float | None]]:
    """Map each tool to its figures of one trial: mean TTFT, TPOT, ITL, and output throughput."""
    completed = trial.answered

    def means(tool: Tool, records: Sequence[RequestRecord]) -> list[float | None]:
        columns = (
            [s for r in records for s in samples_s(r)]
            for samples_s in (tool.ttft_s, tool.tpot_s, tool.itl_s)
        )
        return [float(np.mean(c)) if c else None for c in columns]

    return {
        THIS_LAB.name: [*means(THIS_LAB, trial.measured_requests), output_tokens_per_s(trial)],
        **{
            tool.name: [*means(tool, completed), whole_throughput(completed)]
            for tool in OTHER_TOOLS
        },
    }


def scores(folder: RunFolder) -> dict[str, dict[str, list[float | None]]]:
    """Map point -> tool -> figures, each the mean over the repeats."""
    run = folder.run()
    by_point: dict[str, list[dict[str, list[float | None]]]] = {}
    for point, _, trial in folder.trials(run.points(), run.rebuilt_lab()):
        if trial is not None:
            by_point.setdefault(point.key, []).append(score(trial))

    def over_repeats(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
        columns = ([v for v in column if v is not None] for column in zip(*rows, strict=True))
        return [float(np.mean(c)) if c else None for c in columns]

    return {
        key: {tool: over_repeats([t[tool] for t in trials]) for tool in trials[0]}
        for key, trials in by_point.items()
    }


def table(
    figures_by_point: Mapping[str, Mapping[str, Sequence[float | None]]], lab: Lab
) -> list[list[str]]:
    """Make a table of each tool's figures at each point; the first row is the header.

    Figures from elsewhere may stand beside them, under a name of their own.
    """
    rows = [["Point", "Tool", *COLUMNS]]
    for key, tools in figures_by_point.items():
        for place, (tool, figures) in enumerate(tools.items()):
            cells = [number(v, unit) for v, unit in zip(figures, COLUMNS.values(), strict=True)]
            rows.append([point_label(key, lab) if place == 0 else "", tool, *cells])
    return rows


def explanations(points: Sequence[Point], tools: Collection[str]) -> list[str]:
    """Explain, one sentence each, why the rows of these tools differ."""
    defined = [tool for tool in (THIS_LAB, *OTHER_TOOLS) if tool.name in tools]
    lines = [f"{tool.name}: {tool.definition}." for tool in defined]
    if any(p.load.open_loop for p in points):
        lines.append(
            "Under an open loop the others count from the send: what a late generator adds to the"
            " wait is not in their TTFT."
        )
    lines.append(
        "All but this lab take in warm-up and drain, where fewer requests are in flight, and"
        " requests that began in one and ended in the other."
    )
    return lines
