"""What a step consists of, where the ridge lies, and what client and server count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.step_parts import Ceiling, Parts, decode_step, nearer_ceiling
from labs.harness.derived.sweep import StepLine, concurrency_sweep, step_line
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from labs.harness.storage.recorded import Agreement


@dataclass(frozen=True)
class StepAtLoad:
    """The time of an output token at a load that was measured."""

    users: int
    batch: Quantity  # requests in decode, mean
    parts: Parts

    @property
    def is_alone(self) -> bool:
        return self.users == 1


@dataclass(frozen=True)
class Work:
    """The work of a load for each byte that it reads."""

    users: int
    flop_per_byte: Quantity
    nearer_ceiling: Ceiling


@dataclass(frozen=True)
class Ridge:
    """The roofline's ridge, and the lightest and the heaviest load on its sides.

    It is about the work alone; what the time goes to is another question.
    """

    flop_per_byte: float
    batch: float  # with which a step reaches it
    few: Work
    many: Work

    @property
    def is_crossed(self) -> bool:
        return self.few.nearer_ceiling != self.many.nearer_ceiling


@dataclass(frozen=True)
class OneStream:
    """What one stream reached of its bound, the bandwidth over the weights' bytes."""

    bandwidth: Quantity
    weights: Quantity
    most_per_s: Quantity
    measured_per_s: Quantity  # 1 / TPOT
    share: Quantity


@dataclass(frozen=True)
class BothEnds:
    """The figures at the heaviest load, and whether client and server agree on their counts."""

    users: int
    ttft_s: Quantity
    itl_s: Quantity
    e2e_s: Quantity
    tokens_per_s: Quantity
    client_longer_s: tuple[Quantity, Quantity]  # of mean TTFT, at least and at most
    counted: tuple[str, ...]  # what the server counts at all
    differ: tuple[str, ...]

    @property
    def usd_per_million_tokens(self) -> Quantity:
        """Price a million output tokens on a machine for one US dollar an hour."""
        if not self.tokens_per_s.value:
            return Quantity.missing(self.tokens_per_s.why or "no token was written")
        return Quantity(1e6 / (3600 * self.tokens_per_s.value))

    @property
    def agreement(self) -> Literal["same", "differ", "unknown"]:
        if not self.counted:
            return "unknown"
        return "differ" if self.differ else "same"


@dataclass(frozen=True)
class Facts:
    steps: tuple[StepAtLoad, ...]
    line: StepLine
    fewest: int  # requests in flight in the sweep
    most: int
    static_predicted: Quantity  # the throughput of continuous batching / that of fixed batches
    ridge: Ridge | None  # None: fewer than two loads were measured
    one_stream: OneStream | None  # None: the sweep has no point of one request
    both_ends: BothEnds | None  # None: no session has ended
    played: bool  # whether the requests of fixed batches were played in virtual time, too

    @property
    def tpot_s(self) -> Quantity:
        """Mean TPOT at the heaviest load."""
        at = [step.parts.measured_s for step in self.steps if step.users == self.most]
        return at[0].brief if at else Quantity.missing("not measured", "s")


def facts(run: JudgedRun) -> Facts:
    sweep = concurrency_sweep(run.points)
    users = [p.load.users for p in sweep] or [0]
    pairs = waves_beside_continuous(run.points)
    return Facts(
        steps=steps_at_loads(run, sweep),
        line=step_line(run),
        fewest=users[0],
        most=users[-1],
        static_predicted=predicted(run, "static"),
        ridge=ridge(run, sweep),
        one_stream=one_stream(run, sweep),
        both_ends=both_ends(run, sweep),
        played=any(point.key in run.played for point in chain.from_iterable(pairs)),
    )


def steps_at_loads(run: Context, sweep: Sequence[Point]) -> tuple[StepAtLoad, ...]:
    steps = (step_at(run, point) for point in sweep)
    return tuple(s for s in steps if s.batch.value and s.parts.measured_s.value)


def step_at(run: Context, point: Point) -> StepAtLoad:
    """Split TPOT at a load, with the stand-in step where it was timed.

    A step reads the weights once, and the keys and values of the requests in decode; it computes
    their tokens and, spread over the steps, the prefills of others that come between two tokens.
    """
    batch, prefills = run.quantity(point, "batch"), (point.load.users - 1) / point.output_tokens
    step = decode_step(run, point, batch.value or 0.0, prefills)
    return StepAtLoad(point.load.users, batch, step.split(run.quantity(point, "tpot_mean_s")))


def predicted(run: JudgedRun, claim: str) -> Quantity:
    for judgement in run.judged(claim):
        return Quantity(judgement.prediction.value, RATIO)
    return Quantity.missing("this run has no points for it", RATIO)


def ridge(run: Context, sweep: Sequence[Point]) -> Ridge | None:
    """Say on which side of the roofline's ridge the lightest and the heaviest load stand."""
    works = [work for point in sweep if (work := work_at(run, point)).flop_per_byte.value]
    if len(works) < 2:
        return None
    shape, ceilings = sweep[0].shape, sweep[0].ceilings
    batch = theory.ridge_batch(shape, ceilings)
    return Ridge(ceilings.ridge_flops_per_byte, batch, works[0], works[-1])


def work_at(run: Context, point: Point) -> Work:
    intensity = run.quantity(point, "intensity").brief
    return Work(point.load.users, intensity, nearer_ceiling(point.ceilings, intensity.value or 0.0))


def one_stream(run: Context, sweep: Sequence[Point]) -> OneStream | None:
    point = next((p for p in sweep if p.load.users == 1), None)
    if point is None:
        return None
    bandwidth, weights = point.ceilings.memory_bandwidth_bytes_per_s, point.shape.step_bytes(1)
    most_per_s = Quantity(bandwidth / weights, "tok/s")
    measured_per_s = Quantity(1, "tok/s") / run.quantity(point, "tpot_mean_s")
    return OneStream(
        Quantity(bandwidth / 1e9, "GB/s"),
        Quantity(weights / 1e6, "MB"),
        most_per_s,
        measured_per_s,
        (measured_per_s / most_per_s).in_unit("share"),
    )


def both_ends(run: JudgedRun, sweep: Sequence[Point]) -> BothEnds | None:
    session = run.folder.session()
    if not (sweep and session):
        return None
    ttft_s, itl_s, e2e_s, tokens_per_s = (
        Quantity.of(run.summary.figure(sweep[-1].key, metric), METRICS[metric].unit).brief
        for metric in ("ttft_p50_s", "itl_p50_s", "e2e_p50_s", "output_tokens_per_s")
    )
    counted = [a for a in session.agreement if a.engine is not None]
    return BothEnds(
        sweep[-1].load.users,
        ttft_s,
        itl_s,
        e2e_s,
        tokens_per_s,
        client_longer_s(run),
        counted=tuple(a.what for a in counted),
        differ=tuple(a.what for a in counted if differs(a)),
    )


def client_longer_s(run: Context) -> tuple[Quantity, Quantity]:
    """Return by how much the client's mean TTFT is longer than the engine's, over all points."""
    longer_s = [
        client_s - engine_s
        for p in run.points
        if (client_s := run.mean(p, "client_ttft_mean_s")) is not None
        and (engine_s := run.mean(p, "engine_ttft_mean_s")) is not None
    ]
    if not longer_s:
        return (Quantity.missing("not measured at both ends", "s"),) * 2
    return Quantity(min(longer_s), "s"), Quantity(max(longer_s), "s")


def differs(count: Agreement) -> bool:
    return len({count.records, count.engine, count.prometheus} - {None}) > 1


def waves_beside_continuous(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Pair each load in waves with the closed loop of as many users."""
    closed = {
        (p.variant.name, p.workload.name, p.load.users): p
        for p in points
        if p.load.kind == "concurrent"
    }
    waves = [p for p in points if p.load.kind == "waves"]
    places = [(p, (p.variant.name, p.workload.name, p.load.users)) for p in waves]
    return [(wave, closed[at]) for wave, at in places if at in closed]


def over_time(points: Sequence[Point]) -> list[Point]:
    return [*chain.from_iterable(waves_beside_continuous(points))]
