"""This module tells what many samples cost an engine, and what voting and trying again buy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dashboards.palette import BLUE, BOUND, VARIANTS
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import BANDS, GREY, legend_above, plt
from labs.harness.facts.parts import ARITHMETIC, IN_PART, Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.sampling import canonical, gain_over_tasks, over_tasks, pass_at, vote_at
from labs.harness.judging.text import number, ratio_number
from labs.harness.spec import Point
from serving import dummy, models
from serving.models import Shape

# -------------------------------------------------------------- what the engine takes for samples


@dataclass(frozen=True)
class Cost:
    """Holds what the samples of one prompt take, asked for in one way; None: not measured."""

    variant: str
    workload: str
    samples: int  # of a prompt
    requests: int  # that ask for them
    seconds: float | None  # from the first send of a prompt's samples until all are complete
    tokens_per_s: float | None
    ttft_s: float | None
    hit_rate: float | None
    expected_hits: float | None  # by (n - 1) floor((P - 1) / b) b / (n P)

    @property
    def each_s(self) -> float | None:
        """The seconds of the engine that one sample takes."""
        return None if self.seconds is None else self.seconds / self.samples


def expected_hits(point: Point) -> float | None:
    """Computes the share of prompt tokens that all samples but the first find in the cache."""
    if not point.flags.enable_prefix_caching or "block-size" not in point.flags:
        return None
    n, block, prompt = point.sequences, point.flags.block_size, int(point.prompt_tokens)
    return (n - 1) * ((prompt - 1) // block * block) / (n * prompt)


def costs(context: Context) -> tuple[Cost, ...]:
    return tuple(
        Cost(
            variant=p.variant.name,
            workload=p.workload.name,
            samples=p.workload.samples.count,
            requests=p.load.users,
            seconds=p.sequences * p.output_tokens / rate if rate else None,
            tokens_per_s=rate,
            ttft_s=context.mean(p, "ttft_mean_s"),
            hit_rate=context.mean(p, "prefix_hit_rate"),
            expected_hits=expected_hits(p),
        )
        for p in context.points
        if p.workload.samples
        for rate in [context.mean(p, "output_tokens_per_s")]
    )


def tell_costs(facts: tuple[Cost, ...]) -> Finding:
    rows = [["Samples of a prompt", "Requests", "Prefix cache", "Until all are complete",
             "Each sample", "Output tokens/s", "TTFT, mean", "Hits",
             "Hits by the blocks"]]  # fmt: skip
    rows += [
        [str(c.samples), str(c.requests), c.variant, number(c.seconds, "s"), number(c.each_s, "s"),
         number(c.tokens_per_s), number(c.ttft_s, "s"), number(c.hit_rate, "share"),
         number(c.expected_hits, "share")]
        for c in facts
    ]  # fmt: skip
    lines = [line for line in (times_sentence(facts), hits_sentence(facts)) if line]
    return Finding(title="What do many samples of one prompt cost?", rows=rows, lines=lines)


def times_sentence(facts: Sequence[Cost]) -> str | None:
    """Says how many times as long as one sample the others take, where the cache is on."""
    one = next((c for c in facts if c.samples == 1 and c.seconds), None)
    if one is None or not one.seconds:
        return None
    costs_of_several = [
        c for c in facts if c.samples > 1 and c.seconds and c.variant == one.variant
    ]
    clauses = [
        f"{c.samples} samples in {_requests(c.requests)} take {c.seconds / one.seconds:.2f} times"
        " as long"
        for c in costs_of_several
        if c.seconds
    ]
    if not clauses:
        return None
    return (
        f"One sample takes {number(one.seconds, 's')}. With the prefix cache, {', '.join(clauses)}."
    )


def _requests(count: int) -> str:
    return "one request" if count == 1 else f"{count} requests"


def hits_sentence(facts: Sequence[Cost]) -> str | None:
    """Says whether the engine found exactly the whole blocks of a prompt for each later sample."""
    known = [
        (c.hit_rate, c.expected_hits)
        for c in facts
        if c.samples > 1 and c.hit_rate is not None and c.expected_hits is not None
    ]
    if not known:
        return None
    rule = "(n - 1) floor((P - 1) / b) b of n P prompt tokens"
    if all(abs(hit_rate - expected) < 1e-9 for hit_rate, expected in known):
        return f"The engine found exactly {rule} in its cache, in one request as in many."
    return (
        f"By the blocks of the cache {rule} are found; more is found where all prompts share a"
        " chat template of a block or more, less where a wave was cut short."
    )


COST = Conclusion("sampling-cost", costs, tell_costs)

# ---------------------------------------------------------------------------- what samples buy


@dataclass(frozen=True)
class Solved:
    """Holds the answers to one task: one greedy answer, and all samples of all rounds."""

    kind: str
    expected: str
    greedy: str | None
    answers: tuple[str | None, ...]

    @property
    def greedy_right(self) -> float:
        return float(self.greedy == self.expected)

    def passes(self, k: int) -> float:
        return pass_at(k, self.answers, self.expected)

    def votes(self, k: int) -> float:
        return vote_at(k, self.answers, self.expected)


@dataclass(frozen=True)
class Bought:
    """Holds what so many samples of a task cost, and how often they solve it."""

    samples: int
    seconds: float  # of the engine, mean over tasks
    tokens: float  # of output, mean over tasks
    passed: Interval  # pass@n
    voted: Interval  # vote@n
    gain: Interval  # of the vote over one sample
    seconds_more: float  # than one sample takes
    tokens_more: float

    @property
    def gains(self) -> bool:
        """Tells whether voting is better than one sample beyond its interval."""
        return self.gain.low is not None and self.gain.low > 0


@dataclass(frozen=True)
class Voting:
    """Holds what the probe asked for; nothing where it was not asked."""

    temperature: float | None
    tasks: tuple[Solved, ...]
    greedy: Interval | None
    greedy_s: float | None
    rows: tuple[Bought, ...]
    over_greedy: Interval | None  # of the largest vote

    @property
    def most(self) -> Bought | None:
        return self.rows[-1] if self.rows else None

    @property
    def one(self) -> Bought | None:
        return self.rows[0] if self.rows else None

    @property
    def drawn(self) -> int:
        """The samples that were drawn of each task."""
        return min((len(t.answers) for t in self.tasks), default=0)


def voting(context: Context) -> Voting:
    probes = (context.folder.probe_result("votes", v.name) for v in context.lab.variants)
    probe = next((p for p in probes if p), None)
    if probe is None or not probe["tasks"]:
        return Voting(None, (), None, None, (), None)
    asked: Sequence[Mapping[str, Any]] = probe["tasks"]
    solved = tuple(
        Solved(
            kind=task["kind"],
            expected=task["expected"],
            greedy=canonical(task["greedy"]["texts"][0]),
            answers=tuple(canonical(text) for r in task["rounds"] for text in r["texts"]),
        )
        for task in asked
    )
    greedy = [t.greedy_right for t in solved]
    rows = _rounds_bought(asked, solved)
    return Voting(
        temperature=probe["temperature"],
        tasks=solved,
        greedy=over_tasks(greedy),
        greedy_s=fmean(task["greedy"]["took_s"] for task in asked),
        rows=rows,
        over_greedy=gain_over_tasks(greedy, [t.votes(rows[-1].samples) for t in solved]),
    )


def _rounds_bought(
    asked: Sequence[Mapping[str, Any]], solved: Sequence[Solved]
) -> tuple[Bought, ...]:
    """Works out each round of samples; the first round is of one."""
    sizes = [r["n"] for r in asked[0]["rounds"]]

    def mean(place: int, field: str) -> float:
        return fmean(task["rounds"][place][field] for task in asked)

    one = [t.votes(sizes[0]) for t in solved]
    return tuple(
        Bought(
            samples=n,
            seconds=mean(place, "took_s"),
            tokens=mean(place, "tokens"),
            passed=over_tasks([t.passes(n) for t in solved]),
            voted=over_tasks(voted),
            gain=gain_over_tasks(one, voted),
            seconds_more=mean(place, "took_s") - mean(0, "took_s"),
            tokens_more=mean(place, "tokens") - mean(0, "tokens"),
        )
        for place, n in enumerate(sizes)
        for voted in [[t.votes(n) for t in solved]]
    )


def tell_voting(facts: Voting) -> Finding:
    rows = [["Samples", "Engine seconds a task", "Output tokens a task", "pass@n", "Vote",
             "Vote over one sample", "Seconds a point", "Tokens a point"]]  # fmt: skip
    if facts.greedy:
        rows.append(["1, greedy", number(facts.greedy_s, "s"), "–", "–", _share(facts.greedy),
                     "–", "–", "–"])  # fmt: skip
    rows += [
        [str(b.samples), number(b.seconds, "s"), number(b.tokens), _share(b.passed),
         _share(b.voted), "–" if b.samples == 1 else _points(b.gain),
         *(number(more / (100 * b.gain.value), unit) if b.gains else "–"
           for more, unit in ((b.seconds_more, "s"), (b.tokens_more, "1")))]
        for b in facts.rows
    ]  # fmt: skip
    lines = [line for line in (voting_sentence(facts), greedy_sentence(facts)) if line]
    if facts.tasks:
        lines.append(
            f"{len(facts.tasks)} tasks with one right answer each, {facts.drawn} samples of each at"
            f" temperature {facts.temperature:g}. pass@n is best-of-n with a perfect judge; a vote"
            " needs none. Engine seconds are of one task at a time. A *point* is 1% of the tasks;"
            " what one costs is given where the interval of voting over one sample excludes 0."
            " Intervals are 95% intervals over tasks: most of their width comes from which tasks"
            " were asked, not from which samples were drawn."
        )
    return Finding(title="What do samples buy on tasks with one right answer?", rows=rows,
                   lines=lines)  # fmt: skip


def _share(measured: Interval) -> str:
    return f"{100 * measured.value:.1f}% ({_interval_text(measured)})"


def _points(gain: Interval) -> str:
    """Writes a change in points, with its interval where there is one."""
    ends = f" ({_interval_text(gain, '+')})" if gain.low is not None else ""
    return f"{100 * gain.value:+z.1f} points{ends}"


def _interval_text(measured: Interval, sign: str = "") -> str:
    if measured.low is None or measured.high is None:
        return "–"
    return f"{100 * measured.low:{sign}z.1f} to {100 * measured.high:{sign}z.1f}"


def voting_sentence(facts: Voting) -> str | None:
    """Says what the largest round buys over one sample, by a vote and by a check."""
    one, most = facts.one, facts.most
    if one is None or most is None or most is one:
        return None
    so = "beats one sample" if most.gains else "is not shown to beat one sample"
    if most.gain.high is not None and most.gain.high < 0:
        so = "is worse than one sample"
    return (
        f"One sample solves {100 * one.passed.value:.1f}% of the tasks. A vote of {most.samples}"
        f" solves {100 * most.voted.value:.1f}%, {_points(most.gain)}, and {so}; at least one of"
        f" {most.samples} is right in {100 * most.passed.value:.1f}%. They take"
        f" {most.seconds / one.seconds:.2f} times the engine's seconds and"
        f" {most.tokens / one.tokens:.1f} times the tokens of one."
    )


def greedy_sentence(facts: Voting) -> str | None:
    """Compares the largest vote with one greedy answer, which is what a user would have had."""
    if facts.greedy is None or facts.over_greedy is None or facts.most is None:
        return None
    return (
        f"One greedy answer solves {100 * facts.greedy.value:.1f}%: beside it a vote of"
        f" {facts.most.samples} is {_points(facts.over_greedy)}."
    )


VOTING = Conclusion("voting", voting, tell_voting)

# --------------------------------------------------------------------------- by the kind of task


@dataclass(frozen=True)
class Kind:
    """Holds how often the tasks of one kind are solved."""

    name: str
    tasks: int
    samples: int  # of the largest round
    greedy: float
    one: float
    voted: float
    passed: float


def kinds(context: Context) -> tuple[Kind, ...]:
    facts = context.once(voting)
    if facts.most is None:
        return ()
    n = facts.most.samples

    def mean(tasks: Sequence[Solved], of: Callable[[Solved], float]) -> float:
        return fmean(of(t) for t in tasks)

    return tuple(
        Kind(
            name=name,
            tasks=len(mine),
            samples=n,
            greedy=mean(mine, lambda t: t.greedy_right),
            one=mean(mine, lambda t: t.passes(1)),
            voted=mean(mine, lambda t: t.votes(n)),
            passed=mean(mine, lambda t: t.passes(n)),
        )
        for name in dict.fromkeys(t.kind for t in facts.tasks)
        for mine in [[t for t in facts.tasks if t.kind == name]]
    )


def tell_kinds(facts: tuple[Kind, ...]) -> Finding:
    n = facts[0].samples if facts else 0
    rows = [["Task", "Tasks", "Greedy", "One sample", f"Vote of {n}", f"pass@{n}"]] if facts else []
    rows += [
        [k.name, str(k.tasks), *(f"{100 * v:.0f}%" for v in (k.greedy, k.one, k.voted, k.passed))]
        for k in facts
    ]
    lines = []
    if facts:
        sometimes = [k.name for k in facts if 0.05 <= k.one <= 0.95]
        lines.append(
            "A vote can only gain where the right answer is the most frequent one, and a check only"
            " where it comes up at all. Solved by a sample now and then (5 to 95%): "
            + (", ".join(sometimes) or "none")
            + "."
        )
    return Finding(title="Which tasks gain?", rows=rows, lines=lines)


KINDS = Conclusion("task-kinds", kinds, tell_kinds)

# ------------------------------------------------------------------- samples or a larger model


@dataclass(frozen=True)
class Larger:
    """Holds a larger model, of which one answer costs what so many samples here cost."""

    name: str
    params: float
    times: float  # as long as a step of the served model takes, on the roofline
    alone: int  # samples for the same seconds where the engine does nothing else
    busy: int  # samples for the same FLOP, as the batch is full anyway
    drawn: int  # of each task; the next two are of no more samples than that
    voted: float  # by so many samples as `busy`
    passed: float

    @property
    def alone_text(self) -> str:
        """Writes the samples for the same seconds; beyond those drawn their cost is not known."""
        return str(self.alone) if self.alone <= self.drawn else f"more than {self.drawn}"

    @property
    def busy_text(self) -> str:
        beyond = f" ({self.drawn} drawn)" if self.busy > self.drawn else ""
        return f"{self.busy}{beyond}"


@dataclass(frozen=True)
class LargerModel:
    """Holds what the arithmetic of equal seconds starts from, and its rows."""

    params: float
    one_s: float | None  # of one sample, measured
    sample_more_s: float | None  # that each sample beyond the first adds
    rows: tuple[Larger, ...]


def larger_models(context: Context) -> LargerModel:
    facts, point = context.once(voting), context.points[0]
    one, most = facts.one, facts.most
    if one is None or most is None or most is one:
        return LargerModel(point.shape.params, None, None, ())
    more_s = (most.seconds - one.seconds) / (most.samples - one.samples)
    return LargerModel(
        params=point.shape.params,
        one_s=one.seconds,
        sample_more_s=more_s,
        rows=tuple(
            weighed(name, shape, point, facts, more_s)
            for name, shape in known_shapes().items()
            if shape.params > 2 * point.shape.params and not shape.experts
        ),
    )


def known_shapes() -> dict[str, Shape]:
    """Reads the shapes that ship with the lab, the smallest first."""
    shapes = {
        name: models.shape_of(json.loads((dummy.HOME / f"{name}.json").read_text()))
        for name in dummy.SHAPES
    }
    return dict(sorted(shapes.items(), key=lambda item: item[1].params))


def weighed(name: str, shape: Shape, point: Point, facts: Voting, more_s: float) -> Larger:
    """Works out how many samples one answer of a larger model costs, and what they solve."""
    assert facts.one
    times = answer_s(shape, point) / answer_s(point.shape, point)
    spare_s = (times - 1) * facts.one.seconds
    flop, own_flop = (theory.decode_flops(s, 1, TASK_CONTEXT_TOKENS) for s in (shape, point.shape))
    busy = max(1, round(flop / own_flop))
    n = min(busy, facts.drawn)
    return Larger(
        name=name,
        params=shape.params,
        times=times,
        alone=1 + int(spare_s / more_s) if more_s > 0 else facts.drawn + 1,
        busy=busy,
        drawn=facts.drawn,
        voted=fmean(t.votes(n) for t in facts.tasks),
        passed=fmean(t.passes(n) for t in facts.tasks),
    )


TASK_CONTEXT_TOKENS = 64  # of a task's prompt and half of its answer, about


def answer_s(shape: Shape, point: Point) -> float:
    """Computes the seconds of a decode step of one sequence, on the machine's roofline."""
    return theory.decode_step_s(shape, point.ceilings, 1, TASK_CONTEXT_TOKENS)


def tell_larger(facts: LargerModel) -> Finding:
    rows = [["Larger model", "Parameters", "A step takes", "Samples, same seconds alone",
             "Samples, same FLOP", "A vote of those solves", "One of those is right"]]  # fmt: skip
    rows += [
        [row.name, f"{row.params / 1e9:.1f} B", f"{ratio_number(row.times)}x", row.alone_text,
         row.busy_text, f"{100 * row.voted:.1f}%", f"{100 * row.passed:.1f}%"]
        for row in facts.rows
    ]  # fmt: skip
    lines = []
    if facts.one_s is not None and not facts.rows:
        lines.append("No shape that ships with the lab is more than twice as large as this model.")
    if facts.rows:
        lines.append(
            "Arithmetic on this run's figures, no measurement of a larger model. On an engine that"
            " does nothing else its answer takes as many times the"
            f" {number(facts.one_s, 's')} of one here as a decode step takes on the measured"
            f" roofline, and each further sample adds {number(facts.sample_more_s, 's')}: samples"
            " fill a batch that is empty. On a busy one they compete for a full batch, and cost"
            " their FLOP. There the larger model is the better buy where it solves more than the"
            " last two columns say."
        )
        lines.append(
            "To measure it, run this lab with the larger model (`MODEL=`) and set the two runs side"
            " by side with `make compare`."
        )
    return Finding(title="Samples, or a larger model?", rows=rows if facts.rows else [],
                   lines=lines)  # fmt: skip


LARGER = Conclusion("larger-model", larger_models, tell_larger)

# ------------------------------------------------------------------------------- a reward model

STEPS = 4  # of a solution that is written step by step, as an example


@dataclass(frozen=True)
class Reader:
    """Holds what a model of the served size would take to score the answers of a task."""

    name: str
    passes: int  # over the answers
    seconds: float


@dataclass(frozen=True)
class Verifier:
    """Holds what lies between a vote and a perfect check, and what scoring would cost."""

    samples: int
    tokens: float  # of all samples of a task
    gap: Interval | None  # pass@n - vote@n
    sampling_s: float | None
    readers: tuple[Reader, ...]


def verifier(context: Context) -> Verifier:
    facts, point = context.once(voting), context.points[0]
    if facts.most is None:
        return Verifier(0, 0.0, None, None, ())
    n, tokens = facts.most.samples, facts.most.tokens
    kv_bytes = TASK_CONTEXT_TOKENS * point.shape.kv_bytes_per_token()
    outcome_s = theory.forward_s(point.shape, point.ceilings, tokens, kv_bytes)
    by_step_s = STEPS * theory.forward_s(point.shape, point.ceilings, tokens / STEPS, kv_bytes)
    return Verifier(
        samples=n,
        tokens=tokens,
        gap=gain_over_tasks([t.votes(n) for t in facts.tasks], [t.passes(n) for t in facts.tasks]),
        sampling_s=facts.most.seconds,
        readers=(
            Reader("an outcome reward model, once at the end", 1, outcome_s),
            Reader(f"a process reward model, after each of {STEPS} steps", STEPS, by_step_s),
        ),
    )


def tell_verifier(facts: Verifier) -> Finding:
    rows = [["What reads the answers", "Passes", "At least", "Of the sampling's seconds"]]
    rows += [
        [r.name, str(r.passes), number(r.seconds, "s"),
         number(r.seconds / facts.sampling_s, "share") if facts.sampling_s else "–"]
        for r in facts.readers
    ]  # fmt: skip
    lines = []
    if facts.gap:
        lines.append(
            f"A perfect check of {facts.samples} samples would be {_points(facts.gap)} beside a"
            " vote: no reward model can add more than that by choosing among them."
        )
        lines.append(
            "Arithmetic, nothing of it was measured: a reward model of the served model's size"
            f" reads the {number(facts.tokens)} tokens of a task's samples once, its prompt cached,"
            " at the machine's measured ceilings. One that judges each step reads the same tokens"
            " in more passes, each of which reads the weights again; what it changes is that a bad"
            " beginning can be dropped before it is written to its end."
        )
    return Finding(title="What would a reward model cost and add?",
                   rows=rows if facts.readers else [], lines=lines)  # fmt: skip


VERIFIER = Conclusion("verifier", verifier, tell_verifier)

# ------------------------------------------------------------------------------------ the answers


def best_of(run: JudgedRun) -> str | None:
    """Answers TT-1: what many samples cost, and what they buy."""
    parts = []
    if times := times_sentence(run.once(costs)):
        parts.append(times)
    if shared := run.ratio("shared"):
        parts.append(f"With its prompt in the prefix cache throughput is {shared} that without.")
    facts = VOTING.facts_of(run)
    if facts and (bought := voting_sentence(facts)):
        parts.append(bought)
    return " ".join(parts) or None


def vote_revise_search(run: JudgedRun) -> str | None:
    """Answers TT-2 for voting, and says what of the rest is arithmetic and what is not known."""
    facts = VOTING.facts_of(run)
    if facts is None or facts.one is None or facts.most is None:
        return None
    one, most = facts.one, facts.most
    return (
        f"Of the three, voting was measured: {_points(most.gain)} over one sample with"
        f" {most.samples}. Revising and searching were not. By arithmetic, {most.samples} revisions"
        f" one after another take at least {number(most.samples * one.seconds, 's')} of the engine,"
        f" where {most.samples} votes side by side took {number(most.seconds, 's')}."
    )


def samples_or_size(run: JudgedRun) -> str | None:
    """Answers TT-3 by arithmetic, from the smallest model that is larger."""
    facts = LARGER.facts_of(run)
    row = facts.rows[0] if facts and facts.rows else None
    if facts is None or row is None:
        return None
    return (
        f"By arithmetic on this run's figures, an answer of a model of {row.params / 1e9:.1f} B"
        f" parameters costs the FLOP of {row.busy_text} samples of the one served"
        f" ({facts.params / 1e9:.2g} B), and on an engine that does nothing else the seconds of"
        f" {row.alone_text}. On a busy engine it pays where it solves more than a vote of"
        f" {min(row.busy, row.drawn)} does, {100 * row.voted:.1f}% of these tasks, or more than"
        f" {100 * row.passed:.1f}% where something can check an answer. No larger model was"
        " measured."
    )


def process_reward(run: JudgedRun) -> str | None:
    """Answers TT-4 by arithmetic."""
    facts = VERIFIER.facts_of(run)
    if facts is None or facts.gap is None or not facts.sampling_s:
        return None
    *_, by_step = facts.readers
    return (
        f"It chooses where a vote counts, and can add at most what lies between a vote of"
        f" {facts.samples} and a perfect check, {_points(facts.gap)} here. By arithmetic, one of"
        f" the served model's size takes at least"
        f" {number(by_step.seconds / facts.sampling_s, 'share')} of the seconds of sampling to"
        f" score the answers in {by_step.passes} steps. No reward model was measured."
    )


# --------------------------------------------------------------------------------------- its plot


def draw_sampling(run: JudgedRun) -> str | None:
    """Draws the seconds of a prompt's samples, and beside them what the samples solve."""
    facts = [c for c in run.once(costs) if c.seconds]
    if not facts:
        return None
    bought = VOTING.facts_of(run)
    rows = bought.rows if bought else ()
    _, axes = plt.subplots(1, 2 if rows else 1, figsize=(8 if rows else 5, 3.6), squeeze=False)
    left = axes[0][0]
    forecast = _draw_costs(run, left, facts)
    caption = (
        "Seconds of the engine for all samples of one prompt, by how they were asked for."
        + BANDS * forecast
    )
    if not rows or bought is None:
        return caption
    _draw_solved(axes[0][1], bought)
    return (
        f"Left: {caption[0].lower()}{caption[1:]} Right: the tasks that so many samples solve, by"
        " the most frequent answer and by at least one right answer, with 95% intervals over"
        " tasks."
    )


def _draw_costs(run: JudgedRun, ax: Any, facts: Sequence[Cost]) -> bool:
    """Draws the seconds of each way to ask; tells whether a forecast is drawn beside any."""
    by_name = {(p.variant.name, p.workload.name): p for p in run.points}
    colours = dict(zip([v.name for v in run.lab.variants], VARIANTS, strict=False))
    ordered = sorted(facts, key=lambda c: (c.samples, c.requests > 1, c.variant))
    labelled: set[str] = set()
    forecast = False
    highest_s = max(c.seconds or 0 for c in facts)
    for x, cost in enumerate(ordered):
        label = None if cost.variant in labelled else f"prefix cache {cost.variant}"
        labelled.add(cost.variant)
        ax.bar(x, cost.seconds, 0.7, color=colours[cost.variant], label=label)
        point = by_name[cost.variant, cost.workload]
        rate = run.forecast(point, "output_tokens_per_s")
        if rate and rate.value and rate.low and rate.high:
            forecast = True
            tokens = point.sequences * point.output_tokens
            ax.vlines(x, tokens / rate.high, tokens / rate.low, color=GREY, alpha=0.4, lw=9)
            ax.plot(x, tokens / rate.value, "_", color=GREY, ms=13, mew=2)
            highest_s = max(highest_s, tokens / rate.low)
    ax.set_xticks(
        range(len(ordered)),
        [f"{c.samples}\n{'n=' + str(c.samples) if c.requests < c.samples else 'apart'}"
         if c.samples > 1 else "1" for c in ordered],
    )  # fmt: skip
    ax.set_xlabel("samples of a prompt")
    ax.set_ylabel("until all are complete (s)")
    ax.set_ylim(0, 1.05 * highest_s)
    legend_above(ax)
    return forecast


def _draw_solved(ax: Any, facts: Voting) -> None:
    x = [b.samples for b in facts.rows]
    for shares, colour, label in (
        ([b.passed for b in facts.rows], VARIANTS[2], "pass@n: one is right"),
        ([b.voted for b in facts.rows], BLUE, "vote"),
    ):
        y = [100 * s.value for s in shares]
        reach = [
            [100 * (s.value - (s.value if s.low is None else s.low)) for s in shares],
            [100 * ((s.value if s.high is None else s.high) - s.value) for s in shares],
        ]
        ax.errorbar(x, y, yerr=reach, fmt="o-", capsize=4, color=colour, label=label)
    if facts.greedy:
        ax.axhline(100 * facts.greedy.value, ls="--", lw=1, color=BOUND, label="one greedy answer")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(n) for n in x])
    ax.set_ylim(0, 100)
    ax.set_xlabel("samples of a task")
    ax.set_ylabel("tasks solved (%)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "findings": {
        "voting": (
            Published(
                figure="28.8% solved by one sample, 70.2% by at least one of 100",
                setting="HumanEval, Codex 12B",
                source="Chen et al. 2021",
            ),
            Published(
                figure="+17.9 points by a vote of 40",
                setting="GSM8K, PaLM 540B, over one greedy chain of thought",
                source="Wang et al. 2022",
            ),
        ),
        "larger-model": (
            Published(
                figure="a 14x larger model outperformed for the same FLOP",
                setting="MATH, where the smaller model is right now and then",
                source="Snell et al. 2024",
            ),
        ),
        "verifier": (
            Published(
                figure="78.2% by a process reward model, 69.6% by a vote of 1,860",
                setting="a subset of MATH, GPT-4 base",
                source="Lightman et al. 2023",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(COST, VOTING, KINDS, LARGER, VERIFIER),
    answers={
        "TT-1": best_of,
        "TT-2": vote_revise_search,
        "TT-3": samples_or_size,
        "TT-4": process_reward,
    },
    kinds={"TT-2": IN_PART, "TT-3": ARITHMETIC, "TT-4": ARITHMETIC},
    plots={"sampling": draw_sampling},
    published=PUBLISHED,
    headline=Headline(
        claim="shared",
        done="Keeping the prompt of eight samples in the prefix cache",
        figure="the throughput",
    ),
)
