"""What speculation guessed right, what that gained, and whether the text is the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from labs import theory
from labs.filing.results import Finding
from labs.findings.context import Context
from labs.judging.text import number, short
from labs.lab import Point
from serving import metrics


def speculations(context: Context) -> list[tuple[Point, dict[str, Any]]]:
    """The points that speculate, with their configuration."""
    configured = [(point, point.flags.speculative_config) for point in context.points]
    return [(point, config) for point, config in configured if config]


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
    about = context.run.about.get("draft", {})
    made = [
        f"The draft has {about['layers']} of the target's layers and guessed"
        f" {about['acceptance']:.0%} of held-out tokens. Cut out and not trained, it guessed"
        f" {about['acceptance_untrained']:.1%}: without distillation a small model of the same"
        " shape is only a burden."
    ] if "acceptance_untrained" in about else []  # fmt: skip
    return Finding(
        title="What was accepted",
        rows=rows,
        lines=[
            *made,
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
    nothing beyond them), c off the draft served alone, by the engine's clock: at a millisecond a
    step tokens reach the client in clumps. A step's tokens are the engine's count over all steps:
    an n-gram's steps without a draft count as steps of one token.
    """
    plain = {
        p.load.users: tpot
        for p in context.points
        if p.variant.name == "none" and (tpot := context.mean(p, "tpot_mean_s"))
        and p.workload.name in ("story", "crowd")
    }  # fmt: skip
    loads = sorted(plain)
    alone = [
        s for p in context.points if p.variant.weights == "draft" and (s := step_s(context, p))
    ]
    single = context.point("none", "story", "concurrent:1")
    target = step_s(context, single) if single else None
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
        elif alone and target:
            draft = alone[0] / target
        length = tokens_a_step(context, point)
        if length and verify is not None and draft is not None:
            explained = length / (g * draft + verify)
        found.append(SpeedUp(point, plain_s / tpot_s, draft, verify, explained))
    return found


def step_s(context: Context, point: Point) -> float | None:
    """Mean time between a sequence's steps, by the engine's own clock."""
    steps = [
        trial.engine.histograms[metrics.ITL]
        for _, _, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine and metrics.ITL in trial.engine.histograms
    ]
    count = sum(h.count for h in steps)
    return sum(h.sum for h in steps) / count if count else None


def tokens_a_step(context: Context, point: Point) -> float | None:
    """Output tokens a decode step and sequence, steps that drafted nothing included.

    Each of those steps is one sample of the engine's inter-token latency. Its counter of accepted
    tokens would say too much: it takes in those that an answer's end cuts off its last draft.
    """
    tokens = steps = 0.0
    for _, _, trial in context.folder.trials([point], context.lab):
        if trial and trial.engine and metrics.ITL in trial.engine.histograms:
            first = trial.engine.histograms[metrics.TTFT].count
            tokens += trial.engine.values[metrics.GENERATION_TOKENS] - first
            steps += trial.engine.histograms[metrics.ITL].count
    return tokens / steps if steps else None


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
        where = f"at every load from {loads[0]} to {loads[-1]}" if loads[1:] else f"at {loads[0]}"
        if all(r > 1 for r in ratios):
            lines.append(f"`{variant}` on {workload}: faster {where} in flight.")
        elif all(r <= 1 for r in ratios):
            lines.append(f"`{variant}` on {workload}: slower {where} in flight.")
        elif crossing is not None:
            (n, a), (m, b) = curve[crossing], curve[crossing + 1]
            at = 2 ** (math.log2(n) + (1 - a) / (b - a) * math.log2(m / n))
            turns = "starts to lose" if a > 1 else "starts to win"
            lines.append(f"`{variant}` on {workload}: {turns} at about {at:.0f} in flight.")
    lines.append(
        "Speed-up is TPOT without / with speculation at the same load. c is a step of the draft"
        " served alone over one of the target, both at one stream, by the engine's clock; v is the"
        " plain engine's TPOT at B (g + 1) over that at B. What the last column leaves of the first"
        " is proposing and rejecting: sampling, bookkeeping, and starting the draft."
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
