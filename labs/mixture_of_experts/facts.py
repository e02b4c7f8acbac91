"""What a mixture of experts gains beside dense models, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.sweep import concurrency_sweep
from labs.harness.spec.lab import Point
from labs.harness.spec.theory import experts_needed, step_of
from labs.mixture_of_experts.lab import ACTIVE, MIXTURE, TOTAL
from serving.models.catalog import Shape


@dataclass(frozen=True)
class Facts:
    shapes: tuple[Served, ...]
    batches: tuple[AtLoad, ...]  # none without the mixture

    @property
    def mixture(self) -> Served | None:
        """The mixture, where it was served."""
        return next((of for of in self.shapes if of.experts), None)

    @property
    def one(self) -> AtLoad | None:
        """The lightest load."""
        return self.batches[0] if self.batches else None

    @property
    def full(self) -> AtLoad | None:
        """The heaviest load, where there is more than one."""
        return self.batches[-1] if len(self.batches) > 1 else None


def facts(run: JudgedRun) -> Facts:
    shapes = {p.variant.name: p.shape for p in run.points}
    return Facts(tuple(served(*of) for of in shapes.items()), tuple(batches(run)))


@dataclass(frozen=True)
class Served:
    """A served model: what memory holds of it, and what a token is multiplied with."""

    variant: str
    experts: int  # of a layer; 0 in a dense model
    per_token: int
    params: Quantity  # in millions
    active_params: Quantity  # in millions, that a token is multiplied with
    active_share: Quantity
    held_mb: Quantity
    alone_mb: Quantity  # of weights that a step over one token reads
    alone_share: Quantity


@dataclass(frozen=True)
class Beside:
    """The mixture beside a dense model at a load: TPOT as measured, and by bytes."""

    measured: Quantity  # mixture / dense, valid or not
    is_valid: bool  # whether no caveat withholds verdicts there
    by_bytes: Quantity  # the same on the roofline, where the experts needed are those expected

    @property
    def valid(self) -> Quantity:
        """The measured ratio where it counts."""
        return self.measured if self.is_valid else Quantity.missing("not valid", RATIO)


@dataclass(frozen=True)
class AtLoad:
    """What a step of the mixture needs at a load, and how long each model's takes."""

    users: int
    experts: int
    needed: Quantity  # experts of a layer, expected
    read_mb: Quantity  # of the mixture's weights, expected
    tpots_s: Mapping[str, Quantity]  # by variant
    total: Beside | None  # None where that model was left out
    active: Beside | None


def served(variant: str, shape: Shape) -> Served:
    held_bytes, alone_bytes = shape.held_bytes, shape.step_bytes(1)
    return Served(
        variant=variant,
        experts=shape.experts,
        per_token=shape.experts_per_token,
        params=Quantity(shape.params / 1e6),
        active_params=Quantity(shape.matmul_params / 1e6),
        active_share=Quantity(shape.matmul_params / shape.params, "share"),
        held_mb=Quantity(held_bytes / 1e6, "MB"),
        alone_mb=Quantity(alone_bytes / 1e6, "MB"),
        alone_share=Quantity(alone_bytes / held_bytes, "share"),
    )


def batches(run: JudgedRun) -> list[AtLoad]:
    """Set the three models side by side at each load of the sweep."""
    found = []
    for point in concurrency_sweep(run.points):
        shape, users = point.shape, point.load.users
        if point.variant.name != MIXTURE.name or not shape.experts:
            continue
        others = {
            v.name: run.point(v.name, point.workload.name, str(point.load))
            for v in run.lab.variants
        }
        found.append(
            AtLoad(
                users=users,
                experts=shape.experts,
                needed=Quantity(experts_needed(shape.experts, shape.experts_per_token, users)),
                read_mb=Quantity(shape.step_bytes(users) / 1e6, "MB"),
                tpots_s={n: run.quantity(p, "tpot_mean_s").brief for n, p in others.items()},
                total=beside(run, point, others.get(TOTAL)),
                active=beside(run, point, others.get(ACTIVE)),
            )
        )
    return found


def beside(run: JudgedRun, mixture: Point, dense: Point | None) -> Beside | None:
    if dense is None:
        return None
    return Beside(
        run.measured_ratio(mixture, dense, "tpot_mean_s"),
        not run.withholds("tpot_mean_s", mixture, dense),
        Quantity(step_of(mixture) / step_of(dense), RATIO),
    )
