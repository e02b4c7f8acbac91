"""Whose adapter answered, what adapters cost, and what a stranger can tell by timing."""

from __future__ import annotations

import numpy as np
from scipy import stats

from labs.filing.results import Finding
from labs.findings.context import Context
from labs.judging.judge import effect
from labs.judging.text import number, short
from labs.multi_lora import adapter_bytes
from serving.adapters import mark_of, marks_in

LEAST_ANSWERS = 2000


def leaks(answers: list[tuple[int, str]]) -> tuple[int, int]:
    """(answers with another tenant's mark, answers without their own) of (tenant, text)."""
    foreign = sum(bool(marks_in(text) - {tenant}) for tenant, text in answers)
    return foreign, sum(mark_of(tenant) not in text for tenant, text in answers)


def tenant_leaks(context: Context) -> Finding:
    """Every answer of an adapter in the run, trials and probe together."""
    in_trials = [
        (tenant, r.text)
        for point, result, trial in context.folder.trials(context.points, context.lab)
        if trial and point.workload.adapters
        for tenants in [
            point.workload.tenants(context.lab.requests, context.lab.draw_seed(result.repeat))
        ]
        for r in trial.records
        if r.text is not None and (tenant := tenants[r.index]) is not None
    ]
    rows = [["Answers", "Asked", "Another tenant's mark", "Own mark missing"]]
    parts = {"under load, in trials": in_trials}
    probe = next(
        (p for v in context.lab.variants if (p := context.folder.probed("tenants", v.name))), None
    )
    lines: list[str] = []
    if probe:
        asked = [(int(t), str(text)) for t, text in probe["answers"]]
        at = len(asked) - probe["visits"]
        parts |= {
            "shared prompts, 16 at once": asked[:at],
            "of an adapter loaded at run time": asked[at:],
        }
    every = [pair for part in parts.values() for pair in part]
    for name, part in [*parts.items(), ("all", every)]:
        foreign, bare = leaks(part)
        rows.append([name, f"{len(part):,}", str(foreign), str(bare)])
    foreign, bare = leaks(every)
    passed = None
    if every:
        most = stats.binomtest(foreign, len(every)).proportion_ci(method="exact").high
        lines.append(
            f"{foreign} of {len(every):,} answers carry another tenant's mark: with 95 % confidence"
            f" fewer than 1 in {1 / most:,.0f} do."
        )
        if len(every) < LEAST_ANSWERS:
            lines.append(f"Fewer than {LEAST_ANSWERS:,} answers: a smoke test, not a proof.")
        passed = (foreign == 0 and len(every) >= LEAST_ANSWERS) or (False if foreign else None)
    if probe:
        caught, _ = leaks([(int(t), str(text)) for t, text in probe["misrouted"]])
        base = sum(bool(marks_in(text)) for text in probe["base"])
        if (cached := probe.get("cached_share")) is not None:
            lines.append(
                f"{cached:.0%} of the prompt tokens of the shared prompts came out of the prefix"
                " cache, where tenants' keys and values lie side by side."
            )
        refused = ", ".join(f"`{name}`: HTTP {code}" for name, code in probe["refused"].items())
        lines += [
            f"The check can fail: of {len(probe['misrouted'])} requests sent to the wrong adapter"
            f" on purpose it caught {caught}.",
            f"The base without an adapter wrote a mark in {base} of {len(probe['base'])} answers.",
            f"Unknown adapters are refused, not answered by the base: {refused}.",
        ]
        silent = [name for name, code in probe["refused"].items() if code < 400]
        if silent or caught < len(probe["misrouted"]):
            passed = False
    else:
        lines.append("The probe under concurrency and hot loading was not asked.")
    return Finding(
        title="Does any answer come from another tenant's adapter?",
        rows=rows,
        lines=lines,
        passed=passed,
    )


def adapter_cost(context: Context) -> Finding:
    """What a step takes with adapters in the batch, and what bytes explain of it."""
    rows = [["Point", "Adapters", "TPOT, mean", "Over the base", "Bytes explain", "TTFT, mean"]]
    base = next((p for p in context.points if p.variant.name == "base"), None)
    base_s = context.mean(base, "tpot_mean_s") if base else None
    for point in context.points:
        tpot_s = context.mean(point, "tpot_mean_s")
        if base is None or base_s is None or tpot_s is None:
            continue
        adapters = point.workload.adapters
        moved = 0.0
        if adapters:
            active = min(adapters.count, point.flags.max_loras)
            moved = active * adapter_bytes(point)
        share = moved / point.shape.weight_bytes
        rows.append(
            [
                short(point.key, context.lab),
                f"{adapters.count}, {adapters.mix}" if adapters else "none",
                number(tpot_s, "s"),
                f"{tpot_s / base_s - 1:+.0%}" if point.load == base.load else "–",
                f"{share:+.1%}",
                number(context.mean(point, "ttft_mean_s"), "s"),
            ]
        )
    lines = [
        "*Bytes explain* is the active adapters' bytes over the base's weights, read once a step."
        " What is left is the launches, two thin products and an addition beside every adapted"
        " matrix of every layer, and on a CPU the products too: its kernel copies an adapter's"
        " matrices once a token, so that prefill and rank are dear.",
    ]
    return Finding(title="What does an adapter cost?", rows=rows, lines=lines)


def tenant_memory(context: Context) -> Finding:
    """One engine with all adapters against an engine for each tenant: bytes of weights."""
    point = next((p for p in context.points if p.workload.adapters), None)
    if point is None:
        return Finding(title="Memory against one server a tenant")
    each, base = adapter_bytes(point), point.shape.weight_bytes
    rows = [["Tenants", "One engine with adapters", "One merged engine a tenant", "Saved"]]
    for tenants in (1, 8, 32, 100, 1000):
        together, apart = base + tenants * each, tenants * base
        rows.append(
            [
                f"{tenants:,}",
                f"{together / 1e9:,.2f} GB",
                f"{apart / 1e9:,.2f} GB",
                f"{apart / together:.1f}x",
            ]
        )
    line = (
        f"Arithmetic on what was served: the base's weights take {base / 1e6:,.0f} MB, an adapter"
        f" of rank {point.flags.max_lora_rank} {each / 1e6:.2f} MB"
        f" ({each / base:.2%}). The KV cache and the process come on top, once or once a tenant."
    )
    return Finding(title="Memory against one server a tenant", rows=rows, lines=[line])


def timing_leak(context: Context) -> Finding:
    """Can a stranger tell a cached prompt by its time to the first token?"""
    rows = [["Stranger's prompt", "Asked before by the victim", "Never asked", "Ratio", "95 %"]]
    lines, passed = [], None
    probe = next(
        (p for v in context.lab.variants if (p := context.folder.probed("salt", v.name))), None
    )
    if probe is None:
        return Finding(title="Does the cache tell tenants about each other?", lines=["Not asked."])
    told: dict[str, bool] = {}
    for name, text in (("shared", "no salt"), ("salted", "a `cache_salt` each")):
        known, fresh = (
            dict(enumerate(probe["took_s"][f"{name}, {state}"])) for state in ("known", "fresh")
        )
        found = effect(known, fresh)
        if found is None or found.ratio.low is None or found.ratio.high is None:
            continue
        told[name] = found.ratio.high < 1 and found.ratio.value < 0.9
        rows.append(
            [
                text,
                number(float(np.median(list(known.values()))), "s"),
                number(float(np.median(list(fresh.values()))), "s"),
                f"{found.ratio.value:.2f}x",
                f"{found.ratio.low:.2f} to {found.ratio.high:.2f}",
            ]
        )
        lines.append(
            f"With {text}, a stranger {'can' if told[name] else 'cannot'} tell by timing that a"
            f" prompt of {probe['prompt_tokens']} tokens was asked before."
        )
    if len(told) == 2:
        passed = not told["salted"]
    lines.append("Medians of single requests, paired by round; the ratio is of their logarithms.")
    return Finding(
        title="Does the cache tell tenants about each other?",
        rows=rows,
        lines=lines,
        passed=passed,
    )
