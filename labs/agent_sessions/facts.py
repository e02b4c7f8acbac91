"""What a session's next turn finds and waits for, beside its first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from labs.agent_sessions.lab import MANY, PLAIN, UNEVEN, sessions_held
from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.offloading import CopyOrCompute
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Point
from loadtests.records import RequestRecord


@dataclass(frozen=True)
class Turns:
    """The turns of a point, as clients and the engine saw them."""

    point: str
    sessions: int
    held: Quantity  # sessions, by the cache
    hit_rate: Quantity
    forecast: Quantity  # of it, by vLLM's scheduler
    first_s: Quantity  # TTFT of a session's first turn
    next_s: Quantity  # and of all later ones
    block_tokens: Quantity | None = None


@dataclass(frozen=True)
class Facts:
    turns: tuple[Turns, ...]
    copying: CopyOrCompute | None  # evicted turns back, or computing them again
    # of many sessions: by variant, and by variant and workload where that is not the plain one
    crowded: dict[str, Turns] = field(default_factory=dict)
    beside: dict[str, Turns] = field(default_factory=dict)


def facts(run: JudgedRun) -> Facts:
    found = [(point, of) for point in run.points if (of := turns(run, point))]
    many = [(point, of) for point, of in found if point.load in (MANY, UNEVEN)]
    return Facts(
        turns=tuple(of for _, of in found),
        copying=CopyOrCompute.of(run.points[0]) if run.points else None,
        crowded={p.variant.name: of for p, of in many if p.workload.name == PLAIN},
        beside={
            f"{p.variant.name}/{p.workload.name}": of for p, of in many if p.workload.name != PLAIN
        },
    )


def turns(run: JudgedRun, point: Point) -> Turns | None:
    """Split a point's requests by their turn; None where nothing was measured."""
    records = [r for trial in run.trials(point) for r in trial.measured_requests]
    if not records:
        return None
    first = [r for r in records if r.index % point.turns == 0]
    later = [r for r in records if r.index % point.turns]
    return Turns(
        point=point.key,
        sessions=point.load.users,
        held=Quantity(sessions_held(point)),
        hit_rate=run.quantity(point, "prefix_hit_rate"),
        forecast=run.foreseen(point, "prefix_hit_rate"),
        first_s=mean_ttft(first),
        next_s=mean_ttft(later),
        block_tokens=Quantity(float(point.flags.block_size)),
    )


def mean_ttft(records: Sequence[RequestRecord]) -> Quantity:
    """Average the TTFT of requests, in seconds."""
    times_s = [r.ttft_s for r in records if r.ttft_s is not None]
    return Quantity.given(fmean(times_s) if times_s else None, "s")
