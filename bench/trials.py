"""Trials against the truth server: how the load generator's records differ from its log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np

from bench import truth
from bench.load import RunningLocust, trial
from labs.harness.reports import instruments
from loadtests import records
from loadtests.records import RequestRecord


@dataclass
class Errors:
    """Holds how the client's records differ from the server's, in seconds; `+=` pools trials."""

    ttft_s: list[float] = field(default_factory=list)  # sent to first chunk, less the server's
    start_ttft_s: list[float] = field(default_factory=list)  # of each stream's first request
    read_s: list[float] = field(default_factory=list)  # each chunk: written to stamped
    gap_s: list[float] = field(default_factory=list)  # each gap: absolute difference
    server_late_s: list[float] = field(default_factory=list)  # each chunk: due to written
    lost: int = 0  # chunks or whole requests that the client does not have as they were sent

    def __iadd__(self, other: Errors) -> Errors:
        for name in ("ttft_s", "start_ttft_s", "read_s", "gap_s", "server_late_s"):
            getattr(self, name).extend(getattr(other, name))
        self.lost += other.lost
        return self


def compare(
    client: Iterable[RequestRecord], server: Mapping[int, truth.Truth], t0: float, streams: int
) -> Errors:
    """Compare the client's records with the server's, by the index of the request.

    `t0` is the client's time 0 on the server's clock. So many `streams` send their first requests
    at once, which have the lowest indices. Other requests of the warm-up count for losses only.
    """
    errors = Errors()
    for record in client:
        line = server.get(record.index)
        sent = line["chunks"] if line else []
        if [k for _, k in record.chunks] != [k for _, k in sent] or not sent:
            errors.lost += max(1, abs(len(sent) - len(record.chunks)))
            continue
        if line is None:
            continue
        written, read = [at for at, _ in sent], [at for at, _ in record.chunks]
        ttft_added_s = read[0] - record.sent_s - (written[0] - line["received"])
        if record.index < streams:
            errors.start_ttft_s.append(ttft_added_s)
        if not record.in_window:
            continue
        errors.ttft_s.append(ttft_added_s)
        errors.read_s += [r + t0 - w for r, w in zip(read, written, strict=True)]
        errors.gap_s += [
            abs((read[i] - read[i - 1]) - (written[i] - written[i - 1]))
            for i in range(1, len(sent))
        ]
        errors.server_late_s += [w - due for w, due in zip(written, line["due"], strict=True)]
    return errors


def delivered(
    client: Iterable[RequestRecord], window_s: tuple[float, float], ideal_chunks_per_s: float
) -> float:
    """Compute the share of the chunks that an instant client would have stamped in the window."""
    start, end = window_s
    chunks = sum(start <= at < end for r in client for at, _ in r.chunks)
    return chunks / (end - start) / ideal_chunks_per_s


def percentile_s(values: Sequence[float], q: float) -> float | None:
    """Compute a percentile by linear interpolation; None without values."""
    return float(np.percentile(values, q)) if len(values) else None


@dataclass
class Totals:
    """The sums over all trials of a program."""

    errors: Errors = field(default_factory=Errors)
    delivered: list[float] = field(default_factory=list)
    chunks: int = 0
    worker_cpu_s: float = 0.0
    all_cpu_s: float = 0.0

    def sent(self, program: truth.Program, processes: int) -> instruments.Sent:
        """Compute the figures of a program that so many load processes sent."""
        errors, share = self.errors, mean(self.delivered)
        return instruments.Sent(
            load_processes=processes,
            streams=program.streams,
            gap_s=program.gap_s,
            tokens_per_chunk=program.tokens_per_chunk,
            shape=program.shape,
            chunks_per_s=share * program.ideal_chunks_per_s,
            delivered=share,
            lost=errors.lost,
            ttft_added_p50_s=percentile_s(errors.ttft_s, 50),
            ttft_added_p99_s=percentile_s(errors.ttft_s, 99),
            start_ttft_added_p50_s=percentile_s(errors.start_ttft_s, 50),
            start_ttft_added_p99_s=percentile_s(errors.start_ttft_s, 99),
            read_late_p50_s=percentile_s(errors.read_s, 50),
            read_late_p99_s=percentile_s(errors.read_s, 99),
            gap_error_p50_s=percentile_s(errors.gap_s, 50),
            gap_error_p99_s=percentile_s(errors.gap_s, 99),
            server_late_p99_s=percentile_s(errors.server_late_s, 99),
            cpu_s_per_chunk=self.worker_cpu_s / self.chunks if self.chunks else None,
            all_cpu_s_per_chunk=self.all_cpu_s / self.chunks if self.chunks else None,
        )


def measure(program: truth.Program, load: RunningLocust, work: Path, totals: Totals) -> None:
    """Play one trial of the program, and add its figures to the totals."""
    work.mkdir(parents=True)
    sending, recorded = work / "requests.jsonl", work / "records"
    truth.write_requests(sending, program)
    with truth.serving(program, work) as (url, log):
        before_s = load.cpu_s()
        summary = load.generator.play(
            trial(url, program.streams, sending, truth.WARMUP_S, truth.WINDOW_S, recorded)
        )
        totals.all_cpu_s += load.cpu_s() - before_s
    # CLOCK_MONOTONIC is one clock for both processes
    t0 = summary.started_monotonic_s
    assert t0 is not None
    client = list(records.read(recorded))
    totals.errors += compare(client, truth.read(log), t0, program.streams)
    totals.delivered.append(delivered(client, summary.window_s, program.ideal_chunks_per_s))
    totals.chunks += sum(len(r.chunks) for r in client)
    totals.worker_cpu_s += summary.cpu_s
