"""Whether answers keep to their structure, and what imposing it costs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, get_args

import jsonschema
import numpy as np
import scipy

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Point
from loadtests.structures import FORMS, Spec
from serving.simulator.step import mask_threads

How = Literal["free", "asked", "imposed"]
"""Whether a structure is not asked for, asked for in the prompt, or imposed by the engine."""


@dataclass(frozen=True)
class Facts:
    validity: Validity
    overhead: Overhead
    first_token: FirstTokens
    masks: Masks
    is_forecast: bool  # what the plot shows


def facts(run: JudgedRun) -> Facts:
    is_forecast = bool(run.summary.in_virtual_time)
    return Facts(validity(run), overhead(run), first_token(run), masks(run), is_forecast)


# --------------------------------------------------------------------------------- validity


def is_valid(text: str, structure: Spec, *, strict: bool = True) -> bool:
    """Tell whether the whole text has the structure, and nothing stands around it.

    Without `strict`, strings may hold control characters that are not escaped, which JSON forbids
    (RFC 8259, section 7).
    """
    if "regex" in structure:
        return re.fullmatch(structure["regex"], text) is not None
    try:
        value = json.loads(text, strict=strict)
        jsonschema.Draft202012Validator(structure["json"]).validate(value)
    except (json.JSONDecodeError, jsonschema.ValidationError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class AnswerCounts:
    """The whole answers of one form, by one engine, asked for in one way."""

    form: str
    how: How
    backend: str | None  # None: the engine had no part in it
    asked: int
    valid: int
    cut_off: int  # ended at their most tokens, so that they are not whole
    tokens: Quantity  # mean length
    control_characters: int = 0  # whole, and not valid for nothing but these, unescaped

    @property
    def broken(self) -> int:
        """Answers that ended by themselves and are not valid."""
        return self.asked - self.valid - self.cut_off


@dataclass(frozen=True)
class Kept:
    """How many of all answers that were asked for in one way are valid."""

    how: How
    valid: int
    asked: int
    at_least: Quantity  # the share that is valid, with 95% confidence (Clopper-Pearson)


@dataclass(frozen=True)
class Validity:
    """What the probes asked for; nothing where they were not asked."""

    groups: tuple[AnswerCounts, ...]

    def of(self, how: How) -> list[AnswerCounts]:
        return [group for group in self.groups if group.how == how]

    @property
    def kept(self) -> list[Kept]:
        """The answers by how they were asked for."""
        return [kept(how, groups) for how in get_args(How) if (groups := self.of(how))]

    @property
    def with_control_characters(self) -> list[AnswerCounts]:
        """The imposed answers that these alone broke."""
        return [group for group in self.of("imposed") if group.control_characters]

    @property
    def passed(self) -> bool | None:
        """Whether no whole answer broke an imposed structure; None where none was valid."""
        imposed = self.of("imposed")
        if any(g.broken for g in imposed):
            return False
        return True if any(g.valid for g in imposed) else None


def kept(how: How, groups: Sequence[AnswerCounts]) -> Kept:
    valid, asked = sum(g.valid for g in groups), sum(g.asked for g in groups)
    low = scipy.stats.binomtest(valid, asked).proportion_ci(method="exact").low
    return Kept(how, valid, asked, Quantity(float(low), "share"))


def validity(run: Context) -> Validity:
    groups: dict[tuple[str, How, str | None], list[Mapping[str, Any]]] = {}
    for variant in run.lab.variants:
        probe = run.folder.probe_result("structures", variant.name) or {"answers": []}
        for answer in probe["answers"]:
            backend = variant.name if answer["how"] == "imposed" else None
            groups.setdefault((answer["form"], answer["how"], backend), []).append(answer)
    counts = [counted(*group, answers) for group, answers in groups.items()]
    order = get_args(How)
    counts.sort(key=lambda of: (FORMS.index(of.form), order.index(of.how)))
    return Validity(tuple(counts))


def counted(
    form: str, how: How, backend: str | None, answers: Sequence[Mapping[str, Any]]
) -> AnswerCounts:
    odd = [a for a in answers if not is_valid(a["text"], a["structure"])]
    return AnswerCounts(
        form,
        how,
        backend,
        asked=len(answers),
        valid=len(answers) - len(odd),
        cut_off=sum(a["finish"] == "length" for a in odd),
        tokens=Quantity(fmean(a["tokens"] for a in answers)),
        control_characters=sum(is_valid(a["text"], a["structure"], strict=False) for a in odd),
    )


# --------------------------------------------------------------------------- the cost of a step


@dataclass(frozen=True)
class Step:
    """A step with masks beside one without."""

    backend: str
    workload: str
    users: int
    tpot_s: Quantity
    without_s: Quantity  # the same prompts, nothing imposed
    masks_s: Quantity  # of the whole batch, as the study timed them

    @property
    def longer(self) -> Quantity:
        """The step's growth, as a share of the step without masks."""
        return (self.tpot_s / self.without_s - 1).in_unit("share")

    @property
    def hides_masks(self) -> bool | None:
        """Whether the masks fit the step that could hide them, which is one without."""
        masks_s, without_s = self.masks_s.value, self.without_s.value
        return None if masks_s is None or without_s is None else masks_s < without_s


@dataclass(frozen=True)
class Overhead:
    """Every step with masks."""

    steps: tuple[Step, ...]

    @property
    def imposed(self) -> Step | None:
        """The step of many answers on which a schema was imposed."""
        return next((step for step in self.steps if step.workload == "imposed"), None)

    @property
    def slowest(self) -> Step | None:
        """The step with the slowest masks, of those that are known with and without."""
        known = [step for step in self.steps if step.hides_masks is not None]
        return max(known, key=lambda step: step.masks_s.value or 0.0, default=None)

    @property
    def lacks_some(self) -> bool:
        """Whether some prompts were not sent without a structure."""
        return not all(step.without_s.known for step in self.steps)


def seconds(value: float | None) -> Quantity:
    return Quantity.missing("not timed", "s") if value is None else Quantity(float(value), "s")


def timed_forms(run: Context) -> Mapping[str, Mapping[str, Any]]:
    """What the study of masks timed of each form, by backend."""
    backends = run.run.about.get("masks", {}).get("backends", {})
    return {backend: timed["forms"] for backend, timed in backends.items()}


def batch_masks_s(run: Context, point: Point, form: str) -> Quantity:
    """Compute the seconds of a batch's masks from the study."""
    timed = timed_forms(run).get(point.variant.name, {}).get(form)
    if not timed:
        return seconds(None)
    users, processors = point.load.users, run.run.about["masks"]["processors"]
    return seconds(users * timed["mask_s"] / mask_threads(users, processors))


def overhead(run: Context) -> Overhead:
    asked, imposed = dict[str, Point](), list[tuple[Point, str]]()
    for point in run.points:
        structure = point.workload.structure
        if structure and not structure.imposed:
            asked[point.workload.name] = point
        elif structure and point.output_tokens > 1:
            imposed.append((point, structure.form))
    steps = []
    for point, form in imposed:
        without = asked.get(point.workload.name.replace("imposed", "asked"))
        steps.append(
            Step(
                point.variant.name,
                point.workload.name,
                point.load.users,
                tpot_s=run.quantity(point, "tpot_mean_s"),
                without_s=run.quantity(without, "tpot_mean_s"),
                masks_s=batch_masks_s(run, point, form),
            )
        )
    return Overhead(tuple(steps))


# ------------------------------------------------------------------------------ the first token


@dataclass(frozen=True)
class FirstToken:
    """First tokens of structures that an engine has not seen beside those of seen ones."""

    backend: str
    form: str
    timed: int
    unseen_s: Quantity  # median, as the next one
    seen_s: Quantity
    compile_s: Quantity  # by the study

    @property
    def later_s(self) -> Quantity:
        """By how much the first token of an unseen structure is later."""
        return self.unseen_s - self.seen_s


@dataclass(frozen=True)
class FirstTokens:
    """Every backend and form."""

    rows: tuple[FirstToken, ...]

    @property
    def longest(self) -> FirstToken | None:
        """The longest wait."""
        return max(self.rows, key=lambda row: row.later_s.value or 0.0, default=None)

    @property
    def shortest(self) -> FirstToken | None:
        return min(self.rows, key=lambda row: row.later_s.value or 0.0, default=None)

    @property
    def timed(self) -> int | None:
        """How many structures each median is of, at least."""
        return min((row.timed for row in self.rows), default=None)


def first_token(run: Context) -> FirstTokens:
    rows, study = [], timed_forms(run)
    for variant in run.lab.variants:
        probe = run.folder.probe_result("structures", variant.name) or {"took": []}
        for form in FORMS:
            if took := [t for t in probe["took"] if t["form"] == form]:
                beforehand = study.get(variant.name, {}).get(form, {})
                rows.append(
                    FirstToken(
                        variant.name,
                        form,
                        len(took),
                        unseen_s=seconds(np.median([t["unseen_s"] for t in took])),
                        seen_s=seconds(np.median([t["seen_s"] for t in took])),
                        compile_s=seconds(beforehand.get("compile_s")),
                    )
                )
    return FirstTokens(tuple(sorted(rows, key=lambda row: FORMS.index(row.form))))


# ----------------------------------------------------------------------- what was timed beforehand


@dataclass(frozen=True)
class TimedForm:
    """What the study of masks timed of a backend and a form."""

    backend: str
    form: str
    compile_s: Quantity
    again_s: Quantity
    mask_s: Quantity
    most_hidden: int | None  # sequences whose masks fit the step of one; None: not measured


@dataclass(frozen=True)
class Masks:
    """The whole study; `unusable` maps a backend to the error because of which it is so here."""

    forms: tuple[TimedForm, ...]
    unusable: Mapping[str, str]
    vocabulary: int | None


def masks(run: Context) -> Masks:
    study = run.run.about.get("masks", {})
    alone = next((p for p in run.points if p.workload.name == "asked-alone"), None)
    one_s = run.quantity(alone, "tpot_mean_s").value
    forms = [
        TimedForm(
            backend,
            form,
            seconds(timed["compile_s"]),
            seconds(timed["again_s"]),
            seconds(timed["mask_s"]),
            most_hidden=int(one_s / timed["mask_s"]) if one_s else None,
        )
        for backend, of_backend in timed_forms(run).items()
        for form, timed in of_backend.items()
    ]
    errors = {name: timed["error"] for name, timed in study.get("backends", {}).items()}
    unusable = {name: error for name, error in errors.items() if error}
    return Masks(tuple(forms), unusable, study.get("vocabulary"))
