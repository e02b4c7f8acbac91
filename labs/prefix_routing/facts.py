"""What each replica did, and what more of them would find by the lab's own formula."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Point
from labs.prefix_routing.lab import documents_held, keeps_together
from serving import metrics

REPLICAS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Routed:
    """What the replicas of a point counted, the busiest first."""

    point: str
    requests: tuple[Quantity, ...]  # shares of all
    hit_rates: tuple[Quantity, ...]
    hit_rate: Quantity  # of all together
    forecast: Quantity  # by vLLM's scheduler, played behind the same rule
    ttft_s: Quantity


@dataclass(frozen=True)
class OfMany:
    """The share of documents found again by so many replicas, as a chance at each request."""

    replicas: int
    documents: int
    blind: Quantity
    together: Quantity


@dataclass(frozen=True)
class Facts:
    routed: tuple[Routed, ...]
    documents: int  # that are asked about
    held: Quantity  # by the cache of one replica
    many: tuple[OfMany, ...]


def facts(run: JudgedRun) -> Facts:
    several = [p for p in run.points if p.flags.replicas > 1]
    on_documents = (p for p in several if p.workload.name == "documents" and not keeps_together(p))
    asked = next(on_documents, None)
    prefix = asked.workload.prefix if asked else None
    return Facts(
        routed=tuple(found for p in several if (found := routed(run, p))),
        documents=prefix.groups if prefix else 0,
        held=Quantity.given(documents_held(asked) if asked else None),
        many=of_many(documents_held(asked), prefix.groups) if asked and prefix else (),
    )


def routed(run: JudgedRun, point: Point) -> Routed | None:
    """Average over a point's trials what its replicas counted; None where they counted nothing."""
    shares, rates = list[list[float]](), list[list[float]]()
    for trial in run.trials(point):
        counted = trial.engine.values if trial.engine else {}
        of_each = [
            [counted.get(metrics.of_replica(metric, replica), 0.0) for metric in metrics.BY_REPLICA]
            for replica in range(point.flags.replicas)
        ]
        if total := sum(done for done, _, _ in of_each):
            of_each.sort(reverse=True)
            shares.append([done / total for done, _, _ in of_each])
            rates.append([hits / asked if asked else 0.0 for _, asked, hits in of_each])
    if not shares:
        return None
    return Routed(
        point.key,
        tuple(Quantity(fmean(of), "share") for of in zip(*shares, strict=True)),
        tuple(Quantity(fmean(of), "share") for of in zip(*rates, strict=True)),
        run.quantity(point, "prefix_hit_rate"),
        run.foreseen(point, "prefix_hit_rate"),
        run.quantity(point, "ttft_mean_s"),
    )


def of_many(held: float, documents: int) -> tuple[OfMany, ...]:
    """Give each number of replicas as many documents a replica as two were asked about."""
    return tuple(
        OfMany(
            replicas,
            total := documents * replicas // 2,
            Quantity(min(1.0, held / total), "share"),
            Quantity(min(1.0, held * replicas / total), "share"),
        )
        for replicas in REPLICAS
    )
