"""Conclude whether answers keep to their structure, and what imposing it costs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import jsonschema
import numpy as np
import scipy

from dashboards.palette import VARIANTS
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import BANDS, GREY, draw_forecasts, plt, reach
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.text import number, sentences
from labs.harness.spec import Point
from loadtests.structures import FORMS, Spec
from serving.forecasting.step import mask_threads

HOW = {
    "free": "not asked for",
    "asked": "asked for in the prompt",
    "imposed": "imposed by the engine",
}

# --------------------------------------------------------------------------------- validity


def is_valid(text: str, structure: Spec) -> bool:
    """Tells whether the whole text has the structure, and nothing stands around it."""
    if "regex" in structure:
        return re.fullmatch(structure["regex"], text) is not None
    return _is_of_schema(text, structure, strict=True)


def breaks_by_control_characters(text: str, structure: Spec) -> bool:
    """Tells whether unescaped control characters in strings, which JSON forbids, are all its fault.

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
    """Counts the whole answers of one form, by one engine, asked for in one way."""

    form: str
    how: str
    backend: str
    asked: int
    valid: int
    cut_off: int  # ended at their most tokens, so that they are not whole
    tokens: float  # mean length
    control_characters: int = 0  # whole, and not valid for nothing but these, unescaped

    @property
    def broken(self) -> int:
        """Answers that ended by themselves and are not valid."""
        return self.asked - self.valid - self.cut_off


@dataclass(frozen=True)
class Validity:
    """Holds what the probes asked for; nothing where they were not asked."""

    groups: tuple[AnswerCounts, ...]

    def of(self, how: str) -> tuple[int, int]:
        """Adds up (valid, asked) of all answers that were asked for in this way."""
        groups = [g for g in self.groups if g.how == how]
        return sum(g.valid for g in groups), sum(g.asked for g in groups)

    @property
    def passed(self) -> bool | None:
        """Tells whether no whole answer broke an imposed structure; None where none was valid."""
        imposed = [g for g in self.groups if g.how == "imposed"]
        if any(g.broken for g in imposed):
            return False
        return True if any(g.valid for g in imposed) else None


def validity(context: Context) -> Validity:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for variant in context.lab.variants:
        probe = context.folder.probe_result("structures", variant.name) or {"answers": []}
        for answer in probe["answers"]:
            backend = variant.name if answer["how"] == "imposed" else ""
            groups.setdefault((answer["form"], answer["how"], backend), []).append(answer)
    return Validity(
        tuple(
            AnswerCounts(
                form=form,
                how=how,
                backend=backend,
                asked=len(answers),
                valid=sum(is_valid(a["text"], a["structure"]) for a in answers),
                cut_off=sum(
                    a["finish"] == "length" and not is_valid(a["text"], a["structure"])
                    for a in answers
                ),
                tokens=fmean(a["tokens"] for a in answers),
                control_characters=sum(
                    breaks_by_control_characters(a["text"], a["structure"]) for a in answers
                ),
            )
            for (form, how, backend), answers in sorted(
                groups.items(), key=lambda g: (FORMS.index(g[0][0]), [*HOW].index(g[0][1]))
            )
        )
    )


def tell_validity(facts: Validity) -> Finding:
    rows = [["Form", "The structure is", "Backend", "Valid", "Cut off", "Whole and not valid",
             "Tokens, mean"]]  # fmt: skip
    rows += [
        [g.form, HOW[g.how], g.backend or "–", f"{g.valid} of {g.asked}", str(g.cut_off),
         str(g.broken), number(g.tokens)]
        for g in facts.groups
    ]  # fmt: skip
    lines = [line] if (line := validity_sentence(facts)) else []
    if line := control_characters_sentence(facts):
        lines.append(line)
    lines.append(
        "An answer is valid if all of it parses and keeps to the schema, or matches the regular"
        " expression. One that reached its token limit is *cut off*: a structure does not help"
        " against a `max_tokens` that is too low. Temperature 0, few prompts. How often an answer"
        " keeps to a form that is not imposed depends on the model."
    )
    return Finding(
        title="Do answers keep to their structure?", rows=rows, lines=lines, passed=facts.passed
    )


def validity_sentence(facts: Validity) -> str | None:
    """Says how many answers are valid in each way of asking, with a bound for imposed ones."""
    parts = [
        f"{HOW[how]} {valid} of {asked}" for how in HOW for valid, asked in [facts.of(how)] if asked
    ]
    valid, asked = facts.of("imposed")
    if not asked:
        return None
    low = scipy.stats.binomtest(valid, asked).proportion_ci(method="exact").low
    return (
        f"Valid answers by how the structure is required: {'; '.join(parts)} (with 95% confidence"
        f" at least {low:.0%} of those with an imposed structure)."
    )


def control_characters_sentence(facts: Validity) -> str | None:
    """Names the backends that let control characters into strings; None where none did."""
    counts = {g.backend: g.control_characters for g in facts.groups if g.how == "imposed"}
    by_backend = [f"{count} by `{name}`" for name, count in counts.items() if count]
    if not by_backend:
        return None
    return (
        "Whole and not valid for nothing but control characters in strings:"
        f" {', '.join(by_backend)}. JSON demands that these are escaped, and a strict parser"
        " refuses the text. Into a string with a `maxLength` xgrammar 0.2.8 admits all of them but"
        " line ends, and no escape (its issue 800); with a `pattern` instead it admits none."
    )


VALIDITY = Conclusion("validity", validity, tell_validity)

# --------------------------------------------------------------------------- the cost of a step


@dataclass(frozen=True)
class Overhead:
    """Compares a step with masks with one without; None where a side was not measured."""

    backend: str
    workload: str
    users: int
    tpot_s: float | None
    without_s: float | None  # the same prompts, nothing imposed; None where there are none
    masks_s: float | None  # of the whole batch, as the study timed them

    @property
    def share(self) -> float | None:
        """The step's growth, as a share of the step without masks."""
        if not self.tpot_s or not self.without_s:
            return None
        return self.tpot_s / self.without_s - 1


def batch_masks_s(context: Context, point: Point) -> float | None:
    """Computes the seconds of a batch's masks from the study; None where it has no figure."""
    study, structure = context.run.about.get("masks", {}), point.workload.structure
    timed = study.get("backends", {}).get(point.variant.name)
    if structure is None or not timed or structure.form not in timed["forms"]:
        return None
    users, each_s = point.load.users, timed["forms"][structure.form]["mask_s"]
    return float(users * each_s / mask_threads(users, study["processors"]))


def overheads(context: Context) -> tuple[Overhead, ...]:
    asked = {
        p.workload.name: context.mean(p, "tpot_mean_s")
        for p in context.points
        if p.workload.structure and not p.workload.structure.imposed
    }
    return tuple(
        Overhead(
            backend=p.variant.name,
            workload=p.workload.name,
            users=p.load.users,
            tpot_s=context.mean(p, "tpot_mean_s"),
            without_s=asked.get(p.workload.name.replace("imposed", "asked")),
            masks_s=batch_masks_s(context, p),
        )
        for p in context.points
        if p.workload.structure and p.workload.structure.imposed and p.output_tokens > 1
    )


def tell_overhead(facts: tuple[Overhead, ...]) -> Finding:
    rows = [["Answers", "Backend", "In flight", "TPOT, mean", "Nothing imposed", "Longer by",
             "Masks of the batch"]]  # fmt: skip
    rows += [
        [
            o.workload, o.backend, str(o.users), number(o.tpot_s, "s"), number(o.without_s, "s"),
            "–" if o.share is None else f"{o.share:+.1%}", number(o.masks_s, "s"),
        ]
        for o in facts
    ]  # fmt: skip
    lines = [line] if (line := hidden_sentence(facts)) else []
    lines.append(
        "*Masks of the batch* is the time to fill them for a step, measured before any engine"
        " started."
        + " Nested and regular structures have prompts of other lengths, which were not sent"
        " without a structure: compare the backends with one another."
        * any(o.without_s is None for o in facts)
        + " The intervals stand with the claims."
    )
    return Finding(title="How much longer is a step?", rows=rows, lines=lines)


def hidden_sentence(facts: tuple[Overhead, ...]) -> str | None:
    """Says whether the slowest masks fit the step that could hide them, which is one without."""
    known = [(o.masks_s, o.without_s, o) for o in facts if o.masks_s is not None and o.without_s]
    if not known:
        return None
    masks_s, without_s, slowest = max(known, key=lambda row: row[0])
    fits = "fit within" if masks_s < without_s else "do not fit within"
    return (
        f"The slowest masks, `{slowest.backend}`'s with {slowest.users} in flight"
        f" (`{slowest.workload}`), take {number(masks_s, 's')} a step and {fits} the"
        f" {number(without_s, 's')} that it takes with nothing imposed."
    )


OVERHEAD = Conclusion("overhead", overheads, tell_overhead)

# ------------------------------------------------------------------------------ the first token


@dataclass(frozen=True)
class FirstToken:
    """Compares first tokens of structures that an engine has not seen with those of seen ones."""

    backend: str
    form: str
    timed: int
    unseen_s: float  # median, as the next one
    seen_s: float
    compile_s: float | None  # by the study

    @property
    def later_s(self) -> float:
        """The seconds by which the first token of an unseen structure is later."""
        return self.unseen_s - self.seen_s


def first_tokens(context: Context) -> tuple[FirstToken, ...]:
    study = context.run.about.get("masks", {}).get("backends", {})
    token_times = []
    for variant in context.lab.variants:
        probe = context.folder.probe_result("structures", variant.name) or {"took": []}
        for form in FORMS:
            took = [t for t in probe["took"] if t["form"] == form]
            if took:
                timed = study.get(variant.name, {}).get("forms", {}).get(form)
                token_times.append(
                    FirstToken(
                        backend=variant.name,
                        form=form,
                        timed=len(took),
                        unseen_s=float(np.median([t["unseen_s"] for t in took])),
                        seen_s=float(np.median([t["seen_s"] for t in took])),
                        compile_s=timed and timed["compile_s"],
                    )
                )
    return tuple(token_times)


def tell_first_tokens(facts: tuple[FirstToken, ...]) -> Finding:
    rows = [["Form", "Backend", "First token, unseen", "First token, seen", "Later by",
             "Compiling, timed beforehand"]]  # fmt: skip
    rows += [
        [f.form, f.backend, number(f.unseen_s, "s"), number(f.seen_s, "s"),
         _signed(f.later_s), number(f.compile_s, "s")]
        for f in sorted(facts, key=lambda f: FORMS.index(f.form))
    ]  # fmt: skip
    lines = [line] if (line := slowest_sentence(facts)) else []
    if facts:
        lines.append(
            f"Medians of {min(f.timed for f in facts)} structures each, one request at a time, by a"
            " client that does not stream, so both columns include the time until the engine has"
            " the request. The first structure of an engine also loads its backend."
        )
    title = "How long does the first answer of an unseen structure wait?"
    return Finding(title=title, rows=rows, lines=lines)


def _signed(value_s: float) -> str:
    return ("-" if value_s < 0 else "+") + number(abs(value_s), "s")


def slowest_sentence(facts: tuple[FirstToken, ...]) -> str | None:
    if not facts:
        return None
    most, least = (pick(facts, key=lambda f: f.later_s) for pick in (max, min))
    return (
        f"The longest wait is `{most.backend}`'s for a {most.form} structure,"
        f" {_signed(most.later_s)}; the shortest `{least.backend}`'s for a {least.form} one,"
        f" {_signed(least.later_s)}."
    )


FIRST_TOKEN = Conclusion("first-token", first_tokens, tell_first_tokens)

# ----------------------------------------------------------------------- what was timed beforehand


@dataclass(frozen=True)
class TimedForm:
    """Holds what the study of masks timed of a backend and a form."""

    backend: str
    form: str
    compile_s: float
    again_s: float
    mask_s: float
    most_hidden: int | None  # sequences whose masks fit the step of one; None: not measured


@dataclass(frozen=True)
class Masks:
    """Holds the whole study; `unusable` maps a backend to why it cannot be used here."""

    forms: tuple[TimedForm, ...]
    unusable: Mapping[str, str]
    vocabulary: int | None


def masks(context: Context) -> Masks:
    study = context.run.about.get("masks", {})
    backends = study.get("backends", {})
    alone = next((p for p in context.points if p.workload.name == "asked-alone"), None)
    one_s = context.mean(alone, "tpot_mean_s") if alone else None
    return Masks(
        forms=tuple(
            TimedForm(
                backend=backend,
                form=form,
                compile_s=timed["compile_s"],
                again_s=timed["again_s"],
                mask_s=timed["mask_s"],
                most_hidden=int(one_s / timed["mask_s"]) if one_s else None,
            )
            for backend, result in backends.items()
            for form, timed in result["forms"].items()
        ),
        unusable={name: result["error"] for name, result in backends.items() if result["error"]},
        vocabulary=study.get("vocabulary"),
    )


def tell_masks(facts: Masks) -> Finding:
    rows = [["Backend", "Form", "Compiling, unseen", "Compiling, seen", "A mask",
             "Masks that one stream's step hides"]]  # fmt: skip
    rows += [
        [f.backend, f.form, number(f.compile_s, "s"), number(f.again_s, "s"),
         number(f.mask_s, "s"), "–" if f.most_hidden is None else number(f.most_hidden)]
        for f in facts.forms
    ]  # fmt: skip
    rows += [[name, "–", "–", "–", "–", "–"] for name in facts.unusable]
    lines = [
        f"`{name}` is not compared: its package does not work with the vLLM that is installed here"
        f" ({reason})."
        for name, reason in facts.unusable.items()
    ]
    if facts.vocabulary:
        lines.append(
            f"Timed alone, with the model's own vocabulary of {facts.vocabulary:,} tokens, before"
            " any engine started; each is the shortest of several structures of that form. The"
            " last column counts masks filled one after another; vLLM distributes more than 128"
            " among threads."
        )
    return Finding(title="What was timed before any engine started", rows=rows, lines=lines)


MASKS = Conclusion("masks", masks, tell_masks)

# ------------------------------------------------------------------------------------ the answers


def constrained_decoding(run: JudgedRun) -> str | None:
    """Answers what structured output costs a step and a first token, and what it buys."""
    many = run.ratio("mask")
    if many is None:
        return None
    users = next((o.users for o in OVERHEAD.facts_of(run) or () if o.workload == "imposed"), None)
    parts = [f"with a schema imposed on {users} answers at once, TPOT is {many} that without one"]
    if alone := run.ratio("mask-alone"):
        parts.append(f"on one answer alone it is {alone}")
    waits = [
        f"{ratio} with {backend}"
        for claim, backend in (
            ("unseen", "xgrammar"), ("unseen-guidance", "guidance"),
            ("unseen-outlines", "outlines"), ("unseen-lm-format-enforcer", "lm-format-enforcer"),
        )
        if (ratio := run.ratio(claim))
    ]  # fmt: skip
    if waits:
        parts.append(f"the first answer of an unseen schema has a TTFT of {', '.join(waits)}")
    validity_facts = VALIDITY.facts_of(run)
    valid = validity_facts and validity_sentence(validity_facts)
    return f"{sentences(parts)} {valid or ''}".strip()


# --------------------------------------------------------------------------------------- its plot


ABOVE: dict[str, Any] = {  # a legend beside the title, where no bar is
    "frameon": False, "loc": "lower right", "bbox_to_anchor": (1, 0.985), "borderaxespad": 0.2,
}  # fmt: skip


def draw_structures(run: JudgedRun) -> str | None:
    """Draws each backend's TTFT of seen and unseen schemas, and its TPOT beside none imposed."""
    names = [v.name for v in run.lab.variants]
    by_name = {(p.variant.name, p.workload.name): p for p in run.points}
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2), gridspec_kw={"wspace": 0.12})
    drawn = [
        *_bars(run, left, names, by_name, ("seen", "unseen"), "ttft_mean_s"),
        *_bars(run, right, names, by_name, ("imposed",), "tpot_mean_s"),
    ]
    if not drawn:
        plt.close(fig)
        return None
    forecast = any(run.forecast(point, metric) for point, metric in drawn)
    left.set_ylabel("TTFT of one request, mean (s)")
    if left.get_legend_handles_labels()[0]:
        left.legend(ncols=2, columnspacing=1, handlelength=1.4, **ABOVE)
    asked = by_name.get((names[0], "asked"))
    level = run.mean(asked, "tpot_mean_s") if asked else None
    if asked and level:
        right.axhline(1e3 * level, ls="--", color=GREY, label="nothing imposed")
        right.legend(**ABOVE)
        right.set_title(f"{asked.load.users} answers at once", loc="left", fontsize=9)
    right.set_ylabel("TPOT, mean (ms)")
    return (
        "What a schema costs: left, the first token of a schema that the engine has seen and of"
        " one that it has to compile; right, the time of a token with a schema imposed on every"
        " answer, beside the same prompts without (dashed)." + BANDS * forecast
    )


def _bars(
    run: JudgedRun, ax: Any, names: list[str], by_name: Mapping[tuple[str, str], Point],
    workloads: tuple[str, ...], metric: str,
) -> list[tuple[Point, str]]:  # fmt: skip
    """Draws a bar for each backend and workload; returns the points and the metric of its bars."""
    scale = 1e3 if metric == "tpot_mean_s" else 1.0
    width = 0.8 / len(workloads)
    drawn: list[tuple[Point, str]] = []
    for i, workload in enumerate(workloads):
        label: str | None = f"schema {workload}" if len(workloads) > 1 else None
        for x, name in enumerate(names):
            point = by_name.get((name, workload))
            measured = run.interval(point, metric) if point else None
            if point is None or measured is None:
                continue
            height = scale * measured.value
            drawn.append((point, metric))
            at = x + (i - (len(workloads) - 1) / 2) * width
            draw_forecasts(ax, [at], [run.forecast(point, metric)], scale, label="")
            ax.bar(at, height, 0.9 * width,
                   yerr=reach([measured], scale), capsize=3, color=VARIANTS[x],
                   alpha=0.45 if workload == "seen" else 1, label=label)  # fmt: skip
            label = None  # once is enough
    ax.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names])
    return drawn


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "mask": (
            Published(
                figure="masks of 9 to 46 us at the median, TPOT up to 5x less than Outlines'",
                source="Dong et al., XGrammar, MLSys 2025",
            ),
            Published(
                figure="589 -> 1,115 tok/s",
                setting="masks filled in batches, H100",
                source="XGrammar",
            ),
        ),
        "unseen": (
            Published(
                figure="xgrammar's first mask three to four orders of magnitude slower",
                setting="than that of llguidance, over many schemas",
                source="MaskBench",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(VALIDITY, OVERHEAD, FIRST_TOKEN, MASKS),
    answers={"SO-6": constrained_decoding},
    plots={"structures": draw_structures},
    published=PUBLISHED,
    headline=Headline(
        claim="mask", done="Imposing a JSON schema on every answer", figure="the time per token"
    ),
)
