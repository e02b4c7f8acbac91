"""What a lab concludes beyond its claims: tables and sentences, computed from a run's files alone.

A lab names its findings (`Lab.findings`); each function here is pure and returns a `Finding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from labs import theory
from labs.lab import Lab, Point
from labs.results import Finding, Run, RunFolder
from labs.text import number, short, yes
from serving import metrics


@dataclass(frozen=True)
class Context:
    """A run as findings see it; `values[point][repeat][metric]` holds the measurements."""

    folder: RunFolder
    run: Run
    lab: Lab
    points: list[Point]
    values: Mapping[str, Mapping[int, Mapping[str, float | None]]]

    def mean(self, point: Point, metric: str) -> float | None:
        """Over the repeats that have it."""
        rows = self.values.get(point.key, {}).values()
        found = [v for row in rows if (v := row.get(metric)) is not None]
        return float(np.mean(found)) if found else None

    def point(self, variant: str, workload: str, load: str) -> Point | None:
        wanted = (variant, workload, load)
        every = ((p.variant.name, p.workload.name, str(p.load)) for p in self.points)
        return next((p for p, has in zip(self.points, every, strict=True) if has == wanted), None)


def token_budget(context: Context) -> Finding:
    """The budget that keeps the longest gap within the SLO at the earliest long first token.

    Also: the stall as a line over the budget, and the link a split of prefill from decode would
    need to be no slower (KV bytes of the prompt / time of its prefill; DistServe, OSDI 2024).
    """
    limit_s = context.lab.slo.itl_s
    rows = [["Variant", "Token budget", "Stall, mean", "TTFT of the long prompt", "Within the SLO"]]
    fitting: list[tuple[float, str]] = []
    line: list[tuple[float, float]] = []
    whole_s = None
    for point in context.points:
        stall_s, ttft_s = (context.mean(point, m) for m in ("stall_mean_s", "intruder_ttft_mean_s"))
        if stall_s is None or ttft_s is None or not point.workload.intruder:
            continue
        tokens = int(str(point.variant.flags["max-num-batched-tokens"]))
        prompt = point.workload.intruder.prompt_tokens
        ok = limit_s is not None and stall_s <= limit_s
        fitting += [(ttft_s, point.variant.name)] if ok else []
        line.append((min(tokens - point.load.users, prompt), stall_s))
        if point.variant.flags["enable-chunked-prefill"] is False:
            whole_s = ttft_s
        rows.append(
            [point.variant.name, str(tokens), number(stall_s, "s"), number(ttft_s, "s"),
             yes(ok if limit_s else None)]
        )  # fmt: skip
    lines = []
    if limit_s is not None:
        best = min(fitting, default=None)
        lines.append(
            f"With gaps of at most {number(limit_s, 's')}, `{best[1]}` gives the long prompt its"
            f" first token soonest, after {number(best[0], 's')}."
            if best
            else f"No budget here keeps the gaps within {number(limit_s, 's')}: a decode step alone"
            " takes most of that, or the budgets are too large."
        )
    if len(line) > 2:
        fit = stats.linregress(*zip(*line, strict=True))
        lines.append(
            f"The stall over the tokens a piece may have is a line: {number(fit.intercept, 's')}"
            f" + {1e3 * fit.slope:.3g} ms a token (R² {fit.rvalue**2:.3f}), so prefill runs at"
            f" {1 / fit.slope:,.0f} tok/s beside the streams."
        )
    point = context.points[0]
    if whole_s and point.workload.intruder:
        moved = point.workload.intruder.prompt_tokens * point.shape.kv_bytes_per_token()
        lines.append(
            f"A second machine that does the prefill would have to hand over {moved / 1e6:,.1f} MB"
            f" of keys and values; moved in the {number(whole_s, 's')} that the prefill takes"
            f" here, that is {8 * moved / whole_s / 1e9:.2f} Gbit/s: a faster link splits prefill"
            " from decode at less delay than it removes."
        )
    return Finding(title="Which token budget?", rows=rows, lines=lines)


def speculations(context: Context) -> list[tuple[Point, dict[str, Any]]]:
    """The points that speculate, with their configuration."""
    found = [(p, p.variant.flags.get("speculative-config")) for p in context.points]
    return [(p, config) for p, config in found if isinstance(config, dict)]


def accepted_at(context: Context, point: Point) -> list[float]:
    """The share of drafts whose token at each position was accepted, all repeats together."""
    engines = [
        trial.engine.values
        for at, _, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine
    ]
    drafts = sum(values.get(metrics.SPEC_DRAFTS, 0.0) for values in engines)
    found: list[float] = []
    while drafts and any(metrics.position(len(found)) in values for values in engines):
        name = metrics.position(len(found))
        found.append(sum(values.get(name, 0.0) for values in engines) / drafts)
    return found


def acceptance(context: Context) -> Finding:
    """Acceptance by position against the formula's single probability."""
    rows = [["Point", "Accepted at position 1, 2, ...", "Tokens a step", "At constant a", "Wasted"]]
    for point, config in speculations(context):
        at, length = accepted_at(context, point), context.mean(point, "acceptance_length")
        if not at or length is None:
            continue
        expected = theory.accepted_length(at[0], config["num_speculative_tokens"])
        rate = context.mean(point, "acceptance_rate")
        rows.append(
            [
                short(point.key, context.lab),
                ", ".join(f"{share:.2f}" for share in at),
                f"{length:.2f}",
                f"{expected:.2f}",
                "–" if rate is None else f"{1 - rate:.0%}",
            ]
        )
    return Finding(
        title="What was accepted",
        rows=rows,
        lines=[
            "A position counts as accepted when it and all before it were. *At constant a* is"
            " (1 - a^(g+1)) / (1 - a) with a of the first position: where later positions do better"
            " than a to the power of theirs, guesses come in runs. *Wasted* is the share of drafted"
            " tokens thrown away.",
            "An n-gram that finds nothing to copy drafts nothing in that step; such steps are not"
            " counted here.",
        ],
    )


@dataclass(frozen=True)
class SpeedUp:
    """A speculating point: measured and explained speed-up; v or c is None where not measured."""

    point: Point
    measured: float
    draft_cost: float | None
    verify_cost: float | None
    explained: float | None


def speed_ups(context: Context) -> list[SpeedUp]:
    """TPOT without / with speculation, and Leviathan's formula with measured parts.

    v is read off the plain engine's own TPOT over concurrency (linear between the loads measured,
    nothing beyond them), c off the draft served alone; a step's tokens are the engine's count over
    all steps: an n-gram's steps without a draft count as steps of one token.
    """
    plain = {
        p.load.users: tpot
        for p in context.points
        if p.variant.name == "none" and (tpot := context.mean(p, "tpot_mean_s"))
        and p.workload.name in ("story", "crowd")
    }  # fmt: skip
    loads = sorted(plain)
    alone = [
        tpot
        for p in context.points
        if p.variant.weights == "draft" and (tpot := context.mean(p, "tpot_mean_s"))
    ]
    found = []
    for point, config in speculations(context):
        base = context.point("none", point.workload.name, str(point.load))
        plain_s = context.mean(base, "tpot_mean_s") if base else None
        tpot_s = context.mean(point, "tpot_mean_s")
        if not plain_s or not tpot_s:
            continue
        g, batch = config["num_speculative_tokens"], point.load.users
        verify = draft = explained = None
        if loads and loads[0] <= batch and batch * (g + 1) <= loads[-1]:
            many, few = np.interp([batch * (g + 1), batch], loads, [plain[n] for n in loads])
            verify = float(many / few)
        if config["method"] == "ngram":
            draft = 0.0
        elif alone and 1 in plain:
            draft = alone[0] / plain[1]
        length = tokens_a_step(context, point)
        if length and verify is not None and draft is not None:
            explained = length / (g * draft + verify)
        found.append(SpeedUp(point, plain_s / tpot_s, draft, verify, explained))
    return found


def tokens_a_step(context: Context, point: Point) -> float | None:
    """Output tokens a step and sequence, steps that drafted nothing included."""
    tokens = accepted = 0.0
    for _, _, trial in context.folder.trials([point], context.lab):
        if trial and trial.engine:
            values = trial.engine.values
            tokens += values.get(metrics.GENERATION_TOKENS, 0.0)
            accepted += values.get(metrics.SPEC_ACCEPTED, 0.0)
    return tokens / (tokens - accepted) if tokens > accepted else None


def speed_up(context: Context) -> Finding:
    """Measured beside the formula with measured parts, and where it crosses 1."""
    rows = [["Point", "Speed-up", "Tokens a step", "c", "v", "Tokens / (g c + v)"]]
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for found in speed_ups(context):
        length = tokens_a_step(context, found.point)
        rows.append(
            [
                short(found.point.key, context.lab),
                f"{found.measured:.2f}x",
                number(length),
                number(found.draft_cost),
                number(found.verify_cost),
                "–" if found.explained is None else f"{found.explained:.2f}x",
            ]
        )
        curve = curves.setdefault((found.point.variant.name, found.point.workload.name), [])
        curve.append((found.point.load.users, found.measured))
    lines = []
    for (variant, workload), curve in curves.items():
        curve.sort()
        loads, ratios = [n for n, _ in curve], [r for _, r in curve]
        crossing = next(
            (i for i, (a, b) in enumerate(pairwise(ratios)) if (a - 1) * (b - 1) < 0), None
        )
        if all(r > 1 for r in ratios):
            lines.append(f"`{variant}` on {workload}: faster at every load up to {loads[-1]}.")
        elif all(r <= 1 for r in ratios):
            lines.append(f"`{variant}` on {workload}: slower at every load.")
        elif crossing is not None:
            (n, a), (m, b) = curve[crossing], curve[crossing + 1]
            at = 2 ** (math.log2(n) + (1 - a) / (b - a) * math.log2(m / n))
            turns = "starts to lose" if a > 1 else "starts to win"
            lines.append(f"`{variant}` on {workload}: {turns} at about {at:.0f} in flight.")
    lines.append(
        "Speed-up is TPOT without / with speculation at the same load. c is the draft served alone"
        " over the target, both at one stream; v is the plain engine's TPOT at B (g + 1) over that"
        " at B. What the last column leaves of the first is proposing and rejecting: sampling,"
        " bookkeeping, and starting the draft."
    )
    return Finding(title="Where does it win?", rows=rows, lines=lines)


def same_text(context: Context) -> Finding:
    """The share of answers that equal, character for character, the plain engine's at one stream.

    The same requests with the same index are compared, with a Wilson interval.
    """
    texts: dict[str, dict[tuple[int, int], str]] = {}
    for point, result, trial in context.folder.trials(context.points, context.lab):
        if trial and point.workload.keep_text:
            texts.setdefault(point.key, {}).update(
                {(result.repeat, r.index): r.text for r in trial.records if r.text is not None}
            )
    rows = [["Point", "Answers compared", "The same", "95 % interval"]]
    for point in context.points:
        base = context.point("none", point.workload.name, "concurrent:1")
        if base is None or base.key == point.key or point.key not in texts:
            continue
        ours, theirs = texts[point.key], texts.get(base.key, {})
        both = sorted(ours.keys() & theirs.keys())
        same = sum(ours[key] == theirs[key] for key in both)
        if both:
            wilson = stats.binomtest(same, len(both)).proportion_ci(method="wilson")
            rows.append(
                [short(point.key, context.lab), str(len(both)), f"{same / len(both):.0%}",
                 f"{wilson.low:.0%} to {wilson.high:.0%}"]
            )  # fmt: skip
    return Finding(
        title="Is it the same text?",
        rows=rows,
        lines=[
            "Greedy answers compared with those of the plain engine, one at a time. Rows of `none`"
            " speculate nothing: what differs there is the arithmetic of another batch size (BF16"
            " sums in another order, and a near tie between two tokens falls the other way), and so"
            " it does where a verification puts g + 1 tokens in one step.",
        ],
    )


FINDINGS: dict[str, Callable[[Context], Finding]] = {
    "token-budget": token_budget,
    "acceptance": acceptance,
    "speed-up": speed_up,
    "same-text": same_text,
}
