"""Which adapter answered, what adapters cost, and how much memory they save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import scipy

from labs.harness.analysis.quantity import CHANGE, RATIO, Quantity
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Point
from labs.multi_lora.lab import adapter_bytes
from serving.models.adapters import mark_of, marks_in

LEAST_ANSWERS = 2000
TENANTS = (1, 8, 32, 100, 1000)
Answers = Sequence[tuple[int, str]]  # the tenant who asked, and what it was answered


@dataclass(frozen=True)
class Facts:
    tenant_leaks: TenantLeaks
    adapter_cost: tuple[AdapterCost, ...]
    tenant_memory: TenantMemory | None  # None where no point has an adapter


def facts(run: JudgedRun) -> Facts:
    return Facts(tenant_leaks(run), tuple(adapter_cost(run)), tenant_memory(run))


# --------------------------------------------------------------------------- whose adapter answered


@dataclass(frozen=True)
class Marks:
    """Counts answers that were checked for the mark of their tenant and of other tenants."""

    answers: int
    foreign: int  # with another tenant's mark
    bare: int  # without their own


@dataclass(frozen=True)
class TenantProbe:
    """Whether the check for marks can fail, and what the engine refuses."""

    shared: Marks  # shared prompts, 16 at once
    loaded: Marks  # of an adapter loaded at run time
    misrouted: int  # requests sent to the wrong adapter on purpose
    caught: int  # of these
    base_asked: int
    base_marked: int  # answers of the base that carry a mark
    cached_share: Quantity  # of the prompt tokens, out of the prefix cache
    refused: Mapping[str, int]  # unknown adapter -> HTTP status

    @property
    def refuses(self) -> bool:
        """Whether every request for an unknown adapter was refused."""
        return all(code >= 400 for code in self.refused.values())


@dataclass(frozen=True)
class TenantLeaks:
    """Counts the marks in every answer of an adapter, trials and probe together."""

    in_trials: Marks
    all: Marks
    one_in: Quantity  # with 95% confidence fewer than one in so many is foreign (exact interval)
    probe: TenantProbe | None

    @property
    def is_smoke_test(self) -> bool:
        """Whether the answers are too few for a proof."""
        return 0 < self.all.answers < LEAST_ANSWERS

    @property
    def passed(self) -> bool | None:
        """Whether the check passed.

        False if it could not fail; None if the answers are too few, or nothing shows that it can.
        """
        probe = self.probe
        if self.all.foreign or (probe and not probe.refuses):
            return False
        if probe and probe.caught < probe.misrouted:
            return False
        can_fail = probe is not None and probe.misrouted > 0
        return True if can_fail and self.all.answers >= LEAST_ANSWERS else None


def tenant_leaks(run: JudgedRun) -> TenantLeaks:
    answers = answers_in_trials(run)
    results = (run.folder.probe_result("tenants", v.name) for v in run.lab.variants)
    probe = next(filter(None, results), None)
    of_all = marks([*answers, *(probe["answers"] if probe else ())])
    one_in = Quantity.missing("no answer was checked")
    if of_all.answers:
        exact = scipy.stats.binomtest(of_all.foreign, of_all.answers).proportion_ci(method="exact")
        one_in = Quantity(1 / float(exact.high))
    return TenantLeaks(marks(answers), of_all, one_in, probed(probe) if probe else None)


def probed(probe: Mapping[str, Any]) -> TenantProbe:
    """Read what the probe asked; the last `visits` answers are of an adapter that came late."""
    loaded_at = len(probe["answers"]) - probe["visits"]
    misrouted = marks(probe["misrouted"])
    return TenantProbe(
        shared=marks(probe["answers"][:loaded_at]),
        loaded=marks(probe["answers"][loaded_at:]),
        misrouted=misrouted.answers,
        caught=misrouted.foreign,
        base_asked=len(probe["base"]),
        base_marked=sum(bool(marks_in(text)) for text in probe["base"]),
        cached_share=Quantity(probe.get("cached_share"), "share", why="not counted"),
        refused=probe["refused"],
    )


def answers_in_trials(run: JudgedRun) -> Answers:
    found = []
    points = [point for point in run.points if point.workload.adapters]
    for point, result, trial in run.folder.trials(points, run.lab):
        requests, seed = run.lab.requests_of(point.workload), run.lab.draw_seed(result.repeat)
        tenants = point.workload.tenants(requests, seed)
        for record in trial.records if trial else ():
            tenant = tenants[record.index]
            if record.text is not None and tenant is not None:
                found.append((tenant, record.text))
    return found


def marks(answers: Answers) -> Marks:
    foreign = sum(bool(marks_in(text) - {tenant}) for tenant, text in answers)
    bare = sum(mark_of(tenant) not in text for tenant, text in answers)
    return Marks(len(answers), foreign, bare)


# ------------------------------------------------------------------------------- what adapters cost


@dataclass(frozen=True)
class AdapterCost:
    """A point's step and first token, beside the base's and what bytes explain."""

    point: str
    adapters: int
    mix: Literal["uniform", "zipf", "none"]
    tpot_s: Quantity
    over_base: Quantity  # TPOT against the base's at the same load
    bytes_share: Quantity  # of the active adapters, over the base's weights
    ttft_s: Quantity


def adapter_cost(run: JudgedRun) -> list[AdapterCost]:
    base = base_of(run)
    costs = []
    for point in run.points:
        adapters, tpot_s = point.workload.adapters, run.quantity(point, "tpot_mean_s").brief
        over_base = (tpot_s / run.quantity(base, "tpot_mean_s")).change
        if not over_base.known:
            continue
        if base and point.load != base.load:
            over_base = Quantity.missing("another load", CHANGE)
        costs.append(
            AdapterCost(
                point=point.key,
                adapters=adapters.count if adapters else 0,
                mix=adapters.mix if adapters else "none",
                tpot_s=tpot_s,
                over_base=over_base,
                bytes_share=Quantity(active_bytes(point) / point.shape.weight_bytes, "share"),
                ttft_s=run.quantity(point, "ttft_mean_s").brief,
            )
        )
    return costs


def base_of(run: JudgedRun) -> Point | None:
    """The first point of the engine without adapters."""
    return next((p for p in run.points if p.variant.name == "base"), None)


def active_bytes(point: Point) -> float:
    """Bytes of the adapters that a step reads."""
    adapters = point.workload.adapters
    active = min(adapters.count, point.flags.max_loras) if adapters else 0
    return active * adapter_bytes(point) if active else 0.0


# ----------------------------------------------------------------------------------- what they save


@dataclass(frozen=True)
class Saved:
    """The weights of so many tenants, on one engine and on an engine each."""

    tenants: int
    together_gb: Quantity
    apart_gb: Quantity
    saved: Quantity


@dataclass(frozen=True)
class TenantMemory:
    """Bytes of weights: the base's, and one adapter's at the rank the engine is set to."""

    base_mb: Quantity
    adapter_mb: Quantity
    adapter_share: Quantity
    rank: int
    by_tenants: tuple[Saved, ...]
    eight: Saved


def tenant_memory(run: JudgedRun) -> TenantMemory | None:
    point = next((p for p in run.points if p.workload.adapters), None)
    if point is None:
        return None
    base_bytes, each_bytes = point.shape.held_bytes, adapter_bytes(point)

    def saved(tenants: int) -> Saved:
        together, apart = base_bytes + tenants * each_bytes, tenants * base_bytes
        return Saved(
            tenants,
            Quantity(together / 1e9, "GB"),
            Quantity(apart / 1e9, "GB"),
            Quantity(apart / together, RATIO),
        )

    return TenantMemory(
        base_mb=Quantity(base_bytes / 1e6, "MB"),
        adapter_mb=Quantity(each_bytes / 1e6, "MB"),
        adapter_share=Quantity(each_bytes / base_bytes, "share"),
        rank=point.flags.max_lora_rank,
        by_tenants=tuple(map(saved, TENANTS)),
        eight=saved(8),
    )
