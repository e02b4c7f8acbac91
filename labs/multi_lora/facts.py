"""Conclude which adapter answered, what adapters cost, and how much memory they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy

from dashboards.palette import BLUE, BOUND
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import BANDS, GREY, draw_forecasts, plt, reach
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.text import number, point_label, sentences
from labs.multi_lora.lab import adapter_bytes
from serving.adapters import mark_of, marks_in

LEAST_ANSWERS = 2000

# ------------------------------------------------------------------------- whose adapter answered


@dataclass(frozen=True)
class Marks:
    """Counts answers that were checked for the mark of their tenant and of other tenants."""

    answers: int
    foreign: int  # with another tenant's mark
    bare: int  # without their own


@dataclass(frozen=True)
class TenantProbe:
    """Says whether the check for marks can fail, and what the engine refuses."""

    misrouted: int  # requests sent to the wrong adapter on purpose
    caught: int  # of these
    base_asked: int
    base_marked: int  # answers of the base that carry a mark
    cached_share: float | None  # of the prompt tokens, out of the prefix cache
    refused: Mapping[str, int]  # unknown adapter -> HTTP status


@dataclass(frozen=True)
class TenantLeaks:
    """Counts the marks in every answer of an adapter, trials and probe together."""

    parts: Mapping[str, Marks]
    all: Marks
    most_foreign_share: float | None  # upper end of the exact interval of 95%
    probe: TenantProbe | None

    @property
    def passed(self) -> bool | None:
        """Whether the check passed.

        False if it could not fail; None if the answers are too few, or nothing shows that it can.
        """
        if self.probe:
            answered = any(code < 400 for code in self.probe.refused.values())
            if answered or self.probe.caught < self.probe.misrouted:
                return False
        if self.all.foreign:
            return False
        can_fail = self.probe is not None and self.probe.misrouted > 0
        return True if can_fail and self.all.answers >= LEAST_ANSWERS else None


def leaks(answers: list[tuple[int, str]]) -> tuple[int, int]:
    """Counts (answers with another tenant's mark, answers without their own)."""
    foreign = sum(bool(marks_in(text) - {tenant}) for tenant, text in answers)
    return foreign, sum(mark_of(tenant) not in text for tenant, text in answers)


def tenant_leaks(context: Context) -> TenantLeaks:
    in_trials = [
        (tenant, r.text)
        for point, result, trial in context.folder.trials(context.points, context.lab)
        if trial and point.workload.adapters
        for tenants in [
            point.workload.tenants(
                context.lab.requests_of(point.workload), context.lab.draw_seed(result.repeat)
            )
        ]
        for r in trial.records
        if r.text is not None and (tenant := tenants[r.index]) is not None
    ]
    parts = {"under load, in trials": in_trials}
    variants = context.lab.variants
    probe = next(
        (p for v in variants if (p := context.folder.probe_result("tenants", v.name))), None
    )
    probed = None
    if probe:
        probe_answers = [(int(t), str(text)) for t, text in probe["answers"]]
        at = len(probe_answers) - probe["visits"]
        parts |= {
            "shared prompts, 16 at once": probe_answers[:at],
            "of an adapter loaded at run time": probe_answers[at:],
        }
        probed = TenantProbe(
            misrouted=len(probe["misrouted"]),
            caught=leaks([(int(t), str(text)) for t, text in probe["misrouted"]])[0],
            base_asked=len(probe["base"]),
            base_marked=sum(bool(marks_in(text)) for text in probe["base"]),
            cached_share=probe.get("cached_share"),
            refused=probe["refused"],
        )
    all_answers = [pair for part in parts.values() for pair in part]
    marks = Marks(len(all_answers), *leaks(all_answers))
    most = None
    if all_answers:
        exact = scipy.stats.binomtest(marks.foreign, marks.answers).proportion_ci(method="exact")
        most = float(exact.high)
    checked = {name: Marks(len(part), *leaks(part)) for name, part in parts.items()}
    return TenantLeaks(checked, marks, most, probed)


def tell_leaks(facts: TenantLeaks) -> Finding:
    rows = [["Completions", "Number", "Another tenant's mark", "Own mark missing"]]
    rows += [
        [name, f"{part.answers:,}", str(part.foreign), str(part.bare)]
        for name, part in {**facts.parts, "all": facts.all}.items()
    ]
    lines = [sentence] if (sentence := foreign_sentence(facts)) else []
    if 0 < facts.all.answers < LEAST_ANSWERS:
        lines.append(f"Fewer than {LEAST_ANSWERS:,} completions: a smoke test, not a proof.")
    if probe := facts.probe:
        if probe.cached_share is not None:
            lines.append(
                f"{probe.cached_share:.0%} of the tokens of the shared prompts came from the prefix"
                " cache, where tenants' keys and values lie side by side."
            )
        lines += [
            f"To show that the check can fail, {probe.misrouted} requests were sent to the wrong"
            f" adapter on purpose: it caught {probe.caught}."
            if probe.misrouted
            else "No request was sent to the wrong adapter on purpose, so nothing shows that the"
            " check can fail.",
            f"The base model without an adapter wrote a mark in {probe.base_marked} of"
            f" {probe.base_asked} completions.",
        ]
    return Finding(
        title="Does any completion come from another tenant's adapter?",
        rows=rows,
        lines=[*lines, refused_sentence(facts.probe)],
        passed=facts.passed,
    )


def foreign_sentence(facts: TenantLeaks) -> str | None:
    if facts.most_foreign_share is None:
        return None
    return (
        f"{facts.all.foreign} of {facts.all.answers:,} completions carry another tenant's mark:"
        f" with 95% confidence, fewer than 1 in {1 / facts.most_foreign_share:,.0f} do."
    )


def refused_sentence(probe: TenantProbe | None) -> str:
    if probe is None:
        return (
            "The probe under concurrency and hot loading was not run, so nothing shows that the"
            " check can fail."
        )
    answers = ", ".join(f"`{name}`: HTTP {code}" for name, code in probe.refused.items())
    if any(code < 400 for code in probe.refused.values()):
        return f"Some requests for unknown adapters are answered, and should be refused: {answers}."
    return f"Requests for unknown adapters are refused, not answered by the base model: {answers}."


TENANT_LEAKS = Conclusion("tenant-leaks", tenant_leaks, tell_leaks)

# ----------------------------------------------------------------------- what an adapter costs


@dataclass(frozen=True)
class AdapterCost:
    """Compares a point's step and first token with the base's, and with what bytes explain."""

    where: str
    adapters: str  # how many, and how requests are spread over them
    tpot_s: float
    over_base: float | None  # TPOT / the base's - 1; None at another load
    bytes_share: float  # of the active adapters, over the base's weights
    ttft_s: float | None


def adapter_cost(context: Context) -> tuple[AdapterCost, ...]:
    base = next((p for p in context.points if p.variant.name == "base"), None)
    base_s = context.mean(base, "tpot_mean_s") if base else None
    costs = []
    for point in context.points:
        tpot_s = context.mean(point, "tpot_mean_s")
        if base is None or base_s is None or tpot_s is None:
            continue
        adapters = point.workload.adapters
        moved_bytes = 0.0
        if adapters:
            active = min(adapters.count, point.flags.max_loras)
            moved_bytes = active * adapter_bytes(point)
        costs.append(
            AdapterCost(
                where=point_label(point.key, context.lab),
                adapters=f"{adapters.count}, {adapters.mix}" if adapters else "none",
                tpot_s=tpot_s,
                over_base=tpot_s / base_s - 1 if point.load == base.load else None,
                bytes_share=moved_bytes / point.shape.weight_bytes,
                ttft_s=context.mean(point, "ttft_mean_s"),
            )
        )
    return tuple(costs)


def tell_cost(facts: tuple[AdapterCost, ...]) -> Finding:
    rows = [["Point", "Adapters", "TPOT, mean", "Over the base", "Bytes explain", "TTFT, mean"]]
    rows += [
        [
            cost.where,
            cost.adapters,
            number(cost.tpot_s, "s"),
            "–" if cost.over_base is None else f"{cost.over_base:+.0%}",
            f"{cost.bytes_share:+.1%}",
            number(cost.ttft_s, "s"),
        ]
        for cost in facts
    ]
    lines = [
        "*Bytes explain* is the active adapters' bytes / the bytes of the base's weights, which a"
        " step reads once. The rest is the time to launch two thin products and an addition for"
        " every adapted matrix of every layer. On a CPU the products themselves take long too: the"
        " kernel copies an adapter's matrices once for each token, so long prompts and high ranks"
        " cost much.",
    ]
    return Finding(title="What does an adapter cost?", rows=rows, lines=lines)


ADAPTER_COST = Conclusion("adapter-cost", adapter_cost, tell_cost)

# ------------------------------------------------------------------------ what adapters save


@dataclass(frozen=True)
class TenantMemory:
    """Counts bytes of weights: the base's, and one adapter's at the rank the engine is set to."""

    base_bytes: float
    adapter_bytes: float
    rank: int

    def together_bytes(self, tenants: int) -> float:
        """Adds up one engine's weights and an adapter for each tenant."""
        return self.base_bytes + tenants * self.adapter_bytes

    def apart_bytes(self, tenants: int) -> float:
        """Adds up an engine with merged weights for each tenant."""
        return tenants * self.base_bytes


def tenant_memory(context: Context) -> TenantMemory | None:
    """Counts the bytes of weights; None where no point has an adapter."""
    point = next((p for p in context.points if p.workload.adapters), None)
    if point is None:
        return None
    return TenantMemory(point.shape.held_bytes, adapter_bytes(point), point.flags.max_lora_rank)


def tell_memory(facts: TenantMemory | None) -> Finding:
    title = "Memory against one server a tenant"
    if facts is None:
        return Finding(title=title)
    rows = [["Tenants", "One engine with adapters", "One merged engine a tenant", "Saved"]]
    for tenants in (1, 8, 32, 100, 1000):
        together, apart = facts.together_bytes(tenants), facts.apart_bytes(tenants)
        rows.append(
            [
                f"{tenants:,}",
                f"{together / 1e9:,.2f} GB",
                f"{apart / 1e9:,.2f} GB",
                f"{apart / together:.1f}x",
            ]
        )
    line = (
        f"Arithmetic on what was served: the base's weights take {facts.base_bytes / 1e6:,.0f} MB,"
        f" an adapter of rank {facts.rank} {facts.adapter_bytes / 1e6:.2f} MB"
        f" ({facts.adapter_bytes / facts.base_bytes:.2%}). The KV cache and the process come in"
        " addition, once in all or once for each tenant."
    )
    return Finding(title=title, rows=rows, lines=[line])


TENANT_MEMORY = Conclusion("tenant-memory", tenant_memory, tell_memory)

# ------------------------------------------------------------------------------------ the answers


def many_adapters(run: JudgedRun) -> str | None:
    one = run.ratio("one")
    memory = TENANT_MEMORY.facts_of(run) if one else None
    if memory is None:
        return None
    return (
        f"Eight tenants take {memory.together_bytes(8) / 1e9:.2f} GB of weights on one engine, and"
        f" {memory.apart_bytes(8) / 1e9:.2f} GB on a server each. With an adapter, throughput"
        f" is {one} that of the base."
    )


def mixed_adapters(run: JudgedRun) -> str | None:
    parts = (
        ("eight", "with eight adapters in one batch instead of one, TPOT is"),
        ("swap", "with two slots for eight adapters instead of eight slots, TTFT is"),
        ("skew", "with two slots and a skewed mix instead of a uniform one, TTFT is"),
    )
    ratios = [f"{text} {ratio}" for claim, text in parts if (ratio := run.ratio(claim))]
    mixed = "One batch holds requests of several adapters, each computed with its own."
    return f"{mixed} {sentences(ratios)}" if ratios else None


def leak_by_answer(run: JudgedRun) -> str | None:
    leaks = TENANT_LEAKS.facts_of(run)
    foreign = foreign_sentence(leaks) if leaks else None
    return f"{foreign} {refused_sentence(leaks.probe)}" if leaks and foreign else None


# -------------------------------------------------------------------------------------- its plots


def draw_adapters(run: JudgedRun) -> str | None:
    """Draws throughput over the adapters in the batch, measured on what bytes predict."""
    counted = [
        (p.workload.adapters.count if p.workload.adapters else 0, p)
        for p in run.points
        if p.variant.name == "lora"
        and p.load == run.points[0].load
        and (p.workload.adapters is None or p.workload.adapters.mix == "uniform")
    ]
    counted.sort(key=lambda pair: pair[0])
    intervals = [run.interval(p, "output_tokens_per_s") for _, p in counted]
    if not any(intervals):
        return None
    _, ax = plt.subplots(figsize=(6, 3.6))
    x = range(len(counted))
    heights = [i.value if i else np.nan for i in intervals]
    ax.errorbar(x, heights, yerr=reach(intervals), fmt="o-", capsize=4, color=BLUE,
                label="measured, 95% interval")  # fmt: skip
    known = [run.forecast(p, "output_tokens_per_s") for _, p in counted]
    forecast = draw_forecasts(ax, x, known)
    base = next((p for p in run.points if p.variant.name == "base"), None)
    level = run.interval(base, "output_tokens_per_s") if base else None
    if level:
        shares = [1 + n * adapter_bytes(p) / p.shape.weight_bytes if n else 1.0 for n, p in counted]
        ax.plot(x, [level.value / s for s in shares], "--", color=BOUND,
                label="base / bytes of the active adapters")  # fmt: skip
        ax.plot([-0.35], [level.value], "D", color=GREY, label="engine without LoRA")
    ax.set_xticks(x, ["base only" if n == 0 else str(n) for n, _ in counted])
    ax.set_xlabel("adapters in the batch")
    ax.set_ylabel("output throughput (tok/s)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return (
        "What adapters cost: hardly anything by their bytes. The gap between the curves is the time"
        " of the operations that apply them: launching them, and on a CPU computing them too."
        + BANDS
        * forecast
    )


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "one": (
            Published(figure="-34%", source="vLLM, pull request 11267"),
            Published(figure="-4%", source="vLLM, pull request 11613"),
        ),
        "eight": (
            Published(figure="12x, 2 ms a token more", source="Punica, MLSys 2024"),
            Published(
                figure="up to 4x",
                setting="the throughput of vLLM with the adapters as models of their own; S-LoRA"
                " serves 2,000",
                source="S-LoRA, MLSys 2024",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(TENANT_LEAKS, ADAPTER_COST, TENANT_MEMORY),
    answers={"SA-2": many_adapters, "SA-3": mixed_adapters, "SA-4": leak_by_answer},
    plots={"adapters": draw_adapters},
    published=PUBLISHED,
    headline=Headline(
        claim="one",
        done="Applying one LoRA adapter",
        figure="the throughput",
    ),
)
