"""Lists the latencies that the user of a stream experiences, each described once.

`loadtests/records.py` defines them and computes them from a request's record. This table says what
they are called elsewhere: the histogram of each in Prometheus, and its title for readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loadtests.records import RequestRecord


@dataclass(frozen=True)
class Latency:
    """A latency is a time in seconds, of which every request, token or chunk gives a sample."""

    attribute: str  # of a RequestRecord: one time (or None), or a list of them
    title: str
    per: Literal["request", "token", "chunk"]
    histogram: str  # the exporter's name for it
    description: str

    def samples_s(self, record: RequestRecord) -> list[float]:
        """List the samples of one request in seconds; empty where it did not get that far."""
        value: float | list[float] | None = getattr(record, self.attribute)
        if value is None:
            return []
        return value if isinstance(value, list) else [value]


TTFT = Latency(
    "ttft_s",
    "TTFT",
    "request",
    "lab_ttft_seconds",
    "Time to the first output token, from the schedule under open loop",
)
ITL = Latency("itl_s", "ITL", "token", "lab_itl_seconds", "Inter-token latency, one sample a token")
TPOT = Latency(
    "tpot_s",
    "TPOT",
    "request",
    "lab_tpot_seconds",
    "Time per output token after the first chunk, one sample a request",
)
E2E = Latency(
    "e2e_s",
    "E2E",
    "request",
    "lab_e2e_seconds",
    "Whole request, from the schedule under open loop",
)
CHUNK_GAP = Latency(
    "chunk_gaps_s",
    "Chunk gap",
    "chunk",
    "lab_chunk_gap_seconds",
    "Between two chunks that carry tokens",
)
SEND_LAG = Latency(
    "send_lag_s",
    "Send lag",
    "request",
    "lab_send_lag_seconds",
    "How late a scheduled request was sent",
)
LATENCIES = (TTFT, ITL, TPOT, E2E, CHUNK_GAP, SEND_LAG)
