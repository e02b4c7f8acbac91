"""Print the progress, tables, and figures beside their aims, for every part."""

from __future__ import annotations

import sys

from rich.markup import escape
from rich.table import Table

from labs.harness.judging.judge import Interval
from labs.harness.telling.terminal import PlainConsole

console = PlainConsole(width=None if sys.stdout.isatty() else 120)


def tell(text: str) -> None:
    """Show what is being measured, on standard error."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def table(title: str, *columns: str) -> Table:
    """Return an empty table; its first column is text, the others are numbers."""
    empty = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        empty.add_column(name, justify="right" if i else "left")
    return empty


def aim(
    figure: str, value: float, bound: float, unit: str = "", at_least: bool = False, doubt: str = ""
) -> None:
    """Print whether a figure meets its aim; `doubt` is a reason why this may be wrong."""
    met = value >= bound if at_least else value <= bound
    colour, word = ("green", "met") if met else ("yellow", "not met")
    sign = "at least" if at_least else "at most"
    unit = f" {unit}" if unit else ""
    verdict = f"[{colour}]{word}[/]" + (f", in doubt: {doubt}" if doubt else "")
    console.print(
        f"Aim: {escape(figure)} {sign} {bound:g}{unit}; it is {value:.3g}{unit}: {verdict}"
    )


def within(ratio: Interval) -> str:
    """Describe the interval of a ratio; an empty string where there is none."""
    if ratio.low is None or ratio.high is None:
        return ""
    return f" (95% interval {ratio.low:.3f} to {ratio.high:.3f})"


def scaled(value: float | None, by: float, digits: int) -> str:
    """Print a value in another unit, `by` times as large; a dash for None."""
    return "–" if value is None else f"{by * value:.{digits}f}"
