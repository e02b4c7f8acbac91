"""Show a comparison to a person: tables for the terminal, Markdown with a plot, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from labs.harness.comparing.comparison import (
    ANSWER_OF_OUTCOME,
    ComparedFigure,
    Comparison,
    MachineProperty,
    Outcome,
    Reproduction,
    VerdictPair,
    counted_outcomes,
    title_of,
)
from labs.harness.filing import manifest
from labs.harness.judging.judge import Caveat, Interval
from labs.harness.judging.machine_speed import relative_speed_text
from labs.harness.judging.text import (
    ONE_SITTING,
    number,
    ratio_ends,
    ratio_number,
    times_with_interval,
)
from labs.harness.telling import markdown
from labs.harness.telling.document import (
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

OTHER_HARDWARE = (
    "Different hardware: only dimensionless figures are compared. MBU and MFU are properties of"
    " each machine."
)


def document(
    comparisons: Sequence[Comparison],
    refused: Sequence[str],
    figures: Mapping[str, Figure] | None = None,
) -> Section:
    """Build a document of comparisons, each with its figure by lab, and what was not compared."""
    return section(
        "Compared",
        *(
            section(
                comparison.lab,
                headline(comparison),
                (figures or {}).get(comparison.lab),
                *tables(comparison),
            )
            for comparison in comparisons
        ),
        section("Not compared", bullets(refused)),
    )


def headline(comparison: Comparison) -> Bullets:
    """Say what was compared, and with what result."""
    outcomes = [row.outcome for row in (*comparison.rows, *comparison.effects)]
    left_out: list[Outcome] = ["not comparable"] * comparison.left_out
    counts = counted_outcomes([*outcomes, *left_out], ANSWER_OF_OUTCOME)
    lines = [f"A: {comparison.a}", f"B: {comparison.b}"]
    if comparison.differences:
        first = manifest.likeliest_cause(comparison.differences, ("in A", "in B"))
        lines.append(f"What differs in how they were run, the likeliest cause first: {first}.")
    if comparison.unrecorded:
        lines.append(f"Recorded in only one of them: {', '.join(comparison.unrecorded)}.")
    if comparison.forced:
        lines.append(f"NOT COMPARABLE, but compared because of FORCE: {comparison.forced}.")
    lines += [f"Figures: {counts}.", *of_machines(comparison, "B's machine", "A's")]
    how = "paired by repeat: same requests" if comparison.paired else "Welch's: other requests"
    lines.append(f"Ratios are B / A with 95% intervals ({how}). {ONE_SITTING}")
    return bullets(lines)


def of_machines(found: Comparison | Reproduction, this: str, other: str) -> list[str]:
    """Say how fast B's machine was beside A's, and what is compared on other hardware."""
    speeds = [f"{relative_speed_text(this, found.speeds, other)}."] if found.speeds else []
    return speeds if found.same_hardware else [*speeds, OTHER_HARDWARE]


def tables(comparison: Comparison) -> list[Section]:
    """Build the tables of a comparison; each says where the two are not comparable."""
    mark = f" (FORCED: {comparison.forced})" if comparison.forced else ""
    figures = {"Effects": comparison.effects, "Figures": comparison.rows}
    return titled_tables(comparison, figures, mark)


def titled_tables(
    found: Comparison | Reproduction,
    figures: Mapping[str, Sequence[ComparedFigure]],
    mark: str = "",
) -> list[Section]:
    """Build a section for each table that has rows, with these figures by the table's title."""
    titled = {
        "Verdicts": verdict_table(found.verdicts),
        **{title: figure_table(rows) for title, rows in figures.items()},
        "Properties of the machines": machine_table(found.of_machines),
        "Validity": validity_table(found.caveats),
        "What differs in how they were run": table_of(
            manifest.table(found.differences, ("A", "B"))
        ),
    }
    return [section(title + mark, table) for title, table in titled.items() if table.rows]


def named_table(rows: Sequence[Mapping[str, Inline]]) -> Table:
    """Tabulate rows whose cells have the names of their columns."""
    return table(list(rows[0]) if rows else (), (list(row.values()) for row in rows))


def figure_table(rows: Sequence[ComparedFigure]) -> Table:
    """Tabulate each figure of A and of B, with their ratio and what it shows."""
    cells: list[dict[str, Inline]] = []
    for row, where in zip(rows, _places([r.where for r in rows]), strict=True):
        ratio = row.contrast.ratio if row.contrast else None
        cells.append(
            {
                "Figure": row.title,
                "Where": where,
                "A": number(row.a, row.unit),
                "B": number(row.b, row.unit),
                "B / A": f"{ratio_number(ratio.value)}x" if ratio else "–",
                "95% interval": ratio_ends(ratio),
                "Outcome": (row.outcome, (" (", parse(row.why), ")") if row.why else ""),
            }
        )
    return named_table(cells)


def machine_table(properties: Sequence[MachineProperty]) -> Table:
    """Tabulate how much of each machine's own limits was reached, from least to most."""
    return named_table(
        [
            {
                "Share of the machine's own limit": title_of(p.figure),
                "Points": str(p.points),
                "A": f"{p.a[0]:.1%} to {p.a[1]:.1%}",
                "B": f"{p.b[0]:.1%} to {p.b[1]:.1%}",
            }
            for p in properties
        ]
    )


def _places(wheres: Sequence[str]) -> list[str]:
    """Shorten the names of points, or of pairs, by the parts that never vary."""
    points = [point.split("/") for where in wheres for point in where.split(" / ")]
    varied = [i for i, parts in enumerate(zip(*points, strict=True)) if len(set(parts)) > 1]

    def short(point: str) -> str:
        parts = point.split("/")
        return " ".join(parts[i] for i in varied or [-1])

    return [" / ".join(short(p) for p in where.split(" / ")) for where in wheres]


def verdict_table(verdicts: Sequence[VerdictPair]) -> Table:
    """Tabulate each claim's verdict in A and in B, and whether the two agree."""
    rows: list[list[Inline]] = []
    places = _places([v.where for v in verdicts])
    for v, where in zip(verdicts, places, strict=True):
        outcome: Inline = Strong(v.outcome) if v.outcome == "differs" else v.outcome
        if v.outcome == "not comparable":
            outcome = "nothing decided in A"
        a, b = (outcome_with_ratio(*of) for of in ((v.a, v.a_ratio), (v.b, v.b_ratio)))
        rows.append([parse(v.title), where, a, b, outcome])
    return table(("Claim", "Where", "A", "B", "Outcome"), rows)


def outcome_with_ratio(outcome: str, ratio: Interval | None) -> str:
    return (
        outcome
        if ratio is None or ratio.low is None
        else f"{outcome}, {times_with_interval(ratio)}"
    )


def validity_table(side_caveats: Mapping[str, Sequence[Caveat]]) -> Table:
    """Tabulate the caveats of each side, each name once."""
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


def write(comparisons: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    """Write comparisons as Markdown, with a plot of each lab's ratios in a file beside it."""
    from labs.harness.telling import plots  # imports matplotlib, which few commands draw with

    figures = {}
    for comparison in comparisons:
        file = path.with_name(f"{path.stem}-{comparison.lab}.svg")
        if plots.ratios(
            [(f"{r.title}, {where}", i, r.outcome == "differs")
             for r, where, i in figures_with_interval(comparison)], file
        ):  # fmt: skip
            mark = f" FORCED: {comparison.forced}." if comparison.forced else ""
            caption = f"Each figure, B / A, with its 95% interval.{mark}"
            figures[comparison.lab] = Figure(file.name, caption)
    whole.write(path, markdown.document(document(comparisons, refused, figures)))


def figures_with_interval(comparison: Comparison) -> list[tuple[ComparedFigure, str, Interval]]:
    """Return the figures that have an interval, with place and ratio; claims come first."""
    rows = [*comparison.effects, *comparison.rows]
    return [
        (row, where, row.contrast.ratio)
        for row, where in zip(rows, _places([r.where for r in rows]), strict=True)
        if row.contrast and row.contrast.ratio.low is not None
    ]


def write_json(comparisons: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    """Write comparisons as JSON."""
    found = [c.model_dump(mode="json") for c in comparisons]
    whole.write(path, json.dumps({"comparisons": found, "refused": list(refused)}, indent=1))
