"""Build the report of a run as a document, one function for each section, and write report.md.

No figure is computed here: numbers come from summary.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from labs.harness.facts.parts import published_of
from labs.harness.facts.published import Part
from labs.harness.filing.manifest import is_stale
from labs.harness.filing.results import (
    AT,
    PointForecasts,
    Predictions,
    Residency,
    Run,
    RunFolder,
    Session,
    Summary,
    measured_elsewhere,
)
from labs.harness.judging.judge import Caveat
from labs.harness.judging.machine_speed import MachineSpeed, at_forecast
from labs.harness.judging.metrics import METRICS, main_columns
from labs.harness.judging.text import (
    ADMISSION_BY_CLIENT,
    claim_outcome,
    decided_text,
    number,
    one_load,
    point_label,
    predictions_text,
    ratio_interval,
    ratio_number,
    ratio_text,
    verdict_text,
)
from labs.harness.judging.validity import BLOCKED, OVER_REQUESTS
from labs.harness.page import lesson
from labs.harness.questions import QUESTIONS
from labs.harness.spec import Lab, Point, Prediction
from labs.harness.telling import markdown, method, tables
from labs.harness.telling.document import (
    Block,
    Code,
    Emphasis,
    Figure,
    Inline,
    Notes,
    Paragraph,
    Section,
    Strong,
    Table,
    bullets,
    joined,
    parse,
    section,
    without_constant_columns,
    without_empty_columns,
)
from labs.harness.telling.forecasts import on_two_engines
from labs.harness.telling.residuals import median_distance
from labs.harness.telling.words import Told, ToldFinding, told
from serving import whole
from serving.hardware.gpus import admits_one_process

THEIRS = "Published by others, for their models on their hardware; no verdict depends on it:"
VERDICTS = parse(
    "A measured ratio is treatment / baseline, of geometric means over the repeats, with a 95%"
    " interval: Welch's, but for claims whose requests took turns. A claim *helps* or *hurts* if"
    " the interval excludes 1 and the ratio exceeds the claim's margin (5% where the claim names"
    " no other, stated before measuring). It has *no effect* if the whole interval is within that"
    " margin, and is *inconclusive* otherwise. A prediction p *held* if the 90% interval lies"
    " within p / 1.25 and 1.25 p (two one-sided tests at 5%), is *refuted* if the interval lies"
    " wholly outside, and is *open* otherwise. A bound is *not broken*, *broken* or *open* by the"
    " same rule. A prediction is *trivial* if p is 1 within the claim's margin."
)
OTHER_SETTINGS = (
    "This explains the lab as it is now. Its settings have changed since this run: margins, sizes"
    " and claims may have been others."
)
MOST_POINTS_NAMED = 6  # of a caveat that withholds no verdict; more are counted
TTFT_TWICE = (
    "TTFT from the send, over every request of the trial, warm-up included. The client's is longer"
    " by the time for transport, HTTP parsing and tokenizing:"
)


@dataclass(frozen=True)
class Facts:
    """Holds what a report is written from: the typed files of a run, read once."""

    run: Run
    lab: Lab
    points: Sequence[Point]
    predictions: Predictions
    session: Session | None
    summary: Summary
    residency: Residency | None = None

    @cached_property
    def told(self) -> Told:
        """What the lab's page says of the run."""
        return told(self.run, self.lab, self.summary)

    @classmethod
    def of(cls, folder: RunFolder) -> Facts:
        run = folder.run()
        return cls(
            run,
            run.rebuilt_lab(),
            run.points(),
            folder.predictions(),
            folder.session(),
            folder.summary(),
            folder.residency(),
        )


def draw(folder: RunFolder, save: bool = True) -> list[Figure]:
    """Draw the plots anew from the files of a run; return them with their captions."""
    from labs.harness.telling import plots  # imports matplotlib, which few commands draw with

    facts = Facts.of(folder)
    for old in folder.path.glob("*.svg") if save else ():
        old.unlink()
    return plots.draw(folder, facts.lab, facts.points, facts.summary, save)


def write(folder: RunFolder, figures: Sequence[Figure] | None = None) -> Path:
    """Write report.md from the files of a run; draw the plots first, unless `draw` just has."""
    drawn = draw(folder) if figures is None else figures
    text = markdown.document(document(Facts.of(folder), drawn))
    return whole.write(folder.path / "report.md", text)


def document(facts: Facts, figures: Sequence[Figure]) -> Section:
    """Build the whole report."""
    run, lab = facts.run, facts.lab
    weights = ", with random weights" if run.dummy else ""
    limits = lab.limits.get(run.machine.kind)
    return section(
        (parse(lab.title), f" on {run.machine.describe()}{weights}"),
        Paragraph(Emphasis(parse(lab.question))),
        Notes(tuple(notes(run, facts.summary))),
        answer(facts),
        _how_it_works(run),
        _claims(facts, figures),
        _every_point(facts),
        _in_virtual_time(facts),
        on_two_engines(lab, before) if (before := facts.predictions.in_virtual_time) else None,
        _forecasts(facts),
        *(_finding(lab, finding) for finding in facts.told.findings),
        section(
            "What this machine can and cannot show", Paragraph(parse(limits)) if limits else None
        ),
        section("What to turn next", bullets(_knob(text) for text in lab.next_knobs)),
        _validity(facts),
        _machine_speed(facts),
        _agreement(facts),
        _method(facts),
    )


def digest(facts: Facts) -> Section:
    """Build what a terminal shows of a run that has just ended; the report has the rest."""
    lab, summary = facts.lab, facts.summary
    return section(
        parse(lab.title),
        Notes(tuple(notes(facts.run, summary))),
        section("Every point", tables.points(facts.points, lab, summary, main_columns())),
        answer(facts),
        section("Claim by claim", _score(summary), _claims_in_sentences(summary)),
        section(
            "Forecast beside measured",
            Paragraph(forecast_score(summary)) if summary.in_virtual_time else None,
        ),
        *(
            section(finding.title, *(b for b in finding.blocks if not isinstance(b, Table)))
            for finding in facts.told.findings
        ),
        section(
            "Validity",
            validity(summary.caveats, lab, len(summary.failed)),
            measured_again(summary),
        ),
    )


# ---------------------------------------------------------------------------------- before figures


def notes(run: Run, summary: Summary) -> list[Inline]:
    """Say what a reader must know before the first figure."""
    result: list[Inline] = []
    if run.dummy:
        result.append(
            f"Random weights in the architecture of {run.model}: speed, memory and scheduling are"
            " real; the text is not, so quality is not measured."
        )
        result += [("Left out: ", parse(what), ".") for what in run.lab.get("left_out", ())]
    if other := measured_elsewhere(run):
        result.append(
            f"Ceilings, and the bounds, MBU and MFU that rest on them, are those of another CPU"
            f" that bears the same name: {other.describe()}."
        )
    if run.lab.get("admission_by_client"):
        result.append(f"The limits are the client's: {ADMISSION_BY_CLIENT}")
    if (processes := run.lab.get("load_processes", 1)) > 1:
        result.append(f"Load processes on this machine: {processes}.")
    if summary.failed:
        result.append(f"Trials that failed: {len(summary.failed)}. This run is not complete.")
    if summary.missing:
        result.append(f"Trials not played: {summary.missing}. This run is not complete.")
    if run.quick:
        result.append("QUICK run: few and short repeats. A smoke test, not a benchmark.")
    if run.aa:
        alarms = sum(j.outcome in ("helps", "hurts") for j in summary.judgements)
        result.append(
            f"A/A run: an engine against an identical twin, so every difference is noise. False"
            f" alarms: {alarms} of {len(summary.judgements)}."
        )
    if run.changes:
        changed = ", ".join(f"{k}={v}" for k, v in run.changes.items())
        result.append(f"Ad hoc run ({changed}): it stays out of summary tables.")
    judged = {j.claim for j in summary.judgements}
    if unanswered := [c["name"] for c in run.lab["claims"] if c["name"] not in judged]:
        result.append(f"Claims for which this run has no points: {', '.join(unanswered)}.")
    if run.endpoint:
        result.append(f"Measured on the endpoint {run.endpoint}, which this lab did not configure.")
        if run.replicas:
            result.append(f"The engine's counts are the sums of: {', '.join(run.replicas)}.")
        if run.load_workers:
            result.append(f"Load processes on other machines: {run.load_workers}.")
    return result


def answer(facts: Facts) -> Section:
    """Answer each question of the lab in plain words."""
    told = facts.told
    left_out = f"This run does not answer it. Left out: {'; '.join(facts.lab.left_out)}."
    blocks: list[Block] = []
    items: list[Inline] = []  # of the list that is not among the blocks yet
    for id in facts.lab.answers if not facts.lab.aa else ():  # its twin answers nothing
        why = f" ({told.unanswered[id]})" if told.unanswered.get(id) else ""
        lacks = f"This run lacks valid figures that would answer it{why}: see *Validity*."
        missing = Paragraph(parse(left_out if facts.lab.absent else lacks))
        first, *rest = told.answers.get(id) or (missing,)
        content = first if isinstance(first, Paragraph) else ""
        items.append((Strong(QUESTIONS[id]), f" ({id}) ", content))
        if rest:
            blocks += [bullets(items), *rest]
            items = []
    return section("The answer", *blocks, bullets(items))


def _how_it_works(run: Run) -> Section:
    """Explain the mechanism as the lab does now, and say where its settings were others then."""
    paragraphs = lesson(str(run.lab["name"]))
    differs = bool(paragraphs) and not run.ad_hoc and is_stale(run)
    return section(
        "How it works",
        Paragraph(Emphasis(OTHER_SETTINGS)) if differs else None,
        *(Paragraph(parse(text)) for text in paragraphs),
    )


# ------------------------------------------------------------------------------ claims and figures


def _claims(facts: Facts, figures: Sequence[Figure]) -> Section:
    lab, summary = facts.lab, facts.summary
    return section(
        "Claim by claim",
        _score(summary),
        without_empty_columns(tables.claims(lab, summary)),
        Paragraph(VERDICTS),
        Paragraph(method.covers(lab, facts.session, summary.judgements)),
        *_published(lab, "claims", {j.claim: j.title for j in summary.judgements}),
        *figures,
    )


def _claims_in_sentences(summary: Summary) -> Block:
    return bullets(
        (
            parse(j.title),
            ": ",
            Strong(parse(verdict_text(j))),
            f", {METRICS[j.metric].title} {ratio_text(j)} ({ratio_interval(j)}), predicted"
            f" {ratio_number(j.prediction.value)}x ({claim_outcome(j)}).",
        )
        for j in summary.judgements
    )


def _score(summary: Summary) -> Paragraph | None:
    """Say how many claims are decided, and what became of their predictions."""
    judged = summary.judgements
    return (
        Paragraph(
            f"Claims decided: {decided_text(judged)}. Predictions: {predictions_text(judged)}."
        )
        if judged
        else None
    )


def _every_point(facts: Facts) -> Section:
    lab = facts.lab
    columns = (
        f"Figures are means over {method.repeats(lab, facts.summary)}, in windows of"
        f" {lab.window_s:g} s."
        " Percentiles are those of the samples of all repeats together, left out where the samples"
        " are too few. TTFT is the time to a request's first token, TPOT its time per token after"
        " that, ITL the gap before each token, E2E the whole request. Goodput is requests/s with"
        " TTFT up to"
        f" {number(lab.slo.ttft_s, 's')} and TPOT up to {number(lab.slo.tpot_s, 's')}. MBU is"
        " the memory bandwidth that decode used, MFU the FLOP/s that prefill and decode used, each"
        " as a share of this machine's measured ceiling."
    )
    load = one_load(lab)
    has_server = any(
        facts.summary.value(p.key, "server_core_share") is not None for p in facts.points
    )
    varying_columns, same = without_constant_columns(
        tables.points(facts.points, lab, facts.summary), keep=("Point",)
    )
    return section(
        "Every point",
        Paragraph(f"Every point has the same load: {load}.") if load else None,
        varying_columns,
        same,
        Paragraph(columns),
        Paragraph(SERVER) if has_server else None,
    )


def _published(lab: Lab, part: Part, titles: Mapping[str, str]) -> list[Block]:
    """Show what others published on these parts of the lab (name -> title), if anything."""
    lines = _published_lines(lab, part, titles)
    return [Paragraph(THEIRS), bullets(lines)] if lines else []


def _published_lines(lab: Lab, part: Part, titles: Mapping[str, str]) -> list[Inline]:
    """Say each published figure with its setting and source."""
    return [
        (parse(title), f": {'; '.join(map(str, figures))}")
        for name, title in titles.items()
        if (figures := published_of(lab.name, part, name))
    ]


# ------------------------------------------------------------------------ predictions and findings

IN_VIRTUAL_TIME = (
    " Before any engine started, vLLM's own scheduler played each point in virtual time, with the"
    " arguments that the engine was then started with and the requests that were then sent. The"
    " time of a step comes from a stand-in of the model's shape, timed on this machine beforehand."
    " The band spans steps that take 0.90 to 1.18 times as long as the stand-in's. {} The slow end"
    " is moved out by how much the speed changed while the stand-in was timed, and both ends by"
    " chance between trials."
)
USUAL_CHANGE = (
    "Both ends are moved out by the usual change of this machine's speed, a factor of {:.2f}."
)
UNKNOWN_CHANGE = (
    "How much this machine's speed usually changes was not known then, and is not in the band."
)


SERVER = (
    "The API server's share of a core is the CPU time in the window of the process that takes"
    " requests in and sends tokens out, the busiest where there are several. A process of Python"
    " can use hardly more than one core: near 100%, the other figures show its limit and not the"
    " engine's."
)


KV_USE = (
    "The KV cache in use is the share of its blocks that requests hold, over the window. The"
    " forecast has it after every step; measured is the engine's own gauge, which Prometheus reads"
    " once a second, so that a shorter peak may be missed."
)


def _bands_explained(machine_spread: float) -> str:
    """Say what the forecasts and their bands are made of."""
    known = USUAL_CHANGE.format(machine_spread)
    return IN_VIRTUAL_TIME.format(known if machine_spread > 1 else UNKNOWN_CHANGE)


def _in_virtual_time(facts: Facts) -> Section:
    """Show the forecasts beside what was measured, and which points have none."""
    before = facts.predictions.in_virtual_time
    if before is None:
        return section("Forecast beside measured")
    without = [(Code(name), f": {why}") for name, why in before.without.items()]
    varying_columns, same = without_constant_columns(
        tables.forecast_beside_measured(facts.lab, facts.summary), keep=("Forecast", "Measured")
    )
    return section(
        "Forecast beside measured",
        varying_columns,
        same,
        Paragraph(forecast_score(facts.summary) + _bands_explained(before.machine_spread))
        if before.points
        else None,
        tables.closed_forms(facts.lab, facts.summary, facts.predictions),
        tables.kv_use(facts.lab, before, facts.summary.kv_use),
        Paragraph(KV_USE) if before.kv_use else None,
        Paragraph("No forecast:") if without else None,
        bullets(without),
    )


def forecast_score(summary: Summary) -> str:
    """Say in a sentence how near the forecasts came."""
    shown = [f for f in summary.in_virtual_time if METRICS[f.metric].forecast == "shown"]
    shares = [f.share for f in shown if f.share is not None]
    if not shares:
        return "Nothing was measured beside the forecasts."
    within = sum(bool(f.within) for f in shown if f.share is not None)
    return (
        f"{within} of {len(shares)} measured figures lie within their band; their median distance"
        f" from the forecast is {median_distance(shares)}."
    )


def _forecasts(facts: Facts) -> Section:
    lab = facts.lab
    varying_columns, same = without_constant_columns(
        tables.forecasts(lab, facts.summary), keep=("Where", "Measured", "Predicted")
    )
    return section(
        "Predicted beside measured",
        varying_columns,
        same,
        bullets(formulas(lab, facts.predictions)),
        *_published(lab, "forecasts", {f.name: METRICS[f.metric].title for f in lab.forecasts}),
    )


def formulas(lab: Lab, predictions: Predictions) -> list[Inline]:
    """Say each formula once: what it predicts, its source, what it assumes.

    What only one claim assumes is said with the title of that claim.
    """
    predicted = [
        (f"{METRICS[c.metric].title}, treatment / baseline", c.title, p)
        for c in lab.claims
        for p in predictions.effects[c.name].values()
    ] + [
        (METRICS[f.metric].title, "", p)
        for f in lab.forecasts
        for p in predictions.forecasts[f.name].values()
    ]
    predicted += [(what.partition(AT)[0], "", p) for what, p in predictions.arithmetic.items()]
    uses_of: dict[tuple[str, str, str], list[tuple[str, Prediction]]] = {}
    for what, title, p in predicted:
        uses_of.setdefault((what, p.formula, p.source), []).append((title, p))
    figures_of: dict[tuple[Inline, ...], list[str]] = {}  # a formula may predict several figures
    for (what, formula, source), uses in uses_of.items():
        description = (Code(formula), f" ({source})" if source else "", _assumptions(uses))
        figures_of.setdefault(description, []).append(what)
    return [
        (f"{'; '.join(figures)}: ", *description) for description, figures in figures_of.items()
    ]


def _assumptions(uses: Sequence[tuple[str, Prediction]]) -> Inline:
    """Say what every use of a formula assumes, then what one claim alone assumes."""
    assumptions = [p.assumptions for _, p in uses]
    shared = [text for text in assumptions[0] if all(text in other for other in assumptions)]
    own = dict.fromkeys(
        (title, text) for title, p in uses for text in p.assumptions if text not in shared
    )
    assumed: list[Inline] = [parse(text) for text in shared]
    assumed += [("for ", Emphasis(parse(title)), " ", parse(text)) for title, text in own]
    return ("; assumes: ", joined(assumed, "; ")) if assumed else ""


def _finding(lab: Lab, finding: ToldFinding) -> Section:
    published = _published_lines(lab, "findings", {finding.name: "published by others"})
    return section(finding.title, *finding.blocks, bullets(published))


# ------------------------------------------------------------------------------------------- trust


def _agreement(facts: Facts) -> Section:
    ttft = tables.ttft_at_both_ends(facts.points, facts.lab, facts.summary)
    return section(
        "Do client and server agree?",
        tables.agreement(facts.session),
        Paragraph(TTFT_TWICE) if ttft else None,
        ttft,
        folded=True,
    )


def _validity(facts: Facts) -> Section:
    failed = facts.summary.failed
    return section(
        "Validity",
        validity(facts.summary.caveats, facts.lab, len(failed)),
        measured_again(facts.summary),
        Paragraph("Trials that failed (their figures are missing, not zero):") if failed else None,
        bullets((Code(key), f": {why.splitlines()[0]}") for key, why in failed.items()),
        folded=not facts.summary.caveats and not failed,
    )


def validity(caveats: Sequence[Caveat], lab: Lab, failed: int = 0) -> Block:
    """Say each weakness once, with its points and whether it blocks; or that every check passed."""
    if not caveats:
        where = " in the trials that did not fail" if failed else ""
        return Paragraph(
            f"Every check passed{where}: requests sent on time, no event-loop lag, no errors,"
            " lengths as requested, client and engine agree on requests, tokens and TTFT, nothing"
            " else used the machine, no trend within a window, and the engine showed each variant's"
            " treatment as strongly as predicted."
        )
    groups: dict[tuple[str, bool], list[Caveat]] = {}
    for caveat in caveats:
        groups.setdefault((caveat.name, caveat.blocks), []).append(caveat)
    items: list[Inline] = []
    for (name, blocks), members in groups.items():
        points = list(dict.fromkeys(point_label(c.point, lab) for c in members if c.point))
        many = len(points) > MOST_POINTS_NAMED and not blocks
        where = f"{len(points)} points" if many else "; ".join(points)
        weight = "no verdict there" if blocks else "caveat"
        if blocks and members[0].metrics:
            weight = f"no verdict on {_figures(members[0].metrics)} there"
        one = "for example, " if len({m.text for m in members}) > 1 else ""
        items.append(
            (Strong(name), f" ({weight}; {where or 'the run'}): {one}", parse(members[0].text))
        )
    return bullets(items)


def _machine_speed(facts: Facts) -> Section:
    """Show the reference steps beside the trials; in a run that timed none, why, if it is known."""
    title, speed = "The machine's own speed", facts.summary.machine_speed
    compute_mode = facts.run.environment.compute_mode
    if speed is None and admits_one_process(compute_mode):
        return section(
            title,
            Paragraph(
                f"It was not timed: the GPU's compute mode is {compute_mode}, so that the engine"
                " alone could use it."
            ),
            folded=True,
        )
    if speed is None:
        return section(title)
    return section(
        title,
        tables.machine_speed(speed),
        Paragraph(
            "The reference step is the same short work each time, on the engine's device, timed"
            f" before and after every trial ({speed.steps} times): reading a block larger than the"
            " caches, and a product of two matrices. Longer times mean a slower machine, whatever"
            " was being measured. The trend is the change from the first trial to the last, by a"
            " fitted line." + _at_forecast(facts.predictions.in_virtual_time, speed)
        ),
        folded=True,
    )


def _at_forecast(before: PointForecasts | None, trials: MachineSpeed) -> str:
    """Say how much slower or faster the machine was while the forecasts' stand-in was timed."""
    ratios = at_forecast(before.references if before else (), trials)
    if not ratios:
        return ""
    parts = " and ".join(f"{part} took {ratio:.2f} times" for part, ratio in ratios.items())
    return (
        f" While the forecasts' stand-in was timed, {parts} as long as in the median beside the"
        " trials; a forecast knows nothing of how the machine's speed changes after it."
    )


def _figures(names: Sequence[str]) -> str:
    """Word which figures a caveat is about."""
    return next((words for words, known in BLOCKED.items() if {*names} <= {*known}), OVER_REQUESTS)


def measured_again(summary: Summary) -> Paragraph | None:
    """Count the trials that were measured again because they were disturbed, with the reasons."""
    if not summary.measured_again:
        return None
    attempts = list(summary.measured_again.values())
    reasons = Counter(name for tried in attempts for names in tried for name in names.split(", "))
    counted = ", ".join(f"{name} ({n})" for name, n in reasons.most_common())
    twice = sum(len(tried) > 1 for tried in attempts)
    also = f", {twice} of them twice" if twice else ""
    return Paragraph(
        f"Trials that were disturbed and therefore measured again, whatever their figures:"
        f" {len(attempts)}{also}. Reasons: {counted}."
    )


def _knob(text: str) -> Inline:
    """Show `SET="..." explanation` with the setting as code; a quoted setting may hold spaces."""
    setting = re.match(r"""\w+=("[^"]*"|'[^']*'|\S+)""", text)
    return (Code(setting[0]), parse(text[setting.end() :])) if setting else parse(text)


def _method(facts: Facts) -> Section:
    ceilings = tables.ceilings(facts.run.machine, facts.run.ceilings)
    beside = "This machine's ceilings beside its datasheet:"
    return section(
        "How it was measured",
        bullets(method.lines(facts.run, facts.lab, facts.session, facts.summary, facts.residency)),
        Paragraph(beside) if ceilings else None,
        ceilings,
        folded=True,
    )
