"""What clients are forecast to observe of a load, as one step and as a faster and a slower one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labs.harness.analysis.computed import Band


@dataclass(frozen=True)
class Latencies:
    """Holds what the clients of one play in virtual time would observe."""

    requests: int
    within: float  # the share of requests that meet the objective
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    grows: bool  # TTFT does, and E2E with it, with the length of the run
    hit_rate: float | None
    preemptions: int


@dataclass(frozen=True)
class LoadForecast:
    """Holds what clients would observe of a load; bands span a faster and a slower step."""

    expected: Latencies
    within: Band
    ttft_p99_s: Band | None

    @classmethod
    def of(cls, plays: Sequence[Latencies]) -> LoadForecast:
        """Gather a load's plays: as expected, with a faster and with a slower step."""
        ttft_p99_s = [p.ttft_p99_s for p in plays if p.ttft_p99_s is not None]
        return cls(
            plays[0],
            over([p.within for p in plays]),
            over(ttft_p99_s) if len(ttft_p99_s) == len(plays) else None,
        )


def over(values: Sequence[float]) -> Band:
    """Gather a figure as expected, the first, and those with a faster and a slower step."""
    return Band(value=values[0], low=min(values), high=max(values))
