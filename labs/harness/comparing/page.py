"""Write a comparison as one HTML file that needs no server, as a run's page is written.

The words and tables are those of the Markdown, from that same text; added are plots of the ratios
that a reader can zoom, and everything that both manifests record, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dashboards.palette import BOUND, VARIANTS
from labs.harness.comparing import side_by_side
from labs.harness.comparing.comparison import Comparison
from labs.harness.judging.text import number
from labs.harness.telling import html, pages
from labs.harness.telling.document import Section, parts, plain_text
from serving import whole


def write(comparisons: Sequence[Comparison], refused: Sequence[str], path: Path) -> None:
    whole.write(path, page(comparisons, refused))


def page(comparisons: Sequence[Comparison], refused: Sequence[str]) -> str:
    document = side_by_side.document(comparisons, refused)
    heading, _, sections = parts(document)
    return pages.render(
        "compare.html",
        scripts={
            pages.PLOTLY: get_plotlyjs(),
            "compare.js": pages.web("page.js", "plot.js", "compare.js"),
        },
        title=f"{plain_text(heading)}: {', '.join(c.lab for c in comparisons)}",
        sections=[
            _PageSection.of(section, comparison)
            for section, comparison in zip(sections, [*comparisons, None], strict=False)
        ],
        data={
            "colours": VARIANTS,
            "differs": BOUND,
            "comparisons": [{"lab": c.lab, "rows": _rows(c)} for c in comparisons],
        },
    )


@dataclass(frozen=True)
class _PageSection:
    """Holds a section of the page: a lab's, or the last one, about what was not compared.

    The template puts the plot between the headline and the tables.
    """

    title: str
    id: str
    headline: Markup
    tables: Markup
    comparison: Comparison | None

    @classmethod
    def of(cls, section: Section, comparison: Comparison | None) -> _PageSection:
        heading, _, tables = parts(section)
        title = plain_text(heading)
        headline = html.introduction(section, _no_picture)
        return cls(
            title, html.anchor(title), headline, html.fragment(tables, _no_picture), comparison
        )


def _no_picture(file: str, words: str, caption: Markup) -> Markup:
    """Leave pictures out, as the page draws its own."""
    return Markup("")


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
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
        for row, where, ratio in side_by_side.figures_with_interval(comparison)
    ]
