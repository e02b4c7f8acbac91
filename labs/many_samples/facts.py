"""What many samples cost an engine, and what voting and trying again buy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from labs.harness import theory
from labs.harness.facts.context import JudgedRun
from labs.harness.judging.judge import Interval
from labs.harness.judging.quantity import RATIO, Quantity
from labs.harness.judging.sampling import canonical, gain_over_tasks, over_tasks, pass_at, vote_at
from labs.harness.spec import Point
from serving.weights import dummy, models
from serving.weights.models import Shape

BILLION = 1e9  # parameters
STEPS = 4  # of a solution that is written step by step, as an example
TASK_CONTEXT_TOKENS = 64  # of a task's prompt and half of its answer, about


@dataclass(frozen=True)
class Facts:
    """All but the cost are None, or empty, where no tasks were asked."""

    sampling_cost: Costs | None
    voting: Voting | None
    task_kinds: tuple[Kind, ...]
    larger_model: LargerModel | None
    verifier: Verifier | None


def facts(run: JudgedRun) -> Facts:
    tasks = solved(probed(run))
    vote = voting(probed(run), tasks)
    return Facts(
        sampling_cost=costs(run) if run.finds("sampling-cost") else None,
        voting=vote if run.finds("voting") else None,
        task_kinds=kinds(tasks, vote) if vote and run.finds("task-kinds") else (),
        larger_model=larger_models(run.points[0], tasks, vote)
        if vote and run.finds("larger-model")
        else None,
        verifier=verifier(run.points[0], tasks, vote) if vote and run.finds("verifier") else None,
    )


# -------------------------------------------------------------- what the engine takes for samples


@dataclass(frozen=True)
class Cost:
    """What the samples of one prompt take, asked for in one way."""

    variant: str
    workload: str
    samples: int  # of a prompt
    requests: int  # that ask for them
    until_all_s: Quantity  # from the first send of a prompt's samples until all are complete
    each_s: Quantity  # of the engine, for one sample
    tokens_per_s: Quantity
    ttft_s: Quantity
    hits: Quantity  # share of the prompt tokens
    hits_by_blocks: Quantity  # by (n - 1) floor((P - 1) / b) b / (n P)


@dataclass(frozen=True)
class Beside:
    """How many times as long as one sample several take, where the cache is on."""

    samples: int
    requests: int
    times: Quantity

    @property
    def in_one_request(self) -> bool:
        return self.requests == 1


@dataclass(frozen=True)
class Costs:
    all: tuple[Cost, ...]
    one_s: Quantity
    several: tuple[Beside, ...]

    @property
    def found(self) -> Literal["exactly", "not exactly", "unknown"]:
        """Whether the engine found the whole blocks of a prompt for each later sample."""
        known = [
            (c.hits.value, c.hits_by_blocks.value)
            for c in self.all
            if c.samples > 1 and c.hits.known and c.hits_by_blocks.known
        ]
        if not known:
            return "unknown"
        exactly = all(abs((hits or 0) - (by_blocks or 0)) < 1e-9 for hits, by_blocks in known)
        return "exactly" if exactly else "not exactly"


def costs(run: JudgedRun) -> Costs:
    every = tuple(cost(run, point) for point in run.points if point.workload.samples)
    one = next((c for c in every if c.samples == 1 and c.until_all_s.known), None)
    several = [
        Beside(c.samples, c.requests, c.until_all_s / one.until_all_s)
        for c in every
        if one and c.samples > 1 and c.until_all_s.known and c.variant == one.variant
    ]
    one_s = one.until_all_s if one else Quantity.missing("one sample was not measured", "s")
    return Costs(every, one_s, tuple(several))


def cost(run: JudgedRun, point: Point) -> Cost:
    assert point.workload.samples
    samples, rate = point.workload.samples.count, run.quantity(point, "output_tokens_per_s")
    tokens = Quantity(point.sequences * point.output_tokens, "tok")
    until_all_s = (tokens / rate.brief).in_unit("s")
    return Cost(
        variant=point.variant.name,
        workload=point.workload.name,
        samples=samples,
        requests=point.load.users,
        until_all_s=until_all_s,
        each_s=until_all_s / samples,
        tokens_per_s=rate,
        ttft_s=run.quantity(point, "ttft_mean_s"),
        hits=run.quantity(point, "prefix_hit_rate"),
        hits_by_blocks=hits_by_blocks(point),
    )


def hits_by_blocks(point: Point) -> Quantity:
    """Compute the share of prompt tokens that all samples but the first find in the cache."""
    if not point.flags.enable_prefix_caching or "block-size" not in point.flags:
        return Quantity.missing("no cache", "share")
    n, block, prompt = point.sequences, point.flags.block_size, int(point.prompt_tokens)
    return Quantity((n - 1) * ((prompt - 1) // block * block) / (n * prompt), "share")


# ---------------------------------------------------------------------------- what samples buy

Probe = Mapping[str, Any]


@dataclass(frozen=True)
class Solved:
    """The answers to one task: one greedy answer, and all samples of all rounds."""

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
    """What so many samples of a task cost, and how often they solve it."""

    samples: int
    seconds: Quantity  # of the engine, mean over tasks
    tokens: float  # of output, mean over tasks
    passed: Quantity  # pass@n
    voted: Quantity  # vote@n
    gain: Quantity  # of the vote over one sample, in points
    point_s: Quantity  # what a point costs, where the vote gains beyond its interval
    point_tokens: Quantity


@dataclass(frozen=True)
class Voting:
    """What the probe asked for."""

    temperature: float
    tasks: int
    drawn: int  # samples of each task
    greedy: Quantity
    greedy_s: Quantity
    rows: tuple[Bought, ...]
    over_greedy: Quantity  # the largest vote over one greedy answer, in points
    times_seconds: Quantity  # of the largest round / one sample
    times_tokens: Quantity
    revised_s: Quantity  # as many samples one after another, by arithmetic

    @property
    def one(self) -> Bought:
        return self.rows[0]

    @property
    def most(self) -> Bought:
        return self.rows[-1]

    @property
    def beats(self) -> Literal["yes", "worse", "open"]:
        """Whether the largest vote beats one sample."""
        if gains(self.most.gain):
            return "yes"
        return "worse" if self.most.gain.high is not None and self.most.gain.high < 0 else "open"


def gains(gain: Quantity) -> bool:
    return gain.low is not None and gain.low > 0


def share(measured: Interval) -> Quantity:
    return Quantity.of(measured, "share")


def in_points(gain: Interval) -> Quantity:
    """Count in hundredths of the tasks, unlike a quantity in POINTS, which is a share."""
    return 100 * Quantity.of(gain)


def probed(run: JudgedRun) -> Probe | None:
    """Read the first variant's answers to tasks, if any was asked."""
    probes = (run.folder.probe_result("votes", v.name) for v in run.lab.variants)
    return next((p for p in probes if p and p["tasks"]), None)


def solved(probe: Probe | None) -> tuple[Solved, ...]:
    return tuple(
        Solved(
            kind=task["kind"],
            expected=task["expected"],
            greedy=canonical(task["greedy"]["texts"][0]),
            answers=tuple(canonical(text) for r in task["rounds"] for text in r["texts"]),
        )
        for task in (probe["tasks"] if probe else ())
    )


def drawn_of(tasks: Sequence[Solved]) -> int:
    return min(len(t.answers) for t in tasks)


def voting(probe: Probe | None, tasks: Sequence[Solved]) -> Voting | None:
    if probe is None:
        return None
    asked, greedy = probe["tasks"], [t.greedy_right for t in tasks]
    rows = tuple(bought(asked, tasks, place) for place in range(len(asked[0]["rounds"])))
    one, most = rows[0], rows[-1]
    return Voting(
        temperature=probe["temperature"],
        tasks=len(tasks),
        drawn=drawn_of(tasks),
        greedy=share(over_tasks(greedy)),
        greedy_s=Quantity(fmean(task["greedy"]["took_s"] for task in asked), "s"),
        rows=rows,
        over_greedy=in_points(gain_over_tasks(greedy, [t.votes(most.samples) for t in tasks])),
        times_seconds=most.seconds / one.seconds,
        times_tokens=Quantity(most.tokens / one.tokens, RATIO),
        revised_s=most.samples * one.seconds,
    )


def bought(asked: Sequence[Probe], tasks: Sequence[Solved], place: int) -> Bought:
    """Work out the round of samples at this place; the first is of one sample."""

    def mean(place: int, field: str) -> float:
        return fmean(task["rounds"][place][field] for task in asked)

    n, seconds, tokens = (
        asked[0]["rounds"][place]["n"],
        mean(place, "took_s"),
        mean(place, "tokens"),
    )
    voted = [t.votes(n) for t in tasks]
    gain = in_points(gain_over_tasks([t.votes(1) for t in tasks], voted))
    points = gain.brief if gains(gain) else Quantity.missing("no gain is shown")
    return Bought(
        samples=n,
        seconds=Quantity(seconds, "s"),
        tokens=tokens,
        passed=share(over_tasks([t.passes(n) for t in tasks])),
        voted=share(over_tasks(voted)),
        gain=gain if n > 1 else Quantity.missing("it is one sample"),
        point_s=Quantity(seconds - mean(0, "took_s"), "s") / points,
        point_tokens=Quantity(tokens - mean(0, "tokens"), "tok") / points,
    )


# --------------------------------------------------------------------------- by the kind of task


@dataclass(frozen=True)
class Kind:
    """How often the tasks of one kind are solved."""

    name: str
    tasks: int
    samples: int  # of the largest round
    greedy: Quantity
    one: Quantity
    voted: Quantity
    passed: Quantity
    now_and_then: bool  # whether one sample solves some of them, and not nearly all


def kinds(tasks: Sequence[Solved], vote: Voting) -> tuple[Kind, ...]:
    n = vote.most.samples

    def kind(name: str) -> Kind:
        def mean(of: Callable[[Solved], float]) -> Quantity:
            return Quantity(fmean(of(t) for t in tasks if t.kind == name), "share")

        one = mean(lambda t: t.passes(1))
        return Kind(
            name=name,
            tasks=sum(t.kind == name for t in tasks),
            samples=n,
            greedy=mean(lambda t: t.greedy_right),
            one=one,
            voted=mean(lambda t: t.votes(n)),
            passed=mean(lambda t: t.passes(n)),
            now_and_then=one.value is not None and 0.05 <= one.value <= 0.95,
        )

    return tuple(kind(name) for name in dict.fromkeys(t.kind for t in tasks))


# ------------------------------------------------------------------- samples or a larger model


@dataclass(frozen=True)
class Larger:
    """A larger model, of which one answer costs what so many samples here cost."""

    name: str
    params: Quantity
    times: Quantity  # as long as a step of the served model takes, on the roofline
    alone: int  # samples for the same seconds where the engine does nothing else
    busy: int  # samples for the same FLOP, as the batch is full anyway
    drawn: int  # of each task
    weighed: int  # samples for the same FLOP, or those drawn: the next two are of these
    voted: Quantity
    passed: Quantity

    @property
    def alone_is_beyond(self) -> bool:
        """Whether the same seconds buy more than were drawn, whose cost is not known."""
        return self.alone > self.drawn

    @property
    def busy_is_beyond(self) -> bool:
        return self.busy > self.drawn


@dataclass(frozen=True)
class LargerModel:
    """What the arithmetic of equal seconds starts from, and its rows."""

    params: Quantity
    one_s: Quantity  # of one sample, measured
    sample_more_s: Quantity  # that each sample beyond the first adds
    rows: tuple[Larger, ...]


def larger_models(point: Point, tasks: Sequence[Solved], vote: Voting) -> LargerModel | None:
    one, most = vote.one, vote.most
    if most is one:
        return None
    more_s = (most.seconds - one.seconds) / (most.samples - one.samples)
    return LargerModel(
        Quantity(point.shape.params / BILLION, "B"),
        one.seconds,
        more_s,
        tuple(
            weighed(name, shape, point, tasks, one.seconds, more_s)
            for name, shape in known_shapes().items()
            if shape.params > 2 * point.shape.params and not shape.experts
        ),
    )


def known_shapes() -> dict[str, Shape]:
    """Read the shapes that ship with the lab, the smallest first."""
    shapes = {
        name: models.shape_of(json.loads((dummy.HOME / f"{name}.json").read_text()))
        for name in dummy.SHAPES
    }
    return dict(sorted(shapes.items(), key=lambda item: item[1].params))


def weighed(
    name: str, shape: Shape, point: Point, tasks: Sequence[Solved], one_s: Quantity,
    more_s: Quantity,
) -> Larger:  # fmt: skip
    """Work out how many samples one answer of a larger model costs, and what they solve."""
    times, drawn = answer_s(shape, point) / answer_s(point.shape, point), drawn_of(tasks)
    spare = ((times - 1) * one_s / more_s).value
    flop, own_flop = (theory.decode_flops(s, 1, TASK_CONTEXT_TOKENS) for s in (shape, point.shape))
    busy = max(1, round(flop / own_flop))
    n = min(busy, drawn)
    return Larger(
        name=name,
        params=Quantity(shape.params / BILLION, "B"),
        times=Quantity(times, RATIO),
        alone=drawn + 1 if spare is None or (more_s.value or 0) <= 0 else 1 + int(spare),
        busy=busy,
        drawn=drawn,
        weighed=n,
        voted=Quantity(fmean(t.votes(n) for t in tasks), "share"),
        passed=Quantity(fmean(t.passes(n) for t in tasks), "share"),
    )


def answer_s(shape: Shape, point: Point) -> float:
    """Compute the seconds of a decode step of one sequence, on the machine's roofline."""
    return theory.decode_step_s(shape, point.ceilings, 1, TASK_CONTEXT_TOKENS)


# ------------------------------------------------------------------------------- a reward model


@dataclass(frozen=True)
class Reader:
    """What a model of the served size would take to score the answers of a task."""

    passes: int  # over the answers
    seconds: Quantity
    of_sampling: Quantity  # share of the seconds that the samples took


@dataclass(frozen=True)
class Verifier:
    """What lies between a vote and a perfect check, and what scoring would cost."""

    samples: int
    tokens: float  # of all samples of a task
    gap: Quantity  # pass@n - vote@n, in points
    at_the_end: Reader  # an outcome reward model
    by_step: Reader  # a process reward model


def verifier(point: Point, tasks: Sequence[Solved], vote: Voting) -> Verifier:
    n, tokens = vote.most.samples, vote.most.tokens
    kv_bytes = TASK_CONTEXT_TOKENS * point.shape.kv_bytes_per_token()

    def reader(passes: int) -> Reader:
        pass_s = theory.forward_s(point.shape, point.ceilings, tokens / passes, kv_bytes)
        seconds = Quantity(passes * pass_s, "s")
        return Reader(passes, seconds, (seconds / vote.most.seconds).in_unit("share"))

    gap = gain_over_tasks([t.votes(n) for t in tasks], [t.passes(n) for t in tasks])
    return Verifier(
        samples=n, tokens=tokens, gap=in_points(gap), at_the_end=reader(1), by_step=reader(STEPS)
    )
