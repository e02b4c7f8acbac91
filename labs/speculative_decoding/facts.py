"""Which guesses were accepted, what they gained, and whether the text is the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
import scipy

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from serving import metrics

Outcome = Literal["wins", "loses", "undecided", "not valid"]


@dataclass(frozen=True)
class Accepted:
    """What the target accepted of the drafts at one point."""

    point: str
    shares: tuple[Quantity, ...]  # of the drafts, accepted as far as position 1, 2, ...
    tokens_per_draft: Quantity
    tokens_at_constant_share: Quantity  # had every position the first one's share
    wasted_share: Quantity  # of the drafted tokens


@dataclass(frozen=True)
class Draft:
    """A derived draft model or head, by what its recipe measured on held-out text."""

    name: str
    layers: int
    trained: Quantity  # seconds that making it took, the target's answers included
    guessed_share: Quantity
    guessed_untrained_share: Quantity


@dataclass(frozen=True)
class Acceptance:
    """What was accepted at every point that speculates, and what was trained to guess."""

    points: tuple[Accepted, ...]
    drafts: tuple[Draft, ...]


@dataclass(frozen=True)
class SpeedUp:
    """A point's speed-up as measured, and as Leviathan's formula explains it.

    The costs are in steps of the target at the same batch.
    """

    point: str
    variant: str
    workload: str
    users: int
    measured: Quantity  # TPOT without / with speculation
    tokens_per_step: Quantity
    draft_cost: Quantity
    verify_cost: Quantity
    explained: Quantity
    pass_cost: Quantity  # of a guess, all included: what v leaves of the step as measured
    is_valid: bool  # whether nothing withholds a verdict on it

    @property
    def outcome(self) -> Outcome:
        """Whether speculation wins; it is undecided where the interval includes 1."""
        low, high = self.measured.low, self.measured.high
        if not self.is_valid:
            return "not valid"
        if low is None or high is None or low <= 1 <= high:
            return "undecided"
        return "wins" if low > 1 else "loses"


@dataclass(frozen=True)
class Turn:
    """The loads between which a curve turns, and whether speculation wins beyond them.

    They are the last load told before and the first told after the turn; loads between them are
    those where speculation is undecided, or the figures not valid.
    """

    before: int
    after: int
    gains: bool


@dataclass(frozen=True)
class Curve:
    """The speed-up of a variant on a workload over the requests in flight, in their order."""

    variant: str
    workload: str
    speed_ups: tuple[SpeedUp, ...]

    @property
    def runs(self) -> list[tuple[Outcome, list[SpeedUp]]]:
        """The loads one after another, those of one outcome together."""
        return [(k, list(of)) for k, of in groupby(self.speed_ups, key=lambda p: p.outcome)]

    @property
    def turn(self) -> Turn | None:
        """The first turn."""
        decided = [p for p in self.speed_ups if p.outcome in ("wins", "loses")]
        for one, other in pairwise(decided):
            if one.outcome != other.outcome:
                return Turn(one.users, other.users, other.outcome == "wins")
        return None


@dataclass(frozen=True)
class SpeedUps:
    """Every speculating point that was measured beside the plain engine."""

    points: tuple[SpeedUp, ...]

    @property
    def all_valid(self) -> bool:
        """Whether nothing withholds a verdict at any of the points."""
        return all(p.is_valid for p in self.points)

    @property
    def curves(self) -> list[Curve]:
        """The points by variant and workload."""
        at: dict[tuple[str, str], list[SpeedUp]] = {}
        for p in sorted(self.points, key=lambda p: p.users):
            at.setdefault((p.variant, p.workload), []).append(p)
        return [Curve(*kind, tuple(measured)) for kind, measured in at.items()]

    @property
    def best(self) -> SpeedUp | None:
        """The largest speed-up that wins."""
        wins = [p for p in self.points if p.outcome == "wins"]
        return max(wins, key=lambda p: p.measured.value or 0, default=None)

    @property
    def first_loss(self) -> SpeedUp | None:
        """A point with the fewest requests in flight at which speculation loses."""
        losses = [p for p in self.points if p.outcome == "loses"]
        return min(losses, key=lambda p: p.users, default=None)


@dataclass(frozen=True)
class SameText:
    """A point's answers that equal the plain engine's, with a 95% Wilson interval."""

    point: str
    compared: int
    same_share: Quantity


@dataclass(frozen=True)
class Facts:
    acceptance: Acceptance
    speed_up: SpeedUps
    same_text: tuple[SameText, ...] | None


def facts(run: JudgedRun) -> Facts:
    texts = same_text(run) if run.finds("same-text") else None
    return Facts(acceptance(run), SpeedUps(tuple(speed_ups(run))), texts)


def speculations(run: JudgedRun) -> list[tuple[Point, dict[str, Any]]]:
    """List the points that speculate, with their configuration."""
    configured = [(point, point.flags.speculative_config) for point in run.points]
    return [(point, config) for point, config in configured if config]


# -------------------------------------------------------------------------- what was accepted


def accepted_at(run: JudgedRun, point: Point) -> list[float]:
    """Return the share of drafts accepted at each position, all repeats together."""
    engines = [trial.engine.values for trial in run.trials(point) if trial.engine]
    drafts = sum(values.get(metrics.SPEC_DRAFTS, 0.0) for values in engines)
    shares: list[float] = []
    while drafts and any(metrics.position(len(shares)) in values for values in engines):
        name = metrics.position(len(shares))
        shares.append(sum(values.get(name, 0.0) for values in engines) / drafts)
    return shares


def acceptance(run: JudgedRun) -> Acceptance:
    """Set acceptance by position beside the formula's single probability."""
    points = []
    for point, config in speculations(run):
        shares, length = accepted_at(run, point), run.quantity(point, "acceptance_length").brief
        if not shares or not length.known:
            continue
        constant = theory.accepted_length(shares[0], config["num_speculative_tokens"])
        points.append(
            Accepted(
                point=point.key,
                shares=tuple(map(Quantity, shares)),
                tokens_per_draft=length,
                tokens_at_constant_share=Quantity(constant),
                wasted_share=-1 * run.quantity(point, "acceptance_rate").brief + 1,
            )
        )
    made = [(name, run.run.about.get(name, {})) for name in ("draft", "eagle")]
    drafts = [
        Draft(
            name,
            about["layers"],
            Quantity.given(about.get("seconds"), "s", "not recorded"),
            Quantity(about["acceptance"], "share"),
            Quantity(about["acceptance_untrained"], "share"),
        )
        for name, about in made
        if "acceptance_untrained" in about
    ]
    return Acceptance(tuple(points), tuple(drafts))


# ------------------------------------------------------------------------------- what it gained


def speed_ups(run: JudgedRun) -> list[SpeedUp]:
    """Compare TPOT without / with speculation with Leviathan's formula of measured parts.

    v is read off the plain engine's own TPOT over concurrency (linear between the loads measured,
    nothing beyond them), c off the draft served alone, by the engine's clock: at a millisecond a
    step tokens reach the client in clumps. A step's tokens are the engine's count over all steps:
    an n-gram's steps without a draft count as steps of one token.
    """
    plain_s = {
        p.load.users: tpot_s
        for p in run.points
        if p.variant.name == "none" and p.workload.name in ("story", "crowd")
        if (tpot_s := run.mean(p, "tpot_mean_s"))
    }
    draft = draft_cost(run)
    measured = []
    for point, config in speculations(run):
        base = run.point("none", point.workload.name, str(point.load))
        gain = run.measured_ratio(base, point, "tpot_mean_s")
        if base is None or not gain.known:
            continue
        guesses = config["num_speculative_tokens"]
        verify = verify_cost(plain_s, point.load.users, guesses)
        cost = Quantity(0.0) if config["method"] == "ngram" else draft
        length = tokens_a_step(run, point)
        if config["method"] == "eagle":
            cost = Quantity.missing("a head is not served alone")
        measured.append(
            SpeedUp(
                point=point.key,
                variant=point.variant.name,
                workload=point.workload.name,
                users=point.load.users,
                measured=gain,
                tokens_per_step=length,
                draft_cost=cost,
                verify_cost=verify,
                explained=(length / (guesses * cost + verify)).in_unit(RATIO),
                pass_cost=((length / gain.in_unit("1") - verify) / guesses).in_unit("1"),
                is_valid=not run.withholds("tpot_mean_s", base, point),
            )
        )
    return measured


def draft_cost(run: JudgedRun) -> Quantity:
    """Divide a step of the draft served alone by one of the target."""
    drafts = [p for p in run.points if p.variant.weights == "draft"]
    of_drafts = (run.engine_mean(draft, metrics.ITL, "s") for draft in drafts)
    alone_s = next(
        (s for s in of_drafts if s.known), Quantity.missing("no draft served alone", "s")
    )
    target_s = run.engine_mean(run.point("none", "story", "concurrent:1"), metrics.ITL, "s")
    return (alone_s / target_s).in_unit("1")


def verify_cost(plain_s: dict[int, float], batch: int, guesses: int) -> Quantity:
    """Return the plain TPOT at B (g + 1) / that at B, between the loads that were measured."""
    loads, verified = sorted(plain_s), batch * (guesses + 1)
    if not loads or batch < loads[0] or verified > loads[-1]:
        return Quantity.missing("no load as large was measured without speculation")
    many_s, few_s = np.interp([verified, batch], loads, [plain_s[n] for n in loads])
    return Quantity(float(many_s / few_s))


def tokens_a_step(run: JudgedRun, point: Point) -> Quantity:
    """Count output tokens a decode step and sequence, with steps that drafted nothing.

    Each of those steps is one sample of the engine's inter-token latency. Its counter of accepted
    tokens would say too much: it takes in those that an answer's end cuts off its last draft.
    """
    tokens = steps = 0.0
    for trial in run.trials(point):
        if trial.engine and metrics.ITL in trial.engine.histograms:
            first = trial.engine.histograms[metrics.TTFT].count
            tokens += trial.engine.values[metrics.GENERATION_TOKENS] - first
            steps += trial.engine.histograms[metrics.ITL].count
    return Quantity(tokens / steps) if steps else Quantity.missing("the engine counted no steps")


# ------------------------------------------------------------------------- is it the same text


def same_text(run: JudgedRun) -> tuple[SameText, ...]:
    """Compare answers with the plain engine's at one stream, character for character.

    Requests pair up by repeat and index.
    """
    texts: dict[str, dict[tuple[int, int], str]] = {}
    for point, result, trial in run.folder.trials(run.points, run.lab):
        if trial and point.workload.keep_text:
            texts.setdefault(point.key, {}).update(
                {(result.repeat, r.index): r.text for r in trial.records if r.text is not None}
            )
    points = []
    for point in run.points:
        base = run.point("none", point.workload.name, "concurrent:1")
        if base is None or base.key == point.key or point.key not in texts:
            continue
        speculated, plain = texts[point.key], texts.get(base.key, {})
        if both := speculated.keys() & plain.keys():
            same = sum(speculated[key] == plain[key] for key in both)
            points.append(SameText(point.key, len(both), share_of(same, len(both))))
    return tuple(points)


def share_of(same: int, of: int) -> Quantity:
    wilson = scipy.stats.binomtest(same, of).proportion_ci(method="wilson")
    return Quantity(same / of, "share", float(wilson.low), float(wilson.high))
