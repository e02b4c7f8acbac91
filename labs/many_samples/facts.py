"""What many samples cost an engine, and what voting and trying again buy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import fmean
from typing import Any, Literal

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.verdicts import Interval
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.tables import Column, Figures, Row, Table, measured, rows
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from labs.many_samples.lab import hit_rate
from labs.many_samples.reasoning_steps import (
    chosen,
    end_of,
    found_at_end,
    found_by_steps,
    is_step,
    steps_right,
)
from labs.many_samples.sampled_tasks import (
    canonical,
    gain_over_tasks,
    over_tasks,
    pass_at,
    vote_at,
)
from serving.models import catalog, dummy
from serving.models.catalog import Shape

STEPS = 4  # of a solution that is written step by step, as an example
LARGER = ("llama-1b", "llama-8b", "llama-70b")  # of the shapes that ship with the lab
TASK_CONTEXT_TOKENS = 64  # of a task's prompt and half of its answer, about


@dataclass(frozen=True)
class Facts:
    sampling_cost: Costs
    voting: Voting | None  # None, as what follows, where no tasks were asked
    task_kinds: tuple[Row, ...]  # by their names
    larger_model: LargerModel | None
    verifier: Verifier | None
    stepwise: Stepwise | None = None  # None where no sums were asked step by step

    @property
    def now_and_then(self) -> list[str]:
        """The kinds of tasks of which one sample solves some, and not nearly all."""
        return [of.name for of in self.task_kinds if 0.05 <= (of["one"].value or 0) <= 0.95]


def facts(run: JudgedRun) -> Facts:
    by_steps = stepwise(asked) if (asked := probed(run, "steps")) else None
    if (probe := probed(run, "votes")) is None:
        return Facts(costs(run), None, (), None, None, by_steps)
    point, tasks = run.points[0], solved(probe)
    vote = voting(probe, tasks)
    return Facts(
        costs(run),
        vote,
        kinds(tasks, int(vote.most.name)),
        larger_models(point, tasks, vote),
        verifier(point, tasks, vote),
        by_steps,
    )


# -------------------------------------------------------------- what the engine takes for samples


@dataclass(frozen=True, kw_only=True)
class Costs(Table):
    """What the samples of one prompt take, asked for in each way."""

    several: tuple[Row, ...]  # times as long as one sample, where the cache is on

    @property
    def found(self) -> Literal["exactly", "not exactly", "unknown"]:
        """Whether the engine found the whole blocks of a prompt for each later sample."""
        later = [c for c in self.rows if (c["samples"].value or 0) > 1]
        hits = [(c["hits"].value, c["hits_by_blocks"].value) for c in later]
        exact = [abs(a - b) < 1e-9 for a, b in hits if a is not None and b is not None]
        if not exact:
            return "unknown"
        return "exactly" if all(exact) else "not exactly"


def costs(run: JudgedRun) -> Costs:
    def until_all_s(point: Point) -> Quantity:
        tokens = Quantity(point.sequences * point.output_tokens, "tok")
        return (tokens / run.quantity(point, "output_tokens_per_s").brief).in_unit("s")

    def by_blocks(point: Point) -> Quantity:
        """Return the share by (n - 1) floor((P - 1) / b) b / (n P)."""
        if not point.flags.enable_prefix_caching:
            return Quantity.missing("no cache", "share")
        return Quantity(hit_rate(point).value, "share")

    asked = [point for point in run.points if point.workload.samples]
    known = measured(run, asked, "output_tokens_per_s")
    one = next((p for p in known if samples(p) == 1), None)
    many = [p for p in known if one and samples(p) > 1 and p.variant == one.variant]
    one_s = until_all_s(one) if one else Quantity.missing("one sample was not measured", "s")
    asked_for: dict[str, Column] = {
        "samples": lambda p: Quantity(samples(p)),  # of a prompt
        "requests": lambda p: Quantity(p.load.users),  # that ask for them
    }
    return Costs(
        rows=rows(
            run,
            asked,
            **asked_for,
            until_all_s=until_all_s,  # from the first send of a prompt's samples
            each_s=lambda p: until_all_s(p) / samples(p),  # of the engine, for one sample
            tokens_per_s="output_tokens_per_s",
            ttft_s="ttft_mean_s",
            hits="prefix_hit_rate",  # share of the prompt tokens
            hits_by_blocks=by_blocks,
        ),
        figures={"one_s": one_s},
        several=rows(run, many, **asked_for, times=lambda p: until_all_s(p) / one_s),
    )


def samples(point: Point) -> int:
    """Return how many samples of each prompt are asked for."""
    return point.workload.samples.count if point.workload.samples else 0


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


@dataclass(frozen=True, kw_only=True)
class Voting(Table):
    """What the probe asked for, and in rows what so many samples of a task buy; see `bought`."""

    @property
    def one(self) -> Row:
        return self.rows[0]

    @property
    def most(self) -> Row:
        return self.rows[-1]

    @property
    def beats(self) -> Literal["yes", "worse", "open"]:
        """Whether the largest vote beats one sample."""
        gain = self.most["gain"]
        if is_above_0(gain):
            return "yes"
        return "worse" if is_above_0(-1 * gain) else "open"


def is_above_0(gain: Quantity) -> bool:
    """Whether the interval says so."""
    return gain.low is not None and gain.low > 0


def in_points(gain: Interval) -> Quantity:
    """Count in hundredths of the tasks, unlike a quantity in POINTS, which is a share."""
    return 100 * Quantity.of(gain)


def probed(run: JudgedRun, probe: str) -> Probe | None:
    """Read the first variant's answers to the tasks of a probe, if any was asked."""
    probes = (run.folder.probe_result(probe, v.name) for v in run.lab.variants)
    return next((p for p in probes if p and p["tasks"]), None)


def solved(probe: Probe) -> tuple[Solved, ...]:
    return tuple(
        Solved(
            kind=task["kind"],
            expected=task["expected"],
            greedy=canonical(task["greedy"]["texts"][0]),
            answers=tuple(canonical(text) for r in task["rounds"] for text in r["texts"]),
        )
        for task in probe["tasks"]
    )


def drawn_of(tasks: Sequence[Solved]) -> int:
    return min(len(t.answers) for t in tasks)


def voting(probe: Probe, tasks: Sequence[Solved]) -> Voting:
    greedy, rounds = [t.greedy_right for t in tasks], bought(probe["tasks"], tasks)
    one, most = rounds[0], rounds[-1]
    votes = [t.votes(int(most.name)) for t in tasks]
    return Voting(
        rows=rounds,
        figures={
            "temperature": Quantity(probe["temperature"]),
            "tasks": Quantity(len(tasks)),
            "drawn": Quantity(drawn_of(tasks)),  # samples of each task
            "greedy": Quantity.of(over_tasks(greedy), "share"),
            "greedy_s": Quantity(fmean(task["greedy"]["took_s"] for task in probe["tasks"]), "s"),
            # the largest vote over one greedy answer, in points
            "over_greedy": in_points(gain_over_tasks(greedy, votes)),
            "times_seconds": most["seconds"] / one["seconds"],  # of the largest round / one sample
            "times_tokens": most["tokens"] / one["tokens"],
        },
    )


def bought(asked: Sequence[Probe], tasks: Sequence[Solved]) -> tuple[Row, ...]:
    """Work out what each round of samples costs and solves; the first is of one sample."""
    found = list[Row]()
    alone = [t.votes(1) for t in tasks]
    for rounds in zip(*(task["rounds"] for task in asked), strict=True):
        n = rounds[0]["n"]
        seconds = Quantity(fmean(r["took_s"] for r in rounds), "s")  # of the engine, over tasks
        tokens = Quantity(fmean(r["tokens"] for r in rounds))  # of output, over tasks
        voted = [t.votes(n) for t in tasks]
        gain = in_points(gain_over_tasks(alone, voted))
        points = gain.brief if is_above_0(gain) else Quantity.missing("no gain is shown")
        one_s, one_tokens = (
            (found[0]["seconds"], found[0]["tokens"]) if found else (seconds, tokens)
        )
        figures = {
            "samples": Quantity(n),
            "seconds": seconds,
            "tokens": tokens,
            "passed": Quantity.of(over_tasks([t.passes(n) for t in tasks]), "share"),
            "voted": Quantity.of(over_tasks(voted), "share"),
            "gain": gain if n > 1 else Quantity.missing("it is one sample"),  # of the vote
            # what a point costs, where the vote gains beyond its interval
            "point_s": (seconds - one_s) / points,
            "point_tokens": (tokens - one_tokens).in_unit("tok") / points,
        }
        found.append(Row(str(n), figures))
    return tuple(found)


# --------------------------------------------------------------------------- by the kind of task


def kinds(tasks: Sequence[Solved], samples: int) -> tuple[Row, ...]:
    """Say how often the tasks of each kind are solved, with so many samples at most."""
    by_kind = {
        name: [t for t in tasks if t.kind == name] for name in dict.fromkeys(t.kind for t in tasks)
    }
    return tuple(
        Row(
            name,
            {
                "tasks": Quantity(len(mine)),
                "greedy": mean_share(mine, lambda t: t.greedy_right),
                "one": mean_share(mine, lambda t: t.passes(1)),
                "voted": mean_share(mine, lambda t: t.votes(samples)),
                "passed": mean_share(mine, lambda t: t.passes(samples)),
            },
        )
        for name, mine in by_kind.items()
    )


def mean_share(tasks: Sequence[Solved], of: Callable[[Solved], float]) -> Quantity:
    return Quantity(fmean(map(of, tasks)), "share")


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
    voted: Quantity  # of as many as for the same FLOP, or of those drawn
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
    more_s = (most["seconds"] - one["seconds"]) / (int(most.name) - int(one.name))
    shapes = {name: catalog.shape_of(dummy.config_of(name)) for name in LARGER}
    rows = [
        weighed(name, shape, point, tasks, one["seconds"], more_s)
        for name, shape in shapes.items()
        if shape.params > 2 * point.shape.params
    ]
    return LargerModel(in_billions(point.shape), one["seconds"], more_s, tuple(rows))


def in_billions(shape: Shape) -> Quantity:
    return Quantity(shape.params / 1e9, "B")


def weighed(
    name: str,
    shape: Shape,
    point: Point,
    tasks: Sequence[Solved],
    one_s: Quantity,
    more_s: Quantity,
) -> Larger:
    """Work out how many samples one answer of a larger model costs, and what they solve."""
    drawn = drawn_of(tasks)
    larger_s, here_s = (
        theory.decode_step_s(s, point.ceilings, 1, TASK_CONTEXT_TOKENS)
        for s in (shape, point.shape)
    )
    flop, own_flop = (theory.decode_flops(s, 1, TASK_CONTEXT_TOKENS) for s in (shape, point.shape))
    times, busy = larger_s / here_s, max(1, round(flop / own_flop))
    spare = ((times - 1) * one_s / more_s).value
    n = min(busy, drawn)
    return Larger(
        name=name,
        params=in_billions(shape),
        times=Quantity(times, RATIO),
        alone=drawn + 1 if spare is None or (more_s.value or 0) <= 0 else 1 + int(spare),
        busy=busy,
        drawn=drawn,
        voted=mean_share(tasks, lambda t: t.votes(n)),
        passed=mean_share(tasks, lambda t: t.passes(n)),
    )


# ------------------------------------------------------------------------------- a reward model


@dataclass(frozen=True)
class Verifier:
    """What lies between a vote and a perfect check, and what scoring would cost."""

    gap: Quantity  # pass@n - vote@n, in points
    at_the_end: Figures  # of an outcome reward model
    by_step: Figures  # of a process reward model


def verifier(point: Point, tasks: Sequence[Solved], vote: Voting) -> Verifier:
    samples, tokens = int(vote.most.name), vote.most["tokens"].value or 0.0
    kv_bytes = TASK_CONTEXT_TOKENS * point.shape.kv_bytes_per_token()

    def scored(passes: int) -> Figures:
        """Return what a model of the served size would take to score the answers of a task."""
        pass_s = theory.forward_s(point.shape, point.ceilings, tokens / passes, kv_bytes)
        seconds = Quantity(passes * pass_s, "s")
        of_sampling = (seconds / vote.most["seconds"]).in_unit("share")
        return {"passes": Quantity(passes), "seconds": seconds, "of_sampling": of_sampling}

    voted, passed = [t.votes(samples) for t in tasks], [t.passes(samples) for t in tasks]
    return Verifier(in_points(gain_over_tasks(voted, passed)), scored(1), scored(STEPS))


# ------------------------------------------------------------- vote, revise, or search by steps

Method = Literal["one", "vote", "end", "step", "revision", "revisions' vote"]
ERRORS = (0.0, 0.05, 0.1, 0.2)  # of a checker, as a chance at each thing that it checks
FORESEEN = (1, 2, 4, 8, 16, 32)  # steps


@dataclass(frozen=True)
class Summed:
    """What was drawn for one sum, and what of it is right."""

    steps: int
    expected: str
    ends: tuple[str | None, ...]  # of all whole solutions of all rounds
    right: tuple[int, ...]  # steps of each of them before the first wrong one
    searched: Mapping[int, tuple[int, ...]]  # right candidates of each step, by how many there are
    found: Mapping[int, str | None]  # the end of each search, by the same number
    revised: tuple[str | None, ...]  # ends, one after another

    @property
    def reached(self) -> int:
        """Steps of whole solutions that follow none but right ones."""
        return sum(min(right + 1, self.steps) for right in self.right)

    def by_end(self, n: int, error: float = 0.0) -> float:
        """How often the solution that a check of ends keeps out of n is right."""
        return chosen(self.ends.count(self.expected), len(self.ends), n, error)

    def by_step(self, n: int, error: float = 0.0) -> float:
        """How often a search keeps the right one of n candidates for each step.

        Once a wrong one is kept the sum counts as lost, whatever its end; up to there the
        candidates are those recorded.
        """
        return prod(chosen(right, n, n, error) for right in self.searched[n])

    def solved(self, method: Method, n: int) -> float:
        match method:
            case "one" | "vote":
                return vote_at(n, self.ends, self.expected)
            case "end":
                return self.by_end(n)
            case "step":
                return float(self.found[n] == self.expected)
            case "revision":
                return float(self.revised[n - 1] == self.expected)
            case _:
                return vote_at(n, self.revised[:n], self.expected)


@dataclass(frozen=True)
class Stepwise:
    """What voting, revising and searching make of the same tokens, with exact checks."""

    tasks: int
    right_ends: int  # of whole solutions
    by_luck: int  # of these, behind a wrong step
    accuracy: Quantity
    spent: tuple[Row, ...]  # by their method; see `spent`
    lengths: tuple[Row, ...]  # see `length`
    foreseen: tuple[Figures, ...]  # at the accuracy of all steps, with the fewest candidates
    erring: tuple[Figures, ...]  # see `erring`

    @property
    def fewest(self) -> float | None:
        """The tokens of how many solutions all methods have: of as many as were revised."""
        return self.spent[-1]["samples"].value

    @property
    def few(self) -> dict[str, Row]:
        """What each method makes of those tokens."""
        return {s.name: s for s in self.spent if s["samples"].value == self.fewest}

    @property
    def search_beats_ends(self) -> bool:
        """Whether the interval of its gain over a check of as many ends excludes 0."""
        return is_above_0(self.few["step"]["over_end"])

    @property
    def lengths_of_few(self) -> list[Row]:
        return [of for of in self.lengths if of["samples"].value == self.fewest]

    @property
    def erring_of_few(self) -> list[Figures]:
        return [of for of in self.erring if of["samples"].value == self.fewest]

    @property
    def waits(self) -> Quantity:
        """How many times as long a search takes as a vote of as many tokens, about."""
        return self.few["step"]["seconds"] / self.few["vote"]["seconds"]

    @property
    def revision_waits(self) -> Quantity:
        return self.few["revision"]["seconds"] / self.few["vote"]["seconds"]

    @property
    def too_high_from(self) -> Quantity | None:
        """The fewest steps of which a search solves less than forecast, by its interval."""
        less = [
            of["steps"]
            for of in self.lengths_of_few
            if (of["by_step"].high or 1) < (of["forecast_by_step"].value or 0)
        ]
        return min(less, key=lambda steps: steps.value or 0, default=None)

    @property
    def parted(self) -> Figures:
        """Where the formulas have a check of steps gain most."""
        return max(self.foreseen, key=lambda of: of["gain"].value or 0)


def stepwise(probe: Probe) -> Stepwise:
    asked, tasks = probe["tasks"], [*map(summed, probe["tasks"])]
    numbers = sorted(tasks[0].searched)
    accuracy = step_accuracy(tasks)
    revised = len(tasks[0].revised)
    methods: list[tuple[Method, int]] = [
        *((method, n) for n in numbers for method in ("vote", "end", "step")),
        *((method, revised) for method in ("revision", "revisions' vote")),
    ]
    return Stepwise(
        tasks=len(tasks),
        right_ends=sum(t.ends.count(t.expected) for t in tasks),
        by_luck=sum(
            end == t.expected and right < t.steps
            for t in tasks
            for end, right in zip(t.ends, t.right, strict=True)
        ),
        accuracy=accuracy,
        spent=tuple(spent(asked, tasks, *of) for of in [("one", 1), *methods]),
        lengths=tuple(
            length([t for t in tasks if t.steps == steps], n)
            for steps in sorted({t.steps for t in tasks})
            for n in numbers
        ),
        foreseen=tuple(foreseen(accuracy, steps, numbers[0]) for steps in FORESEEN),
        erring=tuple(erring(tasks, error, n) for error in ERRORS for n in numbers),
    )


def erring(tasks: Sequence[Summed], error: float, n: int) -> Figures:
    """Say what checks are worth that err with this chance at each thing they check."""
    return {
        "error": Quantity(error, "share"),
        "samples": Quantity(n),
        "by_end": Quantity.of(over_tasks([t.by_end(n, error) for t in tasks]), "share"),
        "by_step": Quantity.of(over_tasks([t.by_step(n, error) for t in tasks]), "share"),
    }


def summed(task: Probe) -> Summed:
    steps = task["steps"]
    whole = [text for r in task["rounds"] for text in r["texts"]]
    return Summed(
        steps=len(steps),
        expected=steps[-1].split()[-1],
        ends=tuple(end_of(text, len(steps)) for text in whole),
        right=tuple(steps_right(text, steps) for text in whole),
        searched={
            search["n"]: tuple(
                sum(is_step(text, step) for text in drawn["texts"])
                for drawn, step in zip(search["steps"], steps, strict=True)
            )
            for search in task["searches"]
        },
        found={search["n"]: end_of_search(search, steps) for search in task["searches"]},
        revised=tuple(end_of(r["texts"][0], len(steps)) for r in task["revisions"]),
    )


def end_of_search(search: Probe, steps: Sequence[str]) -> str | None:
    """Read the end of the last candidate that a search kept: a right one, else the first."""
    last = search["steps"][-1]["texts"]
    return end_of(next((text for text in last if is_step(text, steps[-1])), last[0]), 1)


def step_accuracy(tasks: Sequence[Summed]) -> Quantity:
    right = sum(sum(t.right) for t in tasks)
    return Quantity(right / sum(t.reached for t in tasks), "share")


def spent(asked: Sequence[Probe], tasks: Sequence[Summed], method: Method, n: int) -> Row:
    """Say what a method makes of the tokens of so many whole solutions."""

    def requests(task: Probe) -> list[Probe]:
        match method:
            case "one" | "vote" | "end":
                return [r for r in task["rounds"] if r["n"] == n]
            case "step":
                return [step for s in task["searches"] if s["n"] == n for step in s["steps"]]
            case _:
                return [*task["revisions"][:n]]

    solved = [t.solved(method, n) for t in tasks]
    over_vote, over_end = (
        in_points(gain_over_tasks([t.solved(other, n) for t in tasks], solved))
        for other in ("vote", "end")
    )
    figures = {
        "samples": Quantity(n),
        "solved": Quantity.of(over_tasks(solved), "share"),
        # both in points
        "over_vote": Quantity.missing("it is the vote") if method in ("one", "vote") else over_vote,
        "over_end": over_end if method == "step" else Quantity.missing("it is no search"),
        # of output, and of the engine, means over tasks
        "tokens": Quantity(fmean(sum(r["tokens"] for r in requests(task)) for task in asked)),
        "seconds": Quantity(fmean(sum(r["took_s"] for r in requests(task)) for task in asked), "s"),
    }
    return Row(method, figures)


def length(tasks: Sequence[Summed], n: int) -> Row:
    """Set checks of the end and of each step beside their forecasts, for sums of one length."""
    steps, accuracy = tasks[0].steps, step_accuracy(tasks)
    by_end = [t.solved("end", n) for t in tasks]
    by_step = [t.solved("step", n) for t in tasks]
    expected = foreseen(accuracy, steps, n)
    figures = {
        "steps": expected["steps"],
        "tasks": Quantity(len(tasks)),
        "samples": Quantity(n),
        "accuracy": accuracy,  # of a step that follows none but right ones
        "by_end": Quantity.of(over_tasks(by_end), "share"),
        "by_step": Quantity.of(over_tasks(by_step), "share"),
        "gain": in_points(gain_over_tasks(by_end, by_step)),
        "forecast_by_end": expected["by_end"],
        "forecast_by_step": expected["by_step"],
        "forecast_gain": expected["gain"],
    }
    return Row(str(steps), figures)


def foreseen(accuracy: Quantity, steps: int, n: int) -> Figures:
    """Say what checks find in sums of so many steps, by the formulas."""
    p = accuracy.value or 0
    by_end, by_step = found_at_end(p, steps, n), found_by_steps(p, steps, n)
    return {
        "steps": Quantity(steps),
        "by_end": Quantity(by_end, "share"),
        "by_step": Quantity(by_step, "share"),
        "gain": 100 * Quantity(by_step - by_end),
    }
