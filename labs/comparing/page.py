"""A comparison as one HTML file that needs no server, made as a run's page is.

The words and tables are those of the Markdown; added are the ratios as plots to look closer at, and
everything that both manifests record, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from labs.comparing import side_by_side
from labs.comparing.compare import Comparison
from labs.judging.text import number
from labs.telling import html, markdown
from labs.telling.plots import CYCLE, ORANGE


def write(found: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    html.keep(path, page(found, refused))


def page(found: Sequence[Comparison], refused: Sequence[str]) -> str:
    text = markdown.document(side_by_side.document(found, refused))
    title, intro, sections = html.in_sections(html.READER.parse(text))
    return html.render(
        "compare.html",
        scripts=[get_plotlyjs(), html.web("page.js", "plot.js", "compare.js")],
        title=f"{title}: {', '.join(c.lab for c in found)}",
        intro=intro,
        sections=[
            _Section(s.title, s.id, *_apart(s.body), c)
            for s, c in zip(sections, [*found, None], strict=False)
        ],
        data={
            "colours": CYCLE,
            "differs": ORANGE,
            "comparisons": [{"lab": c.lab, "rows": _rows(c)} for c in found],
        },
    )


@dataclass(frozen=True)
class _Section:
    """One lab's, or at the end the one about what was not compared."""

    title: str
    id: str
    headline: Markup
    tables: Markup
    found: Comparison | None


def _apart(body: Markup) -> tuple[Markup, Markup]:
    """What stands before the first table, between which and the tables the plot goes."""
    headline, heading, rest = body.partition("<h3>")
    return headline, heading + rest


def _rows(found: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "kind": row.title,
            "where": where,
            "a": number(row.a, row.unit),
            "b": number(row.b, row.unit),
            "value": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "outcome": row.outcome,
        }
        for row, where, ratio in side_by_side.drawable(found)
    ]
