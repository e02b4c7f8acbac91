"""A comparison as a person reads it: tables for the terminal, Markdown with a plot, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from labs.comparing.compare import Comparison, Row, VerdictPair
from labs.filing import manifest
from labs.filing.manifest import Fact
from labs.judging.judge import Caveat, Interval
from labs.judging.text import number, times_with_interval
from labs.telling import markdown, plots
from labs.telling.document import (
    Bullets,
    Figure,
    Inline,
    Section,
    Strong,
    Table,
    bullets,
    parse,
    section,
    table,
    table_of,
)
from serving import whole


def document(
    found: Sequence[Comparison],
    refused: Sequence[str],
    figures: Mapping[str, Figure] | None = None,
) -> Section:
    """Every comparison and what was not compared, with a figure (lab -> figure) where one is."""
    return section(
        "Compared",
        *(
            section(
                comparison.lab,
                headline(comparison),
                (figures or {}).get(comparison.lab),
                *tables(comparison),
            )
            for comparison in found
        ),
        section("Not compared", bullets(refused)),
    )


def headline(found: Comparison) -> Bullets:
    """What was compared, and how it came out."""
    rows = [*found.rows, *found.effects]
    count = {o: sum(r.outcome == o for r in rows) for o in ("same", "differs", "undecided")}
    lines = [f"A: {found.a}", f"B: {found.b}"]
    if found.differences:
        first = manifest.likeliest_cause(found.differences, ("in A", "in B"))
        lines.append(f"What differs in how they were run, the likeliest to matter first: {first}.")
    if found.forced:
        lines.append(f"NOT COMPARABLE, and compared all the same: {found.forced}.")
    lines.append(
        f"Figures: {count['same']} the same, {count['differs']} differ, {count['undecided']}"
        " undecided."
    )
    if found.left_out:
        lines.append(
            f"Other hardware: {found.left_out} absolute figures are not compared, only those"
            " without a dimension."
        )
    how = "paired by repeat, the same requests" if found.paired else "Welch's, other requests"
    lines.append(f"Ratios are B / A with 95 % intervals ({how}).")
    return bullets(lines)


def tables(found: Comparison) -> list[Section]:
    """A section for each table that has rows."""
    mark = f" (FORCED: {found.forced})" if found.forced else ""
    titled = {
        "Verdicts": verdict_table(found.verdicts),
        "Effects": figure_table(found.effects),
        "Figures": figure_table(found.rows),
        "Validity": validity_table(found.caveats),
        "What differs in how they were run": difference_table(found.differences),
    }
    return [section(name + mark, table) for name, table in titled.items() if table.rows]


def difference_table(differences: Sequence[Fact]) -> Table:
    """What the two manifests have otherwise."""
    return table_of(manifest.table(differences, ("A", "B")))


def figure_table(rows: Sequence[Row]) -> Table:
    """Each figure of A and of B with their ratio and what it says."""
    out: list[list[Inline]] = []
    for row, where in zip(rows, _places([r.where for r in rows]), strict=True):
        ratio = row.contrast.ratio if row.contrast else None
        known = ratio is not None and ratio.low is not None and ratio.high is not None
        out.append(
            [
                row.title,
                where,
                number(row.a, row.unit),
                number(row.b, row.unit),
                f"{ratio.value:.2f}x" if ratio else "–",
                f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio and known else "–",
                (row.outcome, (" (", parse(row.why), ")") if row.why else ""),
            ]
        )
    return table(("Figure", "Where", "A", "B", "B / A", "95 % interval", "Outcome"), out)


def _places(wheres: Sequence[str]) -> list[str]:
    """Points, or pairs of them, without the parts of their names that never vary."""
    points = [point.split("/") for where in wheres for point in where.split(" / ")]
    varied = [i for i, parts in enumerate(zip(*points, strict=True)) if len(set(parts)) > 1]

    def short(point: str) -> str:
        parts = point.split("/")
        return " ".join(parts[i] for i in varied or [-1])

    return [" / ".join(short(p) for p in where.split(" / ")) for where in wheres]


def verdict_table(verdicts: Sequence[VerdictPair]) -> Table:
    """Each claim's verdict in A and in B, and whether the two agree."""
    rows: list[list[Inline]] = []
    places = _places([v.where for v in verdicts])
    for v, where in zip(verdicts, places, strict=True):
        agreement = "agree" if v.agrees else Strong("flips") if v.flips else "not confirmed"
        a, b = (decided(*of) for of in ((v.a, v.a_ratio), (v.b, v.b_ratio)))
        rows.append([parse(v.title), where, a, b, agreement])
    return table(("Claim", "Where", "A", "B", ""), rows)


def decided(outcome: str, ratio: Interval | None) -> str:
    return (
        outcome
        if ratio is None or ratio.low is None
        else f"{outcome}, {times_with_interval(ratio)}"
    )


def validity_table(side_caveats: Mapping[str, Sequence[Caveat]]) -> Table:
    """Each side's caveats, once a name."""
    rows: list[list[Inline]] = []
    for name, caveats in side_caveats.items():
        grouped: dict[str, list[Caveat]] = {}
        for caveat in caveats:
            grouped.setdefault(caveat.name, []).append(caveat)
        for what, members in grouped.items():
            where = f"{len(members)} points" if len(members) > 1 else members[0].point or "the run"
            weight = " (no verdict there)" if any(c.blocks for c in members) else ""
            rows.append([name, what + weight, where, parse(members[0].text)])
        if not caveats:
            rows.append([name, "every check passed", "", ""])
    return table(("Side", "Caveat", "Where", "Text"), rows)


def write(found: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    """As Markdown, each lab's ratios drawn in a file beside it."""
    figures = {}
    for comparison in found:
        file = path.with_name(f"{path.stem}-{comparison.lab}.svg")
        if plots.ratios(
            [(f"{r.title}, {where}", i, r.outcome == "differs")
             for r, where, i in drawable(comparison)], file
        ):  # fmt: skip
            mark = f" FORCED: {comparison.forced}." if comparison.forced else ""
            caption = f"Each figure, B / A, with its 95 % interval.{mark}"
            figures[comparison.lab] = Figure(file.name, caption)
    whole.write(path, markdown.document(document(found, refused, figures)))


def drawable(found: Comparison) -> list[tuple[Row, str, Interval]]:
    """Rows with an interval, where each is, and its ratio; what claims compare comes first."""
    rows = [*found.effects, *found.rows]
    return [
        (row, where, row.contrast.ratio)
        for row, where in zip(rows, _places([r.where for r in rows]), strict=True)
        if row.contrast and row.contrast.ratio.low is not None
    ]


def plain(found: Sequence[Comparison], refused: Sequence[str]) -> str:
    """As JSON."""
    return json.dumps(
        {"comparisons": [c.model_dump(mode="json") for c in found], "refused": list(refused)},
        indent=1,
    )
