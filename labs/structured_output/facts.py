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

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.judging.quantity import Quantity
from labs.harness.spec import Point
from loadtests.structures import FORMS, Spec
from serving.forecasting.step import mask_threads

How = Literal["free", "asked", "imposed"]
"""Whether a structure is not asked for, asked for in the prompt, or imposed by the engine."""

# --------------------------------------------------------------------------------- validity


def is_valid(text: str, structure: Spec) -> bool:
    """Tell whether the whole text has the structure, and nothing stands around it."""
    if "regex" in structure:
        return re.fullmatch(structure["regex"], text) is not None
    return _is_of_schema(text, structure, strict=True)


def breaks_by_control_characters(text: str, structure: Spec) -> bool:
    """Tell whether unescaped control characters in strings, which JSON forbids, are all its fault.

    JSON: RFC 8259, section 7.
    """
    return (
        "json" in structure
        and not is_valid(text, structure)
        and _is_of_schema(text, structure, strict=False)
    )


def _is_of_schema(text: str, structure: Spec, *, strict: bool) -> bool:
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

    @property
    def kept(self) -> list[Kept]:
        """The answers by how they were asked for."""
        by_how = {how: [g for g in self.groups if g.how == how] for how in get_args(How)}
        return [
            _kept(how, sum(g.valid for g in groups), sum(g.asked for g in groups))
            for how, groups in by_how.items()
            if groups
        ]

    @property
    def with_control_characters(self) -> list[AnswerCounts]:
        """The imposed answers that these alone broke."""
        return [g for g in self.groups if g.how == "imposed" and g.control_characters]

    @property
    def passed(self) -> bool | None:
        """Whether no whole answer broke an imposed structure; None where none was valid."""
        imposed = [g for g in self.groups if g.how == "imposed"]
        if any(g.broken for g in imposed):
            return False
        return True if any(g.valid for g in imposed) else None


def _kept(how: How, valid: int, asked: int) -> Kept:
    low = scipy.stats.binomtest(valid, asked).proportion_ci(method="exact").low
    return Kept(how, valid, asked, Quantity(float(low), "share"))


def validity(run: Context) -> Validity:
    groups: dict[tuple[str, How, str | None], list[Mapping[str, Any]]] = {}
    for variant in run.lab.variants:
        probe = run.folder.probe_result("structures", variant.name) or {"answers": []}
        for answer in probe["answers"]:
            backend = variant.name if answer["how"] == "imposed" else None
            groups.setdefault((answer["form"], answer["how"], backend), []).append(answer)
    counts = [_counted(*group, answers) for group, answers in groups.items()]
    order = get_args(How)
    counts.sort(key=lambda of: (FORMS.index(of.form), order.index(of.how)))
    return Validity(tuple(counts))


def _counted(
    form: str, how: How, backend: str | None, answers: Sequence[Mapping[str, Any]]
) -> AnswerCounts:
    valid = [is_valid(a["text"], a["structure"]) for a in answers]
    cut_off = [a["finish"] == "length" for a in answers]
    return AnswerCounts(
        form,
        how,
        backend,
        asked=len(answers),
        valid=sum(valid),
        cut_off=sum(cut and not is_whole for cut, is_whole in zip(cut_off, valid, strict=True)),
        tokens=Quantity(fmean(a["tokens"] for a in answers)),
        control_characters=sum(
            breaks_by_control_characters(a["text"], a["structure"]) for a in answers
        ),
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


def batch_masks_s(run: Context, point: Point) -> Quantity:
    """Compute the seconds of a batch's masks from the study."""
    study, structure = run.run.about.get("masks", {}), point.workload.structure
    timed = study.get("backends", {}).get(point.variant.name)
    if structure is None or not timed or structure.form not in timed["forms"]:
        return _seconds(None)
    users, each_s = point.load.users, timed["forms"][structure.form]["mask_s"]
    return _seconds(users * each_s / mask_threads(users, study["processors"]))


def _seconds(value: float | None) -> Quantity:
    return Quantity.missing("not timed", "s") if value is None else Quantity(float(value), "s")


def overhead(run: Context) -> Overhead:
    asked = {
        p.workload.name: p
        for p in run.points
        if p.workload.structure and not p.workload.structure.imposed
    }
    return Overhead(
        tuple(
            Step(
                p.variant.name,
                p.workload.name,
                p.load.users,
                run.quantity(p, "tpot_mean_s"),
                run.quantity(asked.get(p.workload.name.replace("imposed", "asked")), "tpot_mean_s"),
                batch_masks_s(run, p),
            )
            for p in run.points
            if p.workload.structure and p.workload.structure.imposed and p.output_tokens > 1
        )
    )


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
        return max(self.rows, key=_later_s, default=None)

    @property
    def shortest(self) -> FirstToken | None:
        return min(self.rows, key=_later_s, default=None)

    @property
    def timed(self) -> int | None:
        """How many structures each median is of, at least."""
        return min((row.timed for row in self.rows), default=None)


def _later_s(row: FirstToken) -> float:
    return row.later_s.value or 0.0


def first_token(run: Context) -> FirstTokens:
    study = run.run.about.get("masks", {}).get("backends", {})
    rows = []
    for variant in run.lab.variants:
        probe = run.folder.probe_result("structures", variant.name) or {"took": []}
        for form in FORMS:
            if took := [t for t in probe["took"] if t["form"] == form]:
                timed = study.get(variant.name, {}).get("forms", {}).get(form)
                rows.append(
                    FirstToken(
                        variant.name,
                        form,
                        len(took),
                        _seconds(np.median([t["unseen_s"] for t in took])),
                        _seconds(np.median([t["seen_s"] for t in took])),
                        _seconds(timed and timed["compile_s"]),
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
    backends = study.get("backends", {})
    alone = next((p for p in run.points if p.workload.name == "asked-alone"), None)
    one_s = run.quantity(alone, "tpot_mean_s").value
    return Masks(
        tuple(
            TimedForm(
                backend,
                form,
                _seconds(timed["compile_s"]),
                _seconds(timed["again_s"]),
                _seconds(timed["mask_s"]),
                most_hidden=int(one_s / timed["mask_s"]) if one_s else None,
            )
            for backend, result in backends.items()
            for form, timed in result["forms"].items()
        ),
        {name: result["error"] for name, result in backends.items() if result["error"]},
        study.get("vocabulary"),
    )


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Facts:
    validity: Validity | None
    overhead: Overhead | None
    first_token: FirstTokens | None
    masks: Masks | None
    is_forecast: bool  # what the plot shows


def facts(run: JudgedRun) -> Facts:
    return Facts(
        validity(run) if run.finds("validity") else None,
        overhead(run) if run.finds("overhead") else None,
        first_token(run) if run.finds("first-token") else None,
        masks(run) if run.finds("masks") else None,
        bool(run.summary.in_virtual_time),
    )
